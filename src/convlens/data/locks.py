"""Waiting for another process that does the same work, and for threads that hold memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from convlens.errors import ResourceError
from convlens.system.console import print_status


@contextlib.contextmanager
def interprocess_lock(path: Path, what: str, *, timeout_s: float = 3600) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; wait for the process that holds it.

    Args:
        what: what that process is doing, for the message: "decoding these images".

    Raises:
        OSError: the directory can't be written.
        ResourceError: it is still held after `timeout_s` seconds.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print_status(f"waiting: another process is {what}")
        try:
            lock.acquire(timeout=timeout_s)
        except Timeout:
            raise ResourceError(
                f"another process has been {what} for {timeout_s / 60:.0f} minutes",
                where=str(path),
                fix="end that process, then run the same command again",
            ) from None
    try:
        yield
    finally:
        lock.release()


class MemorySemaphore:
    """Limits the memory that threads use at the same time to `size` (in any unit).

    Requests of at most `free` are not counted; a request above `size` waits until it is alone.
    """

    def __init__(self, size: int, *, free: int) -> None:
        self._size, self._left, self._free = size, size, free
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def acquire(self, size: int) -> Iterator[None]:
        """Wait until `size` is available, hold it within the `with` block."""
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
