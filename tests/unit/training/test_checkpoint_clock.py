"""The clock of a run, which continues after an interruption."""

from __future__ import annotations

from convlens.engine.loop import TrainState
from convlens.training.checkpoint import EpochClock


def test_clock_continues_after_an_interrupted_epoch() -> None:
    clock = EpochClock(TrainState(seconds=100.0, cpu_seconds=50.0))
    wall, cpu = clock.read()
    assert 100 <= wall < 160
    assert 50 <= cpu < 110
    sum(range(100_000))
    later, spent = clock.read()
    assert later > wall
    assert spent > cpu
    clock.restart()
    assert clock.read()[0] < 60
