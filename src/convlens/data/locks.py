"""Waiting for another process that is doing the same work: downloading or decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from convlens.console import say
from convlens.errors import ResourceError


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
        say(f"waiting: another process is {what}")
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
