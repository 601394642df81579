"""Hostile files: damaged images of every kind, decompression bombs, misnamed and special files."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import os
import random
import socket
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, features

KINDS = {
    "jpg": "JPEG",
    "png": "PNG",
    "bmp": "BMP",
    "gif": "GIF",
    "webp": "WEBP",
    "tif": "TIFF",
    "ppm": "PPM",
    "jp2": "JPEG2000",
    "avif": "AVIF",
}


def valid_image(kind: str, size: tuple[int, int] = (40, 30)) -> bytes:
    """Return a valid image of a kind; empty if this Pillow can't write it."""
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    if kind == "avif" and not features.check("avif"):
        return b""
    if kind == "jp2" and not features.check("jpg_2000"):
        return b""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, KINDS[kind])
    return stream.getvalue()


@functools.cache
def hostile_images() -> list[tuple[str, bytes]]:
    """Return names and contents of more than 250 files, most of them invalid."""
    return [*_damaged_images(), *_bombs(), *_other_files()]


def _damaged_images() -> Iterator[tuple[str, bytes]]:
    """Yield images of every kind that are truncated, changed or misnamed."""
    rng = random.Random(0)
    for kind in KINDS:
        valid = valid_image(kind)
        if not valid:
            continue
        for part in range(1, 11):
            yield f"cut{part}.{kind}", valid[: len(valid) * part // 11]
        for number in range(8):
            at = rng.randrange(len(valid) if number > 3 else min(64, len(valid)))
            flipped = valid[:at] + bytes([valid[at] ^ 1 << rng.randrange(8)]) + valid[at + 1 :]
            yield f"flip{number}.{kind}", flipped
        yield f"zeros.{kind}", valid[: len(valid) // 2] + bytes(len(valid) // 2)
        yield f"noise.{kind}", valid[:40] + rng.randbytes(len(valid))
        yield f"twice.{kind}", valid + valid
        yield f"head.{kind}", valid[:12]
        wrong_extension = "png" if kind != "png" else "jpg"
        yield f"really-{kind}.{wrong_extension}", valid
        yield f"nothing.{kind}", b""
        yield f"byte.{kind}", valid[:1]


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def _png(width: int, height: int, data: bytes, *extra: bytes) -> bytes:
    """Return a greyscale PNG with this size in its header and any compressed `data`."""
    head = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    start = b"\x89PNG\r\n\x1a\n"
    return start + head + b"".join(extra) + _png_chunk(b"IDAT", data) + _png_chunk(b"IEND", b"")


def _bombs() -> Iterator[tuple[str, bytes]]:
    """Yield small files that would need gigabytes."""
    short = zlib.compress(bytes(100))
    for side in (20_000, 65_535, 2**31 - 1):
        yield f"side{side}.png", _png(side, side, short)
    yield "line.png", _png(2**31 - 1, 1, short)
    yield "column.png", _png(1, 2**31 - 1, short)
    long = zlib.compress(bytes(100_000_000))  # 100 KB that become 100 MB
    yield "ztxt.png", _png(8, 8, short, _png_chunk(b"zTXt", b"a\0\0" + long))
    yield "itxt.png", _png(8, 8, short, _png_chunk(b"iTXt", b"a\0\1\0\0\0" + long))
    yield "profile.png", _png(8, 8, short, _png_chunk(b"iCCP", b"a\0\0" + long))
    yield "more.png", _png(8, 8, long)
    yield "chunk.png", b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR" + bytes(99)
    yield (
        "screen.gif",
        b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + b"\x00\x00\x00"
        + (b"," + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\x00\x02\x02\x44\x01\x00;"),
    )
    yield (
        "size.bmp",
        (
            b"BM"
            + struct.pack("<IHHI", 200, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0)
            + bytes(99)
        ),
    )
    yield (
        "negative.bmp",
        (
            b"BM"
            + struct.pack("<IHHI", 200, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, -8, -8, 1, 24, 0, 0, 0, 0, 0, 0)
            + bytes(999)
        ),
    )
    yield "size.ppm", b"P6 100000 100000 255\n" + bytes(100)
    yield "digits.ppm", b"P6 " + b"9" * 100_000 + b" 8 255\n" + bytes(100)
    yield "comment.ppm", b"P6 #" + b"x" * 1_000_000 + b"\n8 8 255\n" + bytes(8 * 8 * 3)
    yield "floats.pfm", b"Pf\n60000 60000\n-1.0\n" + bytes(100)
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 65535, 65535, 3) + bytes(9)
    yield "size.jpg", b"\xff\xd8" + frame + b"\xff\xd9"
    yield "empty.jpg", b"\xff\xd8\xff\xd9"
    yield "segments.jpg", b"\xff\xd8" + b"\xff\xe1\xff\xff" * 30 + bytes(3000)
    tiff = b"II*\0" + struct.pack("<IH", 8, 4)
    for tag, value in ((256, 2**31), (257, 2**31), (259, 5), (273, 8)):
        tiff += struct.pack("<HHII", tag, 4, 1, value)
    yield "size.tif", tiff + bytes(50)
    yield "loop.tif", b"II*\0" + struct.pack("<IHHHIII", 8, 1, 256, 4, 1, 1, 8)
    yield "far.tif", b"II*\0" + struct.pack("<I", 2**32 - 1)
    yield "count.tif", b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(3000)
    yield "size.webp", b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0" + b"\xff" * 6 + bytes(20)
    yield "claims.webp", b"RIFF\xff\xff\xff\x7fWEBPVP8L" + struct.pack("<I", 2**31) + bytes(40)
    yield "box.avif", struct.pack(">I", 2**31) + b"ftypavif" + bytes(40)
    yield "box.jp2", b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I", 2**31 - 1) + b"ftypjp2 "
    frames = [Image.new("P", (2, 2), i % 200) for i in range(2000)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    yield "frames.gif", stream.getvalue()
    text = PngImagePlugin.PngInfo()
    for number in range(500):
        text.add_text(f"key{number}", "x" * 100)
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG", pnginfo=text)
    yield "keys.png", stream.getvalue()


def _other_files() -> Iterator[tuple[str, bytes]]:
    """Yield files of other types that are named like images."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("../../escaped.png", bytes(1_000_000))
    fits = b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =  8".ljust(80) + bytes(3000)
    for name, content in {
        "zip": stream.getvalue(),
        "gzip": gzip.compress(bytes(10_000_000)),
        "fits": fits,
        "fits.gz": gzip.compress(fits),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        "xml": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "a">]><a>&a;</a>',
        "html": b"<!DOCTYPE html><html>please log in</html>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%id) (w) file\n",
        "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF",
        "program": b"\x7fELF" + bytes(200),
        "script": b"#!/bin/sh\ntouch hacked\n",
        "pickle": b"cposix\nsystem\n(S'touch hacked'\ntR.",
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3),
        "ico": b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0" + struct.pack("<II", 2**31, 22),
        "tga": bytes([0, 0, 2, *bytes(9), 0xFF, 0xFF, 0xFF, 0xFF, 24, 0]),
        "pcx": b"\x0a\5\1\x08" + struct.pack("<HHHH", 0, 0, 65535, 65535) + bytes(200),
        "sgi": b"\x01\xda\1\1\0\3\xff\xff\xff\xff\0\3" + bytes(500),
        "dds": b"DDS " + struct.pack("<IIII", 124, 0x1007, 60000, 60000) + bytes(200),
        "im": b"Image type: RGB image\r\nImage size (x*y): 99999*99999\r\n".ljust(512, b"\x1a"),
        "xpm": b'/* XPM */\nstatic char *a[] = {"60000 60000 1 1",\n"a c #fff",\n',
        "blp": b"BLP2" + struct.pack("<I", 1) + bytes(2000),
        "spider": bytes(1024),
        "text": b"just words",
        "spaces": b" " * 5000,
        "bytes": bytes(range(256)) * 4,
    }.items():
        yield f"{name}.png", content


def make_special_files(folder: Path) -> None:
    """Write files with problematic names, links, pipes, a socket and a sparse file."""
    valid = valid_image("png")
    named = {
        "new\nline.png": valid,
        "<img src=x onerror=alert(1)>.png": valid,
        "=1+1.png": valid,
        "-rf.png": valid,
        "--help.png": valid,
        "‮gnp.exe.png": valid,
        "a" * 250 + ".png": valid,
        "%s%n.png": valid,
        "$(touch hacked).png": valid,
        "`touch hacked`.png": valid,
        "[bold]x.png": valid,
        "é.png": valid,
        "x'\"; DROP.png": valid,
        " .png": valid,
    }
    for name, content in named.items():
        (folder / name).write_bytes(content)
    (folder / os.fsdecode(b"\xff\xfe.png")).write_bytes(valid)
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "self.png").symlink_to("self.png")
    (folder / "loop").symlink_to(".")
    (folder / "up").symlink_to("..")
    (folder / "folder.png").mkdir()
    # The path of a socket has at most 108 bytes, hence the change of directory.
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
        server.bind("socket.png")
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of zeros
