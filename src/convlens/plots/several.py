"""Curves of several runs: seeds, splits or folds of one recipe, and variants side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from convlens.errors import UsageError
from convlens.plots.charts import (
    PANELS,
    PARTS,
    Floats,
    History,
    legend,
    over_epochs,
    series,
    sparse,
    two_panels,
)
from convlens.plots.style import BLUE, GREY, VERMILION, fit, styled, width

# Okabe and Ito's without yellow, which is too faint for a line on white.
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "osD^vPX*"


@styled
def seed_curves(histories: Sequence[History], title: str = "", what: str = "") -> Figure:
    """Loss and accuracy of several seeds: each a thin line, and mean with +- 1 sd as a band.

    The band (sample sd) covers the epochs that every seed reached: a mean over those that
    happened to train longer would be of another experiment. `what` says what the mean is over,
    by default so many seeds.
    """
    if not histories:
        raise UsageError("there are no histories to draw")
    what = what or f"{len(histories)} seeds"
    figure, panels = two_panels(title, f": mean ± sd of {what}" if len(histories) > 1 else "")
    epochs = _longest(histories)
    for axes, key in zip(panels, PANELS, strict=True):
        for part, words, look in PARTS:
            runs = [series(history, f"{part}_{key}") for history in histories]
            if any(np.isfinite(run).any() for run in runs):
                for run in runs:
                    axes.plot(epochs[: len(run)], run, color=look["color"], lw=0.6, alpha=0.5)
                _mean_and_band(axes, epochs, runs, {"label": words, **look})
        over_epochs(axes, epochs)
    legend(panels)
    return figure


@styled
def variant_curves(
    groups: Mapping[str, Sequence[History]], title: str = "", what: str = ""
) -> Figure:
    """Validation loss and accuracy of several variants, each with its own line style.

    A variant of several runs is their mean, with +- 1 sd (sample) as a band, over the epochs that
    all of them reached. Variants that were not validated show their training numbers.

    Args:
        groups: by the name of the variant, one history for each run.
        what: what the means are over, e.g. `3 seeds`; goes into the title.
    """
    if not groups or not all(groups.values()):
        raise UsageError("there are no histories to draw")
    several = any(len(histories) > 1 for histories in groups.values())
    after = f": mean ± sd of {what}" if several and what else ""
    columns = _columns(list(groups))
    figure, panels = two_panels(title, after)
    rows = -(-len(groups) // columns)
    figure.set_size_inches(8, 3.2 + 0.19 * rows)
    part = "val" if any(_validated(histories) for histories in groups.values()) else "train"
    for axes, key in zip(panels, PANELS, strict=True):
        for number, (name, histories) in enumerate(groups.items()):
            runs = [series(history, f"{part}_{key}") for history in histories]
            look = {"label": fit(name, 30), **line_look(number)}
            _mean_and_band(axes, _longest(histories), runs, look)
        over_epochs(axes, _longest([h for histories in groups.values() for h in histories]))
        words = "validation" if part == "val" else "training"
        axes.set_ylabel(f"{words} {axes.get_ylabel()}")
    handles, words_ = panels[0].get_legend_handles_labels()
    figure.legend(handles, words_, loc="outside lower center", ncols=columns, handlelength=3.2)
    return figure


@styled
def differences(
    gains: Mapping[str, tuple[float, tuple[float, float] | None, bool]], reference: str
) -> Figure:
    """Differences of accuracy from a reference with their 95% intervals, one row each.

    Args:
        gains: by name, the difference as a share, its interval where it is known, and whether
            the two can be told apart: such points are filled, the others hollow.
    """
    if not gains:
        raise UsageError("there are no differences to draw")
    figure = Figure(figsize=(6, 1.3 + 0.3 * len(gains)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color=GREY, linewidth=1)
    beside: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "fontsize": 8}
    beside |= {"textcoords": "offset points", "xytext": (36, 0)}
    for row, (gain, interval, clear) in enumerate(gains.values()):
        low, high = interval or (gain, gain)
        reach = [[100 * max(gain - low, 0)], [100 * max(high - gain, 0)]]
        look: dict[str, Any] = {"color": BLUE, "markerfacecolor": BLUE if clear else "white"}
        look |= {"xerr": reach, "elinewidth": 1.2, "capsize": 2.5} if interval else {}
        axes.errorbar([100 * gain], [row], fmt="o", **look)
        words = f"{100 * gain:+.2f}".replace("-", "\N{MINUS SIGN}")
        axes.annotate(words, (1, row), ha="right", va="center", **beside)
    axes.set_yticks(range(len(gains)), [fit(name, 26) for name in gains], fontsize=8)
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.set_title(fit(reference, 30, before="accuracy over that of "))
    axes.set_xlabel("points, 95% interval (filled: distinguishable)")
    axes.grid(False, axis="y")
    return figure


def line_look(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of the n-th line: no two alike among 28."""
    again, colour = divmod(number, len(COLOURS))
    return {
        "color": COLOURS[colour],
        "linestyle": DASHES[(colour + again) % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.3,
    }


def _columns(names: Sequence[str]) -> int:
    """How many names with their lines fit beside each other below the panels."""
    each = max(width(fit(name, 30)) for name in names) + 6
    return max(1, min(len(names), int(64 // each)))  # 8 inches are 64 of 9 points


def _longest(histories: Sequence[History]) -> Floats:
    return max((np.asarray(h["epoch"], dtype=np.float64) for h in histories), key=len)


def _validated(histories: Sequence[History]) -> bool:
    return any(np.isfinite(series(history, "val_loss")).any() for history in histories)


def _mean_and_band(
    axes: Axes, epochs: Floats, runs: Sequence[Floats], look: Mapping[str, Any]
) -> None:
    common = min(map(len, runs))
    shared = np.stack([run[:common] for run in runs])
    mean = shared.mean(axis=0)
    axes.plot(epochs[:common], mean, markevery=sparse(common), **look)
    if len(runs) > 1:
        sd = shared.std(axis=0, ddof=1)
        band = (epochs[:common], mean - sd, mean + sd)
        axes.fill_between(*band, color=look["color"], alpha=0.2, linewidth=0)
