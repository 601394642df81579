"""Inputs made to excite a channel: activation maximisation, and how it compares with real images.

Erhan et al., "Visualizing higher-layer features of a deep network", 2009. As in Olah, Mordvintsev
and Schubert, "Feature visualization" (Distill, 2017), the picture is optimised in its frequencies,
of which low ones move faster, in colours that are independent in natural images, and under small
random shifts, turns and changes of scale.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from convlens.data.dataset import Split
from convlens.device import derive_seed
from convlens.errors import DataError, UsageError
from convlens.interpret import features
from convlens.interpret.activations import channel_limits
from convlens.interpret.inputs import InspectedModel
from convlens.models import model_parts as parts_of
from convlens.utils.console import progress_bar

DREAM_STEPS = 192
CHANNELS_DREAMED = 8  # where none are named
STARTS = 8  # random pictures a channel begins from, of which the best is taken
LEARNING_RATE = 0.08  # of Adam
SMOOTH, CALM = 1.2, 3.0  # weights of total variation and of the distance from grey
SHIFT, TURN, ZOOM = 1 / 12, 0.14, 0.08  # of the random transformations; TURN in radians
CHUNK = 16  # channels at a time
# Light, red against green, yellow against blue: nearly independent in natural images, with about
# these deviations (Ruderman, Cronin and Chiao 1998).
COLORS = ((0.577, 0.577, 0.577), (0.707, -0.707, 0.0), (0.408, 0.408, -0.816))
DEVIATIONS = (1.0, 0.35, 0.35)


@dataclass(frozen=True)
class MadeInputs:
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


def parse_dream(text: str) -> tuple[str, list[int]]:
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


def make_inputs(
    subject: InspectedModel,
    layer: str,
    channels: Sequence[int] = (),
    *,
    known: TopImages | None = None,
    seed: int = 0,
    steps: int = DREAM_STEPS,
) -> MadeInputs:
    """Makes a picture for each channel that raises its mean over all positions.

    A channel's picture depends on the seed and the channel, not on which others are made.

    Args:
        channels: by default the 8 most selective over `known`, else the first.
        known: what a data set does to the layer, to compare with.

    Raises:
        UsageError: no such layer or channel.
    """
    (layer,) = features.find_layers(subject.model, [layer])
    blank = subject.prepared(_grey(subject))
    count = features.layer_activations(subject.model, blank, [layer])[layer].shape[1]
    chosen = list(dict.fromkeys(channels)) or (known.shown(CHANNELS_DREAMED) if known else [])
    chosen = chosen or list(range(min(CHANNELS_DREAMED, count)))
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
        with progress_bar(f"making {layer}", steps * -(-len(chosen) // CHUNK)) as bar:
            for start in range(0, len(chosen), CHUNK):
                some = chosen[start : start + CHUNK]
                parts.append(_optimize(subject, layer, some, seed, steps, bar.advance))
    finally:
        for each, wanted in held:
            each.requires_grad_(wanted)
    images = torch.cat(parts)
    rows = torch.arange(len(chosen))
    given = [
        features.layer_activations(subject.model, subject.prepared(p), [layer])[layer]
        for p in parts
    ]
    maps = torch.cat(given).cpu()[rows, chosen].flatten(1).double()
    best = None if known is None else [float(known.peaks[each, 0]) for each in chosen]
    split = "" if known is None else f"{len(known.labels):,} {known.split} images"
    outputs = layer == parts_of(subject.model).head and count == len(subject.classes)
    names = [subject.classes[each] for each in chosen] if outputs else []
    return MadeInputs(
        subject.name,
        layer,
        chosen,
        names,
        images.numpy(),
        maps.amax(1).tolist(),
        maps.mean(1).tolist(),
        best,
        split,
        seed,
        steps,
    )


def _grey(subject: InspectedModel) -> Tensor:
    pre = subject.loaded.preprocessing
    return torch.full((1, pre.channels, pre.image_size, pre.image_size), 128, dtype=torch.uint8)


def _optimize(
    subject: InspectedModel,
    layer: str,
    channels: list[int],
    seed: int,
    steps: int,
    advance: Callable[[int], None],
) -> Tensor:
    """uint8 `[K, C, S, S]` on the CPU."""
    pre, where = subject.loaded.preprocessing, subject.plan.device
    generators = [torch.Generator().manual_seed(derive_seed(seed, c)) for c in channels]
    scale = _falling(pre.image_size).to(where)
    shape = (pre.channels, pre.image_size, pre.image_size // 2 + 1, 2)
    starts = torch.stack([torch.randn(STARTS, *shape, generator=g) for g in generators])
    starts = starts.to(where) * 0.2
    columns = torch.tensor(channels, device=where)

    def answers(images: Tensor) -> Tensor:
        with features.record_outputs(subject.model, [layer]) as outputs:
            subject.model(pre.normalize(images, subject.plan))
        maps = features.as_maps(outputs, [layer])[layer].flatten(2).mean(2)
        chosen = columns.repeat_interleave(len(images) // len(channels))
        found: Tensor = maps.gather(1, chosen[:, None])
        return found

    with torch.no_grad():
        first = answers(_picture(starts.flatten(0, 1), scale)).reshape(len(channels), STARTS)
        size = first.abs().amax(1).clamp_min(1e-6)
        chosen = first.nan_to_num(-torch.inf).argmax(1)
    waves = starts[torch.arange(len(channels)), chosen].clone().requires_grad_()
    adam = torch.optim.Adam([waves], lr=LEARNING_RATE)
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
        mix = torch.tensor(COLORS) * torch.tensor(DEVIATIONS)[:, None]
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


def made_inputs_figure(made: MadeInputs) -> Any:
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


# ---- toppers ----------------------------------------
# The images of a data set that excite each channel of a layer most.

IMAGES_PER_CHANNEL = 9  # for each channel
BATCH, BYTES = 128, 1 << 26  # images at a time, and the most that their maps may take
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TopImages:
    """The strongest answers of each channel over a split, strongest first.

    `peaks` float64 `[C, K]` are maxima over positions, `images` int64 `[C, K]` the images'
    numbers in the split and `places` int64 `[C, K, 2]` row and column of the peak in maps of
    `shape`. `selectivity` float64 `[C]` says how far the peaks stand out: their mean above the
    mean over all images, in standard deviations; 0 for a channel that never changes, NaN for one
    with values that aren't finite. `labels` int64 `[N]` are the split's.
    """

    run: str
    layer: str
    split: str
    shape: tuple[int, int]
    peaks: Floats
    images: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    selectivity: Floats
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """The channels, most selective first; silent and broken ones last."""
        return np.argsort(-np.nan_to_num(self.selectivity, nan=-1), kind="stable")

    @property
    def silent(self) -> int:
        """Channels that give the same for all images."""
        return int((self.selectivity == 0).sum())

    @property
    def broken(self) -> int:
        return int(np.isnan(self.selectivity).sum())

    def commonest(self, channel: int) -> tuple[str, int]:
        """The class most frequent among a channel's images, and how often."""
        found = Counter(self.labels[self.images[channel]].tolist()).most_common(1)[0]
        return self.classes[found[0]], found[1]

    def to_dict(self, channels: int) -> dict[str, Any]:
        rows = [
            {
                "channel": each,
                "selectivity": float(self.selectivity[each]),
                "peaks": self.peaks[each].tolist(),
                "images": [f"{self.split}:{i}" for i in self.images[each].tolist()],
                "classes": [self.classes[i] for i in self.labels[self.images[each]].tolist()],
            }
            for each in self.shown(channels)
        ]
        counts = {"n": len(self.labels), "silent": self.silent, "broken": self.broken}
        return {"run": self.run, "layer": self.layer, "split": self.split, **counts, "top": rows}

    def shown(self, channels: int) -> list[int]:
        """The most selective channels, none silent or broken, each with images of its own.

        A channel a third of whose images are those of one before it waits behind the others:
        of the last layer's hundreds many answer to the same few images.
        """
        alive = len(self.selectivity) - self.silent - self.broken
        first: list[int] = []
        waiting: list[int] = []
        seen: list[set[int]] = []
        for channel in self.order[:alive].tolist():
            mine = set(self.images[channel].tolist())
            alike = any(len(mine & other) * 3 > len(mine) for other in seen)
            (waiting if alike else first).append(channel)
            if not alike:
                seen.append(mine)
            if len(first) == channels:
                break
        return [*first, *waiting][:channels]


