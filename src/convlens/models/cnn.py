"""The cnn family: stages of convolutions, global pooling or flattening, a linear classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from convlens.errors import UsageError, lookup

T = TypeVar("T", int, str)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "silu": lambda: nn.SiLU(inplace=True),
}
POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "max": lambda: nn.MaxPool2d(2),
    "avg": lambda: nn.AvgPool2d(2),
    "stride": nn.Identity,
    "none": nn.Identity,
}
PADDINGS = {"same": True, "valid": False}
HEADS: dict[str, Callable[[], nn.Module]] = {
    "flatten": nn.Identity,
    "avg": lambda: nn.AdaptiveAvgPool2d(1),
    "max": lambda: nn.AdaptiveMaxPool2d(1),
}
MAX_CONVOLUTIONS = 1000


class CNN(nn.Module):
    """Stages of `depth` convolutions, each halving the image, then a classifier.

    A stage is `depth` times convolution, batch norm and activation, then dropout. The image is
    halved right after the last convolution of the stage, so that norm and activation have a quarter
    of the work (without batch norm, ReLU and `max` give the same result in either order). With
    `pool: stride` that convolution itself halves the image; with `pool: none` the stage keeps its
    size. Maps images `[N, channels, S, S]` to logits `[N, classes]`.

    Args:
        widths: output channels of each stage.
        depth: convolutions in each stage, one number or one per stage.
        kernel: kernel size, odd, one number or one per stage.
        padding: `same` pads with zeros to keep the size. `valid` computes only where the whole
            kernel lies on the image, which loses `kernel - 1` pixels: less work, and no loss if
            the border of the images is empty.
        pool: how a stage halves the image: `max`, `avg`, `stride` or `none`, one for all stages
            or one per stage.
        batch_norm: batch norm after each convolution (which then has no bias).
        activation: `relu`, `gelu` or `silu`.
        dropout: dropout probability before the classifier.
        stage_dropout: probability of dropping a whole channel after each stage.
        hidden: width of a dense layer before the classifier; 0 for none.
        head: how the output of the last stage becomes a vector: `flatten`, or `avg` or `max` over
            all pixels.

    Raises:
        UsageError: an unsuitable option.
    """

    head = "classifier"

    def __init__(
        self,
        classes: int,
        channels: int,
        image_size: int,
        *,
        widths: Sequence[int] = (32, 64, 128),
        depth: int | Sequence[int] = 1,
        kernel: int | Sequence[int] = 3,
        padding: str = "same",
        pool: str | Sequence[str] = "max",
        batch_norm: bool = True,
        activation: str = "relu",
        dropout: float = 0.0,
        stage_dropout: float = 0.0,
        hidden: int = 0,
        head: str = "avg",
    ) -> None:
        super().__init__()
        depths = _per_stage(depth, widths, "depth")
        kernels = _per_stage(kernel, widths, "kernel")
        pools = _per_stage(pool, widths, "pool")
        _check_numbers(
            widths, depths, kernels, {"dropout": dropout, "stage_dropout": stage_dropout}, hidden
        )
        for name in pools:
            lookup(POOLINGS, name, "model.pool")
        lookup(ACTIVATIONS, activation, "model.activation")
        pads = lookup(PADDINGS, padding, "model.padding")
        self.stages: tuple[str, ...] = tuple(f"stage{i + 1}" for i in range(len(widths)))
        inputs, size = channels, image_size
        for i, name in enumerate(self.stages):
            stage = _Stage(
                name=name,
                width=widths[i],
                depth=depths[i],
                kernel=kernels[i],
                padding=kernels[i] // 2 if pads else 0,
                pool=pools[i],
                batch_norm=batch_norm,
                activation=activation,
                dropout=stage_dropout,
            )
            layers, size = stage.build(inputs, size)
            self.add_module(name, layers)
            inputs = widths[i]
        self.pool = nn.Sequential(lookup(HEADS, head, "model.head")(), Flatten())
        features = inputs * (size**2 if head == "flatten" else 1)
        dense: OrderedDict[str, nn.Module] = OrderedDict()
        if hidden:
            dense["hidden"] = nn.Linear(features, hidden)
            dense["activation"] = ACTIVATIONS[activation]()
            features = hidden
        if dropout:
            dense["dropout"] = nn.Dropout(dropout)
        self.dense = nn.Sequential(dense)
        self.classifier = nn.Linear(features, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for name in self.stages:
            images = self.get_submodule(name)(images)
        logits: torch.Tensor = self.classifier(self.dense(self.pool(images)))
        return logits


@dataclass(frozen=True)
class _Stage:
    """Options of one stage, under the names of `CNN`; `padding` in pixels."""

    name: str
    width: int
    depth: int
    kernel: int
    padding: int
    pool: str
    batch_norm: bool
    activation: str
    dropout: float

    def build(self, inputs: int, size: int) -> tuple[nn.Sequential, int]:
        """Return the layers for `inputs` channels of `size` pixels, and the size of the output."""
        layers: list[nn.Module] = []
        for index in range(self.depth):
            size = self._size_after_convolution(size)
            # A single pixel can't be halved.
            halves = self.pool != "none" and size > 1 and index == self.depth - 1
            stride = 2 if halves and self.pool == "stride" else 1
            layers.append(
                nn.Conv2d(
                    inputs, self.width, self.kernel, stride, self.padding, bias=not self.batch_norm
                )
            )
            if halves:
                layers.append(POOLINGS[self.pool]())
                size = (size + 1) // 2 if self.pool == "stride" else size // 2
            if self.batch_norm:
                layers.append(nn.BatchNorm2d(self.width))
            layers.append(ACTIVATIONS[self.activation]())
            inputs = self.width
        if self.dropout:
            layers.append(nn.Dropout2d(self.dropout))
        return nn.Sequential(*layers), size

    def _size_after_convolution(self, size: int) -> int:
        """Output size of a convolution of stride 1 (one of stride 2 halves it, rounding up)."""
        output_size = size + 2 * self.padding - self.kernel + 1
        if output_size < 1:
            raise UsageError(
                f"{self.name}: a {self.kernel}x{self.kernel} kernel doesn't fit maps of {size} px",
                fix="use model.padding=same, smaller kernels, fewer stages or larger images",
            )
        return output_size


class Flatten(nn.Flatten):
    """Flatten `[N, C, H, W]` to `[N, C * H * W]`; the gradient gets the memory format of the input.

    Without this it would be contiguous. The backward pass of a last stage in channels_last would
    then access memory in two orders at once, which costs a few percent of a small network's step.
    """

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        needs_hook = maps.requires_grad and not maps.is_contiguous()
        if needs_hook and not torch.compiler.is_compiling():  # the compiler chooses formats itself
            maps.register_hook(_channels_last)
        return super().forward(maps)


def _channels_last(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


def _per_stage(value: T | Sequence[T], widths: Sequence[int], key: str) -> list[T]:
    """Return one value per stage."""
    values: list[T]
    if isinstance(value, Sequence) and not isinstance(value, str):
        values = list(value)
    else:
        values = [value] * len(widths)
    if len(values) != len(widths):
        raise UsageError(f"model.{key} has {len(values)} values for {len(widths)} model.widths")
    return values


def _check_numbers(
    widths: Sequence[int],
    depths: list[int],
    kernels: list[int],
    dropouts: dict[str, float],
    hidden: int,
) -> None:
    """Raise one error for all numbers that are out of range."""
    problems = []
    if not widths or min(widths) < 1:
        problems.append(f"model.widths={list(widths)}: needs one or more positive numbers")
    if min(depths, default=1) < 1:
        problems.append(f"model.depth={depths}: each stage needs at least one convolution")
    if sum(depths) > MAX_CONVOLUTIONS:  # would take hours to build before any other error
        problems.append(f"model.depth: {sum(depths):,} convolutions; at most {MAX_CONVOLUTIONS:,}")
    if any(k < 1 or k % 2 == 0 for k in kernels):
        problems.append(f"model.kernel={kernels}: kernel sizes are odd (1, 3, 5, ...)")
    for key, value in dropouts.items():
        if not 0 <= value < 1:
            problems.append(f"model.{key}={value}: must be a probability below 1")
    if hidden < 0:
        problems.append(f"model.hidden={hidden}: must be a width, or 0 for none")
    if problems:
        raise UsageError("; ".join(problems))
