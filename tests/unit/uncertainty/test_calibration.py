"""What a model file stores about single predictions."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from convlens import metrics
from convlens.errors import UsageError
from convlens.uncertainty.calibration import (
    ModelCalibration,
    OutlierDetector,
    ReservedOutputs,
    ValidationOutputs,
    fit_calibration,
    parse_share,
    reserved_half,
    validation_halves,
)
from convlens.uncertainty.temperature import fit_temperature


def outputs(n: int = 400, classes: int = 3, scale: float = 4.0) -> ValidationOutputs:
    """Overconfident logits, and features that are noisy centers of the classes."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(n, classes))
    labels = (random.random((n, 1)) < np.cumsum(metrics.softmax(logits), axis=1)).argmax(axis=1)
    features = np.eye(classes)[labels] + 0.1 * random.normal(size=(n, classes))
    reference = np.eye(classes)[np.arange(90) % classes]
    reference = reference + 0.1 * random.normal(size=(90, classes))
    return ValidationOutputs(
        (scale * logits).astype(np.float32),
        labels.astype(np.int64),
        features.astype(np.float32),
        reference.astype(np.float32),
    )


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=120), st.integers(0, 9))
def test_halves_are_stratified_and_a_function_of_labels_and_seed(
    labels: list[int], seed: int
) -> None:
    reserved = reserved_half(np.array(labels, np.int64), seed)
    assert reserved.tolist() == reserved_half(np.array(labels, np.int64), seed).tolist()
    groups = [reserved, *(reserved[np.array(labels) == label] for label in set(labels))]
    assert all(abs(int(group.sum()) - int((~group).sum())) <= 1 for group in groups)


def test_seeds_draw_other_halves() -> None:
    labels = np.zeros(100, np.int64)
    assert reserved_half(labels, 0).tolist() != reserved_half(labels, 1).tolist()


def test_reserved_images_are_used_for_nothing_but_promises() -> None:
    """Changing all of their outputs changes neither the temperature nor a threshold."""
    given_outputs = outputs()
    reserved = reserved_half(given_outputs.labels, 7)
    assert given_outputs.features is not None
    changed = replace(
        given_outputs,
        logits=np.where(reserved[:, None], 9 - given_outputs.logits, given_outputs.logits),
        features=np.where(reserved[:, None], -given_outputs.features, given_outputs.features),
    )
    first, second = (
        fit_calibration(each, seed=7, candidates=5, classes=3) for each in (given_outputs, changed)
    )
    assert first.temperature == second.temperature != 1
    assert first.num_fitting == 200
    assert first.detector is not None
    assert second.detector is not None
    for name in ("energy_threshold", "distance_threshold", "neighbors"):
        assert getattr(first.detector, name) == getattr(second.detector, name)
    assert first.reserved is not None
    assert second.reserved is not None
    assert len(first.reserved) == 200
    assert first.reserved.confidences.tolist() != second.reserved.confidences.tolist()


def test_fitted_numbers_are_those_of_their_half() -> None:
    given_outputs = outputs()
    fitted = fit_calibration(given_outputs, seed=0, candidates=5, classes=3)
    reserved = reserved_half(given_outputs.labels, 0)
    fitting = given_outputs.logits[~reserved], given_outputs.labels[~reserved]
    assert fitted.temperature == fit_temperature(*fitting)
    assert fitted.reserved is not None
    probs = metrics.softmax(given_outputs.logits[reserved] / np.float64(fitted.temperature))
    labels = given_outputs.labels[reserved]
    np.testing.assert_allclose(fitted.reserved.confidences, probs.max(axis=1))
    np.testing.assert_allclose(fitted.reserved.label_probs, probs[np.arange(200), labels])
    assert fitted.reserved.correct.tolist() == (probs.argmax(axis=1) == labels).tolist()
    assert fitted.detector is not None
    logits, temperature = given_outputs.logits[~reserved], fitted.temperature
    for features in (None, given_outputs.features):
        chosen = None if features is None else features[~reserved]
        scored = fitted.detector.scores(logits, temperature, chosen)
        assert scored is not None
        scores, threshold = scored
        assert int((scores <= threshold).sum()) == 191  # ceil(201 * 0.95)


