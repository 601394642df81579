"""Errors that a user can cause, with their exit codes; look-up by name; checks of arguments.

Any other exception is a bug of convlens and keeps its traceback, except that the command line
turns running out of memory and errors of the operating system into a `ResourceError`.
"""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class ConvlensError(Exception):
    """A problem that the user can fix. The command line prints it in at most five lines.

    Args:
        what: one line that describes the problem, with the value that was received.
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
    """An invalid name, key or value (exit code 2)."""

    exit_code = 2


class DataError(ConvlensError):
    """Invalid images or labels (exit code 3)."""

    exit_code = 3


class ModelFileError(ConvlensError):
    """A damaged or unreadable model file or run, or user code that is not trusted (exit code 4)."""

    exit_code = 4


class ResourceError(ConvlensError):
    """Disk, memory, lock or device unavailable (exit code 5)."""

    exit_code = 5


class Diverged(ConvlensError):  # noqa: N818
    """Training diverged (NaN or infinity) and would do so again (exit code 6).

    The last finite weights are kept.
    """

    exit_code = 6


class Stopped(ConvlensError):  # noqa: N818 - a requested stop is not an error
    """Training was stopped; the same command resumes it from its last checkpoint (exit code 75)."""

    exit_code = 75


MIN_SIMILARITY = 0.6  # of a suggestion; at 0.5, `f_onemix` would be suggested for `nix`


def close_matches(name: str, choices: Iterable[str]) -> list[str]:
    """Return up to three of `choices` that are similar to `name`, best first.

    Choices that differ only in case and punctuation (`Cifar-100`, `cifar100`) exclude the others.
    """
    choices = list(choices)
    letters = _letters(name)
    same = [choice for choice in choices if letters and _letters(choice) == letters]
    return same[:3] or difflib.get_close_matches(name, choices, n=3, cutoff=MIN_SIMILARITY)


def _letters(name: str) -> str:
    """Return the letters and digits of a name without their case."""
    return "".join(filter(str.isalnum, name)).casefold()


def closest_match(name: str, choices: Iterable[str]) -> str:
    """Return the choice that differs only in case, or else the most similar one, or ""."""
    names = list(choices)
    same = [choice for choice in names if choice.casefold() == name.casefold()]
    return next(iter(same or close_matches(name, names)), "")


def did_you_mean(close: Iterable[str]) -> str:
    """Return `did you mean x or y?` for similar names, or "" if there are none."""
    names = " or ".join(close)
    return f"did you mean {names}?" if names else ""


def did_you_mean_suffix(close: Iterable[str]) -> str:
    """Return the same question in parentheses, to append to a message: ` (did you mean x?)`."""
    question = did_you_mean(close)
    return f" ({question})" if question else ""


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """Return the entry `name` of a table.

    Args:
        kind: what the table contains, for the message, e.g. "schedule".

    Raises:
        UsageError: there is no such entry; suggests similar names, or lists all of them.
    """
    if not isinstance(name, str):
        raise wrong_type(kind, name, f"choose from: {', '.join(table)}")
    if name in table:
        return table[name]
    fix = did_you_mean(close_matches(name, table)) or f"choose from: {', '.join(table)}"
    raise UsageError(f"unknown {kind} {name!r}", fix=fix)


def wrong_type(what: str, value: object, fix: str) -> UsageError:
    """Return the error for a value of another type than that of an argument.

    Args:
        what: the argument, or what the value should be, e.g. "path".
    """
    return UsageError(f"{what}: an object of type {type(value).__name__!r} can't be used", fix=fix)


def check_path(argument: str, value: Any) -> Path:
    """Return a path that the caller gave.

    Raises:
        UsageError: it is something else, such as a number.
    """
    if not isinstance(value, str | os.PathLike):
        raise wrong_type(argument, value, "give a path")
    return Path(value)


def check_count(argument: str, value: Any, minimum: int = 1) -> int:
    """Return a number of things that the caller gave; integers of NumPy are accepted.

    Raises:
        UsageError: it is not a whole number, or is below `minimum`.
    """
    # `int` first: asking an abstract class takes ten times as long.
    if not isinstance(value, int | numbers.Integral) or isinstance(value, bool):
        raise wrong_type(argument, value, f"give a whole number, {minimum} or more")
    count = int(value)
    if count < minimum:
        raise UsageError(f"{argument}={count}: must be at least {minimum}")
    return count
