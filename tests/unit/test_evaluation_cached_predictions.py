"""What a model said to each image is kept with its run, and only ever given back for just that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import convlens
from convlens import evaluation, metrics
from convlens.engine import inference
from convlens.errors import DataError
from convlens.evaluation import CachedPredictions
from convlens.interpret.inputs import open_inspected_model
from convlens.run import RunDir
from helpers.support import TINY, Memory, Split

SAID = CachedPredictions(np.array([[1.0, 2.0], [3.0, 0.0]], np.float32), np.array([1, 1]), "abc")


@pytest.fixture
def place() -> RunDir:
    folder = RunDir("models/x")  # type: ignore[arg-type]
    evaluation.save_predictions(folder, "test", "data1", "model1", SAID)
    return folder


def test_answers_come_back_as_they_were(place: RunDir) -> None:
    found = evaluation.load_predictions(place, "test", "data1", "model1")
    assert found is not None
    assert np.array_equal(found.logits, SAID.logits)
    assert np.array_equal(found.labels, SAID.labels)
    assert found.images == "abc"
    assert found.probs[1, 0] == pytest.approx(1 / (1 + np.exp(-3.0)))


def test_answers_of_another_model_or_to_other_data_are_not_these(place: RunDir) -> None:
    assert evaluation.load_predictions(place, "test", "data1", "model2") is None
    assert evaluation.load_predictions(place, "test", "data2", "model1") is None
    assert evaluation.load_predictions(place, "val", "data1", "model1") is None


def test_damaged_answers_are_none(place: RunDir) -> None:
    (path,) = (place.path / "answers").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert evaluation.load_predictions(place, "test", "data1", "model1") is None


def test_very_large_answers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_CACHED_BYTES", SAID.logits.nbytes - 1)
    folder = RunDir("models/y")  # type: ignore[arg-type]
    evaluation.save_predictions(folder, "test", "data1", "model1", SAID)
    assert not folder.path.exists()


def test_images_are_known_by_id_class_and_order() -> None:
    def of(ids: list[str], labels: list[int], classes: tuple[str, ...] = ("a", "b")) -> str:
        rows = Memory(torch.zeros(len(ids), 1, 2, 2, dtype=torch.uint8))
        return evaluation.split_hash(Split(rows, torch.tensor(labels), ids), classes)  # type: ignore[arg-type]

    same = of(["1", "2"], [0, 1])
    assert same == of(["1", "2"], [1, 0], ("b", "a"))  # the classes' order is the model's affair
    assert same != of(["2", "1"], [0, 1])
    assert same != of(["1", "2"], [0, 0])
    assert of(["1", "2,3"], [0, 1]) != of(["1,2", "3"], [0, 1])


def test_evaluating_keeps_what_the_model_said() -> None:
    run = convlens.train(TINY, name="small", quiet=True)
    subject = open_inspected_model("small", device="cpu")
    model_metadata = subject.loaded.model_metadata
    kept = evaluation.load_predictions(
        RunDir(run.path), "test", model_metadata["data"]["fingerprint"], model_metadata["sha256"]
    )
    assert kept is not None
    normalize = subject.loaded.preprocessing.normalize
    split = subject.split("test")
    logits, labels = inference.split_logits(subject.model, split, normalize, subject.plan)
    assert np.array_equal(kept.logits, logits.numpy())
    assert np.array_equal(kept.labels, labels.numpy())
    run.evaluate("test", data="digits")  # another set, which is not its own
    assert len(list((run.path / "answers").iterdir())) == 1


# The calibration error that chance explains


def test_chance_explains_nothing_where_all_is_certain() -> None:
    assert metrics.ece_by_chance(np.eye(3)[[0, 1, 2, 0]]) == 0


def test_chance_is_a_binomial_where_all_is_one_bin() -> None:
    """|k/n - 1/2| of fair coins: 95 of 100 lie below 1.96 standard errors."""
    found = metrics.ece_by_chance(np.full((2500, 2), 0.5), draws=4000)
    assert found == pytest.approx(1.96 * 0.5 / 50, rel=0.05)


def test_a_calibrated_model_stays_below_what_chance_explains() -> None:
    below = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        sure = random.uniform(0.5, 1, 400)
        labels = (random.random(400) >= sure).astype(np.int64)  # class 0 with probability `sure`
        probs = np.stack([sure, 1 - sure], axis=1)
        below += metrics.ece(probs, labels) <= metrics.ece_by_chance(probs)
    assert 34 <= below <= 40  # 38 of 40 are expected


def test_chance_over_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        metrics.ece_by_chance(np.zeros((0, 2)))
