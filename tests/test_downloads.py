"""Downloads over a network that stalls, trickles or refuses, and two processes at one of them."""

from __future__ import annotations

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

from commands import environment
from convlens.data import downloads, fetching
from convlens.data.fetching import DownloadError, fetch
from convlens.data.sources import find
from convlens.errors import DataError
from serving import Pages, serving

FILES = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]


class Slow(Pages):
    """Sends `head`, then `drop` every `pause` seconds, or waits for `go` where there is no drop."""

    head, drop, pause, length = b"", b"", 0.02, 1 << 20
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
        try:
            while self.drop and not self.go.wait(self.pause):
                self.wfile.write(self.drop)
        except OSError:
            return  # nobody listens any more
        if not self.go.wait(60):
            return
        self.wfile.write(self.pages[self.path])


@pytest.fixture
def slow() -> Iterator[tuple[str, type[Slow]]]:
    with serving(Slow) as (url, handler):
        assert issubclass(handler, Slow)
        handler.go = threading.Event()
        yield url, handler
        handler.go.set()


def refusal(url: str, folder: Path) -> tuple[str, float]:
    """What is said, and after how many seconds; nothing is left behind."""
    start = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        fetch(url, "file", folder, sha256="0")
    assert list(folder.iterdir()) == []
    return str(caught.value), time.monotonic() - start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "into"
    place.mkdir()
    return place


def test_a_server_that_stalls(
    slow: tuple[str, type[Slow]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = slow
    monkeypatch.setattr(fetching, "TIMEOUT", 0.3)
    handler.head = b"x" * 100_000
    said, seconds = refusal(url + "file", folder)
    assert "timed out" in said
    assert seconds < 20


def test_a_server_that_trickles(
    slow: tuple[str, type[Slow]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = slow
    monkeypatch.setattr(fetching, "PATIENCE", 0.4)
    handler.drop = b"x"  # 50 bytes a second: the 1 MiB would take six hours
    said, seconds = refusal(url + "file", folder)
    assert "bytes in 0.4 s" in said
    assert seconds < 20


def test_a_slow_server_that_is_fast_enough(
    slow: tuple[str, type[Slow]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = slow
    monkeypatch.setattr(fetching, "PATIENCE", 0.2)
    monkeypatch.setattr(fetching, "LEAST", 10)
    handler.drop = b"x" * 1000
    threading.Timer(1, handler.go.set).start()
    handler.pages["/file"] = b"y" * (1 << 20)
    said, seconds = refusal(url + "file", folder)
    assert said == "wrong checksum"  # all of it came
    assert seconds > 0.9


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_server_that_refuses(slow: tuple[str, type[Slow]], folder: Path, status: int) -> None:
    url, handler = slow
    handler.status = status
    said, _ = refusal(url + "file", folder)
    assert said.startswith(f"HTTP {status} ")


def test_a_server_that_nobody_knows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = "http://nowhere.invalid/"  # RFC 6761: never a name
    said, _ = refusal(url, folder)
    assert "name" in said.lower()  # "Name or service not known", "... in name resolution"
    its = replace(downloads.SETS["mnist"], mirrors=(url, url))
    monkeypatch.setitem(downloads.SETS, "mnist", its)
    with pytest.raises(DataError, match=r"nowhere\.invalid") as caught:
        find("mnist")
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
from convlens.data import downloads
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
            [sys.executable, "-c", CHILD, url, digest], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip

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
