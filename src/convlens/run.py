"""The run folder: what a training leaves behind, and the only thing later commands read.

`models/<run>/` holds `model.safetensors` (chosen weights and all that is needed to use them),
`recipe.yaml` (resolved, trainable as it stands), `run.json` (what was asked, data, hardware,
status), `split.csv` (what was held out), `images.csv.gz` (which image files there were),
`metrics.csv` (one row an epoch), `results.json` (each look at a split) and `state/` (to continue,
or to extend). Plots are in `plots/<run>/`.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from convlens import models, serialization
from convlens.data.loader import Normalize, Prepare
from convlens.device import select_device
from convlens.distributed import ProcessGroup
from convlens.errors import (
    DataError,
    ModelFileError,
    ResourceError,
    UsageError,
    close_matches,
    did_you_mean,
)
from convlens.recipe import Recipe, load_recipe
from convlens.serialization import CheckpointStore
from convlens.utils import files

MODELS_DIR = Path("models")
PLOTS_DIR = Path("plots")
LOCK_TIMEOUT_S = 60.0  # results.json is held for milliseconds
MAX_NAME_BYTES = 150  # bytes of a run's name; systems take 255, and plots' names are longer


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input; stored in the model, used everywhere."""

    image_size: int
    channels: int
    fit: str
    mean: list[float]
    std: list[float]

    @property
    def normalize(self) -> Prepare:
        return Normalize(self.mean, self.std)


@dataclass
class LoadedModel:
    """A model file brought to life: network in eval mode, classes in order, preprocessing."""

    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    model_metadata: dict[str, Any]
    folder: Path | None = None  # of its file, where its run's records may be

    @property
    def can_choose_memory_format(self) -> bool:
        """Whether inference may choose a memory format by timing, which changes last digits."""
        train = self.model_metadata.get("recipe", {}).get("train", {})
        return train.get("memory_format", "auto") == "auto" and not train.get("deterministic")

    @property
    def is_native(self) -> bool:
        """Whether this is the model file itself, not what was exported from it."""
        return True

    def where(self, asked: str | None) -> str:
        """The device to answer on: what was asked for, or the best that suits this model."""
        return select_device(asked)


