"""Shared by the tests of webdataset and others."""

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
    """A grey-level image of noise about `value`, as a file."""
    random = np.random.default_rng(value)
    pixels = random.integers(0, 60, (size, size, 3)) + 3 * (value % 60)
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def tar(path: Path, content: Iterable[Member | tarfile.TarInfo], style: int = 1) -> Path:
    """A tar of these members, in this order; headers alone where there is no content."""
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
    """`0000.png` with `0000.cls` and so on."""
    return [
        member
        for i, label in enumerate(labels, first)
        for member in ((f"{i:04}.png", png(i)), (f"{i:04}.cls", f"{label}\n".encode()))
    ]


def shards(root: Path, counts: Mapping[str, int], per: int = 10) -> Path:
    """Images of the classes 0 and 1 in turn: `root/train-0.tar` and so on, numbered throughout."""
    first = 0
    for split, count in counts.items():
        for start in range(0, count, per):
            n = min(per, count - start)
            labels = [(first + i) % 2 for i in range(n)]
            tar(root / f"{split}-{start // per}.tar", samples(labels, first))
            first += n
    return root


def link(name: str, kind: bytes, target: str = "0000.png") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


BAD_MEMBERS: dict[str, tuple[list[Member | tarfile.TarInfo], str]] = {
    "symlink": ([link("z.png", tarfile.SYMTYPE, "/etc/passwd")], "links, devices or the like"),
    "hard link": ([link("z.png", tarfile.LNKTYPE)], "links, devices or the like"),
    "device": ([link("z.png", tarfile.CHRTYPE)], "links, devices or the like"),
    "pipe": ([link("z.cls", tarfile.FIFOTYPE)], "links, devices or the like"),
    "parent": ([("../z.png", b"1"), ("../z.cls", b"1")], "lead out of the tar"),
    "absolute": ([("/etc/z.png", b"1"), ("/etc/z.cls", b"1")], "lead out of the tar"),
    "no label": ([("z.png", b"1")], "images without a label"),
    "empty label": ([("z.png", b"1"), ("z.cls", b" ")], "'' is no number of a class"),
    "negative": ([("z.png", b"1"), ("z.cls", b"-1")], "'-1' is no number of a class"),
    "fraction": ([("z.png", b"1"), ("z.cls", b"1.0")], "'1.0' is no number of a class"),
    "no UTF-8": ([("z.png", b"1"), ("z.txt", b"\xff\xfe")], "labels that can't be read: a.tar: z"),
    "caption": ([("z.png", b"1"), ("z.txt", b"x" * 201)], "no class name"),
    "huge label": (
        [("z.png", b"1"), ("z.txt", b" " * (tar_index.MAX_LABEL_BYTES + 1))],
        "too long",
    ),
    "bad JSON": ([("z.png", b"1"), ("z.json", b"{")], "labels that can't be read"),
    "deep JSON": ([("z.png", b"1"), ("z.json", b"[" * 100_000)], "labels that can't be read"),
    "JSON bool": ([("z.png", b"1"), ("z.json", b'{"label": true}')], "neither a whole number"),
    "JSON list": ([("z.png", b"1"), ("z.json", b'{"label": [1]}')], "neither a whole number"),
    "JSON minus": ([("z.png", b"1"), ("z.json", b'{"label": -3}')], "'-3' is no number"),
    "two images": ([("z.png", b"1"), ("z.JPG", b"2"), ("z.cls", b"1")], "keys with two images: a"),
    "key twice": ([*samples([1]), *samples([1])], "keys with two images: a.tar: 0000"),
    "label twice": ([("z.png", b"1"), ("z.cls", b"1"), ("z.CLS", b"2")], "kind of label twice"),
    "names, too": ([("z.png", b"1"), ("z.txt", b"rose")], "numbers in some samples and names"),
}


def damaged(whole: bytes) -> dict[str, tuple[bytes, str]]:
    """Contents of a file that is no whole tar, and what is said of each."""
    import bz2
    import gzip
    import lzma

    header = len(whole) - 10240 if len(whole) > 10240 else 1024
    bomb = tarfile.TarInfo("x")
    bomb.type, bomb.size = tarfile.XHDTYPE, 1 << 33
    return {
        "empty": (b"", "empty (0 bytes)"),
        "text": (b"no tar at all" * 100, "damaged or no tar"),
        "short": (whole[:100], "damaged or no tar"),
        "cut in an image": (whole[:600], "cut short"),
        "cut in a header": (whole[: 1024 + 100], "cut short"),
        "cut between members": (whole[:1024], "no header and no end at byte 1,024 of 1,024"),
        "header overwritten": (whole[:1024] + b"\x07" * 512 + whole[1536:], "at byte 1,024 of"),
        "zeros, then more": (whole[:1024] + bytes(1024) + whole[1024:], "behind its end"),
        "gzip": (gzip.compress(whole), "compressed (gzip)"),
        "bzip2": (bz2.compress(whole), "compressed (bzip2)"),
        "xz": (lzma.compress(whole), "compressed (xz)"),
        "header of 8 GB": (bomb.tobuf(tarfile.PAX_FORMAT) + bytes(2048), "damaged"),
        "two in one": (whole + whole, "behind its end"),
        "none of these": (whole[:header], "cut short"),
    }
