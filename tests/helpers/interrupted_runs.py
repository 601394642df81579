"""Trainings that are interrupted and resumed, and the comparison with an uninterrupted one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from convlens import serialization
from convlens.engine import loop
from convlens.recipe import Recipe
from convlens.run import RunDir
from convlens.training import train
from helpers.support import begin, same
from selftest import differences

EVERYTHING = (
    'augment=["AlternatingFlip", {"RandomAffine": {"degrees": 20, "translate": [0.1, 0.1]}}, '
    '"TrivialAugmentWide", "RandomErasing", {"CutMix": {"p": 0.5}}]',
    "model.dropout=0.3",
    "optim.ema=0.9",
    "optim.schedule=one-cycle",
    "optim.label_smoothing=0.1",
    "optim.clip_norm=1",
    "train.memory_format=channels_last",
)

SGD = ("optim.name=sgd", "optim.momentum=0.9", "optim.nesterov=true", "optim.lr=0.05")


class Interrupting:
    """Send this process a signal in the n-th training step from now; `after` is n."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.after, self.number = -1, signal.SIGINT
        real = loop.TrainLoop.train_step

        def step(*arguments: Any, **options: Any) -> Any:
            self.after -= 1
            if self.after == 0:
                signal.raise_signal(self.number)
            return real(*arguments, **options)

        monkeypatch.setattr(loop.TrainLoop, "train_step", step)


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Interrupting:
    return Interrupting(monkeypatch)


def finish(recipe: Recipe, name: str) -> RunDir:
    """Train a run, or resume it, to its end."""
    job, run_dir = begin(recipe, name)
    rows, kept = train.fit(job, run_dir)
    run_dir.finish(epochs=len(rows), kept=kept, seconds=0.0)
    return run_dir


def stop(recipe: Recipe, name: str, interrupting: Interrupting, after: int) -> RunDir:
    """Train a run until a signal in step `after` stops it."""
    interrupting.after = after
    with pytest.raises(KeyboardInterrupt):
        finish(recipe, name)
    assert list((Path("models") / name / "state").glob("*.safetensors"))
    return RunDir(Path("models") / name)


def equal(one: RunDir, other: RunDir) -> None:
    """Assert bit-identical weights and the same metrics except times."""
    tensors, model_metadata = serialization.read_model_file(one.model_path)
    other_tensors, other_metadata = serialization.read_model_file(other.model_path)
    same(tensors, other_tensors)
    assert model_metadata["chosen"] == other_metadata["chosen"]
    clock = ("seconds", "cpu_seconds", "data_seconds", "images_per_second")
    rows = [{k: v for k, v in row.items() if k not in clock} for row in one.metrics()]
    other_rows = [{k: v for k, v in row.items() if k not in clock} for row in other.metrics()]
    assert rows == other_rows
    run, other_run = one.metadata(), other.metadata()
    assert (run["status"], run["kept_epoch"]) == ("finished", other_run["kept_epoch"])
    assert [path.suffix for path in (one.path / "state").iterdir()] == [".safetensors"]
    assert differences(one, other) == []