class RunDir:
    """Paths, reading and writing of one run. Knows nothing of training or evaluating."""

    def __init__(self, path: Path, plots: Path | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.name or self.path.resolve().name  # of `.`, too
        self.plots = plots or PLOTS_DIR / self.name
        self.model_path = self.path / "model.safetensors"
        self.metrics_path = self.path / "metrics.csv"
        self.checkpoints = CheckpointStore(self.path / "state")

    # -- whole run ------------------------------------------------------------------------

    def create(self, recipe: Recipe, facts: Mapping[str, Any]) -> None:
        """Makes the folder with the resolved recipe and `run.json`, status `training`."""
        files.write_atomic(self.path / "recipe.yaml", recipe.to_text())
        self.update_metadata({"created": _now(), "status": "training", **facts})

    def update_metadata(self, facts: Mapping[str, Any]) -> None:
        """Adds facts to `run.json`."""
        content = {**self.metadata(), **facts}
        files.write_atomic(self.path / "run.json", to_json(content))

    def finish(
        self, *, epochs: int, kept: int, seconds: float, cpu_seconds: float = math.nan
    ) -> None:
        """Marks the run as finished; of its states the last one stays, to be extended."""
        facts: dict[str, Any] = {
            "epochs": epochs,
            "kept_epoch": kept,
            "training_seconds": round(seconds, 3),
            "cpu_seconds": None if math.isnan(cpu_seconds) else round(cpu_seconds, 3),
        }
        self.update_metadata({"status": "finished", **facts})
        self.checkpoints.keep_newest()

    def metadata(self) -> dict[str, Any]:
        """What `run.json` says; empty for a folder that is no run yet.

        Raises:
            ModelFileError: it can't be read.
        """
        return read_json(self.path / "run.json", {}, as_object)

    @property
    def finished(self) -> bool:
        return self.metadata().get("status") == "finished" and self.model_path.exists()

    def lock(self) -> AbstractContextManager[None]:
        return files.lock(self.path / ".lock", what=f"run {self.name!r}", owned=LOCKED_FILES)

    def recipe(self) -> Recipe:
        """The resolved recipe, by which the run trained.

        Raises:
            UsageError: no recipe; ModelFileError: not the one it trained by, or a later version's.
        """
        facts = self.metadata()
        with serialization.explain_newer_version(facts.get("convlens")):
            found = load_recipe(self.path / "recipe.yaml")
        if found.digest() not in facts.get("digests", [found.digest()]):
            raise ModelFileError(
                "recipe.yaml was changed after the run had begun: it isn't what it trained by",
                where=str(self.path / "recipe.yaml"),
                fix="restore it; `convlens train` with this file trains it as another run",
            )
        return found

    # -- model ----------------------------------------------------------------------------

    def save_model(self, weights: Mapping[str, Tensor], model_metadata: Mapping[str, Any]) -> str:
        """Writes a network's state dict with its card; returns the file's SHA-256."""
        return serialization.write_model_file(self.model_path, weights, model_metadata)

    # -- log ------------------------------------------------------------------------------

    def write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        files.write_atomic(self.metrics_path, metrics_csv(rows))

    def metrics(self) -> list[dict[str, float]]:
        """One mapping an epoch, in order; NaN where a cell is empty (no validation split).

        Raises:
            ModelFileError: it can't be read. (The checkpoint of an unfinished run has the same
            numbers, and writes them again.)
        """
        return read_metrics(self.metrics_path)

    def write_split(self, held_out: Mapping[str, Sequence[str]]) -> None:
        """`split.csv`: every image that convlens itself held out of training."""
        files.write_atomic(self.path / "split.csv", split_csv(held_out))

    def add_result(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Logs one look at a split, with how many there have been; returns what was logged.

        A look that measured nothing (`convlens look RUN test:17`) has no `accuracy`. Of two at the
        same moment one waits for the other: none is lost, and both are counted.
        """
        of, owned = f"results.json of {self.name!r}", RESULTS_FILES
        path = self.path / ".results.lock"
        with files.lock(path, what=of, timeout_s=LOCK_TIMEOUT_S, owned=owned):
            log = self.evaluation_log()
            same = ("split", "data_fingerprint")
            looks = 1 + sum(all(entry.get(k) == result.get(k) for k in same) for entry in log)
            entry = {"when": _now(), "looks": looks, **result}
            files.write_atomic(self.path / "results.json", to_json([*log, entry]))
        return entry

    def evaluation_log(self) -> list[dict[str, Any]]:
        """Every look at a split, oldest first.

        Raises:
            ModelFileError: it can't be read.
        """
        return read_json(self.path / "results.json", [], as_objects)

    def evaluations(self) -> list[dict[str, Any]]:
        """The looks that measured something, oldest first."""
        return [entry for entry in self.evaluation_log() if "accuracy" in entry]

    # -- state ----------------------------------------------------------------------------

    def save_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """All that is needed to continue from here.

        Args:
            counters: with `model_epoch`, the epoch whose weights the model file must hold for
                the state to be of use (0: none).
        """
        self.checkpoints.save(tensors, counters)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest intact checkpoint whose best weights are intact, too.

        `corrupt_checkpoints` says why newer ones were skipped.
        """
        found = self.checkpoints.read(self._lacks_model)
        return (found.tensors, found.counters) if found else None

    @property
    def corrupt_checkpoints(self) -> list[str]:
        """Why `state` skipped checkpoints, one sentence each."""
        return self.checkpoints.corrupt

    def _lacks_model(self, counters: Mapping[str, Any]) -> str:
        """Why the model file isn't what a state with these counters needs; empty if it is.

        It is written first, so it may be of a later epoch: that will be trained again, alike.
        """
        needed = int(counters.get("model_epoch", 0))
        if not needed:
            return ""
        try:
            epoch = model_epoch(self.model_path)
        except (ModelFileError, KeyError, TypeError, ValueError) as error:
            reason = error.what if isinstance(error, ModelFileError) else "no epoch in it"
            return f"the weights of epoch {needed}, the best ones, are lost: {reason}"
        return "" if epoch >= needed else f"the model file is of epoch {epoch}, not {needed}"


def load_model(path: Path) -> LoadedModel:
    """The network of a model file, in eval mode, with everything needed to use it.

    Raises:
        ModelFileError: damaged or foreign file, or weights that don't fit the network named.
    """
    tensors, model_metadata = serialization.read_model_file(path)
    try:
        preprocessing = Preprocessing(**model_metadata["preprocessing"])
        classes = tuple(model_metadata["classes"])
        name, options = model_metadata["model"]["name"], model_metadata["model"]["options"]
        shape = preprocessing.channels, preprocessing.image_size
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced
            model = models.build_model(name, len(classes), *shape, options)
        models.load_weights(model, tensors)
    except (KeyError, TypeError, RuntimeError, UsageError) as error:
        reason, version = " ".join(str(error).split())[:160], model_metadata.get("convlens", "?")
        raise ModelFileError(
            f"the model file can't be used by this version: {reason}",
            where=str(path),
            fix=f"{'update: ' * serialization.is_newer_version(version)}"
            f"it was written by convlens {version}",
        ) from error
    return LoadedModel(model.eval(), classes, preprocessing, model_metadata, Path(path).parent)


def find_run(name: str | Path, models_folder: Path | None = None) -> RunDir:
    """The run meant by a name, its folder, or its model file.

    Raises:
        UsageError: no run of that name, with near misses; ModelFileError: no such path.
    """
    path = Path(name)
    folder = models_folder or MODELS_DIR
    if os.path.isfile(path):  # (of `Path`, a name too long is an error)
        # A model file on its own is a run without a past; its plots go by its folder's name.
        own = path.name in ("model.safetensors", "model.onnx")
        found = RunDir(path.parent if own else path.with_suffix(""))
        found.model_path = path
        return found
    for candidate in (folder / path, path):
        if any(os.path.isfile(candidate / each) for each in ("model.safetensors", "run.json")):
            return RunDir(candidate)
    text = str(name)
    if "/" in text or "\\" in text or path.suffix in (".safetensors", ".onnx", ".pt", ".pth"):
        raise ModelFileError("no such run or model file", where=text, fix="check the path")
    known = [run.name for run in list_runs(folder)]
    fix = did_you_mean(close_matches(text, known)) or f"runs here: {_some_names(known)}"
    raise UsageError(f"no run called {text!r}", where=f"{folder}/", fix=fix)


class RunHandle:
    """Base class of objects that stand for a run, such as `convlens.Run`."""

    run_dir: RunDir


# A run as the functions of the Python API take it: by name, folder or model file, or as an object.
RunLike = str | Path | RunDir | RunHandle


def as_run_dir(run: RunLike) -> RunDir:
    """Return the run directory of a run. Errors are those of `find_run`."""
    if isinstance(run, RunHandle):
        return run.run_dir
    return run if isinstance(run, RunDir) else find_run(run)


def run_reference(run: RunLike) -> str:
    """Return text by which `find_run` opens this run; names and paths stay as they are."""
    if isinstance(run, str | Path):
        return str(run)
    run_dir = as_run_dir(run)
    is_default_file = run_dir.model_path.name == "model.safetensors"
    return str(run_dir.path if is_default_file else run_dir.model_path)


def list_runs(models_folder: Path | None = None) -> list[RunDir]:
    """All runs in the models folder, by name."""
    folder = models_folder or MODELS_DIR
    if not folder.is_dir():
        return []
    return [RunDir(p) for p in sorted(folder.iterdir()) if (p / "run.json").is_file()]


def runs_with_name(name: str) -> list[RunDir]:
    """The runs that `run_dir` named after `name`: it, a digest behind it, a number."""
    named = re.compile(re.escape(safe_name(name)) + r"(-[0-9a-f]{6})?(-[0-9]+)?")
    return [each for each in list_runs() if named.fullmatch(each.name)]


def find_or_create_run_dir(name: str, digest: str, *, plain: bool, fresh: bool) -> RunDir:
    """The folder for a recipe: the run that already has this very recipe, else a new one.

    A recipe as published takes its own name; one with overrides gets six digits of its hash
    behind it, so that the same command always finds the same run. With `fresh` a new folder is
    taken in any case; nothing is ever overwritten.
    """
    base = safe_name(name) if plain else f"{safe_name(name)}-{digest[:6]}"
    candidates = [base, *([f"{base}-{digest[:6]}"] if plain else [])]
    candidates += [f"{candidates[-1]}-{number}" for number in range(2, 1000)]
    taken = [c for c in candidates if _is_name_taken(MODELS_DIR / c)]
    if not fresh:
        for candidate in reversed(taken):  # the newest of several identical ones
            if digest in RunDir(MODELS_DIR / candidate).metadata().get("digests", []):
                return RunDir(MODELS_DIR / candidate)
        # A run's own recipe.yaml has no `auto` left, so its hash isn't the one in the run's name;
        # and an override may say what the recipe says anyway.
        for other in reversed(runs_with_name(name)):
            if digest in other.metadata().get("digests", []):
                return other
    return RunDir(MODELS_DIR / next(c for c in candidates if c not in taken))


def _is_name_taken(folder: Path) -> bool:
    """Whether anything is in it but what a run that never began leaves: a lock, first files."""
    if not folder.is_dir():
        return folder.exists()
    first = ("recipe.yaml", "split.csv", "images.csv.gz", "state")
    return any(path.name[0] != "." and path.name not in first for path in folder.iterdir())


def safe_name(name: str) -> str:
    """A name that is one folder on every system: letters, digits, `.`, `_`, `-`, other scripts."""
    short = name.encode("utf-8", "replace")[:MAX_NAME_BYTES].decode("utf-8", "ignore")
    return re.sub(r"[^\w.-]+", "-", short).strip("-.") or "run"


def _some_names(items: Iterable[str]) -> str:
    listed = list(items)
    if not listed:
        return "none yet; `convlens train digits` makes one"
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# ---- records ----------------------------------------
# The records of a run as text, and back: `metrics.csv`, `results.json`, `run.json`.
#
# They hold no hash: people read and edit them. A file that does not parse is an error.

T = TypeVar("T")
# What only the holder of a run's lock writes into its folder. (`results.json` has its own lock.)
LOCKED_FILES = (
    "model.safetensors",
    "recipe.yaml",
    "run.json",
    "metrics.csv",
    "split.csv",
    "images.csv.gz",
)
RESULTS_FILES = ("results.json",)
# Each object in `run.json` and `results.json` had these keys up to commit 360f214: a hash of it.
_RETIRED_KEYS = ("format", "sha256")
METRICS_COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "lr",
    "seconds",
    "cpu_seconds",
    "data_seconds",
    "images_per_second",
)


def metrics_csv(rows: Sequence[Mapping[str, float]]) -> str:
    """A log of epochs as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({c: _number(row[c]) for c in METRICS_COLUMNS})
    return text.getvalue()


def parse_csv(text: str) -> list[dict[str, float]]:
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
    if "epoch" not in columns or not set(columns) <= set(METRICS_COLUMNS):
        raise ValueError("its first line doesn't name the columns")
    rows = list[dict[str, float]]()
    for cells in lines:
        if len(cells) != len(columns):
            raise ValueError(f"epoch {len(rows) + 1} has {len(cells)} of {len(columns)} cells")
        rows.append({c: float(v) if v else math.nan for c, v in zip(columns, cells, strict=True)})
        if rows[-1]["epoch"] != len(rows):
            raise ValueError(f"epoch {len(rows)} is missing")
    return rows


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a log of epochs; none where there is no file.

    Raises:
        ModelFileError: it can't be read.
    """
    try:
        return parse_csv(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"the log of epochs can't be used: {error}",
            where=str(path),
            fix="restore it from a copy, or delete it: weights and results stand without it",
        ) from error


def split_csv(held_out: Mapping[str, Sequence[str]]) -> str:
    """Ids and their splits as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "split"])
    for split, ids in held_out.items():
        writer.writerows((identity, split) for identity in ids)
    return text.getvalue()


def to_json(content: Any) -> str:
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


def read_json(path: Path, default: T, parse: Callable[[Any], T]) -> T:
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


def model_epoch(path: Path) -> int:
    """The epoch whose weights a run's model file holds.

    Raises:
        ModelFileError: as `modelfile.read`; KeyError, TypeError, ValueError: no epoch in it.
    """
    return int(serialization.read_model_file(path)[1]["chosen"]["epoch"])


def _number(value: float) -> str:
    """Numbers as text, integers without a point and the rest with enough digits to plot."""
    if math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.8g}"


# ---- onlooker ----------------------------------------
# Read-only view of the run directory for ranks other than 0, which alone writes.


class ReadOnlyRunDir(RunDir):
    """Run directory whose writing methods do nothing."""

    def create(self, recipe: Recipe, facts: Mapping[str, Any]) -> None: ...

    def update_metadata(self, facts: Mapping[str, Any]) -> None: ...

    def finish(self, **facts: Any) -> None: ...

    def lock(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def save_model(self, weights: Mapping[str, Tensor], model_metadata: Mapping[str, Any]) -> str:
        return ""

    def write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None: ...

    def write_split(self, held_out: Mapping[str, Sequence[str]]) -> None: ...

    def save_state(self, tensors: Mapping[str, Any], counters: Mapping[str, Any]) -> None: ...


def shared_run_dir(group: ProcessGroup, find: Callable[[], RunDir]) -> RunDir:
    """Return the run directory that `find` returns on rank 0; read-only on the other ranks."""
    if group.size == 1:
        return find()
    found = find() if group.is_main_process else None
    paths = group.broadcast(
        lambda: [str(found.path), str(found.plots), str(found.model_path)] if found else []
    )
    if found:
        return found
    run_dir = ReadOnlyRunDir(*map(Path, paths[:2]))
    run_dir.model_path = Path(paths[2])  # a bare model file may have any name
    return run_dir


def check_same_images(group: ProcessGroup, name: str, fingerprint: str) -> None:
    """Check that every rank has the images of rank 0, by their fingerprint.

    Raises:
        DataError: a rank has others. It would train on them, or read one image's label for another.
    """
    other = group.first_rank_that_differs(fingerprint)
    if other is not None:
        raise DataError(
            f"process {other} of {group.size} has other images of {name!r} than process 0",
            where=f"process {group.rank} on {socket.gethostname()} has {fingerprint[:12]}",
            fix="give each machine a copy of the same images, or use one shared folder",
        )


def check_same_checkpoint(group: ProcessGroup, progress: Sequence[int], run_dir: RunDir) -> None:
    """Check that every rank loaded the checkpoint that rank 0 did, by its epoch and step.

    Raises:
        ResourceError: a rank sees another checkpoint on its disk.
    """
    other = group.first_rank_that_differs(str(list(progress)))
    if other is not None:
        raise ResourceError(
            f"process {other} does not see the same checkpoint of this run as process 0",
            where=str(run_dir.path),
            fix="all machines must work in one shared folder; see docs/distributed.md",
        )
