"""From what was typed or passed to a checked recipe: one reading for command line and Python."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from convlens import models, optim
from convlens.data import splits
from convlens.data.transforms import pipeline
from convlens.errors import UsageError, close_matches, did_you_mean
from convlens.models import stages
from convlens.recipe import DataConfig, Recipe, is_recipe_file, load_recipe, recipe_names, variants
from convlens.training import pretrained


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe, and whether it is as published (then its run takes the bare name)."""

    recipe: Recipe
    plain: bool


def resolve_recipe(
    what: str | Path | Mapping[str, Any] | Recipe,
    *,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    variant: str | None = None,
) -> ResolvedRecipe:
    """The recipe meant by a recipe's name, a YAML file, or a data set.

    A recipe's name wins; a data set alone (built-in name, folder, CSV, or the name of a folder
    under `data/` or `$CONVLENS_DATA`) means the recipe `folder` on it. `variant` is the name of
    one of the recipe's variants; `overrides` take precedence over it.

    Raises:
        UsageError: neither a recipe nor a data set, with near misses; wrong keys or values.
    """
    if isinstance(what, Recipe):
        what = what.model_dump(mode="json")
    if isinstance(what, Mapping):
        named = load_recipe(what, [*_data_override(data), *overrides], variant)
        return ResolvedRecipe(named, plain=not overrides)
    text = os.fspath(what)
    if _is_recipe(text):
        named = load_recipe(text, [*_data_override(data), *overrides], variant)
        if data is None:
            return ResolvedRecipe(named, plain=not overrides)
        run_name = f"{named.name}-{_dataset_run_name(str(data))}"
        return ResolvedRecipe(named.model_copy(update={"name": run_name}), plain=not overrides)
    _check_data_name(text)
    if data is not None:
        raise UsageError(
            f"{text!r} is no recipe, and --data names the data already",
            fix=f"recipes: {', '.join(recipe_names())}",
        )
    folder = load_recipe("folder", [*_data_override(text), *overrides], variant)
    return ResolvedRecipe(
        folder.model_copy(update={"name": _dataset_run_name(text)}), plain=not overrides
    )


