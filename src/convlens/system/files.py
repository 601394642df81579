"""Files that are either whole or absent: atomic fsynced writes, hashes, locks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.markup import escape

from convlens.errors import ResourceError
from convlens.system.console import print_status

PART = ".part"  # how the name of what isn't whole yet ends
ABANDONED = 3600.0  # seconds that nobody wrote to it
PROBE = b"\0" * 4096  # of the size of a block
# Answers of a file system that has no modes, or no fsync of folders (vfat, CIFS, FUSE); none of
# them means that what was written is lost.
UNKNOWN = (errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

# What to do about what a file system answers to a write.
_ROOM = "free some disk space and run the same command again"
_MANY = "close other programs, or raise the limit (ulimit -n), and run the same command again"
_FAR = "see that its network disk is still there, and run the same command again"
FIXES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EMFILE: _MANY,
    errno.ENFILE: _MANY,
    errno.ESTALE: _FAR,
    errno.ENOTCONN: _FAR,
    errno.ETIMEDOUT: _FAR,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) and run the same command again",
    errno.EROFS: "its disk is mounted read-only (the system does so when one fails): mount it for "
    "writing, or choose another folder",
    errno.ENOLCK: "its file system gives no locks (of NFS, a lock service that doesn't run): "
    "choose another folder",
}


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
        make(path.parent)
        handle, temporary = part_of(path)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            for part in rest:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a result is an ordinary file.
        with _unless_unknown():
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


def make(folder: Path) -> None:
    """Makes a folder and those above it; the names of new ones are on the disk, too.

    Raises:
        OSError: it can't be made.
    """
    if not folder.is_dir():
        new = [each for each in (folder, *folder.parents) if not each.is_dir()]
        folder.mkdir(parents=True, exist_ok=True)
        for each in new:
            _sync_folder(each.parent)


def probe(*folders: Path) -> None:
    """Writes a small file where each folder is, or will be, and deletes it again.

    For the beginning of what has its first result after hours.

    Raises:
        ResourceError: it can't be written there.
    """
    for folder in folders:
        path = _nearest(folder) / f".probe-{secrets.token_hex(4)}"
        try:
            write_atomic(path, PROBE)
            path.unlink()
        except ResourceError as error:
            error.where = str(folder)
            raise
        except OSError as error:
            raise cannot_write(folder, error) from error


def expect(folder: Path, size: int) -> None:
    """Says so where the disk obviously has no room for `size` bytes in a folder.

    No error: some network disks don't know what is free, and it may become more.
    """
    with contextlib.suppress(OSError):
        disk = shutil.disk_usage(_nearest(folder))
        if disk.free < size and disk.total:
            free, needed = disk.free / 2**20, size / 2**20
            print_status(
                f"[bold]little room[/]: {free:,.0f} MB are free for {escape(str(folder))}, and "
                f"weights and states will need at least {needed:,.0f} MB"
            )


def _nearest(folder: Path) -> Path:
    """The folder itself, or what there is of those above it."""
    return next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)


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
    fix = FIXES.get(error.errno or 0, "choose another folder, or change its permissions")
    if lost(error):
        fix = "its disk may be failing: see the system's log, and choose a folder on another disk"
    return ResourceError(f"can't write: {error.strerror or error}", where=str(path), fix=fix)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows can't open a folder; its rename is already durable.
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it may be written to and not read: then it can't be asked
        return
    try:
        with _unless_unknown():
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _unless_unknown() -> Iterator[None]:
    """Goes on where the file system doesn't know what is asked of it; no other error is hidden."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise


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
    from filelock import FileLock, SoftFileLock, Timeout

    owner = path.with_suffix(".owner")
    held = FileLock(path)
    try:
        make(path.parent)
        with warnings.catch_warnings():  # of another kind of lock: what it means is told below
            warnings.simplefilter("ignore")
            held.acquire(timeout=patience, poll_interval=0.01)
        _tell_gone(owner, what)
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        fix, where = "wait for it to end, or give this run another name with --name", path.parent
        if isinstance(held, SoftFileLock):  # filelock's own way out
            fix = "wait for it to end; or delete this file, if it has ended: locks of this file "
            fix, where = fix + "system outlive their process", path
        raise ResourceError(
            f"{what} is in use by {_named(owner)}", where=str(where), fix=fix
        ) from error
    except (OSError, NotImplementedError) as error:
        held.release()
        if not isinstance(error, OSError):  # older versions of filelock
            error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        raise cannot_write(path, error) from error
    try:
        if owned:
            sweep(path.parent, owned, alone=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink()
        held.release()


def _tell_gone(owner: Path, what: str) -> None:
    """Says whom another machine's file of a lock names, though the lock was to be had."""
    told = _read(owner)
    _, on, machine = told.rpartition(" on ")
    with contextlib.suppress(OSError):
        if on and machine != socket.gethostname():
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(owner.stat().st_mtime))
            print_status(
                f"[bold]{escape(what)}[/] was in use by {escape(told)} since {since}: it was "
                "killed, or locks don't reach across machines here (NFS with nolock, Lustre with "
                "localflock); see that it has ended: two at once spoil each other's files"
            )


def _named(owner: Path) -> str:
    """Who holds a lock, by the file beside it.

    A killed holder leaves that file behind, and the next one has the lock a moment before it
    writes its own: until then nobody is named rather than the dead.
    """
    told = _read(owner)
    process, _, machine = told.removeprefix("process ").partition(" on ")
    if process.isdecimal() and (machine != socket.gethostname() or _lives(int(process))):
        return told
    return "another process"


def _read(owner: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return owner.read_text()[:200]
    return ""


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
