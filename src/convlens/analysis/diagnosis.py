"""Diagnosis of a run: rules with stated thresholds on its curves and a few measurements.

`diagnose` collects a `RunEvidence` from the run's files and from some training and validation
images; the test split stays sealed. A rule reads it and returns a `Finding`, None if it finds
nothing, or raises `InsufficientEvidence`. `RULES` lists the rules in the order in which they are
reported. The thresholds are rules of thumb, chosen so that the recipes that come with convlens
pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convlens import metrics, serialization
from convlens.data.dataset import Split
from convlens.device import preserve_torch_settings, select_device
from convlens.engine.inference import batch_logits, place_model
from convlens.engine.losses import is_user_loss, loss_of_guessing
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation import load_own_data
from convlens.interpret.features import as_maps, record_outputs, stage_names
from convlens.models import is_user_network, model_options
from convlens.recipe import Recipe
from convlens.run import LoadedModel, RunDir, RunLike, as_run_dir, load_model
from convlens.user_code import UntrustedCode, accepts_trust
from convlens.utils.console import progress_bar, quiet_mode

LAST_EPOCHS = 3  # epochs whose mean is the value "at the end": single epochs are noisy
MAX_IMAGES = 512  # images of each split: enough for the thresholds, and takes a second or two
BATCH_SIZE = 64

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """A problem that a rule found.

    Attributes:
        what: the problem in a sentence.
        evidence: the numbers that it rests on.
        threshold: the threshold that they crossed, in words.
        do: the remedy in words.
        overrides: the remedy as arguments of `convlens train`.
    """

    rule: str
    what: str
    evidence: Mapping[str, Any]
    threshold: str
    do: str
    overrides: Sequence[str]


class InsufficientEvidence(Exception):  # noqa: N818 - not an error
    """A rule lacks the evidence it needs; the message says which."""


class CorrectCount(NamedTuple):
    """`correct` of `n` images."""

    correct: int
    n: int

    @property
    def share(self) -> float:
        return self.correct / self.n

    @property
    def interval95(self) -> tuple[float, float]:
        """Wilson's interval of the share."""
        return metrics.wilson_interval(self.correct, self.n)

    @property
    def text(self) -> str:
        """Share, interval and number of images, e.g. `60.0% (31.3% to 83.2%, n = 10)`."""
        low, high = self.interval95
        return f"{self.share:.1%} ({low:.1%} to {high:.1%}, n = {self.n:,})"


@dataclass(frozen=True)
class RunEvidence:
    """Evidence about a run. Values that were not measured are None or empty.

    Attributes:
        rows: rows of `metrics.csv`.
        diverged: epoch, step and learning rate at which the loss became NaN or infinite.
        counts: number of training images by class.
        val_by_class: correct validation images by class, without classes that have none; among
            some hundred images, and among as many of the rare classes.
        train_correct, val_correct: correct images among some hundred training and validation
            images, in eval mode and without augmentation.
        dead: by stage, the number of dead channels and of all channels.
        image_stats: mean and standard deviation of each channel of training and of validation
            images, `[N, features]` in 0..1, named in `stat_names`.
        unmeasured: the reason why values are missing.
    """

    recipe: Recipe | None = None
    classes: int = 0
    rows: Sequence[Mapping[str, float]] = ()
    finished: bool = True
    diverged: Mapping[str, float] | None = None
    counts: Mapping[str, int] | None = None
    val_by_class: Mapping[str, CorrectCount] | None = None
    train_correct: CorrectCount | None = None
    val_correct: CorrectCount | None = None
    dead: Mapping[str, tuple[int, int]] | None = None
    image_stats: tuple[Floats, Floats] | None = None
    stat_names: Sequence[str] = ()
    unmeasured: str = "it was not measured"

    def column(self, name: str, min_epochs: int = 1) -> Floats:
        """Return a column of `metrics.csv`, one value for each epoch.

        Raises:
            InsufficientEvidence: fewer than `min_epochs` epochs, or all values are NaN.
        """
        if len(self.rows) < min_epochs:
            raise InsufficientEvidence(
                f"{len(self.rows)} epochs are too few: at least {min_epochs} are needed"
                if self.rows
                else "there is no metrics.csv with an epoch in it"
            )
        values = np.array([row.get(name, math.nan) for row in self.rows])
        if np.isnan(values).all():
            no_split = "it has no validation split" if name.startswith("val_") else ""
            raise InsufficientEvidence(no_split or f"its metrics.csv has no {name}")
        return values

    @property
    def loss_of_guessing(self) -> float:
        """The training loss of equal probabilities for all classes."""
        classes = max(self.classes, 2)
        if self.recipe is None:
            return math.log(classes)
        if is_user_loss(self.recipe.optim.loss):
            raise InsufficientEvidence("its loss is user code")
        return loss_of_guessing(self.recipe.optim, classes)

    def require_recipe(self) -> Recipe:
        if self.recipe is None:
            raise InsufficientEvidence("its recipe isn't known")
        return self.recipe


