"""Atomic writes, temporary files, checksums and locks."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from convlens.errors import ResourceError
from convlens.utils import files

FOLDER = Path("deep/er")
TARGET = FOLDER / "file"


def names_in_folder() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir())


def test_write_creates_folders_and_leaves_no_temporary_file() -> None:
    files.write_atomic(TARGET, b"\x00\xff")
    assert TARGET.read_bytes() == b"\x00\xff"
    files.write_atomic(TARGET, "später")
    assert TARGET.read_bytes() == "später".encode()
    assert names_in_folder() == ["file"]


def test_written_file_has_the_usual_permissions() -> None:
    before = os.umask(0o027)
    try:
        files.write_atomic(TARGET, b"")
    finally:
        os.umask(before)
    assert TARGET.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
def test_failed_write_keeps_the_old_file_and_no_temporary_file(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_atomic(TARGET, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResourceError) as caught:
        files.write_atomic(TARGET, b"new")
    assert TARGET.read_bytes() == b"old"
    assert names_in_folder() == ["file"]
    assert "free disk space" in caught.value.fix
    assert caught.value.where == str(TARGET)
    assert caught.value.exit_code == 5


FOLDER_FSYNC, MODES = "fsync of folders", "chmod"


def patch_file_system(call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a call of the file system fail with this error number."""
    fsync = os.fsync

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    def fsync_files_only(handle: int) -> None:
        fail() if os.path.isdir(f"/proc/self/fd/{handle}") else fsync(handle)

    if call == MODES:
        monkeypatch.setattr(os, "chmod", fail)
    else:
        monkeypatch.setattr(os, "fsync", fsync_files_only if call == FOLDER_FSYNC else fail)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("call", "number", "written"),
    [
        (FOLDER_FSYNC, errno.EINVAL, True),
        (FOLDER_FSYNC, errno.ENOTSUP, True),
        (FOLDER_FSYNC, errno.EIO, False),
        (FOLDER_FSYNC, errno.ENOSPC, False),
        ("fsync", errno.EINVAL, False),  # of the contents, which may then be lost
        (MODES, errno.EPERM, True),
        (MODES, errno.ENOSYS, True),
        (MODES, errno.EIO, False),
        (MODES, errno.EROFS, False),
    ],
)
def test_unsupported_operations_of_a_file_system_are_ignored(
    call: str, number: int, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vfat, CIFS and FUSE may lack fsync of folders, or modes."""
    FOLDER.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch_file_system(call, number, patch)
        if written:
            files.write_atomic(TARGET, b"new")
        else:
            with pytest.raises(ResourceError, match=f"can't write: {os.strerror(number)}"):
                files.write_atomic(TARGET, b"new")
    if written:
        assert TARGET.read_bytes() == b"new"
        assert names_in_folder() == ["file"]


def test_unreadable_folder_can_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    FOLDER.mkdir(parents=True)
    real = os.open

    def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if Path(path) == FOLDER:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", opened)
    files.write_atomic(TARGET, b"new")
    assert TARGET.read_bytes() == b"new"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("by_lock", [False, True])
def test_new_folders_are_fsynced_before_their_contents(
    by_lock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of a file does not save the names of the folders above it (POSIX)."""
    synced, real, here = list[str](), os.fsync, Path.cwd()

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.append(str(path.relative_to(here)) if path.is_dir() else "contents")
        real(handle)

    Path("models").mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    if by_lock:  # creates the folder, as for a run
        with files.lock(Path("models/run/.lock"), what="x"):
            assert synced == ["models"]
        synced.clear()
    files.write_atomic(Path("models/run/state/file"), b"")
    new = ["models/run"] if by_lock else ["models/run", "models"]
    assert synced == [*new, "contents", "models/run/state"]
    synced.clear()
    files.write_atomic(Path("models/run/state/file"), b"")
    assert synced == ["contents", "models/run/state"]


def test_low_disk_space_causes_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = shutil.disk_usage(".").free
    files.warn_if_low_disk(Path("models/run"), min(1000, free))
    assert capsys.readouterr().err == ""
    files.warn_if_low_disk(Path("models/run"), 1 << 60)
    warning = capsys.readouterr().err
    assert "MB are free for models/run" in warning
    assert "at least 1,099,511,627,776 MB" in warning
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))  # type: ignore[attr-defined]
    files.warn_if_low_disk(Path("models/run"), 1 << 60)  # not known
    assert capsys.readouterr().err == ""


