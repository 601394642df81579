"""What a model file stores to say how far a single prediction can be trusted.

The validation split is divided into two halves, stratified by class and seeded:

- the *fitting half* gives the temperature and the thresholds for unknown images;
- the *reserved half* gives nothing but promises: its outputs are stored, from which the threshold
  of `--min-accuracy` and the sets of `--prediction-set` are computed. With groups (`data.group`) it
  has one image of each of its groups.

The whole split has also chosen the epoch. Promises of accuracy allow for that by a union bound over
the epochs (`candidates`); the coverage of prediction sets does not.
"""

from __future__ import annotations

import base64
import math
import numbers
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from convlens import metrics
from convlens.errors import UsageError, wrong_type
from convlens.uncertainty import conformal, outliers, selective
from convlens.uncertainty.selective import AnswerThreshold
from convlens.uncertainty.temperature import fit_temperature

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
HALF_SEED = 1  # separates the draw of the halves from that of the reference images


@dataclass(frozen=True)
class ReservedOutputs:
    """Outputs for the reserved half of the validation split, with the temperature applied.

    Attributes:
        confidences: the highest probability of each image, `[n]`.
        label_probs: the probability of its true class, `[n]`.
        correct: whether it is classified correctly, `[n]`.
        candidates: a promise divides its delta by this, since these images also chose the epoch.
        grouped: whether each image is of another group (`data.group`).
    """

    confidences: Floats
    label_probs: Floats
    correct: Bools
    candidates: int
    grouped: bool = False

    @classmethod
    def of(
        cls,
        logits: npt.ArrayLike,
        labels: npt.ArrayLike,
        temperature: float,
        candidates: int,
        *,
        grouped: bool = False,
    ) -> ReservedOutputs:
        """Compute them from logits `[n, K]` and labels `[n]`."""
        matrix, targets = np.asarray(logits), np.asarray(labels)
        confidences, label_probs = np.empty(len(targets)), np.empty(len(targets))
        for rows in metrics.row_chunks(matrix):
            probs = metrics.softmax(matrix[rows], temperature)
            confidences[rows] = probs.max(axis=1)
            label_probs[rows] = np.take_along_axis(probs, targets[rows, None], axis=1)[:, 0]
        correct = matrix.argmax(axis=1) == targets
        return cls(confidences, label_probs, correct, candidates, grouped)

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def unit(self) -> str:
        """What a promise counts."""
        return "reserved validation groups" if self.grouped else "reserved validation images"


@dataclass(frozen=True)
class OutlierDetector:
    """Thresholds of the scores for images unlike the training images.

    Attributes:
        energy_threshold, distance_threshold: scores above them are marked; None if the fitting
            half is too small.
        neighbors: k of `distance_threshold`.
        reference: features of training images, float16 `[M, D]`, of length 1; None if they are
            not stored, or the network has no penultimate layer.
    """

    energy_threshold: float | None
    distance_threshold: float | None = None
    neighbors: int = 1
    reference: npt.NDArray[np.float16] | None = None

    @cached_property
    def _unit_reference(self) -> npt.NDArray[np.float32] | None:
        # In half precision the lengths are not exactly 1 any more.
        return None if self.reference is None else outliers.unit_reference(self.reference)

    @property
    def uses_features(self) -> bool:
        return self.reference is not None and self.distance_threshold is not None

    @property
    def can_score(self) -> bool:
        """Whether there is a threshold at all."""
        return self.uses_features or self.energy_threshold is not None

    def scores(
        self, logits: npt.ArrayLike, temperature: float, features: npt.ArrayLike | None
    ) -> tuple[Floats, float] | None:
        """Return the score of each image and the threshold; None without a threshold.

        Args:
            logits: `[N, K]`.
            temperature: of the model; the energy is that of the logits divided by it.
            features: of the penultimate layer `[N, D]`; the energy is used without them.
        """
        threshold, reference = self.distance_threshold, self._unit_reference
        if features is not None and reference is not None and threshold is not None:
            return outliers.neighbor_distances(features, reference, self.neighbors), threshold
        if self.energy_threshold is None:
            return None
        return outliers.energy(logits, temperature), self.energy_threshold


