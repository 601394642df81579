"""Download one file and verify its checksum: the only code that opens a network connection."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from convlens.system.console import Bar, progress
from convlens.system.files import open_temp, remove_stale_temp_files

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
        self._bar: Bar | None = None

    def update(self, amount: int) -> None:
        if self._bar is None:
            self._bar = self._stack.enter_context(progress(self._description, self.total))
        self._bar.advance(amount)

    def reset(self) -> None: ...

    def close(self) -> None: ...
