"""Figures of attribution: maps laid over pictures, and the checks whether to believe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from convlens.plots.charts import COLORS, DASHES, MARKERS
from convlens.plots.images import SHEET_GAP, Images, tiles_of
from convlens.plots.style import DPI, GREY, fit_text, use_style

Floats = npt.NDArray[np.floating[Any]]
Interval = tuple[float, float] | None

# Both are even in lightness and told apart by the colour-blind; zero is dark in the one, and
# white in the other, so that they can't be taken for each other.
ONE_SIDED, TWO_SIDED = "viridis", "PuOr_r"
HEAT = 0.6  # share of the colours; the rest is the picture in grey
FULL = 99.5  # the percentile of |value| that has the full colour: single pixels may stick out
POINTS, HEAD_POINTS = 7, 8
APART = 2 * SHEET_GAP  # between models
BAR = 120  # width of a colour scale
ROOM = {False: 175, True: 260}  # for the words beside it


class AttributionColumn(NamedTuple):
    """One method's maps `[N, h, w]`, from as coarse as a layer to as fine as the pictures."""

    title: str
    below: str
    maps: Floats
    signed: bool


class AttributionPanel(NamedTuple):
    """One model: its pictures uint8 `[N, C, S, S]`, methods, and each row's class and chance."""

    title: str
    pictures: Images
    columns: Sequence[AttributionColumn]
    rows: Sequence[tuple[str, float]]


@use_style
def attribution_grid(
    names: Sequence[tuple[str, str]], panels: Sequence[AttributionPanel]
) -> Figure:
    """A row for each picture: itself, and its maps by each method of each model.

    Each map has a scale of its own, whose end is written above it: from 0, or from minus to plus
    that value. Maps coarser than the picture are interpolated.

    Args:
        names: of each picture, and its true class (empty where it isn't known).
    """
    return _Grid(names, panels).figure


