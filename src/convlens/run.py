"""The run directory: all files of a training, and the only input of later commands.

`models/<run>/` contains

    model.safetensors   the selected weights, and everything needed to use them
    recipe.yaml         the resolved recipe, which can be trained again
    run.json            metadata: requested recipe, data, plan, hardware, status
    split.csv           the images that convlens held out for validation and test
    images.csv.gz       all image files of the data set, with their digests
    metrics.csv         one row per epoch
    results.json        the log of evaluations
    state/              checkpoints, to resume or extend the run
    code/               copies of user code that the recipe names

and `plots/<run>/` its plots. JSON and CSV files have no checksum: people read and edit them. A file
that does not parse is an error.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import io
import json
import math
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from convlens import models, serialization, user_code
from convlens.data.decode import MAX_PIXELS, Conversion
from convlens.data.loader import Normalize, Prepare
from convlens.device import preserve_torch_settings, select_device
from convlens.distributed import ProcessGroup
from convlens.errors import (
    ConvlensError,
    DataError,
    ModelFileError,
    ResourceError,
    UsageError,
    close_matches,
    did_you_mean,
    wrong_type,
)
from convlens.recipe import Recipe, load_recipe
from convlens.run_folders import (
    MODELS_DIR as MODELS_DIR,
    PLOTS_DIR as PLOTS_DIR,
    is_run_folder,
    run_folders,
)
from convlens.serialization import CheckpointStore
from convlens.uncertainty.calibration import ModelCalibration
from convlens.utils import files, process

RESULTS_LOCK_TIMEOUT_S = 60.0  # the lock on results.json is held for milliseconds
MAX_NAME_BYTES = 150  # of a run name; file systems allow 255, and file names of plots are longer

T = TypeVar("T")
# Files that only the holder of the run's lock writes. (`results.json` has its own lock.)
LOCKED_FILES = (
    "model.safetensors",
    "recipe.yaml",
    "run.json",
    "metrics.csv",
    "split.csv",
    "images.csv.gz",
    "trainer.json",
)
RESULTS_FILES = ("results.json",)
# Earlier versions stored a hash of each JSON object under these keys.
_RETIRED_KEYS = ("format", "sha256")
VALIDATION_COLUMNS = ("val_loss", "val_accuracy", "val_macro_f1", "val_balanced_accuracy")
METRICS_COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    *VALIDATION_COLUMNS,
    "lr",
    "seconds",
    "cpu_seconds",
    "data_seconds",
    "images_per_second",
)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of the network. Stored in the model file.

    Attributes:
        fit, value_range, background, max_pixels: as for `data.decode.decode`.
    """

    image_size: int
    channels: int
    fit: str
    mean: list[float]
    std: list[float]
    value_range: tuple[float, float] | None = None
    background: str = "white"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.value_range is not None:  # a list where it was read from JSON
            low, high = self.value_range
            object.__setattr__(self, "value_range", (float(low), float(high)))

    @classmethod
    def of(cls, conversion: Conversion, mean: list[float], std: list[float]) -> Preprocessing:
        """Return the preprocessing that converts images and then normalizes them."""
        values = vars(conversion).copy()
        return cls(image_size=values.pop("size"), mean=mean, std=std, **values)

    @property
    def conversion(self) -> Conversion:
        """How an image file becomes pixels."""
        return Conversion(
            self.image_size,
            self.channels,
            self.fit,
            self.value_range,
            self.background,
            self.max_pixels,
        )

    @property
    def normalize(self) -> Prepare:
        return Normalize(self.mean, self.std)

    def to_dict(self) -> dict[str, Any]:
        """Return the values for a model file. Later keys are left out where they are the default.

        So the files of ordinary sets keep their content, and earlier versions can read them.
        """
        later = ("value_range", "background", "max_pixels")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in later or value != defaults[name]
        }