@dataclass(frozen=True)
class Diagnosis:
    """Result of `diagnose`: findings, rules that found nothing, and undecided rules.

    `untold` maps each undecided rule to the reason.
    """

    run: str
    status: str
    epochs: int
    findings: Sequence[Finding]
    healthy: Sequence[str]
    untold: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@accepts_trust
@preserve_torch_settings()
def diagnose(
    run: RunLike, *, device: str | None = None, quiet: bool = True, trust_code: bool = False
) -> Diagnosis:
    """Diagnose a run: overfitting, learning rate, dead layers and more, with evidence and remedy.

    Every rule of `RULES` is applied to the run, finished or not. A run without weights is judged
    by its curves, a bare model file by its images. If images changed or moved, the rules that need
    them are undecided.

    Args:
        run: a run by name, folder or model file, or a `Run`.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.
        quiet: show no progress.
        trust_code: import user code that the model needs; otherwise that is an error.

    Raises:
        UsageError: unknown run or device.
        ModelFileError: `run.json` or `metrics.csv` cannot be read.

    Example:
        >>> [(finding.rule, finding.overrides) for finding in convlens.diagnose("mnist").findings]
    """
    run_dir, device = as_run_dir(run), select_device(device)
    with quiet_mode(quiet):
        evidence = _collect_evidence(run_dir, device)
    findings, healthy, undecided = [], [], {}
    for name, rule in RULES.items():
        try:
            finding = rule(evidence)
        except InsufficientEvidence as reason:
            undecided[name] = str(reason)
            continue
        if finding is None:
            healthy.append(name)
        else:
            findings.append(finding)
    status = _status(run_dir, evidence)
    return Diagnosis(run_dir.name, status, len(evidence.rows), findings, healthy, undecided)


def _status(run_dir: RunDir, evidence: RunEvidence) -> str:
    if not run_dir.metadata():
        return "a bare model file without training history"
    if run_dir.is_finished:
        return "finished"
    if evidence.diverged is not None:
        return "stopped by a loss that was not finite"
    return "not finished" if evidence.rows else "no epoch is finished yet"


def _collect_evidence(run_dir: RunDir, device: str) -> RunEvidence:
    metadata = run_dir.metadata()
    evidence: dict[str, Any] = {
        "rows": run_dir.metrics(),
        "finished": run_dir.is_finished or not metadata,
        "diverged": metadata.get("diverged"),
        "classes": len(metadata.get("data", {}).get("classes", [])),
    }
    try:
        evidence["recipe"] = _load_recipe(run_dir)
        evidence |= _measure(run_dir, device)
    except UntrustedCode:
        raise
    except ConvlensError as error:
        evidence["unmeasured"] = error.what
    return RunEvidence(**evidence)


def _load_recipe(run_dir: RunDir) -> Recipe:
    if (run_dir.path / "recipe.yaml").is_file():
        return run_dir.recipe()
    loaded = load_model(run_dir.model_path)
    return serialization.recipe_from_metadata(loaded.model_metadata)


