"""The tables of augmentations, and the check of what a recipe asks of them.

The operations are in `geometry.py` (they move pixels), `appearance.py` (they change them),
`policies.py` (a random one for each image) and `mixing.py` (they mix images and labels). All are
batched, run on the images' device and draw their numbers per image from one generator: the same
generator state gives the same result, and the input is never changed.
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

from convlens.data.transforms import auto_augment, color, geometry, mixup
from convlens.data.transforms.random import SampleInfo, for_whole_batch
from convlens.errors import UsageError, close_matches, did_you_mean_suffix, lookup

# ---- rules ----------------------------------------
# What the arguments of an augmentation may be: one rule each, said in words where it is broken.


class RuleContext(NamedTuple):
    """What the images will be, as far as it is known (0 means unknown), and what else was asked."""

    image_size: int = 0
    channels: int = 0
    arguments: Mapping[str, Any] = {}  # all arguments of the operation, for rules about two


# What a value should be, in words, where it is not that; "" where it can be used.
Rule = Callable[[Any, RuleContext], str]


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

    def rule(value: Any, _: RuleContext) -> str:
        return "" if _is_number(value) and low <= value <= high else words

    return rule


def positive(value: Any, _: RuleContext) -> str:
    """A number above 0."""
    return "" if _is_number(value) and value > 0 else "a number above 0"


def whole(low: int, high: int) -> Rule:
    """A whole number from `low` to `high`."""
    words = f"a whole number from {low} to {high}"
    return lambda value, _: "" if _is_whole(value) and low <= value <= high else words


def below(other: str, default: int) -> Rule:
    """A whole number from 0 on that is less than another argument, by default `default`."""

    def rule(value: Any, context: RuleContext) -> str:
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

    def rule(value: Any, _: RuleContext) -> str:
        if not _are_numbers(value, 2):
            return words
        first, second = value
        above_low = first > low if above else first >= low
        return "" if above_low and first <= second <= high else words

    return rule


def angles(limit: float, *lengths: int) -> Rule:
    """A number >= 0 (for minus to plus), or `lengths` numbers in ordered pairs."""
    words = f"a number from 0 to {limit:g}, or [low, high]" + " (x) or 4 (x, y)" * (4 in lengths)

    def rule(value: Any, _: RuleContext) -> str:
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

    def rule(value: Any, context: RuleContext) -> str:
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


def shares(value: Any, _: RuleContext) -> str:
    """`translate`: the largest shift as a fraction of width and of height."""
    fine = _are_numbers(value, 2) and all(0 <= v <= 1 for v in value)
    return "" if fine else "two numbers [x, y] from 0 to 1 (fractions of width and height)"


def shade(value: Any, context: RuleContext) -> str:
    """A grey value, or one for each channel."""
    if _is_number(value):
        return "" if 0 <= value <= 1 else "from 0 (black) to 1 (white)"
    lengths = (1, context.channels or 3)
    if _are_numbers(value, *lengths) and all(0 <= v <= 1 for v in value):
        return ""
    return "a number from 0 to 1, or one for each channel"


def shade_or_random(value: Any, context: RuleContext) -> str:
    """As `shade`, or the word random."""
    complaint = "" if value == "random" else shade(value, context)
    return complaint and f"{complaint}, or random"


def pixels(value: Any, context: RuleContext) -> str:
    """`padding`: whole pixels, less than the image has."""
    values = value if isinstance(value, list | tuple) else [value]
    if not all(map(_is_whole, values)) or len(values) not in (1, 2, 4) or min(values) < 0:
        return "a whole number >= 0, or 2 (left/right, top/bottom) or 4 of them"
    if context.image_size and max(values) >= context.image_size:
        return f"less than the image size {context.image_size}"
    return ""


def side(value: Any, context: RuleContext) -> str:
    """`Cutout`: whole pixels, at most as many as the image has."""
    if not _is_whole(value) or value < 1:
        return "a whole number >= 1 (pixels)"
    if context.image_size and value > context.image_size:
        return f"at most the image size {context.image_size}"
    return ""


PROBABILITY = number(0, 1)
SAMPLING = one_of("bilinear", "nearest")


@dataclass(frozen=True)
class AugmentEntry:
    """One entry of a table: the operation, and one rule for each of its arguments."""

    apply: Callable[..., Any]
    rules: Mapping[str, Rule]

    @functools.cached_property
    def required(self) -> tuple[str, ...]:
        """The arguments that have no default."""
        parameters = inspect.signature(self.apply).parameters.values()
        return tuple(
            p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty
        )


@dataclass(frozen=True)
class Augmentation(AugmentEntry):
    """An operation on images alone.

    `needs_full_batch`: the images of a batch are dealt over what it does, so it must see a whole batch; any
    other takes each image by itself.
    """

    needs_full_batch: bool = False

    @functools.cached_property
    def alternates(self) -> bool:
        """Whether it goes by the images' numbers and the epoch."""
        return "sample_info" in inspect.signature(self.apply).parameters

    def __call__(
        self, images: Tensor, generator: torch.Generator, sample_info: SampleInfo, **arguments: Any
    ) -> Tensor:
        """`images` float32 `[N, C, H, W]` in [0, 1] -> the same shape and range."""
        where = (sample_info,) if self.alternates else ()

        def apply(pictures: Tensor) -> Tensor:
            result: Tensor = self.apply(pictures, generator, *where, **arguments)
            return result

        return for_whole_batch(images, generator, apply) if self.needs_full_batch else apply(images)


