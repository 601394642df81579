"""Files of the built-in data sets and of pretrained weights: found on disk, or downloaded.

Files of a set are searched where torchvision puts them. Nothing is unpickled, and archives are only
searched for members of exactly the expected names. `fetch` is the only code of the package that
opens a network connection.
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

MAX_MEMBER_BYTES = 1 << 30  # of one unpacked file; the largest one has 221 MB
MAX_ARCHIVE_BYTES = 4 << 30  # of all unpacked members, wanted or not; STL-10 has 3.1 GB
SOCKET_TIMEOUT_S = 20.0  # to connect, and between two packets
CHUNK_BYTES = 1 << 18
PICKLES = {"data_batch_1", "batches.meta", "meta"}  # files of CIFAR for Python
WEIGHTS_FOLDER = "weights"  # below a data root: downloaded weights, which are no data set


class DownloadError(Exception):
    """A failed download; the message is the reason."""


@dataclass(frozen=True)
class Archive:
    """One file to download.

    Attributes:
        file: its name below each mirror.
        md5: its MD5.
        members: names of the files in it.
    """

    file: str
    md5: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class DownloadSet:
    """The archives of a data set.

    Attributes:
        folder: folder below a data root that holds the unpacked files.
        mirrors: URLs of the folders that hold the archives; tried in order.
        archives: the files to download.
        other_folders: further folders in which the unpacked files are searched.
        pickle_folder: folder of the same set as pickles, which are not supported.
    """

    folder: str
    mirrors: tuple[str, ...]
    archives: tuple[Archive, ...]
    other_folders: tuple[str, ...] = ()
    pickle_folder: str = ""


def _idx_files(*md5: str) -> tuple[Archive, ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(
        Archive(f"{name}-ubyte.gz", digest, (f"{name}-ubyte",))
        for name, digest in zip(names, md5, strict=True)
    )


# Mirrors and MD5 sums as published by the authors of the sets and by torchvision.
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
        pickle_folder="cifar-10-batches-py",
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
        pickle_folder="cifar-100-python",
    ),
    "svhn": DownloadSet(
        "SVHN",
        ("http://ufldl.stanford.edu/housenumbers/",),
        (
            Archive("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", ("train_32x32.mat",)),
            Archive("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", ("test_32x32.mat",)),
        ),
        other_folders=("svhn", ""),
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


def data_roots() -> list[Path]:
    """Return the folders that contain data sets: `$CONVLENS_DATA`, then `data/`.

    Downloads go to the first one.
    """
    configured = os.environ.get("CONVLENS_DATA")
    return ([Path(configured)] if configured else []) + [Path("data")]


def ensure_downloaded(name: str, roots: Sequence[Path]) -> Path:
    """Return the folder with all files of a data set; download missing ones under `roots[0]`.

    Args:
        name: a key of `DOWNLOADS`.
        roots: the data roots that are searched.

    Raises:
        DataError: the download failed; the message says which files to put where.
    """
    dataset = DOWNLOADS[name]
    for root in roots:
        for folder in (dataset.folder, *dataset.other_folders):
            if not _missing_archives(root / folder, dataset):
                return root / folder
    # Archives that the user put next to the folder or into it replace a download.
    for root in roots:
        target = root / dataset.folder
        for archive in dataset.archives:
            for path in (root / archive.file, target / archive.file):
                if path.is_file() and path.name not in archive.members:
                    _check_md5(path, archive)
                    _unpack(path, archive, target)
        if not _missing_archives(target, dataset):
            return target
    return _download_missing(name, dataset, roots)


def find_downloaded_set(folder: Path) -> tuple[str, Path] | None:
    """Return the built-in set whose files `folder` holds, as torchvision arranges them.

    Args:
        folder: the data root with the files, or a folder between the root and the files, such as
            `data/MNIST` for `data/MNIST/raw`.

    Returns:
        The name of the set and its data root; None if the folder holds none.
    """
    names = [part.casefold() for part in folder.absolute().parts]
    for name, dataset in DOWNLOADS.items():
        members = {member for archive in dataset.archives for member in archive.members}
        files = members | {archive.file for archive in dataset.archives} | PICKLES
        for relative in filter(None, (dataset.folder, dataset.pickle_folder)):
            parts = relative.split("/")
            for depth in range(len(parts) + 1):
                above = [part.casefold() for part in parts[:depth]]
                if names[len(names) - depth :] != above:
                    continue
                found = folder.joinpath(*parts[depth:])
                if found.is_dir() and any((found / file).is_file() for file in files):
                    return name, folder.absolute().parents[depth - 1] if depth else folder
    return None


def _missing_archives(folder: Path, dataset: DownloadSet) -> list[Archive]:
    """Return the archives of which `folder` lacks a member."""
    return [a for a in dataset.archives if not all((folder / m).is_file() for m in a.members)]


def _download_missing(name: str, dataset: DownloadSet, roots: Sequence[Path]) -> Path:
    folder = roots[0] / dataset.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with interprocess_lock(folder / ".download.lock", f"downloading {name}"):
            for archive in _missing_archives(folder, dataset):
                _download_archive(dataset, archive, folder)
                print_status(f"downloaded and checked {archive.file} for {name}")
    except DownloadError as error:
        raise DataError(
            f"{name} can't be downloaded: {error}{_pickle_note(dataset, roots)}",
            where=str(folder.absolute()),
            fix=_manual_instructions(name, dataset, folder),
        ) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def _pickle_note(dataset: DownloadSet, roots: Sequence[Path]) -> str:
    if dataset.pickle_folder:
        for root in roots:
            folder = root / dataset.pickle_folder
            if folder.is_dir():
                return f" ({folder} contains pickles, which are never loaded)"
    return ""


def _manual_instructions(name: str, dataset: DownloadSet, folder: Path) -> str:
    files = ", ".join(archive.file for archive in _missing_archives(folder, dataset))
    target = folder.parent if len(dataset.archives) == 1 else folder
    root = folder.parents[dataset.folder.count("/")]
    return (
        f"put {files} into {target}/, or images into {root / name}/{{train,test}}/<class>/; "
        "the set `digits` needs no download"
    )


def _download_archive(dataset: DownloadSet, archive: Archive, folder: Path) -> None:
    """Download an archive from the first mirror that works and unpack it into `folder`."""
    failures = []
    for mirror in dataset.mirrors:
        url = mirror + archive.file
        try:
            path = fetch(url, archive.file, folder, known_hash=f"md5:{archive.md5}")
        except DownloadError as error:
            failures.append(f"{url}: {error}")
            continue
        try:
            _unpack(path, archive, folder)
        finally:
            path.unlink(missing_ok=True)
        return
    raise DownloadError("; ".join(failures))


def _check_md5(path: Path, archive: Archive) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if digest != archive.md5:
        raise DataError(
            f"this archive has MD5 {digest}, not {archive.md5}: incomplete or another version",
            where=str(path),
            fix="replace it with the right one, or delete it to have it downloaded",
        )


def _unpack(path: Path, archive: Archive, folder: Path) -> None:
    """Write the expected members of an archive into `folder`, each completely or not at all."""
    # An archive that the user provided is unpacked without a lock.
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
        raise DataError(f"damaged archive: {error}", where=str(path), fix="delete it") from error
    missing = [member for member in archive.members if not (folder / member).is_file()]
    if missing:
        raise DataError(f"the archive lacks {', '.join(missing)}", where=str(path))


def _unpack_tar(path: Path, archive: Archive, folder: Path) -> None:
    expected = {f"{folder.name}/{member}": member for member in archive.members}
    size = 0
    with tarfile.open(path, "r:gz") as tar:
        for entry in tar:
            size += entry.size  # skipping a member decompresses it, too
            if size > MAX_ARCHIVE_BYTES:
                raise tarfile.ReadError(f"it unpacks to more than {MAX_ARCHIVE_BYTES >> 20} MiB")
            member = expected.get(entry.name.removeprefix("./"))
            # Only regular files of the expected names; never links, devices or other names.
            if member is None or not entry.isreg() or entry.size > MAX_MEMBER_BYTES:
                continue
            content = tar.extractfile(entry)
            if content is not None:
                with contextlib.closing(content):
                    write_atomic(folder / member, content.read())


def fetch(url: str, file: str, folder: Path, *, known_hash: str) -> Path:
    """Download `url` into a temporary file in `folder` and verify its checksum.

    The caller must hold the lock of the folder: temporary files of an interrupted download of
    `file` are removed. (`pooch.retrieve` gives its temporary files random names and never removes
    them; and it accepts only complete hashes, while torchvision publishes the first 8 digits.)

    Args:
        url: address of the file.
        file: name of the file, for the progress bar and the temporary file.
        folder: folder of the temporary file.
        known_hash: `md5:` or `sha256:`, followed by the hex digits or the first few of them.

    Returns:
        Path of the temporary file, which the caller must rename or delete.

    Raises:
        DownloadError: the server is unreachable, refuses, stalls or sends another file. No
            temporary file remains.
        OSError: the folder is not writable.
    """
    import pooch  # here, because it imports requests (0.2 s)
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
                # No compression by the server: the checksum is that of the file itself.
                headers={"User-Agent": "convlens", "Accept-Encoding": "identity"},
            )
            download(url, target, None)
        algorithm, _, digits = known_hash.partition(":")
        if not pooch.file_hash(temporary, alg=algorithm).startswith(digits):
            with path.open("rb") as content:
                is_html = content.read(64).lstrip().startswith(b"<")
            web_page = "got a web page instead of the file (is a login required?)"
            raise DownloadError(web_page if is_html else "wrong checksum")
    except BaseException as error:
        path.unlink(missing_ok=True)
        # A `RequestException` is an `OSError`; other `OSError`s come from writing the file.
        if isinstance(error, requests.HTTPError) and error.response is not None:
            status = f"HTTP {error.response.status_code} {error.response.reason}"
            raise DownloadError(status) from error
        if isinstance(error, requests.RequestException | ValueError):
            raise DownloadError(_innermost_reason(error)) from error
        raise
    return path


def _innermost_reason(error: BaseException) -> str:
    """Return the original message, which requests and urllib3 wrap in several exceptions."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _ProgressBar:
    """Adapter of `progress_bar` to the part of tqdm's interface that pooch uses."""

    total = 0  # set by pooch when the server has responded

    def __init__(self, description: str, stack: ExitStack) -> None:
        self._description, self._stack = description, stack
        self._bar: ProgressBar | None = None

    def update(self, amount: int) -> None:
        if self._bar is None:
            self._bar = self._stack.enter_context(progress_bar(self._description, self.total))
        self._bar.advance(amount)

    def reset(self) -> None: ...

    def close(self) -> None: ...
