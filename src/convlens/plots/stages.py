"""Figures of what was measured at the stages of networks: curves over depth, similarities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

from convlens.errors import UsageError
from convlens.plots.charts import Floats
from convlens.plots.several import line_look
from convlens.plots.style import GREY, PALE, fit, styled, width

Ends = tuple[float, float, float]  # value, low and high end of its interval; NaN where none
COLUMNS = 3


class StageLine(NamedTuple):
    """A network in `stage_measures`: for each measure a value a stage, in the stages' order."""

    name: str
    stages: Sequence[str]
    values: Mapping[str, Sequence[Ends]]
    dashed: bool = False


@styled
def stage_measures(
    lines: Sequence[StageLine],
    panels: Mapping[str, tuple[str, str]],
    note: str = "",
) -> Figure:
    """A panel for each measure, in it a line for each network over its stages, with intervals.

    Networks of other depths are spread over the axis of the deepest, whose stages name it.

    Args:
        panels: title and scale (`percent`, `number`, `log`) of each measure.
        note: what was measured on; goes below, small.
    """
    if not lines or not panels:
        raise UsageError("there are no measurements to draw")
    columns = 2 if len(panels) == 4 else min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    deepest = max((line.stages for line in lines), key=len)
    room = 0.058 * max(map(len, deepest)) if len(deepest) > 1 else 0.2
    names = [fit(line.name, 40) for line in lines]
    inches = 2.7 * columns + 0.3
    beside = max(1, min(len(names), int(inches * 8 // (max(map(width, names)) + 7))))
    size = (inches, (1.85 + room) * rows + 0.3 + 0.2 * math.ceil(len(names) / beside))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    drawn = 0
    looks = []
    for line in lines:
        looks.append(_dashed(line, lines) if line.dashed else line_look(drawn))
        drawn += not line.dashed
    for axes, (name, (words, scale)) in zip(grid.flat, panels.items(), strict=False):
        for number, (line, look) in enumerate(zip(lines, looks, strict=True)):
            aside = 0.09 * (number - (len(lines) - 1) / 2)
            _line(axes, line, name, len(deepest), aside, look)
        axes.set_title(words)
        _scale(axes, scale)
        axes.set_xticks(range(len(deepest)), [fit(s, 24) for s in deepest], rotation=90, fontsize=7)
        axes.set_xlim(-0.5, len(deepest) - 0.5)
        axes.grid(False, axis="x")
        if not axes.lines:
            axes.annotate("nothing to measure", (0.5, 0.5), xycoords="axes fraction", ha="center")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], **look) for look in looks]
    figure.legend(handles, names, loc="outside upper left", ncols=beside, handlelength=3)
    if note:
        figure.supxlabel(fit(note, size[0] * 10), fontsize=7, color=GREY)
    return figure


def _dashed(line: StageLine, lines: Sequence[StageLine]) -> dict[str, Any]:
    """Grey and dashed; a marker tells several of them apart."""
    number = [each.name for each in lines if each.dashed].index(line.name)
    look = {"color": GREY, "linestyle": (0, (4, 2)), "linewidth": 1.1, "markersize": 3.5}
    return {**look, "marker": "x+1234"[number % 6]}


def _line(
    axes: Axes, line: StageLine, name: str, deepest: int, aside: float, look: Mapping[str, Any]
) -> None:
    value, low, high = np.asarray(line.values[name], dtype=np.float64).reshape(-1, 3).T
    if not np.isfinite(value).any():
        return
    places = np.linspace(0, deepest - 1, len(value)) + aside
    axes.plot(places, value, **look)
    known = np.isfinite(low)
    axes.vlines(places[known], low[known], high[known], color=look["color"], linewidth=1)


def _scale(axes: Axes, scale: str) -> None:
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        powers = [2**k for k in range(13) if low <= 2**k <= high]
        axes.set_yticks(powers if len(powers) < 8 else powers[::2])
        return
    # An axis that doesn't begin at 0 makes much of little.
    below = any((np.asarray(line.get_ydata()) < 0).any() for line in axes.lines)
    low, high = axes.get_ylim()
    axes.set_ylim(low if below else 0, max(high, 0.02) if scale == "percent" else high)
    if scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if high > 0.05 else 1))


@styled
def similarity(
    matrix: Sequence[Sequence[float | None]],
    stages: Sequence[tuple[str, str]],
    title: str = "",
) -> Figure:
    """Linear CKA `[M, M]` between stages, given as (network, stage): 0 dark, 1 bright.

    White lines part the networks. None is grey. Up to 12 stages the numbers stand in the cells.
    """
    values: Floats = np.asarray(
        [[math.nan if v is None else v for v in row] for row in matrix], dtype=np.float64
    )
    count = len(stages)
    if values.shape != (count, count):
        raise UsageError(f"similarities of shape {values.shape} for {count} stages")
    side = max(3.0, min(9.0, 0.9 + 0.19 * count)) + 0.058 * max(len(s) for _, s in stages)
    figure = Figure(figsize=(side + 0.9, side + 0.3), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#BDBDBD")
    shown = np.ma.masked_invalid(values.clip(0, 1))
    image = axes.imshow(shown, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    names = [fit(stage, 24) for _, stage in stages]
    axes.set_xticks(range(count), names, rotation=90, fontsize=7)
    axes.set_yticks(range(count), names, fontsize=7)
    axes.tick_params(length=0)
    owners = [owner for owner, _ in stages]
    starts = [i for i in range(count) if i == 0 or owners[i] != owners[i - 1]]
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        if start:
            axes.axhline(start - 0.5, color="white", linewidth=2)
            axes.axvline(start - 0.5, color="white", linewidth=2)
        middle, room = (start + end - 1) / 2, (end - start) * 2.1
        words = fit(owners[start], max(room, 7))
        axes.annotate(words, (middle, -0.7), ha="center", va="bottom", annotation_clip=False,
                      fontsize=7)  # fmt: skip
        axes.annotate(words, (count - 0.3, middle), rotation=270, ha="left", va="center",
                      annotation_clip=False, fontsize=7)  # fmt: skip
    if count <= 12:
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                ink = "black" if value > 0.6 else "white"
                look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6}
                axes.text(column, row, f"{value:.2f}", color=ink, **look)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.06)
    bar.set_label("linear CKA")
    bar.outline.set_edgecolor(PALE)
    axes.set_title(fit(title, side * 7), pad=16)
    return figure
