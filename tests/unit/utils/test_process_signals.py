"""Signals are caught while a training runs, and the caller's handlers are restored after it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from convlens.utils.process import (
    STOP_SIGNALS,
    StopSignal,
    Terminated,
    catch_stop_signals,
    raise_on_signals,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
NUMBERS = [getattr(signal, name) for name in ("SIGINT", *STOP_SIGNALS)]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in NUMBERS]


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[list[Any]]:
    """A program with its own handlers for all of these signals."""
    before = handlers()
    for number in NUMBERS:
        signal.signal(number, lambda *_: None)
    yield handlers()
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_flag_is_set_by_a_signal_and_handlers_are_restored(
    number: signal.Signals, own_handlers: list[Any]
) -> None:
    with catch_stop_signals() as flag:
        assert handlers() != own_handlers
        os.kill(os.getpid(), number)
        assert (flag.is_set, flag.name) == (True, number.name)
    assert handlers() == own_handlers
    with contextlib.suppress(ZeroDivisionError), catch_stop_signals():
        1 / 0  # noqa: B018
    assert handlers() == own_handlers


def test_signal_outside_a_training_step_is_raised_and_handlers_are_restored(
    own_handlers: list[Any],
) -> None:
    with pytest.raises(Terminated), raise_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert handlers() == own_handlers


def test_threads_do_not_change_signal_handlers(own_handlers: list[Any]) -> None:
    seen: list[list[Any]] = []

    def train() -> None:
        with catch_stop_signals() as flag, raise_on_signals():
            seen.append(handlers())
            assert flag == StopSignal()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [own_handlers]


def test_handler_that_python_cannot_restore_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`getsignal` returns None for a handler that the embedding program installed in C."""
    installed: list[int] = []
    known = signal.getsignal

    def getsignal(number: int) -> Any:
        return None if number == signal.SIGUSR1 else known(number)

    monkeypatch.setattr(signal, "getsignal", getsignal)
    set_handler = signal.signal

    def record(number: int, handler: Any) -> Any:
        installed.append(number)
        return set_handler(number, handler)

    monkeypatch.setattr(signal, "signal", record)
    with catch_stop_signals():
        pass
    assert installed
    assert signal.SIGUSR1 not in installed
