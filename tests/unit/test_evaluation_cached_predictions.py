"""Cached predictions: returned only for the model and the data that they belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import convlens
from convlens import evaluation
from convlens.engine import inference
from convlens.evaluation import CachedPredictions
from convlens.interpret.inputs import open_inspected_model
from convlens.run import RunDir
from helpers.support import TINY, Memory, Split

PREDICTIONS = CachedPredictions(
    np.array([[1.0, 2.0], [3.0, 0.0]], np.float32), np.array([1, 1]), "abc"
)


@pytest.fixture
def run_dir() -> RunDir:
    directory = RunDir(Path("models/x"))
    evaluation.save_predictions(directory, "test", "data1", "model1", PREDICTIONS)
    return directory


def test_predictions_are_loaded_unchanged(run_dir: RunDir) -> None:
    loaded = evaluation.load_predictions(run_dir, "test", "data1", "model1")
    assert loaded is not None
    assert np.array_equal(loaded.logits, PREDICTIONS.logits)
    assert np.array_equal(loaded.labels, PREDICTIONS.labels)
    assert loaded.images == "abc"
    assert loaded.probs[1, 0] == pytest.approx(1 / (1 + np.exp(-3.0)))


def test_predictions_of_another_model_or_other_data_are_not_returned(run_dir: RunDir) -> None:
    assert evaluation.load_predictions(run_dir, "test", "data1", "model2") is None
    assert evaluation.load_predictions(run_dir, "test", "data2", "model1") is None
    assert evaluation.load_predictions(run_dir, "val", "data1", "model1") is None


def test_damaged_predictions_are_not_returned(run_dir: RunDir) -> None:
    (path,) = (run_dir.path / "answers").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert evaluation.load_predictions(run_dir, "test", "data1", "model1") is None


def test_very_large_predictions_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_CACHED_BYTES", PREDICTIONS.logits.nbytes - 1)
    directory = RunDir(Path("models/y"))
    evaluation.save_predictions(directory, "test", "data1", "model1", PREDICTIONS)
    assert not directory.path.exists()


def test_the_split_hash_depends_on_ids_classes_and_order() -> None:
    def split_hash(ids: list[str], labels: list[int], classes: tuple[str, ...] = ("a", "b")) -> str:
        rows = Memory(torch.zeros(len(ids), 1, 2, 2, dtype=torch.uint8))
        return evaluation.split_hash(Split(rows, torch.tensor(labels), ids), classes)  # type: ignore[arg-type]

    same = split_hash(["1", "2"], [0, 1])
    assert same == split_hash(
        ["1", "2"], [1, 0], ("b", "a")
    )  # whatever the model's order of classes
    assert same != split_hash(["2", "1"], [0, 1])
    assert same != split_hash(["1", "2"], [0, 0])
    assert split_hash(["1", "2,3"], [0, 1]) != split_hash(["1,2", "3"], [0, 1])


def test_evaluate_stores_the_predictions() -> None:
    run = convlens.train(TINY, name="small", quiet=True)
    inspected = open_inspected_model("small", device="cpu")
    model_metadata = inspected.loaded.model_metadata
    cached = evaluation.load_predictions(
        RunDir(run.path), "test", model_metadata["data"]["fingerprint"], model_metadata["sha256"]
    )
    assert cached is not None
    normalize = inspected.loaded.preprocessing.normalize
    split = inspected.split("test")
    logits, labels = inference.split_logits(inspected.model, split, normalize, inspected.plan)
    assert np.array_equal(cached.logits, logits.numpy())
    assert np.array_equal(cached.labels, labels.numpy())
    run.evaluate(data="digits")  # another data set
    assert len(list((run.path / "answers").iterdir())) == 1