def test_features_far_from_the_training_images_are_above_the_threshold() -> None:
    fitted = fit_calibration(outputs(), seed=0, candidates=1, classes=3)
    assert fitted.detector is not None
    scored = fitted.detector.scores(np.zeros((2, 3)), 1.0, np.array([[1.0, 0, 0], [-1, -1, -1]]))
    assert scored is not None
    assert (scored[0] > scored[1]).tolist() == [False, True]


def test_few_images_give_no_thresholds() -> None:
    few = outputs(20)
    fitted = fit_calibration(few, seed=0, candidates=1, classes=3)
    assert fitted.temperature == 1
    assert fitted.detector is not None
    assert fitted.detector.scores(few.logits, 1.0, few.features) is None


def test_metadata_round_trips_through_json() -> None:
    fitted = fit_calibration(outputs(), seed=0, candidates=5, classes=3)
    assert fitted.detector is not None
    text = json.dumps(fitted.to_metadata(), allow_nan=False)
    again = ModelCalibration.from_metadata(json.loads(text), fitted.detector.reference)
    assert again.temperature == fitted.temperature
    assert again.detector == fitted.detector
    assert isinstance(again.reserved, ReservedOutputs)
    assert fitted.reserved is not None
    for name in ("confidences", "label_probs", "correct"):
        before, after = getattr(fitted.reserved, name), getattr(again.reserved, name)
        assert (before.dtype, before.tolist()) == (after.dtype, after.tolist())
    nothing = ModelCalibration.from_metadata({})
    assert nothing == ModelCalibration()
    assert OutlierDetector(None).scores(np.zeros((1, 2)), 1.0, None) is None


@pytest.mark.parametrize("temperature", [0, -1, float("inf"), float("nan"), "x"])
def test_impossible_metadata_is_refused(temperature: object) -> None:
    with pytest.raises(ValueError, match=r"temperature|could not convert"):
        ModelCalibration.from_metadata({"temperature": temperature})


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=60), st.integers(0, 9))
def test_groups_are_in_one_half_and_the_reserved_half_has_one_image_of_each(
    images: list[tuple[int, int]], seed: int
) -> None:
    labels = np.array([label for label, _ in images], np.int64)
    groups = np.array([f"g{group}" for _, group in images])
    fitting, reserved = validation_halves(labels, groups.tolist(), seed)
    assert not set(groups[fitting]) & set(groups[reserved])
    assert set(groups[fitting]) | set(groups[reserved]) == set(groups)
    assert len(set(groups[reserved])) == int(reserved.sum())
    assert abs(len(set(groups[fitting])) - len(set(groups[reserved]))) <= 1
    again = validation_halves(labels, groups.tolist(), seed)
    assert [half.tolist() for half in again] == [fitting.tolist(), reserved.tolist()]


def test_promises_count_groups() -> None:
    """400 images of 40 groups give the evidence of 20 reserved groups, not of 200 images."""
    groups = [f"g{number % 40}" for number in range(400)]
    fitted = fit_calibration(outputs(), seed=0, candidates=1, classes=3, groups=groups)
    assert fitted.reserved is not None
    assert (len(fitted.reserved), fitted.num_fitting) == (20, 200)
    with pytest.raises(UsageError, match=r"at least 59 reserved validation groups; .* has 20"):
        fitted.answer_threshold(0.95, 0.95)
    with pytest.raises(UsageError, match="at least 99 reserved validation groups"):
        fitted.set_threshold(0.99)
    stored = json.loads(json.dumps(fitted.to_metadata()))
    again = ModelCalibration.from_metadata(stored)
    assert again.reserved is not None
    assert again.reserved.grouped
    alone = fit_calibration(outputs(), seed=0, candidates=1, classes=3)
    assert "grouped" not in alone.to_metadata()["reserved"]


@pytest.mark.parametrize("share", ["95%", "0.95", " 95 % ", 0.95, np.float64(0.95)])
def test_shares_are_numbers_or_text(share: object) -> None:
    assert parse_share("min_accuracy", share) == pytest.approx(0.95)


@pytest.mark.parametrize("share", ["", "%", "95", "nan", 95, 0, 1, True, None, b"95%", [0.9], {}])
def test_other_values_are_not_shares(share: object) -> None:
    with pytest.raises(UsageError, match="min_accuracy"):
        parse_share("min_accuracy", share)