class _Grid:
    """The figure in pixels, from its upper left corner."""

    def __init__(
        self, names: Sequence[tuple[str, str]], panels: Sequence[AttributionPanel]
    ) -> None:
        plain = tiles_of(panels[0].pictures)
        self.high, self.wide = plain.shape[1:3]
        self.line = round(POINTS * DPI / 72 * 1.35)
        self.up = round(HEAD_POINTS * DPI / 72 * 1.35)
        heads = 3 * self.up + SHEET_GAP
        step = 2 * self.line + self.high + SHEET_GAP
        size_y = SHEET_GAP + heads + len(names) * step + 3 * SHEET_GAP + self.line
        count = sum(len(panel.columns) for panel in panels)
        size_x = SHEET_GAP + (count + 1) * (self.wide + SHEET_GAP) + len(panels) * APART
        self.kinds = sorted({column.signed for panel in panels for column in panel.columns})
        size_x = max(size_x, SHEET_GAP + sum(BAR + ROOM[signed] for signed in self.kinds))
        self.canvas = np.full((size_y, size_x, 3), 255, dtype=np.uint8)
        # matplotlib cuts the size in pixels to whole ones: 1023.9999 must not become 1023.
        self.figure = Figure(figsize=((size_x + 1e-4) / DPI, (size_y + 1e-4) / DPI), dpi=DPI)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        tops = [SHEET_GAP + heads + row * step + 2 * self.line for row in range(len(names))]
        self._first(names, plain, tops)
        x = 2 * SHEET_GAP + self.wide + APART
        for panel in panels:
            x = self._panel(panel, x, tops) + APART
        self._scales()
        extent = (0, size_x, size_y, 0)
        self.axes.imshow(self.canvas, interpolation="nearest", extent=extent, aspect="auto")

    def _first(self, names: Sequence[tuple[str, str]], plain: Images, tops: list[int]) -> None:
        for (name, truth), tile, y in zip(names, plain, tops, strict=True):
            self._put(tile, SHEET_GAP, y)
            self._say(SHEET_GAP, y - self.line, self._cut(name))
            if truth:
                self._say(SHEET_GAP, y, self._cut(truth, "is "))

    def _panel(self, panel: AttributionPanel, x: int, tops: list[int]) -> int:
        """Draws one model's columns from `x` on; returns where the next may begin."""
        up, head = self.up, SHEET_GAP + 3 * self.up
        greys = tiles_of(panel.pictures).mean(axis=3)
        room = len(panel.columns) * (self.wide + SHEET_GAP) * 72 / DPI / HEAD_POINTS
        self._say(x, head - 2 * up, fit_text(panel.title, room), HEAD_POINTS, weight="bold")
        for number, column in enumerate(panel.columns):
            first, _, rest = column.title.partition(" ")
            if column.below or not rest:
                first, rest = column.title, ""
            self._say(x, head - up, self._cut(first, points=HEAD_POINTS), HEAD_POINTS)
            self._say(x, head, self._cut(rest, points=HEAD_POINTS), HEAD_POINTS)
            self._say(x, head, self._cut(column.below), color=GREY)
            for row, y in enumerate(tops):
                full = map_scale(column.maps[row])
                self._put(self._over(greys[row], column, row, full), x, y)
                if number == 0:
                    name, chance = panel.rows[row]
                    self._say(x, y - self.line, self._cut(name, after=f" {chance:.0%}"))
                sign = "±" if column.signed else "to "
                self._say(x, y, f"{sign}{full:.2g}" if full else "0 everywhere", color=GREY)
            x += self.wide + SHEET_GAP
        return x

    def _over(self, grey: Floats, column: AttributionColumn, row: int, full: float) -> Images:
        """The picture in grey below the map's colours, as large as a tile."""
        fine = upsample(column.maps[row].astype(np.float64), self.high, self.wide)
        share = fine / full if full else np.zeros_like(fine)
        colors = _colours(share, column.signed)
        if grey.shape != (self.high, self.wide):  # another model's pictures have another size
            grey = upsample(grey, self.high, self.wide)
        mixed = HEAT * colors + (1 - HEAT) * grey[..., None]
        result: Images = mixed.round().astype(np.uint8)
        return result

    def _scales(self) -> None:
        """What the colours mean, at the foot of the figure."""
        x, y = SHEET_GAP, self.canvas.shape[0] - SHEET_GAP
        for signed in self.kinds:
            ramp = np.linspace(-1 if signed else 0, 1, BAR)[None].repeat(self.line - 6, axis=0)
            low, high = (
                ("−v: against", "+v: for the class") if signed else ("0", "v, written above")
            )
            self._say(x, y, low)
            inside = x + (95 if signed else 22)
            self._put(_colours(ramp, signed).astype(np.uint8), inside, y - self.line + 6)
            self._say(inside + BAR + 8, y, high)
            x += BAR + ROOM[signed]

    def _put(self, tile: Images, x: int, y: int) -> None:
        high, wide = tile.shape[:2]
        self.canvas[y : y + high, x : x + wide] = tile

    def _say(self, x: int, y: int, words: str, points: int = POINTS, **look: Any) -> None:
        self.axes.text(x, y - 5, words, fontsize=points, va="baseline", **look)

    def _cut(self, name: str, before: str = "", after: str = "", points: int = POINTS) -> str:
        room = (self.wide + SHEET_GAP / 2) * 72 / DPI / points
        return fit_text(name, room, before=before, after=after)


def map_scale(values: Floats) -> float:
    """What the full colour stands for: the 99.5th percentile of |value|, or the largest."""
    size = np.abs(values)
    return float(np.percentile(size, FULL)) or float(size.max())