@dataclass(frozen=True)
class Mixing(AugmentEntry):
    """An operation that mixes the images of a batch, and their labels alike."""

    def __call__(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        """As `Augmentation`, with labels float32 `[N, K]`: probabilities in, probabilities out."""
        pictures, mixed = self.apply(images, labels, generator, **arguments)
        return pictures, mixed


PipelineStep = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Pipeline:
    """Augmentations in a row, then those that mix."""

    steps: tuple[PipelineStep, ...]
    mixes: tuple[PipelineStep, ...] = ()
    classes: int = 0

    def __call__(
        self, images: Tensor, labels: Tensor, sample_info: SampleInfo, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Applies all; with one that mixes, labels become probabilities.

        Args:
            images: float32 `[N, C, H, W]` in [0, 1]; the result has the same shape and range.
            labels: int64 `[N]`; returned as float32 `[N, K]` where images were mixed.
            sample_info: which images they are, and the epoch.
        """
        for name, arguments in self.steps:
            images = AUGMENTS[name](images, generator, sample_info, **arguments)
        if self.mixes and not self.classes:
            raise ValueError("`build` must be told the number of classes before labels are mixed")
        for name, arguments in self.mixes:
            labels = mixup.one_hot(labels, self.classes)
            images, labels = MIXES[name](images, labels, generator, **arguments)
        return images, labels


def build_pipeline(
    ops: Sequence[PipelineStep], *, image_size: int = 0, channels: int = 0, classes: int = 0
) -> Pipeline:
    """The operations of a recipe, checked; no tensor is touched.

    Args:
        ops: torchvision's name and arguments of each operation, in the order they apply.
        image_size, channels: what the images will be, where it is known: then padding that does
            not fit the image and colours that don't fit the channels are found too.
        classes: how many there are; needed to apply operations that mix labels.

    Raises:
        UsageError: unknown names or arguments, missing or impossible values, operations after
            one that mixes images; all at once.
    """
    problems: list[str] = []
    taken: dict[str, None] = {}
    table: dict[str, AugmentEntry] = {**AUGMENTS, **MIXES}
    for name, arguments in ops:
        try:
            entry = lookup(table, name, "augmentation")
        except UsageError as error:
            problems.append(f"{error.what} ({error.fix})")
            continue
        found = _find_problems(name, entry, arguments, RuleContext(image_size, channels, arguments))
        problems += found
        if found:
            taken[f"{name} takes {', '.join(entry.rules) or 'no arguments'}"] = None
    steps = [(name, dict(arguments)) for name, arguments in ops if name not in MIXES]
    mixes = [(name, dict(arguments)) for name, arguments in ops if name in MIXES]
    if [name for name, _ in ops] != [name for name, _ in (*steps, *mixes)]:
        problems.append(f"{mixes[0][0]} mixes images and labels of a batch: it must come last")
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError(shown + more, where="augment", fix="; ".join(list(taken)[:3]))
    return Pipeline(tuple(steps), tuple(mixes), classes)


def _find_problems(
    name: str, entry: AugmentEntry, arguments: Mapping[str, Any], context: RuleContext
) -> list[str]:
    found = []
    for argument, value in arguments.items():
        if argument not in entry.rules:
            close = close_matches(argument, entry.rules)[:1]
            found.append(f"{name}: unknown argument {argument!r}{did_you_mean_suffix(close)}")
        elif complaint := entry.rules[argument](value, context):
            found.append(f"{name}: {argument}={value!r} should be {complaint}")
    missing = [argument for argument in entry.required if argument not in arguments]
    found += [f"{name}: {argument} is missing" for argument in missing]
    return found


AUGMENTS: dict[str, Augmentation] = {
    "RandomHorizontalFlip": Augmentation(geometry.random_horizontal_flip, {"p": PROBABILITY}),
    "AlternatingFlip": Augmentation(geometry.alternating_flip, {}),
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
        color.random_erasing,
        {
            "p": PROBABILITY,
            "scale": interval(0, 1),
            "ratio": interval(0, above=True),
            "value": shade_or_random,
        },
    ),
    "Cutout": Augmentation(color.cutout, {"size": side, "p": PROBABILITY, "value": shade}),
    "ColorJitter": Augmentation(
        color.color_jitter,
        {
            "brightness": optional(factor(math.inf)),
            "contrast": optional(factor(math.inf)),
            "saturation": optional(factor(math.inf)),
            "hue": optional(factor(0.5, signed=True)),
        },
        needs_full_batch=True,
    ),
    "RandomAdjustSharpness": Augmentation(
        color.random_adjust_sharpness, {"sharpness_factor": number(0), "p": PROBABILITY}
    ),
    "RandomGrayscale": Augmentation(color.random_grayscale, {"p": PROBABILITY}),
    "TrivialAugmentWide": Augmentation(
        auto_augment.trivial_augment_wide,
        {"num_magnitude_bins": whole(2, 1000), "interpolation": SAMPLING, "fill": shade},
        needs_full_batch=True,
    ),
    "RandAugment": Augmentation(
        auto_augment.rand_augment,
        {
            "num_ops": whole(1, 100),
            "magnitude": below("num_magnitude_bins", 31),
            "num_magnitude_bins": whole(2, 1000),
            "interpolation": SAMPLING,
            "fill": shade,
        },
        needs_full_batch=True,
    ),
}
"""Every augmentation of images by torchvision's name; argument names are torchvision's too.

(`Cutout` and `AlternatingFlip`, which torchvision hasn't, by those of their papers.)

To add one, write it in `geometry.py` or `appearance.py` as three functions: `draw_x` (images and
generator to numbers per image, by one call of `draws.numbers`), `x` (images and those numbers to
images) and `random_x(images, generator, *, ...)`, whose keywords are the arguments a recipe may
give; with a third parameter `sample_info` it is told which images those are and the epoch. One that
deals the images of a batch over what it does is marked `needs_full_batch`. Add a line
here with one rule for each keyword, and to `tests/unit/data/transforms/test_pipeline.py` a comparison of `x` with a
slow reference; the contract tests walk this table and need nothing more.
"""

MIXES: dict[str, Mixing] = {
    "MixUp": Mixing(mixup.random_mix_up, {"alpha": positive, "p": PROBABILITY}),
    "CutMix": Mixing(mixup.random_cut_mix, {"alpha": positive, "p": PROBABILITY}),
}
"""Every augmentation that mixes images and labels; they come last in a recipe."""
