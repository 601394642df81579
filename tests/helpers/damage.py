"""Damage files at random and classify what their readers return."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convlens.errors import ConvlensError


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return changed `content`, as a bad disk, a power cut or a bad cable could leave it."""
    while True:
        changed = rng.choice(DAMAGES)(content, rng)
        if changed != content:
            return changed


def _bit(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def _byte(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]


def _digit(content: bytes, rng: random.Random) -> bytes:
    """Change one digit, the damage that is hardest to notice in a text."""
    digits = [at for at, byte in enumerate(content) if chr(byte).isdigit()]
    at = rng.choice(digits or range(len(content)))
    return content[:at] + str(rng.randrange(10)).encode() + content[at + 1 :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _zeros(content: bytes, rng: random.Random) -> bytes:
    """Replace the end by zeros, as if the file system kept the length and lost the blocks."""
    at = rng.randrange(len(content))
    return content[:at] + bytes(len(content) - at)


def _longer(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.randrange(1, 64))


def _piece(content: bytes, rng: random.Random) -> bytes:
    """Overwrite one part with another."""
    size = rng.randrange(1, 1 + len(content) // 4)
    a, b = (rng.randrange(len(content) - size + 1) for _ in range(2))
    return content[:a] + content[b : b + size] + content[a + size :]


# Changes of a single byte are the hardest to notice and therefore the most frequent.
DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
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
    """Number of cases that were reported, repaired or harmless, and the failures."""

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
    """Damage `path` at random and read it, `cases` times; restore it afterwards.

    Args:
        read: reads the file and returns something comparable with `==`.
        gone: the result of `read` if a damaged file is treated as missing (a cache).
        has_checksum: whether changed content must be noticed.
    """
    original = path.read_bytes()
    expected = read()
    assert expected is not None
    result, rng = Score(), random.Random(seed)
    for _ in range(cases):
        content = damaged(original, rng)
        path.write_bytes(content)
        try:
            got = read()
        except ConvlensError as error:
            result.counts["reported"] += 1
            if not error.what or "Traceback" in str(error):
                result.wrong.append(f"no message: {error!r}")
        except Exception as error:  # readers must not raise anything else
            result.wrong.append(f"{type(error).__name__}: {error}")
        else:
            if got == expected:
                result.counts["read unchanged"] += 1
            elif got == gone:
                result.counts["ignored"] += 1
            elif not has_checksum:
                result.counts["read with the change"] += 1
            else:
                result.wrong.append(f"{_difference(original, content)}: read differently")
    path.write_bytes(original)
    assert read() == expected
    return result


def _difference(original: bytes, content: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(original, content, strict=False)) if a != b), -1)
    return f"byte {at} of {len(original)}, now {len(content)}: {content[at - 20 : at + 20]!r}"
