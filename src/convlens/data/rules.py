"""What the arguments of an augmentation may be: one rule each, said in words where it is broken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Context(NamedTuple):
    """What the images will be, as far as it is known (0 means unknown), and what else was asked."""

    image_size: int = 0
    channels: int = 0
    arguments: Mapping[str, Any] = {}  # all arguments of the operation, for rules about two


# What a value should be, in words, where it is not that; "" where it can be used.
Rule = Callable[[Any, Context], str]


def _is_number(value: Any) -> bool:
    # bool is an int to Python, and YAML's `yes` becomes one.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(value: Any, *lengths: int) -> bool:
    return isinstance(value, list | tuple) and len(value) in lengths and all(map(_is_number, value))


def number(low: float, high: float = math.inf) -> Rule:
    """One number from `low` to `high`."""
    words = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number >= {low:g}"

    def rule(value: Any, _: Context) -> str:
        return "" if _is_number(value) and low <= value <= high else words

    return rule


def positive(value: Any, _: Context) -> str:
    """A number above 0."""
    return "" if _is_number(value) and value > 0 else "a number above 0"


def whole(low: int, high: int) -> Rule:
    """A whole number from `low` to `high`."""
    words = f"a whole number from {low} to {high}"
    return lambda value, _: "" if _is_whole(value) and low <= value <= high else words


def below(other: str, default: int) -> Rule:
    """A whole number from 0 on that is less than another argument, by default `default`."""

    def rule(value: Any, context: Context) -> str:
        limit = context.arguments.get(other, default)
        if not _is_whole(limit):  # that argument has a complaint of its own
            limit = math.inf
        fine = _is_whole(value) and 0 <= value < limit
        return "" if fine else f"a whole number from 0, below {other} ({limit})"

    return rule


def interval(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    """Two ordered numbers from `low` to `high`; with `above`, `low` itself is excluded."""
    words = f"two numbers [low, high] {'above' if above else 'from'} {low:g}"
    words += f" to {high:g}" * (high < math.inf)

    def rule(value: Any, _: Context) -> str:
        if not _are_numbers(value, 2):
            return words
        first, second = value
        above_low = first > low if above else first >= low
        return "" if above_low and first <= second <= high else words

    return rule


def angles(limit: float, *lengths: int) -> Rule:
    """A number >= 0 (for minus to plus), or `lengths` numbers in ordered pairs."""
    words = f"a number from 0 to {limit:g}, or [low, high]" + " (x) or 4 (x, y)" * (4 in lengths)

    def rule(value: Any, _: Context) -> str:
        if _is_number(value):
            return "" if 0 <= value <= limit else words
        if not _are_numbers(value, *lengths):
            return words
        pairs = zip(value[::2], value[1::2], strict=True)
        return "" if all(-limit <= low <= high <= limit for low, high in pairs) else words

    return rule


def factor(limit: float, *, signed: bool = False) -> Rule:
    """`ColorJitter`: a number >= 0, or an ordered pair (of signed numbers)."""
    pair = interval(-limit if signed else 0, limit)
    single = number(0, limit)

    def rule(value: Any, context: Context) -> str:
        if not single(value, context):
            return ""
        complaint = pair(value, context)
        return complaint and f"{single(None, context)}, or {complaint}"

    return rule


def optional(inner: Rule) -> Rule:
    """The inner rule, or nothing at all."""
    return lambda value, context: "" if value is None else inner(value, context)


def one_of(*choices: str) -> Rule:
    """One of the given words."""
    return lambda value, _: "" if value in choices else " or ".join(choices)


def shares(value: Any, _: Context) -> str:
    """`translate`: the largest shift as a fraction of width and of height."""
    fine = _are_numbers(value, 2) and all(0 <= v <= 1 for v in value)
    return "" if fine else "two numbers [x, y] from 0 to 1 (fractions of width and height)"


def shade(value: Any, context: Context) -> str:
    """A grey value, or one for each channel."""
    if _is_number(value):
        return "" if 0 <= value <= 1 else "from 0 (black) to 1 (white)"
    lengths = (1, context.channels or 3)
    if _are_numbers(value, *lengths) and all(0 <= v <= 1 for v in value):
        return ""
    return "a number from 0 to 1, or one for each channel"


def shade_or_random(value: Any, context: Context) -> str:
    """As `shade`, or the word random."""
    complaint = "" if value == "random" else shade(value, context)
    return complaint and f"{complaint}, or random"


def pixels(value: Any, context: Context) -> str:
    """`padding`: whole pixels, less than the image has."""
    values = value if isinstance(value, list | tuple) else [value]
    if not all(map(_is_whole, values)) or len(values) not in (1, 2, 4) or min(values) < 0:
        return "a whole number >= 0, or 2 (left/right, top/bottom) or 4 of them"
    if context.image_size and max(values) >= context.image_size:
        return f"less than the image size {context.image_size}"
    return ""


def side(value: Any, context: Context) -> str:
    """`Cutout`: whole pixels, at most as many as the image has."""
    if not _is_whole(value) or value < 1:
        return "a whole number >= 1 (pixels)"
    if context.image_size and value > context.image_size:
        return f"at most the image size {context.image_size}"
    return ""


PROBABILITY = number(0, 1)
SAMPLING = one_of("bilinear", "nearest")
