"""The plain CNN family: stages of convolutions, a pooling head, one linear classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
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
DEEPEST = 1000  # convolutions


class CNN(nn.Module):
    """Stages of `depth` convolutions, each stage halving the image, then a classifier.

    A stage is `depth` times convolution, batch norm, activation; then dropout. The stage halves
    the image right after its last convolution: norm and activation then have a quarter of the
    work (without norm, ReLU and `max` give the same in either order). With `pool: stride` that
    convolution halves it itself; with `pool: none` the stage doesn't. Images `[N, channels, S, S]`
    give logits `[N, classes]`.

    Args:
        widths: output channels of each stage.
        depth: convolutions in each stage, one number or one per stage.
        kernel: size of the kernels, odd, one number or one per stage.
        padding: `same` pads with zeros to keep the size, `valid` computes only where the whole
            kernel lies on the image, which loses `kernel - 1` pixels: less work, and no loss
            where the border of the images is empty.
        pool: how a stage ends: `max`, `avg`, `stride` or `none`, one for all or one per stage.
        batch_norm: batch norm after each convolution (which then has no bias).
        activation: `relu`, `gelu` or `silu`.
        dropout: probability in the head, before the classifier.
        stage_dropout: probability of dropping a whole channel after each stage.
        hidden: width of one dense layer before the classifier; 0 leaves it out.
        head: what becomes of the last stage's maps: `flatten`, `avg` or `max` over the picture.

    Raises:
        UsageError: an option that can't be.
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
        _check(
            widths, depths, kernels, {"dropout": dropout, "stage_dropout": stage_dropout}, hidden
        )
        poolings = [lookup(POOLINGS, name, "model.pool") for name in pools]
        lookup(ACTIVATIONS, activation, "model.activation")
        pads = lookup(PADDINGS, padding, "model.padding")
        self.stages: tuple[str, ...] = tuple(f"stage{i + 1}" for i in range(len(widths)))
        inputs, size = channels, image_size
        for i, name in enumerate(self.stages):
            width, k, pad = widths[i], kernels[i], kernels[i] // 2 if pads else 0
            layers: list[nn.Module] = []
            for index in range(depths[i]):
                size = _convolved(size, k, pad, name)
                # A single pixel can't be halved.
                halving = pools[i] != "none" and size > 1 and index == depths[i] - 1
                stride = 2 if halving and pools[i] == "stride" else 1
                layers.append(nn.Conv2d(inputs, width, k, stride, pad, bias=not batch_norm))
                if halving:
                    layers.append(poolings[i]())
                    size = (size + 1) // 2 if pools[i] == "stride" else size // 2
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(ACTIVATIONS[activation]())
                inputs = width
            if stage_dropout:
                layers.append(nn.Dropout2d(stage_dropout))
            self.add_module(name, nn.Sequential(*layers))
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


class Flatten(nn.Flatten):
    """Maps `[N, C, H, W]` to rows `[N, C * H * W]`, whose gradient comes back in the maps' layout.

    It would come back contiguous; behind channels_last maps the backward pass of the last stage
    then walks through memory in two orders at once, some per cent of a small network's step.
    """

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        strided = maps.requires_grad and not maps.is_contiguous()
        if strided and not torch.compiler.is_compiling():  # which lays out gradients itself
            maps.register_hook(_channels_last)
        return super().forward(maps)


def _channels_last(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


def _per_stage(value: T | Sequence[T], widths: Sequence[int], key: str) -> list[T]:
    values: list[T]
    if isinstance(value, Sequence) and not isinstance(value, str):  # a text is a sequence, too
        values = list(value)
    else:
        values = [value] * len(widths)
    if len(values) != len(widths):
        raise UsageError(f"model.{key} has {len(values)} numbers for {len(widths)} model.widths")
    return values


def _convolved(size: int, kernel: int, pad: int, stage: str) -> int:
    """Side of the maps after a convolution of stride 1; one of stride 2 halves it, rounding up."""
    left = size + 2 * pad - kernel + 1
    if left < 1:
        raise UsageError(
            f"{stage}: a {kernel}x{kernel} kernel doesn't fit maps of {size} px",
            fix="use model.padding=same, smaller kernels, fewer stages or larger images",
        )
    return left


def _check(
    widths: Sequence[int],
    depths: list[int],
    kernels: list[int],
    dropouts: dict[str, float],
    hidden: int,
) -> None:
    problems = []
    if not widths or min(widths) < 1:
        problems.append(f"model.widths={list(widths)}: needs one or more positive numbers")
    if min(depths, default=1) < 1:
        problems.append(f"model.depth={depths}: each stage needs at least one convolution")
    if sum(depths) > DEEPEST:  # it would be built for hours before anything else was said
        problems.append(f"model.depth: {sum(depths):,} convolutions; at most {DEEPEST:,}")
    if any(k < 1 or k % 2 == 0 for k in kernels):
        problems.append(f"model.kernel={kernels}: kernels are odd (1, 3, 5, ...)")
    for key, value in dropouts.items():
        if not 0 <= value < 1:
            problems.append(f"model.{key}={value}: a probability from 0 to below 1")
    if hidden < 0:
        problems.append(f"model.hidden={hidden}: a width, or 0 for none")
    if problems:
        raise UsageError("; ".join(problems))
