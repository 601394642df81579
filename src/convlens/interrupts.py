"""Ctrl-C, SIGTERM and SIGHUP: a flag between two steps of a training, an exception elsewhere.

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
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from convlens import ranks

# SIGHUP is a closed terminal.
STOPPING = ("SIGTERM", "SIGHUP")


class Terminated(BaseException):
    """SIGTERM or SIGHUP outside the steps of a training; like KeyboardInterrupt no `Exception`."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turns the first SIGTERM or SIGHUP in the main thread into `Terminated`; the next kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _handlers(*STOPPING)

    def leave(number: int, frame: FrameType | None) -> None:
        for caught in before:
            signal.signal(caught, signal.SIG_DFL)
        raise Terminated(signal.Signals(number).name)

    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handlers(*names: str) -> dict[signal.Signals, Any]:
    """The present handlers of the signals that there are (Windows has fewer) and that aren't
    ignored: `nohup` is to be heeded.
    """
    numbers = [each for each in signal.Signals if each.name in names]
    handlers = {number: signal.getsignal(number) for number in numbers}
    return {number: held for number, held in handlers.items() if held != signal.SIG_IGN}


@dataclass
class Flag:
    """`up` once a signal came; `interrupted` if it was Ctrl-C rather than SIGTERM or SIGHUP."""

    up: bool = False
    interrupted: bool = False


@contextlib.contextmanager
def flagged() -> Iterator[Flag]:
    """Catches SIGINT, SIGTERM and SIGHUP in the main thread; elsewhere the flag never goes up."""
    flag = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = _handlers("SIGINT", *STOPPING)

    def raise_flag(number: int, frame: FrameType | None) -> None:
        flag.up, flag.interrupted = True, number == signal.SIGINT
        if ranks.size() == 1:
            for caught, handler in before.items():
                signal.signal(caught, handler)

    for number in before:
        signal.signal(number, raise_flag)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
