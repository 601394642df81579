"""The run folder: what a training leaves behind, and the only thing later commands read.

`models/<run>/` holds `model.safetensors` (chosen weights and all that is needed to use them),
`recipe.yaml` (resolved, trainable as it stands), `run.json` (what was asked, data, hardware,
status), `split.csv` (what was held out), `images.csv.gz` (which image files there were),
`metrics.csv` (one row an epoch), `results.json` (each look at a split) and `state/` (to continue,
or to extend). Plots are in `plots/<run>/`.
"""

from __future__ import annotations

import datetime
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convlens import device, models
from convlens.data.batches import Normalise, Prepare
from convlens.errors import ModelFileError, UsageError
from convlens.formats import modelfile, records
from convlens.formats.generations import CheckpointStore
from convlens.names import did_you_mean, near
from convlens.recipe import Recipe, load as load_recipe
from convlens.system import files

MODELS = Path("models")
PLOTS = Path("plots")
LOCK_TIMEOUT_S = 60.0  # results.json is held for milliseconds
LONGEST = 150  # bytes of a run's name; systems take 255, and plots' names are longer


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
    folder: Path | None = None  # of its file, where its run's records may be

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
        self.metrics_path = self.path / "metrics.csv"
        self.checkpoints = CheckpointStore(self.path / "state")

    # -- whole run ------------------------------------------------------------------------

    def create(self, recipe: Recipe, facts: Mapping[str, Any]) -> None:
        """Makes the folder with the resolved recipe and `run.json`, status `training`."""
        files.write_atomic(self.path / "recipe.yaml", recipe.to_text())
        self.note({"created": _now(), "status": "training", **facts})

    def note(self, facts: Mapping[str, Any]) -> None:
        """Adds facts to `run.json`."""
        content = {**self.facts(), **facts}
        files.write_atomic(self.path / "run.json", records.json_of(content))

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
        self.note({"status": "finished", **facts})
        self.checkpoints.keep_newest()

    def facts(self) -> dict[str, Any]:
        """What `run.json` says; empty for a folder that is no run yet.

        Raises:
            ModelFileError: it can't be read.
        """
        return records.read(self.path / "run.json", {}, records.as_object)

    @property
    def finished(self) -> bool:
        return self.facts().get("status") == "finished" and self.model_path.exists()

    def lock(self) -> AbstractContextManager[None]:
        return files.lock(self.path / ".lock", what=f"run {self.name!r}", owned=records.LOCKED)

    def recipe(self) -> Recipe:
        """The resolved recipe, by which the run trained.

        Raises:
            UsageError: no recipe; ModelFileError: not the one it trained by, or a later version's.
        """
        facts = self.facts()
        with modelfile.of_version(facts.get("convlens")):
            found = load_recipe(self.path / "recipe.yaml")
        if found.digest() not in facts.get("digests", [found.digest()]):
            raise ModelFileError(
                "recipe.yaml was changed after the run had begun: it isn't what it trained by",
                where=str(self.path / "recipe.yaml"),
                fix="restore it; `convlens train` with this file trains it as another run",
            )
        return found

    # -- model ----------------------------------------------------------------------------

    def save_model(self, weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
        """Writes a network's state dict with its card; returns the file's SHA-256."""
        return modelfile.write(self.model_path, weights, card)

    # -- log ------------------------------------------------------------------------------

    def write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        files.write_atomic(self.metrics_path, records.csv_of(rows))

    def metrics(self) -> list[dict[str, float]]:
        """One mapping an epoch, in order; NaN where a cell is empty (no validation split).

        Raises:
            ModelFileError: it can't be read. (The checkpoint of an unfinished run has the same
            numbers, and writes them again.)
        """
        return records.log_of(self.metrics_path)

    def write_split(self, held_out: Mapping[str, Sequence[str]]) -> None:
        """`split.csv`: every image that convlens itself held out of training."""
        files.write_atomic(self.path / "split.csv", records.split_of(held_out))

    def add_result(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Logs one look at a split, with how many there have been; returns what was logged.

        A look that measured nothing (`convlens look RUN test:17`) has no `accuracy`. Of two at the
        same moment one waits for the other: none is lost, and both are counted.
        """
        of, owned = f"results.json of {self.name!r}", records.RESULTS
        path = self.path / ".results.lock"
        with files.lock(path, what=of, timeout_s=LOCK_TIMEOUT_S, owned=owned):
            log = self.log()
            same = ("split", "data_fingerprint")
            looks = 1 + sum(all(entry.get(k) == result.get(k) for k in same) for entry in log)
            entry = {"when": _now(), "looks": looks, **result}
            files.write_atomic(self.path / "results.json", records.json_of([*log, entry]))
        return entry

    def log(self) -> list[dict[str, Any]]:
        """Every look at a split, oldest first.

        Raises:
            ModelFileError: it can't be read.
        """
        return records.read(self.path / "results.json", [], records.as_objects)

    def results(self) -> list[dict[str, Any]]:
        """The looks that measured something, oldest first."""
        return [entry for entry in self.log() if "accuracy" in entry]

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
            epoch = records.epoch_of(self.model_path)
        except (ModelFileError, KeyError, TypeError, ValueError) as error:
            reason = error.what if isinstance(error, ModelFileError) else "no epoch in it"
            return f"the weights of epoch {needed}, the best ones, are lost: {reason}"
        return "" if epoch >= needed else f"the model file is of epoch {epoch}, not {needed}"


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
        shape = preprocessing.channels, preprocessing.image_size
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced
            model = models.build(name, len(classes), *shape, options)
        models.load(model, tensors)
    except (KeyError, TypeError, RuntimeError, UsageError) as error:
        reason, version = " ".join(str(error).split())[:160], card.get("convlens", "?")
        raise ModelFileError(
            f"the model file can't be used by this version: {reason}",
            where=str(path),
            fix=f"{'update: ' * modelfile.is_newer(version)}it was written by convlens {version}",
        ) from error
    return Loaded(model.eval(), classes, preprocessing, card, Path(path).parent)


def find(name: str | Path, models_folder: Path | None = None) -> RunFolder:
    """The run meant by a name, its folder, or its model file.

    Raises:
        UsageError: no run of that name, with near misses; ModelFileError: no such path.
    """
    path = Path(name)
    folder = models_folder or MODELS
    if os.path.isfile(path):  # (of `Path`, a name too long is an error)
        # A model file on its own is a run without a past; its plots go by its folder's name.
        own = path.name in ("model.safetensors", "model.onnx")
        found = RunFolder(path.parent if own else path.with_suffix(""))
        found.model_path = path
        return found
    for candidate in (folder / path, path):
        if any(os.path.isfile(candidate / each) for each in ("model.safetensors", "run.json")):
            return RunFolder(candidate)
    text = str(name)
    if "/" in text or "\\" in text or path.suffix in (".safetensors", ".onnx", ".pt", ".pth"):
        raise ModelFileError("no such run or model file", where=text, fix="check the path")
    known = [run.name for run in runs(folder)]
    fix = did_you_mean(near(text, known)) or f"runs here: {_some(known)}"
    raise UsageError(f"no run called {text!r}", where=f"{folder}/", fix=fix)


def runs(models_folder: Path | None = None) -> list[RunFolder]:
    """All runs in the models folder, by name."""
    folder = models_folder or MODELS
    if not folder.is_dir():
        return []
    return [RunFolder(p) for p in sorted(folder.iterdir()) if (p / "run.json").is_file()]


def runs_named(name: str) -> list[RunFolder]:
    """The runs that `place` named after `name`: it, a digest behind it, a number."""
    named = re.compile(re.escape(safe(name)) + r"(-[0-9a-f]{6})?(-[0-9]+)?")
    return [each for each in runs() if named.fullmatch(each.name)]


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
        for other in reversed(runs_named(name)):
            if digest in other.facts().get("digests", []):
                return other
    return RunFolder(MODELS / next(c for c in candidates if c not in taken))


def _is_taken(folder: Path) -> bool:
    """Whether anything is in it but what a run that never began leaves: a lock, first files."""
    if not folder.is_dir():
        return folder.exists()
    first = ("recipe.yaml", "split.csv", "images.csv.gz", "state")
    return any(path.name[0] != "." and path.name not in first for path in folder.iterdir())


def safe(name: str) -> str:
    """A name that is one folder on every system: letters, digits, `.`, `_`, `-`, other scripts."""
    short = name.encode("utf-8", "replace")[:LONGEST].decode("utf-8", "ignore")
    return re.sub(r"[^\w.-]+", "-", short).strip("-.") or "run"


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    if not listed:
        return "none yet; `convlens train digits` makes one"
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
