"""Files are whole or absent, and a lock has one holder."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convlens import files
from convlens.errors import ResourceError

FOLDER = Path("deep/er")
TARGET = FOLDER / "file"


def left() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir())


def test_writing_makes_folders_and_leaves_nothing_beside_the_file() -> None:
    files.write_atomic(TARGET, b"\x00\xff")
    assert TARGET.read_bytes() == b"\x00\xff"
    files.write_atomic(TARGET, "später")
    assert TARGET.read_bytes() == "später".encode()
    assert left() == ["file"]


def test_a_written_file_is_as_public_as_any_other() -> None:
    before = os.umask(0o027)
    try:
        files.write_atomic(TARGET, b"")
    finally:
        os.umask(before)
    assert TARGET.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_atomic(TARGET, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResourceError) as caught:
        files.write_atomic(TARGET, b"new")
    assert TARGET.read_bytes() == b"old"
    assert left() == ["file"]
    assert "free some disk space" in caught.value.fix
    assert caught.value.where == str(TARGET)
    assert caught.value.exit_code == 5


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files.write_atomic(TARGET, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(TARGET, b"new")
    assert TARGET.read_bytes() == b"old"
    assert left() == ["file"]


def test_a_folder_that_cannot_be_made_is_a_resource_error() -> None:
    Path("plain").write_text("a file")
    with pytest.raises(ResourceError, match="can't write"):
        files.write_atomic(Path("plain/file"), b"")
    TARGET.mkdir(parents=True)
    with pytest.raises(ResourceError, match="can't write"):
        files.write_atomic(TARGET, b"")
    assert left() == ["file"]


def test_a_process_killed_while_writing_leaves_a_whole_file() -> None:
    code = """
import itertools
from pathlib import Path
from convlens.files import write_atomic
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


LEFT = ".file.abcdefg_.part"
KILLED = """
import os, signal
from pathlib import Path
from convlens import files
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
with files.lock(Path("deep/er/.lock"), what="x"):
    files.write_atomic(Path("deep/er/file"), b"half of it")
"""


def test_what_a_killed_write_left_goes_with_the_next_lock() -> None:
    subprocess.run([sys.executable, "-c", KILLED], check=False)
    names = [name for name in left() if name.endswith(files.PART)]
    assert len(names) == 1
    assert (FOLDER / names[0]).read_bytes() == b"half of it"
    with files.lock(FOLDER / ".lock", what="x", owned=["other"]):
        assert names[0] in left()
    with files.lock(FOLDER / ".lock", what="x", owned=["other", "file"]):
        assert left() == [".lock", ".lock.owner"]


def test_only_what_was_left_of_that_very_file_goes() -> None:
    others = [
        ".file.json.abcdefgh.part", ".other.abcdefgh.part", ".file.original", ".file.abcdefgh",
        "file", ".file.part", ".file.abcdefgh.part.zip", ".Xfile.abcdefgh.part", "file.part",
        ".file.ABCDEFGH.part",
    ]  # fmt: skip
    FOLDER.mkdir(parents=True)
    for name in (LEFT, *others):
        (FOLDER / name).touch()
    (FOLDER / ".file.12345678.part").mkdir()  # no file of ours
    files.sweep(FOLDER, ["file"], alone=True)
    assert left() == sorted([*others, ".file.12345678.part"])
    files.sweep(FOLDER / "none", ["file"], alone=True)


def test_without_a_lock_only_what_is_old_goes() -> None:
    FOLDER.mkdir(parents=True)
    young, old = FOLDER / LEFT, FOLDER / ".file.12345678.part"
    for path in (young, old):
        path.touch()
    os.utime(old, (time.time() - 3700,) * 2)
    os.utime(young, (time.time() - 3400,) * 2)
    files.sweep(FOLDER, ["file"], alone=False)
    assert left() == [LEFT]


