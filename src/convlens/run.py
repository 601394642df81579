"""The run folder: what a training leaves behind, and the only thing later commands read.

`models/<run>/` holds `model.safetensors` (chosen weights and all that is needed to use them),
`recipe.yaml` (resolved, trainable as it stands), `run.json` (what was asked, data, hardware,
status), `split.csv` (what was held out), `metrics.csv` (one row an epoch), `results.json` (each
look at a split) and, until it is finished, `state/` (to continue). Plots are in `plots/<run>/`.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convlens import device, files, modelfile, models
from convlens.data.batches import Normalise, Prepare
from convlens.errors import ModelFileError, UsageError
from convlens.names import near
from convlens.recipe import Recipe

MODELS = Path("models")
PLOTS = Path("plots")
COLUMNS = (
    "epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds",
    "cpu_seconds", "data_seconds", "images_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; stored in the model, used everywhere."""

    image_size: int
    channels: int
    fit: str
    mean: list[float]
    std: list[float]

    @property
    def normalise(self) -> Prepare:
        return Normalise(self.mean, self.std)


@dataclass
class Loaded:
    """A model file brought to life: network in eval mode, classes in order, preprocessing."""

    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    card: dict[str, Any]

    @property
    def free(self) -> bool:
        """Whether inference may choose a memory format by timing, which changes last digits."""
        train = self.card.get("recipe", {}).get("train", {})
        return train.get("memory_format", "auto") == "auto" and not train.get("deterministic")

    @property
    def original(self) -> bool:
        """Whether this is the model file itself, not what was exported from it."""
        return True

    def where(self, asked: str | None) -> str:
        """The device to answer on: what was asked for, or the best that suits this model."""
        return device.choose(asked)


