"""Files damaged at random, and what their readers make of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convlens.errors import ConvlensError


def damaged(content: bytes, chance: random.Random) -> bytes:
    """`content` as a bad disk, a full one, a power cut or a bad cable leaves it; never the same."""
    while True:
        found = chance.choice(WAYS)(content, chance)
        if found != content:
            return found


def _bit(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def _byte(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]


def _digit(content: bytes, chance: random.Random) -> bytes:
    """The worst for texts: another digit where a digit was."""
    places = [at for at, byte in enumerate(content) if chr(byte).isdigit()]
    at = chance.choice(places or range(len(content)))
    return content[:at] + str(chance.randrange(10)).encode() + content[at + 1 :]


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def _zeros(content: bytes, chance: random.Random) -> bytes:
    """A tail of zeros: a file system that kept the length and lost the blocks."""
    at = chance.randrange(len(content))
    return content[:at] + bytes(len(content) - at)


def _longer(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.randrange(1, 64))


def _piece(content: bytes, chance: random.Random) -> bytes:
    """A piece of it in the place of another."""
    size = chance.randrange(1, 1 + len(content) // 4)
    a, b = (chance.randrange(len(content) - size + 1) for _ in range(2))
    return content[:a] + content[b : b + size] + content[a + size :]


# Single bytes are the hardest to notice, so they come most often.
WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _bit,
    _bit,
    _bit,
    _byte,
    _byte,
    _digit,
    _digit,
    _cut,
    _zeros,
    _longer,
    _piece,
)


@dataclass
class Score:
    """How often damage was told, repaired or of no effect, and what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items()))


def score(
    path: Path,
    read: Callable[[], Any],
    cases: int,
    seed: int,
    *,
    gone: Any = None,
    has_checksum: bool = True,
) -> Score:
    """Damages `path` in `cases` ways and reads it each time; puts it back as it was.

    Args:
        has_checksum: without one, a changed digit is read as another number.
        read: what the program makes of the file, comparable with `==`.
        gone: what `read` gives where it goes on as if there were no file (a cache).
    """
    whole = path.read_bytes()
    expected = read()
    assert expected is not None
    found, chance = Score(), random.Random(seed)
    for _ in range(cases):
        content = damaged(whole, chance)
        path.write_bytes(content)
        try:
            got = read()
        except ConvlensError as error:
            found.counts["told"] += 1
            if not error.what or "Traceback" in str(error):
                found.wrong.append(f"no words: {error!r}")
        except Exception as error:  # what no reader may do
            found.wrong.append(f"{type(error).__name__}: {error}")
        else:
            if got == expected:
                found.counts["read as it was"] += 1
            elif got == gone:
                found.counts["left aside"] += 1
            elif not has_checksum:
                found.counts["read with the change"] += 1
            else:
                found.wrong.append(f"{_difference(whole, content)}: read as something else")
    path.write_bytes(whole)
    assert read() == expected
    return found


def _difference(whole: bytes, content: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(whole, content, strict=False)) if a != b), -1)
    return f"byte {at} of {len(whole)}, now {len(content)}: {content[at - 20 : at + 20]!r}"
