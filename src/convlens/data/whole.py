"""Whether a file holds all of its picture, where its decoder doesn't look.

libjpeg makes grey of what is missing; it warns, but Pillow drops its warnings. It does so only
where a marker stands behind the data, though. So the marker is taken away: a decoder that needs
more than there is then asks for it in vain, and says so.
"""

from __future__ import annotations

import re
import zlib

import numpy as np
from PIL import ImageFile

from convlens.errors import UsageError

# The second bytes of markers (ITU-T T.81, table B.1).
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2  # frames with Huffman codes
_OTHER = frozenset({0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)})
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # nothing belongs to them
_NONE, _RESTART, _END, _SCAN, _INTERVAL = 0x00, 0xD0, 0xD9, 0xDA, 0xDD

_UNUSUAL = (b"\xff\xdd\0\4", b"\xff\xc9\0")  # restarts, arithmetic codes
_MARKER = re.compile(rb"\xff[^\x00\xff]")

_PIECE = 1 << 20  # bytes that are looked through at once: bounds the memory it takes
_SEGMENTS = 1000  # no camera writes that many; who does is not checked
_AHEAD = b"\0" * 16  # a decoder looks ahead by up to 8


def check_pillow() -> None:
    """Refuses to decode where a program has told Pillow to accept what is cut short."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "this program has told Pillow to take half an image for a whole one",
            where="PIL.ImageFile.LOAD_TRUNCATED_IMAGES",
            fix="set it to False",
        )


def check_png(content: bytes) -> None:
    """Pillow looks at neither the sums of pixel data nor the end, once it has all rows.

    Raises:
        EOFError: the file is cut short. ValueError: a sum differs.
    """
    view, at, kind = memoryview(content), 8, b""
    while kind != b"IEND":
        length = int.from_bytes(view[at : at + 4], "big")
        body, sum_ = view[at + 4 : at + 8 + length], view[at + 8 + length : at + 12 + length]
        if len(sum_) < 4:
            raise EOFError
        kind = bytes(body[:4])
        # What is no part of the picture may be damaged: its name begins with a small letter.
        if kind[:1].isupper() and zlib.crc32(body) != int.from_bytes(sum_, "big"):
            raise ValueError("its checksum differs")
        at += 12 + length


def check_jpeg(image: ImageFile.ImageFile, content: bytes) -> None:
    """Takes the end from an opened JPEG, whose `content` this is, so that decoding needs all of it.

    Raises:
        EOFError: scans are missing. ValueError: what belongs between restart markers is.
    """
    stream = image.fp
    assert stream is not None
    start, parts = stream.tell(), getattr(image, "layers", 0)
    # Pillow has read the headers, up to the data. Where these are all there is, as nearly always,
    # there is no need to do it again: it would take a quarter of the time of a small image.
    scan = content[max(0, start - 8 - 2 * parts) : start]
    usual = scan[:2] == b"\xff\xda" and scan[4] == parts and scan[-3:] == b"\0\x3f\0"
    if usual and not any(content.find(mark, 0, start) >= 0 for mark in _UNUSUAL):
        end: int | None = _without_zeros(content, _coded(content, start, 0)[0])
    else:
        end = _walked(content)
    if end is not None:
        stream.seek(end)
        stream.truncate()
        stream.write(_AHEAD)


def _walked(content: bytes) -> int | None:
    """Where the data end, by all headers; None where the decoder needs the end.

    It does where the data come in several scans: there the last scan of each part of the picture
    must have begun, so that only fine detail can be missing. Arithmetic codes are not looked at.
    """
    at, interval = 2, 0
    frame, sequential, scanned = b"", False, set[tuple[int, bool]]()
    for _ in range(_SEGMENTS):
        if content[at : at + 1] != b"\xff" or content[at + 1 : at + 2] in (b"", b"\0", b"\xff"):
            at, _ = _coded(content, at, interval)  # the data of a scan, or junk
        kind = int.from_bytes(content[at + 1 : at + 2], "big")
        if kind in (_NONE, _END):
            break
        if kind in _BARE:
            at += 2
            continue
        size = int.from_bytes(content[at + 2 : at + 4], "big")
        body = content[at + 4 : at + 2 + size]
        at += 2 + max(2, size)
        if kind in _SEQUENTIAL or kind == _PROGRESSIVE:
            frame, sequential = body, kind in _SEQUENTIAL
        elif kind in _OTHER:
            return None
        elif kind == _INTERVAL:
            interval = int.from_bytes(body[:2], "big")
        elif kind == _SCAN and frame:
            count = body[0]
            if sequential and count == frame[5]:
                end, restarts = _coded(content, at, interval)
                if end < len(content) and interval and restarts < (_units(frame) - 1) // interval:
                    raise ValueError("what belongs between its restart markers is missing")
                return _without_zeros(content, end)
            first, last, bits = body[1 + 2 * count : 4 + 2 * count]
            for component in body[1 : 1 + 2 * count : 2]:
                # The lowest frequency and all others, each down to the last bit.
                scanned |= {(component, True)} if first == 0 and not bits & 15 else set()
                scanned |= {(component, False)} if last == 63 and not bits & 15 else set()
    else:
        return None
    if frame and len(scanned) < 2 * frame[5]:
        raise EOFError
    return None


def _without_zeros(content: bytes, end: int) -> int:
    # No marker at all: zeros are not data, but a disk's or a download's that lost the rest.
    return end if end < len(content) else len(content.rstrip(b"\0"))


def _coded(content: bytes, at: int, interval: int) -> tuple[int, int]:
    """Where coded data that begin at `at` end, and how many restart markers are in them.

    They end at the first marker but restart markers in their turn, or with the file.
    """
    if not interval:
        found = _MARKER.search(content, at)
        return found.start() if found else len(content), 0
    view, restarts = np.frombuffer(content, np.uint8), 0
    for low in range(at, len(view), _PIECE):
        piece = view[low : low + _PIECE + 1]  # a marker may begin with its last byte
        places = np.flatnonzero(piece[:-1] == 0xFF)
        kinds = piece[places + 1]
        real = (kinds != 0) & (kinds != 0xFF)
        places, kinds = places[real], kinds[real]
        ends = np.flatnonzero(kinds != _RESTART + (restarts + np.arange(len(kinds))) % 8)
        if len(ends):
            return low + int(places[ends[0]]), restarts + int(ends[0])
        restarts += len(kinds)
    return len(view), restarts


def _units(frame: bytes) -> int:
    """The number of MCUs, which restart markers count."""
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    factors = frame[7 : 7 + 3 * frame[5] : 3]
    # A single component has one block in each, whatever its factors.
    across = max(f >> 4 for f in factors) if len(factors) > 1 else 1
    down = max(f & 15 for f in factors) if len(factors) > 1 else 1
    return -(-width // (8 * across)) * -(-height // (8 * down))
