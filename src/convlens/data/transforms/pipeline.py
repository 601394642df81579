"""Augmentation pipelines: the tables of augmentations, and the check of a recipe's arguments.

The operations are in `geometry.py`, `color.py`, `auto_augment.py` (a random operation for each
image) and `mixup.py` (images and labels are mixed). All are batched, run on the images' device and
draw their numbers for each image from one generator: the same generator state gives the same
result. The input is never changed.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from convlens import user_code
from convlens.data.transforms import auto_augment, color, geometry, mixup
from convlens.data.transforms.random import SampleInfo, for_whole_batch
from convlens.errors import UsageError, close_matches, did_you_mean_suffix, lookup

# Rules: what the arguments of an augmentation may be


class RuleContext(NamedTuple):
    """What a rule may depend on besides the value."""

    image_size: int = 0  # 0: unknown
    channels: int = 0  # 0: unknown
    arguments: Mapping[str, Any] = {}  # all arguments of the operation


# Returns "" for a valid value, else a description of the valid values.
Rule = Callable[[Any, RuleContext], str]


def _is_number(value: Any) -> bool:
    # bool is a subclass of int, and YAML has booleans.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(value: Any, *lengths: int) -> bool:
    return isinstance(value, list | tuple) and len(value) in lengths and all(map(_is_number, value))


def number(low: float, high: float = math.inf) -> Rule:
    """One number from `low` to `high`."""
    valid = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number >= {low:g}"

    def rule(value: Any, _: RuleContext) -> str:
        return "" if _is_number(value) and low <= value <= high else valid

    return rule


def positive(value: Any, _: RuleContext) -> str:
    """A number above 0."""
    return "" if _is_number(value) and value > 0 else "a number above 0"


def integer(low: int, high: int) -> Rule:
    """A whole number from `low` to `high`."""
    valid = f"a whole number from {low} to {high}"
    return lambda value, _: "" if _is_integer(value) and low <= value <= high else valid


def below(argument: str, default: int) -> Rule:
    """A whole number >= 0 that is less than another argument, whose default is `default`."""

    def rule(value: Any, context: RuleContext) -> str:
        limit = context.arguments.get(argument, default)
        if not _is_integer(limit):  # reported by the rule of that argument
            limit = math.inf
        is_valid = _is_integer(value) and 0 <= value < limit
        return "" if is_valid else f"a whole number from 0, below {argument} ({limit})"

    return rule


def interval(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    """Two ordered numbers from `low` to `high`; `above` excludes `low`."""
    valid = f"two numbers [low, high] {'above' if above else 'from'} {low:g}"
    valid += f" to {high:g}" * (high < math.inf)

    def rule(value: Any, _: RuleContext) -> str:
        if not _are_numbers(value, 2):
            return valid
        first, second = value
        above_low = first > low if above else first >= low
        return "" if above_low and first <= second <= high else valid

    return rule


def angles(limit: float, *lengths: int) -> Rule:
    """A number `v` >= 0 for the range -v ... v, or `lengths` numbers in ordered pairs."""
    valid = f"a number from 0 to {limit:g}, or [low, high]" + " (x) or 4 (x, y)" * (4 in lengths)

    def rule(value: Any, _: RuleContext) -> str:
        if _is_number(value):
            return "" if 0 <= value <= limit else valid
        if not _are_numbers(value, *lengths):
            return valid
        pairs = zip(value[::2], value[1::2], strict=True)
        return "" if all(-limit <= low <= high <= limit for low, high in pairs) else valid

    return rule


def factor(limit: float, *, signed: bool = False) -> Rule:
    """Strength of `ColorJitter`: a number >= 0, or an ordered pair (of signed numbers)."""
    pair = interval(-limit if signed else 0, limit)
    single = number(0, limit)

    def rule(value: Any, context: RuleContext) -> str:
        if not single(value, context):
            return ""
        valid_pair = pair(value, context)
        return valid_pair and f"{single(None, context)}, or {valid_pair}"

    return rule


def optional(inner: Rule) -> Rule:
    """None, or a value that the inner rule accepts."""
    return lambda value, context: "" if value is None else inner(value, context)


def one_of(*choices: str) -> Rule:
    """One of the given words."""
    return lambda value, _: "" if value in choices else " or ".join(choices)


def fractions(value: Any, _: RuleContext) -> str:
    """Largest shift as fractions of width and height."""
    is_valid = _are_numbers(value, 2) and all(0 <= v <= 1 for v in value)
    return "" if is_valid else "two numbers [x, y] from 0 to 1 (fractions of width and height)"


def color_value(value: Any, context: RuleContext) -> str:
    """A grey value in 0..1, or one value for each channel."""
    if _is_number(value):
        return "" if 0 <= value <= 1 else "from 0 (black) to 1 (white)"
    lengths = (1, context.channels or 3)
    if _are_numbers(value, *lengths) and all(0 <= v <= 1 for v in value):
        return ""
    return "a number from 0 to 1, or one for each channel"


def color_value_or_random(value: Any, context: RuleContext) -> str:
    """As `color_value`, or the word `random`."""
    valid_color = "" if value == "random" else color_value(value, context)
    return valid_color and f"{valid_color}, or random"


def padding_width(value: Any, context: RuleContext) -> str:
    """Padding in whole pixels, less than the image size."""
    values = value if isinstance(value, list | tuple) else [value]
    if not all(map(_is_integer, values)) or len(values) not in (1, 2, 4) or min(values) < 0:
        return "a whole number >= 0, or 2 (left/right, top/bottom) or 4 of them"
    if context.image_size and max(values) >= context.image_size:
        return f"less than the image size {context.image_size}"
    return ""


def square_side(value: Any, context: RuleContext) -> str:
    """Side of a square in whole pixels, at most the image size."""
    if not _is_integer(value) or value < 1:
        return "a whole number >= 1 (pixels)"
    if context.image_size and value > context.image_size:
        return f"at most the image size {context.image_size}"
    return ""


PROBABILITY = number(0, 1)
SAMPLING = one_of("bilinear", "nearest")


@dataclass(frozen=True)
class AugmentEntry:
    """An entry of a table: the operation, and one rule for each of its arguments."""

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
    """An operation that changes images and keeps labels.

    Args:
        apply: The operation.
        rules: A rule for each argument.
        needs_full_batch: Whether the operation divides the batch into shares, so that it must see
            the full batch. Other operations process each image independently.
    """

    needs_full_batch: bool = False

    @functools.cached_property
    def needs_sample_info(self) -> bool:
        """Whether the operation depends on the images' numbers and the epoch."""
        return "sample_info" in inspect.signature(self.apply).parameters

    def __call__(
        self, images: Tensor, generator: torch.Generator, sample_info: SampleInfo, **arguments: Any
    ) -> Tensor:
        """Apply the operation to images, float32 `[N, C, H, W]` in [0, 1].

        The result has the same shape and range.
        """
        extra = (sample_info,) if self.needs_sample_info else ()

        def apply(batch: Tensor) -> Tensor:
            result: Tensor = self.apply(batch, generator, *extra, **arguments)
            return result

        return for_whole_batch(images, generator, apply) if self.needs_full_batch else apply(images)


