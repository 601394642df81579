"""Testing a model: the only code that reads the test split.

Each look at a split is logged in the run's `results.json`, so that nobody has to remember how
often a test set was used.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from convlens import metrics, run, run_plots, serialization
from convlens.data.dataset import Data, Split, load_data, load_external_data
from convlens.data.loader import Labelled
from convlens.device import (
    Plan,
    describe_hardware,
    memory_budget,
    preserve_torch_settings,
    synchronize,
)
from convlens.distributed import SINGLE_PROCESS, ProcessGroup, init_process_group
from convlens.engine import inference
from convlens.engine.data_parallel import distributed_map
from convlens.engine.inference import ModelOutputs, place_model, split_outputs
from convlens.errors import DataError, ModelFileError, closest_match, lookup
from convlens.onnx_model import load_model_or_onnx
from convlens.run import LoadedModel, RunDir
from convlens.utils import files
from convlens.utils.console import progress_bar, quiet_mode

SPLIT_NAMES = ("test", "val", "train")


@dataclass(frozen=True)
class Evaluation:
    """A model's numbers on one split; `interval95` is Wilson's, `loss` is in nats.

    `near_ties` are images whose two likeliest classes are so close that another device, batch size
    or file format may answer otherwise: by no more than these do `correct` and `confusion` differ.

    `tta` is None, or the same numbers with test-time augmentation beside the plain ones:
    `views` (their name), `accuracy`, `interval95`, `correct`, `loss`, `ece`, and the images that
    it `gained` and `lost` with McNemar's exact `p`. `images_per_second` counts the whole pass.
    """

    run: str
    split: str
    data: str
    n: int
    correct: int
    accuracy: float
    interval95: tuple[float, float]
    near_ties: int
    loss: float
    ece: float
    top5: float | None
    per_class: dict[str, dict[str, Any]]
    confusion: list[list[int]]
    classes: list[str]
    tta: dict[str, Any] | None
    looks: int
    images_per_second: float
    data_fingerprint: str
    model_sha256: str
    convlens: str
    hardware: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tta_sentence(self) -> str:
        """How test-time augmentation compares with the plain accuracy; empty without it."""
        if self.tta is None:
            return ""
        its, (low, high) = self.tta, self.tta["interval95"]
        p = "p < 0.0001" if its["p"] < 0.0001 else f"p = {its['p']:.4f}"
        return (
            f"with test-time augmentation ({its['views']}) {its['accuracy']:.2%}: "
            f"{100 * (its['accuracy'] - self.accuracy):+.2f} points "
            f"(95% interval {low:.2%} to {high:.2%}), loss {its['loss']:.4f}, calibration error "
            f"{its['ece']:.3f}; {its['gained']:,} images gained, {its['lost']:,} lost "
            f"(McNemar's exact {p})"
        )


@preserve_torch_settings()
def evaluate(
    run_dir: RunDir,
    split: str = "test",
    *,
    data: str | Path | None = None,
    tta: str | None = None,
    on: str | None = None,
    quiet: bool = False,
    own: Data | None = None,
) -> Evaluation:
    """Measures the run's model on one of its own splits, or on another data set.

    Args:
        split: `test`, `val` or `train`; of another data set, its part of that name if it has
            parts, else all of it.
        data: another data set; its classes are matched by name.
        tta: test-time augmentation, `flip` or `flip+shifts`; its numbers come beside the plain
            ones, which stay what they are. Mirror images must not change the class.
        on: device; the best there is by default.
        own: the model's own data, where they are loaded already.

    Raises:
        UsageError: no such split or views; DataError: the images changed since training, or a
            class that the model doesn't know.
    """
    lookup(dict.fromkeys(SPLIT_NAMES), split, "split")
    inference.select_views(tta)  # a typo must not cost the loading of a data set
    world = init_process_group()
    run_dir = run.shared_run_dir(world, lambda: run_dir)
    loaded = load_model_or_onnx(run_dir.model_path)
    where = loaded.select_device(on)
    with quiet_mode(quiet):
        with world.local_rank_zero_first():
            judged = load_eval_split(loaded, split, data=data, on=where, own=own)
        run.check_same_images(world, judged.name, judged.fingerprint)
        return evaluate_split(
            run_dir, loaded, judged, split, where, tta=tta, world=world
        ).evaluation


class EvalSplit(NamedTuple):
    """A split with labels in a model's order of classes, the set's name and fingerprint."""

    part: Split
    name: str
    fingerprint: str


class EvaluationRun(NamedTuple):
    """One look at a split: its numbers, and what they rest on.

    `scores` are logits `[N, K]` and `labels` int64 `[N]`, both in the order of the split.
    """

    evaluation: Evaluation
    scores: np.ndarray
    labels: np.ndarray


def load_eval_split(
    loaded: LoadedModel,
    split: str,
    *,
    data: str | Path | None = None,
    on: str,
    own: Data | None = None,
) -> EvalSplit:
    """A split of the model's own data or of another set. Errors are those of `evaluate`.

    `own` is `own_data` if it is at hand already.
    """
    if data is None:
        own = own or load_own_data(loaded, on)
        found = _part(own, split), own.classes, own.name, own.fingerprint
    else:
        found = _load_external(str(data), loaded, split, on)
    part, classes, name, fingerprint = found
    labels = _match_classes(part.labels, classes, loaded.classes, name)
    return EvalSplit(replace(part, labels=labels), name, fingerprint)


def load_own_data(loaded: LoadedModel, on: str) -> Data:
    """The data that the model was trained on, with its splits; the test split is still sealed.

    Raises:
        DataError: the images changed since, or have moved.
    """
    recipe = serialization.recipe_from_metadata(loaded.model_metadata)
    data = load_data(recipe.data, memory_budget=memory_budget(on))
    began = loaded.model_metadata["data"]["fingerprint"]
    if data.fingerprint != began:
        changed = data.listing.changed(loaded.folder) if data.listing and loaded.folder else ""
        raise DataError(
            f"the images of {data.name!r} changed since this model was trained on them"
            + (f" ({changed})" if changed else "")
            + ": its test images may be among those it learned",
            where=data.name,
            fix="evaluate with --data to test on them as they are, or train anew with --fresh",
        )
    return data


def _part(data: Data, split: str) -> Split:
    if split == "test":
        return data.unseal_test()
    if split == "val" and not len(data.val):
        raise DataError(
            "this run has no validation split: it trained on those images, too",
            where=data.name,
            fix="take its test split (--split test), or another data set (--data)",
        )
    return data.val if split == "val" else data.train


def _load_external(
    name: str, loaded: LoadedModel, split: str, where: str
) -> tuple[Split, tuple[str, ...], str, str]:
    pre = loaded.preprocessing
    return load_external_data(
        name,
        split,
        image_size=pre.image_size,
        channels=pre.channels,
        fit=pre.fit,
        memory_budget=memory_budget(where),
        tested=True,
        run=loaded.folder,
    )


def _match_classes(
    labels: torch.Tensor, theirs: Sequence[str], ours: Sequence[str], name: str
) -> torch.Tensor:
    """Labels in the model's class order; never by position."""
    unknown = [label for label in theirs if label not in ours]
    if unknown:
        near = {label: closest_match(label, ours) for label in unknown[:8]}
        shown = (f"{label} (it has {its})" if its else label for label, its in near.items())
        raise DataError(
            f"the model doesn't know {len(unknown)} of the classes: {', '.join(shown)}",
            where=name,
            fix=f"its classes are: {', '.join(ours[:12])}{' ...' if len(ours) > 12 else ''}",
        )
    positions = torch.tensor([ours.index(label) for label in theirs], dtype=torch.int64)
    return positions[labels]


