"""Tars as tests need them: sound shards, bad members and damaged files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from convlens.data import tar_index

Member = tuple[str, bytes]


def png(value: int, size: int = 8) -> bytes:
    """Return a PNG of noise whose brightness and pixels depend on `value`."""
    random = np.random.default_rng(value)
    pixels = random.integers(0, 60, (size, size, 3)) + 3 * (value % 60)
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def tar(path: Path, content: Iterable[Member | tarfile.TarInfo], style: int = 1) -> Path:
    """Write a tar of these members, in order; a `TarInfo` is a header without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=style) as file:
        for each in content:
            if isinstance(each, tarfile.TarInfo):
                file.addfile(each)
                continue
            member = tarfile.TarInfo(each[0])
            member.size = len(each[1])
            file.addfile(member, io.BytesIO(each[1]))
    return path


def samples(labels: Iterable[int], first: int = 0) -> list[Member]:
    """Return the members `0000.png` and `0000.cls` and so on, one pair for each label."""
    return [
        member
        for i, label in enumerate(labels, first)
        for member in ((f"{i:04}.png", png(i)), (f"{i:04}.cls", f"{label}\n".encode()))
    ]


def shards(root: Path, counts: Mapping[str, int], per: int = 10) -> Path:
    """Write `root/train-0.tar` and so on, with `per` images of the alternating classes 0 and 1.

    The images are numbered through all shards. Returns `root`.
    """
    first = 0
    for split, count in counts.items():
        for start in range(0, count, per):
            n = min(per, count - start)
            labels = [(first + i) % 2 for i in range(n)]
            tar(root / f"{split}-{start // per}.tar", samples(labels, first))
            first += n
    return root


def special_member(name: str, kind: bytes, target: str = "0000.png") -> tarfile.TarInfo:
    """Return the header of a link, device or pipe."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


# Members that are errors next to sound samples, and a part of the message.
BAD_MEMBERS: dict[str, tuple[list[Member | tarfile.TarInfo], str]] = {
    "symlink": ([special_member("z.png", tarfile.SYMTYPE, "/etc/passwd")], "not regular files"),
    "hard link": ([special_member("z.png", tarfile.LNKTYPE)], "not regular files"),
    "device": ([special_member("z.png", tarfile.CHRTYPE)], "not regular files"),
    "pipe": ([special_member("z.cls", tarfile.FIFOTYPE)], "not regular files"),
    "parent": ([("../z.png", b"1"), ("../z.cls", b"1")], "point outside the tar"),
    "absolute": ([("/etc/z.png", b"1"), ("/etc/z.cls", b"1")], "point outside the tar"),
    "no label": ([("z.png", b"1")], "images without a label"),
    "empty label": ([("z.png", b"1"), ("z.cls", b" ")], "'' is not a class number"),
    "negative": ([("z.png", b"1"), ("z.cls", b"-1")], "'-1' is not a class number"),
    "fraction": ([("z.png", b"1"), ("z.cls", b"1.0")], "'1.0' is not a class number"),
    "no UTF-8": ([("z.png", b"1"), ("z.txt", b"\xff\xfe")], "labels that can't be read: a.tar: z"),
    "caption": ([("z.png", b"1"), ("z.txt", b"x" * 201)], "not a class name"),
    "huge label": (
        [("z.png", b"1"), ("z.txt", b" " * (tar_index.MAX_LABEL_BYTES + 1))],
        "too long",
    ),
    "bad JSON": ([("z.png", b"1"), ("z.json", b"{")], "labels that can't be read"),
    "deep JSON": ([("z.png", b"1"), ("z.json", b"[" * 100_000)], "labels that can't be read"),
    "JSON bool": ([("z.png", b"1"), ("z.json", b'{"label": true}')], "neither an integer"),
    "JSON list": ([("z.png", b"1"), ("z.json", b'{"label": [1]}')], "neither an integer"),
    "JSON minus": ([("z.png", b"1"), ("z.json", b'{"label": -3}')], "'-3' is not a class number"),
    "two images": ([("z.png", b"1"), ("z.JPG", b"2"), ("z.cls", b"1")], "keys with two images: a"),
    "key twice": ([*samples([1]), *samples([1])], "keys with two images: a.tar: 0000"),
    "label twice": (
        [("z.png", b"1"), ("z.cls", b"1"), ("z.CLS", b"2")],
        "two labels of the same kind",
    ),
    "names, too": ([("z.png", b"1"), ("z.txt", b"rose")], "numbers in some samples and names"),
}


def damaged(valid: bytes) -> dict[str, tuple[bytes, str]]:
    """Return contents that are not a complete tar, and a part of the error message for each."""
    import bz2
    import gzip
    import lzma

    header = len(valid) - 10240 if len(valid) > 10240 else 1024
    bomb = tarfile.TarInfo("x")
    bomb.type, bomb.size = tarfile.XHDTYPE, 1 << 33
    return {
        "empty": (b"", "empty (0 bytes)"),
        "text": (b"no tar at all" * 100, "damaged or not a tar"),
        "short": (valid[:100], "damaged or not a tar"),
        "cut in an image": (valid[:600], "cut short"),
        "cut in a header": (valid[: 1024 + 100], "cut short"),
        "cut between members": (valid[:1024], "no header and no end marker at byte 1,024 of 1,024"),
        "header overwritten": (valid[:1024] + b"\x07" * 512 + valid[1536:], "at byte 1,024 of"),
        "zeros, then more": (valid[:1024] + bytes(1024) + valid[1024:], "after the end marker"),
        "gzip": (gzip.compress(valid), "compressed (gzip)"),
        "bzip2": (bz2.compress(valid), "compressed (bzip2)"),
        "xz": (lzma.compress(valid), "compressed (xz)"),
        "header of 8 GB": (bomb.tobuf(tarfile.PAX_FORMAT) + bytes(2048), "damaged"),
        "two in one": (valid + valid, "after the end marker"),
        "none of these": (valid[:header], "cut short"),
    }