def upsample(values: Floats, high: int, wide: int) -> Floats:
    """A map `[h, w]` as `[high, wide]`, interpolated between the centres of its places.

    A map with more places than that is averaged, one that divides it is repeated.
    """
    h, w = values.shape
    if h >= high and w >= wide:
        block = min(h // high, w // wide)
        part = values[: high * block, : wide * block]
        result: Floats = part.reshape(high, block, wide, block).mean(axis=(1, 3))
        return result
    if h > 16 and high % h == 0 and wide % w == 0:  # as fine as the picture, and drawn like it
        return values.repeat(high // h, axis=0).repeat(wide // w, axis=1)

    def along(values: Floats, size: int) -> Floats:
        places = (np.arange(size) + 0.5) * values.shape[0] / size - 0.5
        known = np.arange(values.shape[0])
        return np.stack([np.interp(places, known, column) for column in values.T], axis=1)

    return along(along(values, high).T, wide).T


def _colours(share: Floats, signed: bool) -> Floats:
    """RGB from 0 to 255, `[h, w, 3]`, of values from 0 (or -1) to 1."""
    if signed:
        rgba = matplotlib.colormaps[TWO_SIDED]((np.clip(share, -1, 1) + 1) / 2)
    else:
        rgba = matplotlib.colormaps[ONE_SIDED](np.clip(share, 0, 1))
    result: Floats = np.asarray(rgba)[..., :3] * 255
    return result


@use_style
def attribution_sanity(
    stages: Sequence[str],
    left: Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]],
    curves: Mapping[str, Mapping[str, Floats]],
    title: str = "",
) -> Figure:
    """What is left of maps while weights are forgotten, and probabilities while cells go and come.

    Args:
        stages: forgotten one after another, from the head down.
        left: under `spearman` and `ssim`, by method: mean and 95% interval after each stage.
        curves: under `deletion` and `insertion`, by method (and `random order`): mean
            probability, from no cell to all.
    """
    figure = Figure(figsize=(8, 6.2), layout="constrained")
    figure.suptitle(fit_text(title, 90), x=0.01, ha="left", fontsize=9)
    panels = figure.subplots(2, 2)
    names = list(curves["deletion"])
    looks = {name: _look(number) for number, name in enumerate(names[:-1])}
    looks[names[-1]] = {"color": GREY, "linestyle": ":", "linewidth": 2}
    measures = (("spearman", "rank correlation of |maps|"), ("ssim", "SSIM of |maps|"))
    for axes, (key, words) in zip(panels[0], measures, strict=True):
        _forgetting(axes, stages, left[key], looks)
        axes.set_ylabel(words)
    for axes, key in zip(panels[1], ("deletion", "insertion"), strict=True):
        for name, values in curves[key].items():
            every = max(1, len(values) // 8)
            axes.plot(np.linspace(0, 1, len(values)), values, markevery=every, **looks[name])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel(f"cells {'deleted' if key == 'deletion' else 'inserted'}, largest first")
        good = "low" if key == "deletion" else "high"
        axes.set_ylabel("probability of the class")
        axes.set_title(f"{key}: {good} is good")
        axes.set_ylim(0, None)
    handles = [axes.plot([], [], label=name, **looks[name])[0] for name in names]
    words_ = [fit_text(name, 40) for name in names]
    figure.legend(handles, words_, loc="outside lower center", ncols=len(names), handlelength=3)
    return figure


def _look(number: int) -> dict[str, Any]:
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _forgetting(
    axes: Axes,
    stages: Sequence[str],
    left: Mapping[str, Sequence[tuple[float, Interval]]],
    looks: Mapping[str, Mapping[str, Any]],
) -> None:
    """Means with their intervals, the methods' a little apart so that none hides another."""
    places = np.arange(len(stages) + 1)
    for number, (name, means) in enumerate(left.items()):
        values = np.array([1.0, *(mean for mean, _ in means)])
        ends = [(1.0, 1.0), *((m, m) if each is None else each for m, each in means)]
        errors = np.abs(np.array(ends).T - values)
        apart = (number - (len(left) - 1) / 2) * 0.08
        axes.errorbar(places + apart, values, errors, capsize=2, elinewidth=0.8, **looks[name])
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(places, ["trained", *(fit_text(stage, 14) for stage in stages)])
    if len(stages) > 4:
        axes.tick_params("x", rotation=40)
    axes.set_xlabel("weights drawn at random down to")
    axes.set_title("randomised weights: low is good")
    axes.set_ylim(None, 1.05)
