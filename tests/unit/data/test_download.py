"""Downloads: mirrors, checksums, unpacking, failures, and two processes that need one file."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import os
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
from helpers.datasets import cifar10_files, write_idx_files
from helpers.serving import Pages, serving

pytestmark = pytest.mark.usefixtures("data_root")

CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"


class SlowPages(Pages):
    """Sends `head`, then waits for the event `resume` before it sends the page."""

    head, length = b"", 1 << 20
    resume: threading.Event
    status = 200

    def do_GET(self) -> None:  # noqa: N802
        self.requested.append(self.path)
        if self.status != 200:
            self.send_error(self.status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(self.length))
        self.end_headers()
        self.wfile.write(self.head)
        if not self.resume.wait(300):
            return
        self.wfile.write(self.pages[self.path])


@pytest.fixture
def slow_server() -> Iterator[tuple[str, type[SlowPages]]]:
    with serving(SlowPages) as (url, handler):
        assert issubclass(handler, SlowPages)
        handler.resume = threading.Event()
        yield url, handler
        handler.resume.set()


def download_failure(url: str, folder: Path) -> str:
    """Return the message of a failed download; check that it leaves no file behind."""
    with pytest.raises(DownloadError) as caught:
        fetch(url, "file", folder, known_hash="sha256:0")
    assert list(folder.iterdir()) == []
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "target"
    target.mkdir()
    return target


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_file_is_verified_by_its_hash_or_its_first_digits(
    slow_server: tuple[str, type[SlowPages]], folder: Path, algorithm: str
) -> None:
    url, handler = slow_server
    content = bytes(range(256)) * 3000  # several chunks
    handler.length, handler.pages["/file"] = len(content), content
    handler.resume.set()
    digits = hashlib.new(algorithm, content).hexdigest()
    for known in (digits, digits[:8]):
        path = fetch(url + "file", "file", folder, known_hash=f"{algorithm}:{known}")
        assert path.parent == folder
        assert path.name.startswith(".file.")  # temporary: the caller renames it
        assert path.read_bytes() == content
        path.unlink()
    assert "wrong checksum" in download_failure(url + "file", folder)


def test_progress_reaches_the_size_of_the_file(
    slow_server: tuple[str, type[SlowPages]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = slow_server
    content = bytes(download.CHUNK_BYTES * 2)
    handler.length, handler.pages["/file"] = len(content), content
    handler.resume.set()
    shown: list[object] = []

    class RecordedBar:
        def advance(self, amount: int, text: str | None = None) -> None:
            shown.append(amount)

    @contextlib.contextmanager
    def progress(description: str, total: int) -> Iterator[RecordedBar]:
        shown.extend([description, total])
        yield RecordedBar()

    monkeypatch.setattr(download, "progress_bar", progress)
    digest = hashlib.md5(content).hexdigest()
    fetch(url + "file", "file", folder, known_hash=f"md5:{digest}").unlink()
    chunk = download.CHUNK_BYTES
    assert shown[:4] == ["downloading file", 2 * chunk, chunk, chunk]


def test_a_full_disk_is_not_reported_as_a_network_error(
    slow_server: tuple[str, type[SlowPages]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = slow_server
    handler.length, handler.pages["/file"] = 5, b"12345"
    handler.resume.set()

    def raise_disk_full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdopen", raise_disk_full)
    with pytest.raises(OSError, match="No space left"):
        fetch(url + "file", "file", folder, known_hash="sha256:0")
    assert list(folder.iterdir()) == []


def test_a_stalled_server_times_out(
    slow_server: tuple[str, type[SlowPages]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = slow_server
    monkeypatch.setattr(download, "SOCKET_TIMEOUT_S", 0.3)
    handler.head = b"x" * 100_000
    assert "timed out" in download_failure(url + "file", folder)


@pytest.mark.parametrize("status", [403, 500, 503])
def test_the_http_status_of_a_refusal_is_reported(
    slow_server: tuple[str, type[SlowPages]], folder: Path, status: int
) -> None:
    url, handler = slow_server
    handler.status = status
    assert download_failure(url + "file", folder).startswith(f"HTTP {status} ")


def test_an_unknown_host_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = "http://nowhere.invalid/"  # RFC 6761: never resolves
    # "Name or service not known", "Temporary failure in name resolution"
    assert "name" in download_failure(url, folder).lower()
    dataset = replace(download.DOWNLOADS["mnist"], mirrors=(url, url))
    monkeypatch.setitem(download.DOWNLOADS, "mnist", dataset)
    with pytest.raises(DataError, match=r"nowhere\.invalid") as caught:
        find_source("mnist")
    assert "train-images-idx3-ubyte.gz" in caught.value.fix


@pytest.fixture
def server() -> Iterator[tuple[str, type[Pages]]]:
    with serving() as running:
        yield running


def tar_gz(files: dict[str, bytes], extra: dict[str, bytes] | None = None) -> bytes:
    """Return a tar of `extra`, `files` and a link to /etc/passwd."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in {**(extra or {}), **files}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("cifar-10-batches-bin/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return stream.getvalue()


