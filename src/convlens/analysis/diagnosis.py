"""What is going on in a run: its curves, and a few cheap measurements on its own images.

The evidence is gathered here; what it means is for the rules in `symptoms.py`. The test split
stays sealed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convlens import run, serialization
from convlens.data.dataset import Split
from convlens.device import preserve_torch_settings, select_device
from convlens.engine.inference import batch_logits, place_model
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation import load_own_data
from convlens.interpret.features import as_maps, record_outputs, stage_names
from convlens.models import model_options
from convlens.recipe import Recipe
from convlens.run import LoadedModel, RunDir
from convlens.utils.console import progress_bar, quiet_mode

# ---- findings ----------------------------------------
# Evidence of a run and the findings from it, for `convlens diagnose`.

Floats = npt.NDArray[np.float64]

LAST_EPOCHS = 3  # epochs whose mean is "at the end": single ones are noisy


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what, the numbers, the threshold they crossed, what to do.

    `overrides` can be given to `convlens train` as they stand.
    """

    rule: str
    what: str
    evidence: Mapping[str, Any]
    threshold: str
    do: str
    overrides: Sequence[str]


class InsufficientEvidence(Exception):  # noqa: N818 - nothing is wrong
    """A rule lacks the evidence it needs; the text says which."""


@dataclass(frozen=True)
class ClassShares:
    """`right` of `n` images."""

    right: int
    n: int

    @property
    def value(self) -> float:
        return self.right / self.n


@dataclass(frozen=True)
class RunEvidence:
    """All that is known of a run. What is None or empty wasn't measured; `unmeasured` says why.

    Attributes:
        rows: of `metrics.csv`.
        diverged: epoch, step and rate at which the loss became NaN or infinite.
        counts: training images by class.
        recalls: validation images by class, and how many of them are right.
        trained, validated: some hundred training and validation images in eval mode, without
            augmentation.
        dead: by stage, channels that give one and the same number everywhere, and all channels.
        looks: of training and validation images, `[N, features]`: mean and deviation of each
            channel of each image, in 0..1, by the names in `features`.
    """

    recipe: Recipe | None = None
    classes: int = 0
    rows: Sequence[Mapping[str, float]] = ()
    finished: bool = True
    diverged: Mapping[str, float] | None = None
    counts: Mapping[str, int] | None = None
    recalls: Mapping[str, ClassShares] | None = None
    trained: ClassShares | None = None
    validated: ClassShares | None = None
    dead: Mapping[str, tuple[int, int]] | None = None
    looks: tuple[Floats, Floats] | None = None
    features: Sequence[str] = ()
    unmeasured: str = field(default="it was not measured")

    def column(self, name: str, least: int = 1) -> Floats:
        """One number an epoch.

        Raises:
            CannotTell: fewer than `least` epochs, or nothing but NaN.
        """
        if len(self.rows) < least:
            raise InsufficientEvidence(
                f"{len(self.rows)} epochs are too few: at least {least} are needed"
                if self.rows
                else "there is no metrics.csv with an epoch in it"
            )
        values = np.array([row.get(name, math.nan) for row in self.rows])
        if np.isnan(values).all():
            lacks = "it has no validation split" if name.startswith("val_") else ""
            raise InsufficientEvidence(lacks or f"its metrics.csv has no {name}")
        return values

    def need(self) -> Recipe:
        if self.recipe is None:
            raise InsufficientEvidence("its recipe isn't known")
        return self.recipe


def ending(values: Floats) -> float:
    """The mean of the last epochs."""
    return float(np.mean(values[-LAST_EPOCHS:]))