def test_interrupted_write_keeps_the_old_file_and_no_temporary_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files.write_atomic(TARGET, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(TARGET, b"new")
    assert TARGET.read_bytes() == b"old"
    assert names_in_folder() == ["file"]


def test_folder_that_cannot_be_created_is_a_resource_error() -> None:
    Path("plain").write_text("a file")
    with pytest.raises(ResourceError, match="can't write"):
        files.write_atomic(Path("plain/file"), b"")
    TARGET.mkdir(parents=True)
    with pytest.raises(ResourceError, match="can't write"):
        files.write_atomic(TARGET, b"")
    assert names_in_folder() == ["file"]


def test_process_killed_while_writing_leaves_a_complete_file() -> None:
    code = """
import itertools
from pathlib import Path
from convlens.utils.files import write_atomic
for i in itertools.count():
    write_atomic(Path("big"), bytes([i % 256]) * 3_000_000)
"""
    writer = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(3):
        seen = _wait_for_change(Path("big"))
        assert seen.is_file()
    writer.kill()
    writer.wait()
    content = Path("big").read_bytes()
    assert len(content) == 3_000_000
    assert content == content[:1] * 3_000_000


def _wait_for_change(path: Path) -> Path:
    before = path.stat().st_ino if path.exists() else None
    for _ in range(6000):
        if path.exists() and path.stat().st_ino != before:
            return path
        time.sleep(0.005)
    raise TimeoutError(path)


STALE = ".file.abcdefg_.part"
KILLED = """
import os, signal
from pathlib import Path
from convlens.utils import files
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
with files.lock(Path("deep/er/.lock"), what="x"):
    files.write_atomic(Path("deep/er/file"), b"half of it")
"""


def test_next_lock_deletes_temporary_files_of_a_killed_process() -> None:
    FOLDER.mkdir(parents=True)  # otherwise it is killed while it creates the folder
    subprocess.run([sys.executable, "-c", KILLED], check=False)
    names = [name for name in names_in_folder() if name.endswith(files.PART)]
    assert len(names) == 1
    assert (FOLDER / names[0]).read_bytes() == b"half of it"
    with files.lock(FOLDER / ".lock", what="x", owned=["other"]):
        assert names[0] in names_in_folder()
    with files.lock(FOLDER / ".lock", what="x", owned=["other", "file"]):
        assert names_in_folder() == [".lock"]


def test_only_temporary_files_of_the_given_names_are_deleted() -> None:
    others = [
        ".file.json.abcdefgh.part",
        ".other.abcdefgh.part",
        ".file.original",
        ".file.abcdefgh",
        "file",
        ".file.part",
        ".file.abcdefgh.part.zip",
        ".Xfile.abcdefgh.part",
        "file.part",
        ".file.ABCDEFGH.part",
    ]
    FOLDER.mkdir(parents=True)
    for name in (STALE, *others):
        (FOLDER / name).touch()
    (FOLDER / ".file.12345678.part").mkdir()  # a folder
    files.remove_stale_temp_files(FOLDER, ["file"], alone=True)
    assert names_in_folder() == sorted([*others, ".file.12345678.part"])
    files.remove_stale_temp_files(FOLDER / "none", ["file"], alone=True)


def test_without_a_lock_only_old_temporary_files_are_deleted() -> None:
    FOLDER.mkdir(parents=True)
    young, old = FOLDER / STALE, FOLDER / ".file.12345678.part"
    for path in (young, old):
        path.touch()
    os.utime(old, (time.time() - 3700,) * 2)
    os.utime(young, (time.time() - 3400,) * 2)
    files.remove_stale_temp_files(FOLDER, ["file"], alone=False)
    assert names_in_folder() == [STALE]


def test_failed_lock_does_not_delete_files_of_its_holder() -> None:
    holder = start_holder(60)
    (FOLDER / STALE).touch()
    with pytest.raises(ResourceError), files.lock(FOLDER / ".lock", what="x", owned=["file"]):
        pass
    assert STALE in names_in_folder()
    holder.kill()
    holder.wait()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOSPC, errno.ESTALE])