def _measure(run_dir: RunDir, device: str) -> dict[str, Any]:
    """Measure some training and validation images; return fields of `RunEvidence`."""
    loaded = load_model(run_dir.model_path)
    data = load_own_data(loaded, device)
    counts = np.bincount(data.train.labels.numpy(), minlength=len(data.classes))
    evidence: dict[str, Any] = {
        "classes": len(data.classes),
        "counts": dict(zip(data.classes, counts.tolist(), strict=True)),
    }
    splits = {"train": data.train, "val": data.val}
    samples = {name: _sample(split) for name, split in splits.items() if len(split)}
    stats, dead = {}, {}
    rare = [data.classes.index(name) for name in _rare_classes(evidence["counts"])]
    if set(rare) & set(data.val.labels.tolist()):  # validation may lack the rare classes
        samples["rare"] = _sample(data.val, classes=rare)
    by_class = dict[str, CorrectCount]()
    total = sum(len(labels) for _, labels in samples.values())
    with progress_bar("evaluating images", total) as bar:
        for name, (pixels, labels) in samples.items():
            correct, dead[name] = _run_network(loaded, pixels, labels, device, bar.advance)
            if name != "train":
                by_class |= _count_by_class(correct, labels, data.classes)
            if name != "rare":
                evidence[f"{name}_correct"] = CorrectCount(int(correct.sum()), len(labels))
                stats[name] = _image_stats(pixels)
    if by_class:
        evidence["val_by_class"] = by_class
    evidence["dead"] = dead.get("val", dead["train"])
    if "val" in stats:
        evidence["image_stats"] = (stats["train"], stats["val"])
    channels = ("grey",) if data.channels == 1 else ("red", "green", "blue")
    evidence["stat_names"] = [f"{stat} {c}" for stat in ("mean", "deviation") for c in channels]
    return evidence


def _count_by_class(
    correct: Tensor, labels: Tensor, classes: Sequence[str]
) -> dict[str, CorrectCount]:
    return {
        classes[i]: CorrectCount(int(correct[labels == i].sum()), int((labels == i).sum()))
        for i in labels.unique().tolist()
    }


