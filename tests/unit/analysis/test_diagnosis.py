"""`convlens diagnose`: runs made to show each fault show it, and a healthy one shows none."""

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
    ClassShares,
    Diagnosis,
    InsufficientEvidence,
    RunEvidence,
    dead_channel_share,
)
from convlens.errors import Diverged
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
    # Next to no network behind a good deal of augmentation.
    "loader-bound": {
        "data.name": "shapes",
        "data.count": 300,
        "data.image_size": 48,
        "model.widths": [1],
        "model.kernel": 1,
        "train.epochs": 2,
        "augment": [
            {"RandomAffine": {"degrees": 10}},
            {"RandomRotation": {"degrees": 20}},
            {"ColorJitter": {"hue": 0.1, "saturation": 0.2}},
        ],
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, each named after the fault it was made to show."""
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


def rules(found: Diagnosis) -> list[str]:
    return [finding.rule for finding in found.findings]


def test_a_healthy_run_shows_nothing(runs: None) -> None:
    found = diagnose("healthy")
    assert found.findings == []
    assert list(found.healthy) == list(RULES)
    assert (found.untold, found.status, found.epochs) == ({}, "finished", 8)
    # Not even one look at the test split.
    assert not RunDir(Path("models/healthy")).evaluations()
    done = here("diagnose", "healthy", "--device", "cpu")
    assert (done.code, "nothing found: no sign of overfitting, underfitting" in done.out) == (
        0,
        True,
    )


@pytest.mark.parametrize("name", [name for name in MADE if name != "healthy"])
def test_a_run_made_to_show_a_fault_shows_it(name: str, runs: None) -> None:
    found = diagnose(name)
    assert name in rules(found), found
    checked(found)


def checked(found: Diagnosis) -> None:
    """Each finding has all that a reader needs, and its overrides make a recipe."""
    for finding in found.findings:
        assert finding.rule in RULES
        assert all((finding.what, finding.evidence, finding.threshold, finding.do))
        assert finding.overrides
        load_recipe(PLAIN, finding.overrides)
    json.dumps(found.to_dict(), allow_nan=False)


def test_each_fault_is_told_apart(runs: None) -> None:
    found = {name: rules(diagnose(name)) for name in MADE}
    assert found["overfitting"] == ["overfitting"]
    assert found["underfitting"] == ["underfitting"]
    assert "learning rate too low" not in found["learning rate too high"]
    assert "learning rate too high" not in found["learning rate too low"]
    assert "learning rate too high" not in found["stopped too early"]


def test_what_is_said_of_overfitting_is_in_the_curves(runs: None) -> None:
    (finding,) = diagnose("overfitting").findings
    rows = RunDir(Path("models/overfitting")).metrics()
    losses = [row["val_loss"] for row in rows]
    assert finding.evidence["best_epoch"] == 1 + int(np.argmin(losses))
    assert finding.evidence["val_loss_lowest"] == min(losses)
    assert finding.evidence["val_loss_at_end"] == pytest.approx(sum(losses[-3:]) / 3)
    said = here("diagnose", "overfitting", "--device", "cpu").out
    for text in (
        "numbers",
        "threshold",
        "10% (and 0.02)",
        "do  ",
        "augment=auto model.dropout=0.2",
    ):
        assert text in said


def test_a_loss_that_was_not_finite() -> None:
    changes = {**FEW, "optim.name": "sgd", "optim.lr": 1e18, "model.batch_norm": False}
    with pytest.raises(Diverged):
        convlens.train(PLAIN, changes, name="nan", test=False, quiet=True, device="cpu")
    found = diagnose("nan")
    assert found.status == "stopped by a loss that was not finite"
    assert rules(found)[0] == "learning rate too high"
    assert "became NaN or infinite in epoch 1, step " in found.findings[0].what
    assert found.findings[0].overrides == ["optim.lr=1e+17", "optim.clip_norm=1"]


def test_dead_channels(runs: None) -> None:
    path = Path("models/healthy/model.safetensors")
    tensors, model_metadata = serialization.read_model_file(path)
    # Five of the second stage's sixteen channels never get over zero.
    tensors["stage2.2.weight"][:5], tensors["stage2.2.bias"][:5] = 0, -1
    serialization.write_model_file(
        path, tensors, {k: v for k, v in model_metadata.items() if k not in ("sha256", "format")}
    )
    found = {finding.rule: finding for finding in diagnose("healthy").findings}
    assert found["dead layers"].evidence["dead_share"] == {"stage1": 0.0, "stage2": 5 / 16}
    assert "stage2 5 of 16" in found["dead layers"].what


def test_dead_channels_by_hand() -> None:
    low, high = torch.tensor([0.0, -1.0, 2.0, 0.0]), torch.tensor([0.0, 3.0, 2.0, 1e-7])
    assert dead_channel_share(low, high) == (3, 4)
    assert dead_channel_share(torch.zeros(3), torch.zeros(3)) == (3, 3)


SMALL = ("model.widths=[8]", "train.epochs=3", "augment=[]", "optim.ema=null", "--no-test")


def test_classes_of_unlike_size() -> None:
    pictures(Path("photos"), {"blue": 60, "green": 12, "red": 20})
    assert here("train", "photos", *SMALL, "--name", "rare").code == 0
    found = {finding.rule: finding for finding in diagnose("rare").findings}
    finding = found["class imbalance"]
    counts = finding.evidence["counts"]
    assert finding.overrides == [f"data.per_class={min(counts.values())}"]
    assert finding.what.startswith(
        f"{counts['blue']} training images of blue, {counts['green']} of"
    )
    assert set(finding.evidence["val_accuracy"]) == set(COLORS)


def test_validation_images_that_look_otherwise() -> None:
    colors = {name: tuple(max(c - 90, 0) for c in color) for name, color in COLORS.items()}
    pictures(Path("photos/train"), dict.fromkeys(COLORS, 40))
    pictures(Path("photos/val"), dict.fromkeys(COLORS, 20), colors=colors, first=100)
    pictures(Path("photos/test"), dict.fromkeys(COLORS, 3), first=200)
    assert here("train", "photos", *SMALL, "--name", "dark").code == 0
    found = {finding.rule: finding for finding in diagnose("dark").findings}
    finding = found["validation unlike training"]
    assert finding.evidence["mean green"]["d"] < -0.5
    assert "mean green" in finding.what


def test_training_waits_for_images_are_counted(runs: None) -> None:
    place = RunDir(Path("models/healthy"))
    rows = place.metrics()
    assert all(0 < row["data_seconds"] < row["seconds"] for row in rows)
    place.write_metrics([{**row, "data_seconds": 0.4 * row["seconds"]} for row in rows])
    (finding,) = diagnose("healthy").findings
    assert finding.rule == "loader-bound"
    assert finding.evidence["share"] == pytest.approx(0.4)
    assert finding.what.startswith("40% of the training time")


def test_a_run_that_was_left_and_an_empty_one(runs: None) -> None:
    place = RunDir(Path("models/stopped-too-early"))
    place.update_metadata({"status": "training"})
    assert diagnose("stopped too early").status == "not finished"
    assert "stopped too early" in rules(diagnose("stopped too early"))
    empty = RunDir(Path("models/empty"))
    empty.create(load_recipe(PLAIN), {"data": {"classes": ["a", "b"]}})
    found = diagnose("empty")
    assert (found.status, found.findings) == ("no epoch is finished yet", [])
    assert set(found.untold) == set(RULES)
    done = here("diagnose", "empty", "--json")
    assert (done.code, done.json["findings"]) == (0, [])


def test_a_model_file_alone_and_images_that_are_gone(runs: None) -> None:
    shutil.copy("models/underfitting/model.safetensors", "alone.safetensors")
    found = diagnose("alone.safetensors")
    assert found.status == "a model file without a past"
    assert rules(found) == ["underfitting"]
    assert "no metrics.csv" in found.untold["overfitting"]
    pictures(Path("photos"), dict.fromkeys(COLORS, 8))
    assert here("train", "photos", *SMALL, "--name", "mine").code == 0
    shutil.move("photos", "moved")
    assert "unknown data 'photos'" in diagnose("mine").untold["dead layers"]


def test_a_run_that_is_not_there(runs: None) -> None:
    refused(here("diagnose", "helthy"), 2, "no run called 'helthy'", "did you mean healthy?")


# Rules by themselves


def course(**columns: list[float]) -> list[Mapping[str, float]]:
    count = len(next(iter(columns.values())))
    plain = {
        "train_loss": 0.1,
        "train_accuracy": 0.95,
        "val_loss": 0.2,
        "val_accuracy": 0.94,
        "lr": 0.01,
        "seconds": 1.0,
        "data_seconds": 0.1,
    }
    series = {key: columns.get(key, [value] * count) for key, value in plain.items()}
    return [
        {"epoch": i + 1, **{key: values[i] for key, values in series.items()}} for i in range(count)
    ]


def told(case: RunEvidence) -> dict[str, str]:
    """What every rule says: `well`, `cannot tell`, or its finding."""
    said = {}
    for name, rule in RULES.items():
        try:
            found = rule(case)
            said[name] = found.what if found else "well"
        except InsufficientEvidence:
            said[name] = "cannot tell"
    return said


def test_without_evidence_no_rule_says_anything() -> None:
    assert told(RunEvidence()) == dict.fromkeys(RULES, "cannot tell")


def test_no_rule_stumbles_over_numbers_that_are_not_finite() -> None:
    nothing = [math.nan] * 6
    case = RunEvidence(recipe=load_recipe(PLAIN), classes=10, rows=course(train_loss=nothing))
    assert told(case)["learning rate too high"] == "cannot tell"
    wild = [1.0, math.inf, 1.0, 1.0, 1.0, 1.0]
    case = RunEvidence(
        recipe=load_recipe(PLAIN), classes=10, rows=course(train_loss=wild, val_loss=wild)
    )
    assert told(case)["learning rate too high"] == "the training loss is not finite"


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ([2.3, 1.5, 1.0, 0.8, 0.6, 0.5], "well"),
        ([9.0, 2.0, 1.0, 0.8, 0.6, 0.5], "the first epoch's loss is 9"),
        ([1.0, 1.2, 0.9, 1.1, 0.8, 0.79], "rose by 10% or more 2 times"),
        ([1.0, 0.5, 0.4, 0.41, 0.44, 0.47], "well"),
        ([1.0, 0.5, 0.3, 0.32, 0.345, 0.37, 0.385, 0.41], "ends at 0.37, above its minimum 0.3"),
        ([2.50, 2.58, 2.46, 2.49, 2.56, 2.72], "never fell below that of guessing (2.3)"),
        ([2.31, 2.30, 2.31, 2.30, 2.31, 2.30], "well"),
        ([0.05, 0.02, 0.03, 0.02, 0.03, 0.02], "well"),  # of nothing
    ],
)
def test_signs_of_a_high_rate(loss: list[float], said: str) -> None:
    case = RunEvidence(recipe=load_recipe(PLAIN), classes=10, rows=course(train_loss=loss))
    assert said in told(case)["learning rate too high"]


@pytest.mark.parametrize(
    ("loss", "dead", "said"),
    [
        ([2.3, 2.29, 2.28, 2.26, 2.25, 2.23], 0, "it falls steadily, by 0.89% an epoch at most"),
        ([2.31, 2.30, 2.31, 2.30, 2.31, 2.30], 0, "it hardly moves"),
        ([2.31, 2.30, 2.31, 2.30, 2.31, 2.30], 4, "well"),  # nothing is left to learn with
        ([2.3, 2.2, 2.0, 1.9, 1.8, 1.75], 0, "well"),
        ([1.5, 1.49, 1.48, 1.47, 1.46, 1.45], 0, "well"),
        ([2.5, 2.58, 2.46, 2.49, 2.56, 2.72], 0, "well"),
    ],
)
def test_signs_of_a_low_rate(loss: list[float], dead: int, said: str) -> None:
    plain = load_recipe(PLAIN)
    case = RunEvidence(
        recipe=plain, classes=10, rows=course(train_loss=loss), dead={"stage1": (dead, 8)}
    )
    assert said in told(case)["learning rate too low"]


def test_validation_that_is_better_than_training() -> None:
    case = RunEvidence(
        recipe=load_recipe(PLAIN), trained=ClassShares(400, 500), validated=ClassShares(480, 500)
    )
    assert (
        "96.0% of validation images are right and 80.0%" in told(case)["validation unlike training"]
    )
    # The same shares of few images are chance.
    few = RunEvidence(
        recipe=load_recipe(PLAIN), trained=ClassShares(8, 10), validated=ClassShares(10, 10)
    )
    assert told(few)["validation unlike training"] == "well"


def test_an_annealed_training_was_not_stopped_early() -> None:
    falling = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    case = RunEvidence(recipe=load_recipe(PLAIN), classes=10, rows=course(val_loss=falling))
    assert "still falling by 16.7% an epoch" in told(case)["stopped too early"]
    case = RunEvidence(
        classes=10, rows=course(val_loss=falling, lr=[0.1, 0.1, 0.1, 0.05, 0.02, 0.001])
    )
    assert told(case)["stopped too early"] == "well"


def test_a_validation_loss_that_is_not_finite_at_the_end() -> None:
    falling = [1.0, 0.8, 0.6, 0.5, 0.4, math.nan]
    case = RunEvidence(recipe=load_recipe(PLAIN), classes=10, rows=course(val_loss=falling))
    assert told(case)["stopped too early"] == "cannot tell"
