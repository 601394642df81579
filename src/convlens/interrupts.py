"""Ctrl-C and SIGTERM as a flag that long work looks at between two steps.

The handler does nothing else: saving inside a signal handler can meet half an update. A second
signal ends the process at once (files are written atomically, so nothing is corrupted); of
several processes not, since `torchrun` sends its own when one of them has ended, and the first
may still be saving. (It kills what is left after half a minute.)
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from convlens import ranks


@dataclass
class Flag:
    """`up` once a signal came; `interrupted` if it was Ctrl-C rather than SIGTERM."""

    up: bool = False
    interrupted: bool = False


@contextlib.contextmanager
def flagged() -> Iterator[Flag]:
    """Catches SIGINT and SIGTERM in the main thread; elsewhere the flag never goes up."""
    flag = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
