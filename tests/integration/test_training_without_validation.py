"""Training on all images but those of the test split, without a validation split."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from sklearn.datasets import load_digits

from convlens import ImageClassifier, Run, serialization
from convlens.errors import UsageError
from convlens.training import checkpoint, train
from helpers.commands import DIGITS, command, here, refused
from helpers.support import begin, same, tiny

BARE = ("data.val_fraction=0", "train.keep=last")


@pytest.mark.figures
def test_run_without_validation_from_end_to_end() -> None:
    done = command("train", *DIGITS, *BARE, "--name", "bare")
    assert done.code == 0, done.err
    assert "epoch   2/2" in done.err
    assert "validation" not in done.err + done.out
    assert "*" not in done.err
    run = Run.load("bare")
    with (run.path / "metrics.csv").open(newline="") as file:
        assert [row["val_loss"] + row["val_accuracy"] for row in csv.DictReader(file)] == ["", ""]
    assert all(math.isnan(row["val_loss"]) for row in run.metrics)
    assert (Path("plots/bare") / "curves.png").is_file()
    model_metadata = serialization.read_model_file(run.path / "model.safetensors")[1]
    assert model_metadata["chosen"] == {"epoch": 2, "validated": False, "rule": "last epoch"}
    assert [look["split"] for look in run.results] == ["test"]
    refused(here("evaluate", "bare", "--split", "val"), 3, "no validation split", "--data")
    # The table of several seeds has no validation results.
    table = here("train", *DIGITS, *BARE, "train.epochs=1", "--seeds", "2", "--name", "two")
    assert table.code == 0, table.err
    assert "validation %" in table.out


def test_validation_does_not_affect_the_weights() -> None:
    """Train on the same images with and without a validation after each epoch."""
    recipe = tiny("train.keep=last", "train.epochs=2")
    job, run_dir = begin(recipe, "with")
    rows, kept = train.fit(job, run_dir)
    bare, bare_dir = begin(recipe, "without")
    bare.recipe = bare.recipe.replace(**{"data.val_fraction": 0})
    bare_rows, bare_kept = train.fit(bare, bare_dir)
    assert kept == bare_kept == 2
    same(
        serialization.read_model_file(run_dir.model_path)[0],
        serialization.read_model_file(bare_dir.model_path)[0],
    )
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in bare_rows]
    assert math.isnan(bare_rows[-1]["val_accuracy"])


def test_interrupted_run_without_validation_resumes_to_the_same_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny(*BARE)
    job, run_dir = begin(recipe, "whole")
    train.fit(job, run_dir)
    real, saves = checkpoint.save_checkpoint, []

    def save(*arguments: Any) -> None:
        real(*arguments)
        saves.append(1)
        if len(saves) == 2:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        patch.setattr(checkpoint, "SAVE_INTERVAL_S", 0.0)
        with pytest.raises(MemoryError):
            train.fit(*begin(recipe, "stopped"))
    job, resumed_dir = begin(recipe, "stopped")
    rows, kept = train.fit(job, resumed_dir)
    assert (len(rows), kept) == (3, 3)
    assert all(row["cpu_seconds"] > 0 for row in rows)
    same(
        serialization.read_model_file(run_dir.model_path)[0],
        serialization.read_model_file(resumed_dir.model_path)[0],
    )


def test_estimator_can_train_without_validation() -> None:
    images, labels = load_digits(return_X_y=True)
    images = images[:100].reshape(-1, 8, 8) / 16
    options = {"train.keep": "last", "model.widths": [4]}
    bare = ImageClassifier(epochs=1, overrides=options, val_fraction=0).fit(images, labels[:100])
    assert math.isnan(bare.history_[-1]["val_loss"])
    best = {**options, "train.keep": "best"}
    with pytest.raises(UsageError, match=r"train\.keep=best needs one"):
        ImageClassifier(epochs=1, overrides=best, val_fraction=0).fit(images, labels[:100])
