"""Choice of the fastest of several plans by timing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from convlens.device import Plan
from convlens.training import autotune


def fastest_plan(monkeypatch: pytest.MonkeyPatch, *seconds: Callable[[int], float]) -> int:
    """Return the index of the chosen plan, given the seconds of the n-th step of each plan."""
    clock = [0.0]
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock[0])
    plans = [Plan("cpu", "fp32", str(number)) for number in range(len(seconds))]

    def trial(plan: Plan) -> Callable[[], None]:
        steps = iter(range(100))

        def step() -> None:
            clock[0] += seconds[int(plan.memory_format)](next(steps))

        return step

    return plans.index(autotune.fastest(plans, trial)[0])


def test_plan_with_the_smallest_median_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest_plan(monkeypatch, lambda n: 1.0, lambda n: 0.5) == 1
    assert fastest_plan(monkeypatch, lambda n: 0.5, lambda n: 1.0) == 0
    assert fastest_plan(monkeypatch, lambda n: 1.0, lambda n: 0.5, lambda n: 0.3) == 2
    # One slow round, or a slow warm-up, changes nothing.
    assert fastest_plan(monkeypatch, lambda n: 1.0, lambda n: 9.0 if n == 2 else 0.5) == 1
    assert fastest_plan(monkeypatch, lambda n: 1.0, lambda n: 9.0 if n == 0 else 0.5) == 1


def test_later_plan_must_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest_plan(monkeypatch, lambda n: 1.0, lambda n: 0.96) == 0
    assert fastest_plan(monkeypatch, lambda n: 1.0, lambda n: 0.94) == 1


def test_slow_plan_is_timed_only_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def slow(n: int) -> float:
        timed.append(n)
        return 2.0

    assert fastest_plan(monkeypatch, lambda n: 1.0, slow) == 0
    assert timed == [0, 1, 2]  # the warm-up and two rounds
