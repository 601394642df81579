"""What a run's numbers come to, in a sentence."""

from __future__ import annotations

from typing import NamedTuple

from convlens import metrics
from convlens.reporting.contents import Contents

WORDS = {"test": "test", "val": "validation", "train": "training"}


class Calibration(NamedTuple):
    """`error` (ECE), the error that chance alone explains, and confidence minus accuracy."""

    error: float
    chance: float
    surplus: float

    @property
    def good(self) -> bool:
        return self.error <= self.chance

    @property
    def words(self) -> str:
        """E.g. `overconfident`."""
        if self.good:
            return "within chance"
        if abs(self.surplus) < self.error / 2:  # too sure here, not sure enough there
            return "badly calibrated"
        return "overconfident" if self.surplus > 0 else "underconfident"


def calibration(found: Contents) -> Calibration | None:
    """How confidence and accuracy agree; None without the answers to single images."""
    if found.answers is None or found.summary is None:
        return None
    chances = found.answers.chances
    surplus = float(chances.max(axis=1).mean()) - float(found.summary["accuracy"])
    return Calibration(found.summary["ece"], metrics.ece_by_chance(chances), surplus)


def verdict(found: Contents) -> str:
    """One honest sentence: accuracy with n and interval, gap to training, calibration."""
    if found.summary is None:
        if not found.finished:
            done = len(found.rows)
            epochs = f"{done} epoch{'s' * (done != 1)} of training are in its log"
            return f"Not judged yet: the training has not finished; {epochs}."
        return "Not judged: there are no images held out of training to judge it by."
    s = found.summary
    low, high = s["interval95"]
    parts = [
        f"{s['accuracy']:.1%} of {s['n']:,} {WORDS[found.split]} images are classified correctly "
        f"(95% interval {low:.1%} to {high:.1%})"
    ]
    floor = commonest(found)
    if floor is not None and low <= floor[1]:
        parts.append(f"not distinguishable from always saying {floor[0]!r} ({floor[1]:.1%})")
    trained = found.trained_accuracy()
    if trained is not None:
        parts.append(_gap(100 * (trained[0] - s["accuracy"]), trained[0], low, high))
    judged = calibration(found)
    if judged is None:
        parts.append(f"calibration error {s['ece']:.3f}" if s["ece"] is not None else "")
    elif judged.good:
        parts.append("its confidence agrees with its accuracy, as far as so many images can tell")
    else:
        parts.append(_unsure(judged))
    return "; ".join(part for part in parts if part) + "."


def commonest(found: Contents) -> tuple[str, float] | None:
    """The class that most of the judged images have, and their share."""
    table = (found.summary or {}).get("confusion")
    if not table:
        return None
    counts = [sum(row) for row in table]
    most = counts.index(max(counts))
    return found.classes[most], counts[most] / sum(counts)


def _gap(points: float, trained: float, low: float, high: float) -> str:
    if low <= trained <= high:
        return f"not distinguishable from the {trained:.1%} on training images"
    much = "overfitting" if points > 10 else "some overfitting"
    if points > 0:
        return f"{points:.1f} points below the {trained:.1%} on training images ({much})"
    return f"{-points:.1f} points above the {trained:.1%} on training images"


def _unsure(judged: Calibration) -> str:
    points = f"calibration error {100 * judged.error:.1f} points"
    if judged.words == "badly calibrated":
        return f"its probabilities are off ({points})"
    return f"it is {judged.words}, by {abs(100 * judged.surplus):.1f} points on average ({points})"
