"""Ctrl-C, SIGTERM and the like: a flag between two steps of a training, an exception elsewhere.

A training is asked by a flag that it looks at between two steps: saving inside a signal handler
can meet half an update. A second signal ends the process at once (files are written atomically,
so nothing is corrupted); of several processes not, since `torchrun` sends its own when one of
them has ended, and the first may still be saving. (It kills what is left after half a minute.)

All else (decoding, downloading, testing) has nothing to save, and is left by `Terminated`, as by
KeyboardInterrupt: temporary files are deleted on the way.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from convlens.system import ranks

# SIGHUP is a closed terminal; SIGUSR1 is what schedulers are often told to send first.
STOPPING = ("SIGTERM", "SIGHUP", "SIGUSR1")


class Terminated(BaseException):
    """One of `STOPPING` outside the steps of a training; like KeyboardInterrupt no `Exception`."""


Handlers = dict[signal.Signals, Any]


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turns the first signal of `STOPPING` in the main thread into `Terminated`; the next kills."""

    def leave(number: signal.Signals, before: Handlers) -> None:
        _set(dict.fromkeys(before, signal.SIG_DFL))
        raise Terminated(number.name)

    with _caught(STOPPING, leave):
        yield


@dataclass
class Flag:
    """`up` once a signal came, `name` says which; `interrupted` if it was Ctrl-C."""

    up: bool = False
    name: str = ""

    @property
    def interrupted(self) -> bool:
        return self.name == "SIGINT"


@contextlib.contextmanager
def flagged() -> Iterator[Flag]:
    """Catches SIGINT and `STOPPING` in the main thread; elsewhere the flag never goes up."""
    flag = Flag()

    def raise_flag(number: signal.Signals, before: Handlers) -> None:
        flag.up, flag.name = True, number.name
        if ranks.size() == 1:
            _set(before)

    with _caught(("SIGINT", *STOPPING), raise_flag):
        yield flag


@contextlib.contextmanager
def _caught(
    names: Sequence[str], act: Callable[[signal.Signals, Handlers], None]
) -> Iterator[None]:
    """Inside, in the main thread, a signal of these names calls `act`, with the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _handlers(names)

    def handle(number: int, frame: FrameType | None) -> None:
        act(signal.Signals(number), before)

    _set(dict.fromkeys(before, handle))
    try:
        yield
    finally:
        _set(before)


def _handlers(names: Sequence[str]) -> Handlers:
    """The present handlers of those signals that exist (Windows has fewer) and may be caught.

    Ignored signals stay ignored: that is what `nohup` asks for. A handler that was not installed
    from Python is None here; it could not be restored.
    """
    numbers = [each for each in signal.Signals if each.name in names]
    handlers = {number: signal.getsignal(number) for number in numbers}
    return {number: held for number, held in handlers.items() if held not in (None, signal.SIG_IGN)}


def _set(handlers: Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