def test_a_lock_that_is_held_leaves_what_its_holder_writes() -> None:
    holder = holding(60)
    (FOLDER / LEFT).touch()
    with pytest.raises(ResourceError), files.lock(FOLDER / ".lock", what="x", owned=["file"]):
        pass
    assert LEFT in left()
    holder.kill()
    holder.wait()


@pytest.mark.parametrize(
    ("number", "said", "lost"),
    [
        (errno.EIO, "its disk may be failing: restore it from a copy", True),
        (errno.EUCLEAN, "its disk may be failing", True),
        (errno.EMFILE, "ulimit -n", False),
        (errno.EACCES, "change its permissions", False),
        (errno.ESTALE, "that its disk or network works", False),
    ],
)
def test_what_can_not_be_read_says_what_to_do(number: int, said: str, lost: bool) -> None:
    error = OSError(number, os.strerror(number))
    told = files.cannot_read("some/file", error)
    assert (told.what, told.where) == (f"can't read: {os.strerror(number)}", "some/file")
    assert said in told.fix
    assert files.lost(error) == lost


def test_sha256_of_a_file() -> None:
    # FIPS 180-2, appendix B.1.
    Path("abc").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(Path("abc")) == digest
    big = os.urandom(3_000_000)
    Path("big").write_bytes(big)
    assert files.sha256(Path("big")) == hashlib.sha256(big).hexdigest()


def test_a_lock_has_one_holder_who_is_named() -> None:
    path = FOLDER / ".lock"
    with files.lock(path, what="run 'x'"), pytest.raises(ResourceError) as caught:  # noqa: SIM117
        with files.lock(path, what="run 'x'"):
            raise AssertionError("two holders")
    assert caught.value.what.startswith(f"run 'x' is in use by process {os.getpid()} on ")
    with files.lock(path, what="run 'x'"):
        assert path.exists()
    assert left() == [".lock"]


def test_a_lock_is_given_back_after_an_error() -> None:
    path = FOLDER / ".lock"
    with pytest.raises(ZeroDivisionError), files.lock(path, what="x"):
        raise ZeroDivisionError
    with files.lock(path, what="x"):
        pass
    assert left() == [".lock"]


def test_a_lock_that_cannot_be_written_is_a_resource_error() -> None:
    Path("plain").write_text("a file")
    with (
        pytest.raises(ResourceError, match="can't write"),
        files.lock(Path("plain/.lock"), what="x"),
    ):
        pass


def holding(seconds: int) -> subprocess.Popen[str]:
    """A process that holds the lock by now, for so many seconds."""
    code = """
import time
from pathlib import Path
from convlens.files import lock
with lock(Path("deep/er/.lock"), what="x"):
    print("held", flush=True)
    time.sleep(SECONDS)
""".replace("SECONDS", str(seconds))
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_killed_process_leaves_no_lock_behind() -> None:
    holder = holding(60)
    with pytest.raises(ResourceError, match=f"process {holder.pid}"):  # noqa: SIM117
        with files.lock(FOLDER / ".lock", what="x"):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with files.lock(FOLDER / ".lock", what="x"):
        pass


def test_a_dead_holder_is_not_named() -> None:
    """The next holder has the lock a moment before it writes who it is."""
    path = FOLDER / ".lock"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with files.lock(path, what="x"):
        owner = path.with_suffix(".owner")
        own = owner.read_text()
        for left_over, named in (
            (own.replace(str(os.getpid()), str(dead.pid)), "another process"),
            ("", "another process"),
            ("process 1 on elsewhere", "process 1 on elsewhere"),  # nobody can tell from here
            (own, own),
        ):
            owner.write_text(left_over)
            with pytest.raises(ResourceError) as caught, files.lock(path, what="x"):
                pass
            assert caught.value.what == f"x is in use by {named}"
        owner.unlink()
        with pytest.raises(ResourceError, match="another process"), files.lock(path, what="x"):
            pass


def test_a_lock_can_be_waited_for() -> None:
    holder = holding(1)
    with files.lock(FOLDER / ".lock", what="x", patience=60):
        assert holder.wait(10) == 0
