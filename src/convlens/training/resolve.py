"""Resolve what the user asked for (a recipe, a file, a data set, a run) into a validated recipe."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from convlens import models, optim, user_code
from convlens.data import splits
from convlens.data.transforms import pipeline
from convlens.engine import losses
from convlens.errors import UsageError, close_matches, did_you_mean, wrong_type
from convlens.models import stages
from convlens.recipe import DataConfig, Recipe, is_recipe_file, load_recipe, recipe_names, variants
from convlens.training import pretrained, transfer

if TYPE_CHECKING:
    from convlens.run import RunDir


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe, and whether it is unmodified; the run of an unmodified recipe has its bare name."""

    recipe: Recipe
    is_unmodified: bool


def resolve_recipe(
    what: str | Path | Mapping[str, Any] | Recipe,
    *,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    variant: str | None = None,
) -> ResolvedRecipe:
    """Return the recipe that a name, a YAML file, a mapping or a data set stands for.

    The name of a recipe takes precedence over that of a data set. A data set alone (built-in name,
    folder, CSV, or the name of a folder under `data/` or `$CONVLENS_DATA`) means the recipe
    `folder` on it.

    Args:
        data: a data set that replaces that of the recipe.
        overrides: `key=value` texts; they take precedence over the variant.
        variant: name of one of the recipe's variants.

    Raises:
        UsageError: neither a recipe nor a data set (close matches are named), or wrong keys or
            values.
    """
    if isinstance(what, Recipe):
        what = what.model_dump(mode="json")
    if isinstance(what, Mapping):
        named = _load_recipe(what, [*_data_override(data), *overrides], variant)
        return ResolvedRecipe(named, is_unmodified=not overrides)
    text = _name_or_path(what)
    if _is_recipe(text):
        named = _load_recipe(text, [*_data_override(data), *overrides], variant)
        if data is None:
            return ResolvedRecipe(named, is_unmodified=not overrides)
        run_name = f"{named.name}-{_dataset_run_name(str(data))}"
        return ResolvedRecipe(
            named.model_copy(update={"name": run_name}), is_unmodified=not overrides
        )
    _check_data_name(text)
    if data is not None:
        raise UsageError(
            f"{text!r} is not a recipe, and --data already names the data",
            fix=f"recipes: {', '.join(recipe_names())}",
        )
    folder = _load_recipe("folder", [*_data_override(text), *overrides], variant)
    return ResolvedRecipe(
        folder.model_copy(update={"name": _dataset_run_name(text)}), is_unmodified=not overrides
    )


