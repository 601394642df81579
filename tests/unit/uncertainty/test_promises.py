"""Promises about predictions, measured on labeled images."""

from __future__ import annotations

import math

import numpy as np
import pytest

from convlens.errors import UsageError
from convlens.uncertainty.calibration import ModelCalibration, ReservedOutputs
from convlens.uncertainty.promises import Promises


def calibration(n: int = 100, wrong: int = 0, candidates: int = 1) -> ModelCalibration:
    confidences = np.linspace(0.5, 1, n)
    correct = np.arange(n) >= wrong
    label_probs = np.where(correct, confidences, 1 - confidences)
    return ModelCalibration(1.0, n, ReservedOutputs(confidences, label_probs, correct, candidates))


def test_promises_are_measured_by_hand() -> None:
    promises = Promises(0.9, 0.95, answer_from=0.7, coverage=0.8, set_from=0.3)
    probs = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.75, 0.25]])
    labels = np.array([0, 1, 1, 1])
    measured = promises.measure(np.log(probs), 1.0, labels)
    assert promises.unsure(probs).tolist() == [False, True, False, False]
    selective, sets = measured["selective"], measured["sets"]
    assert (selective["answered"], selective["correct"]) == (3, 2)
    assert selective["coverage"] == 0.75
    assert selective["accuracy"] == pytest.approx(2 / 3)
    assert sets["covered"] == 0.75  # the last set, of the first class only, does not
    assert sets["mean_size"] == 1.25
    assert sets["single"] == 0.75


def test_nothing_is_measured_that_was_not_requested() -> None:
    promises = Promises.of(ModelCalibration(), None, 0.95, None)
    assert promises.is_empty
    assert promises.measure(np.zeros((2, 2)), 1.0, np.zeros(2, np.int64)) == {
        "selective": None,
        "sets": None,
    }
    assert not promises.unsure(np.full((3, 2), 0.5)).any()


def test_a_promise_that_no_threshold_keeps_leaves_all_unsure() -> None:
    promises = Promises.of(calibration(wrong=100), 0.9, 0.95, None)
    assert promises.answer_from == math.inf
    measured = promises.measure(np.eye(2), 1.0, np.array([0, 1]))["selective"]
    assert (measured["answered"], measured["threshold"], measured["accuracy"]) == (0, None, None)


def test_promises_that_need_more_images_say_how_many() -> None:
    with pytest.raises(UsageError, match=r"at least 59 reserved .* this model has 58"):
        Promises.of(calibration(58), 0.95, 0.95, None)
    with pytest.raises(UsageError, match=r"at least 104 .* chose the epoch") as raised:
        Promises.of(calibration(103, candidates=10), 0.95, 0.95, None)
    assert "train.keep=last" in raised.value.fix
    with pytest.raises(UsageError, match=r"99% coverage need at least 99 .* this model has 98"):
        Promises.of(calibration(98), None, 0.95, 0.99)
    assert Promises.of(calibration(99), None, 0.95, 0.99).set_from == pytest.approx(0.5)
    assert Promises.of(calibration(59), 0.95, 0.95, None).answer_from == 0.5
    for arguments in ((0.9, 0.95, None), (None, 0.95, 0.9)):
        with pytest.raises(UsageError, match="without a validation split"):
            Promises.of(ModelCalibration(), *arguments)


@pytest.mark.parametrize("share", [0.0, 1.0, 95.0, math.nan])
def test_shares_outside_0_to_1_are_refused(share: float) -> None:
    for arguments in ((share, 0.95, None), (0.9, share, None), (None, 0.95, share)):
        with pytest.raises(UsageError, match="not between 0% and 100%"):
            Promises.of(calibration(), *arguments)
