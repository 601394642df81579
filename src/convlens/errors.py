"""Every error a user can cause: what went wrong, where, and what to do about it.

Anything that is not a `ConvlensError` is a bug of ours and keeps its traceback; but where memory
runs out, or the system refuses something, the command line makes it a `ResourceError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar


class ConvlensError(Exception):
    """An error with a remedy; the command line prints it in at most five lines.

    Args:
        what: one line saying what is wrong, with the value that was received.
        where: file, key or index, if there is one.
        fix: what the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  do:    {self.fix}")
        return "\n".join(lines)


class UsageError(ConvlensError, ValueError):
    """A name, key or value that can't be used (exit code 2)."""

    exit_code = 2


class DataError(ConvlensError):
    """Images or labels that can't be used (exit code 3)."""

    exit_code = 3


class ModelFileError(ConvlensError):
    """A model file or run folder that can't be trusted or read (exit code 4)."""

    exit_code = 4


class ResourceError(ConvlensError):
    """Disk, memory, lock or device not to be had (exit code 5)."""

    exit_code = 5


class Diverged(ConvlensError):  # noqa: N818
    """Training came to NaN or infinity, and would again; what was good is kept (exit code 6)."""

    exit_code = 6


class Stopped(ConvlensError):  # noqa: N818 - it is no error to be asked to stop
    """Stopped, and the same command goes on from what is kept (exit code 75)."""

    exit_code = 75


# ---- names ----------------------------------------
# Look-up by name: the only registry code. A table is a plain dict literal.

T = TypeVar("T")


def close_matches(name: str, choices: Iterable[str]) -> list[str]:
    """Up to three of `choices` that look like `name`, best first."""
    return difflib.get_close_matches(name, list(choices), n=3, cutoff=0.5)


def closest_match(name: str, choices: Iterable[str]) -> str:
    """The one of `choices` that differs in case only, else the one most like it, or nothing."""
    listed = list(choices)
    same = [choice for choice in listed if choice.casefold() == name.casefold()]
    return next(iter(same or close_matches(name, listed)), "")


def did_you_mean(close: Iterable[str]) -> str:
    """The question that goes with near misses; empty where there are none."""
    listed = " or ".join(close)
    return f"did you mean {listed}?" if listed else ""


def did_you_mean_suffix(close: Iterable[str]) -> str:
    """The same question behind what is wrong: ` (did you mean x?)`."""
    asked = did_you_mean(close)
    return f" ({asked})" if asked else ""


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """The entry called `name`, or a `UsageError` that names the near misses."""
    if name in table:
        return table[name]
    fix = did_you_mean(close_matches(name, table)) or f"choose from: {', '.join(table)}"
    raise UsageError(f"unknown {kind} {name!r}", fix=fix)
