"""The runtime context: device, processes and memory of a job."""

from __future__ import annotations

import pytest

from convlens.device import memory_budget
from convlens.errors import UsageError
from convlens.runtime import RuntimeContext


def test_a_context_of_one_process_is_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLENS_MEMORY", "64MB")
    context = RuntimeContext.create("cpu", quiet=True)
    assert (context.device, context.quiet) == ("cpu", True)
    assert context.process_group.size == 1
    assert context.is_main_process
    assert context.memory_budget == memory_budget("cpu") == 64 * 2**20


def test_broadcast_calls_the_function_once_and_returns_its_result() -> None:
    calls = []

    def fn() -> dict[str, float]:
        calls.append(1)
        return {"value": 0.1 + 0.2}

    assert RuntimeContext("cpu").broadcast(fn) == {"value": 0.1 + 0.2}
    assert calls == [1]


def test_an_unavailable_device_is_refused() -> None:
    with pytest.raises(UsageError, match="device 'cuda:99'"):
        RuntimeContext.create("cuda:99")
