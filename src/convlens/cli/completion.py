"""What a shell completes: names of runs, recipes, data sets and classes, keys and their values.

A shell asks at each press of the Tab key, so nothing here imports torch or numpy. Paths are listed
as well, since a shell that got other suggestions does not add its own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from convlens import run_folders

MODEL_FILES = (".onnx", ".safetensors")
RECIPE_FILES = (".yaml", ".yml")
LISTS = (".csv", ".json", ".jsonl", ".parquet", ".tar", ".tsv", ".txt")
IMAGE_FILES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
BUILT_IN_SETS = ("digits", "shapes")  # those that are never downloaded
IMAGES_OF_SPLITS = ("val:", "train:", "test:", "worst:")
MAX_PATHS = 200
# Typer's scripts pass suggestions through `eval`.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f'\"`$\\;|&<>()*?!{}]")


def one_of(incomplete: str, *values: str) -> list[str]:
    """Return the values that a word may become."""
    return [value for value in values if value.startswith(incomplete)]


def list_of(incomplete: str, *values: str) -> list[str]:
    """Return completions of the last name in a list with commas."""
    before, comma, last = incomplete.rpartition(",")
    used = before.split(",")
    return [before + comma + value for value in one_of(last, *values) if value not in used]


def complete_run(incomplete: str) -> list[str]:
    """Complete a trained model: a run, a folder or a model file."""
    return _safe([*_run_names(incomplete), *_paths(incomplete, MODEL_FILES)])


def complete_run_or_image(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete an argument of `look`: a run, then images of a split, files and keys."""
    names = _given(ctx, "names")
    of_splits = list(IMAGES_OF_SPLITS) if names else []
    of_splits += [f"class:{name}:" for name in _classes(names)]
    found = [*_run_names(incomplete), *one_of(incomplete, *of_splits)]
    return _safe([*found, *_paths(incomplete, (*MODEL_FILES, *IMAGE_FILES))])


def complete_class(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete a class of the first run of the command."""
    return _safe(one_of(incomplete, *_classes(_given(ctx, "names"))))


def complete_recipe(incomplete: str) -> list[str]:
    """Complete a recipe by name, or a recipe file."""
    from convlens.recipe import recipe_names

    return _safe([*one_of(incomplete, *recipe_names()), *_paths(incomplete, RECIPE_FILES)])


def complete_data(incomplete: str) -> list[str]:
    """Complete a data set: built-in, a folder of a data root, a folder, a list or shards."""
    from convlens.data import download

    names = [*BUILT_IN_SETS, *download.DOWNLOADS]
    for root in download.data_roots():
        with suppress(OSError):
            names += [entry.name for entry in os.scandir(root) if entry.is_dir()]
    return _safe([*one_of(incomplete, *names), *_paths(incomplete, LISTS)])


def complete_training(incomplete: str) -> list[str]:
    """Complete what `train` takes: a data set or a recipe."""
    return _unique([*complete_recipe(incomplete), *complete_data(incomplete)])


def complete_source(incomplete: str) -> list[str]:
    """Complete what `labels` takes: a data set, a run or a recipe."""
    return _unique([*complete_training(incomplete), *complete_run(incomplete)])


def complete_image(incomplete: str) -> list[str]:
    """Complete an image file or a folder."""
    return _safe(_paths(incomplete, IMAGE_FILES))


def complete_key(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete a recipe key (`optim.lr=`) or its value (`optim.name=sgd`)."""
    return _complete_key(ctx, incomplete, _keys())


def complete_data_key(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete a key of a data set, with or without `data.`."""
    of_data = {key: values for key, values in _keys().items() if key.startswith("data.")}
    short = {key.removeprefix("data."): values for key, values in of_data.items()}
    is_long = incomplete.startswith("data.")
    return _complete_key(ctx, incomplete, of_data if is_long else short)


def _complete_key(
    ctx: typer.Context, incomplete: str, keys: dict[str, tuple[str, ...]]
) -> list[str]:
    key, equals, value = incomplete.partition("=")
    if equals:
        return _safe(f"{key}={each}" for each in one_of(value, *keys.get(key, ())))
    # bash splits words at `=`, so that `optim.name=s` arrives as three words.
    given = _given(ctx, "overrides", "keys")
    if len(given) > 1 and given[-1] == "=":
        return _safe(one_of(incomplete, *keys.get(given[-2], ())))
    return _safe(f"{each}=" for each in one_of(incomplete, *keys))


def _keys() -> dict[str, tuple[str, ...]]:
    """Return all keys of a recipe, with the words that their values may be."""
    from convlens.recipe import load_recipe
    from convlens.recipe_reference import recipe_keys

    keys = recipe_keys(load_recipe({"name": "any", "model": {"name": "auto"}}))
    return {
        each.key: tuple(filter(re.compile(r"[\w+.-]+$").match, each.choices.split(", ")))
        for each in keys
        if each.key != "about"
    }


def _given(ctx: typer.Context, *names: str) -> list[str]:
    """Return the values of the first argument that has some, of these parameters."""
    for name in names:
        if values := ctx.params.get(name):
            return list(values)
    return list(ctx.args)  # of a line that ends with an option without its value


def _run_names(incomplete: str) -> list[str]:
    return one_of(incomplete, *(path.name for path in run_folders.run_folders()))


def _classes(runs: Sequence[str]) -> list[str]:
    """Return the classes of the first run, from its run.json."""
    for name in runs[:1]:
        for folder in (run_folders.MODELS_DIR / name, Path(name)):
            with suppress(OSError, ValueError, KeyError, TypeError):
                metadata: Any = json.loads((folder / "run.json").read_text("utf-8"))
                return [str(each) for each in metadata["data"]["classes"]]
    return []


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return folders, with a slash, and files with one of these extensions."""
    start = incomplete.rpartition("/")[2]
    prefix = incomplete[: len(incomplete) - len(start)]
    found = []
    with suppress(OSError):
        for entry in sorted(os.scandir(prefix or "."), key=lambda entry: entry.name):
            if not entry.name.startswith(start) or (entry.name[0] == "." and not start):
                continue
            if entry.is_dir():
                found.append(f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(suffixes):
                found.append(prefix + entry.name)
    return found[:MAX_PATHS]


def _safe(values: Iterable[str]) -> list[str]:
    """Return values without repetition, and without those that a shell would interpret."""
    return [value for value in _unique(values) if not _UNSAFE.search(value)]


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
