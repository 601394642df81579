"""Promises about predictions that a user asks for: accuracy by abstaining, coverage by sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from convlens import metrics
from convlens.uncertainty.calibration import ModelCalibration, parse_share
from convlens.uncertainty.conformal import prediction_sets

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
ShareLike = float | str  # 0.95 or "95%"


@dataclass(frozen=True)
class Promises:
    """Thresholds that keep the requested promises; None for what is not requested.

    Attributes:
        min_accuracy, confidence: the promise about the answered images.
        answer_from: lowest confidence that is answered; infinite if every image is unsure.
        coverage: the promise about prediction sets.
        set_from: lowest probability of a class in a set.
    """

    min_accuracy: float | None = None
    confidence: float = 0.95
    answer_from: float = 0.0
    coverage: float | None = None
    set_from: float = 0.0

    @classmethod
    def of(
        cls,
        calibration: ModelCalibration,
        min_accuracy: ShareLike | None,
        confidence: ShareLike,
        prediction_set: ShareLike | None,
    ) -> Promises:
        """Find the thresholds of a model.

        Raises:
            UsageError: the model has too few held-out images, or a value is not between 0 and 1.
        """
        share = parse_share("confidence", confidence)
        accuracy = coverage = None
        answer_from = set_from = 0.0
        if min_accuracy is not None:
            accuracy = parse_share("min_accuracy", min_accuracy)
            found = calibration.answer_threshold(accuracy, share)
            answer_from = np.inf if found is None else found.threshold
        if prediction_set is not None:
            coverage = parse_share("prediction_set", prediction_set)
            set_from = calibration.set_threshold(coverage)
        return cls(accuracy, share, answer_from, coverage, set_from)

    def unsure(self, probs: Floats) -> Bools:
        """Return which images are not answered, `[N]`."""
        return np.asarray(probs.max(axis=1) < self.answer_from)

    def sets(self, probs: Floats) -> Bools:
        """Return which classes are in the set of each image, `[N, K]`."""
        return prediction_sets(probs, self.set_from)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is requested."""
        return self.min_accuracy is None and self.coverage is None

    def measure(
        self, logits: npt.ArrayLike, temperature: float, labels: npt.NDArray[np.int64]
    ) -> dict[str, Any]:
        """Return `selective` and `sets` of an `Evaluation` for labeled images."""
        measured: dict[str, Any] = {"selective": None, "sets": None}
        if self.is_empty:
            return measured
        probs = metrics.softmax(logits, temperature)
        if self.min_accuracy is not None:
            answers = ~self.unsure(probs)
            n, answered = len(labels), int(answers.sum())
            correct = int((probs.argmax(axis=1) == labels)[answers].sum())
            measured["selective"] = {
                "min_accuracy": self.min_accuracy,
                "confidence": self.confidence,
                "threshold": self.answer_from if np.isfinite(self.answer_from) else None,
                "answered": answered,
                "coverage": answered / n,
                "correct": correct,
                "accuracy": correct / answered if answered else None,
                "interval95": list(metrics.wilson_interval(correct, answered)),
            }
        if self.coverage is not None:
            sets = self.sets(probs)
            covered = int(sets[np.arange(len(labels)), labels].sum())
            sizes = sets.sum(axis=1)
            measured["sets"] = {
                "coverage": self.coverage,
                "threshold": self.set_from,
                "covered": covered / len(labels),
                "interval95": list(metrics.wilson_interval(covered, len(labels))),
                "mean_size": float(sizes.mean()),
                "single": float((sizes == 1).mean()),
            }
        return measured
