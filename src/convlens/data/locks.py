"""Waiting for others: a process that is doing the same work, threads that hold memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from convlens.errors import ResourceError
from convlens.system.console import print_status


@contextlib.contextmanager
def turn(path: Path, what: str, *, patience: float = 3600) -> Iterator[None]:
    """Holds the kernel lock `path`; waits for whoever holds it, since their work is ours too.

    Raises:
        OSError: the folder can't be written.
        ResourceError: still held after `patience` seconds.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print_status(f"waiting: another process is {what}")
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise ResourceError(
                f"another process has been {what} for {patience / 60:.0f} minutes",
                where=str(path),
                fix="end that process, then run the same command again",
            ) from None
    try:
        yield
    finally:
        lock.release()


class Room:
    """Room for `size` of something, shared by threads: who needs more than is left waits.

    What needs `free` of it at most is not counted.
    """

    def __init__(self, size: int, *, free: int) -> None:
        self._size, self._left, self._free = size, size, free
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Takes room, and gives it back at the end."""
        size = 0 if size <= self._free else min(size, self._size)
        if size == 0:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()