class RunFolder:
    """Paths, reading and writing of one run. Knows nothing of training or evaluating."""

    def __init__(self, path: Path, plots: Path | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.name or self.path.resolve().name  # of `.`, too
        self.plots = plots or PLOTS / self.name
        self.model_path = self.path / "model.safetensors"
        self.state_path = self.path / "state" / "state.safetensors"

    # -- whole run ------------------------------------------------------------------------

    def create(self, recipe: Recipe, facts: Mapping[str, Any]) -> None:
        """Makes the folder with the resolved recipe and `run.json`, status `training`."""
        files.write_atomic(self.path / "recipe.yaml", recipe.to_text())
        self.note({"created": _now(), "status": "training", **facts})

    def note(self, facts: Mapping[str, Any]) -> None:
        """Adds facts to `run.json`."""
        content = {**self.facts(), **facts}
        files.write_atomic(self.path / "run.json", _json(content))

    def finish(
        self, *, epochs: int, kept: int, seconds: float, cpu_seconds: float = math.nan
    ) -> None:
        """Marks the run as finished; its state to continue from is not needed any more."""
        facts = {
            "epochs": epochs,
            "kept_epoch": kept,
            "training_seconds": round(seconds, 3),
            "cpu_seconds": None if math.isnan(cpu_seconds) else round(cpu_seconds, 3),
        }
        self.note({"status": "finished", **facts})
        shutil.rmtree(self.path / "state", ignore_errors=True)

    def facts(self) -> dict[str, Any]:
        """What `run.json` says; empty for a folder that is no run yet."""
        content = _read_json(self.path / "run.json", {})
        return content if isinstance(content, dict) else {}

    @property
    def finished(self) -> bool:
        return self.facts().get("status") == "finished" and self.model_path.exists()

    def lock(self) -> AbstractContextManager[None]:
        return files.lock(self.path / ".lock", what=f"run {self.name!r}")

    # -- model ----------------------------------------------------------------------------

    def save_model(self, weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
        """Writes a network's state dict with its card; returns the file's SHA-256."""
        return modelfile.write(self.model_path, weights, card)

    # -- log ------------------------------------------------------------------------------

    def write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({c: _number(row[c]) for c in COLUMNS})
        files.write_atomic(self.path / "metrics.csv", text.getvalue())

    def metrics(self) -> list[dict[str, float]]:
        """One mapping an epoch, in order; NaN where a cell is empty (no validation split)."""
        path = self.path / "metrics.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [
                {k: float(v) if v else math.nan for k, v in row.items()}
                for row in csv.DictReader(file)
            ]

    def write_split(self, held_out: Mapping[str, Sequence[str]]) -> None:
        """`split.csv`: every image that convlens itself held out of training."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["id", "split"])
        for split, ids in held_out.items():
            writer.writerows((identity, split) for identity in ids)
        files.write_atomic(self.path / "split.csv", text.getvalue())

    def add_result(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Logs one look at a split, with how many there have been; returns what was logged.

        A look that measured nothing (`convlens look RUN test:17`) has no `accuracy`.
        """
        log = self.log()
        same = ("split", "data_fingerprint")
        looks = 1 + sum(all(entry.get(k) == result.get(k) for k in same) for entry in log)
        entry = {"when": _now(), "looks": looks, **result}
        files.write_atomic(self.path / "results.json", _json([*log, entry]))
        return entry

    def log(self) -> list[dict[str, Any]]:
        """Every look at a split, oldest first."""
        content = _read_json(self.path / "results.json", [])
        return content if isinstance(content, list) else []

    def results(self) -> list[dict[str, Any]]:
        """The looks that measured something, oldest first."""
        return [entry for entry in self.log() if "accuracy" in entry]

    # -- state ----------------------------------------------------------------------------

    def save_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """All that is needed to continue after the last finished epoch."""
        modelfile.write(self.state_path, tensors, counters)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return modelfile.read(self.state_path) if self.state_path.exists() else None


def load_model(path: Path) -> Loaded:
    """The network of a model file, in eval mode, with everything needed to use it.

    Raises:
        ModelFileError: damaged or foreign file, or weights that don't fit the network named.
    """
    tensors, card = modelfile.read(path)
    try:
        preprocessing = Preprocessing(**card["preprocessing"])
        classes = tuple(card["classes"])
        name, options = card["model"]["name"], card["model"]["options"]
        model = models.build(
            name, len(classes), preprocessing.channels, preprocessing.image_size, options
        )
        models.load(model, tensors)
    except (KeyError, TypeError, RuntimeError, UsageError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelFileError(
            f"the model file can't be used by this version: {reason}",
            where=str(path),
            fix=f"it was written by convlens {card.get('convlens', '?')}",
        ) from error
    return Loaded(model.eval(), classes, preprocessing, card)


def find(name: str | Path, models_folder: Path | None = None) -> RunFolder:
    """The run meant by a name, its folder, or its model file.

    Raises:
        UsageError: no run of that name, with near misses; ModelFileError: no such path.
    """
    path = Path(name)
    folder = models_folder or MODELS
    if path.is_file():
        # A model file on its own is a run without a past; its plots go by its folder's name.
        own = path.name in ("model.safetensors", "model.onnx")
        found = RunFolder(path.parent if own else path.with_suffix(""))
        found.model_path = path
        return found
    for candidate in (folder / path, path):
        if (candidate / "model.safetensors").is_file() or (candidate / "run.json").is_file():
            return RunFolder(candidate)
    text = str(name)
    if "/" in text or "\\" in text or path.suffix in (".safetensors", ".onnx", ".pt", ".pth"):
        raise ModelFileError("no such run or model file", where=text, fix="check the path")
    known = [run.name for run in runs(folder)]
    close = near(text, known)
    fix = f"did you mean {' or '.join(close)}?" if close else f"runs here: {_some(known)}"
    raise UsageError(f"no run called {text!r}", where=f"{folder}/", fix=fix)


def runs(models_folder: Path | None = None) -> list[RunFolder]:
    """All runs in the models folder, by name."""
    folder = models_folder or MODELS
    if not folder.is_dir():
        return []
    return [RunFolder(p) for p in sorted(folder.iterdir()) if (p / "run.json").is_file()]


def place(name: str, digest: str, *, plain: bool, fresh: bool) -> RunFolder:
    """The folder for a recipe: the run that already has this very recipe, else a new one.

    A recipe as published takes its own name; one with overrides gets six digits of its hash
    behind it, so that the same command always finds the same run. With `fresh` a new folder is
    taken in any case; nothing is ever overwritten.
    """
    base = safe(name) if plain else f"{safe(name)}-{digest[:6]}"
    candidates = [base, *([f"{base}-{digest[:6]}"] if plain else [])]
    candidates += [f"{candidates[-1]}-{number}" for number in range(2, 1000)]
    taken = [c for c in candidates if _is_taken(MODELS / c)]
    if not fresh:
        for candidate in reversed(taken):  # the newest of several identical ones
            if digest in RunFolder(MODELS / candidate).facts().get("digests", []):
                return RunFolder(MODELS / candidate)
        # A run's own recipe.yaml has no `auto` left, so its hash isn't the one in the run's name;
        # and an override may say what the recipe says anyway.
        named = re.compile(re.escape(safe(name)) + r"(-[0-9a-f]{6})?(-[0-9]+)?")
        for other in reversed(runs()):
            if named.fullmatch(other.name) and digest in other.facts().get("digests", []):
                return other
    return RunFolder(MODELS / next(c for c in candidates if c not in taken))


def _is_taken(folder: Path) -> bool:
    """Whether anything is in it but what a run that never began leaves: a lock, first files."""
    if not folder.is_dir():
        return folder.exists()
    first = ("recipe.yaml", "split.csv")
    names = [path.name for path in folder.iterdir()]
    return any(not name.startswith(".") and name not in first for name in names)


def safe(name: str) -> str:
    """A name that is one folder on every system: letters, digits, `.`, `_`, `-`, other scripts."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    if not listed:
        return "none yet; `convlens train digits` makes one"
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _number(value: float) -> str:
    """Numbers as text, integers without a point and the rest with enough digits to plot."""
    if math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.8g}"


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _read_json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ModelFileError(
            f"unreadable: {error}", where=str(path), fix="restore it, or train with --fresh"
        ) from error