@dataclass
class LoadedModel:
    """The content of a model file, ready for inference.

    Attributes:
        model: in eval mode.
        classes: names, in the order of the outputs.
        folder: of the model file; the other files of its run may be there.
        calibration: temperature, held-out outputs and features that the file stores.
    """

    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    model_metadata: dict[str, Any]
    folder: Path | None = None
    calibration: ModelCalibration = field(default_factory=ModelCalibration)

    @property
    def can_choose_memory_format(self) -> bool:
        """Whether inference may choose a memory format by timing, which changes the last digits."""
        train = self.model_metadata.get("recipe", {}).get("train", {})
        return train.get("memory_format", "auto") == "auto" and not train.get("deterministic")

    @property
    def is_native(self) -> bool:
        """Whether this is a native model file, not an exported one."""
        return True

    def recorded_code(self) -> AbstractContextManager[None]:
        """Within this block, user code is imported as it was at the training of this model."""
        return _recorded_code(self.model_metadata, self.folder)

    def select_device(self, requested: str | None) -> str:
        """Return the device for inference: the requested one, or the best that is available."""
        return select_device(requested)


class RunDir:
    """Paths and files of one run."""

    def __init__(self, path: Path, plots: Path | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.name or self.path.resolve().name  # also for `.`
        self.plots = plots or PLOTS_DIR / self.name
        self.model_path = self.path / "model.safetensors"
        self.metrics_path = self.path / "metrics.csv"
        self.checkpoints = CheckpointStore(self.path / "state")

    # -- whole run ------------------------------------------------------------------------

    def create(self, recipe: Recipe, metadata: Mapping[str, Any]) -> None:
        """Create the directory with the resolved recipe and `run.json`, status `training`."""
        user_code.write_copies(recipe.code, self.path / user_code.COPIES_FOLDER)
        files.write_atomic(self.path / "recipe.yaml", recipe.to_text())
        self.update_metadata({"created": _now(), "status": "training", **metadata})

    def update_metadata(self, changes: Mapping[str, Any]) -> None:
        """Add keys to `run.json`, or replace them."""
        files.write_atomic(self.path / "run.json", to_json({**self.metadata(), **changes}))

    def record_data_path(self, path: str) -> None:
        """Record where a data set that moved is now; nothing for a bare model file.

        The path is only a hint: the fingerprint decides whether the images are those of the run.
        So a run that is being trained, or that cannot be written, stays as it is.
        """
        with contextlib.suppress(ResourceError, OSError), self.lock():
            metadata = self.metadata()
            if metadata:
                self.update_metadata({"data": {**metadata.get("data", {}), "path": path}})

    def finish(
        self, *, epochs: int, kept: int, seconds: float, cpu_seconds: float = math.nan
    ) -> None:
        """Mark the run as finished; keep the last checkpoint, so that it can be extended.

        Args:
            epochs: number of epochs trained.
            kept: epoch of the weights in the model file.
            seconds, cpu_seconds: of the training.
        """
        changes: dict[str, Any] = {
            "epochs": epochs,
            "kept_epoch": kept,
            "training_seconds": round(seconds, 3),
            "cpu_seconds": None if math.isnan(cpu_seconds) else round(cpu_seconds, 3),
        }
        self.update_metadata({"status": "finished", **changes})
        self.checkpoints.keep_newest()

    def metadata(self) -> dict[str, Any]:
        """Return the content of `run.json`; empty if the directory is not a run yet.

        Raises:
            ModelFileError: the file cannot be read.
        """
        return read_json(self.path / "run.json", {}, as_object)

    @property
    def is_finished(self) -> bool:
        """Whether the training has ended and the model file exists."""
        return self.metadata().get("status") == "finished" and self.model_path.exists()

    def lock(self) -> AbstractContextManager[None]:
        """Return the lock that a process holds while it writes the run."""
        return files.lock(self.path / ".lock", what=f"run {self.name!r}", owned=LOCKED_FILES)

    def recorded_trainer(self) -> AbstractContextManager[None]:
        """Record in `trainer.json` which process trains the run, so that others can stop it."""
        return _recorded_process(self.path / "trainer.json")

    def trainer(self) -> dict[str, Any] | None:
        """Return what `recorded_trainer` recorded; None if nobody trains the run.

        The record of a process that was killed stays: ask `process.is_running`.
        """
        found: dict[str, Any] = read_json(self.path / "trainer.json", {}, as_object)
        return found or None

    def remove_if_empty(self) -> None:
        """Remove the directory if it holds nothing but the lock, as after a start that failed."""
        with contextlib.suppress(OSError):
            if [entry.name for entry in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                self.path.rmdir()
                self.path.parent.rmdir()  # fails if there are other runs

    def recipe(self) -> Recipe:
        """Return the resolved recipe that the run trains.

        Raises:
            UsageError: there is no recipe.
            ModelFileError: the file was edited, or a newer version wrote it.
        """
        metadata = self.metadata()
        with serialization.explain_newer_version(metadata.get("convlens")):
            recipe = load_recipe(self.path / "recipe.yaml")
        known = metadata.get("digests", [recipe.digest()])
        if recipe.digest() not in known and recipe.earlier_digest() not in known:
            raise ModelFileError(
                "recipe.yaml was changed after the run started: it is not the recipe of this run",
                where=str(self.path / "recipe.yaml"),
                fix="restore it; `convlens train` on this file trains another run",
            )
        return recipe

    def has_digest(self, digest: str, earlier_digest: str | None = None) -> bool:
        """Return whether this is a run of the recipe with these digests (`Recipe.digest`)."""
        digests = self.metadata().get("digests", [])
        if digest in digests or earlier_digest not in digests:
            return digest in digests
        try:
            return load_recipe(self.path / "recipe.yaml").data.fit == "crop"
        except ConvlensError:  # damaged or edited
            return False

    # -- model ----------------------------------------------------------------------------

    def save_model(self, weights: Mapping[str, Tensor], model_metadata: Mapping[str, Any]) -> str:
        """Write a state dict with its metadata; return the SHA-256 of the file."""
        return serialization.write_model_file(self.model_path, weights, model_metadata)

    def add_calibration(self, calibration: ModelCalibration) -> None:
        """Write the model file again with what was fitted to its outputs; the weights stay."""
        tensors, model_metadata = serialization.read_model_file(self.model_path)
        reference = calibration.detector.reference if calibration.detector else None
        if reference is not None:
            tensors[serialization.REFERENCE_FEATURES] = torch.from_numpy(reference)
        self.save_model(tensors, {**model_metadata, "calibration": calibration.to_metadata()})

    # -- log ------------------------------------------------------------------------------

    def write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        files.write_atomic(self.metrics_path, metrics_csv(rows))

    def metrics(self) -> list[dict[str, float]]:
        """Return one row per epoch, in order; NaN for empty cells (no validation split).

        Raises:
            ModelFileError: the file cannot be read. (The checkpoint of an unfinished run has the
                same numbers, so that resuming it writes the file again.)
        """
        return read_metrics(self.metrics_path)

    def write_split(self, held_out: Mapping[str, Sequence[str]]) -> None:
        """Write `split.csv`: the images that convlens held out, by split."""
        files.write_atomic(self.path / "split.csv", split_csv(held_out))

    def add_result(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Log one use of a split, with the number of its uses so far; return the entry.

        A use that measured nothing (`convlens look RUN test:17`) has no `accuracy`. Concurrent
        processes wait for each other, so that no use is lost or counted twice.
        """
        with files.lock(
            self.path / ".results.lock",
            what=f"results.json of {self.name!r}",
            timeout_s=RESULTS_LOCK_TIMEOUT_S,
            owned=RESULTS_FILES,
        ):
            log = self.evaluation_log()
            keys = ("split", "data_fingerprint")
            uses = 1 + sum(all(entry.get(key) == result.get(key) for key in keys) for entry in log)
            entry = {"when": _now(), "looks": uses, **result}
            files.write_atomic(self.path / "results.json", to_json([*log, entry]))
        return entry

    def inherit_test_uses(self, source: RunDir, fingerprint: str) -> None:
        """Log the uses of the test split of the run that this new run continues.

        Args:
            source: the other run; the test images of both are the same.
            fingerprint: of the data of this run. It differs from that of the source if the image
                size does.
        """
        for entry in source.evaluation_log():
            if entry.get("split") == "test" and entry.get("own"):
                self.add_result(
                    {
                        **{key: entry[key] for key in ("when", "run", "n") if key in entry},
                        "split": "test",
                        "own": True,
                        "by": f"{source.name}, which this run continues",
                        "data_fingerprint": fingerprint,
                    }
                )

    def evaluation_log(self) -> list[dict[str, Any]]:
        """Return every logged use of a split, oldest first.

        Raises:
            ModelFileError: `results.json` cannot be read.
        """
        return read_json(self.path / "results.json", [], as_objects)

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the logged uses that measured an accuracy, oldest first."""
        return [entry for entry in self.evaluation_log() if "accuracy" in entry]

    # -- checkpoints ------------------------------------------------------------------------

    def save_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Write a checkpoint.

        Args:
            counters: with `model_epoch`, the epoch of the weights that the model file must hold
                for the checkpoint to be usable (0: any).
        """
        self.checkpoints.save(tensors, counters)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and counters of the newest usable checkpoint; None if there is none.

        `corrupt_checkpoints` says why newer ones were skipped.
        """
        checkpoint = self.checkpoints.read(self._why_unusable)
        return (checkpoint.tensors, checkpoint.counters) if checkpoint else None

    @property
    def corrupt_checkpoints(self) -> list[str]:
        """Why `state` skipped checkpoints, one sentence each."""
        return self.checkpoints.corrupt

    def _why_unusable(self, counters: Mapping[str, Any]) -> str:
        """Return why the model file does not match a checkpoint; empty if it does.

        The model file is written first, so it may be of a later epoch than the checkpoint. That
        epoch is trained again.
        """
        needed = int(counters.get("model_epoch", 0))
        if not needed:
            return ""
        try:
            epoch = model_epoch(self.model_path)
        except (ModelFileError, KeyError, TypeError, ValueError) as error:
            reason = (
                error.what if isinstance(error, ModelFileError) else "it does not name an epoch"
            )
            return f"the weights of epoch {needed}, the best ones, are lost: {reason}"
        return "" if epoch >= needed else f"the model file is of epoch {epoch}, not {needed}"


def load_model(path: Path) -> LoadedModel:
    """Load a model file.

    Raises:
        ModelFileError: the file is damaged or not written by convlens, or its weights do not fit
            the network it names.
        UntrustedCode: its network is user code that was not trusted.
    """
    path = Path(path)
    tensors, model_metadata = serialization.read_all_tensors(path)
    features = tensors.pop(serialization.REFERENCE_FEATURES, None)
    try:
        preprocessing = Preprocessing(**model_metadata["preprocessing"])
        if not preprocessing.conversion.is_valid:
            raise ValueError("impossible preprocessing")
        classes = tuple(model_metadata["classes"])
        name, options = model_metadata["model"]["name"], model_metadata["model"]["options"]
        shape = preprocessing.channels, preprocessing.image_size
        # The random initial weights are replaced.
        with (
            preserve_torch_settings(),
            torch.random.fork_rng(devices=[]),
            _recorded_code(model_metadata, path.parent),
        ):
            model = models.build_model(name, len(classes), *shape, options)
        models.load_weights(model, tensors)
        calibration = ModelCalibration.from_metadata(
            model_metadata.get("calibration", {}), None if features is None else features.numpy()
        )
    except (KeyError, TypeError, ValueError, RuntimeError, UsageError) as error:
        if isinstance(error, UsageError) and model_metadata.get("recipe", {}).get("code"):
            raise ModelFileError(
                error.what, where=error.where or str(path), fix=error.fix
            ) from error
        reason, version = " ".join(str(error).split())[:160], model_metadata.get("convlens", "?")
        update = "update: " if serialization.is_newer_version(version) else ""
        raise ModelFileError(
            f"the model file cannot be used by this version: {reason}",
            where=str(path),
            fix=f"{update}it was written by convlens {version}",
        ) from error
    return LoadedModel(
        model.eval(), classes, preprocessing, model_metadata, path.parent, calibration
    )


def _recorded_code(
    model_metadata: Mapping[str, Any], folder: Path | None
) -> AbstractContextManager[None]:
    code = model_metadata.get("recipe", {}).get("code", {})
    copies = None if folder is None else folder / user_code.COPIES_FOLDER
    return user_code.recorded_code(code, copies)


def find_run(name: str | Path, models_folder: Path | None = None) -> RunDir:
    """Return the run with a name, in a directory, or of a model file.

    Raises:
        UsageError: there is no run of that name; close matches are named.
        ModelFileError: the path does not exist.
    """
    if not isinstance(name, str | os.PathLike):
        raise UsageError(
            f"an object of type {type(name).__name__!r} is not a run",
            fix="give the name, folder or model file of a run, or a Run",
        )
    path = Path(name)
    folder = models_folder or MODELS_DIR
    if os.path.isfile(path):  # (`Path.is_file` raises for names that are too long)
        # A bare model file has no training history. Its plots are named after its folder.
        has_standard_name = path.name in ("model.safetensors", "model.onnx")
        run_dir = RunDir(path.parent if has_standard_name else path.with_suffix(""))
        run_dir.model_path = path
        return run_dir
    for candidate in (folder / path, path):
        if is_run_folder(candidate):
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
    trust_code: bool | frozenset[str] = False


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
    """Return all runs in the models folder, ordered by name."""
    return [RunDir(path) for path in run_folders(models_folder or MODELS_DIR)]


def recorded_data_names(metadata: Mapping[str, Any]) -> list[str]:
    """Return the name of the data set of a run and the path where it was last found, if recorded.

    Args:
        metadata: the content of `run.json`.
    """
    data = metadata.get("data")
    if not isinstance(data, Mapping):  # edited by hand
        return []
    return [data[key] for key in ("name", "path") if isinstance(data.get(key), str)]


def runs_with_name(name: str) -> list[RunDir]:
    """Return the runs whose names `find_or_create_run_dir` derived from `name`."""
    named = re.compile(re.escape(safe_name(name)) + r"(-[0-9a-f]{6})?(-[0-9]+)?")
    return [each for each in list_runs() if named.fullmatch(each.name)]


def find_or_create_run_dir(
    name: str,
    digest: str,
    *,
    plain_name: bool,
    fresh: bool,
    is_run_of: Callable[[RunDir], bool] | None = None,
) -> RunDir:
    """Return the run of a recipe, or a new run directory for it. Nothing is created on disk yet.

    With `plain_name` (an unmodified recipe) the directory is called `name`. Otherwise six digits
    of the hash are appended, so that the same command always finds the same run. With `fresh` the
    directory is always a new one. No run is ever overwritten.

    Args:
        is_run_of: whether a run is one of the recipe; by default, if it has its digest.
    """

    def is_same(run_dir: RunDir) -> bool:
        return run_dir.has_digest(digest) if is_run_of is None else is_run_of(run_dir)

    base = safe_name(name) if plain_name else f"{safe_name(name)}-{digest[:6]}"
    candidates = [base, *([f"{base}-{digest[:6]}"] if plain_name else [])]
    candidates += [f"{candidates[-1]}-{number}" for number in range(2, 1000)]
    taken = [c for c in candidates if _is_name_taken(MODELS_DIR / c)]
    if not fresh:
        for candidate in reversed(taken):  # the newest of several identical ones
            if is_same(RunDir(MODELS_DIR / candidate)):
                return RunDir(MODELS_DIR / candidate)
        # The recipe.yaml of a run has no `auto` left, so its hash differs from that in the run's
        # name. An override may also repeat what the recipe says anyway.
        for other in reversed(runs_with_name(name)):
            if is_same(other):
                return other
    return RunDir(MODELS_DIR / next(c for c in candidates if c not in taken))


def _is_name_taken(folder: Path) -> bool:
    """Return whether a folder contains other files than those of a run that never started."""
    if not folder.is_dir():
        return folder.exists()
    leftovers = ("recipe.yaml", "split.csv", "images.csv.gz", "state")
    return any(path.name[0] != "." and path.name not in leftovers for path in folder.iterdir())


def check_run_name(name: object) -> None:
    """Check the type of a name that the caller gave for a run; None is the default.

    Raises:
        UsageError: it is not a text.
    """
    if not isinstance(name, str | None):
        raise wrong_type("name", name, "give the name of the run as a text")


def safe_name(name: str) -> str:
    """Return a name that is valid as a folder on every system.

    Letters of all scripts, digits, `.`, `_` and `-` are kept; others become `-`.
    """
    short = name.encode("utf-8", "replace")[:MAX_NAME_BYTES].decode("utf-8", "ignore")
    return re.sub(r"[^\w.-]+", "-", short).strip("-.") or "run"


def _some_names(names: Sequence[str]) -> str:
    if not names:
        return "none yet; `convlens train digits` creates one"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def metrics_csv(rows: Sequence[Mapping[str, float]]) -> str:
    """Return the text of `metrics.csv`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({c: _number(row[c]) for c in METRICS_COLUMNS})
    return text.getvalue()


def parse_csv(text: str) -> list[dict[str, float]]:
    """Return the rows of `metrics.csv`; NaN for empty cells.

    Raises:
        ValueError: unknown columns, an incomplete line, a cell that is not a number, or a missing
            epoch.
    """
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        columns, lines = next(reader, []), list(reader)
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if "epoch" not in columns or not set(columns) <= set(METRICS_COLUMNS):
        raise ValueError("the first line does not name the columns")
    rows = list[dict[str, float]]()
    for cells in lines:
        if len(cells) != len(columns):
            raise ValueError(f"epoch {len(rows) + 1} has {len(cells)} of {len(columns)} cells")
        rows.append({c: float(v) if v else math.nan for c, v in zip(columns, cells, strict=True)})
        if rows[-1]["epoch"] != len(rows):
            raise ValueError(f"epoch {len(rows)} is missing")
    return rows


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read `metrics.csv`; no rows if the file does not exist.

    Raises:
        ModelFileError: the file cannot be read.
    """
    try:
        return parse_csv(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"metrics.csv cannot be used: {error}",
            where=str(path),
            fix="restore it from a copy, or delete it: weights and results do not depend on it",
        ) from error


def split_csv(held_out: Mapping[str, Sequence[str]]) -> str:
    """Return the text of `split.csv`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "split"])
    for split, ids in held_out.items():
        writer.writerows((image_id, split) for image_id in ids)
    return text.getvalue()


def to_json(content: Any) -> str:
    """Return indented JSON."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def as_object(content: Any) -> dict[str, Any]:
    """Check that `content` is a JSON object; drop keys of earlier versions."""
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return {key: value for key, value in content.items() if key not in _RETIRED_KEYS}


def as_objects(content: Any) -> list[dict[str, Any]]:
    """Check that `content` is a list of JSON objects."""
    if not isinstance(content, list):
        raise ValueError("it is not a JSON list")
    return [as_object(entry) for entry in content]


def read_json(path: Path, default: T, parse: Callable[[Any], T]) -> T:
    """Read a JSON file; return `default` if the file does not exist.

    Args:
        parse: checks and converts the content; may raise ValueError.

    Raises:
        ModelFileError: the file cannot be read or parsed.
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
    """Return the epoch of the weights in a model file.

    Raises:
        ModelFileError: the file cannot be read.
        KeyError, TypeError, ValueError: the file does not name an epoch.
    """
    return int(serialization.read_model_file(path)[1]["chosen"]["epoch"])


def _number(value: float) -> str:
    """Return a number as text: integers without a point, others with enough digits to plot."""
    if math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.8g}"


@contextlib.contextmanager
def _recorded_process(path: Path) -> Iterator[None]:
    files.write_atomic(path, to_json(process.identify_process()))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


class ReadOnlyRunDir(RunDir):
    """Read-only view of the run directory for ranks other than 0: writing methods do nothing."""

    def create(self, recipe: Recipe, metadata: Mapping[str, Any]) -> None: ...

    def update_metadata(self, changes: Mapping[str, Any]) -> None: ...

    def record_data_path(self, path: str) -> None: ...

    def finish(self, **changes: Any) -> None: ...

    def lock(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def recorded_trainer(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def save_model(self, weights: Mapping[str, Tensor], model_metadata: Mapping[str, Any]) -> str:
        return ""

    def add_calibration(self, calibration: ModelCalibration) -> None: ...

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
            f"process {other} of {group.size} has different images of {name!r} from process 0",
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