def resolve_recipe_or_run(
    what: str | Path | Mapping[str, Any] | Recipe,
    *,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> ResolvedRecipe:
    """As `read`, or the recipe of a run, which goes by the run's name.

    The name of a recipe or data set wins over that of a run, the folder of a run is a run.

    Raises:
        UsageError: none of these, with near misses; ModelFileError: a run that can't be read.
    """
    if not isinstance(what, str | os.PathLike):
        return resolve_recipe(what, data=data, overrides=overrides)
    text = os.fspath(what)
    path = Path(text)
    marks = (path / "run.json", path / "model.safetensors")
    by_path = path.suffix == ".safetensors" or any(map(os.path.isfile, marks))
    if not by_path and (_is_recipe(text) or _is_data(text)):
        return resolve_recipe(what, data=data, overrides=overrides)
    from convlens import (
        run,
        serialization,  # torch: only where there is a run to read
    )

    try:
        run_dir = run.find_run(text)
    except UsageError:
        _check_data_name(text, [each.name for each in run.list_runs()])
        raise
    alone = not (run_dir.path / "recipe.yaml").is_file()
    model_metadata = run.load_model(run_dir.model_path).model_metadata if alone else {}
    of_run = serialization.recipe_from_metadata(model_metadata) if alone else run_dir.recipe()
    run_name = run_dir.name if data is None else f"{run_dir.name}-{_dataset_run_name(str(data))}"
    return resolve_recipe(
        of_run.model_copy(update={"name": run_name}), data=data, overrides=overrides
    )


def _is_data(text: str) -> bool:
    from convlens.data.sources import known_names

    return text in known_names(text)


def resolve_variants(
    what: str | Path | Mapping[str, Any] | Recipe,
    wanted: str | Sequence[str] | None,
    *,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str | None, ResolvedRecipe]:
    """Read a recipe's variants by name: `all`, a list, or names separated by commas.

    With None the recipe itself is read; its key is None.

    Raises:
        UsageError: the recipe has no variants, or none of that name, with near misses.
    """
    if wanted is None:
        return {None: resolve_recipe(what, data=data, overrides=overrides)}
    names = [name.strip() for name in wanted.split(",")] if isinstance(wanted, str) else wanted
    if list(names) == ["all"] and not isinstance(what, Recipe):
        given = what if isinstance(what, Mapping) or _is_recipe(os.fspath(what)) else "folder"
        names = list(variants(given)) or names  # `read` raises where there are none
    return {n: resolve_recipe(what, data=data, overrides=overrides, variant=n) for n in names}


def _is_recipe(text: str) -> bool:
    return text in recipe_names() or is_recipe_file(text)


def resolve_data_config(name: str, overrides: Sequence[str] = ()) -> DataConfig:
    """The data section meant by a data set's name or path; `val_fraction=0.2` needs no section."""
    return recipe_for_dataset("folder", name, overrides).data


def recipe_for_dataset(recipe: str, data: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe (by name, or a YAML file) on a data set; overrides as for `read_data`."""
    keys = [key if key.startswith("data.") else f"data.{key}" for key in overrides]
    _check_data_name(data)
    return load_recipe(recipe, [*_data_override(data), *keys])


def to_overrides(values: Mapping[str, Any]) -> list[str]:
    """Python values as `key=value` texts, e.g. `{"optim.lr": 0.1}`."""
    texts = []
    for key, value in values.items():
        try:
            # Not as \uXXXX: YAML would take the two halves of an emoji for two characters.
            texts.append(f"{key}={json.dumps(value, default=_to_plain, ensure_ascii=False)}")
        except TypeError as error:
            raise UsageError(f"{key}={value!r} is no setting: {error}") from error
    return texts


def _to_plain(value: Any) -> Any:
    """Paths as text, and numbers and arrays of NumPy (what a grid search passes) as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in a recipe")


def _data_override(data: str | Path | None) -> list[str]:
    return [] if data is None else to_overrides({"data.name": os.fspath(data)})


def _dataset_run_name(data: str) -> str:
    path = Path(data)
    by_stem = path.suffix.lower() in (".csv", ".tar")
    return path.stem if by_stem else os.path.basename(os.path.realpath(data))


def _check_data_name(text: str, runs: Sequence[str] = ()) -> None:
    """Refuses a word that is neither a recipe nor data, naming near misses of both (and runs)."""
    from convlens.data.sources import known_names

    sets = known_names(text)
    if text in sets:
        return
    close = close_matches(text, list(dict.fromkeys([*recipe_names(), *sets, *runs])))
    fix = did_you_mean(close) or "`convlens recipes` lists the recipes"
    what = "neither a recipe, a data set nor a run" if runs else "neither a recipe nor a data set"
    raise UsageError(f"{text!r} is {what}", fix=fix)


# ---- checking ----------------------------------------
# Every name and option of a recipe tried before any image is read.


def validate_recipe(recipe: Recipe) -> None:
    """Tries every name and option of a recipe before any image is read.

    Raises:
        UsageError: all that is wrong at once.
    """
    size = recipe.data.image_size if recipe.data.image_size != "auto" else 224
    channels = recipe.data.channels if recipe.data.channels != "auto" else 3
    net = recipe.model

    built: list[nn.Module] = []

    def try_model() -> None:
        model = models.try_out(net.name, channels, size, net.options, recipe.train.batch_size)
        stages.freeze(model, net.trainable)
        built.append(model)

    def check_optimiser() -> None:
        if built:
            optim.check_optimizer(built[0], recipe.optim)
        else:  # what doesn't depend on the network can still be told
            rest = {"groups": [], "layer_decay": 1.0, "head_first": 0.0}
            optim.check_optimizer(nn.Linear(1, 1), recipe.optim.model_copy(update=rest))

    tries: list[Callable[[], object]] = [
        lambda: splits.check_split_config(recipe.data),
        lambda: _check_selection(recipe),
        try_model,
        lambda: pretrained.check_weights_config(net),
        lambda: pipeline.build_pipeline(recipe.operations),
        check_optimiser,
        lambda: optim.build_schedule(recipe.optim),
        lambda: optim.build_averager(nn.Module(), recipe.optim, steps=1),
    ]
    found: list[UsageError] = []
    for attempt in tries:
        try:
            attempt()
        except UsageError as error:
            found.append(error)
    if found:
        fix = "; ".join(error.fix for error in found if error.fix)
        raise UsageError("; ".join(error.what for error in found), where=recipe.name, fix=fix)


def _check_selection(recipe: Recipe) -> None:
    """Without a validation split there is nothing to choose an epoch by."""
    wrong = [f"train.keep={recipe.train.keep}"] if recipe.train.keep != "last" else []
    if recipe.train.patience is not None:
        wrong.append(f"train.patience={recipe.train.patience}")
    if wrong and not recipe.data.validates:
        raise UsageError(
            f"data.val_fraction=0 leaves no validation split, but {' and '.join(wrong)} needs one",
            fix="set train.keep=last train.patience=null, or let --refit find the epochs first",
        )
