"""Look-up by name: the only registry code. A table is a plain dict literal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from convlens.errors import UsageError

T = TypeVar("T")


def near(name: str, choices: Iterable[str]) -> list[str]:
    """Up to three of `choices` that look like `name`, best first."""
    return difflib.get_close_matches(name, list(choices), n=3, cutoff=0.5)


def alike(name: str, choices: Iterable[str]) -> str:
    """The one of `choices` that differs in case only, else the one most like it, or nothing."""
    listed = list(choices)
    same = [choice for choice in listed if choice.casefold() == name.casefold()]
    return next(iter(same or near(name, listed)), "")


def did_you_mean(close: Iterable[str]) -> str:
    """The question that goes with near misses; empty where there are none."""
    listed = " or ".join(close)
    return f"did you mean {listed}?" if listed else ""


def hint(close: Iterable[str]) -> str:
    """The same question behind what is wrong: ` (did you mean x?)`."""
    asked = did_you_mean(close)
    return f" ({asked})" if asked else ""


def pick(table: Mapping[str, T], name: str, kind: str) -> T:
    """The entry called `name`, or a `UsageError` that names the near misses."""
    if name in table:
        return table[name]
    fix = did_you_mean(near(name, table)) or f"choose from: {', '.join(table)}"
    raise UsageError(f"unknown {kind} {name!r}", fix=fix)
