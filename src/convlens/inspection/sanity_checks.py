"""The checks of `sanity` made on every method at once, and the sentences they come to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from convlens.inspection import sanity
from convlens.inspection.saliency import Method, enlarged, maps_by
from convlens.inspection.sanity import Floats, Mean, mean_of

ORDERS = ("deletion", "insertion")
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Checked:
    """What the checks found of one method.

    Attributes:
        spearman, ssim: by the stages that have been forgotten, from the head down: how much the
            maps are still like those of the trained network.
        areas: under the curves of deletion (low is good) and insertion (high is good).
        gains: how much better the areas are than those of random orders, image by image.
        curves: the mean probability from 0 to all cells.
    """

    title: str
    spearman: dict[str, Mean]
    ssim: dict[str, Mean]
    areas: dict[str, Mean]
    gains: dict[str, Mean]
    curves: dict[str, Floats]

    def sentences(self) -> list[str]:
        """Whether the method depends on the weights, and whether its places matter."""
        return [_on_weights(self.title, self.spearman), self._on_places()]

    def _on_places(self) -> str:
        better = [name for name in ORDERS if _surely_above(self.gains[name], 0)]
        worse = [name for name in ORDERS if _surely_below(self.gains[name], 0)]
        gains = ", ".join(f"{name} {self.gains[name]}" for name in ORDERS)
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
        def plain(means: Mapping[str, Mean]) -> dict[str, Any]:
            return {name: mean.to_dict() for name, mean in means.items()}

        return {
            "randomisation": {"spearman": plain(self.spearman), "ssim": plain(self.ssim)},
            "areas": plain(self.areas),
            "gains_over_random": plain(self.gains),
            "curves": {name: values.tolist() for name, values in self.curves.items()},
            "verdict": self.sentences(),
        }


@dataclass(frozen=True)
class Sanity:
    """What the checks found of each method, and the areas and curves of random orders."""

    methods: dict[str, Checked]
    random_areas: dict[str, Mean]
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
    return methods * stages + images * len(ORDERS) * (methods + sanity.RANDOM_ORDERS)


def check(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    layer: str,
    methods: Mapping[str, Method],
    maps: Mapping[str, Tensor],
    advance: Advance = lambda count: None,
) -> Sanity:
    """Both checks of every method.

    Args:
        images, targets, layer: as in `saliency.maps_by`.
        maps: what the methods gave for the trained network.
        advance: is told of progress, `steps_of` times in all.
    """
    size = images.shape[2]
    fine = {name: enlarged(each, size) for name, each in maps.items()}
    spearman: dict[str, dict[str, Mean]] = {name: {} for name in methods}
    ssim: dict[str, dict[str, Mean]] = {name: {} for name in methods}
    for stage, forgotten in sanity.forgetting(model):
        for name, method in methods.items():
            again = maps_by(method, forgotten, images, targets, layer)
            # Ranks of the maps as they were made: enlarging adds values, but no knowledge.
            spearman[name][stage] = mean_of(sanity.rank_correlations(maps[name], again))
            ssim[name][stage] = mean_of(sanity.similarities(fine[name], enlarged(again, size)))
            advance(1)
    chance = _by_chance(model, images, targets, advance)
    checked = {}
    for name, method in methods.items():
        places = sanity.cell_order(fine[name])
        found = {
            order: sanity.curves(
                model, images, targets, places, insert=order == "insertion", advance=advance
            )
            for order in ORDERS
        }
        checked[name] = Checked(
            method.title,
            spearman[name],
            ssim[name],
            {order: mean_of(sanity.areas(found[order])) for order in ORDERS},
            {
                order: mean_of(
                    (sanity.areas(found[order]) - sanity.areas(chance[order]))
                    * (1 if order == "insertion" else -1)
                )
                for order in ORDERS
            },
            {order: found[order].mean(axis=0) for order in ORDERS},
        )
    return Sanity(
        checked,
        {order: mean_of(sanity.areas(chance[order])) for order in ORDERS},
        {order: chance[order].mean(axis=0) for order in ORDERS},
    )


def _by_chance(
    model: nn.Module, images: Tensor, targets: Tensor, advance: Advance
) -> dict[str, Floats]:
    """Curves `[N, steps + 1]` of deletion and insertion, each the mean of several random orders."""
    found = {}
    for order in ORDERS:
        runs = []
        for seed in range(sanity.RANDOM_ORDERS):
            places = sanity.random_order(len(images), images.shape[2], seed)
            runs.append(
                sanity.curves(
                    model, images, targets, places, insert=order == "insertion", advance=advance
                )
            )
        found[order] = np.mean(runs, axis=0)
    return found


def _on_weights(title: str, spearman: Mapping[str, Mean]) -> str:
    """What is left of the maps when all weights are random, and which weights changed nothing."""
    left = list(spearman.values())[-1]
    if left.n == 0:
        return f"{title}: its maps are the same everywhere, nothing can be said of the weights"
    words = f"rank correlation with random weights {left}"
    if _surely_above(left, sanity.KEPT):
        return f"{title}: hardly depends on the weights, it shows the picture itself ({words})"
    if not _surely_below(left, sanity.KEPT):
        return f"{title}: {left.n} images don't tell whether it depends on the weights ({words})"
    ignored = list(itertools.takewhile(lambda s: _surely_above(spearman[s], sanity.KEPT), spearman))
    if not ignored:
        return f"{title}: depends on the weights ({words})"
    those = ignored[0] if len(ignored) == 1 else f"{ignored[0]} to {ignored[-1]}"
    return (
        f"{title}: depends on the weights ({words}), but hardly on those of {those} "
        f"({spearman[ignored[-1]]})"
    )


def _surely_below(mean: Mean, limit: float) -> bool:
    return (mean.value if mean.interval95 is None else mean.interval95[1]) < limit


def _surely_above(mean: Mean, limit: float) -> bool:
    return (mean.value if mean.interval95 is None else mean.interval95[0]) > limit
