"""Evaluation of models, and the only code that reads the test split.

Every evaluation of a split is logged in the run's `results.json` with a running count, so that
repeated use of a test set is visible. The logits are cached in the run, because reports and
comparisons show single images: evaluating again for each of them would take minutes and would
inflate the test access count.
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

from convlens import metrics, run_plots, serialization
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
from convlens.errors import DataError, ModelFileError, lookup
from convlens.onnx_model import load_model_or_onnx
from convlens.recipe import DataConfig
from convlens.run import (
    LoadedModel,
    RunDir,
    RunLike,
    as_run_dir,
    check_same_images,
    safe_name,
    shared_run_dir,
)
from convlens.uncertainty.calibration import as_percent
from convlens.uncertainty.promises import Promises
from convlens.utils import files, notebook
from convlens.utils.console import progress_bar, quiet_mode

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
        looks: how often this split has been evaluated, this time included.
        images_per_second: speed of the whole pass, test-time augmentation included.
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
            f"{self.run}: {self.split} accuracy {self.accuracy:.2%} (95% interval {low:.2%} to "
            f"{high:.2%}, n = {self.n:,}), loss {self.loss:.4f}, calibration error {self.ece:.3f}"
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


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


@preserve_torch_settings()
def evaluate(
    run: RunLike,
    split: str = "test",
    *,
    data: str | Path | DataConfig | None = None,
    tta: str | None = None,
    min_accuracy: float | None = None,
    confidence: float = 0.95,
    prediction_set: float | None = None,
    device: str | None = None,
    quiet: bool = True,
    own_data: Data | None = None,
) -> Evaluation:
    """Evaluate a run's model on one of its own splits or on another data set.

    The evaluation is logged in the run. Printing the result is left to the caller.

    Args:
        run: a run by name, folder or model file, or a `Run`.
        split: `test`, `val` or `train`. Of another data set, the part of that name if it has
            parts, otherwise all images.
        data: another data set, or a data section of a recipe with the keys to read it. Its classes
            are matched by name; case and leading zeros do not matter.
        tta: test-time augmentation, `flip` or `flip+shifts`. Its metrics are reported in addition
            to those without it. Only for classes that a mirror image does not change.
        min_accuracy, confidence, prediction_set: as in `predict`; what they give on this split is
            reported in addition.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.
        quiet: show no progress and no warnings.
        own_data: the data set of the run, if the caller has loaded it already.

    Raises:
        UsageError: unknown run, split or views, or too few validation images for a promise.
        DataError: the images changed since training, or a class that the model does not know.

    Example:
        >>> convlens.evaluate("digits", "val").accuracy
    """
    lookup(dict.fromkeys(SPLIT_NAMES), split, "split")
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
        return evaluate_split(
            run_dir,
            loaded,
            eval_split,
            split,
            device,
            tta=tta,
            promises=promises,
            process_group=process_group,
        ).evaluation


class EvalSplit(NamedTuple):
    """A split with labels in a model's order of classes, and its data set."""

    part: Split
    name: str
    fingerprint: str


class EvaluationRun(NamedTuple):
    """One evaluation of a split: the metrics and the logits they were computed from.

    `scores` are logits `[N, K]` and `labels` int64 `[N]`, both in the order of the split.
    """

    evaluation: Evaluation
    scores: np.ndarray
    labels: np.ndarray


def load_eval_split(
    loaded: LoadedModel,
    split: str,
    *,
    data: str | Path | DataConfig | None = None,
    device: str,
    own_data: Data | None = None,
) -> EvalSplit:
    """Load a split of the model's own data or of another data set.

    Args:
        own_data: the result of `load_own_data`, if the caller has it already.

    Raises:
        UsageError, DataError: as by `evaluate`.
    """
    if data is None:
        own_data = own_data or load_own_data(loaded, device)
        part, classes = _own_split(own_data, split), own_data.classes
        name, fingerprint = own_data.name, own_data.fingerprint
    else:
        part, classes, name, fingerprint = load_external_data(
            data.name if isinstance(data, DataConfig) else str(data),
            split,
            conversion=loaded.preprocessing.conversion,
            memory_budget=memory_budget(device),
            tested=True,
            run=loaded.folder,
            model_classes=loaded.classes,
            config=data if isinstance(data, DataConfig) else None,
        )
    positions = torch.tensor([loaded.classes.index(label) for label in classes])
    labels = positions[part.labels]
    return EvalSplit(replace(part, labels=labels), name, fingerprint)