MAX_IMAGES = 512  # images of each split: enough for the thresholds, a second or two
BATCH_SIZE = 64


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` returns: findings, rules that found nothing, and those that can't tell.

    `untold` says why for each of the latter.
    """

    run: str
    status: str
    epochs: int
    findings: Sequence[Finding]
    healthy: Sequence[str]
    untold: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@preserve_torch_settings()
def diagnose(run_dir: RunDir, *, on: str | None = None, quiet: bool = False) -> Diagnosis:
    """Puts every rule of `symptoms.RULES` to a run, finished or not.

    A run without weights is judged by its curves, a bare model file by its images, an empty run
    not at all; images that have changed or moved leave out what needs them.

    Raises:
        UsageError: no such device; ModelFileError: an unreadable `run.json`.
    """
    where = select_device(on)
    with quiet_mode(quiet):
        case = _collect_evidence(run_dir, where)
    findings, healthy, untold = [], [], {}
    for name, rule in RULES.items():
        try:
            found = rule(case)
        except InsufficientEvidence as reason:
            untold[name] = str(reason)
            continue
        if found is None:
            healthy.append(name)
        else:
            findings.append(found)
    return Diagnosis(
        run_dir.name, _status(run_dir, case), len(case.rows), findings, healthy, untold
    )


def _status(run_dir: RunDir, case: RunEvidence) -> str:
    if not run_dir.metadata():
        return "a model file without a past"
    if run_dir.is_finished:
        return "finished"
    if case.diverged is not None:
        return "stopped by a loss that was not finite"
    return "not finished" if case.rows else "no epoch is finished yet"


def _collect_evidence(run_dir: RunDir, where: str) -> RunEvidence:
    facts = run_dir.metadata()
    evidence: dict[str, Any] = {
        "rows": run_dir.metrics(),
        "finished": run_dir.is_finished or not facts,
        "diverged": facts.get("diverged"),
        "classes": len(facts.get("data", {}).get("classes", [])),
    }
    try:
        evidence["recipe"] = _recipe(run_dir)
        evidence |= _measured(run_dir, where)
    except ConvlensError as error:
        evidence["unmeasured"] = error.what
    return RunEvidence(**evidence)


def _recipe(run_dir: RunDir) -> Recipe:
    if (run_dir.path / "recipe.yaml").is_file():
        return run_dir.recipe()
    return serialization.recipe_from_metadata(run.load_model(run_dir.model_path).model_metadata)


def _measured(run_dir: RunDir, where: str) -> dict[str, Any]:
    """What the network makes of some training and validation images, and how these look."""
    loaded = run.load_model(run_dir.model_path)
    data = load_own_data(loaded, where)
    counts = np.bincount(data.train.labels.numpy(), minlength=len(data.classes))
    found: dict[str, Any] = {
        "classes": len(data.classes),
        "counts": dict(zip(data.classes, counts.tolist(), strict=True)),
    }
    parts = {"trained": data.train, "validated": data.val}
    chosen = {name: _some(part) for name, part in parts.items() if len(part)}
    means, reached = {}, {}
    with progress_bar(
        "looking at images", sum(len(labels) for _, labels in chosen.values())
    ) as bar:
        for name, (pixels, labels) in chosen.items():
            right, reached[name] = _cached_predictions(loaded, pixels, labels, where, bar.advance)
            found[name] = ClassShares(int(right.sum()), len(labels))
            means[name] = _features(pixels)
            if name == "validated":
                found["recalls"] = {
                    each: ClassShares(int(right[labels == i].sum()), int((labels == i).sum()))
                    for i, each in enumerate(data.classes)
                }
    found["dead"] = reached.get("validated", reached["trained"])
    if "validated" in means:
        found["looks"] = (means["trained"], means["validated"])
    names = ("grey",) if data.channels == 1 else ("red", "green", "blue")
    found["features"] = [f"{what} {name}" for what in ("mean", "deviation") for name in names]
    return found


def _some(part: Split) -> tuple[Tensor, Tensor]:
    """Images and labels drawn from a split, always the same."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    index = order[:MAX_IMAGES].sort().values
    return part.rows.gather(index), part.labels[index]


def _cached_predictions(
    loaded: LoadedModel, pixels: Tensor, labels: Tensor, where: str, advance: Any
) -> tuple[Tensor, dict[str, tuple[int, int]] | None]:
    """Which images are right, and by stage the dead channels and all; None of no maps."""
    plan, names = place_model(loaded.model, where), stage_names(loaded.model)
    right, low, high = [], dict[str, Tensor](), dict[str, Tensor]()
    normalize = loaded.preprocessing.normalize
    for images, targets in zip(pixels.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
        with record_outputs(loaded.model, names) as outputs:
            logits = batch_logits(loaded.model, images, normalize, plan)
        right.append(logits.argmax(1).cpu() == targets)
        try:
            maps = as_maps(outputs, names)
        except UsageError:  # a network whose stages give something else
            maps = {}
        for name, values in maps.items():
            least, most = values.amin((0, 2, 3)), values.amax((0, 2, 3))
            low[name] = torch.minimum(low.get(name, least), least)
            high[name] = torch.maximum(high.get(name, most), most)
        advance(len(images))
    dead = {name: dead_channel_share(low[name], high[name]) for name in low}
    return torch.cat(right), dead or None


def dead_channel_share(low: Tensor, high: Tensor) -> tuple[int, int]:
    """How many channels are dead, of how many, by their least and greatest values `[C]`.

    Dead is a channel whose values all lie within a millionth of the stage's greatest: behind a
    ReLU it is one that is always 0.
    """
    scale = float(torch.maximum(low.abs(), high.abs()).max())
    return int((high - low <= 1e-6 * scale).sum()), len(low)


def _features(pixels: Tensor) -> np.ndarray:
    """Mean and deviation of each channel of each image, `[N, 2 C]` in 0..1."""
    unit = pixels.flatten(2).double() / 255
    found: np.ndarray = torch.cat([unit.mean(2), unit.std(2, correction=0)], 1).numpy()
    return found


# ---- courses ----------------------------------------
# What the course of a training shows: rules about its curves, for `symptoms.RULES`.


def overfitting(case: RunEvidence) -> Finding | None:
    """Validation loss has risen well above its minimum while training loss went on falling."""
    loss, train = case.column("val_loss", 4), case.column("train_loss", 4)
    right, seen = case.column("val_accuracy"), case.column("train_accuracy")
    best = int(np.nanargmin(loss))
    at_end, lowest = ending(loss), float(loss[best])
    gap = ending(seen) - ending(right)
    risen = (
        len(loss) - 1 - best >= 2
        and at_end >= 1.1 * lowest
        and at_end - lowest >= 0.02
        and ending(train) < train[best]
    )
    if not (risen or gap >= 0.1):  # a NaN is no gap
        return None
    epoch = int(case.rows[best]["epoch"])
    since = f" since epoch {epoch + 1}" if risen else ""
    what = f"it learns its training images by heart{since}: {100 * gap:.1f} points more accurate "
    what += "on them than on validation images at the end"
    if risen:
        what += f"; validation loss rose from {lowest:.3f} (epoch {epoch}) to {at_end:.3f}"
    recipe = case.need()
    overrides, words = [], []
    if not recipe.augment:
        overrides.append("augment=auto")
        words.append("augment")
    if not recipe.model.options.get("dropout", "dropout" not in model_options(recipe.model.name)):
        overrides.append("model.dropout=0.2")
        words.append("dropout")
    if recipe.optim.weight_decay < 5e-4:
        overrides.append("optim.weight_decay=5e-4")
        words.append("weight decay")
    return Finding(
        "overfitting",
        what,
        {
            "best_epoch": epoch,
            "val_loss_lowest": lowest,
            "val_loss_at_end": at_end,
            "train_accuracy": ending(seen),
            "val_accuracy": ending(right),
            "gap": gap,
        },
        "validation loss at the end 10% (and 0.02) above its minimum at least 2 epochs before, or "
        "10 points between training and validation accuracy",
        f"{', '.join(words) or 'a smaller network'}; more training images help most",
        overrides or ["train.patience=5"],
    )


def underfitting(case: RunEvidence) -> Finding | None:
    """Not even the training images are learned, and validation is no worse."""
    if len(case.rows) < 3 and (case.rows or not case.finished):
        raise InsufficientEvidence(f"{len(case.rows)} epochs are too few: at least 3 are needed")
    if case.trained is not None:
        seen, how = case.trained.value, "in eval mode, without augmentation"
    else:
        seen, how = ending(case.column("train_accuracy", 3)), "as seen while training"
    right = math.nan
    if case.validated is not None:
        right = case.validated.value
    elif case.rows and not math.isnan(case.rows[-1].get("val_accuracy", math.nan)):
        right = ending(case.column("val_accuracy"))
    if seen >= 0.8 or seen - right >= 0.1:
        return None
    # Kept weights may be of an early epoch, chosen for its validation loss before it overfitted.
    with contextlib.suppress(InsufficientEvidence):
        if overfitting(case) is not None:
            return None
    recipe = case.need()
    epochs = len(case.rows) or 10
    overrides = [f"train.epochs={2 * epochs}"]
    if recipe.model.options.get("dropout"):
        overrides.append("model.dropout=0")
    if recipe.model.name == "cnn":
        widths = recipe.model.options.get("widths", [32, 64, 128])
        overrides.append(f"model.widths={[2 * width for width in widths]}".replace(" ", ""))
    return Finding(
        "underfitting",
        f"it knows only {seen:.1%} of the images that it learned from ({how})",
        {"train_accuracy": seen, "val_accuracy": None if math.isnan(right) else right},
        "less than 80% of training images right, and validation less than 10 points below",
        "train longer, with a larger network or less regularisation; "
        "if that changes nothing, look at the labels",
        overrides,
    )


def rate_too_high(case: RunEvidence) -> Finding | None:
    """The loss became NaN, jumps up, ends above its minimum, or tosses about above chance."""
    chance = math.log(max(case.classes, 2))
    signs, evidence = [], dict[str, Any]()
    if case.diverged is not None and not case.finished:
        epoch, step = int(case.diverged["epoch"]), int(case.diverged["step"])
        signs.append(f"the loss became NaN or infinite in epoch {epoch}, step {step}")
        evidence["diverged"] = dict(case.diverged)
    if case.rows:
        loss = case.column("train_loss")
        evidence |= {"train_loss_first": float(loss[0]), "train_loss_at_end": ending(loss)}
        if not np.isfinite(loss).all():
            signs.append("the training loss is not finite")
            evidence = {key: evidence[key] for key in evidence if key == "diverged"}
        else:
            signs += _unrest(loss, chance)
    elif case.diverged is None:
        case.column("train_loss")
    if not signs:
        return None
    recipe = case.need()
    return Finding(
        "learning rate too high",
        "; ".join(signs),
        {"lr": recipe.optim.lr, "loss_of_guessing": chance, **evidence},
        "NaN; a first epoch at 1.5 times the loss of guessing; rises of 10% (and 2% of the loss of "
        "guessing) in 10% of the epochs (at least 2); an end 20% (and as much) above the minimum; "
        "changes of 2% or more, but never below 98% of the loss of guessing",
        "a lower rate, warm-up, or a bound on the gradient",
        [f"optim.lr={recipe.optim.lr / 10:.3g}", "optim.clip_norm=1"],
    )


def _unrest(loss: Floats, chance: float) -> list[str]:
    """Signs of a rate that is too high in finite training losses."""
    signs = []
    if loss[0] >= 1.5 * chance:
        signs.append(f"the first epoch's loss is {loss[0]:.3g}, where guessing has {chance:.3g}")
    if len(loss) < 4:
        return signs
    floor = 0.02 * chance  # a loss near 0 doubles without a reason
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
    """The correlation of the loss with the epoch: -1 is a steady fall."""
    if np.ptp(loss) == 0:
        return 0.0
    return float(np.corrcoef(loss, np.arange(len(loss)))[0, 1])


def _changes(loss: Floats) -> Floats:
    """By which share the loss changed in each epoch."""
    changes: Floats = np.abs(np.diff(loss)) / np.abs(loss[:-1])
    return changes


def rate_too_low(case: RunEvidence) -> Finding | None:
    """The training loss is near that of guessing, and falls steadily but slowly, or not at all."""
    loss = case.column("train_loss", 5)
    if not np.isfinite(loss).all():
        return None
    chance, largest = math.log(max(case.classes, 2)), float(_changes(loss).max())
    alive = all(dead < 0.25 * channels for dead, channels in (case.dead or {}).values())
    slow = _trend(loss) <= -0.8 and largest < 0.02
    still = alive and float(np.ptp(loss)) < 0.02 * chance
    if loss[-1] < 0.75 * chance or not (slow or still):
        return None
    recipe = case.need()
    words = "falls steadily" if slow else "hardly moves"
    return Finding(
        "learning rate too low",
        f"after {len(loss)} epochs the training loss is {loss[-1]:.3f}, where guessing has "
        f"{chance:.3f}; it {words}, by {largest:.2%} an epoch at most",
        {
            "lr": recipe.optim.lr,
            "train_loss_first": float(loss[0]),
            "train_loss_at_end": float(loss[-1]),
            "loss_of_guessing": chance,
            "largest_change": largest,
            "correlation_with_epochs": _trend(loss),
        },
        "training loss at 75% of that of guessing or more, and either falling (correlation -0.8) "
        "by less than 2% in every epoch, or moving by less than 2% of that of guessing in all, "
        "with no dead layers",
        "a higher rate",
        [f"optim.lr={recipe.optim.lr * 10:.3g}"],
    )


def stopped_early(case: RunEvidence) -> Finding | None:
    """Validation loss was still falling, at a rate that had not been lowered, when it ended."""
    loss, rates = case.column("val_loss", 4), case.column("lr")
    last = max(LAST_EPOCHS, len(loss) // 4)
    if not np.isfinite(loss[-last:]).all():
        raise InsufficientEvidence("the validation loss is not finite at the end")
    slope = float(np.polyfit(np.arange(last), loss[-last:], 1)[0] / np.mean(loss[-last:]))
    best = int(np.nanargmin(loss))
    if rates[-1] < 0.1 * rates.max() or slope > -0.01 or best < len(loss) - 2:
        return None
    return Finding(
        "stopped too early",
        f"validation loss was still falling by {-slope:.1%} an epoch when it ended after "
        f"{len(loss)} epochs",
        {
            "epochs": len(loss),
            "best_epoch": int(case.rows[best]["epoch"]),
            "change_per_epoch": slope,
            "lr_at_end": float(rates[-1]),
        },
        f"validation loss falls by 1% an epoch over the last quarter (at least {LAST_EPOCHS} epochs), is "
        "best in the last two, the rate at 10% of its highest or more",
        "train longer; a rate that goes to zero at the end gets the rest out of it",
        [f"train.epochs={2 * len(loss)}", "optim.schedule=cosine"],
    )


# ---- symptoms ----------------------------------------
# What can be wrong with a training, each as a plain rule with stated thresholds.
#
# A rule reads a `Case` and returns a `Finding`, or None where all is well; what it can't know
# without more evidence is a `CannotTell`. `RULES` lists them in the order in which they are told;
# those about the curves are in `courses.py`. The thresholds are rules of thumb, chosen so that the
# recipes that come with convlens pass.


def imbalance(case: RunEvidence) -> Finding | None:
    """Some classes have a third of the training images of others, or less."""
    if case.counts is None:
        raise InsufficientEvidence(case.unmeasured)
    counts = {name: n for name, n in case.counts.items() if n}
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[most] < 3 * counts[least]:
        return None
    rare = [name for name, n in counts.items() if 3 * n <= counts[most]]
    evidence: dict[str, Any] = {"counts": dict(case.counts)}
    what = f"{counts[most]:,} training images of {most}, {counts[least]:,} of {least}"
    if case.recalls is not None:
        few = _pooled([case.recalls[name] for name in rare])
        many = _pooled([s for name, s in case.recalls.items() if name not in rare])
        evidence["val_accuracy"] = {n: s.value for n, s in case.recalls.items() if s.n}
        if few is not None and many is not None:
            what += f"; {few:.1%} of the rare classes' validation images are right, {many:.1%} "
            what += "of the others'"
    return Finding(
        "class imbalance",
        what,
        evidence,
        "the largest class has 3 times the training images of the smallest, or more",
        f"more images of {', '.join(rare[:5])}; or as many of each class, and read the accuracy "
        "class by class",
        [f"data.per_class={counts[least]}"],
    )


def _pooled(shares: Sequence[ClassShares]) -> float | None:
    n = sum(share.n for share in shares)
    return sum(share.right for share in shares) / n if n else None


def dead_channels(case: RunEvidence) -> Finding | None:
    """Channels that give the same number for every image and place."""
    if case.dead is None:
        raise InsufficientEvidence(case.unmeasured)
    shares = {stage: dead / channels for stage, (dead, channels) in case.dead.items()}
    bad = {stage: share for stage, share in shares.items() if share >= 0.25}
    if not bad:
        return None
    recipe = case.need()
    overrides = [f"optim.lr={recipe.optim.lr / 3:.3g}", "optim.warmup=0.1"]
    if recipe.model.name == "cnn" and recipe.model.options.get("batch_norm") is False:
        overrides.append("model.batch_norm=true")
    listed = ", ".join(
        f"{stage} {case.dead[stage][0]} of {case.dead[stage][1]}" for stage in [*bad][:5]
    )
    return Finding(
        "dead layers",
        f"channels that are the same for every image: {listed}",
        {"dead_share": shares},
        "a quarter of a stage's channels, or more",
        "a lower rate, warm-up and normalisation keep ReLUs alive; or the network is wider than "
        "its task needs",
        overrides,
    )


def validation_unlike_training(case: RunEvidence) -> Finding | None:
    """Validation images look otherwise than training images, or are recognised better."""
    if case.looks is None and (case.trained is None or case.validated is None):
        no_split = "it has no validation split"
        raise InsufficientEvidence(case.unmeasured if case.trained is None else no_split)
    signs, evidence = [], dict[str, Any]()
    if case.looks is not None:
        for run_dir, name in enumerate(case.features):
            train, val = (part[:, run_dir] for part in case.looks)
            spread = math.sqrt((train.var(ddof=1) + val.var(ddof=1)) / 2) or 1e-9
            size = float(val.mean() - train.mean()) / spread
            surely = abs(size) / math.sqrt(1 / len(train) + 1 / len(val))
            evidence[name] = {"train": float(train.mean()), "val": float(val.mean()), "d": size}
            if abs(size) >= 0.5 and surely >= 4:
                signs.append(
                    f"{name} {train.mean():.3f} in training, {val.mean():.3f} in validation"
                )
    if case.trained is not None and case.validated is not None:
        train_, val_ = case.trained, case.validated
        pooled = (train_.right + val_.right) / (train_.n + val_.n)
        error = math.sqrt(pooled * (1 - pooled) * (1 / train_.n + 1 / val_.n)) or 1e-9
        more = val_.value - train_.value
        evidence |= {"train_accuracy": train_.value, "val_accuracy": val_.value}
        if more >= 0.05 and more / error >= 3:
            signs.append(
                f"{val_.value:.1%} of validation images are right and {train_.value:.1%} of those "
                "that it learned from, without augmentation"
            )
    if not signs:
        return None
    return Finding(
        "validation unlike training",
        "; ".join(signs),
        evidence,
        "mean or deviation of a channel differs by half the deviation between images, or "
        "validation is 5 points better than training images in eval mode; both beyond chance (4 "
        "and 3 standard errors)",
        "see with `convlens audit` where the splits come from; folds are drawn from both together",
        ["data.folds=5"],
    )


def loader_bound(case: RunEvidence) -> Finding | None:
    """A large part of the training time went by waiting for images."""
    waited, seconds = case.column("data_seconds"), case.column("seconds")
    known = ~np.isnan(waited)
    share = float(waited[known].sum() / seconds[known].sum())
    if share < 1 / 3:
        return None
    recipe = case.need()
    names = [name for name, _ in recipe.operations]
    size = recipe.data.image_size
    overrides = ["augment=[]"] * bool(names)
    if not names and isinstance(size, int) and size >= 64:
        overrides = [f"data.image_size={size // 2}"]
    return Finding(
        "loader-bound",
        f"{share:.0%} of the training time went by waiting for images"
        + f" (augmented by {', '.join(names)})" * bool(names),
        {
            "share": share,
            "data_seconds": float(waited[known].sum()),
            "seconds": float(seconds[known].sum()),
        },
        "a third of the training time",
        "cheaper augmentation or smaller images; CONVLENS_MEMORY=8GB keeps a set that fits in "
        "memory",
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