@dataclass(frozen=True)
class ModelCalibration:
    """Everything a model file stores beside the weights; by default nothing.

    Attributes:
        temperature: the logits are divided by it before the softmax.
        num_fitting: images of the fitting half.
    """

    temperature: float = 1.0
    num_fitting: int = 0
    reserved: ReservedOutputs | None = None
    detector: OutlierDetector | None = None

    def answer_threshold(self, min_accuracy: float, confidence: float) -> AnswerThreshold | None:
        """Return the threshold above which the model answers with `min_accuracy`.

        Args:
            min_accuracy: of the answered images, between 0 and 1.
            confidence: the probability that the promise holds, over the draw of the reserved half.

        Returns:
            None if no threshold keeps the promise: every image is unsure.

        Raises:
            UsageError: there are fewer reserved images than the promise needs, or none.
        """
        reserved = self._require_reserved(f"a promise of {as_percent(min_accuracy)} accuracy")
        limits = {
            "max_risk": 1 - min_accuracy,
            "delta": 1 - confidence,
        }
        needed = selective.min_images_for_accuracy(**limits, candidates=reserved.candidates)
        if len(reserved) < needed:
            chose_epoch = reserved.candidates > 1
            chosen = ", because they also chose the epoch" if chose_epoch else ""
            raise UsageError(
                f"a promise of {as_percent(min_accuracy)} accuracy with {as_percent(confidence)} "
                f"confidence needs at least {needed:,} {reserved.unit}{chosen}; this model has "
                f"{len(reserved):,}",
                fix="promise less (--min-accuracy), hold out more (data.val_fraction)"
                + (", or train with train.keep=last, for which fewer are enough" * chose_epoch),
            )
        return selective.find_threshold(
            reserved.confidences, reserved.correct, **limits, candidates=reserved.candidates
        )

    def set_threshold(self, coverage: float) -> float:
        """Return the lowest probability of a class in a prediction set with this coverage.

        Raises:
            UsageError: there are fewer reserved images than this coverage needs, or none.
        """
        reserved = self._require_reserved("a prediction set")
        threshold = conformal.conformal_threshold(reserved.label_probs, coverage)
        if threshold is None:
            raise UsageError(
                f"prediction sets with {as_percent(coverage)} coverage need at least "
                f"{conformal.min_images_for_coverage(coverage):,} {reserved.unit}; this model has "
                f"{len(reserved):,}",
                fix="ask for less coverage (--prediction-set), or hold out more "
                "(data.val_fraction)",
            )
        return threshold

    def _require_reserved(self, purpose: str) -> ReservedOutputs:
        if self.reserved is None:
            raise UsageError(
                f"{purpose} needs held-out images, and this model file has none: it was trained "
                "without a validation split, with train.calibrate=false, or by an earlier version",
                fix="train again with data.val_fraction above 0",
            )
        return self.reserved

    def to_metadata(self) -> dict[str, Any]:
        """Return values for JSON. The reference features are stored as a tensor instead."""
        metadata: dict[str, Any] = {
            "temperature": self.temperature,
            "num_fitting": self.num_fitting,
        }
        if self.reserved is not None:
            metadata["reserved"] = {
                "confidences": _encode(self.reserved.confidences),
                "label_probs": _encode(self.reserved.label_probs),
                "correct": _encode(self.reserved.correct),
                "candidates": self.reserved.candidates,
                **({"grouped": True} if self.reserved.grouped else {}),
            }
        if self.detector is not None:
            metadata["outliers"] = {
                "energy_threshold": self.detector.energy_threshold,
                "distance_threshold": self.detector.distance_threshold,
                "neighbors": self.detector.neighbors,
            }
        return metadata

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], reference: npt.NDArray[np.float16] | None = None
    ) -> ModelCalibration:
        """Read values that `to_metadata` returned.

        Raises:
            KeyError, TypeError, ValueError: other values.
        """
        temperature = float(metadata.get("temperature", 1.0))
        if not 0 < temperature < np.inf:
            raise ValueError(f"temperature {temperature}")
        reserved = detector = None
        if (stored := metadata.get("reserved")) is not None:
            reserved = ReservedOutputs(
                _decode(stored["confidences"], np.float64),
                _decode(stored["label_probs"], np.float64),
                _decode(stored["correct"], np.bool_),
                int(stored["candidates"]),
                bool(stored.get("grouped", False)),
            )
            if not len(reserved.confidences) == len(reserved.label_probs) == len(reserved):
                raise ValueError("reserved outputs of different lengths")
        if (stored := metadata.get("outliers")) is not None:
            detector = OutlierDetector(
                _optional_float(stored["energy_threshold"]),
                _optional_float(stored["distance_threshold"]),
                int(stored["neighbors"]),
                reference,
            )
        return cls(temperature, int(metadata.get("num_fitting", 0)), reserved, detector)


