"""One file from the network, checked: the only code that opens a connection."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from convlens.system.console import progress
from convlens.system.files import open_temp, remove_stale_temp_files

TIMEOUT = 20.0  # seconds without a byte
PATIENCE = 60.0  # seconds in which `LEAST` bytes must come: a server that trickles is none
LEAST = 1 << 16
MOST = 4 << 30  # bytes of one file: more is not what we asked for


class DownloadError(Exception):
    """A download that failed, in words."""


def fetch(url: str, file: str, folder: Path, *, md5: str = "", sha256: str = "") -> Path:
    """A temporary file in `folder` with the content of `url`, its checksum looked at.

    The caller holds the folder's lock: what a killed download left of `file` is deleted.

    Args:
        file: what it is called, for the progress bar and the temporary name.
        md5, sha256: one of them, in hex; the first digits of it are enough.

    Raises:
        DownloadError: nothing came, or not what was expected; no file is left behind.
        OSError: the folder can't be written.
    """
    digest = hashlib.md5(usedforsecurity=False) if md5 else hashlib.sha256()
    remove_stale_temp_files(folder, [file], alone=True)
    handle, temporary = open_temp(folder / file)
    path, head = Path(temporary), b""
    try:
        with os.fdopen(handle, "wb") as target:
            for block in _blocks(url, file):
                head = head or block[:64]
                digest.update(block)
                target.write(block)
        if not digest.hexdigest().startswith(md5 or sha256):
            page = head.lstrip()[:1] == b"<"
            why = "a web page came instead (is there a log-in page?)" if page else "wrong checksum"
            raise DownloadError(why)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _blocks(url: str, file: str) -> Iterator[bytes]:
    """What `url` sends; failures of the network, and only those, are a `DownloadError`."""
    request = urllib.request.Request(url, headers={"User-Agent": "convlens"})
    size = least = 0
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            total = int(reply.headers.get("Content-Length") or 0)
            until = time.monotonic() + PATIENCE
            with progress(f"downloading {file}", total) as bar:
                # `read` would wait for all of it, and `TIMEOUT` begins anew with each byte.
                while block := reply.read1(1 << 18):
                    size += len(block)
                    if time.monotonic() > until:
                        if size < least + LEAST:
                            raise DownloadError(f"only {size - least} bytes in {PATIENCE:g} s")
                        until, least = time.monotonic() + PATIENCE, size
                    if size > MOST:
                        raise DownloadError(f"more than {MOST >> 30} GiB came")
                    yield block
                    bar.advance(len(block))
    except urllib.error.HTTPError as error:
        raise DownloadError(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise DownloadError(str(reason)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DownloadError(str(error) or type(error).__name__) from error
    if size < total:
        raise DownloadError(f"the connection broke after {size} of {total} bytes")
