"""Downloads from a server that stalls or refuses, and two processes that need the same file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from convlens.data import download
from convlens.data.download import DownloadError, fetch
from convlens.data.sources import find_source
from convlens.errors import DataError
from helpers.commands import environment
from helpers.serving import Pages, serving

FILES = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]


class Slow(Pages):
    """Sends `head`, then waits for `go` before it sends the page."""

    head, length = b"", 1 << 20
    go: threading.Event
    status = 200

    def do_GET(self) -> None:  # noqa: N802
        self.asked.append(self.path)
        if self.status != 200:
            self.send_error(self.status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.length))
        self.end_headers()
        self.wfile.write(self.head)
        if not self.go.wait(300):
            return
        self.wfile.write(self.pages[self.path])


@pytest.fixture
def slow() -> Iterator[tuple[str, type[Slow]]]:
    with serving(Slow) as (url, handler):
        assert issubclass(handler, Slow)
        handler.go = threading.Event()
        yield url, handler
        handler.go.set()


def refusal(url: str, folder: Path) -> str:
    """The message of a download that fails; nothing is left behind."""
    with pytest.raises(DownloadError) as caught:
        fetch(url, "file", folder, known_hash="sha256:0")
    assert list(folder.iterdir()) == []
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "into"
    place.mkdir()
    return place


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_file_is_verified_by_its_hash_or_the_first_digits_of_it(
    slow: tuple[str, type[Slow]], folder: Path, algorithm: str
) -> None:
    url, handler = slow
    content = bytes(range(256)) * 3000  # several chunks
    handler.length, handler.pages["/file"] = len(content), content
    handler.go.set()
    digits = hashlib.new(algorithm, content).hexdigest()
    for known in (digits, digits[:8]):
        path = fetch(url + "file", "file", folder, known_hash=f"{algorithm}:{known}")
        assert path.parent == folder
        assert path.name.startswith(".file.")  # temporary: the caller gives it its name
        assert path.read_bytes() == content
        path.unlink()
    assert "wrong checksum" in refusal(url + "file", folder)


def test_progress_reaches_the_size_of_the_file(
    slow: tuple[str, type[Slow]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = slow
    content = bytes(download.CHUNK_BYTES * 2)
    handler.length, handler.pages["/file"] = len(content), content
    handler.go.set()
    shown: list[object] = []

    class Recorded:
        def advance(self, amount: int, text: str | None = None) -> None:
            shown.append(amount)

    @contextlib.contextmanager
    def progress(description: str, total: int) -> Iterator[Recorded]:
        shown.extend([description, total])
        yield Recorded()

    monkeypatch.setattr(download, "progress_bar", progress)
    digest = hashlib.md5(content).hexdigest()
    fetch(url + "file", "file", folder, known_hash=f"md5:{digest}").unlink()
    chunk = download.CHUNK_BYTES
    assert shown[:4] == ["downloading file", 2 * chunk, chunk, chunk]


def test_a_disk_that_is_full_is_not_a_failure_of_the_network(
    slow: tuple[str, type[Slow]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = slow
    handler.length, handler.pages["/file"] = 5, b"12345"
    handler.go.set()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fdopen", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(url + "file", "file", folder, known_hash="sha256:0")
    assert list(folder.iterdir()) == []


def test_a_server_that_stalls(
    slow: tuple[str, type[Slow]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = slow
    monkeypatch.setattr(download, "SOCKET_TIMEOUT_S", 0.3)
    handler.head = b"x" * 100_000
    assert "timed out" in refusal(url + "file", folder)


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_server_that_refuses(slow: tuple[str, type[Slow]], folder: Path, status: int) -> None:
    url, handler = slow
    handler.status = status
    assert refusal(url + "file", folder).startswith(f"HTTP {status} ")


def test_a_server_that_nobody_knows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = "http://nowhere.invalid/"  # RFC 6761: never a name
    assert (
        "name" in refusal(url, folder).lower()
    )  # "Name or service not known", "... in name resolution"
    its = replace(download.DOWNLOADS["mnist"], mirrors=(url, url))
    monkeypatch.setitem(download.DOWNLOADS, "mnist", its)
    with pytest.raises(DataError, match=r"nowhere\.invalid") as caught:
        find_source("mnist")
    assert "train-images-idx3-ubyte.gz" in caught.value.fix


def archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name in FILES:
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = 3073
            tar.addfile(info, io.BytesIO(bytes(3073)))
    return stream.getvalue()


CHILD = """
import sys
from dataclasses import replace
from convlens.data.dataset import downloads
from convlens.data.sources import find
its = downloads.SETS["cifar10"]
archive = replace(its.archives[0], md5=sys.argv[2])
downloads.SETS["cifar10"] = replace(its, mirrors=(sys.argv[1],), archives=(archive,))
print(len(find("cifar10").parts["train"].labels))
"""


def test_two_processes_at_one_download(slow: tuple[str, type[Slow]], tmp_path: Path) -> None:
    url, handler = slow
    content = archive()
    handler.length, handler.pages["/cifar-10-binary.tar.gz"] = len(content), content
    digest = hashlib.md5(content).hexdigest()

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, url, digest],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    first = start()
    until = time.monotonic() + 120
    while not handler.asked:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)
    second = start()
    assert second.stderr is not None
    assert "another process is downloading cifar10" in second.stderr.readline()
    handler.go.set()
    for process in (first, second):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "5\n"), err
    assert handler.asked == ["/cifar-10-binary.tar.gz"]
    there = {path.name for path in (tmp_path / "no-data" / "cifar-10-batches-bin").iterdir()}
    assert there == {*FILES, ".download.lock"}
