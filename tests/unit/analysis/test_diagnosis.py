"""Diagnosis: runs made with a fault have the finding, and a healthy run has none."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convlens
from convlens import serialization
from convlens.analysis.diagnosis import (
    RULES,
    CorrectCount,
    Diagnosis,
    Finding,
    InsufficientEvidence,
    RunEvidence,
    count_dead_channels,
    imbalance,
)
from convlens.engine.losses import ClassificationLoss
from convlens.errors import Diverged
from convlens.metrics import wilson_interval
from convlens.recipe import load_recipe
from convlens.run import RunDir
from helpers.commands import COLORS, here, pictures, refused

PLAIN: dict[str, Any] = {
    "data": {"name": "digits"},
    "model": {"name": "cnn", "widths": [8, 16]},
    "optim": {"name": "adamw", "lr": 0.01},
    "train": {"batch_size": 64, "memory_format": "contiguous", "precision": "fp32", "epochs": 8},
}
FEW = {"data.per_class": 10, "train.batch_size": 20}
MADE: dict[str, dict[str, Any]] = {
    "healthy": {"optim.schedule": "cosine"},
    "overfitting": {
        "data.per_class": 6,
        "train.batch_size": 16,
        "train.epochs": 40,
        "train.keep": "last",
    },
    "underfitting": {"model.widths": [1], "optim.schedule": "cosine", "train.epochs": 6},
    "learning rate too high": {
        **FEW,
        "optim.name": "sgd",
        "optim.lr": 30.0,
        "model.batch_norm": False,
        "optim.clip_norm": 1.0,
    },
    "learning rate too low": {**FEW, "optim.lr": 3e-6},
    "stopped too early": {"optim.lr": 0.0007, "train.epochs": 5},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, each named after its fault."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, changes in MADE.items():
            name = name.replace(" ", "-")
            convlens.train(PLAIN, changes, name=name, test=False, quiet=True, device="cpu")
    return folder


@pytest.fixture
def runs(made: Path) -> None:
    shutil.copytree(made / "models", "models")


def diagnose(name: str) -> Diagnosis:
    return convlens.diagnose(name.replace(" ", "-"), device="cpu")


def rules(diagnosis: Diagnosis) -> list[str]:
    return [finding.rule for finding in diagnosis.findings]


def test_a_healthy_run_has_no_findings(runs: None) -> None:
    diagnosis = diagnose("healthy")
    assert diagnosis.findings == []
    assert list(diagnosis.healthy) == list(RULES)
    assert (diagnosis.untold, diagnosis.status, diagnosis.epochs) == ({}, "finished", 8)
    # The test split was not used.
    assert not RunDir(Path("models/healthy")).evaluations()
    done = here("diagnose", "healthy", "--device", "cpu")
    assert (done.code, "nothing found: no sign of overfitting, underfitting" in done.out) == (
        0,
        True,
    )


@pytest.mark.parametrize("name", [name for name in MADE if name != "healthy"])
def test_a_fault_is_found(name: str, runs: None) -> None:
    diagnosis = diagnose(name)
    assert name in rules(diagnosis), diagnosis
    # Each finding is complete, and its overrides make a valid recipe.
    for finding in diagnosis.findings:
        assert finding.rule in RULES
        assert all((finding.what, finding.evidence, finding.threshold, finding.do))
        assert finding.overrides
        load_recipe(PLAIN, finding.overrides)
    json.dumps(diagnosis.to_dict(), allow_nan=False)


def test_faults_are_not_confused(runs: None) -> None:
    rules_by_run = {name: rules(diagnose(name)) for name in MADE}
    assert rules_by_run["overfitting"] == ["overfitting"]
    assert rules_by_run["underfitting"] == ["underfitting"]
    assert "learning rate too low" not in rules_by_run["learning rate too high"]
    assert "learning rate too high" not in rules_by_run["learning rate too low"]
    assert "learning rate too high" not in rules_by_run["stopped too early"]


@pytest.mark.parametrize(
    ("augment", "augmented", "overrides"),
    [
        (["RandomHorizontalFlip"], 0.55, ["augment=[]"]),
        (["RandomHorizontalFlip"], 0.65, ["train.epochs=12", "model.widths=[16,32]", "augment=[]"]),
        ([], 0.55, ["train.epochs=12", "model.widths=[16,32]"]),
    ],
)
def test_augmentation_that_costs_accuracy_is_named(
    augment: list[str], augmented: float, overrides: list[str]
) -> None:
    rows = [
        {"epoch": n, "train_accuracy": augmented, "train_loss": 1.0, "val_loss": 1 / n}
        for n in range(1, 7)
    ]
    evidence = RunEvidence(
        recipe=load_recipe({**PLAIN, "augment": augment}),
        rows=[{**row, "val_accuracy": 0.6, "lr": 0.001} for row in rows],
        train_correct=CorrectCount(62, 100),
        val_correct=CorrectCount(60, 100),
    )
    finding = RULES["underfitting"](evidence)
    assert finding is not None
    assert finding.overrides == overrides
    assert ("on augmented images 55.0%; validation accuracy 60.0%" in finding.what) == (
        overrides == ["augment=[]"]
    )


def test_the_evidence_of_overfitting_is_in_the_curves(runs: None) -> None:
    (finding,) = diagnose("overfitting").findings
    rows = RunDir(Path("models/overfitting")).metrics()
    losses = [row["val_loss"] for row in rows]
    assert finding.evidence["best_epoch"] == 1 + int(np.argmin(losses))
    assert finding.evidence["val_loss_lowest"] == min(losses)
    assert finding.evidence["val_loss_at_end"] == pytest.approx(sum(losses[-3:]) / 3)
    printed = here("diagnose", "overfitting", "--device", "cpu").out
    for text in (
        "numbers",
        "threshold",
        "10% (and 0.02)",
        "do  ",
        "augment=auto model.dropout=0.2",
    ):
        assert text in printed


def test_a_loss_that_is_not_finite_is_found() -> None:
    changes = {**FEW, "optim.name": "sgd", "optim.lr": 1e18, "model.batch_norm": False}
    with pytest.raises(Diverged):
        convlens.train(PLAIN, changes, name="nan", test=False, quiet=True, device="cpu")
    diagnosis = diagnose("nan")
    assert diagnosis.status == "stopped by a loss that was not finite"
    assert rules(diagnosis)[0] == "learning rate too high"
    assert "became NaN or infinite in epoch 1, step " in diagnosis.findings[0].what
    assert diagnosis.findings[0].overrides == ["optim.lr=1e+17", "optim.clip_norm=1"]


def test_dead_channels_are_found(runs: None) -> None:
    path = Path("models/healthy/model.safetensors")
    tensors, model_metadata = serialization.read_model_file(path)
    # Five of the sixteen channels of the second stage are always 0.
    tensors["stage2.2.weight"][:5], tensors["stage2.2.bias"][:5] = 0, -1
    serialization.write_model_file(
        path, tensors, {k: v for k, v in model_metadata.items() if k not in ("sha256", "format")}
    )
    findings = {finding.rule: finding for finding in diagnose("healthy").findings}
    assert findings["dead layers"].evidence["dead_share"] == {"stage1": 0.0, "stage2": 5 / 16}
    assert "stage2 5 of 16" in findings["dead layers"].what


def test_dead_channels_are_counted_by_hand() -> None:
    low, high = torch.tensor([0.0, -1.0, 2.0, 0.0]), torch.tensor([0.0, 3.0, 2.0, 1e-7])
    assert count_dead_channels(low, high) == (3, 4)
    assert count_dead_channels(torch.zeros(3), torch.zeros(3)) == (3, 3)


SMALL = ("model.widths=[8]", "train.epochs=3", "augment=[]", "optim.ema=null", "--no-test")


def test_class_imbalance_is_found() -> None:
    pictures(Path("photos"), {"blue": 60, "green": 12, "red": 20})
    assert here("train", "photos", *SMALL, "--name", "rare").code == 0
    findings = {finding.rule: finding for finding in diagnose("rare").findings}
    finding = findings["class imbalance"]
    counts = finding.evidence["counts"]
    assert finding.what.startswith(
        f"{counts['blue']} training images of blue, {counts['green']} of"
    )
    assert set(finding.evidence["recall"]) == set(COLORS)
    assert not any("per_class" in text for text in [finding.do, *finding.overrides])


def test_rare_classes_may_lack_validation_images() -> None:
    pictures(Path("photos"), {"blue": 60, "green": 3, "red": 60})
    assert here("train", "photos", *SMALL, "--name", "rare").code == 0
    findings = {finding.rule: finding for finding in diagnose("rare").findings}
    assert "cannot be told without validation images" in findings["class imbalance"].what


def imbalance_of(rare: tuple[int, int], common: tuple[int, int], *overrides: str) -> Finding | None:
    """Return the finding for 90 images of `blue` and 30 of `red`, given their correct counts."""
    evidence = RunEvidence(
        recipe=load_recipe(PLAIN, overrides),
        counts={"blue": 90, "red": 30},
        val_by_class={"blue": CorrectCount(*common), "red": CorrectCount(*rare)},
    )
    return imbalance(evidence)


def test_remedies_of_class_imbalance_depend_on_the_measured_recall() -> None:
    finding = imbalance_of((4, 10), (38, 40))
    assert finding is not None
    low, high = wilson_interval(4, 10)
    assert f"red 40.0% ({low:.1%} to {high:.1%}, n = 10)" in finding.what
    assert finding.evidence["recall_interval95"]["red"] == pytest.approx([low, high], abs=5e-5)
    assert finding.overrides == ["data.balance=full", "train.monitor=val_macro_f1"]
    assert "optim.class_weights=auto" in finding.do
    assert "convlens compare" in finding.do
    for rare in ((8, 10), (10, 10)):  # 80% of 10 against 95% of 40: p = 0.18
        finding = imbalance_of(rare, (38, 40))
        assert finding is not None
        assert finding.do.startswith("nothing yet: the rare classes are not recognized worse")
        assert finding.overrides == []


def test_remedies_in_use_are_not_recommended_again() -> None:
    finding = imbalance_of((1, 10), (40, 40), "optim.class_weights=auto")
    assert finding is not None
    assert finding.overrides == ["data.balance=full", "train.monitor=val_macro_f1"]
    assert "class_weights" not in finding.do
    both = ("optim.class_weights=auto", "data.balance=full", "train.monitor=val_macro_f1")
    finding = imbalance_of((1, 10), (40, 40), *both)
    assert finding is not None
    assert (finding.do, finding.overrides) == ("more images of the rare classes", [])


def test_imbalance_without_validation_images_of_rare_classes_is_undecided_in_words() -> None:
    evidence = RunEvidence(
        recipe=load_recipe(PLAIN),
        counts={"blue": 90, "red": 30},
        val_by_class={"blue": CorrectCount(38, 40)},
    )
    finding = imbalance(evidence)
    assert finding is not None
    assert "cannot be told without validation images" in finding.what
    assert finding.overrides[0] == "data.balance=full"


def test_the_loss_of_guessing_is_that_of_the_focal_loss() -> None:
    evidence = RunEvidence(recipe=load_recipe(PLAIN, ["optim.loss=focal"]), classes=10)
    logits, labels = torch.zeros(1, 10), torch.tensor([3])
    expected = ClassificationLoss(gamma=2.0)(logits, labels)
    assert evidence.loss_of_guessing == pytest.approx(float(expected))


def test_the_loss_of_guessing_of_a_users_loss_is_unknown() -> None:
    recipe = load_recipe(PLAIN, ["optim.loss=./own.py:loss"])
    with pytest.raises(InsufficientEvidence, match="its loss is user code"):
        _ = RunEvidence(recipe=recipe, classes=10).loss_of_guessing


def test_validation_images_of_another_brightness_are_found() -> None:
    colors = {name: tuple(max(c - 90, 0) for c in color) for name, color in COLORS.items()}
    pictures(Path("photos/train"), dict.fromkeys(COLORS, 40))
    pictures(Path("photos/val"), dict.fromkeys(COLORS, 20), colors=colors, first=100)
    pictures(Path("photos/test"), dict.fromkeys(COLORS, 3), first=200)
    assert here("train", "photos", *SMALL, "--name", "dark").code == 0
    findings = {finding.rule: finding for finding in diagnose("dark").findings}
    finding = findings["validation unlike training"]
    assert finding.evidence["mean green"]["d"] < -0.5
    assert "mean green" in finding.what


def test_time_spent_waiting_for_images_is_found(runs: None) -> None:
    run_dir = RunDir(Path("models/healthy"))
    rows = run_dir.metrics()
    assert all(0 < row["data_seconds"] < row["seconds"] for row in rows)
    run_dir.write_metrics([{**row, "data_seconds": 0.4 * row["seconds"]} for row in rows])
    (finding,) = diagnose("healthy").findings
    assert finding.rule == "loader-bound"
    assert finding.evidence["share"] == pytest.approx(0.4)
    assert finding.what.startswith("40% of the training time")


def test_unfinished_and_empty_runs_are_diagnosed(runs: None) -> None:
    run_dir = RunDir(Path("models/stopped-too-early"))
    run_dir.update_metadata({"status": "training"})
    assert diagnose("stopped too early").status == "not finished"
    assert "stopped too early" in rules(diagnose("stopped too early"))
    empty = RunDir(Path("models/empty"))
    empty.create(load_recipe(PLAIN), {"data": {"classes": ["a", "b"]}})
    diagnosis = diagnose("empty")
    assert (diagnosis.status, diagnosis.findings) == ("no epoch is finished yet", [])
    assert set(diagnosis.untold) == set(RULES)
    done = here("diagnose", "empty", "--json")
    assert (done.code, done.json["findings"]) == (0, [])


def test_a_bare_model_file_and_missing_images_leave_rules_undecided(runs: None) -> None:
    shutil.copy("models/underfitting/model.safetensors", "alone.safetensors")
    diagnosis = diagnose("alone.safetensors")
    assert diagnosis.status == "a bare model file without training history"
    assert rules(diagnosis) == ["underfitting"]
    assert "no metrics.csv" in diagnosis.untold["overfitting"]
    pictures(Path("photos"), dict.fromkeys(COLORS, 8))
    assert here("train", "photos", *SMALL, "--name", "mine").code == 0
    shutil.move("photos", "moved")
    assert "the data set 'photos' that" in diagnose("mine").untold["dead layers"]


def test_an_unknown_run_is_refused(runs: None) -> None:
    refused(here("diagnose", "helthy"), 2, "no run called 'helthy'", "did you mean healthy?")


# Rules by themselves


def metrics_rows(**columns: list[float]) -> list[Mapping[str, float]]:
    """Return rows of `metrics.csv` of a healthy run, with the given columns replaced."""
    count = len(next(iter(columns.values())))
    defaults = {
        "train_loss": 0.1,
        "train_accuracy": 0.95,
        "val_loss": 0.2,
        "val_accuracy": 0.94,
        "lr": 0.01,
        "seconds": 1.0,
        "data_seconds": 0.1,
    }
    series = {key: columns.get(key, [value] * count) for key, value in defaults.items()}
    return [
        {"epoch": i + 1, **{key: values[i] for key, values in series.items()}} for i in range(count)
    ]


def results(evidence: RunEvidence) -> dict[str, str]:
    """Return the result of each rule: `healthy`, `undecided`, or its finding."""
    by_rule = {}
    for name, rule in RULES.items():
        try:
            finding = rule(evidence)
            by_rule[name] = finding.what if finding else "healthy"
        except InsufficientEvidence:
            by_rule[name] = "undecided"
    return by_rule


@pytest.mark.parametrize(
    ("train", "val", "what"),
    [
        ((500, 512), (400, 512), "without augmentation, training accuracy is 19.5 points above"),
        ((500, 512), (470, 512), "healthy"),
        ((500, 512), (7, 8), "healthy"),  # 10 points, but of 8 images
        (None, None, "healthy"),
    ],
)
def test_overfitting_is_judged_on_training_images_without_augmentation(
    train: tuple[int, int] | None, val: tuple[int, int] | None, what: str
) -> None:
    """The running accuracy on augmented images equals that on validation images."""
    evidence = RunEvidence(
        recipe=load_recipe(PLAIN),
        classes=10,
        rows=metrics_rows(train_accuracy=[0.78] * 6, val_accuracy=[0.78] * 6),
        train_correct=None if train is None else CorrectCount(*train),
        val_correct=None if val is None else CorrectCount(*val),
    )
    assert what in results(evidence)["overfitting"]


def test_without_evidence_all_rules_are_undecided() -> None:
    assert results(RunEvidence()) == dict.fromkeys(RULES, "undecided")


def test_rules_accept_numbers_that_are_not_finite() -> None:
    nothing = [math.nan] * 6
    evidence = RunEvidence(
        recipe=load_recipe(PLAIN), classes=10, rows=metrics_rows(train_loss=nothing)
    )
    assert results(evidence)["learning rate too high"] == "undecided"
    wild = [1.0, math.inf, 1.0, 1.0, 1.0, 1.0]
    evidence = RunEvidence(
        recipe=load_recipe(PLAIN), classes=10, rows=metrics_rows(train_loss=wild, val_loss=wild)
    )
    assert results(evidence)["learning rate too high"] == "the training loss is not finite"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ([2.3, 1.5, 1.0, 0.8, 0.6, 0.5], "healthy"),
        ([9.0, 2.0, 1.0, 0.8, 0.6, 0.5], "the loss of the first epoch is 9"),
        ([1.0, 1.2, 0.9, 1.1, 0.8, 0.79], "rose by 10% or more 2 times"),
        ([1.0, 0.5, 0.4, 0.41, 0.44, 0.47], "healthy"),
        ([1.0, 0.5, 0.3, 0.32, 0.345, 0.37, 0.385, 0.41], "ends at 0.37, above its minimum 0.3"),
        ([2.50, 2.58, 2.46, 2.49, 2.56, 2.72], "never fell below that of guessing (2.3)"),
        ([2.31, 2.30, 2.31, 2.30, 2.31, 2.30], "healthy"),
        ([0.05, 0.02, 0.03, 0.02, 0.03, 0.02], "healthy"),  # near zero
    ],
)
def test_signs_of_a_high_learning_rate(loss: list[float], message: str) -> None:
    evidence = RunEvidence(
        recipe=load_recipe(PLAIN), classes=10, rows=metrics_rows(train_loss=loss)
    )
    assert message in results(evidence)["learning rate too high"]


@pytest.mark.parametrize(
    ("loss", "dead", "message"),
    [
        ([2.3, 2.29, 2.28, 2.26, 2.25, 2.23], 0, "it falls steadily, by at most 0.89% per epoch"),
        ([2.31, 2.30, 2.31, 2.30, 2.31, 2.30], 0, "it hardly changes"),
        ([2.31, 2.30, 2.31, 2.30, 2.31, 2.30], 4, "healthy"),  # dead layers are another finding
        ([2.3, 2.2, 2.0, 1.9, 1.8, 1.75], 0, "healthy"),
        ([1.5, 1.49, 1.48, 1.47, 1.46, 1.45], 0, "healthy"),
        ([2.5, 2.58, 2.46, 2.49, 2.56, 2.72], 0, "healthy"),
    ],
)
def test_signs_of_a_low_learning_rate(loss: list[float], dead: int, message: str) -> None:
    evidence = RunEvidence(
        recipe=load_recipe(PLAIN),
        classes=10,
        rows=metrics_rows(train_loss=loss),
        dead={"stage1": (dead, 8)},
    )
    assert message in results(evidence)["learning rate too low"]


def test_validation_accuracy_far_above_training_accuracy_is_found() -> None:
    evidence = RunEvidence(
        recipe=load_recipe(PLAIN),
        train_correct=CorrectCount(400, 500),
        val_correct=CorrectCount(480, 500),
    )
    assert (
        "validation accuracy is 96.0%, training accuracy without augmentation 80.0%"
        in results(evidence)["validation unlike training"]
    )
    # With few images the same difference may be chance.
    evidence = RunEvidence(
        recipe=load_recipe(PLAIN),
        train_correct=CorrectCount(8, 10),
        val_correct=CorrectCount(10, 10),
    )
    assert results(evidence)["validation unlike training"] == "healthy"


def test_a_decayed_learning_rate_is_not_stopped_too_early() -> None:
    falling = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    evidence = RunEvidence(
        recipe=load_recipe(PLAIN), classes=10, rows=metrics_rows(val_loss=falling)
    )
    assert "still falling by 16.7% per epoch" in results(evidence)["stopped too early"]
    evidence = RunEvidence(
        classes=10, rows=metrics_rows(val_loss=falling, lr=[0.1, 0.1, 0.1, 0.05, 0.02, 0.001])
    )
    assert results(evidence)["stopped too early"] == "healthy"


def test_a_validation_loss_that_is_not_finite_at_the_end_leaves_the_rule_undecided() -> None:
    falling = [1.0, 0.8, 0.6, 0.5, 0.4, math.nan]
    evidence = RunEvidence(
        recipe=load_recipe(PLAIN), classes=10, rows=metrics_rows(val_loss=falling)
    )
    assert results(evidence)["stopped too early"] == "undecided"