def evaluate_split(
    run_dir: RunDir,
    loaded: LoadedModel,
    judged: EvalSplit,
    split: str,
    where: str,
    *,
    tta: str | None = None,
    draw: bool = True,
    world: ProcessGroup = SINGLE_PROCESS,
) -> EvaluationRun:
    """Answers for all images of a split, logged in `results.json` as one look at it.

    Args:
        split: its name, `test`, `val` or `train`.
        where: the device.
        draw: confusion, calibration and the worst mistakes, too.
        world: the processes that answer, each for some of the images; the first one logs it.
    """
    part, name, fingerprint = judged
    start = time.perf_counter()
    plan = _plan(run_dir, loaded, where)
    answers, labels = _compute_outputs(loaded, part, split, plan, tta, world)
    seconds = time.perf_counter() - start
    scores, targets = answers.logits.cpu().numpy(), labels.cpu().numpy()
    summary = metrics.summarize(scores, targets, list(loaded.classes))
    result: dict[str, Any] = {
        "run": run_dir.name,
        "split": split,
        "data": name,
        **summary,
        "top5": summary.get("top5"),
        "classes": list(loaded.classes),
        "tta": _augmented(tta, answers, targets, loaded.classes),
        "images_per_second": round(len(targets) / seconds, 1),
        "data_fingerprint": fingerprint,
        "model_sha256": loaded.model_metadata["sha256"],
        "convlens": loaded.model_metadata["convlens"],
        "hardware": describe_hardware(where),
    }
    own = loaded.model_metadata["data"]["fingerprint"] == fingerprint
    result["looks"] = world.broadcast(lambda: run_dir.add_result({**result, "own": own})["looks"])
    # The report needs the answers of the model file.
    if own and world.is_main_process and loaded.is_native:
        said = CachedPredictions(scores, targets, split_hash(part, loaded.classes))
        save_predictions(run_dir, split, fingerprint, loaded.model_metadata["sha256"], said)
    label = split if own else f"{split}-{run.safe_name(Path(name).name)}"
    if draw and world.is_main_process:
        run_plots.plot_evaluation(run_dir, label, part, scores, loaded.classes)
    evaluation = Evaluation(**{key: result[key] for key in Evaluation.__dataclass_fields__})
    return EvaluationRun(evaluation, scores, targets)


