"""Sanity checks of attribution maps: do they depend on the weights, do the marked pixels matter?

A map that resembles the edges of the image is convincing and says nothing about the network. Two
checks reveal that: the maps are computed again while the weights are randomized stage by stage
(Adebayo et al. 2018), and the image is deleted and inserted in the order of the map (Petsiuk et
al. 2018).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from convlens.interpret.attribution_methods import (
    Method,
    attribution_maps,
    images_per_pass,
    upsample_maps,
)
from convlens.interpret.features import without_weight_gradients
from convlens.models import model_parts
from convlens.models.stages import stage_of

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float] | None
Advance = Callable[[int], None]

MAX_RANDOM_CORRELATION = 0.5  # with random weights; above, maps hardly depend on the weights
CELLS_PER_SIDE = 8  # images are deleted and inserted in 8 x 8 cells
CURVE_STEPS = 32  # two cells at a time
RANDOM_ORDERS = 4  # whose mean is the baseline of deletion and insertion
CURVES = ("deletion", "insertion")
SSIM_WINDOW = 7  # pixels
BLURRED_SIDE = 4  # pixels: resolution of the image into which cells are inserted
# With fewer images Student's interval of a share is often wider than the possible range.
MIN_IMAGES_FOR_INTERVAL = 5


@dataclass(frozen=True)
class MeanWithInterval:
    """A mean over images and its 95% interval (Student's t), None for fewer than five images."""

    value: float
    interval95: Interval
    n: int

    def to_dict(self) -> dict[str, object]:
        interval = None if self.interval95 is None else list(self.interval95)
        return {"mean": self.value, "interval95": interval, "n": self.n}

    def __str__(self) -> str:
        if self.interval95 is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ({self.interval95[0]:.2f} to {self.interval95[1]:.2f})"

    def is_below(self, limit: float) -> bool:
        """Return whether the whole interval is below a limit; False without an interval."""
        return self.interval95 is not None and self.interval95[1] < limit

    def is_above(self, limit: float) -> bool:
        """Return whether the whole interval is above a limit; False without an interval."""
        return self.interval95 is not None and self.interval95[0] > limit


def mean_with_interval(values: Sequence[float] | Floats) -> MeanWithInterval:
    """Return the mean of the finite values; NaN if there are none."""
    from scipy.stats import t

    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    n = len(finite)
    if n < MIN_IMAGES_FOR_INTERVAL:
        return MeanWithInterval(float(finite.mean()) if n else math.nan, None, n)
    mean = float(finite.mean())
    half_width = float(t.ppf(0.975, n - 1) * finite.std(ddof=1) / math.sqrt(n))
    return MeanWithInterval(mean, (mean - half_width, mean + half_width), n)


# Randomized weights


def cascading_randomization(model: nn.Module, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Yield a copy of the network while its stages are randomized from the head down.

    At each step the parameters of one more stage are replaced by normal samples with the mean and
    standard deviation of the original values, which preserves the scale of the activations (with
    a standard re-initialization they fade in deep networks, and the maps with them). Running
    statistics of normalization layers are kept.

    Yields:
        The name of the stage randomized last, and the network.
    """
    randomized = copy.deepcopy(model)
    stages = stage_of(randomized)
    generator = torch.Generator().manual_seed(seed)
    parts = model_parts(randomized)
    for stage in (parts.head, *reversed(parts.stages)):
        tensors = [p for name, p in randomized.named_parameters() if stages[name] == stage]
        for tensor in tensors:
            _randomize(tensor, generator)
        if tensors:
            yield stage, randomized


@torch.no_grad()
def _randomize(tensor: Tensor, generator: torch.Generator) -> None:
    if tensor.numel() > 1:
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise.to(tensor) * tensor.std() + tensor.mean())


def rank_correlations(first: Tensor, second: Tensor) -> list[float]:
    """Return Spearman's correlation of |first| and |second| for each image.

    Of magnitudes, since the sign is arbitrary with random weights. 0 if the second map is constant
    (nothing remains of the first), NaN if the first is.

    Args:
        first: maps `[N, h, w]` of the trained network.
        second: maps `[N, h, w]` of the randomized network.
    """
    from scipy.stats import rankdata

    correlations = []
    pairs = zip(first.abs().flatten(1).numpy(), second.abs().flatten(1).numpy(), strict=True)
    for one, other in pairs:
        a, b = rankdata(one), rankdata(other)
        if np.ptp(a) == 0:
            correlations.append(math.nan)
        elif np.ptp(b) == 0:
            correlations.append(0.0)
        else:
            correlations.append(float(np.corrcoef(a, b)[0, 1]))
    return correlations


def ssim(first: Tensor, second: Tensor) -> list[float]:
    """Return the SSIM of |first| and |second|, maps `[N, h, w]`, each scaled to 0..1.

    Wang et al. 2004, IEEE TIP 13 (4): K1 = 0.01, K2 = 0.03, uniform windows of 7 x 7 (smaller in
    smaller maps), population moments.
    """

    def scaled(maps: Tensor) -> Tensor:
        magnitude = maps.abs().double()
        return magnitude / magnitude.amax((1, 2), keepdim=True).clamp(min=1e-30)

    a, b = scaled(first), scaled(second)
    side = min(SSIM_WINDOW, *a.shape[1:])

    def mean(values: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(values, side, stride=1)

    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a * mean_a, mean(b * b) - mean_b * mean_b
    covariance = mean(a * b) - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    denominator = (mean_a * mean_a + mean_b * mean_b + c1) * (var_a + var_b + c2)
    values: list[float] = (numerator / denominator).mean((1, 2)).tolist()
    return values


# Deletion and insertion


def cell_ranks(maps: Tensor, seed: int = 0) -> Tensor:
    """Return the rank of each cell of maps `[N, S, S]`: 0 for the largest mean.

    Equal cells (Grad-CAM is 0 in large areas) are ranked at random.

    Returns:
        int64 `[N, cells]`.
    """
    cells = _cell_index(maps.shape[1]).flatten()
    means = torch.zeros(len(maps), int(cells.max()) + 1, dtype=torch.float64)
    means.index_add_(1, cells, maps.flatten(1).double())
    means /= torch.bincount(cells)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(means.shape[1], generator=generator)
    order = shuffled[means[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    return order.argsort(1)


def random_cell_ranks(count: int, size: int, seed: int) -> Tensor:
    """Return random ranks of the cells of `count` images, as `cell_ranks` does for maps."""
    cells = int(_cell_index(size).max()) + 1
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(cells, generator=generator) for _ in range(count)])


def _cell_index(size: int) -> Tensor:
    """Return the number of the cell in which each pixel lies, int64 `[S, S]`."""
    per_side = min(CELLS_PER_SIDE, size)
    line = torch.arange(size) * per_side // size
    return line[:, None] * per_side + line


def perturbation_curves(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    ranks: Tensor,
    *,
    insert: bool,
    advance: Advance = lambda count: None,
) -> Floats:
    """Return the probability of the target while cells are deleted or inserted by rank.

    Petsiuk et al. 2018, BMVC (arXiv:1806.07421), in cells instead of pixels: single pixels deleted
    in a random order are noise that misleads a network sooner than any map does, so methods could
    not be compared with chance. Deleted cells take the mean color; inserted cells replace those of
    an image blurred to 4 x 4.

    Args:
        model: the network.
        images: normalized, `[N, C, S, S]`, on the model's device.
        targets: int64 `[N]`.
        ranks: int64 `[N, cells]`, from `cell_ranks`.
        insert: insert the cells rather than delete them.
        advance: called with 1 after each image.

    Returns:
        float64 `[N, steps + 1]`.
    """
    size = images.shape[2]
    if insert:
        blurred = nn.functional.adaptive_avg_pool2d(images, BLURRED_SIDE)
        before = nn.functional.interpolate(blurred, (size, size), mode="bilinear")
        after = images
    else:
        before, after = images, torch.zeros_like(images)
    cells = ranks.shape[1]
    steps = min(CURVE_STEPS, cells)
    pixel_ranks = ranks[:, _cell_index(size)].to(images.device)[:, None]  # [N, 1, S, S]
    limits = torch.arange(steps + 1, device=images.device) * cells // steps
    curves = torch.empty(len(images), steps + 1, dtype=torch.float64)
    with torch.no_grad(), without_weight_gradients(model):
        for index, target in enumerate(targets.tolist()):
            for step in torch.arange(steps + 1).split(images_per_pass(images)):
                changed = pixel_ranks[index] < limits[step.to(limits.device), None, None, None]
                mixed = torch.where(changed, after[index], before[index])
                probs = model(mixed).double().softmax(1)[:, target]
                curves[index, step] = probs.cpu()
            advance(1)
    return np.asarray(curves.numpy())


def areas_under_curves(curves: Floats) -> Floats:
    """Return the area under each curve `[N, steps + 1]` over 0..1 (trapezoids), float64 `[N]`."""
    inner = curves[:, 1:-1].sum(axis=1)
    areas: Floats = (inner + (curves[:, 0] + curves[:, -1]) / 2) / (curves.shape[1] - 1)
    return areas


# Both checks of several methods


@dataclass(frozen=True)
class MethodChecks:
    """Results of the checks for one method.

    Attributes:
        title: of the method.
        spearman: correlation with the maps of the trained network, by the stage randomized last,
            from the head down.
        ssim: structural similarity with the maps of the trained network, likewise.
        areas: under the curves of deletion (lower is better) and insertion (higher is better).
        gains: improvement of the areas over those of random orders, paired by image.
        curves: mean probability from 0 to all cells.
    """

    title: str
    spearman: dict[str, MeanWithInterval]
    ssim: dict[str, MeanWithInterval]
    areas: dict[str, MeanWithInterval]
    gains: dict[str, MeanWithInterval]
    curves: dict[str, Floats]

    def sentences(self) -> list[str]:
        """Return two conclusions: on the dependence on the weights, and on the marked pixels."""
        return [self._conclude_randomization(), self._conclude_perturbation()]

    def _conclude_randomization(self) -> str:
        remaining = list(self.spearman.values())[-1]
        if remaining.n == 0:
            return f"{self.title}: the maps are constant, so their dependence on weights is unknown"
        correlation = f"rank correlation with random weights {remaining}"
        if remaining.is_above(MAX_RANDOM_CORRELATION):
            return (
                f"{self.title}: hardly depends on the weights, it shows the image itself "
                f"({correlation})"
            )
        if not remaining.is_below(MAX_RANDOM_CORRELATION):
            return (
                f"{self.title}: whether it depends on the weights can't be told from "
                f"{_count_images(remaining)} ({correlation})"
            )
        ignored = list(
            itertools.takewhile(
                lambda stage: self.spearman[stage].is_above(MAX_RANDOM_CORRELATION), self.spearman
            )
        )
        if not ignored:
            return f"{self.title}: depends on the weights ({correlation})"
        stages = ignored[0] if len(ignored) == 1 else f"{ignored[0]} to {ignored[-1]}"
        return (
            f"{self.title}: depends on the weights ({correlation}), but hardly on those of "
            f"{stages} ({self.spearman[ignored[-1]]})"
        )

    def _conclude_perturbation(self) -> str:
        gains = ", ".join(f"{name} {self.gains[name]}" for name in CURVES)
        least = min((self.gains[name] for name in CURVES), key=lambda gain: gain.n)
        if least.interval95 is None:
            return (
                f"{self.title}: whether the marked pixels matter more than random ones can't be "
                f"told from {_count_images(least)} (gain in area: {gains})"
            )
        better = [name for name in CURVES if self.gains[name].is_above(0)]
        worse = [name for name in CURVES if self.gains[name].is_below(0)]
        if len(better) == 2:
            conclusion = "the marked pixels matter more to the network than random ones"
        elif worse:
            conclusion = f"the marked pixels matter less than random ones by {' and '.join(worse)}"
        elif better:
            conclusion = f"the marked pixels matter more than random ones by {better[0]} only"
        else:
            conclusion = (
                "the marked pixels are not distinguishable from random ones on these images"
            )
        return f"{self.title}: {conclusion} (gain in area: {gains})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "randomisation": {
                "spearman": _means_to_dict(self.spearman),
                "ssim": _means_to_dict(self.ssim),
            },
            "areas": _means_to_dict(self.areas),
            "gains_over_random": _means_to_dict(self.gains),
            "curves": {name: values.tolist() for name, values in self.curves.items()},
            "verdict": self.sentences(),
        }


@dataclass(frozen=True)
class SanityReport:
    """Results of the checks for each method, and areas and curves of random orders."""

    methods: dict[str, MethodChecks]
    random_areas: dict[str, MeanWithInterval]
    random_curves: dict[str, Floats]

    def to_dict(self) -> dict[str, Any]:
        return {
            "methods": {name: checks.to_dict() for name, checks in self.methods.items()},
            "random": {
                "areas": _means_to_dict(self.random_areas),
                "curves": {name: values.tolist() for name, values in self.random_curves.items()},
            },
        }


def _count_images(mean: MeanWithInterval) -> str:
    """Return the number of images, and how many an interval needs if they are too few for one."""
    images = f"{mean.n} image{'s' * (mean.n != 1)}"
    if mean.interval95 is None:
        images += f"; {MIN_IMAGES_FOR_INTERVAL} or more give an interval"
    return images


def _means_to_dict(means: Mapping[str, MeanWithInterval]) -> dict[str, Any]:
    return {name: mean.to_dict() for name, mean in means.items()}


def count_progress_steps(methods: int, stages: int, images: int) -> int:
    """Return the sum of the counts with which `run_sanity_checks` calls `advance`."""
    return methods * stages + images * len(CURVES) * (methods + RANDOM_ORDERS)


def run_sanity_checks(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    layer: str,
    methods: Mapping[str, Method],
    maps: Mapping[str, Tensor],
    advance: Advance = lambda count: None,
) -> SanityReport:
    """Run both checks for every method.

    Args:
        model: the trained network.
        images: normalized, `[N, C, S, S]`, on the model's device.
        targets: int64 `[N]`, the attributed classes.
        layer: of methods that are `layered`.
        methods: the methods by name.
        maps: by method, the maps of the trained network.
        advance: called with the progress, `count_progress_steps` in total.
    """
    size = images.shape[2]
    upsampled = {name: upsample_maps(each, size) for name, each in maps.items()}
    spearman: dict[str, dict[str, MeanWithInterval]] = {name: {} for name in methods}
    similarity: dict[str, dict[str, MeanWithInterval]] = {name: {} for name in methods}
    for stage, randomized in cascading_randomization(model):
        for name, method in methods.items():
            random_maps = attribution_maps(method, randomized, images, targets, layer)
            # Ranks at the resolution of the method: upsampling adds values, but no information.
            correlations = rank_correlations(maps[name], random_maps)
            spearman[name][stage] = mean_with_interval(correlations)
            similarity[name][stage] = mean_with_interval(
                ssim(upsampled[name], upsample_maps(random_maps, size))
            )
            advance(1)

    def curves_of(ranks: Tensor, kind: str) -> Floats:
        return perturbation_curves(
            model, images, targets, ranks, insert=kind == "insertion", advance=advance
        )

    random_ranks = [random_cell_ranks(len(images), size, seed) for seed in range(RANDOM_ORDERS)]
    random_curves: dict[str, Floats] = {
        kind: np.mean([curves_of(ranks, kind) for ranks in random_ranks], axis=0) for kind in CURVES
    }
    random_areas = {kind: areas_under_curves(random_curves[kind]) for kind in CURVES}
    checks = {}
    for name, method in methods.items():
        ranks = cell_ranks(upsampled[name])
        curves = {kind: curves_of(ranks, kind) for kind in CURVES}
        areas = {kind: areas_under_curves(curves[kind]) for kind in CURVES}
        gains = {
            "deletion": random_areas["deletion"] - areas["deletion"],
            "insertion": areas["insertion"] - random_areas["insertion"],
        }
        checks[name] = MethodChecks(
            title=method.title,
            spearman=spearman[name],
            ssim=similarity[name],
            areas={kind: mean_with_interval(areas[kind]) for kind in CURVES},
            gains={kind: mean_with_interval(gains[kind]) for kind in CURVES},
            curves={kind: curves[kind].mean(axis=0) for kind in CURVES},
        )
    return SanityReport(
        checks,
        {kind: mean_with_interval(random_areas[kind]) for kind in CURVES},
        {kind: random_curves[kind].mean(axis=0) for kind in CURVES},
    )