def set_cifar10(monkeypatch: pytest.MonkeyPatch, url: str, content: bytes) -> None:
    """Make `url` the only mirror of CIFAR-10, and `content` its archive."""
    dataset = download.DOWNLOADS["cifar10"]
    archive = replace(dataset.archives[0], md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(
        download.DOWNLOADS, "cifar10", replace(dataset, mirrors=(url,), archives=(archive,))
    )


CIFAR = {f"{CIFAR_FOLDER}/{name}": content for name, content in cifar10_files().items()}


def test_only_expected_members_of_an_archive_are_unpacked(
    data_root: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, type[Pages]]
) -> None:
    url, handler = server
    unexpected = ("../evil.bin", "/tmp/convlens-evil.bin", f"{CIFAR_FOLDER}/other")
    content = tar_gz(CIFAR, dict.fromkeys(unexpected, b"x"))
    handler.pages[f"/{CIFAR_ARCHIVE}"] = content
    set_cifar10(monkeypatch, url, content)
    folder = data_root / CIFAR_FOLDER
    folder.mkdir(parents=True)
    (folder / f".{CIFAR_ARCHIVE}.abcdefgh.part").touch()  # left by a killed process
    unpacked = folder / ".test_batch.bin.abcdefgh.part"
    unpacked.touch()
    os.utime(unpacked, (0, 0))
    for _ in range(2):
        assert len(find_source("cifar10").parts["train"].labels) == 20
    assert len(handler.requested) == 1
    names = {p.name for p in (data_root / CIFAR_FOLDER).iterdir()}
    assert names - {".download.lock"} == set(cifar10_files())
    assert sorted(p.name for p in data_root.iterdir()) == [CIFAR_FOLDER]
    assert not Path("/tmp/convlens-evil.bin").exists()


def test_the_second_mirror_is_used_if_the_first_fails(
    data_root: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, type[Pages]]
) -> None:
    url, handler = server
    write_idx_files(data_root / "made")
    archives = []
    for archive in download.DOWNLOADS["mnist"].archives:
        content = gzip.compress((data_root / "made" / archive.members[0]).read_bytes())
        handler.pages[f"/good/{archive.file}"] = content
        archives.append(replace(archive, md5=hashlib.md5(content).hexdigest()))
    dataset = replace(
        download.DOWNLOADS["mnist"], mirrors=(url + "bad/", url + "good/"), archives=tuple(archives)
    )
    monkeypatch.setitem(download.DOWNLOADS, "mnist", dataset)
    assert len(find_source("mnist").parts["train"].labels) == 20


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("404", "HTTP 404"),
        ("html", "web page"),
        ("checksum", "wrong checksum"),
        ("half", "IncompleteRead"),
        ("refused", "refused"),
    ],
)
def test_a_failed_download_says_which_files_to_put_where(
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: tuple[str, type[Pages]],
    failure: str,
    message: str,
) -> None:
    url, handler = server
    content = tar_gz(CIFAR)
    set_cifar10(monkeypatch, "http://127.0.0.1:9/" if failure == "refused" else url, content)
    bad = {"html": b"<html>log in</html>", "checksum": content[:-1] + b"?", "half": content}
    if failure in bad:
        handler.pages[f"/{CIFAR_ARCHIVE}"] = bad[failure]
    handler.truncate = failure == "half"
    with pytest.raises(DataError, match=message) as caught:
        find_source("cifar10")
    error = caught.value
    assert str(data_root / CIFAR_FOLDER) in error.where
    assert f"{CIFAR_ARCHIVE} into {data_root}" in error.fix
    assert f"{data_root / 'cifar10'}/{{train,test}}" in error.fix
    assert "digits" in error.fix
    remaining = {p.name for p in (data_root / CIFAR_FOLDER).iterdir()}
    assert remaining <= {".download.lock"}


def test_pickle_folders_are_mentioned_and_never_loaded(data_root: Path) -> None:
    (data_root / "cifar-10-batches-py").mkdir()
    (data_root / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match="contains pickles, which are never loaded") as caught:
        find_source("cifar10")
    assert CIFAR_ARCHIVE in caught.value.fix


def test_a_manually_provided_archive_is_used_if_its_checksum_is_right(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tar_gz(CIFAR)
    (data_root / CIFAR_ARCHIVE).write_bytes(content)
    with pytest.raises(DataError, match="MD5"):
        find_source("cifar10")
    set_cifar10(monkeypatch, "http://127.0.0.1:9/", content)
    assert len(find_source("cifar10").parts["train"].labels) == 20
    assert (data_root / CIFAR_ARCHIVE).exists()


def test_only_the_missing_mnist_files_are_named(data_root: Path) -> None:
    write_idx_files(data_root / "MNIST" / "raw")
    (data_root / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError) as caught:
        find_source("mnist")
    assert "put t10k-labels-idx1-ubyte.gz into" in caught.value.fix
    assert "train-images" not in caught.value.fix


# Downloads CIFAR-10 from a mirror (first argument) with an archive of some MD5 (second argument).
CHILD = """
import os
import sys
from dataclasses import replace
from pathlib import Path
from convlens.data import download
dataset = download.DOWNLOADS["cifar10"]
archive = replace(dataset.archives[0], md5=sys.argv[2])
download.DOWNLOADS["cifar10"] = replace(dataset, mirrors=(sys.argv[1],), archives=(archive,))
print(download.ensure_downloaded("cifar10", [Path(os.environ["CONVLENS_DATA"])]).name)
"""


def test_two_processes_download_a_file_once(
    slow_server: tuple[str, type[SlowPages]], data_root: Path
) -> None:
    url, handler = slow_server
    content = tar_gz(CIFAR)
    handler.length, handler.pages[f"/{CIFAR_ARCHIVE}"] = len(content), content
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
    deadline = time.monotonic() + 120
    while not handler.requested:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = start()
    assert second.stderr is not None
    assert "another process is downloading cifar10" in second.stderr.readline()
    handler.resume.set()
    for process in (first, second):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, f"{CIFAR_FOLDER}\n"), err
    assert handler.requested == [f"/{CIFAR_ARCHIVE}"]
    names = {path.name for path in (data_root / CIFAR_FOLDER).iterdir()}
    assert names == {*cifar10_files(), ".download.lock"}