def sentence(result: Mapping[str, Any]) -> str:
    """Describe a result, an entry of `results.json` or `Evaluation.to_dict()`, in one line.

    For the run's own test split it says how often it was used. Nothing in this module prints a
    result: the command line and the Python API do so, once.
    """
    low, high = result["interval95"]
    line = (
        f"{result['split']} accuracy [bold]{result['accuracy']:.2%}[/] "
        f"(95% interval {low:.2%} to {high:.2%}, n = {result['n']:,}), "
        f"loss {result['loss']:.4f}, calibration error {result['ece']:.3f}"
    )
    if result["split"] == "test" and result.get("own"):
        line += f"; test set used {times(result['looks'])}"
    return line


def times(count: int) -> str:
    """Return `once` or `3 times`."""
    return "once" if count == 1 else f"{count:,} times"


class _SelectedPart(NamedTuple):
    plan: Plan
    free: bool  # whether its memory format is only where a choice begins


def _plan(run_dir: RunDir, loaded: LoadedModel, where: str) -> _SelectedPart:
    """In which memory format the model answers: its run's, if that was chosen on this hardware.

    So a run is tested as it was validated, and nothing is timed again.
    """
    plan, facts = place_model(loaded.model, where), dict[str, Any]()
    if loaded.is_native:
        with suppress(ModelFileError):  # a damaged run.json is nothing to the model file
            facts = run_dir.metadata()
    trained = facts.get("plan") or {}
    if trained.get("precision") == "fp32" and facts.get("hardware") == describe_hardware(where):
        plan = replace(plan, memory_format=trained["memory_format"])
        plan.prepare_model(loaded.model)
        return _SelectedPart(plan, free=False)
    return _SelectedPart(plan, loaded.can_choose_memory_format)


def _compute_outputs(
    loaded: LoadedModel,
    part: Split,
    split: str,
    chosen: _SelectedPart,
    tta: str | None,
    world: ProcessGroup,
) -> tuple[ModelOutputs, torch.Tensor]:
    plan, total = chosen.plan, int(part.labels.numel())

    def ask(share: Labelled) -> ModelOutputs:
        model, normalize = loaded.model, loaded.preprocessing.normalize
        return split_outputs(
            model,
            share,
            normalize,
            plan,
            inference.select_views(tta),
            advance=bar.advance,
            choose_memory_format=chosen.free and world.size == 1,
        )[0]

    with progress_bar(f"evaluating {split}", total) as bar:
        plain, mean = distributed_map(world, part, ask)
        assert plain is not None
        synchronize(plan.device)
    return ModelOutputs(plain, mean), part.labels.to(plan.device)


