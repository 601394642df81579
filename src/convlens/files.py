"""Files that are either whole or absent: atomic fsynced writes, hashes, locks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from convlens.errors import ResourceError

PART = ".part"  # how the name of what isn't whole yet ends
ABANDONED = 3600.0  # seconds that nobody wrote to it


def write_atomic(path: Path, content: bytes | str, *rest: memoryview) -> None:
    """Writes `path` whole or not at all, and returns only when it is on the disk.

    What is large can come in parts, from where it lies in memory.

    The temporary file lies beside the target (a rename across disks is a copy), and both the
    file and its folder are fsynced: without that, a power cut can leave an empty file behind
    the new name.

    Raises:
        ResourceError: the folder can't be written or the disk is full; the old file is intact.
    """
    data = content.encode() if isinstance(content, str) else content
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = part_of(path)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            for part in rest:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a result is an ordinary file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:  # a second Ctrl-C, too, leaves nothing behind
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def part_of(path: Path) -> tuple[int, str]:
    """A new file beside `path` for what is to become it, open, and its name.

    Raises:
        OSError: the folder can't be written.
    """
    return tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)


def sweep(folder: Path, names: Sequence[str], *, alone: bool) -> None:
    """Deletes what killed processes had begun to write of the files `names`.

    Args:
        alone: nobody else can be writing them, since who does holds the lock that the caller has;
            else only what wasn't written to for an hour is taken for left.
    """
    written = "|".join(re.escape(name) for name in names)
    # Twice: a part may have been written in parts, too.
    left = re.compile(rf"\.{{1,2}}({written})(\.[a-z0-9_]{{8}}{re.escape(PART)}){{1,2}}")
    with contextlib.suppress(OSError):
        for name in filter(left.fullmatch, os.listdir(folder)):
            with contextlib.suppress(OSError):
                path = folder / name
                if alone or time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()


def lost(error: OSError) -> bool:
    """Whether the disk can't give back what was written, or its file system is damaged."""
    return error.errno in (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))


def cannot_read(path: Path | str, error: OSError) -> ResourceError:
    """The `ResourceError` that explains why `path` could not be read."""
    fix = "see that it is a file, that its disk or network works, and run the same command again"
    if isinstance(error, PermissionError):
        fix = "change its permissions, and run the same command again"
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        fix = "close other programs, or raise the limit (ulimit -n), and run the same command again"
    if lost(error):
        fix = "its disk may be failing: restore it from a copy, or delete it if it can be made anew"
    return ResourceError(f"can't read: {error.strerror or error}", where=str(path), fix=fix)


def cannot_write(path: Path, error: OSError) -> ResourceError:
    """The `ResourceError` that explains why `path` could not be written."""
    fix = "choose another folder, or change its permissions"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some disk space and run the same command again"
    if error.errno == errno.EFBIG:
        fix = "raise the limit on the size of files (ulimit -f) and run the same command again"
    return ResourceError(f"can't write: {error.strerror or error}", where=str(path), fix=fix)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows can't open a folder; its rename is already durable.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(
    path: Path, *, what: str, patience: float = 0.0, owned: Sequence[str] = ()
) -> Iterator[None]:
    """Holds `path` as a kernel lock, so that a killed process leaves none behind.

    Args:
        patience: seconds to wait for another process that holds it.
        owned: names of files beside it that only its holder writes; what a killed one had begun
            of them is deleted.

    Raises:
        ResourceError: another process holds it; names that process and its machine.
    """
    from filelock import FileLock, Timeout

    owner = path.with_suffix(".owner")
    held = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=patience, poll_interval=0.01)
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        raise ResourceError(
            f"{what} is in use by {_named(owner)}",
            where=str(path.parent),
            fix="wait for it to end, or give this run another name with --name",
        ) from error
    except OSError as error:
        held.release()
        raise cannot_write(path, error) from error
    try:
        if owned:
            sweep(path.parent, owned, alone=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink()
        held.release()


def _named(owner: Path) -> str:
    """Who holds a lock, by the file beside it.

    A killed holder leaves that file behind, and the next one has the lock a moment before it
    writes its own: until then nobody is named rather than the dead.
    """
    with contextlib.suppress(OSError, ValueError):
        told = owner.read_text()
        process, _, machine = told.removeprefix("process ").partition(" on ")
        if process.isdecimal() and (machine != socket.gethostname() or _lives(int(process))):
            return told
    return "another process"


def _lives(process: int) -> bool:
    if os.name == "nt":  # there, asking by signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
