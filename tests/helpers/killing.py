"""A piece of work that is killed right before and right after each of its steps on the disk."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

STEPS = ("fsync", "replace", "unlink")  # what a power cut, or the next start, finds done or not


def deaths(work: Callable[[], object], prepare: Callable[[], object]) -> Iterator[str]:
    """Does `work` in copies of this process, each killed one moment later than the one before.

    Yields where it was killed, e.g. `before replace`, once it is dead; ends when one came through.
    `prepare` makes the disk what it was before, each time.
    """
    for at in itertools.count():
        prepare()
        reading, writing = os.pipe()
        copy = os.fork()
        if copy == 0:
            _die(work, at, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            where = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
        if code == 0:
            return
        assert code == -signal.SIGKILL, where
        yield where


def _die(work: Callable[[], object], at: int, writing: int) -> NoReturn:
    moments = itertools.count()

    def moment(where: str) -> None:
        if next(moments) == at:
            os.write(writing, where.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            moment(f"before {name}")
            found = real(*arguments, **more)
            moment(f"after {name}")
            return found

        return call

    try:
        for name in STEPS:
            setattr(os, name, dying(name))
        work()
        os._exit(0)
    finally:
        os._exit(1)  # whatever it raised: the tests are not to be run twice
