"""A figure of where images lie in a network's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib.figure import Figure

from convlens.errors import UsageError
from convlens.plots.several import COLOURS
from convlens.plots.style import GREY, fit, styled, width

# With three of Tol's muted colours, so that ten classes need no shapes to be told apart.
TEN = (*COLOURS, "#999933", "#882255", "#44AA99")
SHAPES = "os^D"
TOLD_APART = 20  # classes: beyond, colours and shapes can't be
NAMED = 40


@styled
def embedding(
    points: npt.ArrayLike,
    labels: npt.ArrayLike,
    guesses: npt.ArrayLike,
    classes: Sequence[str],
    title: str = "",
    axes_named: tuple[str, str] = ("", ""),
) -> Figure:
    """Points [N, 2] coloured by their true class, with a ring round each mistake.

    Up to 20 classes have a colour and shape of their own and stand in the legend; beyond, right
    answers are pale and mistakes coloured. Up to 40 names stand at the median of their points.
    """
    places = np.asarray(points, dtype=np.float64)
    truth, said = np.asarray(labels, dtype=np.int64), np.asarray(guesses, dtype=np.int64)
    if places.shape != (len(truth), 2) or len(said) != len(truth):
        raise UsageError(f"points of shape {places.shape} for {len(truth)} images")
    figure = Figure(figsize=(6.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    present = [c for c in range(len(classes)) if (truth == c).any()]
    wrong = truth != said
    size = max(4.0, min(18.0, 9000 / max(1, len(truth))))
    dots: dict[str, Any] = {"s": size, "linewidths": 0}
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": "black", "linewidths": 0.7}
    if len(present) <= TOLD_APART:
        for number, c in enumerate(present):
            look: dict[str, Any] = {
                "color": TEN[number % 10],
                "marker": SHAPES[(number + number // 10) % 4],
                "alpha": 0.75,
            }
            x, y = places[truth == c].T
            axes.scatter(x, y, label=fit(classes[c], 18), **look, **dots)
    else:
        x, y = places[~wrong].T
        axes.scatter(x, y, color="#BDBDBD", label="right", **dots)
        ring = {"color": COLOURS[1], "linewidths": 0}
    x, y = places[wrong].T
    words = f"mistake ({len(x):,} of {len(truth):,})"
    axes.scatter(x, y, s=size * 2.2, label=words, **ring)
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    named: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "path_effects": halo}
    for c in present if len(present) <= NAMED else []:
        x, y = np.median(places[truth == c], axis=0)
        axes.text(x, y, fit(classes[c], 14), **named)
    axes.set(xlabel=axes_named[0], ylabel=axes_named[1], title=fit(title, 55))
    if not any(axes_named):  # t-SNE's axes mean nothing
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.tick_params(colors=GREY)
    _, names = axes.get_legend_handles_labels()
    columns = max(1, int(50 // (max(map(width, names)) + 3)))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, markerscale=2)
    return figure
