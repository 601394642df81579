"""What can be wrong with a training, each as a plain rule with stated thresholds.

A rule reads a `Case` and returns a `Finding`, or None where all is well; what it can't know
without more evidence is a `CannotTell`. `RULES` lists them in the order in which they are told;
those about the curves are in `courses.py`. The thresholds are rules of thumb, chosen so that the
recipes that come with convlens pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convlens.diagnosing.courses import (
    overfitting,
    rate_too_high,
    rate_too_low,
    stopped_early,
    underfitting,
)
from convlens.diagnosing.findings import CannotTell, Case, Finding, Shares


def imbalance(case: Case) -> Finding | None:
    """Some classes have a third of the training images of others, or less."""
    if case.counts is None:
        raise CannotTell(case.unmeasured)
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


def _pooled(shares: Sequence[Shares]) -> float | None:
    n = sum(share.n for share in shares)
    return sum(share.right for share in shares) / n if n else None


def dead_channels(case: Case) -> Finding | None:
    """Channels that give the same number for every image and place."""
    if case.dead is None:
        raise CannotTell(case.unmeasured)
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


def validation_unlike_training(case: Case) -> Finding | None:
    """Validation images look otherwise than training images, or are recognised better."""
    if case.looks is None and (case.trained is None or case.validated is None):
        no_split = "it has no validation split"
        raise CannotTell(case.unmeasured if case.trained is None else no_split)
    signs, evidence = [], dict[str, Any]()
    if case.looks is not None:
        for place, name in enumerate(case.features):
            train, val = (part[:, place] for part in case.looks)
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


def loader_bound(case: Case) -> Finding | None:
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
        {"share": share, "data_seconds": float(waited[known].sum()),
         "seconds": float(seconds[known].sum())},
        "a third of the training time",
        "cheaper augmentation or smaller images; CONVLENS_MEMORY=8GB keeps a set that fits in "
        "memory",
        overrides or ["train.batch_size=256"],
    )  # fmt: skip


RULES: dict[str, Callable[[Case], Finding | None]] = {
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
