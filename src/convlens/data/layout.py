"""What folders and lists of images have in common: names of splits and classes, and problems."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from convlens.errors import DataError

SPLITS = ("train", "val", "test")
SPLIT_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, spellings in SPLIT_SPELLINGS.items() for name in spellings}
LAYOUT_HELP = "make one folder per class, each with its images: FOLDER/<class>/*.jpg"
MAX_EXAMPLES = 5  # items that a message lists before it counts the others


@dataclass(frozen=True)
class Problem:
    """Something that may be wrong with a source. Without `items` there is no problem."""

    message: str
    items: Sequence[str]
    fix: str = ""


def raise_problems(problems: Iterable[Problem], where: Path, fix: str = LAYOUT_HELP) -> None:
    """Raise one error for all problems.

    Args:
        problems: those without items are ignored.
        where: the source.
        fix: what the user can do, unless a problem says so; the last one that does decides.

    Raises:
        DataError: at least one problem has items.
    """
    actual = [problem for problem in problems if problem.items]
    if actual:
        raise DataError(
            "; ".join(f"{problem.message}: {list_examples(problem.items)}" for problem in actual),
            where=str(where),
            fix=next((problem.fix for problem in reversed(actual) if problem.fix), fix),
        )


def list_examples(items: Sequence[str]) -> str:
    """Return the first items, and how many more there are."""
    more = len(items) - MAX_EXAMPLES
    return ", ".join(items[:MAX_EXAMPLES]) + (f" and {more} more" if more > 0 else "")


def split_from_name(name: str) -> str | None:
    """Return `train`, `val` or `test` for any of their usual spellings, else None."""
    return _SPLIT_OF.get(name.strip().casefold())


def normalize_name(name: str) -> str:
    """Return a class name in composed Unicode (NFC), without surrounding blanks."""
    return unicodedata.normalize("NFC", name).strip()


def printable(text: str) -> str:
    """Return `text` with escapes for the surrogates that stand for undecodable file name bytes."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()
