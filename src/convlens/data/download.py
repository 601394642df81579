"""Files of the built-in sets: found where torchvision would put them, or downloaded and checked.

Nothing here unpickles, and nothing is extracted but members of exactly the expected names.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from convlens.errors import DataError
from convlens.utils.console import ProgressBar, print_status, progress_bar
from convlens.utils.files import (
    cannot_write,
    interprocess_lock,
    open_temp,
    remove_stale_temp_files,
    write_atomic,
)

MAX_MEMBER_BYTES = 1 << 30  # bytes of an unpacked file; the largest of the sets has 221 MB
MAX_MEMBERS = 4 << 30  # of all in an archive, whether wanted or not; STL-10 has 3.1 GB


@dataclass(frozen=True)
class Archive:
    """One file to download: its name under each mirror, its MD5, and the files it holds."""

    file: str
    md5: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class DownloadSet:
    """A set's folder (below a data folder), mirrors and archives; `also` are other folders."""

    folder: str
    mirrors: tuple[str, ...]
    archives: tuple[Archive, ...]
    also: tuple[str, ...] = ()
    pickled: str = ""


def _idx_files(*md5: str) -> tuple[Archive, ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(
        Archive(f"{name}-ubyte.gz", check, (f"{name}-ubyte",))
        for name, check in zip(names, md5, strict=True)
    )


# Mirrors and MD5 sums as published by the sets' authors and torchvision.
DOWNLOADS: dict[str, DownloadSet] = {
    "mnist": DownloadSet(
        "MNIST/raw",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        _idx_files(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": DownloadSet(
        "FashionMNIST/raw",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        _idx_files(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "kmnist": DownloadSet(
        "KMNIST/raw",
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        _idx_files(
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
    ),
    "cifar10": DownloadSet(
        "cifar-10-batches-bin",
        ("https://www.cs.toronto.edu/~kriz/",),
        (
            Archive(
                "cifar-10-binary.tar.gz",
                "c32a1d4ab5d03f1284b67883e8d87530",
                (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
            ),
        ),
        pickled="cifar-10-batches-py",
    ),
    "cifar100": DownloadSet(
        "cifar-100-binary",
        ("https://www.cs.toronto.edu/~kriz/",),
        (
            Archive(
                "cifar-100-binary.tar.gz",
                "03b5dce01913d631647c71ecec9e9cb8",
                ("train.bin", "test.bin", "fine_label_names.txt"),
            ),
        ),
        pickled="cifar-100-python",
    ),
    "svhn": DownloadSet(
        "SVHN",
        ("http://ufldl.stanford.edu/housenumbers/",),
        (
            Archive("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", ("train_32x32.mat",)),
            Archive("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", ("test_32x32.mat",)),
        ),
        also=("svhn", ""),
    ),
    "stl10": DownloadSet(
        "stl10_binary",
        ("http://ai.stanford.edu/~acoates/stl10/",),
        (
            Archive(
                "stl10_binary.tar.gz",
                "91f7769df0f17e558f3565bffb0c7dfb",
                ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"),
            ),
        ),
    ),
}


def ensure_downloaded(name: str, roots: Sequence[Path]) -> Path:
    """The folder with all files of the set `name`, downloading what is missing under `roots[0]`.

    Raises:
        DataError: it can't be had; says which files to put where, and what works without them.
    """
    its = DOWNLOADS[name]
    for root in roots:
        for folder in (its.folder, *its.also):
            if not _missing(root / folder, its):
                return root / folder
    # An archive somebody put there is as good as a download; it may lie beside its folder too.
    for root in roots:
        for archive in its.archives:
            for archive_path in (root / archive.file, root / its.folder / archive.file):
                if archive_path.is_file() and archive_path.name not in archive.members:
                    _check_md5(archive_path, archive)
                    _unpack(archive_path, archive, root / its.folder)
        if not _missing(root / its.folder, its):
            return root / its.folder
    return _download(name, its, roots)


def _missing(folder: Path, its: DownloadSet) -> list[Archive]:
    return [a for a in its.archives if not all((folder / m).is_file() for m in a.members)]


def _download(name: str, its: DownloadSet, roots: Sequence[Path]) -> Path:
    folder = roots[0] / its.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with interprocess_lock(folder / ".download.lock", f"downloading {name}"):
            for archive in _missing(folder, its):
                _get(name, its, archive, folder)
    except DownloadError as error:
        pickled = [r / its.pickled for r in roots if its.pickled and (r / its.pickled).is_dir()]
        raise DataError(
            f"{name} can't be downloaded: {error}"
            + (f" ({pickled[0]} holds pickles, which are never read)" if pickled else ""),
            where=str(folder.absolute()),
            fix=_manual_instructions(name, its, folder),
        ) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def _manual_instructions(name: str, its: DownloadSet, folder: Path) -> str:
    files = ", ".join(a.file for a in _missing(folder, its))
    beside = folder.parent if len(its.archives) == 1 else folder
    return (
        f"put {files} into {beside}/, or images into {folder.parents[its.folder.count('/')] / name}"
        "/{train,test}/<class>/; the set `digits` needs no download"
    )


def _get(name: str, its: DownloadSet, archive: Archive, folder: Path) -> None:
    """Tries every mirror; the checked file is unpacked into `folder`."""
    failures = []
    for mirror in its.mirrors:
        try:
            path = fetch(
                mirror + archive.file, archive.file, folder, known_hash=f"md5:{archive.md5}"
            )
        except DownloadError as error:
            failures.append(f"{mirror}{archive.file}: {error}")
            continue
        try:
            _unpack(path, archive, folder)
        finally:
            path.unlink(missing_ok=True)
        print_status(f"downloaded and checked {archive.file} for {name}")
        return
    raise DownloadError("; ".join(failures))


def _check_md5(path: Path, archive: Archive) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != archive.md5:
        raise DataError(
            f"this archive has MD5 {found}, not {archive.md5}: half a file, or another version",
            where=str(path),
            fix="delete it, and put the right one there or let it be downloaded",
        )


def _unpack(path: Path, archive: Archive, folder: Path) -> None:
    """Writes the expected members of an archive into `folder`, each whole or not at all."""
    # An archive that was put there by hand is unpacked without a lock.
    remove_stale_temp_files(folder, archive.members, alone=False)
    try:
        if archive.file.endswith(".tar.gz"):
            _unpack_tar(path, archive, folder)
        elif archive.file.endswith(".gz"):
            with gzip.open(path) as file:
                content = file.read(MAX_MEMBER_BYTES + 1)
            if len(content) > MAX_MEMBER_BYTES:
                raise tarfile.ReadError(f"it unpacks to more than {MAX_MEMBER_BYTES >> 20} MiB")
            write_atomic(folder / archive.members[0], content)
        else:
            os.chmod(path, 0o644)
            os.replace(path, folder / archive.members[0])
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"a damaged archive: {error}", where=str(path), fix="delete it") from error
    missing = [m for m in archive.members if not (folder / m).is_file()]
    if missing:
        raise DataError(f"the archive lacks {', '.join(missing)}", where=str(path))


def _unpack_tar(path: Path, archive: Archive, folder: Path) -> None:
    wanted = {f"{folder.name}/{member}": member for member in archive.members}
    size = 0
    with tarfile.open(path, "r:gz") as tar:
        for entry in tar:
            size += entry.size  # what isn't wanted is unpacked, too, to get behind it
            if size > MAX_MEMBERS:
                raise tarfile.ReadError(f"it unpacks to more than {MAX_MEMBERS >> 20} MiB")
            member = wanted.get(entry.name.removeprefix("./"))
            # Links, devices and odd names are never touched: only regular files asked for.
            if member is None or not entry.isreg() or entry.size > MAX_MEMBER_BYTES:
                continue
            content = tar.extractfile(entry)
            if content is not None:
                with contextlib.closing(content):
                    write_atomic(folder / member, content.read())


# ---- fetching ----------------------------------------
# Download one file and verify its checksum: the only code that opens a network connection.

SOCKET_TIMEOUT_S = 20.0  # to connect, and between two packets
CHUNK_BYTES = 1 << 18


class DownloadError(Exception):
    """A download that failed, with the reason in words."""


def fetch(url: str, file: str, folder: Path, *, known_hash: str) -> Path:
    """Download `url` into a temporary file in `folder` and verify its checksum.

    The caller holds the folder's lock, so temporary files that a killed download of `file` left
    behind are removed. (`pooch.retrieve` names its temporary files at random and would never remove
    those; it also accepts only whole hashes, of which torchvision publishes the first 8 digits.)

    Args:
        file: name of the file, for the progress bar and the temporary file.
        known_hash: as in pooch, `md5:` or `sha256:` and the hex digits, or the first of them.

    Raises:
        DownloadError: the server can't be reached, refuses, stalls or sends something else. No
            file is left behind.
        OSError: the folder can't be written.
    """
    import pooch  # imports requests: 0.2 s that only downloads should cost
    import requests

    remove_stale_temp_files(folder, [file], alone=True)
    handle, temporary = open_temp(folder / file)
    path = Path(temporary)
    try:
        with os.fdopen(handle, "wb") as target, ExitStack() as stack:
            download = pooch.HTTPDownloader(
                progressbar=_ProgressBar(f"downloading {file}", stack),
                chunk_size=CHUNK_BYTES,
                timeout=SOCKET_TIMEOUT_S,
                # Without compression by the server: the checksum is that of the file as it is.
                headers={"User-Agent": "convlens", "Accept-Encoding": "identity"},
            )
            download(url, target, None)
        algorithm, _, digits = known_hash.partition(":")
        if not pooch.file_hash(temporary, alg=algorithm).startswith(digits):
            with path.open("rb") as content:
                is_html = content.read(64).lstrip().startswith(b"<")
            page = "a web page came instead (is there a log-in page?)"
            raise DownloadError(page if is_html else "wrong checksum")
    except BaseException as error:
        path.unlink(missing_ok=True)
        # (A `RequestException` is an `OSError`, too; other ones come from writing the file.)
        if isinstance(error, requests.HTTPError) and error.response is not None:
            status = f"HTTP {error.response.status_code} {error.response.reason}"
            raise DownloadError(status) from error
        if isinstance(error, requests.RequestException | ValueError):
            raise DownloadError(_innermost_reason(error)) from error
        raise
    return path


def _innermost_reason(error: BaseException) -> str:
    """Return what the system said: requests and urllib3 wrap it in several exceptions."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _ProgressBar:
    """Our progress bar with the part of tqdm's interface that pooch uses."""

    total = 0  # set by pooch when the server has replied

    def __init__(self, description: str, stack: ExitStack) -> None:
        self._description, self._stack = description, stack
        self._bar: ProgressBar | None = None

    def update(self, amount: int) -> None:
        if self._bar is None:
            self._bar = self._stack.enter_context(progress_bar(self._description, self.total))
        self._bar.advance(amount)

    def reset(self) -> None: ...

    def close(self) -> None: ...