TTA_KEYS = ("accuracy", "interval95", "correct", "loss", "ece")


def _augmented(
    tta: str | None, answers: ModelOutputs, targets: np.ndarray, classes: Sequence[str]
) -> dict[str, Any] | None:
    """The numbers with test-time augmentation, and the images it changed from the plain answer."""
    if answers.tta_logits is None:
        return None
    plain, mean = answers.logits.cpu().numpy(), answers.tta_logits.cpu().numpy()
    summary = metrics.summarize(mean, targets, classes)
    gained, lost, p = metrics.paired_counts(targets, plain.argmax(1), mean.argmax(1))
    shared = {key: summary[key] for key in TTA_KEYS}
    return {"views": tta, **shared, "gained": gained, "lost": lost, "p": p}


# ---- answers ----------------------------------------
# What a model said to each image of a split, kept in its run: tested once, read many times.
#
# A report or a comparison shows single images. Testing anew for each of them would take minutes and
# fill the log of looks with looks at nothing new.

MAX_CACHED_BYTES = (
    1 << 26
)  # bytes of logits that are kept: 10,000 images of 1,000 classes are 40 MB


class CachedPredictions(NamedTuple):
    """Logits float32 `[N, K]` and labels int64 `[N]` of a split, in the model's class order.

    `images` is a hash over the images' ids and classes, in order. Two models whose hashes agree
    were asked about the same images, at whatever size, and whatever else they learned from.
    """

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    images: str

    @property
    def probs(self) -> metrics.Floats:
        """Probabilities `[N, K]`."""
        return metrics.softmax(self.logits)


def save_predictions(
    run_dir: RunDir, split: str, fingerprint: str, model: str, answers: CachedPredictions
) -> None:
    """Writes the answers into the run; very large ones are left out.

    Args:
        fingerprint, model: of the data and of the model file; other answers are not these.
    """
    if answers.logits.nbytes > MAX_CACHED_BYTES:
        return
    about = {
        "split": split,
        "images": answers.images,
        "data_fingerprint": fingerprint,
        "model_sha256": model,
    }
    tensors = {
        "logits": torch.from_numpy(np.ascontiguousarray(answers.logits, dtype=np.float32)),
        "labels": torch.from_numpy(np.ascontiguousarray(answers.labels, dtype=np.int64)),
    }
    path = _cache_path(run_dir, split, fingerprint)
    files.remove_stale_temp_files(path.parent, [path.name], alone=False)
    serialization.write_model_file(path, tensors, about)


def load_predictions(
    run_dir: RunDir, split: str, fingerprint: str, model: str
) -> CachedPredictions | None:
    """The answers that this very model gave to this very data; None where there are none."""
    path = _cache_path(run_dir, split, fingerprint)
    if not path.exists():
        return None
    try:
        tensors, about = serialization.read_model_file(path)
        if (about["data_fingerprint"], about["model_sha256"]) != (fingerprint, model):
            return None
        return CachedPredictions(
            tensors["logits"].numpy(), tensors["labels"].numpy(), about["images"]
        )
    except (ModelFileError, KeyError):  # damaged, or another version's: they can be had again
        return None


def split_hash(split: Split, classes: Sequence[str]) -> str:
    """The hash that `Answers.images` is; `split` has labels in the order of `classes`."""
    digest = hashlib.sha256()
    for name, label in zip(split.ids, split.labels.tolist(), strict=True):
        digest.update(json.dumps([str(name), classes[label]]).encode())
    return digest.hexdigest()


def _cache_path(run_dir: RunDir, split: str, fingerprint: str) -> Path:
    return run_dir.path / "answers" / f"{split}-{fingerprint[:12]}.safetensors"