def _sample(split: Split, classes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Draw images and labels from a split, always the same ones; of `classes` only, if given."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    if classes is not None:
        order = order[torch.isin(split.labels[order], torch.tensor(classes, dtype=torch.int64))]
    index = order[:MAX_IMAGES].sort().values
    return split.rows.gather(index), split.labels[index]


def _run_network(
    loaded: LoadedModel,
    pixels: Tensor,
    labels: Tensor,
    device: str,
    advance: Callable[[int], None],
) -> tuple[Tensor, dict[str, tuple[int, int]] | None]:
    """Return which images are correct, bool `[N]`, and dead and all channels by stage.

    The latter is None if the stages of the network do not return feature maps.
    """
    plan, names = place_model(loaded.model, device), stage_names(loaded.model)
    correct, low, high = [], dict[str, Tensor](), dict[str, Tensor]()
    normalize = loaded.preprocessing.normalize
    for images, targets in zip(pixels.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
        with record_outputs(loaded.model, names) as outputs:
            logits = batch_logits(loaded.model, images, normalize, plan)
        correct.append(logits.argmax(1).cpu() == targets)
        try:
            maps = as_maps(outputs, names)
        except UsageError:  # the stages of this network return something else
            maps = {}
        for name, values in maps.items():
            least, most = values.amin((0, 2, 3)), values.amax((0, 2, 3))
            low[name] = torch.minimum(low.get(name, least), least)
            high[name] = torch.maximum(high.get(name, most), most)
        advance(len(images))
    dead = {name: count_dead_channels(low[name], high[name]) for name in low}
    return torch.cat(correct), dead or None


def count_dead_channels(low: Tensor, high: Tensor) -> tuple[int, int]:
    """Return the number of dead channels and of all channels.

    A channel is dead if its values all lie within a millionth of the stage's largest absolute
    value. After a ReLU, that is a channel that is always 0.

    Args:
        low, high: smallest and largest value of each channel, `[C]`.
    """
    scale = float(torch.maximum(low.abs(), high.abs()).max())
    return int((high - low <= 1e-6 * scale).sum()), len(low)


def _image_stats(pixels: Tensor) -> np.ndarray:
    """Return mean and standard deviation of each channel of each image, `[N, 2 C]` in 0..1."""
    unit = pixels.flatten(2).double() / 255
    stats: np.ndarray = torch.cat([unit.mean(2), unit.std(2, correction=0)], 1).numpy()
    return stats


def _at_end(values: Floats) -> float:
    """Return the mean over the last epochs."""
    return float(np.mean(values[-LAST_EPOCHS:]))


def overfitting(evidence: RunEvidence) -> Finding | None:
    """Validation loss rose well above its minimum while training loss continued to fall."""
    loss, train = evidence.column("val_loss", 4), evidence.column("train_loss", 4)
    train_accuracy, val_accuracy, when, by_chance = _compared_accuracies(evidence)
    best = int(np.nanargmin(loss))
    at_end, lowest = _at_end(loss), float(loss[best])
    gap = train_accuracy - val_accuracy
    risen = (
        len(loss) - 1 - best >= 2
        and at_end >= 1.1 * lowest
        and at_end - lowest >= 0.02
        and _at_end(train) < train[best]
    )
    if not (risen or (gap >= 0.1 and not by_chance)):  # NaN is not a gap
        return None
    epoch = int(evidence.rows[best]["epoch"])
    what = f"{when}, training accuracy is {100 * gap:.1f} points above validation accuracy"
    if risen:
        what += (
            f"; validation loss has risen since epoch {epoch}, from {lowest:.3f} to {at_end:.3f}"
        )
    recipe = evidence.require_recipe()
    overrides, remedies = [], []
    if not recipe.augment:
        overrides.append("augment=auto")
        remedies.append("augment")
    known = {} if is_user_network(recipe.model.name) else model_options(recipe.model.name)
    if not recipe.model.options.get("dropout", "dropout" not in known):
        overrides.append("model.dropout=0.2")
        remedies.append("dropout")
    if recipe.optim.weight_decay < 5e-4:
        overrides.append("optim.weight_decay=5e-4")
        remedies.append("weight decay")
    return Finding(
        "overfitting",
        what,
        {
            "best_epoch": epoch,
            "val_loss_lowest": lowest,
            "val_loss_at_end": at_end,
            "train_accuracy": train_accuracy,
            "val_accuracy": val_accuracy,
            "gap": gap,
        },
        "validation loss at the end 10% (and 0.02) above its minimum at least 2 epochs before, or "
        "10 points between training and validation accuracy, beyond chance",
        f"{', '.join(remedies) or 'a smaller network'}; more training images help most",
        overrides or ["train.patience=5"],
    )


def _compared_accuracies(evidence: RunEvidence) -> tuple[float, float, str, bool]:
    """Return training and validation accuracy for the rule on overfitting.

    They are those of the final weights without augmentation, if they were measured: the running
    accuracy on augmented images is too low, which would hide overfitting.

    Returns:
        Both accuracies, how they were measured, and whether chance may explain their difference
        (the 95% interval includes 0; never of the running accuracies, whose n is unknown).
    """
    train, val = evidence.train_correct, evidence.val_correct
    if train is not None and val is not None:
        interval = metrics.newcombe_independent_interval(val.correct, val.n, train.correct, train.n)
        return train.share, val.share, "without augmentation", interval[0] <= 0
    train_accuracy = _at_end(evidence.column("train_accuracy"))
    return train_accuracy, _at_end(evidence.column("val_accuracy")), "at the end", False


def underfitting(evidence: RunEvidence) -> Finding | None:
    """Training accuracy is low, and validation accuracy is not much lower."""
    if len(evidence.rows) < 3 and (evidence.rows or not evidence.finished):
        raise InsufficientEvidence(
            f"{len(evidence.rows)} epochs are too few: at least 3 are needed"
        )
    if evidence.train_correct is not None:
        train_accuracy, how = evidence.train_correct.share, "in eval mode, without augmentation"
    else:
        train_accuracy, how = _at_end(evidence.column("train_accuracy", 3)), "during training"
    val_accuracy = math.nan
    if evidence.val_correct is not None:
        val_accuracy = evidence.val_correct.share
    elif evidence.rows and not math.isnan(evidence.rows[-1].get("val_accuracy", math.nan)):
        val_accuracy = _at_end(evidence.column("val_accuracy"))
    if train_accuracy >= 0.8 or train_accuracy - val_accuracy >= 0.1:
        return None
    # The kept weights may be those of an early epoch, chosen for its validation loss.
    with contextlib.suppress(InsufficientEvidence):
        if overfitting(evidence) is not None:
            return None
    recipe = evidence.require_recipe()
    epochs = len(evidence.rows) or 10
    overrides = [f"train.epochs={2 * epochs}"]
    numbers = {
        "train_accuracy": train_accuracy,
        "val_accuracy": None if math.isnan(val_accuracy) else val_accuracy,
    }
    what = f"training accuracy is only {train_accuracy:.1%} ({how})"
    remedy = "train longer, with a larger network or less regularization"
    if recipe.model.options.get("dropout"):
        overrides.append("model.dropout=0")
    if recipe.model.name == "cnn":
        widths = recipe.model.options.get("widths", [32, 64, 128])
        overrides.append(f"model.widths={[2 * width for width in widths]}".replace(" ", ""))
    if recipe.augment:
        remedy = "train longer, with a larger network, less augmentation or less regularization"
        overrides.append("augment=[]")
        augmented = _augmented_accuracy(evidence)
        if augmented is not None and augmented < val_accuracy:
            # Even the augmented images are not learned: the network has nothing to overfit.
            what += f", on augmented images {augmented:.1%}; validation accuracy {val_accuracy:.1%}"
            remedy = f"train without augmentation: {epochs} epochs are too few for it"
            numbers["train_accuracy_augmented"] = augmented
            overrides = ["augment=[]"]
    return Finding(
        "underfitting",
        what,
        numbers,
        "training accuracy below 80%, and validation accuracy less than 10 points below it",
        f"{remedy}; if that does not help, check the labels",
        overrides,
    )


def _augmented_accuracy(evidence: RunEvidence) -> float | None:
    """Return the accuracy on augmented training images at the end; None if it is unknown."""
    with contextlib.suppress(InsufficientEvidence):
        accuracy = _at_end(evidence.column("train_accuracy", LAST_EPOCHS))
        return None if math.isnan(accuracy) else accuracy
    return None


def rate_too_high(evidence: RunEvidence) -> Finding | None:
    """The loss became NaN, jumps up, ends above its minimum, or fluctuates above chance level."""
    chance = evidence.loss_of_guessing
    signs, numbers = [], dict[str, Any]()
    if evidence.diverged is not None and not evidence.finished:
        epoch, step = int(evidence.diverged["epoch"]), int(evidence.diverged["step"])
        signs.append(f"the loss became NaN or infinite in epoch {epoch}, step {step}")
        numbers["diverged"] = dict(evidence.diverged)
    if evidence.rows:
        loss = evidence.column("train_loss")
        numbers |= {"train_loss_first": float(loss[0]), "train_loss_at_end": _at_end(loss)}
        if not np.isfinite(loss).all():
            signs.append("the training loss is not finite")
            numbers = {key: numbers[key] for key in numbers if key == "diverged"}
        else:
            signs += _unstable_loss(loss, chance)
    elif evidence.diverged is None:
        evidence.column("train_loss")
    if not signs:
        return None
    recipe = evidence.require_recipe()
    return Finding(
        "learning rate too high",
        "; ".join(signs),
        {"lr": recipe.optim.lr, "loss_of_guessing": chance, **numbers},
        "NaN; a first epoch at 1.5 times the loss of guessing; rises of 10% (and 2% of the loss of "
        "guessing) in 10% of the epochs (at least 2); an end 20% (and as much) above the minimum; "
        "changes of 2% or more, but never below 98% of the loss of guessing",
        "a lower rate, warm-up, or gradient clipping",
        [f"optim.lr={float(recipe.optim.lr) / 10:.3g}", "optim.clip_norm=1"],
    )


def _unstable_loss(loss: Floats, chance: float) -> list[str]:
    """Return signs of a learning rate that is too high in finite training losses."""
    signs = []
    if loss[0] >= 1.5 * chance:
        signs.append(f"the loss of the first epoch is {loss[0]:.3g}, that of guessing {chance:.3g}")
    if len(loss) < 4:
        return signs
    floor = 0.02 * chance  # a loss near 0 can double by chance
    rises = np.diff(loss)
    jumps = int(((rises >= 0.1 * loss[:-1]) & (rises >= floor)).sum())
    if jumps >= max(2, 0.1 * len(loss)):
        signs.append(f"the training loss rose by 10% or more {jumps} times")
    end, least = loss[-LAST_EPOCHS:].min(), loss.min()
    if end >= 1.2 * least and end - least >= floor:
        signs.append(f"the training loss ends at {end:.3g}, above its minimum {least:.3g}")
    if least >= 0.98 * chance and _trend(loss) > -0.8 and _changes(loss).max() >= 0.02:
        signs.append(f"the training loss never fell below that of guessing ({chance:.3g})")
    return signs


def _trend(loss: Floats) -> float:
    """Return the correlation of the loss with the epoch; -1 is a steady fall."""
    if np.ptp(loss) == 0:
        return 0.0
    return float(np.corrcoef(loss, np.arange(len(loss)))[0, 1])


def _changes(loss: Floats) -> Floats:
    """Return the relative change of the loss in each epoch."""
    changes: Floats = np.abs(np.diff(loss)) / np.abs(loss[:-1])
    return changes


def rate_too_low(evidence: RunEvidence) -> Finding | None:
    """The training loss is near that of guessing and falls slowly or not at all."""
    loss = evidence.column("train_loss", 5)
    if not np.isfinite(loss).all():
        return None
    chance, largest = evidence.loss_of_guessing, float(_changes(loss).max())
    alive = all(dead < 0.25 * channels for dead, channels in (evidence.dead or {}).values())
    slow = _trend(loss) <= -0.8 and largest < 0.02
    still = alive and float(np.ptp(loss)) < 0.02 * chance
    if loss[-1] < 0.75 * chance or not (slow or still):
        return None
    recipe = evidence.require_recipe()
    course = "falls steadily" if slow else "hardly changes"
    return Finding(
        "learning rate too low",
        f"after {len(loss)} epochs the training loss is {loss[-1]:.3f}, that of guessing "
        f"{chance:.3f}; it {course}, by at most {largest:.2%} per epoch",
        {
            "lr": recipe.optim.lr,
            "train_loss_first": float(loss[0]),
            "train_loss_at_end": float(loss[-1]),
            "loss_of_guessing": chance,
            "largest_change": largest,
            "correlation_with_epochs": _trend(loss),
        },
        "training loss at 75% of that of guessing or more, and either falling (correlation -0.8) "
        "by less than 2% in every epoch, or changing by less than 2% of that of guessing in "
        "total, without dead layers",
        "a higher rate",
        [f"optim.lr={float(recipe.optim.lr) * 10:.3g}"],
    )


def stopped_early(evidence: RunEvidence) -> Finding | None:
    """Validation loss was still falling at the end, without a reduced learning rate."""
    loss, rates = evidence.column("val_loss", 4), evidence.column("lr")
    last = max(LAST_EPOCHS, len(loss) // 4)
    if not np.isfinite(loss[-last:]).all():
        raise InsufficientEvidence("the validation loss is not finite at the end")
    slope = float(np.polyfit(np.arange(last), loss[-last:], 1)[0] / np.mean(loss[-last:]))
    best = int(np.nanargmin(loss))
    if rates[-1] < 0.1 * rates.max() or slope > -0.01 or best < len(loss) - 2:
        return None
    return Finding(
        "stopped too early",
        f"validation loss was still falling by {-slope:.1%} per epoch when training ended after "
        f"{len(loss)} epochs",
        {
            "epochs": len(loss),
            "best_epoch": int(evidence.rows[best]["epoch"]),
            "change_per_epoch": slope,
            "lr_at_end": float(rates[-1]),
        },
        "validation loss falls by 1% per epoch over the last quarter "
        f"(at least {LAST_EPOCHS} epochs) and is lowest in the last two epochs, with the learning "
        "rate at 10% of its maximum or more",
        "train longer, with a learning rate that decays to zero at the end",
        [f"train.epochs={2 * len(loss)}", "optim.schedule=cosine"],
    )


def imbalance(evidence: RunEvidence) -> Finding | None:
    """Some classes have at most a third of the training images of the largest class.

    What it costs is measured on validation images. The options against it are only named if the
    rare classes are recognized worse than the others, beyond chance.
    """
    if evidence.counts is None:
        raise InsufficientEvidence(evidence.unmeasured)
    counts = {name: n for name, n in evidence.counts.items() if n}
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[most] < 3 * counts[least]:
        return None
    rare = sorted(_rare_classes(counts), key=counts.__getitem__)
    numbers: dict[str, Any] = {"counts": dict(evidence.counts)}
    what = f"{counts[most]:,} training images of {most}, {counts[least]:,} of {least}"
    remedy, overrides = _remedies_of_imbalance(evidence.require_recipe())
    by_class = evidence.val_by_class or {}
    rare_count = _pool([c for name, c in by_class.items() if name in rare])
    common_count = _pool([c for name, c in by_class.items() if name not in rare])
    if rare_count.n and common_count.n:
        numbers["recall"] = {name: c.share for name, c in by_class.items()}
        numbers["recall_interval95"] = {
            name: [round(end, 4) for end in c.interval95] for name, c in by_class.items()
        }
        recalls = [f"{name} {by_class[name].text}" for name in rare if name in by_class]
        what += (
            f"; recall on validation images: {', '.join(recalls[:5])}{' ...' * (len(recalls) > 5)};"
            f" rare classes together {rare_count.text}, the others {common_count.text}"
        )
        difference = metrics.two_proportions_p(*rare_count, *common_count)
        if rare_count.share >= common_count.share or difference >= 0.05:
            remedy = (
                "nothing yet: the rare classes are not recognized worse than the others, as far "
                f"as {rare_count.n:,} images can show; judge by macro F1 and balanced accuracy"
            )
            overrides = []
    else:
        what += "; what this costs cannot be told without validation images of the rare classes"
    return Finding(
        "class imbalance",
        what,
        numbers,
        "the largest class has 3 times the training images of the smallest, or more; remedies if "
        "the rare classes have a lower recall (Fisher's exact test, p < 0.05) or it is unknown",
        remedy,
        overrides,
    )


def _rare_classes(counts: Mapping[str, int]) -> list[str]:
    """Return the classes with at most a third of the training images of the largest class."""
    most = max(counts.values())
    return [name for name, n in counts.items() if n and 3 * n <= most]


def _remedies_of_imbalance(recipe: Recipe) -> tuple[str, list[str]]:
    """Return the options against unequal classes that the recipe does not use yet."""
    # In the order of their gain in balanced accuracy on two sets (benchmarks/unequal_classes.py).
    options = {
        "data.balance=full": recipe.data.balance == "none",
        "optim.class_weights=auto": recipe.optim.class_weights == "none",
    }
    unused = [text for text, is_unused in options.items() if is_unused]
    if not unused:
        return "more images of the rare classes", []
    monitor = [] if "macro" in recipe.train.monitor else ["train.monitor=val_macro_f1"]
    others = "".join(f", or {text} in its place" for text in unused[1:])
    remedy = (
        f"try {unused[0]}{others}; `convlens compare` shows the change of macro F1 and balanced "
        "accuracy with intervals (overall accuracy may fall); or more images of the rare classes"
    )
    return remedy, [unused[0], *(monitor if recipe.data.validates else [])]


def _pool(counts: Iterable[CorrectCount]) -> CorrectCount:
    known = list(counts)
    return CorrectCount(sum(c.correct for c in known), sum(c.n for c in known))


def dead_channels(evidence: RunEvidence) -> Finding | None:
    """Channels have the same value for every image and position."""
    if evidence.dead is None:
        raise InsufficientEvidence(evidence.unmeasured)
    shares = {stage: dead / channels for stage, (dead, channels) in evidence.dead.items()}
    bad = {stage: share for stage, share in shares.items() if share >= 0.25}
    if not bad:
        return None
    recipe = evidence.require_recipe()
    overrides = [f"optim.lr={float(recipe.optim.lr) / 3:.3g}", "optim.warmup=0.1"]
    if recipe.model.name == "cnn" and recipe.model.options.get("batch_norm") is False:
        overrides.append("model.batch_norm=true")
    listed = ", ".join(
        f"{stage} {evidence.dead[stage][0]} of {evidence.dead[stage][1]}" for stage in [*bad][:5]
    )
    return Finding(
        "dead layers",
        f"channels that are the same for every image: {listed}",
        {"dead_share": shares},
        "a quarter of a stage's channels, or more",
        "a lower rate, warm-up and normalization keep ReLUs alive; or the network is wider than "
        "its task needs",
        overrides,
    )


def validation_unlike_training(evidence: RunEvidence) -> Finding | None:
    """Validation images differ from training images in color, or are classified better."""
    if evidence.image_stats is None and (
        evidence.train_correct is None or evidence.val_correct is None
    ):
        no_split = "it has no validation split"
        raise InsufficientEvidence(
            evidence.unmeasured if evidence.train_correct is None else no_split
        )
    signs, numbers = [], dict[str, Any]()
    if evidence.image_stats is not None:
        for column, name in enumerate(evidence.stat_names):
            train, val = (stats[:, column] for stats in evidence.image_stats)
            spread = math.sqrt((train.var(ddof=1) + val.var(ddof=1)) / 2) or 1e-9
            effect = float(val.mean() - train.mean()) / spread
            standard_errors = abs(effect) / math.sqrt(1 / len(train) + 1 / len(val))
            numbers[name] = {"train": float(train.mean()), "val": float(val.mean()), "d": effect}
            if abs(effect) >= 0.5 and standard_errors >= 4:
                signs.append(
                    f"{name} {train.mean():.3f} in training, {val.mean():.3f} in validation"
                )
    if evidence.train_correct is not None and evidence.val_correct is not None:
        n_train, n_val = evidence.train_correct.n, evidence.val_correct.n
        train_accuracy, val_accuracy = evidence.train_correct.share, evidence.val_correct.share
        pooled = (evidence.train_correct.correct + evidence.val_correct.correct) / (n_train + n_val)
        error = math.sqrt(pooled * (1 - pooled) * (1 / n_train + 1 / n_val)) or 1e-9
        gain = val_accuracy - train_accuracy
        numbers |= {"train_accuracy": train_accuracy, "val_accuracy": val_accuracy}
        if gain >= 0.05 and gain / error >= 3:
            signs.append(
                f"validation accuracy is {val_accuracy:.1%}, training accuracy without "
                f"augmentation {train_accuracy:.1%}"
            )
    if not signs:
        return None
    return Finding(
        "validation unlike training",
        "; ".join(signs),
        numbers,
        "mean or deviation of a channel differs by half the deviation between images, or "
        "validation accuracy is 5 points above training accuracy in eval mode; both beyond chance "
        "(4 and 3 standard errors)",
        "check with `convlens audit` where the splits come from; folds are drawn from both",
        ["data.folds=5"],
    )


def loader_bound(evidence: RunEvidence) -> Finding | None:
    """Much of the training time was spent waiting for images."""
    waited, seconds = evidence.column("data_seconds"), evidence.column("seconds")
    known = ~np.isnan(waited)
    share = float(waited[known].sum() / seconds[known].sum())
    if share < 1 / 3:
        return None
    recipe = evidence.require_recipe()
    names = [name for name, _ in recipe.operations]
    size = recipe.data.image_size
    overrides = ["augment=[]"] * bool(names)
    if not names and isinstance(size, int) and size >= 64:
        overrides = [f"data.image_size={size // 2}"]
    return Finding(
        "loader-bound",
        f"{share:.0%} of the training time was spent waiting for images"
        + f" (augmented by {', '.join(names)})" * bool(names),
        {
            "share": share,
            "data_seconds": float(waited[known].sum()),
            "seconds": float(seconds[known].sum()),
        },
        "a third of the training time",
        "cheaper augmentation or smaller images; CONVLENS_MEMORY=8GB keeps a data set that fits "
        "in memory",
        overrides or ["train.batch_size=256"],
    )


RULES: dict[str, Callable[[RunEvidence], Finding | None]] = {
    "overfitting": overfitting,
    "underfitting": underfitting,
    "learning rate too high": rate_too_high,
    "learning rate too low": rate_too_low,
    "stopped too early": stopped_early,
    "class imbalance": imbalance,
    "dead layers": dead_channels,
    "validation unlike training": validation_unlike_training,
    "loader-bound": loader_bound,
}