def top_activating(
    subject: InspectedModel, split: Split, layer: str, name: str, count: int = IMAGES_PER_CHANNEL
) -> TopImages:
    """Runs a split through the network and keeps the strongest `count` images of each channel.

    Streams: what is held is a batch and the best so far. Of equally strong images the earlier
    ones are kept.

    Args:
        name: what the split is called.

    Raises:
        UsageError: no such layer. DataError: a split without images.
    """
    (layer,) = features.find_layers(subject.model, [layer])
    if not len(split):
        raise DataError(f"the {name} split has no images", fix="take another with --split")
    best: tuple[Tensor, ...] | None = None
    sums = squares = torch.zeros(())
    finite = torch.ones((), dtype=torch.bool)
    shape, step, start = (1, 1), 1, 0
    with progress_bar(f"{subject.name} {layer}", len(split)) as bar:
        while start < len(split):
            index = torch.arange(start, min(start + step, len(split)))
            images = subject.prepared(split.rows.gather(index))
            maps = features.layer_activations(subject.model, images, [layer])[layer]
            shape = (maps.shape[2], maps.shape[3])
            step = max(1, min(BATCH, BYTES // (4 * maps[0].numel())))
            flat = maps.flatten(2)
            finite = finite & flat.isfinite().all(2).all(0).cpu()
            peaks, places = flat.nan_to_num(nan=-torch.inf, posinf=-torch.inf).max(2)
            values = peaks.T.double().cpu()  # [C, B]
            sums, squares = sums + values.sum(1), squares + values.square().sum(1)
            best = merge_top_images(
                best, (values, index.expand(len(values), -1), places.T.cpu()), count
            )
            start += len(index)
            bar.advance(len(index))
    assert best is not None
    peaks_, numbers, places_ = (each.numpy() for each in best)
    selectivity = _selectivity(peaks_, sums.numpy(), squares.numpy(), len(split))
    selectivity[~finite.numpy()] = np.nan
    where = np.stack([places_ // shape[1], places_ % shape[1]], axis=2)
    return TopImages(
        subject.name,
        layer,
        name,
        shape,
        peaks_,
        numbers,
        where,
        selectivity,
        split.labels.numpy(),
        subject.classes,
    )


def _selectivity(peaks: Floats, sums: Floats, squares: Floats, count: int) -> Floats:
    with np.errstate(invalid="ignore"):  # of channels that are not finite
        mean = sums / count
        spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
        # Rounding leaves a trace of spread in a channel that never changes.
        alive = spread > 1e-7 * np.maximum(np.abs(mean), 1e-30)
        above = (peaks.mean(1) - mean) / np.where(alive, spread, 1)
    return np.where(alive, above, 0.0)


def merge_top_images(
    best: tuple[Tensor, ...] | None, new: tuple[Tensor, ...], count: int
) -> tuple[Tensor, ...]:
    """Of each row the `count` greatest values of both, and what belongs to them.

    All are `[rows, any number]`, the values first; stable, so that of equals the earlier win.
    """
    joined = new if best is None else tuple(torch.cat(p, 1) for p in zip(best, new, strict=True))
    order = joined[0].argsort(dim=1, descending=True, stable=True)[:, :count]
    return tuple(each.gather(1, order) for each in joined)


def top_images_figure(found: TopImages, split: Split, channels: int) -> Any:
    """Rows of the strongest images of the most selective channels."""
    from convlens import plots
    from convlens.plots.images import Mark

    shown = found.shown(channels)
    high, wide = found.shape
    marks: list[list[Mark | None]] = []
    names = []
    for channel in shown:
        boxes = [
            Mark(x / wide, y / high, (x + 1) / wide, (y + 1) / high) if high * wide > 1 else None
            for y, x in found.places[channel].tolist()
        ]
        marks.append(boxes)
        label, times = found.commonest(channel)
        names.append((f"#{channel}", f"{times}/{found.images.shape[1]} {label}"))
    images = [split.rows.gather(torch.from_numpy(found.images[c])).numpy() for c in shown]
    note = "the frame is the peak's place in the layer's map" if high * wide > 1 else ""
    note = note or "the layer has one value an image, so no place is marked"
    silent = f" {found.silent} never change." if found.silent else ""
    silent += f" {found.broken} are NaN or infinite." if found.broken else ""
    note = (
        f"The {found.images.shape[1]} of {len(found.labels):,} {found.split} images that excite a "
        f"channel most, strongest first; {note}. Channels whose peaks stand out most (in standard "
        f"deviations over the images) first, those with much the same images left out; beside them "
        f"the commonest class.{silent}"
    )
    title = f"{found.run}, {found.layer}: {len(shown)} of {len(found.selectivity):,} channels"
    return plots.top_images(images, marks, names, title, note)


# ---- filters ----------------------------------------
# The kernels of a convolution: of the first as colours, of deeper ones input by input.

FIRST_LAYER = "first"
INPUTS_SHOWN = 8  # kernels shown of each channel of a deeper layer


@dataclass(frozen=True)
class Filters:
    """Kernels float32 `[out, in, h, w]` of a convolution; `order` has the most energetic first.

    Energy is the L2 norm of all of a channel's weights. `limit` is the 99.5th percentile of the
    absolute weights of the layer.
    """

    run: str
    layer: str
    weights: npt.NDArray[np.float32]
    energy: npt.NDArray[np.float64]
    order: npt.NDArray[np.int64]
    limit: float

    @property
    def colored(self) -> bool:
        return bool(self.weights.shape[1] == 3)

    def inputs(self, channel: int) -> npt.NDArray[np.int64]:
        """The inputs whose kernels weigh most in a channel, in that order."""
        strength = np.sqrt((self.weights[channel].astype(np.float64) ** 2).sum((1, 2)))
        return np.argsort(-strength, kind="stable")[:INPUTS_SHOWN]

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "layer": self.layer,
            "shape": list(self.weights.shape),
            "scale": self.limit,
            "order": self.order.tolist(),
        }


def read_filters(subject: InspectedModel, layer: str = FIRST_LAYER) -> Filters:
    """The kernels of a layer: of the convolution of that name, or the first one inside it.

    Raises:
        UsageError: no such layer, with near misses; or no convolution there.
    """
    wanted = [] if layer == FIRST_LAYER else list(features.find_layers(subject.model, [layer]))
    inside = subject.model.get_submodule(wanted[0]) if wanted else subject.model
    for name, module in inside.named_modules():
        if isinstance(module, nn.Conv2d):
            full = ".".join(part for part in (*wanted, name) if part)
            weights = module.weight.detach().float().cpu().numpy()
            energy = np.sqrt((weights.astype(np.float64) ** 2).sum((1, 2, 3)))
            order = np.argsort(-np.nan_to_num(energy, nan=np.inf), kind="stable")
            return Filters(subject.name, full, weights, energy, order, channel_limits([weights])[1])
    where = f"layer {layer} of {subject.name}" if wanted else subject.name
    raise UsageError(
        f"{where} has no convolution", fix=f"name a layer that has: {_some_layers(subject.model)}"
    )


def _some_layers(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "there is none"


def filters_figure(filters: Filters, channels: int) -> Any:
    """The `channels` most energetic filters of a layer as a picture."""
    from convlens import plots

    shown = filters.order[:channels]
    count, inputs, high, wide = filters.weights.shape
    amount = f"all {count:,}" if len(shown) == count else f"{len(shown)} of {count:,}"
    title = f"{filters.run}, {filters.layer}: {amount} filters"
    scale = f"±{filters.limit:.3g} (99.5th percentile of the layer's absolute weights)"
    if filters.colored:
        names = [str(number) for number in shown.tolist()]
        note = f"{high}×{wide} over red, green, blue; most energetic first. Grey is 0, the ends of "
        note += f"the colours are {scale}. Below: number of the channel."
        return plots.color_filters(filters.weights[shown], names, filters.limit, title, note)
    chosen = np.stack([filters.weights[each][filters.inputs(each)] for each in shown.tolist()])
    names = [f"#{number}" for number in shown.tolist()]
    some = f"the {chosen.shape[1]} strongest of its {inputs:,} input kernels"
    some = some if inputs > 1 else "its kernel"
    note = (
        f"A row is a channel ({some}, {high}×{wide}); most energetic (L2) first. Colours: {scale}."
    )
    return plots.kernels(chosen, names, filters.limit, title, note)
