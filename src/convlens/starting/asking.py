"""From what was typed or passed to a checked recipe: one reading for command line and Python."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convlens import recipe as recipes
from convlens.errors import UsageError
from convlens.names import did_you_mean, near
from convlens.recipe import Recipe
from convlens.schema import DataConfig


@dataclass(frozen=True)
class Asked:
    """A recipe, and whether it is as published (then its run takes the bare name)."""

    recipe: Recipe
    plain: bool


def read(
    what: str | Path | Mapping[str, Any] | Recipe,
    *,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
    variant: str | None = None,
) -> Asked:
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
        named = recipes.load(what, [*_data_override(data), *overrides], variant)
        return Asked(named, plain=not overrides)
    text = os.fspath(what)
    if _is_recipe(text):
        named = recipes.load(text, [*_data_override(data), *overrides], variant)
        if data is None:
            return Asked(named, plain=not overrides)
        called = f"{named.name}-{_called(str(data))}"
        return Asked(named.model_copy(update={"name": called}), plain=not overrides)
    _check_data_name(text)
    if data is not None:
        raise UsageError(
            f"{text!r} is no recipe, and --data names the data already",
            fix=f"recipes: {', '.join(recipes.names())}",
        )
    folder = recipes.load("folder", [*_data_override(text), *overrides], variant)
    return Asked(folder.model_copy(update={"name": _called(text)}), plain=not overrides)


def read_or_run(
    what: str | Path | Mapping[str, Any] | Recipe,
    *,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Asked:
    """As `read`, or the recipe of a run, which goes by the run's name.

    The name of a recipe or data set wins over that of a run, the folder of a run is a run.

    Raises:
        UsageError: none of these, with near misses; ModelFileError: a run that can't be read.
    """
    if not isinstance(what, str | os.PathLike):
        return read(what, data=data, overrides=overrides)
    text = os.fspath(what)
    path = Path(text)
    marks = (path / "run.json", path / "model.safetensors")
    by_path = path.suffix == ".safetensors" or any(map(os.path.isfile, marks))
    if not by_path and (_is_recipe(text) or _is_data(text)):
        return read(what, data=data, overrides=overrides)
    from convlens import run
    from convlens.formats import modelfile  # torch: only where there is a run to read

    try:
        place = run.find(text)
    except UsageError:
        _check_data_name(text, [each.name for each in run.runs()])
        raise
    alone = not (place.path / "recipe.yaml").is_file()
    card = run.load_model(place.model_path).card if alone else {}
    of_run = modelfile.recipe_of(card) if alone else place.recipe()
    called = place.name if data is None else f"{place.name}-{_called(str(data))}"
    return read(of_run.model_copy(update={"name": called}), data=data, overrides=overrides)


def _is_data(text: str) -> bool:
    from convlens.data.sources import known

    return text in known(text)


def read_variants(
    what: str | Path | Mapping[str, Any] | Recipe,
    wanted: str | Sequence[str] | None,
    *,
    data: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str | None, Asked]:
    """Read a recipe's variants by name: `all`, a list, or names separated by commas.

    With None the recipe itself is read; its key is None.

    Raises:
        UsageError: the recipe has no variants, or none of that name, with near misses.
    """
    if wanted is None:
        return {None: read(what, data=data, overrides=overrides)}
    names = [name.strip() for name in wanted.split(",")] if isinstance(wanted, str) else wanted
    if list(names) == ["all"] and not isinstance(what, Recipe):
        given = what if isinstance(what, Mapping) or _is_recipe(os.fspath(what)) else "folder"
        names = list(recipes.variants(given)) or names  # `read` raises where there are none
    return {n: read(what, data=data, overrides=overrides, variant=n) for n in names}


def _is_recipe(text: str) -> bool:
    return text in recipes.names() or recipes.is_file(text)


def read_data(name: str, overrides: Sequence[str] = ()) -> DataConfig:
    """The data section meant by a data set's name or path; `val_fraction=0.2` needs no section."""
    return read_on("folder", name, overrides).data


def read_on(recipe: str, data: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe (by name, or a YAML file) on a data set; overrides as for `read_data`."""
    keys = [key if key.startswith("data.") else f"data.{key}" for key in overrides]
    _check_data_name(data)
    return recipes.load(recipe, [*_data_override(data), *keys])


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Python values as `key=value` texts, e.g. `{"optim.lr": 0.1}`."""
    texts = []
    for key, value in values.items():
        try:
            # Not as \uXXXX: YAML would take the two halves of an emoji for two characters.
            texts.append(f"{key}={json.dumps(value, default=_plain, ensure_ascii=False)}")
        except TypeError as error:
            raise UsageError(f"{key}={value!r} is no setting: {error}") from error
    return texts


def _plain(value: Any) -> Any:
    """Paths as text, and numbers and arrays of NumPy (what a grid search passes) as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in a recipe")


def _data_override(data: str | Path | None) -> list[str]:
    return [] if data is None else as_overrides({"data.name": os.fspath(data)})


def _called(data: str) -> str:
    path = Path(data)
    by_stem = path.suffix.lower() in (".csv", ".tar")
    return path.stem if by_stem else os.path.basename(os.path.realpath(data))


def _check_data_name(text: str, runs: Sequence[str] = ()) -> None:
    """Refuses a word that is neither a recipe nor data, naming near misses of both (and runs)."""
    from convlens.data.sources import known

    sets = known(text)
    if text in sets:
        return
    close = near(text, list(dict.fromkeys([*recipes.names(), *sets, *runs])))
    fix = did_you_mean(close) or "`convlens recipes` lists the recipes"
    what = "neither a recipe, a data set nor a run" if runs else "neither a recipe nor a data set"
    raise UsageError(f"{text!r} is {what}", fix=fix)
