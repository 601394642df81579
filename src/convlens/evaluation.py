"""Evaluation of models, and the only code that reads the test split.

Every evaluation of a split is logged in the run's `results.json` with a running count, so that
repeated use of a test set is visible. A use of the test split is a completed command that shows its
images, labels or predictions, or numbers computed from them, whether they are computed or cached.
So the log is written last (`log_evaluation`, `log_test_use`): a command that fails costs no use.
The logits are cached in the run, because reports show single images, and evaluating again would
take minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape

from convlens import metrics, run_plots, serialization
from convlens.data.dataset import (
    ALL_IMAGES,
    Data,
    RunImages,
    Split,
    load_data,
    load_external_data,
    may_hold_images_of_run,
)
from convlens.data.layout import split_from_name
from convlens.data.loader import Labelled
from convlens.data.sources import (
    SOURCES,
    canonical_name,
    data_path,
    find_configured_source,
    is_available,
)
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
from convlens.errors import (
    ConvlensError,
    DataError,
    ModelFileError,
    UsageError,
    close_matches,
    did_you_mean,
)
from convlens.onnx_model import load_model_or_onnx
from convlens.recipe import DataConfig
from convlens.run import (
    LoadedModel,
    RunDir,
    RunLike,
    as_run_dir,
    check_same_images,
    recorded_data_names,
    safe_name,
    shared_run_dir,
)
from convlens.uncertainty.calibration import OutlierDetector, as_percent
from convlens.uncertainty.outliers import ORDINARY_SHARE
from convlens.uncertainty.promises import Promises, ShareLike
from convlens.user_code import accepts_trust
from convlens.utils import files, notebook
from convlens.utils.console import print_status, progress_bar, quiet_mode

SPLIT_NAMES = ("test", "val", "train")
TTA_KEYS = (
    "accuracy",
    "interval95",
    "correct",
    "macro_f1",
    "balanced_accuracy",
    "loss",
    "ece",
)
MAX_CLASSES_SHOWN = 40  # in a notebook
MAX_CACHED_BYTES = 1 << 26  # logits of 10,000 images of 1,000 classes have 40 MB
MAX_TRAIN_IMAGES = 2000  # training images whose accuracy is compared with that of the test split
TRAIN_SAMPLE = "train-sample"  # name of their cached predictions


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Metrics of a model on one split.

    Attributes:
        interval95: Wilson's interval of the accuracy.
        macro_f1, balanced_accuracy: mean F1 and mean recall of the classes
            (`metrics.class_means`), with 95% intervals by a seeded, stratified bootstrap.
        near_ties: number of images whose two likeliest classes are so close that another device,
            batch size or file format may decide otherwise; `correct` and `confusion` can differ by
            at most these.
        loss: mean cross-entropy in nats, of the network without the temperature.
        ece: expected calibration error.
        ece_uncalibrated: the same without the temperature.
        ece_by_chance: error that a perfectly calibrated model stays below in 95 of 100 sets of this
            size; None in results of earlier versions, as the next one.
        confidence: mean of the highest probability of each image.
        temperature: the logits are divided by it for all probabilities; 1 if none was fitted.
        tta: None, or the metrics with test-time augmentation: `views` (their name), `accuracy`,
            `interval95`, `correct`, `macro_f1`, `balanced_accuracy`, `loss`, `ece`, the numbers of
            images `gained` and `lost`, and `p` of McNemar's exact test. All other attributes are
            without it.
        selective: None, or what `min_accuracy` gives on this split: the promise (`min_accuracy`,
            `confidence`), the `threshold` (None if every image is unsure), the number of images
            `answered`, `coverage`, `correct`, `accuracy` of the answers and its `interval95`.
        sets: None, or what `prediction_set` gives on this split: the requested `coverage`, the
            lowest probability in a set (`threshold`), the share `covered` of sets with the true
            class and its `interval95`, the `mean_size` and the share of `single` classes.
        unlike: None if the model cannot tell, or how many images `predict` marks as unlike the
            training images: `marked`, their `share` and its `interval95`, and what decides (`by`:
            `features` or `energy`).
        looks: how often this split has been evaluated, this time included; for the test split, how
            often it has been used.
        images_per_second: speed of the whole pass, test-time augmentation and the comparison with
            training images (`unlike`) included.
        own: whether this is a split of the run itself, and not of another data set.
        trained_on: number of images of another data set that the run was trained on.
    """

    run: str
    split: str
    data: str
    n: int
    correct: int
    accuracy: float
    interval95: tuple[float, float]
    macro_f1: float
    macro_f1_interval95: tuple[float, float]
    balanced_accuracy: float
    balanced_accuracy_interval95: tuple[float, float]
    near_ties: int
    loss: float
    ece: float
    ece_uncalibrated: float
    temperature: float
    top5: float | None
    per_class: dict[str, dict[str, Any]]
    confusion: list[list[int]]
    classes: list[str]
    tta: dict[str, Any] | None
    selective: dict[str, Any] | None
    sets: dict[str, Any] | None
    looks: int
    images_per_second: float
    data_fingerprint: str
    model_sha256: str
    convlens: str
    hardware: dict[str, Any]
    own: bool = True
    trained_on: int = 0
    unlike: dict[str, Any] | None = None
    ece_by_chance: float | None = None
    confidence: float | None = None

    def __repr__(self) -> str:
        low, high = self.interval95
        return (
            f"Evaluation({self.run!r}, {self.split!r}, accuracy {self.accuracy:.2%} "
            f"({low:.2%} to {high:.2%}), n = {self.n:,})"
        )

    def _repr_html_(self) -> str:
        """Return a sentence and a table of the classes for notebooks."""
        low, high = self.interval95
        summary = (
            f"{self.run}: {_accuracy_name(vars(self))} {self.accuracy:.2%} "
            f"(95% interval {low:.2%} to {high:.2%}, n = {self.n:,}), loss {self.loss:.4f}, "
            f"calibration error {self.ece:.3f}"
        )
        keys = ("precision", "recall", "f1")
        rows = [
            (name, f"{score['n']:,}", *(_percent(score[key]) for key in keys))
            for name, score in list(self.per_class.items())[:MAX_CLASSES_SHOWN]
        ]
        hidden = len(self.per_class) - len(rows)
        more = notebook.paragraph(f"and {hidden} more classes") if hidden else ""
        table = notebook.table(("class", "n", "precision", "recall", "F1"), rows)
        return notebook.paragraph(summary) + table + more

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tta_sentence(self) -> str:
        """Compare test-time augmentation with the accuracy without it; empty if it was not used."""
        if self.tta is None:
            return ""
        tta, (low, high) = self.tta, self.tta["interval95"]
        p = "p < 0.0001" if tta["p"] < 0.0001 else f"p = {tta['p']:.4f}"
        return (
            f"with test-time augmentation ({tta['views']}) {tta['accuracy']:.2%}: "
            f"{100 * (tta['accuracy'] - self.accuracy):+.2f} points "
            f"(95% interval {low:.2%} to {high:.2%}), loss {tta['loss']:.4f}, calibration error "
            f"{tta['ece']:.3f}; {tta['gained']:,} images gained, {tta['lost']:,} lost "
            f"(McNemar's exact {p})"
        )

    def selective_sentence(self) -> str:
        """Say what share of the images is answered, and how well; empty without `min_accuracy`."""
        if self.selective is None:
            return ""
        r = self.selective
        accuracy, confidence = as_percent(r["min_accuracy"]), as_percent(r["confidence"])
        promise = f"at least {accuracy} accuracy with {confidence} confidence"
        if not r["answered"]:
            return f"for {promise} no image is answered: all {self.n:,} are unsure"
        low, high = r["interval95"]
        return (
            f"for {promise}, {r['answered']:,} of {self.n:,} images are answered "
            f"({r['coverage']:.1%}), {r['accuracy']:.2%} of them correctly (95% interval "
            f"{low:.2%} to {high:.2%})"
        )

    def sets_sentence(self) -> str:
        """Say how often prediction sets contain the class; empty without `prediction_set`."""
        if self.sets is None:
            return ""
        r, (low, high) = self.sets, self.sets["interval95"]
        return (
            f"prediction sets for {as_percent(r['coverage'])} coverage: {r['covered']:.2%} contain "
            f"the class (95% interval {low:.2%} to {high:.2%}), {r['mean_size']:.2f} classes on "
            f"average, {r['single']:.1%} a single one"
        )

    def unlike_sentence(self) -> str:
        """Say how many images are marked as unlike the training images; empty if unknown."""
        if self.unlike is None:
            return ""
        low, high = self.unlike["interval95"]
        return (
            f"{self.unlike['marked']:,} of {self.n:,} images ({self.unlike['share']:.1%}, 95% "
            f"interval {low:.1%} to {high:.1%}) are marked as unlike the training images; about "
            f"{1 - ORDINARY_SHARE:.0%} of ordinary images are"
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


@accepts_trust
@preserve_torch_settings()
def evaluate(
    run: RunLike,
    split: str | None = None,
    *,
    data: str | Path | DataConfig | None = None,
    tta: str | None = None,
    min_accuracy: ShareLike | None = None,
    confidence: ShareLike = 0.95,
    prediction_set: ShareLike | None = None,
    device: str | None = None,
    quiet: bool = True,
    own_data: Data | None = None,
    trust_code: bool = False,
) -> Evaluation:
    """Evaluate a run's model on one of its own splits or on another data set.

    The evaluation is logged in the run. Printing the result is left to the caller.

    Args:
        run: a run by name, folder or model file, or a `Run`.
        split: `test` (by default), `val` or `train`. Of another data set without splits all images
            are evaluated.
        data: another data set, or a data section of a recipe with the keys to read it. Its classes
            are matched by name; case and leading zeros do not matter. If it holds exactly the
            images that the run was trained on, which may have moved, the run's own split is
            evaluated.
        tta: test-time augmentation, `flip` or `flip+shifts`. Its metrics are reported in addition
            to those without it. Only for classes that a mirror image does not change.
        min_accuracy, confidence, prediction_set: as in `predict`; what they give on this split is
            reported in addition.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.
        quiet: show no progress and no warnings.
        own_data: the data set of the run, if the caller has loaded it already.
        trust_code: import user code that the model needs; otherwise that is an error.

    Raises:
        UsageError: unknown run, split or views, or too few validation images for a promise.
        DataError: the images changed or moved since training, a class that the model does not
            know, or a split that the other data set does not have.

    Example:
        >>> convlens.evaluate("digits", "val").accuracy
    """
    split = None if split is None else check_split(split)
    check_data(data)
    inference.select_views(tta)  # report a typo before a data set is loaded
    process_group = init_process_group()
    run_dir = shared_run_dir(process_group, lambda: as_run_dir(run))
    loaded = load_model_or_onnx(run_dir.model_path)
    device = loaded.select_device(device)
    # Before an image is read: a promise that cannot be made costs no use of the test split.
    promises = Promises.of(loaded.calibration, min_accuracy, confidence, prediction_set)
    with quiet_mode(quiet):
        with process_group.local_rank_zero_first():
            eval_split = load_eval_split(loaded, split, data=data, device=device, own_data=own_data)
        check_same_images(process_group, eval_split.name, eval_split.fingerprint)
        result = evaluate_split(
            run_dir,
            loaded,
            eval_split,
            device,
            tta=tta,
            promises=promises,
            process_group=process_group,
        )
        return log_evaluation(run_dir, result.evaluation, process_group)


def check_data(data: object) -> None:
    """Check the type of another data set that the caller gave.

    Raises:
        UsageError: it is neither a name or path nor a data section.
    """
    if not isinstance(data, str | os.PathLike | DataConfig | None):
        raise UsageError(
            f"an object of type {type(data).__name__!r} is not a data set",
            fix="name a folder, a list of images or a data set; `predict` classifies images in "
            "memory",
        )


def check_split(name: str) -> str:
    """Return `test`, `val` or `train` for any of their spellings, such as `validation`.

    Raises:
        UsageError: another name; close matches are named.
    """
    if not isinstance(name, str):
        raise UsageError(
            f"an object of type {type(name).__name__!r} is not the name of a split",
            fix=f"choose from: {', '.join(SPLIT_NAMES)}; `predict` classifies images in memory",
        )
    split = split_from_name(name)
    if split is not None:
        return split
    close = close_matches(name, (*SPLIT_NAMES, "testing", "validation", "training"))
    meant = dict.fromkeys(str(split_from_name(each)) for each in close)
    fix = did_you_mean(meant) or f"choose from: {', '.join(SPLIT_NAMES)}"
    raise UsageError(f"unknown split {name!r}", fix=fix)


class EvalSplit(NamedTuple):
    """A split with labels in a model's order of classes, and its data set.

    Attributes:
        name, fingerprint: of the data set.
        split: `test`, `val` or `train`, or `all` for a data set without splits.
        own: whether it is a split of the run itself.
        in_order: whether images and order are those of the own split, so that predictions can be
            cached.
        trained_on: number of images of another data set that the run was trained on.
    """

    part: Split
    name: str
    fingerprint: str
    split: str = "test"
    own: bool = True
    in_order: bool = True
    trained_on: int = 0


class EvaluationRun(NamedTuple):
    """One evaluation of a split: the metrics and the logits they were computed from.

    `scores` are logits `[N, K]` and `labels` int64 `[N]`, both in the order of the split.
    """

    evaluation: Evaluation
    scores: np.ndarray
    labels: np.ndarray


def load_eval_split(
    loaded: LoadedModel,
    split: str | None = None,
    *,
    data: str | Path | DataConfig | None = None,
    device: str,
    own_data: Data | None = None,
    recognize: bool = True,
) -> EvalSplit:
    """Load a split of the model's own data or of another data set.

    Args:
        split: by default `test`, or all images of another data set without splits.
        own_data: the result of `load_own_data`, if the caller has it already.
        recognize: use only the own split of a data set that holds the images of the run.

    Raises:
        UsageError, DataError: as by `evaluate`.
    """
    if data is not None:
        run_images = RunImages(loaded.folder)
        # The keys of a data section say how to read another set.
        if recognize and not isinstance(data, DataConfig):
            own_data = recognize_own_data(loaded, str(data), device, run_images)
        if own_data is None:
            return _external_split(loaded, data, split, device, run_images)
        print_status(
            f"{escape(str(data))} holds the images that this model was trained and tested on: "
            f"using only its own {split or 'test'} split"
        )
    own_data, split = own_data or load_own_data(loaded, device), split or "test"
    part = _in_model_order(_own_split(own_data, split), own_data.classes, loaded)
    return EvalSplit(part, own_data.name, own_data.fingerprint, split)


def _in_model_order(part: Split, classes: Sequence[str], loaded: LoadedModel) -> Split:
    positions = torch.tensor([loaded.classes.index(label) for label in classes])
    return replace(part, labels=positions[part.labels])


def _external_split(
    loaded: LoadedModel,
    data: str | Path | DataConfig,
    split: str | None,
    device: str,
    run_images: RunImages,
) -> EvalSplit:
    external = load_external_data(
        data,
        split,
        conversion=loaded.preprocessing.conversion,
        memory_budget=memory_budget(device),
        tested=True,
        run_images=run_images,
        known_classes=loaded.classes,
        match_classes=True,
    )
    own = external.is_own_split
    return EvalSplit(
        _in_model_order(external.images, external.classes, loaded),
        external.name,
        # The images of the run's own split count as that, wherever they are.
        loaded.model_metadata["data"]["fingerprint"] if own else external.fingerprint,
        external.split,
        own=own,
        in_order=False,
        trained_on=external.trained_on,
    )


def load_own_data(loaded: LoadedModel, device: str) -> Data:
    """Load the data that the model was trained on, with its splits; the test split stays sealed.

    Raises:
        DataError: the images changed or moved since training.
    """
    config = serialization.recipe_from_metadata(loaded.model_metadata).data
    names = [name for name in _own_data_names(loaded, config.name) if is_available(name)]
    if not names:
        raise _missing_data(loaded, config.name)
    candidates = []
    for name in names:
        data = _load_as_trained(loaded, config.model_copy(update={"name": name}), device)
        if data.fingerprint == loaded.model_metadata["data"]["fingerprint"]:
            data.print_notes()
            return data
        candidates.append(data)
    data = candidates[0]
    changed = data.listing.changed(loaded.folder) if data.listing and loaded.folder else ""
    raise DataError(
        f"the images of {data.name!r} changed since this model was trained on them"
        + (f" ({changed})" if changed else "")
        + ", so its test images may be among those it was trained on",
        where=data.name,
        fix="evaluate with --data to use all images as they are now, or train again with --fresh",
    )


def _load_as_trained(loaded: LoadedModel, config: DataConfig, device: str) -> Data:
    """Load a data set with the conversion and the classes of a model."""
    with loaded.recorded_code():
        return load_data(
            config,
            memory_budget=memory_budget(device),
            conversion=loaded.preprocessing.conversion,
            known_classes=loaded.classes,
        )


def _own_data_names(loaded: LoadedModel, name: str) -> list[str]:
    """Return where the data of a model may be: its name in the recipe, then the recorded path."""
    recorded: list[str] = []
    if loaded.folder is not None:
        with suppress(ModelFileError):  # a damaged run.json does not affect the model file
            recorded = recorded_data_names(RunDir(loaded.folder).metadata())
    return list(dict.fromkeys(map(canonical_name, [name, *recorded])))


def _missing_data(loaded: LoadedModel, name: str) -> DataError:
    run = loaded.folder.name if loaded.folder is not None else "RUN"
    paths = [os.path.abspath(each) for each in _own_data_names(loaded, name)]
    return DataError(
        f"the data set {name!r} that {run!r} was trained on does not exist any more",
        where=f"it was at {paths[-1]}",
        fix=f"move it back, or name its new place once: `convlens evaluate {run} --data NEWPLACE` "
        "(if the images are the same, all commands find them there from then on)",
    )


def recognize_own_data(
    loaded: LoadedModel, name: str, device: str, run_images: RunImages | None = None
) -> Data | None:
    """Return the data that the model was trained on if `name` holds exactly its images, else None.

    They may have moved or been renamed. A new place is recorded in the run, so that later commands
    find it. Built-in sets cannot move: their names always mean the whole set.

    Args:
        run_images: the list of the run's images, if the caller needs it, too.
    """
    config = serialization.recipe_from_metadata(loaded.model_metadata).data
    if name in SOURCES:
        return None
    here = config.model_copy(update={"name": canonical_name(name)})
    try:
        source = find_configured_source(here, known_classes=loaded.classes)
        if set(source.classes) != set(loaded.classes):
            return None
        if not may_hold_images_of_run(run_images or RunImages(loaded.folder), source):
            return None
        data = _load_as_trained(loaded, here, device)
    except ConvlensError:
        return None  # e.g. the keys of the recipe do not apply to it: it is another data set
    if data.fingerprint != loaded.model_metadata["data"]["fingerprint"]:
        return None
    data.print_notes()
    path = data_path(name)
    is_known = any(map(is_available, _own_data_names(loaded, config.name)))
    has_moved = path is not None and not is_known
    if has_moved and loaded.folder is not None and init_process_group().is_main_process:
        RunDir(loaded.folder).record_data_path(str(path))
    return data


def _own_split(data: Data, split: str) -> Split:
    if split == "test":
        return data.unseal_test()
    if split == "val" and not len(data.val):
        raise DataError(
            "this run has no validation split: it was trained on those images as well",
            where=data.name,
            fix="use its test split (--split test), or another data set (--data)",
        )
    return data.val if split == "val" else data.train


def evaluate_split(
    run_dir: RunDir,
    loaded: LoadedModel,
    eval_split: EvalSplit,
    device: str,
    *,
    tta: str | None = None,
    promises: Promises | None = None,
    measure_unlike: bool = True,
    draw: bool = True,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> EvaluationRun:
    """Evaluate all images of a split. The caller logs the result (`log_evaluation`).

    Args:
        promises: thresholds whose effect on this split is reported.
        measure_unlike: also measure how many images are unlike the training images.
        draw: also draw confusion, calibration and the worst mistakes.
        process_group: the processes that share the images.
    """
    part, name, fingerprint, split, own = eval_split[:5]
    start = time.perf_counter()
    plan, can_choose = _inference_plan(run_dir, loaded, device)
    detector = loaded.calibration.detector if measure_unlike else None
    outputs, labels = _compute_outputs(
        loaded, part, split, plan, can_choose, tta, process_group, detector
    )
    seconds = time.perf_counter() - start
    scores, targets = outputs.logits.cpu().numpy(), labels.cpu().numpy()
    temperature = loaded.calibration.temperature
    summary = metrics.summarize(scores, targets, list(loaded.classes), temperature)
    probs = metrics.softmax(scores, temperature)
    result: dict[str, Any] = {
        "run": run_dir.name,
        "split": split,
        "data": name,
        **summary,
        **metrics.class_means_intervals(targets, scores.argmax(1), len(loaded.classes)),
        "top5": summary.get("top5"),
        "classes": list(loaded.classes),
        "temperature": temperature,
        "ece_by_chance": metrics.ece_by_chance(probs),
        "confidence": float(probs.max(axis=1).mean()),
        "tta": _tta_metrics(tta, outputs, targets, loaded.classes, temperature),
        **(promises or Promises()).measure(scores, temperature, targets),
        "images_per_second": round(len(targets) / seconds, 1),
        "data_fingerprint": fingerprint,
        "model_sha256": loaded.model_metadata["sha256"],
        "convlens": loaded.model_metadata["convlens"],
        "hardware": describe_hardware(device),
        "looks": 0,  # until it is logged
        "own": own,
        "trained_on": eval_split.trained_on,
        "unlike": _unlike_metrics(detector, outputs.features),
    }
    # Reports show the outputs of the model file, not those of an exported one.
    is_cached = own and eval_split.in_order and loaded.is_native
    if is_cached and process_group.is_main_process:
        images = split_hash(part, loaded.classes)
        cached = CachedPredictions(scores, targets, images, temperature)
        save_predictions(run_dir, split, fingerprint, loaded.model_metadata["sha256"], cached)
    of = "test" if split == ALL_IMAGES else split  # in names of files: they are tested
    label = split if own else f"{of}-{safe_name(Path(name).name)}"
    if draw and process_group.is_main_process:
        run_plots.plot_evaluation(run_dir, label, part, scores, loaded.classes, temperature)
    fields = {key: result[key] for key in Evaluation.__dataclass_fields__}
    low, high = result["interval95"]
    evaluation = Evaluation(**{**fields, "interval95": (low, high)})
    return EvaluationRun(evaluation, scores, targets)


def log_evaluation(
    run_dir: RunDir, evaluation: Evaluation, process_group: ProcessGroup = SINGLE_PROCESS
) -> Evaluation:
    """Log an evaluation in `results.json`; return it with the number of uses of its split.

    It is the last thing that a command does, since a command that fails costs no use.
    """
    result = asdict(evaluation)
    del result["looks"]
    looks = process_group.broadcast(lambda: run_dir.add_result(result)["looks"])
    return replace(evaluation, looks=looks)


def log_test_use(run_dir: RunDir, loaded: LoadedModel, n: int, command: str) -> int:
    """Log a use of the run's own test split by a command that does not evaluate it.

    Args:
        n: number of test images.
        command: such as `look`.

    Returns:
        The number of uses so far, this one included.
    """
    metadata = loaded.model_metadata
    entry = run_dir.add_result(
        {
            "run": run_dir.name,
            "split": "test",
            "data": metadata["data"].get("name", ""),
            "own": True,
            "n": n,
            "by": command,
            "data_fingerprint": metadata["data"]["fingerprint"],
            "model_sha256": metadata["sha256"],
        }
    )
    return int(entry["looks"])


def count_test_uses(run_dir: RunDir, loaded: LoadedModel) -> int:
    """Return how often the test split of the run has been used so far."""
    fingerprint = loaded.model_metadata.get("data", {}).get("fingerprint")
    return sum(
        entry["split"] == "test"
        and bool(entry.get("own"))
        and entry.get("data_fingerprint") == fingerprint
        for entry in run_dir.evaluation_log()
    )


def sentence(result: Mapping[str, Any]) -> str:
    """Describe a result, an entry of `results.json` or `Evaluation.to_dict()`, in one line.

    For the run's own test split (`own`) it includes how often that was used; for another data set,
    its name, and how many of its images the run was trained on.
    """
    low, high = result["interval95"]
    copies = ""
    if result.get("trained_on"):
        copies = f"{result['trained_on']:,} of {result['n']:,} were training images; "
    # Earlier versions had no temperature.
    before = result.get("ece_uncalibrated", result["ece"])
    changed = f"{before:.3f}" != f"{result['ece']:.3f}"
    uncalibrated = f" ({before:.3f} before calibration)" if changed else ""
    line = (
        f"{escape(_accuracy_name(result))} [bold]{result['accuracy']:.2%}[/] "
        f"({copies}95% interval {low:.2%} to {high:.2%}, n = {result['n']:,}), "
        f"{_class_means_text(result)}"
        f"loss {result['loss']:.4f}, calibration error {result['ece']:.3f}{uncalibrated}"
        f"{_calibration_in_words(result)}"
    )
    if result["split"] == "test" and result.get("own"):
        line += f"; test set used {times(result['looks'])}"
    return line


def _calibration_in_words(result: Mapping[str, Any]) -> str:
    """Return e.g. `: confidence is 4.1 points too high`; empty for older results."""
    if result.get("ece_by_chance") is None or result.get("confidence") is None:
        return ""
    surplus = result["confidence"] - result["accuracy"]
    calibration = metrics.Calibration(result["ece"], result["ece_by_chance"], surplus)
    return f": {calibration.in_words()}"


def _accuracy_name(result: Mapping[str, Any]) -> str:
    """Return e.g. `test accuracy`, or `accuracy on NAME` for a data set without splits."""
    of = "" if result["split"] == ALL_IMAGES else f"{result['split']} "
    on = "" if result.get("own", True) else f" on {result['data']}"
    return f"{of}accuracy{on}"


def _class_means_text(result: Mapping[str, Any]) -> str:
    """Return macro F1 and balanced accuracy with their intervals; empty for older results."""
    if "macro_f1" not in result:
        return ""
    parts = []
    for key, words in (("macro_f1", "macro F1"), ("balanced_accuracy", "balanced accuracy")):
        low, high = result[f"{key}_interval95"]
        # The bootstrap gives no interval if every class is classified in one way only.
        interval = f" ({low:.2%} to {high:.2%})" if low < high else ""
        parts.append(f"{words} {result[key]:.2%}{interval}, ")
    return "".join(parts)


def times(count: int) -> str:
    """Return `once` or `3 times`."""
    return "once" if count == 1 else f"{count:,} times"


def _inference_plan(run_dir: RunDir, loaded: LoadedModel, device: str) -> tuple[Plan, bool]:
    """Return the plan to evaluate with, and whether its memory format may be chosen by timing.

    A run that was trained in float32 on this hardware keeps its memory format: it is tested as it
    was validated, and nothing is timed again.
    """
    plan, metadata = place_model(loaded.model, device), dict[str, Any]()
    if loaded.is_native:
        with suppress(ModelFileError):  # a damaged run.json does not affect the model file
            metadata = run_dir.metadata()
    trained = metadata.get("plan") or {}
    if trained.get("precision") == "fp32" and metadata.get("hardware") == describe_hardware(device):
        plan = replace(plan, memory_format=trained["memory_format"])
        plan.prepare_model(loaded.model)
        return plan, False
    return plan, loaded.can_choose_memory_format


def _compute_outputs(
    loaded: LoadedModel,
    part: Split,
    split: str,
    plan: Plan,
    can_choose_memory_format: bool,
    tta: str | None,
    process_group: ProcessGroup,
    detector: OutlierDetector | None = None,
) -> tuple[ModelOutputs, torch.Tensor]:
    """Return the logits without and with test-time augmentation, and the labels, on the device.

    With a detector, the features are scores `[N, 1]`: how far each image is above the threshold
    for unknown images. Features of a complete split could need more memory than its images.
    """
    temperature = loaded.calibration.temperature

    def score(outputs: ModelOutputs) -> torch.Tensor:
        assert detector is not None
        features = None if outputs.features is None else outputs.features.cpu().numpy()
        scored = detector.scores(outputs.logits.cpu().numpy(), temperature, features)
        assert scored is not None
        scores, threshold = scored
        return torch.from_numpy(scores - threshold).float()[:, None]

    def compute(share: Labelled) -> ModelOutputs:
        model, normalize = loaded.model, loaded.preprocessing.normalize
        return split_outputs(
            model,
            share,
            normalize,
            plan,
            inference.select_views(tta),
            advance=bar.advance,
            choose_memory_format=can_choose_memory_format and process_group.size == 1,
            with_features=detector is not None and detector.uses_features,
            reduce_features=score if detector is not None and detector.can_score else None,
        )[0]

    with progress_bar(f"evaluating {split}", int(part.labels.numel())) as bar:
        plain, mean, scores = distributed_map(process_group, part, compute)
        assert plain is not None
        synchronize(plan.device)
    return ModelOutputs(plain, mean, scores), part.labels.to(plan.device)


def _unlike_metrics(
    detector: OutlierDetector | None, scores: torch.Tensor | None
) -> dict[str, Any] | None:
    """Return `Evaluation.unlike` for scores `[N, 1]` above the threshold."""
    if detector is None or scores is None:
        return None
    marked, n = int((scores > 0).sum()), len(scores)
    return {
        "marked": marked,
        "share": marked / n,
        "interval95": list(metrics.wilson_interval(marked, n)),
        "by": "features" if detector.uses_features else "energy",
    }


def _tta_metrics(
    tta: str | None,
    outputs: ModelOutputs,
    targets: np.ndarray,
    classes: Sequence[str],
    temperature: float,
) -> dict[str, Any] | None:
    """Return the metrics with test-time augmentation, compared with the predictions without it."""
    if outputs.tta_logits is None:
        return None
    plain, mean = outputs.logits.cpu().numpy(), outputs.tta_logits.cpu().numpy()
    summary = metrics.summarize(mean, targets, classes, temperature)
    gained, lost, p = metrics.paired_counts(targets, plain.argmax(1), mean.argmax(1))
    shared = {key: summary[key] for key in TTA_KEYS}
    return {"views": tta, **shared, "gained": gained, "lost": lost, "p": p}


class CachedPredictions(NamedTuple):
    """Logits float32 `[N, K]` and labels int64 `[N]` of a split, in the model's order of classes.

    `images` is the `split_hash` of the split. Two models with equal hashes were evaluated on the
    same images, whatever their image size and training data. `temperature` is that of the model;
    the logits are those of the network. `total` is the number of images that a sample was drawn
    from; 0 for a complete split.
    """

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    images: str
    temperature: float = 1.0
    total: int = 0

    @property
    def probs(self) -> metrics.Floats:
        """Probabilities `[N, K]`, with the temperature."""
        return metrics.softmax(self.logits, self.temperature)


def save_predictions(
    run_dir: RunDir,
    split: str,
    fingerprint: str,
    model_sha256: str,
    predictions: CachedPredictions,
) -> None:
    """Cache predictions in the run; those above `MAX_CACHED_BYTES` are not stored.

    Args:
        fingerprint, model_sha256: of the data and the model file. `load_predictions` returns the
            predictions only for both of these.
    """
    if predictions.logits.nbytes > MAX_CACHED_BYTES:
        return
    metadata = {
        "split": split,
        "images": predictions.images,
        "temperature": predictions.temperature,
        "data_fingerprint": fingerprint,
        "model_sha256": model_sha256,
        **({"total": predictions.total} if predictions.total else {}),
    }
    tensors = {
        "logits": torch.from_numpy(np.ascontiguousarray(predictions.logits, dtype=np.float32)),
        "labels": torch.from_numpy(np.ascontiguousarray(predictions.labels, dtype=np.int64)),
    }
    path = _cache_path(run_dir, split, fingerprint)
    files.remove_stale_temp_files(path.parent, [path.name], alone=False)
    serialization.write_model_file(path, tensors, metadata)


def load_predictions(
    run_dir: RunDir, split: str, fingerprint: str, model_sha256: str
) -> CachedPredictions | None:
    """Return the cached predictions of exactly this model for this data; None if not cached."""
    path = _cache_path(run_dir, split, fingerprint)
    if not path.exists():
        return None
    try:
        tensors, metadata = serialization.read_model_file(path)
        if (metadata["data_fingerprint"], metadata["model_sha256"]) != (fingerprint, model_sha256):
            return None
        return CachedPredictions(
            tensors["logits"].numpy(),
            tensors["labels"].numpy(),
            metadata["images"],
            float(metadata.get("temperature", 1.0)),
            int(metadata.get("total", 0)),
        )
    except (ModelFileError, KeyError):  # damaged or of another version: they are computed again
        return None


class TrainAccuracy(NamedTuple):
    """Accuracy on training images with the final weights and without augmentation.

    Attributes:
        correct, n: of the images that were evaluated.
        total: number of all training images.
    """

    correct: int
    n: int
    total: int

    @property
    def share(self) -> float:
        return self.correct / self.n


def measure_train_accuracy(
    run_dir: RunDir,
    loaded: LoadedModel,
    device: str,
    *,
    own_data: Callable[[], Data],
) -> TrainAccuracy:
    """Return the accuracy on up to 2,000 training images, always the same ones.

    The predictions are cached in the run.

    Args:
        own_data: returns the result of `load_own_data`; only called if nothing is cached.

    Raises:
        DataError: the images changed or moved since training.
    """
    fingerprint = loaded.model_metadata["data"]["fingerprint"]
    sha256 = loaded.model_metadata["sha256"]
    predictions = load_predictions(run_dir, TRAIN_SAMPLE, fingerprint, sha256)
    if predictions is None:
        data = own_data()
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
        index = order[:MAX_TRAIN_IMAGES].sort().values
        sample = Split(
            data.train.rows.subset(index),
            data.train.labels[index],
            [data.train.ids[i] for i in index.tolist()],
        )
        plan, can_choose = _inference_plan(run_dir, loaded, device)
        outputs, labels = _compute_outputs(
            loaded, sample, "train", plan, can_choose, None, SINGLE_PROCESS
        )
        predictions = CachedPredictions(
            outputs.logits.cpu().numpy(),
            labels.cpu().numpy(),
            split_hash(sample, loaded.classes),
            total=len(data.train),
        )
        save_predictions(run_dir, TRAIN_SAMPLE, fingerprint, sha256, predictions)
    correct = int((predictions.logits.argmax(axis=1) == predictions.labels).sum())
    return TrainAccuracy(correct, len(predictions.labels), predictions.total)


def split_hash(split: Split, classes: Sequence[str]) -> str:
    """Hash the image ids and class names of a split, in order (SHA-256).

    Args:
        classes: names in the order of the labels of `split`.
    """
    digest = hashlib.sha256()
    for name, label in zip(split.ids, split.labels.tolist(), strict=True):
        digest.update(json.dumps([str(name), classes[label]]).encode())
    return digest.hexdigest()


def _cache_path(run_dir: RunDir, split: str, fingerprint: str) -> Path:
    return run_dir.path / "answers" / f"{split}-{fingerprint[:12]}.safetensors"
