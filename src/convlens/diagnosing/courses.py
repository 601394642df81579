"""What the course of a training shows: rules about its curves, for `symptoms.RULES`."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np

from convlens.diagnosing.findings import LAST, CannotTell, Case, Finding, Floats, ending
from convlens.models import options_of


def overfitting(case: Case) -> Finding | None:
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
    if not recipe.model.options.get("dropout", "dropout" not in options_of(recipe.model.name)):
        overrides.append("model.dropout=0.2")
        words.append("dropout")
    if recipe.optim.weight_decay < 5e-4:
        overrides.append("optim.weight_decay=5e-4")
        words.append("weight decay")
    return Finding(
        "overfitting",
        what,
        {
            "best_epoch": epoch, "val_loss_lowest": lowest, "val_loss_at_end": at_end,
            "train_accuracy": ending(seen), "val_accuracy": ending(right), "gap": gap,
        },
        "validation loss at the end 10% (and 0.02) above its minimum at least 2 epochs before, or "
        "10 points between training and validation accuracy",
        f"{', '.join(words) or 'a smaller network'}; more training images help most",
        overrides or ["train.patience=5"],
    )  # fmt: skip


def underfitting(case: Case) -> Finding | None:
    """Not even the training images are learned, and validation is no worse."""
    if len(case.rows) < 3 and (case.rows or not case.finished):
        raise CannotTell(f"{len(case.rows)} epochs are too few: at least 3 are needed")
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
    with contextlib.suppress(CannotTell):
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


def rate_too_high(case: Case) -> Finding | None:
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
    end, least = loss[-LAST:].min(), loss.min()
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


def rate_too_low(case: Case) -> Finding | None:
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
        {"lr": recipe.optim.lr, "train_loss_first": float(loss[0]),
         "train_loss_at_end": float(loss[-1]), "loss_of_guessing": chance,
         "largest_change": largest, "correlation_with_epochs": _trend(loss)},
        "training loss at 75% of that of guessing or more, and either falling (correlation -0.8) "
        "by less than 2% in every epoch, or moving by less than 2% of that of guessing in all, "
        "with no dead layers",
        "a higher rate",
        [f"optim.lr={recipe.optim.lr * 10:.3g}"],
    )  # fmt: skip


def stopped_early(case: Case) -> Finding | None:
    """Validation loss was still falling, at a rate that had not been lowered, when it ended."""
    loss, rates = case.column("val_loss", 4), case.column("lr")
    last = max(LAST, len(loss) // 4)
    if not np.isfinite(loss[-last:]).all():
        raise CannotTell("the validation loss is not finite at the end")
    slope = float(np.polyfit(np.arange(last), loss[-last:], 1)[0] / np.mean(loss[-last:]))
    best = int(np.nanargmin(loss))
    if rates[-1] < 0.1 * rates.max() or slope > -0.01 or best < len(loss) - 2:
        return None
    return Finding(
        "stopped too early",
        f"validation loss was still falling by {-slope:.1%} an epoch when it ended after "
        f"{len(loss)} epochs",
        {"epochs": len(loss), "best_epoch": int(case.rows[best]["epoch"]),
         "change_per_epoch": slope, "lr_at_end": float(rates[-1])},
        f"validation loss falls by 1% an epoch over the last quarter (at least {LAST} epochs), is "
        "best in the last two, the rate at 10% of its highest or more",
        "train longer; a rate that goes to zero at the end gets the rest out of it",
        [f"train.epochs={2 * len(loss)}", "optim.schedule=cosine"],
    )  # fmt: skip
