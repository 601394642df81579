"""The table of augmentations, and the check of what a recipe asks of them.

The operations are in `geometry.py` (they move pixels) and `appearance.py` (they change them).
All are batched, run on the images' device and draw their numbers per image from one generator:
the same generator state gives the same result, and the input is never changed.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convlens.data import appearance, geometry
from convlens.errors import UsageError
from convlens.names import near, pick


class Context(NamedTuple):
    """What the images will be, as far as it is known; 0 means unknown."""

    image_size: int = 0
    channels: int = 0


# What a value should be, in words, where it is not that; "" where it can be used.
Rule = Callable[[Any, Context], str]


@dataclass(frozen=True)
class Augmentation:
    """One entry of the table: the operation, and one rule for each of its arguments."""

    apply: Callable[..., Tensor]
    rules: Mapping[str, Rule]

    def __call__(self, images: Tensor, generator: torch.Generator, **arguments: Any) -> Tensor:
        """`images` float32 `[N, C, H, W]` in [0, 1] -> the same shape and range."""
        return self.apply(images, generator, **arguments)

    @functools.cached_property
    def required(self) -> tuple[str, ...]:
        """The arguments that have no default."""
        parameters = inspect.signature(self.apply).parameters.values()
        return tuple(
            p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty
        )


@dataclass(frozen=True)
class Pipeline:
    """Augmentations in a row; `pipeline(images, generator)` applies them all."""

    steps: tuple[tuple[str, Mapping[str, Any]], ...]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """`images` float32 `[N, C, H, W]` in [0, 1] -> the same shape and range."""
        for name, arguments in self.steps:
            images = AUGMENTS[name](images, generator, **arguments)
        return images


def build(
    ops: Sequence[tuple[str, Mapping[str, Any]]], *, image_size: int = 0, channels: int = 0
) -> Pipeline:
    """The operations of a recipe, checked; no tensor is touched.

    Args:
        ops: torchvision's name and arguments of each operation, in the order they apply.
        image_size, channels: what the images will be, where it is known: then padding that does
            not fit the image and colours that don't fit the channels are found too.

    Raises:
        UsageError: unknown names or arguments, missing or impossible values; all at once.
    """
    problems: list[str] = []
    taken: dict[str, None] = {}
    for name, arguments in ops:
        try:
            entry = pick(AUGMENTS, name, "augmentation")
        except UsageError as error:
            problems.append(f"{error.what} ({error.fix})")
            continue
        found = _problems(name, entry, arguments, Context(image_size, channels))
        problems += found
        if found:
            taken[f"{name} takes {', '.join(entry.rules)}"] = None
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError(shown + more, where="augment", fix="; ".join(list(taken)[:3]))
    return Pipeline(tuple((name, dict(arguments)) for name, arguments in ops))


def _problems(
    name: str, entry: Augmentation, arguments: Mapping[str, Any], context: Context
) -> list[str]:
    found = []
    for argument, value in arguments.items():
        if argument not in entry.rules:
            close = near(argument, entry.rules)
            hint = f" (did you mean {close[0]}?)" if close else ""
            found.append(f"{name}: unknown argument {argument!r}{hint}")
        elif complaint := entry.rules[argument](value, context):
            found.append(f"{name}: {argument}={value!r} should be {complaint}")
    missing = [argument for argument in entry.required if argument not in arguments]
    found += [f"{name}: {argument} is missing" for argument in missing]
    return found


# Rules


def _is_number(value: Any) -> bool:
    # bool is an int to Python, and YAML's `yes` becomes one.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(value: Any, *lengths: int) -> bool:
    return isinstance(value, list | tuple) and len(value) in lengths and all(map(_is_number, value))


def number(low: float, high: float = math.inf) -> Rule:
    """One number from `low` to `high`."""
    words = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number >= {low:g}"

    def rule(value: Any, _: Context) -> str:
        return "" if _is_number(value) and low <= value <= high else words

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
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if not whole or len(values) not in (1, 2, 4) or min(values) < 0:
        return "a whole number >= 0, or 2 (left/right, top/bottom) or 4 of them"
    if context.image_size and max(values) >= context.image_size:
        return f"less than the image size {context.image_size}"
    return ""


PROBABILITY = number(0, 1)
SAMPLING = one_of("bilinear", "nearest")

AUGMENTS: dict[str, Augmentation] = {
    "RandomHorizontalFlip": Augmentation(geometry.random_horizontal_flip, {"p": PROBABILITY}),
    "RandomVerticalFlip": Augmentation(geometry.random_vertical_flip, {"p": PROBABILITY}),
    "RandomCrop": Augmentation(
        geometry.random_crop,
        {"padding": pixels, "padding_mode": one_of("constant", "reflect", "edge"), "fill": shade},
    ),
    "RandomResizedCrop": Augmentation(
        geometry.random_resized_crop,
        {"scale": interval(0, 1, above=True), "ratio": interval(0, above=True)},
    ),
    "RandomAffine": Augmentation(
        geometry.random_affine,
        {
            "degrees": angles(360, 2),
            "translate": optional(shares),
            "scale": optional(interval(0, above=True)),
            "shear": optional(angles(89, 2, 4)),
            "interpolation": SAMPLING,
            "fill": shade,
        },
    ),
    "RandomRotation": Augmentation(
        geometry.random_rotation,
        {"degrees": angles(360, 2), "interpolation": SAMPLING, "fill": shade},
    ),
    "RandomErasing": Augmentation(
        appearance.random_erasing,
        {
            "p": PROBABILITY,
            "scale": interval(0, 1),
            "ratio": interval(0, above=True),
            "value": shade_or_random,
        },
    ),
    "ColorJitter": Augmentation(
        appearance.color_jitter,
        {
            "brightness": optional(factor(math.inf)),
            "contrast": optional(factor(math.inf)),
            "saturation": optional(factor(math.inf)),
            "hue": optional(factor(0.5, signed=True)),
        },
    ),
    "RandomAdjustSharpness": Augmentation(
        appearance.random_adjust_sharpness, {"sharpness_factor": number(0), "p": PROBABILITY}
    ),
    "RandomGrayscale": Augmentation(appearance.random_grayscale, {"p": PROBABILITY}),
}
"""Every augmentation by torchvision's name; argument names are torchvision's too.

To add one, write it in `geometry.py` or `appearance.py` as three functions: `draw_x` (images and
generator to numbers per image, by one call of `draws.numbers`), `x` (images and those numbers to
images) and `random_x(images, generator, *, ...)`, whose keywords are the arguments a recipe may
give. Add a line here with one rule for each keyword, and to `tests/test_augment.py` a comparison
of `x` with a slow reference; the contract tests walk this table and need nothing more.
"""
