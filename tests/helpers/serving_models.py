"""A running `convlens serve`, and images to send to it."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from helpers.commands import start


def png(level: int, *, width: int = 20, height: int = 14) -> bytes:
    """Return a PNG of a grey level with a little noise."""
    noise = np.random.default_rng(level).integers(-4, 5, (height, width, 3))
    pixels = np.clip(level + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def multipart(files: Sequence[tuple[str, bytes]], boundary: str = "limit") -> tuple[bytes, str]:
    """Return the body and the content type of a form with files; names may be empty."""
    body = b""
    for name, content in files:
        filename = f'; filename="{name}"' if name else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="images"{filename}\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


@contextlib.contextmanager
def running_service(
    *arguments: str, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `convlens serve ARGUMENTS`; yield the URL that it prints, and the process."""
    process = start("serve", *arguments, **environment)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise AssertionError(process.communicate()[1])
        yield url, process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors, errors
    finally:
        process.kill()
        process.wait()