@dataclass(frozen=True)
class ValidationOutputs:
    """Outputs of a network for its validation split, from which everything is fitted.

    Attributes:
        logits: `[N, K]`.
        labels: `[N]`.
        features: of the penultimate layer `[N, D]`; None if they are not used.
        reference: the same of training images `[M, D]`.
    """

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    features: npt.NDArray[np.float32] | None = field(default=None)
    reference: npt.NDArray[np.float32] | None = field(default=None)


def reserved_half(labels: npt.ArrayLike, seed: int) -> Bools:
    """Return which validation images are in the reserved half, `[N]`.

    A function of labels and seed. The halves differ by at most one image in total and in each
    class.
    """
    targets = np.asarray(labels)
    random = np.random.default_rng([seed, HALF_SEED])
    order = random.permutation(len(targets))
    by_class = order[np.argsort(targets[order], kind="stable")]
    reserved = np.zeros(len(targets), np.bool_)
    reserved[by_class[::2]] = True
    return reserved


def validation_halves(
    labels: npt.ArrayLike, groups: Sequence[str] | None, seed: int
) -> tuple[Bools, Bools]:
    """Return which validation images are in the fitting half and in the reserved one, `[N]` each.

    With groups, each group is in one half, and the reserved half has one image of each of its
    groups, drawn at random. Images of a group are alike: a promise that counted all of them would
    count the same evidence several times.
    """
    targets = np.asarray(labels)
    if groups is None:
        reserved = reserved_half(targets, seed)
        return ~reserved, reserved
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    order = np.random.default_rng([seed, HALF_SEED]).permutation(len(targets))
    _, first = np.unique(group_of[order], return_index=True)
    image_of = order[first]  # of each group
    is_reserved = reserved_half(targets[image_of], seed)
    reserved = np.zeros(len(targets), np.bool_)
    reserved[image_of[is_reserved]] = True
    return ~is_reserved[group_of], reserved


def fit_calibration(
    outputs: ValidationOutputs,
    *,
    seed: int,
    candidates: int,
    classes: int,
    groups: Sequence[str] | None = None,
) -> ModelCalibration:
    """Fit everything that a model file stores.

    Args:
        outputs: of the weights that are kept.
        seed: of the halves.
        candidates: as in `ReservedOutputs`.
        classes: number of classes.
        groups: the group of each image.
    """
    fitting, is_reserved = validation_halves(outputs.labels, groups, seed)
    logits, labels = outputs.logits[fitting], outputs.labels[fitting]
    temperature = fit_temperature(logits, labels) or 1.0
    energies = outliers.energy(logits, temperature)
    detector = OutlierDetector(outliers.outlier_threshold(energies))
    if outputs.features is not None and outputs.reference is not None:
        # Rounded first: the distances must be those of the stored vectors.
        reference = outliers.l2_normalize(outputs.reference).astype(np.float16)
        k = outliers.num_neighbors(len(reference), classes)
        unit = outliers.unit_reference(reference)
        distances = outliers.neighbor_distances(outputs.features[fitting], unit, k)
        threshold = outliers.outlier_threshold(distances)
        detector = OutlierDetector(detector.energy_threshold, threshold, k, reference)
    reserved = ReservedOutputs.of(
        outputs.logits[is_reserved],
        outputs.labels[is_reserved],
        temperature,
        candidates,
        grouped=groups is not None,
    )
    return ModelCalibration(temperature, int(fitting.sum()), reserved, detector)


def as_percent(share: float) -> str:
    """Return a share as text, e.g. `99.5%`."""
    return f"{100 * share:.4g}%"


def parse_share(name: str, value: object) -> float:
    """Return a share that is given as a number, such as 0.95, or as text, such as `95%`.

    Args:
        name: the option or argument, for the message.

    Raises:
        UsageError: it is neither, or not between 0 and 1.
    """
    share = math.nan
    if isinstance(value, str):
        text = value.strip()
        with suppress(ValueError):
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    elif isinstance(value, float | numbers.Real) and not isinstance(value, bool):
        share = float(value)
    else:
        raise wrong_type(name, value, "give a share such as 0.95 or '95%'")
    if not 0 < share < 1:
        raise UsageError(f"{name} {value}: not between 0% and 100%", fix="e.g. 95%, or 0.95")
    return share


def _optional_float(value: Any) -> float | None:
    return None if value is None else float(value)


def _encode(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _decode(text: str, dtype: Any) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