def test_system_errors_are_reported_with_their_message(number: int) -> None:
    error = OSError(number, os.strerror(number))
    reading, writing = files.cannot_read("a/file", error), files.cannot_write(Path("a/file"), error)
    assert (reading.what, reading.where) == (f"can't read: {os.strerror(number)}", "a/file")
    assert (writing.what, writing.where) == (f"can't write: {os.strerror(number)}", "a/file")
    assert reading.exit_code == writing.exit_code == 5
    assert reading.fix
    assert writing.fix


def test_disk_errors_are_distinguished_from_others() -> None:
    for number in (errno.EIO, errno.EBADMSG, errno.EUCLEAN):
        assert files.is_io_error(OSError(number, os.strerror(number)))
    for number in (errno.EACCES, errno.EMFILE, errno.ENOSPC):
        assert not files.is_io_error(OSError(number, os.strerror(number)))


def test_sha256_of_a_file() -> None:
    # FIPS 180-2, appendix B.1.
    Path("abc").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(Path("abc")) == digest
    big = os.urandom(3_000_000)
    Path("big").write_bytes(big)
    assert files.sha256(Path("big")) == hashlib.sha256(big).hexdigest()


def test_lock_has_only_one_holder() -> None:
    path = FOLDER / ".lock"
    with files.lock(path, what="run 'x'"), pytest.raises(ResourceError) as caught:  # noqa: SIM117
        with files.lock(path, what="run 'x'"):
            raise AssertionError("two holders")
    assert caught.value.what == "another process is using run 'x'"
    assert caught.value.where == str(FOLDER)
    assert caught.value.exit_code == 5
    with files.lock(path, what="run 'x'"):
        assert names_in_folder() == [".lock"]


def test_lock_is_released_after_an_error() -> None:
    path = FOLDER / ".lock"
    with pytest.raises(ZeroDivisionError), files.lock(path, what="x"):
        raise ZeroDivisionError
    with files.lock(path, what="x"):
        pass
    assert names_in_folder() == [".lock"]


def test_lock_file_that_cannot_be_written_is_a_resource_error() -> None:
    Path("plain").write_text("a file")
    with (
        pytest.raises(ResourceError, match="can't write"),
        files.lock(Path("plain/.lock"), what="x"),
    ):
        pass


def start_holder(seconds: int) -> subprocess.Popen[str]:
    """Start a process that holds the lock for so many seconds; return when it does."""
    code = """
import time
from pathlib import Path
from convlens.utils.files import lock
with lock(Path("deep/er/.lock"), what="x"):
    print("locked", flush=True)
    time.sleep(SECONDS)
""".replace("SECONDS", str(seconds))
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    return holder


def test_lock_of_a_killed_process_is_released() -> None:
    holder = start_holder(60)
    with pytest.raises(ResourceError, match="another process is using x"):  # noqa: SIM117
        with files.lock(FOLDER / ".lock", what="x"):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with files.lock(FOLDER / ".lock", what="x"):
        pass


def test_lock_waits_for_its_holder() -> None:
    holder = start_holder(1)
    with files.lock(FOLDER / ".lock", what="x", timeout_s=60):
        assert holder.wait(120) == 0


def disable_locks(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make locks fail, as on a file system without them."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_file_system_without_locks_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    disable_locks(errno.ENOLCK, monkeypatch)
    with pytest.raises(ResourceError, match="No locks available") as caught:  # noqa: SIM117
        with files.lock(FOLDER / ".lock", what="x"):
            raise AssertionError("locked")
    assert caught.value.where == str(FOLDER / ".lock")
