"""Feature visualization: optimized inputs, most activating images and kernels of channels.

Inputs are optimized by activation maximization (Erhan et al., "Visualizing higher-layer features
of a deep network", 2009). As in Olah, Mordvintsev and Schubert, "Feature visualization" (Distill,
2017), the image is optimized in the frequency domain, where low frequencies change faster, in
decorrelated color channels, and under small random shifts, rotations and changes of scale.
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
from torch.nn import functional as F

from convlens.data.dataset import Split
from convlens.device import derive_seed
from convlens.errors import DataError, UsageError
from convlens.interpret import features
from convlens.interpret.activations import channel_limits
from convlens.interpret.inputs import InspectedModel
from convlens.models import model_parts
from convlens.utils.console import progress_bar

Floats = npt.NDArray[np.float64]

# Optimized inputs
DREAM_STEPS = 192
DREAM_CHANNELS = 8  # if no channels are given
DREAM_STARTS = 8  # random initial images of a channel, of which the best is optimized
DREAM_START_STD = 0.2
DREAM_BATCH = 16  # channels at a time
LEARNING_RATE = 0.08  # of Adam
VARIATION_WEIGHT = 1.2  # of total variation in the loss
GREY_WEIGHT = 3.0  # of the squared distance from grey in the loss
MAX_SHIFT = 1 / 12  # of the side
MAX_ROTATION = 0.14  # radians
MAX_ZOOM = 0.08
# Light, red against green, yellow against blue: nearly independent in natural images, with about
# these deviations (Ruderman, Cronin and Chiao 1998).
COLOR_AXES = ((0.577, 0.577, 0.577), (0.707, -0.707, 0.0), (0.408, 0.408, -0.816))
COLOR_DEVIATIONS = (1.0, 0.35, 0.35)

# Most activating images
IMAGES_PER_CHANNEL = 9
MAX_BATCH = 128  # images
MAX_MAP_BYTES = 1 << 26  # of the maps of a batch

# Kernels
FIRST_LAYER = "first"
KERNELS_SHOWN = 8  # kernels of each channel of a deeper layer
LAYERS_SUGGESTED = 6


# Optimized inputs


@dataclass(frozen=True)
class MadeInputs:
    """Inputs optimized for channels of a layer.

    Attributes:
        run: name of the network.
        layer: name of the layer.
        channels: the K channels.
        classes: names of the channels if they are the network's logits, otherwise empty.
        images: uint8 `[K, C, S, S]`.
        peaks: maximum of the channel over positions, for the image rounded to bytes.
        means: mean of the channel over positions, for the image rounded to bytes.
        best: peak of the most activating image of `split`; None without a data set.
        split: description of the split, e.g. `500 val images`.
        seed: of the initial images and transformations.
        steps: of the optimization.
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
        return {
            "run": self.run,
            "layer": self.layer,
            "split": self.split,
            "seed": self.seed,
            "steps": self.steps,
            "made": rows,
        }


def parse_dream(text: str) -> tuple[str, list[int]]:
    """Return layer and channels of `LAYER[:CHANNEL,...]`.

    Raises:
        UsageError: no layer, or a channel that is not a number.
    """
    layer, _, listed = text.partition(":")
    channels = [each.strip() for each in listed.split(",")] if listed else []
    invalid = [each for each in channels if not each.isdecimal()]
    if invalid or not layer:
        problem = f"not a channel: {', '.join(invalid)}" if invalid else "the layer is missing"
        raise UsageError(f"{text}: {problem}", fix="write layer4.1:17,33")
    return layer, [int(each) for each in channels]


