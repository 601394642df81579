"""Shared by the tests of checkpoint and others."""

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
    """Sends this process a signal in the middle of the n-th optimiser step from now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.after, self.number = -1, signal.SIGINT
        real = loop.TrainLoop.train_step

        def step(*arguments: Any, **more: Any) -> Any:
            self.after -= 1
            if self.after == 0:
                signal.raise_signal(self.number)
            return real(*arguments, **more)

        monkeypatch.setattr(loop.TrainLoop, "train_step", step)


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Interrupting:
    return Interrupting(monkeypatch)


def finish(asked: Recipe, name: str) -> RunDir:
    job, place = begin(asked, name)
    rows, kept = train.fit(job, place)
    place.finish(epochs=len(rows), kept=kept, seconds=0.0)
    return place


def stop(asked: Recipe, name: str, interrupting: Interrupting, after: int) -> RunDir:
    interrupting.after = after
    with pytest.raises(KeyboardInterrupt):
        finish(asked, name)
    assert list((Path("models") / name / "state").glob("*.safetensors"))
    return RunDir(Path("models") / name)


def equal(one: RunDir, other: RunDir) -> None:
    """Bit-identical weights, and the same numbers but for the clock."""
    tensors, model_metadata = serialization.read_model_file(one.model_path)
    others, its_card = serialization.read_model_file(other.model_path)
    same(tensors, others)
    assert model_metadata["chosen"] == its_card["chosen"]
    clock = ("seconds", "cpu_seconds", "data_seconds", "images_per_second")
    rows = [{k: v for k, v in row.items() if k not in clock} for row in one.metrics()]
    its_rows = [{k: v for k, v in row.items() if k not in clock} for row in other.metrics()]
    assert rows == its_rows
    facts, its_facts = one.metadata(), other.metadata()
    assert (facts["status"], facts["kept_epoch"]) == ("finished", its_facts["kept_epoch"])
    assert [path.suffix for path in (one.path / "state").iterdir()] == [".safetensors"]
    assert differences(one, other) == []
