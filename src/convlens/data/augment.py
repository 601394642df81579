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
from typing import Any

import torch
from torch import Tensor

from convlens.data import appearance, geometry, mixing, policies
from convlens.data.draws import Place, on_whole_batch
from convlens.data.rules import (
    PROBABILITY,
    SAMPLING,
    Context,
    Rule,
    angles,
    below,
    factor,
    interval,
    number,
    one_of,
    optional,
    pixels,
    positive,
    shade,
    shade_or_random,
    shares,
    side,
    whole,
)
from convlens.errors import UsageError
from convlens.names import hint, near, pick


@dataclass(frozen=True)
class Entry:
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
class Augmentation(Entry):
    """An operation on images alone.

    `deals`: the images of a batch are dealt over what it does, so it must see a whole batch; any
    other takes each image by itself.
    """

    deals: bool = False

    @functools.cached_property
    def alternates(self) -> bool:
        """Whether it goes by the images' numbers and the epoch."""
        return "place" in inspect.signature(self.apply).parameters

    def __call__(
        self, images: Tensor, generator: torch.Generator, place: Place, **arguments: Any
    ) -> Tensor:
        """`images` float32 `[N, C, H, W]` in [0, 1] -> the same shape and range."""
        where = (place,) if self.alternates else ()

        def apply(pictures: Tensor) -> Tensor:
            result: Tensor = self.apply(pictures, generator, *where, **arguments)
            return result

        return on_whole_batch(images, generator, apply) if self.deals else apply(images)


@dataclass(frozen=True)
class Mixing(Entry):
    """An operation that mixes the images of a batch, and their labels alike."""

    def __call__(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        """As `Augmentation`, with labels float32 `[N, K]`: probabilities in, probabilities out."""
        pictures, mixed = self.apply(images, labels, generator, **arguments)
        return pictures, mixed


Step = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Pipeline:
    """Augmentations in a row, then those that mix."""

    steps: tuple[Step, ...]
    mixes: tuple[Step, ...] = ()
    classes: int = 0

    def __call__(
        self, images: Tensor, labels: Tensor, place: Place, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Applies all; with one that mixes, labels become probabilities.

        Args:
            images: float32 `[N, C, H, W]` in [0, 1]; the result has the same shape and range.
            labels: int64 `[N]`; returned as float32 `[N, K]` where images were mixed.
            place: which images they are, and the epoch.
        """
        for name, arguments in self.steps:
            images = AUGMENTS[name](images, generator, place, **arguments)
        if self.mixes and not self.classes:
            raise ValueError("`build` must be told the number of classes before labels are mixed")
        for name, arguments in self.mixes:
            labels = mixing.one_hot(labels, self.classes)
            images, labels = MIXES[name](images, labels, generator, **arguments)
        return images, labels


def build(
    ops: Sequence[Step], *, image_size: int = 0, channels: int = 0, classes: int = 0
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
    table: dict[str, Entry] = {**AUGMENTS, **MIXES}
    for name, arguments in ops:
        try:
            entry = pick(table, name, "augmentation")
        except UsageError as error:
            problems.append(f"{error.what} ({error.fix})")
            continue
        found = _problems(name, entry, arguments, Context(image_size, channels, arguments))
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


def _problems(name: str, entry: Entry, arguments: Mapping[str, Any], context: Context) -> list[str]:
    found = []
    for argument, value in arguments.items():
        if argument not in entry.rules:
            close = near(argument, entry.rules)[:1]
            found.append(f"{name}: unknown argument {argument!r}{hint(close)}")
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
        appearance.random_erasing,
        {
            "p": PROBABILITY,
            "scale": interval(0, 1),
            "ratio": interval(0, above=True),
            "value": shade_or_random,
        },
    ),
    "Cutout": Augmentation(appearance.cutout, {"size": side, "p": PROBABILITY, "value": shade}),
    "ColorJitter": Augmentation(
        appearance.color_jitter,
        {
            "brightness": optional(factor(math.inf)),
            "contrast": optional(factor(math.inf)),
            "saturation": optional(factor(math.inf)),
            "hue": optional(factor(0.5, signed=True)),
        },
        deals=True,
    ),
    "RandomAdjustSharpness": Augmentation(
        appearance.random_adjust_sharpness, {"sharpness_factor": number(0), "p": PROBABILITY}
    ),
    "RandomGrayscale": Augmentation(appearance.random_grayscale, {"p": PROBABILITY}),
    "TrivialAugmentWide": Augmentation(
        policies.trivial_augment_wide,
        {"num_magnitude_bins": whole(2, 1000), "interpolation": SAMPLING, "fill": shade},
        deals=True,
    ),
    "RandAugment": Augmentation(
        policies.rand_augment,
        {
            "num_ops": whole(1, 100),
            "magnitude": below("num_magnitude_bins", 31),
            "num_magnitude_bins": whole(2, 1000),
            "interpolation": SAMPLING,
            "fill": shade,
        },
        deals=True,
    ),
}
"""Every augmentation of images by torchvision's name; argument names are torchvision's too.

(`Cutout` and `AlternatingFlip`, which torchvision hasn't, by those of their papers.)

To add one, write it in `geometry.py` or `appearance.py` as three functions: `draw_x` (images and
generator to numbers per image, by one call of `draws.numbers`), `x` (images and those numbers to
images) and `random_x(images, generator, *, ...)`, whose keywords are the arguments a recipe may
give; with a third parameter `place` it is told which images those are and the epoch. One that
deals the images of a batch over what it does is marked `deals`. Add a line
here with one rule for each keyword, and to `tests/test_augment.py` a comparison of `x` with a
slow reference; the contract tests walk this table and need nothing more.
"""

MIXES: dict[str, Mixing] = {
    "MixUp": Mixing(mixing.random_mix_up, {"alpha": positive, "p": PROBABILITY}),
    "CutMix": Mixing(mixing.random_cut_mix, {"alpha": positive, "p": PROBABILITY}),
}
"""Every augmentation that mixes images and labels; they come last in a recipe."""