def load_own_data(loaded: LoadedModel, device: str) -> Data:
    """Load the data that the model was trained on, with its splits; the test split stays sealed.

    Raises:
        DataError: the images changed or moved since training.
    """
    recipe = serialization.recipe_from_metadata(loaded.model_metadata)
    data = load_data(
        recipe.data,
        memory_budget=memory_budget(device),
        conversion=loaded.preprocessing.conversion,
        known_classes=loaded.classes,
    )
    if data.fingerprint != loaded.model_metadata["data"]["fingerprint"]:
        changed = data.listing.changed(loaded.folder) if data.listing and loaded.folder else ""
        raise DataError(
            f"the images of {data.name!r} changed since this model was trained on them"
            + (f" ({changed})" if changed else "")
            + ", so its test images may be among those it was trained on",
            where=data.name,
            fix="evaluate with --data to use all images as they are now, or train again with "
            "--fresh",
        )
    data.print_notes()
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
    split: str,
    device: str,
    *,
    tta: str | None = None,
    promises: Promises | None = None,
    draw: bool = True,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> EvaluationRun:
    """Evaluate all images of a split and log the evaluation in `results.json`.

    Args:
        split: name of the split: `test`, `val` or `train`.
        promises: thresholds whose effect on this split is reported.
        draw: also draw confusion, calibration and the worst mistakes.
        process_group: the processes that share the images; rank 0 writes the log.
    """
    part, name, fingerprint = eval_split
    start = time.perf_counter()
    plan, can_choose = _inference_plan(run_dir, loaded, device)
    outputs, labels = _compute_outputs(loaded, part, split, plan, can_choose, tta, process_group)
    seconds = time.perf_counter() - start
    scores, targets = outputs.logits.cpu().numpy(), labels.cpu().numpy()
    temperature = loaded.calibration.temperature
    summary = metrics.summarize(scores, targets, list(loaded.classes), temperature)
    result: dict[str, Any] = {
        "run": run_dir.name,
        "split": split,
        "data": name,
        **summary,
        **metrics.class_means_intervals(targets, scores.argmax(1), len(loaded.classes)),
        "top5": summary.get("top5"),
        "classes": list(loaded.classes),
        "temperature": temperature,
        "tta": _tta_metrics(tta, outputs, targets, loaded.classes, temperature),
        **(promises or Promises()).measure(scores, temperature, targets),
        "images_per_second": round(len(targets) / seconds, 1),
        "data_fingerprint": fingerprint,
        "model_sha256": loaded.model_metadata["sha256"],
        "convlens": loaded.model_metadata["convlens"],
        "hardware": describe_hardware(device),
    }
    is_own = loaded.model_metadata["data"]["fingerprint"] == fingerprint
    result["looks"] = process_group.broadcast(
        lambda: run_dir.add_result({**result, "own": is_own})["looks"]
    )
    # Reports show the outputs of the model file, not those of an exported one.
    if is_own and process_group.is_main_process and loaded.is_native:
        images = split_hash(part, loaded.classes)
        cached = CachedPredictions(scores, targets, images, temperature)
        save_predictions(run_dir, split, fingerprint, loaded.model_metadata["sha256"], cached)
    label = split if is_own else f"{split}-{safe_name(Path(name).name)}"
    if draw and process_group.is_main_process:
        run_plots.plot_evaluation(run_dir, label, part, scores, loaded.classes, temperature)
    fields = {key: result[key] for key in Evaluation.__dataclass_fields__}
    low, high = result["interval95"]
    evaluation = Evaluation(**{**fields, "interval95": (low, high)})
    return EvaluationRun(evaluation, scores, targets)


def sentence(result: Mapping[str, Any]) -> str:
    """Describe a result, an entry of `results.json` or `Evaluation.to_dict()`, in one line.

    For the run's own test split (`own`) it includes how often that was used.
    """
    low, high = result["interval95"]
    # Earlier versions had no temperature.
    before = result.get("ece_uncalibrated", result["ece"])
    changed = f"{before:.3f}" != f"{result['ece']:.3f}"
    uncalibrated = f" ({before:.3f} before calibration)" if changed else ""
    line = (
        f"{result['split']} accuracy [bold]{result['accuracy']:.2%}[/] "
        f"(95% interval {low:.2%} to {high:.2%}, n = {result['n']:,}), "
        f"{_class_means_text(result)}"
        f"loss {result['loss']:.4f}, calibration error {result['ece']:.3f}{uncalibrated}"
    )
    if result["split"] == "test" and result.get("own"):
        line += f"; test set used {times(result['looks'])}"
    return line


def _class_means_text(result: Mapping[str, Any]) -> str:
    """Return macro F1 and balanced accuracy with their intervals; empty for older results."""
    if "macro_f1" not in result:
        return ""
    parts = []
    for key, words in (("macro_f1", "macro F1"), ("balanced_accuracy", "balanced accuracy")):
        low, high = result[f"{key}_interval95"]
        parts.append(f"{words} {result[key]:.2%} ({low:.2%} to {high:.2%}), ")
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
) -> tuple[ModelOutputs, torch.Tensor]:
    """Return the logits without and with test-time augmentation, and the labels, on the device."""

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
        )[0]

    with progress_bar(f"evaluating {split}", int(part.labels.numel())) as bar:
        plain, mean, _ = distributed_map(process_group, part, compute)
        assert plain is not None
        synchronize(plan.device)
    return ModelOutputs(plain, mean), part.labels.to(plan.device)


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
    the logits are those of the network.
    """

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    images: str
    temperature: float = 1.0

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
        )
    except (ModelFileError, KeyError):  # damaged or of another version: they are computed again
        return None


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
