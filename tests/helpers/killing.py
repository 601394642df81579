"""Kill a function right before and after each of its operations on the disk."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

OPERATIONS = ("fsync", "replace", "unlink")  # a crash leaves each of them done or not done


def deaths(work: Callable[[], object], prepare: Callable[[], object]) -> Iterator[str]:
    """Run `work` in forks of this process, each killed one moment later than the previous one.

    Yields where it was killed, e.g. `before replace`; ends when a fork finishes. `prepare` restores
    the disk before each fork.
    """
    for number in itertools.count():
        prepare()
        reading, writing = os.pipe()
        copy = os.fork()
        if copy == 0:
            _die(work, number, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            where = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
        if code == 0:
            return
        assert code == -signal.SIGKILL, where
        yield where


def _die(work: Callable[[], object], number: int, writing: int) -> NoReturn:
    moments = itertools.count()

    def moment(where: str) -> None:
        if next(moments) == number:
            os.write(writing, where.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            moment(f"before {name}")
            result = real(*arguments, **more)
            moment(f"after {name}")
            return result

        return call

    try:
        for name in OPERATIONS:
            setattr(os, name, dying(name))
        work()
        os._exit(0)
    finally:
        os._exit(1)  # even after an exception: the fork must not continue the tests