def make_inputs(
    subject: InspectedModel,
    layer: str,
    channels: Sequence[int] = (),
    *,
    reference: TopImages | None = None,
    seed: int = 0,
    steps: int = DREAM_STEPS,
) -> MadeInputs:
    """Optimize an input for each channel that maximizes its mean over all positions.

    The input of a channel depends on the seed and the channel, not on the other channels.

    Args:
        subject: the network.
        layer: name of the layer.
        channels: by default the 8 most selective ones in `reference`, or the first ones.
        reference: the most activating images of the layer, for comparison.
        seed: of the initial images and transformations.
        steps: of the optimization.

    Raises:
        UsageError: an unknown layer or channel.
    """
    (layer,) = features.find_layers(subject.model, [layer])
    blank = subject.prepared(_grey_image(subject))
    count = features.layer_activations(subject.model, blank, [layer])[layer].shape[1]
    selected = list(dict.fromkeys(channels))
    if not selected and reference is not None:
        selected = reference.shown(DREAM_CHANNELS)
    selected = selected or list(range(min(DREAM_CHANNELS, count)))
    unknown = [str(channel) for channel in selected if channel >= count]
    if unknown:
        raise UsageError(
            f"{layer} has no channel {', '.join(unknown)}", fix=f"it has channels 0 to {count - 1}"
        )
    batches = [selected[i : i + DREAM_BATCH] for i in range(0, len(selected), DREAM_BATCH)]
    with (
        features.without_weight_gradients(subject.model),
        progress_bar(f"making {layer}", steps * len(batches)) as bar,
    ):
        parts = [_optimize(subject, layer, batch, seed, steps, bar.advance) for batch in batches]
    activations = torch.cat(
        [
            features.layer_activations(subject.model, subject.prepared(images), [layer])[layer]
            for images in parts
        ]
    ).cpu()
    maps = activations[torch.arange(len(selected)), selected].flatten(1).double()
    best, split = None, ""
    if reference is not None:
        best = [float(reference.peaks[channel, 0]) for channel in selected]
        split = f"{len(reference.labels):,} {reference.split} images"
    is_head = layer == model_parts(subject.model).head and count == len(subject.classes)
    return MadeInputs(
        run=subject.name,
        layer=layer,
        channels=selected,
        classes=[subject.classes[channel] for channel in selected] if is_head else [],
        images=torch.cat(parts).numpy(),
        peaks=maps.amax(1).tolist(),
        means=maps.mean(1).tolist(),
        best=best,
        split=split,
        seed=seed,
        steps=steps,
    )