@dataclass(frozen=True)
class Mixing(AugmentEntry):
    """An operation that mixes the images of a batch and their labels."""

    def __call__(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        """Apply the operation to images and class probabilities, float32 `[N, K]`."""
        mixed_images, mixed_labels = self.apply(images, labels, generator, **arguments)
        return mixed_images, mixed_labels


PipelineStep = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Pipeline:
    """A sequence of augmentations, followed by those that mix images."""

    steps: tuple[PipelineStep, ...]
    mixes: tuple[PipelineStep, ...] = ()
    classes: int = 0
    user_entries: Mapping[str, Augmentation | Mixing] = field(default_factory=dict)

    def __call__(
        self, images: Tensor, labels: Tensor, sample_info: SampleInfo, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Apply all augmentations.

        Args:
            images: float32 `[N, C, H, W]` in [0, 1].
            labels: int64 `[N]`.
            sample_info: The numbers of the images and the epoch.
            generator: The random generator.

        Returns:
            Images of the same shape and range, and labels: unchanged, or class probabilities,
            float32 `[N, K]`, if images were mixed.

        Raises:
            ValueError: Images are mixed and the number of classes is unknown.
        """
        for name, arguments in self.steps:
            augmentation = cast(Augmentation, self.user_entries.get(name) or AUGMENTS[name])
            images = augmentation(images, generator, sample_info, **arguments)
        if self.mixes and not self.classes:
            raise ValueError("pass the number of classes to `build_pipeline` to mix labels")
        for name, arguments in self.mixes:
            labels = mixup.one_hot(labels, self.classes)
            mixing = cast(Mixing, self.user_entries.get(name) or MIXES[name])
            images, labels = mixing(images, labels, generator, **arguments)
        return images, labels


def build_pipeline(
    ops: Sequence[PipelineStep], *, image_size: int = 0, channels: int = 0, classes: int = 0
) -> Pipeline:
    """Check the operations of a recipe and build a pipeline of them.

    Args:
        ops: Name and arguments of each operation, in the order of their application.
        image_size, channels: Properties of the images, if they are known. Then padding that does
            not fit the image and colors that do not fit the channels are found as well.
        classes: Number of classes; needed to apply operations that mix labels.

    Raises:
        UsageError: Unknown names or arguments, missing or invalid values, or operations after one
            that mixes images. The error lists all problems.
    """
    problems: list[str] = []
    signatures: dict[str, None] = {}
    user_entries = {name: user_augmentation(name) for name, _ in ops if is_user_augmentation(name)}
    table: dict[str, AugmentEntry] = {**AUGMENTS, **MIXES, **user_entries}
    mixing = {name for name, entry in table.items() if isinstance(entry, Mixing)}
    for name, arguments in ops:
        try:
            entry = lookup(table, name, "augmentation")
        except UsageError as error:
            suggests = error.fix.startswith("did you mean")
            problems.append(f"{error.what} ({error.fix})" if suggests else error.what)
            signatures |= {} if suggests else {error.fix: None}
            continue
        context = RuleContext(image_size, channels, arguments)
        argument_problems = _find_problems(name, entry, arguments, context)
        problems += argument_problems
        if argument_problems:
            signatures[f"{name} takes {', '.join(entry.rules) or 'no arguments'}"] = None
    steps = [(name, dict(arguments)) for name, arguments in ops if name not in mixing]
    mixes = [(name, dict(arguments)) for name, arguments in ops if name in mixing]
    if [name for name, _ in ops] != [name for name, _ in (*steps, *mixes)]:
        problems.append(f"{mixes[0][0]} mixes images and labels of a batch: it must come last")
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError(shown + more, where="augment", fix="; ".join(list(signatures)[:3]))
    for name, entry in user_entries.items():
        arguments = next(arguments for each, arguments in ops if each == name)
        _check_user_augmentation(name, entry, arguments, image_size or 32, channels or 3)
    return Pipeline(tuple(steps), tuple(mixes), classes, user_entries)


def is_user_augmentation(name: str) -> bool:
    """Return whether a name means an augmentation that a user wrote."""
    is_own = name in AUGMENTS or name in MIXES
    return not is_own and user_code.is_user_code("augmentations", name)


def mixes_labels(ops: Sequence[PipelineStep]) -> list[str]:
    """Return the names of the operations that mix images and labels; all names must be known."""

    def mixes(name: str) -> bool:
        if is_user_augmentation(name):
            return isinstance(user_augmentation(name), Mixing)
        return name in MIXES

    return [name for name, _ in ops if mixes(name)]


def user_augmentation(name: str) -> Augmentation | Mixing:
    """Return the entry for an augmentation of the user.

    It is a function `(images, generator, *, ...) -> images`, with a third parameter `sample_info`
    if it needs that, or `(images, labels, generator, *, ...) -> (images, labels)`.
    """
    function = user_code.load_object("augmentations", name)
    parameters = inspect.signature(function).parameters.values()
    rules = {p.name: _any_value for p in parameters if p.kind is p.KEYWORD_ONLY}
    if "labels" in [p.name for p in parameters]:
        return Mixing(function, rules)
    # A function draws its numbers for the images that it gets, so these must be the full batch.
    return Augmentation(function, rules, needs_full_batch=True)


def _any_value(value: Any, context: RuleContext) -> str:
    return ""


def _check_user_augmentation(
    name: str, entry: Augmentation | Mixing, arguments: Mapping[str, Any], size: int, channels: int
) -> None:
    """Apply an augmentation of the user to four images.

    Raises:
        UsageError: an exception in its code, or a result of another shape, type or range.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, channels, size, size, generator=generator)
    labels = torch.eye(4)
    try:
        if isinstance(entry, Mixing):
            result, labels = entry(images, labels, generator, **arguments)
        else:
            info = SampleInfo(torch.arange(4), 1, 0)
            result = entry(images, generator, info, **arguments)
    except Exception as error:
        raise user_code.part_error("augmentations", name, error) from error
    is_image = isinstance(result, Tensor) and result.dtype == torch.float32
    if not is_image or result.shape[:2] != images.shape[:2] or result.ndim != 4:
        found = f"{result.dtype} {list(result.shape)}" if isinstance(result, Tensor) else result
        raise UsageError(
            f"augmentation {name}: returned {found} for float32 {list(images.shape)}",
            fix="return float32 images of the same number and channels",
        )
    if not bool(((result >= 0) & (result <= 1)).all()):
        raise UsageError(
            f"augmentation {name}: values from {result.min():.3g} to {result.max():.3g}",
            fix="keep values from 0 to 1, e.g. with images.clamp(0, 1)",
        )
    if labels.shape != (4, 4) or not torch.allclose(labels.sum(1), torch.ones(4), atol=1e-4):
        raise UsageError(
            f"augmentation {name}: labels are not probabilities of classes [N, K]",
            fix="each row must have the sum 1",
        )


def _find_problems(
    name: str, entry: AugmentEntry, arguments: Mapping[str, Any], context: RuleContext
) -> list[str]:
    problems = []
    for argument, value in arguments.items():
        if argument not in entry.rules:
            close = close_matches(argument, entry.rules)[:1]
            problems.append(f"{name}: unknown argument {argument!r}{did_you_mean_suffix(close)}")
        elif valid := entry.rules[argument](value, context):
            problems.append(f"{name}: {argument}={value!r} should be {valid}")
    missing = [argument for argument in entry.required if argument not in arguments]
    problems += [f"{name}: {argument} is missing" for argument in missing]
    return problems


AUGMENTS: dict[str, Augmentation] = {
    "RandomHorizontalFlip": Augmentation(geometry.random_horizontal_flip, {"p": PROBABILITY}),
    "AlternatingFlip": Augmentation(geometry.alternating_flip, {}),
    "RandomVerticalFlip": Augmentation(geometry.random_vertical_flip, {"p": PROBABILITY}),
    "RandomCrop": Augmentation(
        geometry.random_crop,
        {
            "padding": padding_width,
            "padding_mode": one_of("constant", "reflect", "edge"),
            "fill": color_value,
        },
    ),
    "RandomResizedCrop": Augmentation(
        geometry.random_resized_crop,
        {
            "scale": interval(0, 1, above=True),
            "ratio": interval(0, above=True),
            "size": optional(square_side),
        },
    ),
    "RandomAffine": Augmentation(
        geometry.random_affine,
        {
            "degrees": angles(360, 2),
            "translate": optional(fractions),
            "scale": optional(interval(0, above=True)),
            "shear": optional(angles(89, 2, 4)),
            "interpolation": SAMPLING,
            "fill": color_value,
        },
    ),
    "RandomRotation": Augmentation(
        geometry.random_rotation,
        {"degrees": angles(360, 2), "interpolation": SAMPLING, "fill": color_value},
    ),
    "RandomErasing": Augmentation(
        color.random_erasing,
        {
            "p": PROBABILITY,
            "scale": interval(0, 1),
            "ratio": interval(0, above=True),
            "value": color_value_or_random,
        },
    ),
    "Cutout": Augmentation(
        color.cutout, {"size": square_side, "p": PROBABILITY, "value": color_value}
    ),
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
        {"num_magnitude_bins": integer(2, 1000), "interpolation": SAMPLING, "fill": color_value},
        needs_full_batch=True,
    ),
    "RandAugment": Augmentation(
        auto_augment.rand_augment,
        {
            "num_ops": integer(1, 100),
            "magnitude": below("num_magnitude_bins", 31),
            "num_magnitude_bins": integer(2, 1000),
            "interpolation": SAMPLING,
            "fill": color_value,
        },
        needs_full_batch=True,
    ),
}
"""Augmentations that keep labels. Names of operations and arguments are torchvision's.

Those that torchvision does not have, `Cutout` and `AlternatingFlip`, are named as in their papers.

To add one, write three functions in `geometry.py` or `color.py`: `draw_x` draws one set of numbers
per image by one call of `uniform_numbers`, `x` applies given numbers to images, and
`random_x(images, generator, *, ...)` does both; its keywords are the arguments that a recipe may
give. With a third parameter `sample_info` it gets the numbers of the images and the epoch. Mark it
with `needs_full_batch` if it divides the batch into shares. Add a line here with one rule for each
keyword, and a test that compares `x` with a slow reference. The contract tests cover every entry of
this table.
"""

MIXES: dict[str, Mixing] = {
    "MixUp": Mixing(mixup.random_mix_up, {"alpha": positive, "p": PROBABILITY}),
    "CutMix": Mixing(mixup.random_cut_mix, {"alpha": positive, "p": PROBABILITY}),
}
"""Augmentations that mix images and labels. They come last in a recipe."""
