"""A file that several threads read at any place at once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from convlens.errors import DataError
from convlens.system.files import cannot_read


class Reader:
    """One open file: it stays readable even if someone deletes it or puts another in its place.

    Reads with `preadv` and not through a memory map: pages of a map count as ours, so that a set
    larger than the budget would seem to (and under a memory limit, would) break it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = os.fspath(path)
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 (open as long as we are)
        self._lock = threading.Lock()

    def facts(self) -> os.stat_result:
        """What the system says of the open file."""
        return os.fstat(self._file.fileno())

    def fill(self, into: memoryview, offset: int) -> None:
        """Fills `into` with the bytes from `offset` on.

        Raises:
            DataError: the file ends before that. ResourceError: the disk or the network fails.
        """
        while len(into):
            try:
                got = self._some(into, offset)
            except OSError as error:
                raise cannot_read(self.path, error) from error
            if got == 0:
                raise DataError(
                    "a file of images was cut short while in use",
                    where=self.path,
                    fix="delete it and run the same command again",
                )
            into, offset = into[got:], offset + got

    def _some(self, into: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [into], offset)
        with self._lock:  # Windows
            self._file.seek(offset)
            return self._file.readinto(into) or 0

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # not where opening it failed
            self._file.close()
