"""Inputs made to excite a channel: activation maximisation, and how it compares with real images.

Erhan et al., "Visualizing higher-layer features of a deep network", 2009. As in Olah, Mordvintsev
and Schubert, "Feature visualization" (Distill, 2017), the picture is optimised in its frequencies,
of which low ones move faster, in colours that are independent in natural images, and under small
random shifts, turns and changes of scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convlens import device
from convlens.errors import UsageError
from convlens.inspection import layers
from convlens.inspection.subjects import Subject
from convlens.inspection.toppers import TopImages
from convlens.models import parts as parts_of
from convlens.system.console import progress

STEPS = 192
CHANNELS = 8  # where none are named
STARTS = 8  # random pictures a channel begins from, of which the best is taken
RATE = 0.08  # of Adam
SMOOTH, CALM = 1.2, 3.0  # weights of total variation and of the distance from grey
SHIFT, TURN, ZOOM = 1 / 12, 0.14, 0.08  # of the random transformations; TURN in radians
CHUNK = 16  # channels at a time
# Light, red against green, yellow against blue: nearly independent in natural images, with about
# these deviations (Ruderman, Cronin and Chiao 1998).
COLOURS = ((0.577, 0.577, 0.577), (0.707, -0.707, 0.0), (0.408, 0.408, -0.816))
DEVIATIONS = (1.0, 0.35, 0.35)


@dataclass(frozen=True)
class Made:
    """Pictures uint8 `[K, C, S, S]` made for `channels` of a layer.

    `peaks` and `means` float64 `[K]` are what the picture, rounded to bytes, gives at its
    strongest position and on average; `classes` what the channels stand for, if they are the
    network's outputs; `best` is the peak of the best image of `split`, None where there is no
    data set.
    """

    run: str
    layer: str
    channels: list[int]
    classes: list[str]
    images: npt.NDArray[np.uint8]
    peaks: list[float]
    means: list[float]
    best: list[float] | None
    split: str
    seed: int
    steps: int

    def to_dict(self) -> dict[str, Any]:
        best = self.best or [math.nan] * len(self.channels)
        rows = [
            {"channel": c, "peak": p, "mean": m, "best_image": None if math.isnan(b) else b}
            for c, p, m, b in zip(self.channels, self.peaks, self.means, best, strict=True)
        ]
        told = {"run": self.run, "layer": self.layer, "split": self.split}
        return {**told, "seed": self.seed, "steps": self.steps, "made": rows}


def asked(text: str) -> tuple[str, list[int]]:
    """Layer and channels of `LAYER[:CHANNEL,...]`.

    Raises:
        UsageError: a channel that is no number.
    """
    layer, _, rest = text.partition(":")
    numbers = [each.strip() for each in rest.split(",")] if rest else []
    wrong = [each for each in numbers if not each.isdecimal()]
    if wrong or not layer:
        raise UsageError(f"{text}: no channels {', '.join(wrong)}", fix="write layer4.1:17,33")
    return layer, [int(each) for each in numbers]


def make(
    subject: Subject,
    layer: str,
    channels: Sequence[int] = (),
    *,
    known: TopImages | None = None,
    seed: int = 0,
    steps: int = STEPS,
) -> Made:
    """Makes a picture for each channel that raises its mean over all positions.

    A channel's picture depends on the seed and the channel, not on which others are made.

    Args:
        channels: by default the 8 most selective over `known`, else the first.
        known: what a data set does to the layer, to compare with.

    Raises:
        UsageError: no such layer or channel.
    """
    (layer,) = layers.find(subject.model, [layer])
    blank = subject.prepared(_grey(subject))
    count = layers.activations(subject.model, blank, [layer])[layer].shape[1]
    chosen = list(dict.fromkeys(channels)) or (known.shown(CHANNELS) if known else [])
    chosen = chosen or list(range(min(CHANNELS, count)))
    beyond = [str(channel) for channel in chosen if channel >= count]
    if beyond:
        raise UsageError(
            f"{layer} has no channel {', '.join(beyond)}", fix=f"it has channels 0 to {count - 1}"
        )
    held = [(each, each.requires_grad) for each in subject.model.parameters()]
    parts = []
    try:
        for each, _ in held:
            each.requires_grad_(False)
        with progress(f"making {layer}", steps * -(-len(chosen) // CHUNK)) as bar:
            for start in range(0, len(chosen), CHUNK):
                some = chosen[start : start + CHUNK]
                parts.append(_optimised(subject, layer, some, seed, steps, bar.advance))
    finally:
        for each, wanted in held:
            each.requires_grad_(wanted)
    images = torch.cat(parts)
    rows = torch.arange(len(chosen))
    given = [layers.activations(subject.model, subject.prepared(p), [layer])[layer] for p in parts]
    maps = torch.cat(given).cpu()[rows, chosen].flatten(1).double()
    best = None if known is None else [float(known.peaks[each, 0]) for each in chosen]
    split = "" if known is None else f"{len(known.labels):,} {known.split} images"
    outputs = layer == parts_of(subject.model).head and count == len(subject.classes)
    names = [subject.classes[each] for each in chosen] if outputs else []
    return Made(
        subject.name, layer, chosen, names, images.numpy(), maps.amax(1).tolist(),
        maps.mean(1).tolist(), best, split, seed, steps,
    )  # fmt: skip


def _grey(subject: Subject) -> Tensor:
    pre = subject.loaded.preprocessing
    return torch.full((1, pre.channels, pre.image_size, pre.image_size), 128, dtype=torch.uint8)


def _optimised(
    subject: Subject, layer: str, channels: list[int], seed: int, steps: int,
    advance: Callable[[int], None],
) -> Tensor:  # fmt: skip
    """uint8 `[K, C, S, S]` on the CPU."""
    pre, where = subject.loaded.preprocessing, subject.plan.device
    generators = [torch.Generator().manual_seed(device.seed_of(seed, c)) for c in channels]
    scale = _falling(pre.image_size).to(where)
    shape = (pre.channels, pre.image_size, pre.image_size // 2 + 1, 2)
    starts = torch.stack([torch.randn(STARTS, *shape, generator=g) for g in generators])
    starts = starts.to(where) * 0.2
    columns = torch.tensor(channels, device=where)

    def answers(images: Tensor) -> Tensor:
        with layers.recording(subject.model, [layer]) as outputs:
            subject.model(pre.normalise(images, subject.plan))
        maps = layers.as_maps(outputs, [layer])[layer].flatten(2).mean(2)
        chosen = columns.repeat_interleave(len(images) // len(channels))
        found: Tensor = maps.gather(1, chosen[:, None])
        return found

    with torch.no_grad():
        first = answers(_picture(starts.flatten(0, 1), scale)).reshape(len(channels), STARTS)
        size = first.abs().amax(1).clamp_min(1e-6)
        chosen = first.nan_to_num(-torch.inf).argmax(1)
    waves = starts[torch.arange(len(channels)), chosen].clone().requires_grad_()
    adam = torch.optim.Adam([waves], lr=RATE)
    for _ in range(steps):
        images = _picture(waves, scale)
        turned = _transformed(images, generators)
        given = answers(turned)[:, 0]
        # The gradient of the logarithm: what it weighs against smoothness doesn't grow with it.
        gain = (given / torch.maximum(given.detach().abs(), size)).sum()
        loss = SMOOTH * _variation(images) + CALM * (images - 0.5).square().mean((1, 2, 3)).sum()
        (slope,) = torch.autograd.grad(loss - gain, waves)
        waves.grad = slope.nan_to_num(0)  # a channel that gives NaN must not spoil its picture
        adam.step()
        advance(1)
    with torch.no_grad():
        return _picture(waves, scale).mul(255).round().to(torch.uint8).cpu()


def _falling(size: int) -> Tensor:
    """The amplitude of each frequency of a picture of that size: 1 / frequency, as in nature."""
    across, along = torch.fft.rfftfreq(size), torch.fft.fftfreq(size)
    frequency = (along[:, None].square() + across.square()).sqrt()
    found: Tensor = 1 / frequency.clamp_min(1 / size) / math.sqrt(size)
    return found[None, None]


def _picture(waves: Tensor, scale: Tensor) -> Tensor:
    """Pictures `[K, C, S, S]` within 0..1 from real and imaginary parts `[K, C, S, S/2 + 1, 2]`."""
    size = waves.shape[2]
    planes = torch.fft.irfft2(torch.view_as_complex(waves) * scale, s=(size, size), norm="ortho")
    if planes.shape[1] == 3:
        mix = torch.tensor(COLOURS) * torch.tensor(DEVIATIONS)[:, None]
        planes = torch.einsum("kcij,cd->kdij", planes, mix.to(planes) * math.sqrt(3))
    found: Tensor = planes.sigmoid()
    return found


def _transformed(images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Each picture a little shifted, turned and scaled, as its own generator says."""
    draws = torch.stack([torch.rand(4, generator=g) for g in generators]) * 2 - 1
    turn, zoom = draws[:, 0] * TURN, 1 + draws[:, 1] * ZOOM
    cos, sin = turn.cos() * zoom, turn.sin() * zoom
    x, y = 2 * SHIFT * draws[:, 2], 2 * SHIFT * draws[:, 3]
    theta = torch.stack([torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)
    shape = list(images.shape)
    grid = torch.nn.functional.affine_grid(theta.to(images), shape, align_corners=False)
    return torch.nn.functional.grid_sample(
        images, grid, padding_mode="reflection", align_corners=False
    )


def _variation(images: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels, added over pictures."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().mean((1, 2, 3))
    across = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean((1, 2, 3))
    return (down + across).sum()


def figure(made: Made) -> Any:
    """The pictures with what they reach."""
    from convlens import plots

    captions = []
    for number, channel in enumerate(made.channels):
        reached = f"peak {made.peaks[number]:.3g}"
        name = f" {made.classes[number]}" if made.classes else ""
        lines = [f"#{channel}{name}", reached]
        if made.best is not None:
            best = made.best[number]
            times = f"{made.peaks[number] / best:.2g}× best" if best > 0 else f"best {best:.3g}"
            lines = [lines[0], reached, times]
        captions.append(lines)
    against = f"; times that of the best of {made.split}" if made.split else ""
    note = (
        "Pictures made to raise a channel's mean over all positions: frequencies and decorrelated "
        f"colours, random shifts, turns and scales, {made.steps} steps, seed {made.seed}. Peak: "
        f"the channel's strongest position{against}."
    )
    return plots.made_inputs(made.images, captions, f"{made.run}, {made.layer}", note)