def resolve_recipe_or_run(
    what: str | Path | Mapping[str, Any] | Recipe,
    *,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> ResolvedRecipe:
    """Like `resolve_recipe`, and for a run return its recipe under the name of the run.

    The name of a recipe or data set takes precedence over that of a run. The directory of a run is
    always a run.

    Raises:
        UsageError: none of these; close matches are named.
        ModelFileError: the run cannot be read.
    """
    if isinstance(what, Mapping | Recipe):
        return resolve_recipe(what, data=data, overrides=overrides)
    text = _name_or_path(what)
    path = Path(text)
    run_files = (path / "run.json", path / "model.safetensors")
    is_run_path = path.suffix == ".safetensors" or any(map(os.path.isfile, run_files))
    if not is_run_path and (_is_recipe(text) or _is_data(text)):
        return resolve_recipe(what, data=data, overrides=overrides)
    # They import torch, which takes seconds.
    from convlens import run, serialization

    try:
        run_dir = run.find_run(text)
    except UsageError:
        _check_data_name(text, [each.name for each in run.list_runs()])
        raise
    if (run_dir.path / "recipe.yaml").is_file():
        recipe = run_dir.recipe()
    else:  # a bare model file
        model_metadata = run.load_model(run_dir.model_path).model_metadata
        recipe = serialization.recipe_from_metadata(model_metadata)
    run_name = run_dir.name if data is None else f"{run_dir.name}-{_dataset_run_name(str(data))}"
    return resolve_recipe(
        recipe.model_copy(update={"name": run_name}),
        data=data or _moved_to(recipe, run_dir.metadata()),
        overrides=overrides,
    )


def _moved_to(recipe: Recipe, metadata: Mapping[str, Any]) -> str | None:
    """Return where the data set of a run is now; None if it is at its old place, or unknown."""
    from convlens.data.sources import is_available
    from convlens.run import recorded_data_names

    names = [recipe.data.name, *recorded_data_names(metadata)]
    return None if is_available(names[0]) else next(filter(is_available, names), None)


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
    """Resolve the variants of a recipe.

    Args:
        wanted: `all`, a list of names, or names separated by commas. None means the recipe itself;
            its key in the result is None.

    Raises:
        UsageError: the recipe has no variants, or none of that name; close matches are named.
    """
    if wanted is None:
        return {None: resolve_recipe(what, data=data, overrides=overrides)}
    if not isinstance(wanted, str | list | tuple):
        raise wrong_type("variants", wanted, "give names, or 'all'")
    names = [name.strip() for name in wanted.split(",")] if isinstance(wanted, str) else wanted
    for name in names:
        if not isinstance(name, str):
            raise wrong_type("variants", name, "give names, or 'all'")
    if list(names) == ["all"] and not isinstance(what, Recipe):
        given = what if isinstance(what, Mapping) or _is_recipe(_name_or_path(what)) else "folder"
        names = list(variants(given)) or names  # without variants `load_recipe` raises
    return {n: resolve_recipe(what, data=data, overrides=overrides, variant=n) for n in names}


def _is_recipe(text: str) -> bool:
    return text in recipe_names() or is_recipe_file(text)


def resolve_data_config(name: str, overrides: Sequence[str] = ()) -> DataConfig:
    """Return the data section for the name or path of a data set.

    Args:
        overrides: `key=value` texts, with or without `data.` before the key.
    """
    return recipe_for_dataset("folder", name, overrides).data


def recipe_for_dataset(recipe: str, data: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe (a name or a YAML file) on a data set; overrides are of its data section."""
    keys = [key if key.startswith("data.") else f"data.{key}" for key in overrides]
    _check_data_name(data, or_recipe=False)
    return _load_recipe(recipe, [*_data_override(data), *keys])


def _load_recipe(
    what: str | Mapping[str, Any], overrides: Sequence[str], variant: str | None = None
) -> Recipe:
    """Load a recipe with the canonical name of its data set."""
    from convlens.data.sources import canonical_name

    recipe = load_recipe(what, overrides, variant)
    data = recipe.data.model_copy(update={"name": canonical_name(recipe.data.name)})
    code = user_code.source_hashes(_user_parts(recipe))
    return recipe.model_copy(update={"data": data, "code": code})


def _user_parts(recipe: Recipe) -> list[tuple[user_code.Kind, str]]:
    """Return the names of a recipe that are not in the tables of convlens, by kind."""
    from convlens.data.sources import is_user_dataset

    parts: list[tuple[user_code.Kind, str]] = []
    if recipe.model.name not in (*models.MODELS, "auto"):
        parts.append(("models", recipe.model.name))
    if recipe.optim.loss not in losses.LOSSES:
        parts.append(("losses", recipe.optim.loss))
    if recipe.optim.name not in optim.OPTIMIZERS:
        parts.append(("optimizers", recipe.optim.name))
    if is_user_dataset(recipe.data.name):
        parts.append(("datasets", recipe.data.name))
    tables = (*pipeline.AUGMENTS, *pipeline.MIXES)
    names = [name for name, _ in recipe.operations if name not in tables]
    return parts + [("augmentations", name) for name in names]


def named_code(recipes: Iterable[Recipe], named: Iterable[object]) -> frozenset[str]:
    """Return the user code that the user has named in this call, which is a consent to run it.

    What only a recipe file names is not part of it: the file may be somebody else's.

    Args:
        named: overrides, names of data sets, and mappings of the Python API.
    """
    texts = [str(each) for each in named if isinstance(each, str | os.PathLike | Mapping)]
    names = {name for recipe in recipes for name in recipe.code}
    patterns = {name: re.compile(rf"(?<![\w./-]){re.escape(name)}(?![\w-])") for name in names}
    return frozenset(name for name, pattern in patterns.items() if any(map(pattern.search, texts)))


def is_run_of(recipe: Recipe, run_dir: RunDir) -> bool:
    """Return whether a run directory is that of a run of this recipe.

    The data set counts as the same under any spelling of its name, such as those that earlier
    versions recorded, and where it was found after it had moved.
    """
    from convlens.data.sources import is_same_data
    from convlens.run import recorded_data_names

    if run_dir.has_digest(recipe.digest(), recipe.earlier_digest()):
        return True
    names = recorded_data_names(run_dir.metadata())
    if not any(is_same_data(name, recipe.data.name) for name in names):
        return False
    before = with_data_name(recipe, names[0])
    return run_dir.has_digest(before.digest(), before.earlier_digest())


def with_data_name(recipe: Recipe, name: str) -> Recipe:
    """Return a recipe with another spelling of the name of its data set."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"name": name})})


def _name_or_path(what: object) -> str:
    """Return a name or path as text.

    Raises:
        UsageError: it is something else, such as an array of images.
    """
    if isinstance(what, str | os.PathLike):
        text = str(os.fspath(what))
        if "\0" in text:
            raise UsageError(f"{text!r} contains a null byte", fix="check the name")
        return text
    raise UsageError(
        f"an object of type {type(what).__name__!r} is neither a recipe nor a data set",
        fix="for images in memory use convlens.ImageClassifier().fit(images, labels); otherwise "
        "name a folder with one folder per class, or a CSV file with the columns path,label",
    )


def override_texts(overrides: Mapping[str, Any] | Sequence[str] | str) -> list[str]:
    """Return overrides of the Python API as `key=value` texts.

    Args:
        overrides: a mapping `{"optim.lr": 0.1}`, a list `["optim.lr=0.1"]`, or one such text.

    Raises:
        UsageError: something else, such as labels.
    """
    if isinstance(overrides, Mapping):
        return to_overrides(overrides)
    is_list = isinstance(overrides, list | tuple)
    texts: list[Any] = list(overrides) if is_list else [overrides]
    wrong = [type(each).__name__ for each in texts if not isinstance(each, str)]
    if wrong:
        raise UsageError(
            f"overrides must be texts like 'optim.lr=0.1', not {wrong[0]!r}",
            fix='give {"optim.lr": 0.1} or ["optim.lr=0.1"]; for images and labels in memory use '
            "convlens.ImageClassifier().fit(images, labels)",
        )
    return texts


def to_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return Python values, e.g. `{"optim.lr": 0.1}`, as `key=value` texts."""
    texts = []
    for key, value in values.items():
        try:
            # Not as \uXXXX: YAML reads the surrogates of an emoji as two characters.
            texts.append(f"{key}={json.dumps(value, default=_to_plain, ensure_ascii=False)}")
        except TypeError as error:
            raise UsageError(f"{key}={value!r} cannot be used in a recipe: {error}") from error
    return texts


def _to_plain(value: Any) -> Any:
    """Convert paths to text, and NumPy numbers and arrays (of a grid search) to Python values."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"values of type {type(value).__name__} are not supported")


def _data_override(data: str | Path | None) -> list[str]:
    return [] if data is None else to_overrides({"data.name": _name_or_path(data)})


def _dataset_run_name(data: str) -> str:
    """Return the name of runs on a data set: the name of its folder, or of its file."""
    from convlens.data.image_paths import is_file_url, path_of_file_url

    data = path_of_file_url(data) if is_file_url(data) else data
    if user_code.is_import_path(data) and not os.path.exists(data):
        return data.rpartition(":")[2]
    path = Path(data)
    is_file = path.suffix.lower() in (
        ".csv",
        ".txt",
        ".lst",
        ".json",
        ".jsonl",
        ".ndjson",
        ".parquet",
        ".tar",
    )
    return path.stem if is_file else os.path.basename(os.path.realpath(data))


def _check_data_name(text: str, runs: Sequence[str] = (), *, or_recipe: bool = True) -> None:
    """Raise a `UsageError` with close matches for a text that does not name a data set.

    Args:
        runs: names of runs, where a run may be named as well.
        or_recipe: whether a recipe may be named as well.
    """
    from convlens.data.scan import is_directory
    from convlens.data.sources import known_names

    datasets = known_names(text)
    if text in datasets:
        return
    folders: list[str] = []
    with suppress(OSError):  # the current directory may be unreadable
        folders = sorted(entry.name for entry in os.scandir() if is_directory(entry))
    # Not the recipe for own images: who mistypes the name of a folder does not mean it.
    recipes = [name for name in recipe_names() if name != "folder"] if or_recipe else []
    close = close_matches(text, list(dict.fromkeys([*recipes, *datasets, *folders, *runs])))
    if not or_recipe:
        fix = did_you_mean(close) or f"choose from: {', '.join(datasets)}"
        raise UsageError(f"unknown data {text!r}", fix=f"{fix} (or name a folder or CSV)")
    fix = did_you_mean(close) or (
        "name a folder or list of images, or a recipe: `convlens recipes` lists them"
    )
    what = "neither a recipe, a data set nor a run" if runs else "neither a recipe nor a data set"
    raise UsageError(f"{text!r} is {what}", fix=fix)


def validate_recipe(recipe: Recipe) -> None:
    """Check every name and option of a recipe before any image is read.

    The network is built and run once on zeros. A network that is chosen by the images
    (`model.name: auto`) is checked by `build_training_job`.

    Raises:
        UsageError: lists everything that is wrong.
    """
    # Names of modules and parameters may be those of another network than the assumed one.
    is_open = (recipe.model.name, recipe.model.weights) == ("auto", "auto")
    recipe = transfer.choose_start(recipe, None, transfer.backbones_for(recipe)).recipe
    size = recipe.data.image_size if recipe.data.image_size != "auto" else 224
    channels = recipe.data.channels if recipe.data.channels != "auto" else 3
    config = recipe.model

    model: nn.Module | None = None

    def check_model() -> None:
        nonlocal model
        network = models.try_out(
            config.name, channels, size, config.options, recipe.train.batch_size
        )
        if not is_open:
            stages.freeze(network, config.trainable)
            model = network

    def check_optimizer() -> None:
        if model is not None:
            optim.check_optimizer(model, recipe.optim)
        else:  # check what does not depend on the network
            rest = {"groups": [], "layer_decay": 1.0, "head_first": 0.0}
            optim.check_optimizer(nn.Linear(1, 1), recipe.optim.model_copy(update=rest))

    def mixes() -> list[str]:
        try:
            return pipeline.mixes_labels(recipe.operations)
        except UsageError:  # `build_pipeline` reports it
            return []

    checks: list[Callable[[], object]] = [
        lambda: splits.check_split_config(recipe.data),
        lambda: _check_selection(recipe),
        lambda: losses.check_loss(recipe.optim, mixes=bool(mixes())),
        check_model,
        lambda: pretrained.check_weights_config(config),
        lambda: pipeline.build_pipeline(recipe.operations),
        check_optimizer,
        lambda: optim.build_schedule(recipe.optim),
        lambda: optim.build_averager(nn.Module(), recipe.optim, steps=1),
    ]
    errors: list[UsageError] = []
    for check in checks:
        try:
            check()
        except UsageError as error:
            errors.append(error)
    if errors:
        fix = "; ".join(error.fix for error in errors if error.fix)
        raise UsageError("; ".join(error.what for error in errors), where=recipe.name, fix=fix)


def _check_selection(recipe: Recipe) -> None:
    """Refuse options that select an epoch by validation if there is no validation split."""
    wrong = [f"train.keep={recipe.train.keep}"] if recipe.train.keep != "last" else []
    if recipe.train.patience is not None:
        wrong.append(f"train.patience={recipe.train.patience}")
    if wrong and not recipe.data.validates:
        raise UsageError(
            f"data.val_fraction=0 leaves no validation split, but {' and '.join(wrong)} needs one",
            fix="set train.keep=last train.patience=null, or let --refit find the epochs first",
        )
