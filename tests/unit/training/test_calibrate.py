"""What is stored in the model file after the last epoch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import convlens
from convlens import metrics, serialization
from convlens.distributed import ProcessGroup
from convlens.errors import UsageError
from convlens.recipe import Recipe
from convlens.run import RunDir, load_model
from convlens.training import train
from convlens.training.calibrate import calibrate_model, describe_calibration, num_candidates
from convlens.uncertainty.calibration import ModelCalibration, reserved_half
from helpers.commands import here, picture, weights
from helpers.support import begin, images_of, same, tiny

LARGER = ("data.per_class=24", "train.epochs=2")  # 240 training images


def trained(recipe: Recipe, name: str) -> RunDir:
    return train.train(recipe, name=name, test=False, quiet=True)


def content(run_dir: RunDir) -> bytes:
    return run_dir.model_path.read_bytes()


def test_weights_metrics_and_digest_do_not_depend_on_it() -> None:
    with_it, without = trained(tiny(), "with"), trained(tiny("train.calibrate=false"), "without")
    same(weights(with_it.path), weights(without.path))
    losses = [[row["val_loss"] for row in run.metrics()] for run in (with_it, without)]
    assert losses[0] == losses[1]
    assert tiny("train.calibrate=true").digest() == tiny().digest()
    assert load_model(without.model_path).calibration == ModelCalibration()
    assert "calibration" not in serialization.read_model_file(without.model_path)[1]


def test_stored_outputs_are_those_of_the_weights_in_the_file() -> None:
    run_dir = trained(tiny(*LARGER), "run")
    loaded = load_model(run_dir.model_path)
    calibration, reserved = loaded.calibration, loaded.calibration.reserved
    assert reserved is not None
    assert reserved.candidates == 2  # of 2 epochs
    data = images_of(tiny(*LARGER))
    labels = data.val.labels.numpy()
    half = reserved_half(labels, 0)
    convlens.evaluate(run_dir, "val")
    cached = convlens.evaluation.load_predictions(
        run_dir, "val", data.fingerprint, loaded.model_metadata["sha256"]
    )
    assert cached is not None
    assert cached.temperature == calibration.temperature
    probs = metrics.softmax(cached.logits, calibration.temperature)[half]
    np.testing.assert_allclose(reserved.confidences, probs.max(axis=1), atol=1e-6)
    assert reserved.correct.sum() == (probs.argmax(axis=1) == labels[half]).sum()
    detector = calibration.detector
    assert detector is not None
    assert detector.reference is not None
    assert detector.reference.shape == (240, 8)  # all training images, the last width
    assert detector.reference.dtype == np.float16


@pytest.mark.parametrize("method", ["add_calibration", "finish"])
def test_a_run_killed_before_or_after_it_ends_with_the_same_bytes(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(trained(tiny(), "run"))
    Path("again").mkdir()
    os.chdir("again")

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, method, killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tiny(), "run")
    run_dir = RunDir(Path("models/run"))
    assert run_dir.metadata()["status"] == "training"
    assert (content(run_dir) == whole) == (method == "finish")
    assert content(trained(tiny(), "run")) == whole
    assert run_dir.is_finished


def test_without_validation_nothing_is_stored() -> None:
    run_dir = trained(tiny("data.val_fraction=0", "train.keep=last"), "run")
    assert load_model(run_dir.model_path).calibration == ModelCalibration()


def test_features_can_be_left_out() -> None:
    run_dir = trained(tiny(*LARGER, "train.calibrate=without_features"), "run")
    calibration = load_model(run_dir.model_path).calibration
    assert calibration.detector is not None
    assert calibration.detector.reference is None
    assert calibration.detector.energy_threshold is not None
    tensors, _ = serialization.read_all_tensors(run_dir.model_path)
    assert serialization.REFERENCE_FEATURES not in tensors
    assert here("predict", run_dir.path, "--help").code == 0


def test_features_are_not_weights_for_other_readers() -> None:
    run_dir = trained(tiny(), "run")
    assert serialization.REFERENCE_FEATURES in serialization.read_all_tensors(run_dir.model_path)[0]
    foreign = serialization.read_foreign_weights(run_dir.model_path)
    assert set(foreign.tensors) == set(load_model(run_dir.model_path).model.state_dict())


def test_an_extended_run_calibrates_its_own_weights() -> None:
    trained(tiny(), "short")
    recipe = tiny("train.epochs=5")
    extended = train.train(recipe, name="long", extend=True, test=False, quiet=True)
    scratch = trained(recipe, "scratch")
    first, second = (load_model(run.model_path).calibration for run in (extended, scratch))
    assert first.to_metadata() == second.to_metadata()
    assert first.reserved is not None
    assert first.reserved.candidates in (2, 8)  # of 5 epochs: the last one, or one of the others


def test_the_shares_of_all_epochs_add_up_to_at_most_one() -> None:
    for epochs in (1, 2, 3, 10, 11, 60):
        recipe = tiny(f"train.epochs={epochs}")
        shares = [1 / num_candidates(recipe, epoch) for epoch in range(1, epochs + 1)]
        assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "epoch", "candidates"),
    [
        ((), 60, 12),  # among the last 6 of 60 epochs
        ((), 55, 12),
        ((), 54, 108),
        (("train.keep=last",), 60, 1),
        (("train.keep=last", "train.patience=2"), 20, 108),
    ],
)
def test_candidates_depend_on_what_validation_chose(
    options: tuple[str, ...], epoch: int, candidates: int
) -> None:
    assert num_candidates(tiny("train.epochs=60", *options), epoch) == candidates


def test_only_rank_0_computes_and_writes() -> None:
    job, run_dir = begin(tiny(), "run")
    train.fit(job, run_dir)
    before = content(run_dir)
    other = replace(job.context, process_group=ProcessGroup(rank=1, size=2))
    calibrate_model(replace(job, context=other), run_dir)
    assert content(run_dir) == before
    calibrate_model(job, run_dir)
    assert content(run_dir) != before


def test_the_estimator_returns_calibrated_probabilities() -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    labels = (images.mean((1, 2)) > 127).astype(int)
    labels[::3] = 1 - labels[::3]  # mistakes on validation images
    estimator = convlens.ImageClassifier(
        epochs=2, overrides={"train.calibrate": True, "model.widths": [4]}, val_fraction=0.4
    ).fit(images, labels)
    temperature = 2.5
    before = estimator.predict_proba(images)
    estimator.model_.calibration = replace(
        estimator.model_.calibration,
        temperature=temperature * estimator.model_.calibration.temperature,
    )
    logits = np.log(before) / temperature
    after = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(estimator.predict_proba(images), after, atol=1e-9)
    assert estimator.model_.calibration.reserved is not None


def test_what_is_stored_is_stated_with_its_size() -> None:
    calibration = load_model(trained(tiny(*LARGER), "run").model_path).calibration
    assert calibration.reserved is not None
    reserved = len(calibration.reserved)
    stated = describe_calibration(replace(calibration, temperature=1.5))
    assert stated == (
        f"the model file has temperature 1.500, {reserved} validation images reserved for "
        "promises, features of 240 training images (4 kB)"
    )
    assert "no temperature" in describe_calibration(ModelCalibration())


def test_promises_of_a_set_with_groups_count_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten shots of each of 24 things: the images of a thing are alike."""
    lines = ["path,label,thing"]
    for thing in range(24):
        name = "light" if thing % 2 else "dark"
        for shot in range(10):
            path = picture(Path(f"{thing}-{shot}.png"), (200 if thing % 2 else 60,), seed=thing)
            lines.append(f"{path},{name},{thing}")
    Path("list.csv").write_text("\n".join(lines))
    options = {"data.image_size": 8, "model.widths": [2], "train.epochs": 1, "augment": []}
    run = convlens.train(
        "list.csv", {**options, "data.group": "thing", "data.val_fraction": 0.4}, test=False
    )
    reserved = load_model(run.run_dir.model_path).calibration.reserved
    assert reserved is not None
    things = {record.split("-")[0] for record in validation_ids(run)}
    assert len(reserved) == (len(things) + 1) // 2
    assert f"{len(reserved)} validation groups reserved for promises" in capsys.readouterr().err
    with pytest.raises(UsageError, match=f"reserved validation groups.* has {len(reserved)}"):
        run.evaluate("val", min_accuracy="95%")


def validation_ids(run: convlens.Run) -> list[str]:
    rows = (run.path / "split.csv").read_text().splitlines()[1:]
    return [row.split(",")[0] for row in rows if row.endswith(",val")]
