"""Files made to do harm: images of every kind, broken in every way that is cheap to think of."""

from __future__ import annotations

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


def good(kind: str, size: tuple[int, int] = (40, 30)) -> bytes:
    """A sound image of a kind; empty where this Pillow can't write it."""
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    if kind == "avif" and not features.check("avif"):
        return b""
    if kind == "jp2" and not features.check("jpg_2000"):
        return b""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, KINDS[kind])
    return stream.getvalue()


@functools.cache
def images() -> list[tuple[str, bytes]]:
    """Names and contents of more than 250 files, few of them an image as it should be."""
    return [*broken(), *bombs(), *no_images()]


def broken() -> Iterator[tuple[str, bytes]]:
    """Images of every kind, cut, changed and misnamed."""
    chance = random.Random(0)
    for kind in KINDS:
        whole = good(kind)
        if not whole:
            continue
        for part in range(1, 11):
            yield f"cut{part}.{kind}", whole[: len(whole) * part // 11]
        for number in range(8):
            at = chance.randrange(len(whole) if number > 3 else min(64, len(whole)))
            flipped = whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
            yield f"flip{number}.{kind}", flipped
        yield f"zeros.{kind}", whole[: len(whole) // 2] + bytes(len(whole) // 2)
        yield f"noise.{kind}", whole[:40] + chance.randbytes(len(whole))
        yield f"twice.{kind}", whole + whole
        yield f"head.{kind}", whole[:12]
        other = "png" if kind != "png" else "jpg"
        yield f"really-{kind}.{other}", whole
        yield f"nothing.{kind}", b""
        yield f"byte.{kind}", whole[:1]


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(width: int, height: int, data: bytes, *extra: bytes, kind: int = 0) -> bytes:
    """A PNG of that size with any compressed `data` in it."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    start = b"\x89PNG\r\n\x1a\n"
    return start + head + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that ask for gigabytes."""
    few = zlib.compress(bytes(100))
    for side in (20_000, 65_535, 2**31 - 1):
        yield f"side{side}.png", png(side, side, few)
    yield "line.png", png(2**31 - 1, 1, few)
    yield "column.png", png(1, 2**31 - 1, few)
    long = zlib.compress(bytes(100_000_000))  # 100 KB that become 100 MB
    yield "ztxt.png", png(8, 8, few, chunk(b"zTXt", b"a\0\0" + long))
    yield "itxt.png", png(8, 8, few, chunk(b"iTXt", b"a\0\1\0\0\0" + long))
    yield "profile.png", png(8, 8, few, chunk(b"iCCP", b"a\0\0" + long))
    yield "more.png", png(8, 8, long)
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
    facts = PngImagePlugin.PngInfo()
    for number in range(500):
        facts.add_text(f"key{number}", "x" * 100)
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG", pnginfo=facts)
    yield "keys.png", stream.getvalue()


def no_images() -> Iterator[tuple[str, bytes]]:
    """Files of other kinds that call themselves images."""
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


def strange(folder: Path) -> list[str]:
    """What lies in folders and is no plain file with a plain name; returns what was made."""
    sound = good("png")
    named = {
        "new\nline.png": sound,
        "<img src=x onerror=alert(1)>.png": sound,
        "=1+1.png": sound,
        "-rf.png": sound,
        "--help.png": sound,
        "‮gnp.exe.png": sound,
        "a" * 250 + ".png": sound,
        "%s%n.png": sound,
        "$(touch hacked).png": sound,
        "`touch hacked`.png": sound,
        "[bold]x.png": sound,
        "é.png": sound,
        "x'\"; DROP.png": sound,
        " .png": sound,
    }
    for name, content in named.items():
        (folder / name).write_bytes(content)
    (folder / os.fsdecode(b"\xff\xfe.png")).write_bytes(sound)
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "self.png").symlink_to("self.png")  # targets are read from where the link is
    (folder / "loop").symlink_to(".")
    (folder / "up").symlink_to("..")
    (folder / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as made, _inside(folder):
        made.bind("socket.png")
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    return sorted(os.listdir(folder))


class _inside:  # noqa: N801
    """A socket's path has 108 bytes at most."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        self._before = os.getcwd()
        os.chdir(self._folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self._before)
