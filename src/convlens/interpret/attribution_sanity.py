"""Whether a map can be believed: does it depend on the weights, and do its places matter?

A map that looks like the picture's edges convinces people and says nothing of the network. Two
checks tell: the method is asked again while the network forgets what it has learned (Adebayo et
al. 2018), and the picture is taken apart in the order of the map (Petsiuk et al. 2018).
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
    at_once,
    attribution_maps,
    still,
    upsample_maps,
)
from convlens.models import model_parts
from convlens.models.stages import stage_of

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float] | None

KEPT = 0.5  # of the rank correlation after all weights are random: more says nothing of them
CELLS = 8  # images are taken apart in 8x8 cells
STEPS = 32  # two cells at a time
RANDOM_ORDERS = 4
WINDOW = 7  # of the SSIM, pixels


@dataclass(frozen=True)
class MeanWithInterval:
    """A mean over images with its 95% interval (Student's t), which fewer than five haven't."""

    value: float
    interval95: Interval
    n: int

    def to_dict(self) -> dict[str, object]:
        low_high = None if self.interval95 is None else list(self.interval95)
        return {"mean": self.value, "interval95": low_high, "n": self.n}

    def __str__(self) -> str:
        if self.interval95 is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ({self.interval95[0]:.2f} to {self.interval95[1]:.2f})"


# With fewer images Student's interval of a share is often wider than what is possible.
MIN_IMAGES = 5


def mean_with_interval(values: Sequence[float] | Floats) -> MeanWithInterval:
    """The mean of those values that are numbers; NaN where none is."""
    from scipy.stats import t

    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    n = len(known)
    if n < MIN_IMAGES:
        return MeanWithInterval(float(known.mean()) if n else math.nan, None, n)
    half = float(t.ppf(0.975, n - 1) * known.std(ddof=1) / math.sqrt(n))
    return MeanWithInterval(
        float(known.mean()), (float(known.mean()) - half, float(known.mean()) + half), n
    )


# Randomised weights


def randomization_similarity(model: nn.Module, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """A copy of the network that forgets its weights from the head down: (stage, network).

    At each step the tensors of one more stage become normal draws of the mean and deviation that
    their values have, so that activations keep about their size (a plain re-initialisation lets
    them fade in deep networks, and maps with them). Statistics of norms stay.
    """
    forgotten = copy.deepcopy(model)
    stages = stage_of(forgotten)
    generator = torch.Generator().manual_seed(seed)
    known = model_parts(forgotten)
    for stage in (known.head, *reversed(known.stages)):
        tensors = [p for name, p in forgotten.named_parameters() if stages[name] == stage]
        for tensor in tensors:
            _redraw(tensor, generator)
        if tensors:
            yield stage, forgotten


@torch.no_grad()
def _redraw(tensor: Tensor, generator: torch.Generator) -> None:
    if tensor.numel() > 1:
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise.to(tensor) * tensor.std() + tensor.mean())


def rank_correlations(first: Tensor, second: Tensor) -> list[float]:
    """Spearman's coefficient of |first| and |second|, maps `[N, h, w]`, for each image.

    Of magnitudes, since the sign of random weights means nothing. 0 where the second map is the
    same everywhere (nothing is left of the first), NaN where the first is.
    """
    from scipy.stats import rankdata

    found = []
    pairs = zip(first.abs().flatten(1).numpy(), second.abs().flatten(1).numpy(), strict=True)
    for one, other in pairs:
        a, b = rankdata(one), rankdata(other)
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            found.append(math.nan if np.ptp(a) == 0 else 0.0)
        else:
            found.append(float(np.corrcoef(a, b)[0, 1]))
    return found


def similarities(first: Tensor, second: Tensor) -> list[float]:
    """SSIM of |first| and |second|, each scaled to 0..1, maps `[N, h, w]`, for each image.

    Wang et al. 2004, IEEE TIP 13 (4): K1 = 0.01, K2 = 0.03, uniform windows of 7x7 (fewer in
    smaller maps), population moments.
    """

    def scaled(maps: Tensor) -> Tensor:
        size = maps.abs().double()
        return size / size.amax((1, 2), keepdim=True).clamp(min=1e-30)

    a, b = scaled(first), scaled(second)
    side = min(WINDOW, *a.shape[1:])

    def mean(values: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(values, side, stride=1)

    c1, c2 = 0.01**2, 0.03**2
    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    top = (2 * ma * mb + c1) * (2 * both + c2)
    bottom = (ma * ma + mb * mb + c1) * (va + vb + c2)
    values: list[float] = (top / bottom).mean((1, 2)).tolist()
    return values


# Deletion and insertion


def cell_order(maps: Tensor, seed: int = 0) -> Tensor:
    """Maps `[N, S, S]` as the places of their cells, int64 `[N, cells]`: 0 for the largest mean.

    Equal cells (Grad-CAM is 0 in many places) come in a random order.
    """
    size = maps.shape[1]
    number = _cell_of(size)
    means = torch.zeros(len(maps), int(number.max()) + 1, dtype=torch.float64)
    counts = torch.bincount(number.flatten())
    means.index_add_(1, number.flatten(), maps.flatten(1).double())
    means /= counts
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(means.shape[1], generator=generator)
    order = shuffled[means[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    return order.argsort(1)


def random_order(count: int, size: int, seed: int) -> Tensor:
    """A random order of the cells for each image, as `cell_order` gives them."""
    cells = int(_cell_of(size).max()) + 1
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(cells, generator=generator) for _ in range(count)])


def _cell_of(size: int) -> Tensor:
    """int64 `[S, S]`: the cell in which each pixel lies."""
    across = min(CELLS, size)
    line = torch.arange(size) * across // size
    return line[:, None] * across + line


def perturbation_curves(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    places: Tensor,
    *,
    insert: bool,
    advance: Callable[[int], None] = lambda count: None,
) -> Floats:
    """The target's probability `[N, steps + 1]` while cells go (or come) in the order given.

    Petsiuk et al. 2018, BMVC (arXiv:1806.07421), in cells instead of pixels: single pixels that
    go in a random order are noise that breaks a network sooner than any map, so that methods
    could not be compared with chance. Deleted cells take the mean colour; inserted ones come
    into a picture blurred to 4x4.

    Args:
        places: int64 `[N, cells]`, from `cell_order`.
    """
    size = images.shape[2]
    blurred = nn.functional.adaptive_avg_pool2d(images, 4)
    blurred = nn.functional.interpolate(blurred, (size, size), mode="bilinear")
    before, after = (blurred, images) if insert else (images, torch.zeros_like(images))
    cells = places.shape[1]
    steps = min(STEPS, cells)
    when = places[:, _cell_of(size)].to(images.device)[:, None]  # [N, 1, S, S]
    limits = torch.arange(steps + 1, device=images.device) * cells // steps
    found = torch.empty(len(images), steps + 1, dtype=torch.float64)
    with torch.no_grad(), still(model):
        for index, target in enumerate(targets.tolist()):
            for part in torch.arange(steps + 1).split(at_once(images)):
                changed = when[index] < limits[part.to(limits.device), None, None, None]
                mixed = torch.where(changed, after[index], before[index])
                probs = model(mixed).double().softmax(1)[:, target]
                found[index, part] = probs.cpu()
            advance(1)
    return np.asarray(found.numpy())


def areas_under_curves(found: Floats) -> Floats:
    """The area under each curve `[N, steps + 1]` over 0..1 (trapezoids), float64 `[N]`."""
    inner = found[:, 1:-1].sum(axis=1)
    result: Floats = (inner + (found[:, 0] + found[:, -1]) / 2) / (found.shape[1] - 1)
    return result


# ---- sanity checks ----------------------------------------
# The checks of `sanity` made on every method at once, and the sentences they come to.

RANDOM_ORDERS_DRAWN = ("deletion", "insertion")
Advance = Callable[[int], None]


@dataclass(frozen=True)
class MethodChecks:
    """What the checks found of one method.

    Attributes:
        spearman, ssim: by the stages that have been forgotten, from the head down: how much the
            maps are still like those of the trained network.
        areas: under the curves of deletion (low is good) and insertion (high is good).
        gains: how much better the areas are than those of random orders, image by image.
        curves: the mean probability from 0 to all cells.
    """

    title: str
    spearman: dict[str, MeanWithInterval]
    ssim: dict[str, MeanWithInterval]
    areas: dict[str, MeanWithInterval]
    gains: dict[str, MeanWithInterval]
    curves: dict[str, Floats]

    def sentences(self) -> list[str]:
        """Whether the method depends on the weights, and whether its places matter."""
        return [_on_weights(self.title, self.spearman), self._on_places()]

    def _on_places(self) -> str:
        better = [name for name in RANDOM_ORDERS_DRAWN if _surely_above(self.gains[name], 0)]
        worse = [name for name in RANDOM_ORDERS_DRAWN if _surely_below(self.gains[name], 0)]
        gains = ", ".join(f"{name} {self.gains[name]}" for name in RANDOM_ORDERS_DRAWN)
        if len(better) == 2:
            said = "its places matter to the network more than random ones"
        elif worse:
            said = f"its places matter less than random ones by {' and '.join(worse)}"
        elif better:
            said = f"its places matter more than random ones by {better[0]} alone"
        else:
            said = "its places are not distinguishable from random ones on these images"
        return f"{self.title}: {said} (gain in area: {gains})"

    def to_dict(self) -> dict[str, Any]:
        def plain(means: Mapping[str, MeanWithInterval]) -> dict[str, Any]:
            return {name: mean.to_dict() for name, mean in means.items()}

        return {
            "randomisation": {"spearman": plain(self.spearman), "ssim": plain(self.ssim)},
            "areas": plain(self.areas),
            "gains_over_random": plain(self.gains),
            "curves": {name: values.tolist() for name, values in self.curves.items()},
            "verdict": self.sentences(),
        }


@dataclass(frozen=True)
class SanityReport:
    """What the checks found of each method, and the areas and curves of random orders."""

    methods: dict[str, MethodChecks]
    random_areas: dict[str, MeanWithInterval]
    random_curves: dict[str, Floats]

    def to_dict(self) -> dict[str, Any]:
        return {
            "methods": {name: checked.to_dict() for name, checked in self.methods.items()},
            "random": {
                "areas": {name: mean.to_dict() for name, mean in self.random_areas.items()},
                "curves": {name: values.tolist() for name, values in self.random_curves.items()},
            },
        }


def steps_of(methods: int, stages: int, images: int) -> int:
    """How often `check` tells of progress."""
    return methods * stages + images * len(RANDOM_ORDERS_DRAWN) * (methods + RANDOM_ORDERS)


def run_sanity_checks(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    layer: str,
    methods: Mapping[str, Method],
    maps: Mapping[str, Tensor],
    advance: Advance = lambda count: None,
) -> SanityReport:
    """Both checks of every method.

    Args:
        images, targets, layer: as in `saliency.maps_by`.
        maps: what the methods gave for the trained network.
        advance: is told of progress, `steps_of` times in all.
    """
    size = images.shape[2]
    fine = {name: upsample_maps(each, size) for name, each in maps.items()}
    spearman: dict[str, dict[str, MeanWithInterval]] = {name: {} for name in methods}
    ssim: dict[str, dict[str, MeanWithInterval]] = {name: {} for name in methods}
    for stage, forgotten in randomization_similarity(model):
        for name, method in methods.items():
            again = attribution_maps(method, forgotten, images, targets, layer)
            # Ranks of the maps as they were made: enlarging adds values, but no knowledge.
            spearman[name][stage] = mean_with_interval(rank_correlations(maps[name], again))
            ssim[name][stage] = mean_with_interval(
                similarities(fine[name], upsample_maps(again, size))
            )
            advance(1)
    chance = _by_chance(model, images, targets, advance)
    checked = {}
    for name, method in methods.items():
        places = cell_order(fine[name])
        found = {
            order: perturbation_curves(
                model, images, targets, places, insert=order == "insertion", advance=advance
            )
            for order in RANDOM_ORDERS_DRAWN
        }
        checked[name] = MethodChecks(
            method.title,
            spearman[name],
            ssim[name],
            {
                order: mean_with_interval(areas_under_curves(found[order]))
                for order in RANDOM_ORDERS_DRAWN
            },
            {
                order: mean_with_interval(
                    (areas_under_curves(found[order]) - areas_under_curves(chance[order]))
                    * (1 if order == "insertion" else -1)
                )
                for order in RANDOM_ORDERS_DRAWN
            },
            {order: found[order].mean(axis=0) for order in RANDOM_ORDERS_DRAWN},
        )
    return SanityReport(
        checked,
        {
            order: mean_with_interval(areas_under_curves(chance[order]))
            for order in RANDOM_ORDERS_DRAWN
        },
        {order: chance[order].mean(axis=0) for order in RANDOM_ORDERS_DRAWN},
    )


def _by_chance(
    model: nn.Module, images: Tensor, targets: Tensor, advance: Advance
) -> dict[str, Floats]:
    """Curves `[N, steps + 1]` of deletion and insertion, each the mean of several random orders."""
    found = {}
    for order in RANDOM_ORDERS_DRAWN:
        runs = []
        for seed in range(RANDOM_ORDERS):
            places = random_order(len(images), images.shape[2], seed)
            runs.append(
                perturbation_curves(
                    model, images, targets, places, insert=order == "insertion", advance=advance
                )
            )
        found[order] = np.mean(runs, axis=0)
    return found


def _on_weights(title: str, spearman: Mapping[str, MeanWithInterval]) -> str:
    """What is left of the maps when all weights are random, and which weights changed nothing."""
    left = list(spearman.values())[-1]
    if left.n == 0:
        return f"{title}: its maps are the same everywhere, nothing can be said of the weights"
    words = f"rank correlation with random weights {left}"
    if _surely_above(left, KEPT):
        return f"{title}: hardly depends on the weights, it shows the picture itself ({words})"
    if not _surely_below(left, KEPT):
        return f"{title}: {left.n} images don't tell whether it depends on the weights ({words})"
    ignored = list(itertools.takewhile(lambda s: _surely_above(spearman[s], KEPT), spearman))
    if not ignored:
        return f"{title}: depends on the weights ({words})"
    those = ignored[0] if len(ignored) == 1 else f"{ignored[0]} to {ignored[-1]}"
    return (
        f"{title}: depends on the weights ({words}), but hardly on those of {those} "
        f"({spearman[ignored[-1]]})"
    )


def _surely_below(mean: MeanWithInterval, limit: float) -> bool:
    return (mean.value if mean.interval95 is None else mean.interval95[1]) < limit


def _surely_above(mean: MeanWithInterval, limit: float) -> bool:
    return (mean.value if mean.interval95 is None else mean.interval95[0]) > limit