def _grey_image(subject: InspectedModel) -> Tensor:
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
    """Return optimized images, uint8 `[K, C, S, S]` on the CPU."""
    pre, device = subject.loaded.preprocessing, subject.plan.device
    generators = [torch.Generator().manual_seed(derive_seed(seed, c)) for c in channels]
    amplitudes = _natural_amplitudes(pre.image_size).to(device)
    shape = (pre.channels, pre.image_size, pre.image_size // 2 + 1, 2)
    starts = torch.stack([torch.randn(DREAM_STARTS, *shape, generator=g) for g in generators])
    starts = starts.to(device) * DREAM_START_STD
    columns = torch.tensor(channels, device=device)

    def channel_means(images: Tensor) -> Tensor:
        """The mean of each image's channel, `[N, 1]`, for equally many images of each channel."""
        with features.record_outputs(subject.model, [layer]) as outputs:
            subject.model(pre.normalize(images, subject.plan))
        maps = features.as_maps(outputs, [layer])[layer].flatten(2).mean(2)
        column = columns.repeat_interleave(len(images) // len(channels))
        means: Tensor = maps.gather(1, column[:, None])
        return means

    with torch.no_grad():
        initial = channel_means(_to_images(starts.flatten(0, 1), amplitudes))
        initial = initial.reshape(len(channels), DREAM_STARTS)
        scale = initial.abs().amax(1).clamp_min(1e-6)
        best = initial.nan_to_num(-torch.inf).argmax(1)
    spectra = starts[torch.arange(len(channels)), best].clone().requires_grad_()
    optimizer = torch.optim.Adam([spectra], lr=LEARNING_RATE)
    for _ in range(steps):
        images = _to_images(spectra, amplitudes)
        means = channel_means(_transform(images, generators))[:, 0]
        # The gradient of the logarithm, whose weight against smoothness does not grow with it.
        gain = (means / torch.maximum(means.detach().abs(), scale)).sum()
        distance = (images - 0.5).square().mean((1, 2, 3)).sum()
        penalty = VARIATION_WEIGHT * _total_variation(images) + GREY_WEIGHT * distance
        (gradient,) = torch.autograd.grad(penalty - gain, spectra)
        spectra.grad = gradient.nan_to_num(0)  # a channel that is NaN must not make its image NaN
        optimizer.step()
        advance(1)
    with torch.no_grad():
        return _to_images(spectra, amplitudes).mul(255).round().to(torch.uint8).cpu()


def _natural_amplitudes(size: int) -> Tensor:
    """Return the amplitude of each frequency, `[1, 1, S, S/2 + 1]`: 1 / f, as in natural images."""
    across, along = torch.fft.rfftfreq(size), torch.fft.fftfreq(size)
    frequency = (along[:, None].square() + across.square()).sqrt()
    amplitudes: Tensor = 1 / frequency.clamp_min(1 / size) / math.sqrt(size)
    return amplitudes[None, None]


def _to_images(spectra: Tensor, amplitudes: Tensor) -> Tensor:
    """Return images `[K, C, S, S]` in 0..1 of spectra `[K, C, S, S/2 + 1, 2]` (real, imaginary)."""
    size = spectra.shape[2]
    scaled = torch.view_as_complex(spectra) * amplitudes
    planes = torch.fft.irfft2(scaled, s=(size, size), norm="ortho")
    if planes.shape[1] == 3:
        mix = torch.tensor(COLOR_AXES) * torch.tensor(COLOR_DEVIATIONS)[:, None]
        planes = torch.einsum("kcij,cd->kdij", planes, mix.to(planes) * math.sqrt(3))
    images: Tensor = planes.sigmoid()
    return images


def _transform(images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Shift, rotate and scale each image slightly, at random by its own generator."""
    draws = torch.stack([torch.rand(4, generator=g) for g in generators]) * 2 - 1
    angle, zoom = draws[:, 0] * MAX_ROTATION, 1 + draws[:, 1] * MAX_ZOOM
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    x, y = 2 * MAX_SHIFT * draws[:, 2], 2 * MAX_SHIFT * draws[:, 3]
    theta = torch.stack([torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighboring pixels, summed over images."""
    vertical = (images[:, :, 1:] - images[:, :, :-1]).abs().mean((1, 2, 3))
    horizontal = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean((1, 2, 3))
    return (vertical + horizontal).sum()


def made_inputs_figure(made: MadeInputs) -> Any:
    """Return a figure of optimized inputs with their peaks."""
    from convlens import plots

    captions = []
    for number, channel in enumerate(made.channels):
        name = f" {made.classes[number]}" if made.classes else ""
        lines = [f"#{channel}{name}", f"peak {made.peaks[number]:.3g}"]
        if made.best is not None:
            best = made.best[number]
            ratio = f"{made.peaks[number] / best:.2g}× best"
            lines.append(ratio if best > 0 else f"best {best:.3g}")
        captions.append(lines)
    comparison = f", relative to the best of {made.split}" if made.split else ""
    note = (
        "Inputs optimized for the mean of a channel over all positions: in frequencies and "
        f"decorrelated colors, with random shifts, rotations and scales, {made.steps} steps, seed "
        f"{made.seed}. Peak: the channel's maximum over positions{comparison}."
    )
    return plots.made_inputs(made.images, captions, f"{made.run}, {made.layer}", note)


# Most activating images


@dataclass(frozen=True)
class TopImages:
    """The images of a split that activate each channel of a layer most, in decreasing order.

    Attributes:
        run: name of the network.
        layer: name of the layer.
        split: name of the split.
        shape: height and width of the layer's maps.
        peaks: maxima over positions, float64 `[C, K]`.
        images: numbers of the images in the split, int64 `[C, K]`.
        positions: row and column of the maxima, int64 `[C, K, 2]`.
        selectivity: mean of the peaks above the mean over all images, in standard deviations,
            float64 `[C]`; 0 for a silent channel, NaN for a broken one.
        labels: of the split, int64 `[N]`.
        classes: of the network.
    """

    run: str
    layer: str
    split: str
    shape: tuple[int, int]
    peaks: Floats
    images: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    selectivity: Floats
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """The channels by decreasing selectivity, silent and broken ones last."""
        return np.argsort(-np.nan_to_num(self.selectivity, nan=-1), kind="stable")

    @property
    def silent(self) -> int:
        """Number of channels with the same peak for all images."""
        return int((self.selectivity == 0).sum())

    @property
    def broken(self) -> int:
        """Number of channels with NaN or infinite values."""
        return int(np.isnan(self.selectivity).sum())

    def most_common_class(self, channel: int) -> tuple[str, int]:
        """Return the most frequent class among a channel's images, and its count."""
        ((label, count),) = Counter(self.labels[self.images[channel]].tolist()).most_common(1)
        return self.classes[label], count

    def shown(self, channels: int) -> list[int]:
        """Return the most selective channels that are neither silent nor broken.

        A channel that shares more than a third of its images with a channel before it is moved to
        the end: of the hundreds of channels of a last layer, many respond to the same images.
        """
        alive = len(self.selectivity) - self.silent - self.broken
        distinct: list[int] = []
        repeated: list[int] = []
        image_sets: list[set[int]] = []
        for channel in self.order[:alive].tolist():
            images = set(self.images[channel].tolist())
            if any(len(images & other) * 3 > len(images) for other in image_sets):
                repeated.append(channel)
            else:
                distinct.append(channel)
                image_sets.append(images)
            if len(distinct) == channels:
                break
        return [*distinct, *repeated][:channels]

    def to_dict(self, channels: int) -> dict[str, Any]:
        rows = [
            {
                "channel": channel,
                "selectivity": float(self.selectivity[channel]),
                "peaks": self.peaks[channel].tolist(),
                "images": [f"{self.split}:{i}" for i in self.images[channel].tolist()],
                "classes": [self.classes[i] for i in self.labels[self.images[channel]].tolist()],
            }
            for channel in self.shown(channels)
        ]
        return {
            "run": self.run,
            "layer": self.layer,
            "split": self.split,
            "n": len(self.labels),
            "silent": self.silent,
            "broken": self.broken,
            "top": rows,
        }


def top_activating(
    subject: InspectedModel, split: Split, layer: str, name: str, count: int = IMAGES_PER_CHANNEL
) -> TopImages:
    """Find the images of a split that activate each channel of a layer most.

    Only a batch and the best images so far are in memory. Of equal peaks the earlier image wins.

    Args:
        subject: the network.
        split: the images.
        layer: name of the layer.
        name: of the split, in figures and messages.
        count: images of each channel.

    Raises:
        UsageError: an unknown layer.
        DataError: a split without images.
    """
    (layer,) = features.find_layers(subject.model, [layer])
    if not len(split):
        raise DataError(f"the {name} split has no images", fix="use another one with --split")
    best: tuple[Tensor, ...] | None = None
    sums = squares = torch.zeros(())
    finite = torch.ones((), dtype=torch.bool)
    map_shape, start = (1, 1), 0
    batch_size = 1  # until the size of the maps is known
    with progress_bar(f"{subject.name} {layer}", len(split)) as bar:
        while start < len(split):
            index = torch.arange(start, min(start + batch_size, len(split)))
            images = subject.prepared(split.rows.gather(index))
            maps = features.layer_activations(subject.model, images, [layer])[layer]
            map_shape = (maps.shape[2], maps.shape[3])
            batch_size = max(1, min(MAX_BATCH, MAX_MAP_BYTES // (4 * maps[0].numel())))
            flat = maps.flatten(2)
            finite = finite & flat.isfinite().all(2).all(0).cpu()
            peaks, positions = flat.nan_to_num(nan=-torch.inf, posinf=-torch.inf).max(2)
            values = peaks.T.double().cpu()  # [C, B]
            sums, squares = sums + values.sum(1), squares + values.square().sum(1)
            new = (values, index.expand(len(values), -1), positions.T.cpu())
            best = merge_top_images(best, new, count)
            start += len(index)
            bar.advance(len(index))
    assert best is not None
    top_peaks, top_images, top_positions = (each.numpy() for each in best)
    selectivity = _selectivity(top_peaks, sums.numpy(), squares.numpy(), len(split))
    selectivity[~finite.numpy()] = np.nan
    width = map_shape[1]
    return TopImages(
        run=subject.name,
        layer=layer,
        split=name,
        shape=map_shape,
        peaks=top_peaks,
        images=top_images,
        positions=np.stack([top_positions // width, top_positions % width], axis=2),
        selectivity=selectivity,
        labels=split.labels.numpy(),
        classes=subject.classes,
    )


def _selectivity(peaks: Floats, sums: Floats, squares: Floats, count: int) -> Floats:
    with np.errstate(invalid="ignore"):  # from channels that are not finite
        mean = sums / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        # Rounding leaves a small deviation in a channel that never changes.
        alive = deviation > 1e-7 * np.maximum(np.abs(mean), 1e-30)
        selectivity = (peaks.mean(1) - mean) / np.where(alive, deviation, 1)
    return np.where(alive, selectivity, 0.0)


def merge_top_images(
    best: tuple[Tensor, ...] | None, new: tuple[Tensor, ...], count: int
) -> tuple[Tensor, ...]:
    """Merge two tuples of tensors `[rows, any]`: the `count` columns with the largest values.

    The values are the first tensor of each tuple; the other tensors are reordered with it. The
    sort is stable, so of equal values the earlier one is kept.
    """
    joined = new if best is None else tuple(torch.cat(p, 1) for p in zip(best, new, strict=True))
    order = joined[0].argsort(dim=1, descending=True, stable=True)[:, :count]
    return tuple(each.gather(1, order) for each in joined)


def top_images_figure(top: TopImages, split: Split, channels: int) -> Any:
    """Return a figure with a row of images for each of the most selective channels."""
    from convlens import plots
    from convlens.plots.images import Mark

    shown = top.shown(channels)
    height, width = top.shape
    has_positions = height * width > 1
    per_channel = top.images.shape[1]
    images, names = [], []
    marks: list[list[Mark | None]] = []
    for channel in shown:
        images.append(split.rows.gather(torch.from_numpy(top.images[channel])).numpy())
        label, count = top.most_common_class(channel)
        names.append((f"#{channel}", f"{count}/{per_channel} {label}"))
        marks.append(
            [
                Mark(x / width, y / height, (x + 1) / width, (y + 1) / height)
                if has_positions
                else None
                for y, x in top.positions[channel].tolist()
            ]
        )
    frame = "the frame marks the peak's position in the layer's map"
    if not has_positions:
        frame = "the layer has one value per image, so no position is marked"
    silent = f" {top.silent} channels never change." if top.silent else ""
    broken = f" {top.broken} channels are NaN or infinite." if top.broken else ""
    note = (
        f"The {per_channel} of {len(top.labels):,} {top.split} images that activate a channel "
        f"most, in decreasing order; {frame}. Channels whose peaks stand out most (in standard "
        "deviations over the images) come first, those that share many images with another "
        f"last; next to them their most common class.{silent}{broken}"
    )
    title = f"{top.run}, {top.layer}: {len(shown)} of {len(top.selectivity):,} channels"
    return plots.top_images(images, marks, names, title, note)


# Kernels


@dataclass(frozen=True)
class Filters:
    """The kernels of a convolution.

    Attributes:
        run: name of the network.
        layer: name of the convolution.
        weights: float32 `[out, in, h, w]`.
        energy: L2 norm of each output channel's weights, float64 `[out]`.
        order: output channels by decreasing energy, int64 `[out]`.
        limit: 99.5th percentile of the layer's absolute weights, the end of the color scale.
    """

    run: str
    layer: str
    weights: npt.NDArray[np.float32]
    energy: npt.NDArray[np.float64]
    order: npt.NDArray[np.int64]
    limit: float

    @property
    def colored(self) -> bool:
        """Whether the inputs are red, green and blue."""
        return bool(self.weights.shape[1] == 3)

    def inputs(self, channel: int) -> npt.NDArray[np.int64]:
        """Return the inputs with the strongest kernels of a channel, in decreasing order."""
        strength = np.sqrt((self.weights[channel].astype(np.float64) ** 2).sum((1, 2)))
        return np.argsort(-strength, kind="stable")[:KERNELS_SHOWN]

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "layer": self.layer,
            "shape": list(self.weights.shape),
            "scale": self.limit,
            "order": self.order.tolist(),
        }


def read_filters(subject: InspectedModel, layer: str = FIRST_LAYER) -> Filters:
    """Return the kernels of a convolution, or of the first convolution inside a layer.

    Raises:
        UsageError: an unknown layer, with close matches; a layer without convolutions.
    """
    prefix = [] if layer == FIRST_LAYER else list(features.find_layers(subject.model, [layer]))
    parent = subject.model.get_submodule(prefix[0]) if prefix else subject.model
    for name, module in parent.named_modules():
        if isinstance(module, nn.Conv2d):
            full_name = ".".join(part for part in (*prefix, name) if part)
            weights = module.weight.detach().float().cpu().numpy()
            energy = np.sqrt((weights.astype(np.float64) ** 2).sum((1, 2, 3)))
            order = np.argsort(-np.nan_to_num(energy, nan=np.inf), kind="stable")
            limit = channel_limits([weights])[1]
            return Filters(subject.name, full_name, weights, energy, order, limit)
    subject_name = f"layer {layer} of {subject.name}" if prefix else subject.name
    convolutions = [n for n, m in subject.model.named_modules() if isinstance(m, nn.Conv2d)]
    suggested = ", ".join(convolutions[:LAYERS_SUGGESTED])
    more = ", ..." if len(convolutions) > LAYERS_SUGGESTED else ""
    raise UsageError(
        f"{subject_name} has no convolution",
        fix=f"choose from: {suggested}{more}" if convolutions else "leave --filters out",
    )


def filters_figure(filters: Filters, channels: int) -> Any:
    """Return a figure of the `channels` output channels with the most energy."""
    from convlens import plots

    shown = filters.order[:channels]
    count, inputs, height, width = filters.weights.shape
    amount = f"all {count:,}" if len(shown) == count else f"{len(shown)} of {count:,}"
    title = f"{filters.run}, {filters.layer}: {amount} filters"
    scale = f"±{filters.limit:.3g} (99.5th percentile of the layer's absolute weights)"
    if filters.colored:
        names = [str(channel) for channel in shown.tolist()]
        note = (
            f"{height}×{width} over red, green, blue; highest energy (L2) first. Grey is 0, the "
            f"ends of the color scale are {scale}. Below: the number of the channel."
        )
        return plots.color_filters(filters.weights[shown], names, filters.limit, title, note)
    kernels = np.stack([filters.weights[c][filters.inputs(c)] for c in shown.tolist()])
    names = [f"#{channel}" for channel in shown.tolist()]
    selection = f"the {kernels.shape[1]} strongest of its {inputs:,} input kernels"
    selection = selection if inputs > 1 else "its kernel"
    note = (
        f"A row is a channel ({selection}, {height}×{width}); highest energy (L2) first. "
        f"Colors: {scale}."
    )
    return plots.kernels(kernels, names, filters.limit, title, note)
