"""The records of a run as text, and back: `metrics.csv`, `results.json`, `run.json`.

They hold no hash: people read and edit them. A file that does not parse is an error.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from convlens.errors import ModelFileError
from convlens.formats import modelfile

T = TypeVar("T")
# What only the holder of a run's lock writes into its folder. (`results.json` has its own lock.)
LOCKED = (
    "model.safetensors", "recipe.yaml", "run.json", "metrics.csv", "split.csv", "images.csv.gz",
)  # fmt: skip
RESULTS = ("results.json",)
# Each object in `run.json` and `results.json` had these keys up to commit 360f214: a hash of it.
_RETIRED_KEYS = ("format", "sha256")
COLUMNS = (
    "epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds",
    "cpu_seconds", "data_seconds", "images_per_second",
)  # fmt: skip


def csv_of(rows: Sequence[Mapping[str, float]]) -> str:
    """A log of epochs as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({c: _number(row[c]) for c in COLUMNS})
    return text.getvalue()


def rows_of(text: str) -> list[dict[str, float]]:
    """The rows of a log of epochs; NaN where a cell is empty.

    Raises:
        ValueError: it has other columns than this version's (or some of them), a line that isn't
            whole, what is no number, or not the epochs from 1 on.
    """
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        columns, lines = next(reader, []), list(reader)
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if "epoch" not in columns or not set(columns) <= set(COLUMNS):
        raise ValueError("its first line doesn't name the columns")
    rows = list[dict[str, float]]()
    for cells in lines:
        if len(cells) != len(columns):
            raise ValueError(f"epoch {len(rows) + 1} has {len(cells)} of {len(columns)} cells")
        rows.append({c: float(v) if v else math.nan for c, v in zip(columns, cells, strict=True)})
        if rows[-1]["epoch"] != len(rows):
            raise ValueError(f"epoch {len(rows)} is missing")
    return rows


def log_of(path: Path) -> list[dict[str, float]]:
    """The rows of a log of epochs; none where there is no file.

    Raises:
        ModelFileError: it can't be read.
    """
    try:
        return rows_of(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"the log of epochs can't be used: {error}",
            where=str(path),
            fix="restore it from a copy, or delete it: weights and results stand without it",
        ) from error


def split_of(held_out: Mapping[str, Sequence[str]]) -> str:
    """Ids and their splits as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "split"])
    for split, ids in held_out.items():
        writer.writerows((identity, split) for identity in ids)
    return text.getvalue()


def json_of(content: Any) -> str:
    """JSON that people can read."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def as_object(content: Any) -> dict[str, Any]:
    """A JSON object without the keys of earlier versions, for `read`."""
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return {key: value for key, value in content.items() if key not in _RETIRED_KEYS}


def as_objects(content: Any) -> list[dict[str, Any]]:
    """A JSON list of objects, for `read`."""
    if not isinstance(content, list):
        raise ValueError("it is not a JSON list")
    return [as_object(entry) for entry in content]


def read(path: Path, default: T, parse: Callable[[Any], T]) -> T:
    """Read a JSON file; `default` if the file doesn't exist.

    Args:
        parse: checks the content and returns what is made of it.

    Raises:
        ModelFileError: it can't be read, is not JSON, or `parse` raised ValueError.
    """
    try:
        return parse(json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return default
    except (ValueError, OSError, RecursionError) as error:
        raise ModelFileError(
            f"unreadable: {error}"[:200], where=str(path), fix="restore it, or train with --fresh"
        ) from error


def epoch_of(path: Path) -> int:
    """The epoch whose weights a run's model file holds.

    Raises:
        ModelFileError: as `modelfile.read`; KeyError, TypeError, ValueError: no epoch in it.
    """
    return int(modelfile.read(path)[1]["chosen"]["epoch"])


def _number(value: float) -> str:
    """Numbers as text, integers without a point and the rest with enough digits to plot."""
    if math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.8g}"
