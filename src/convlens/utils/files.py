"""Atomic and durable file writes, checksums, and locks between processes and threads."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.markup import escape

from convlens.errors import ResourceError
from convlens.utils.console import print_status

PART = ".part"  # suffix of temporary files
STALE_AFTER_S = 3600.0  # age at which a temporary file counts as left over
LOCK_POLL_S = 0.01
_SHA256_BYTES = 32
# Errors of file systems without modes, or without fsync of directories (vfat, CIFS, FUSE). None of
# them means that written data are lost.
_UNSUPPORTED = (errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def write_atomic(path: Path, content: bytes | str, *rest: memoryview) -> None:
    """Write a file completely or not at all, and return when it is on the disk.

    The temporary file is in the directory of the target (a rename across disks is a copy), and both
    the file and its directory are fsynced: without that, a power cut can leave an empty file under
    the new name.

    Args:
        rest: more content, written after `content` without a copy of it in memory.

    Raises:
        ResourceError: the directory cannot be written or the disk is full. The old file is intact.
    """
    data = content.encode() if isinstance(content, str) else content
    path = Path(path)
    temporary = ""
    try:
        makedirs_fsync(path.parent)
        handle, temporary = open_temp(path)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            for part in rest:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates private files; results should have the usual permissions.
        with _ignore_unsupported():
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    except BaseException as error:  # also on Ctrl-C no temporary file must stay
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def makedirs_fsync(folder: Path) -> None:
    """Create a directory and its parents, and fsync the directories that contain new ones.

    Raises:
        OSError: it cannot be created.
    """
    if not folder.is_dir():
        new = [each for each in (folder, *folder.parents) if not each.is_dir()]
        folder.mkdir(parents=True, exist_ok=True)
        for each in new:
            _fsync_directory(each.parent)


def open_temp(path: Path) -> tuple[int, str]:
    """Create a temporary file next to `path`; return its open handle and its name.

    Raises:
        OSError: the directory cannot be written.
    """
    return tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)


def remove_stale_temp_files(folder: Path, names: Sequence[str], *, alone: bool) -> None:
    """Delete temporary files of `names` that killed processes left in `folder`.

    Args:
        alone: whether the caller holds the lock under which these files are written, so that none
            of them is in use. Otherwise only files that are an hour old are deleted.
    """
    targets = "|".join(re.escape(name) for name in names)
    # Up to two prefixes and suffixes: a temporary file may itself have been written atomically.
    stale = re.compile(rf"\.{{1,2}}({targets})(\.[a-z0-9_]{{8}}{re.escape(PART)}){{1,2}}")
    with contextlib.suppress(OSError):
        for name in filter(stale.fullmatch, os.listdir(folder)):
            with contextlib.suppress(OSError):
                path = folder / name
                if alone or time.time() - path.stat().st_mtime > STALE_AFTER_S:
                    path.unlink()


def warn_if_low_disk(folder: Path, size: int) -> None:
    """Warn if fewer than `size` bytes are free on the disk of `folder`, which may not exist yet.

    This is not an error: some network disks do not report their free space, and it may increase.
    """
    nearest = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
    with contextlib.suppress(OSError):
        disk = shutil.disk_usage(nearest)
        if disk.free < size and disk.total:
            free, needed = disk.free / 2**20, size / 2**20
            print_status(
                f"[bold]low disk space[/]: {free:,.0f} MB are free for {escape(str(folder))}; "
                f"weights and checkpoints need at least {needed:,.0f} MB"
            )


def is_io_error(error: OSError) -> bool:
    """Return whether the disk failed to read back data, or its file system is damaged."""
    return error.errno in (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))


def cannot_read(path: Path | str, error: OSError) -> ResourceError:
    """Return the `ResourceError` for a file that could not be read."""
    return ResourceError(
        f"can't read: {error.strerror or error}",
        where=str(path),
        fix="check the file, its permissions and its disk, and run the same command again",
    )


def cannot_write(path: Path, error: OSError) -> ResourceError:
    """Return the `ResourceError` for a file that could not be written."""
    return ResourceError(
        f"can't write: {error.strerror or error}",
        where=str(path),
        fix="free disk space, change the permissions or choose another folder, and run the same "
        "command again",
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_directory(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a directory; its rename is already durable
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a directory that is writable but not readable cannot be fsynced
        return
    try:
        with _ignore_unsupported():
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _ignore_unsupported() -> Iterator[None]:
    """Ignore only errors that mean "this file system does not support the operation"."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CorruptError(ValueError):
    """The bytes differ from those that `add_checksum` returned."""


def add_checksum(content: bytes) -> bytes:
    """Append the SHA-256 of `content`."""
    return content + hashlib.sha256(content).digest()


def verify_checksum(content: bytes) -> bytes:
    """Return the bytes that `add_checksum` was given.

    Raises:
        CorruptError: they were truncated or changed.
    """
    body, digest = content[:-_SHA256_BYTES], content[-_SHA256_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise CorruptError("changed or damaged after it was written (its hash differs)")
    return body


@contextlib.contextmanager
def lock(
    path: Path, *, what: str, timeout_s: float = 0.0, owned: Sequence[str] = ()
) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`. The kernel releases it when a process dies.

    Args:
        what: name of the protected object for the error message, e.g. "run 'mnist'".
        timeout_s: how long to wait for another process that holds it.
        owned: names of files in the same directory that only the holder writes. Temporary files
            of them that a killed process left are deleted.

    Raises:
        ResourceError: another process holds it, or the lock file cannot be written.
    """
    from filelock import FileLock, Timeout

    file_lock = FileLock(path)
    try:
        makedirs_fsync(path.parent)
        file_lock.acquire(timeout=timeout_s, poll_interval=LOCK_POLL_S)
    except Timeout as error:
        raise ResourceError(
            f"another process is using {what}",
            where=str(path.parent),
            fix="wait for it to end, or give this run another name with --name",
        ) from error
    except OSError as error:
        raise cannot_write(path, error) from error
    except NotImplementedError as error:  # older versions of filelock, for ENOSYS
        raise ResourceError(
            "can't write: the file system does not support locks",
            where=str(path),
            fix="choose another folder",
        ) from error
    try:
        if owned:
            remove_stale_temp_files(path.parent, owned, alone=True)
        yield
    finally:
        file_lock.release()


@contextlib.contextmanager
def interprocess_lock(path: Path, what: str, *, timeout_s: float = 3600) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, after waiting for another process that holds it.

    Args:
        what: activity of that process for the message, e.g. "decoding these images".

    Raises:
        OSError: the directory cannot be written.
        ResourceError: it is still locked after `timeout_s` seconds.
    """
    from filelock import FileLock, Timeout

    file_lock = FileLock(path)
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        print_status(f"waiting: another process is {what}")
        try:
            file_lock.acquire(timeout=timeout_s)
        except Timeout:
            raise ResourceError(
                f"another process has been {what} for {timeout_s / 60:.0f} minutes",
                where=str(path),
                fix="end that process, then run the same command again",
            ) from None
    try:
        yield
    finally:
        file_lock.release()


class MemorySemaphore:
    """Limit the memory that threads use at the same time to `size` (in any unit).

    Requests of at most `free` are not counted; a request above `size` waits until it is alone.
    """

    def __init__(self, size: int, *, free: int) -> None:
        self._size, self._left, self._free = size, size, free
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def acquire(self, size: int) -> Iterator[None]:
        """Wait until `size` is available, and reserve it within the block."""
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
