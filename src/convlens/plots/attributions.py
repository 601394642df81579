"""Figures of attribution: maps laid over images, and the sanity checks of the methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from convlens.plots.charts import line_style
from convlens.plots.images import Images, image_tiles
from convlens.plots.style import DPI, GAP, GRAY, SMALL_POINTS, Page, fit_text, use_style

Floats = npt.NDArray[np.floating[Any]]
Interval = tuple[float, float] | None

# Both are even in lightness and safe for color blindness. Zero is dark in the one and white in the
# other, so that they cannot be confused.
UNSIGNED_COLORMAP, SIGNED_COLORMAP = "viridis", "PuOr_r"
HEATMAP_WEIGHT = 0.6  # of the colors; the rest is the image in gray
SCALE_PERCENTILE = 99.5  # of |value|: the full color; single pixels may exceed it
LABEL_POINTS, HEADER_POINTS = SMALL_POINTS, 8
LINE_SPACING = 1.35
# Widths in pixels.
MODEL_GAP = 2 * GAP
SCALE_WIDTH = 120
SCALE_LABELS_WIDTH = {False: 175, True: 260}  # of the words beside a scale, unsigned and signed


class AttributionColumn(NamedTuple):
    """The maps of one method.

    Attributes:
        title: the name of the method.
        below: a line below it, e.g. the layer.
        maps: `[N, h, w]`, as coarse as a layer or as fine as the images.
        signed: whether maps run from minus to plus a value, not from 0.
    """

    title: str
    below: str
    maps: Floats
    signed: bool


class AttributionPanel(NamedTuple):
    """The maps of one model.

    Attributes:
        title: the name of the model.
        images: its inputs, uint8 `[N, C, S, S]`.
        columns: its methods.
        rows: the explained class and its probability, for each image.
    """

    title: str
    images: Images
    columns: Sequence[AttributionColumn]
    rows: Sequence[tuple[str, float]]


@use_style
def attribution_grid(
    names: Sequence[tuple[str, str]], panels: Sequence[AttributionPanel]
) -> Figure:
    """A row for each image: the image, and its maps by each method of each model.

    Each map has a scale of its own, whose end is written above it. The scale starts at 0, or at
    minus that value for signed maps. Maps coarser than the image are interpolated.

    Args:
        names: the name of each image and its true class (empty where it is unknown).
    """
    return _AttributionGrid(names, panels).figure


class _AttributionGrid:
    """Lays the grid out on a page, from its upper left corner."""

    def __init__(
        self, names: Sequence[tuple[str, str]], panels: Sequence[AttributionPanel]
    ) -> None:
        tiles = image_tiles(panels[0].images)
        self.height, self.width = tiles.shape[1:3]
        self.line = round(LABEL_POINTS * DPI / 72 * LINE_SPACING)
        self.header_line = round(HEADER_POINTS * DPI / 72 * LINE_SPACING)
        self.page = Page()
        header = 3 * self.header_line + GAP
        row_height = 2 * self.line + self.height + GAP
        page_height = GAP + header + len(names) * row_height + 3 * GAP + self.line
        methods = sum(len(panel.columns) for panel in panels)
        page_width = GAP + (methods + 1) * (self.width + GAP) + len(panels) * MODEL_GAP
        scales = sorted({column.signed for panel in panels for column in panel.columns})
        scales_width = sum(SCALE_WIDTH + SCALE_LABELS_WIDTH[signed] for signed in scales)
        page_width = max(page_width, GAP + scales_width)

        tops = [GAP + header + row * row_height + 2 * self.line for row in range(len(names))]
        self._draw_images(names, tiles, tops)
        x = 2 * GAP + self.width + MODEL_GAP
        for panel in panels:
            x = self._draw_panel(panel, x, tops) + MODEL_GAP
        self._draw_scales(scales, page_height - GAP)
        self.figure = self.page.to_figure(page_width, page_height)

    def _draw_images(
        self, names: Sequence[tuple[str, str]], tiles: Images, tops: Sequence[int]
    ) -> None:
        for (name, target), tile, y in zip(names, tiles, tops, strict=True):
            self.page.put(GAP, y, tile)
            self._write(GAP, y - self.line, name)
            if target:
                self._write(GAP, y, target, before="is ")

    def _draw_panel(self, panel: AttributionPanel, x: int, tops: Sequence[int]) -> int:
        """Draw the columns of one model from `x` on, and return the x behind them."""
        grays = image_tiles(panel.images).mean(axis=3)
        header = GAP + 3 * self.header_line
        panel_width = len(panel.columns) * (self.width + GAP)
        title_y = header - 2 * self.header_line
        self.page.write(x, title_y - 5, panel.title, panel_width, HEADER_POINTS, weight="bold")
        for number, column in enumerate(panel.columns):
            first, _, second = column.title.partition(" ")
            if column.below or not second:
                first, second = column.title, ""
            self._write(x, header - self.header_line, first, HEADER_POINTS)
            self._write(x, header, second, HEADER_POINTS)
            self._write(x, header, column.below, color=GRAY)
            for row, y in enumerate(tops):
                full = map_scale(column.maps[row])
                self.page.put(x, y, self._blend(grays[row], column, row, full))
                if number == 0:
                    name, prob = panel.rows[row]
                    self._write(x, y - self.line, name, after=f" {prob:.0%}")
                prefix = "±" if column.signed else "to "
                scale = f"{prefix}{full:.2g}" if full else "0 everywhere"
                self.page.write(x, y - 5, scale, points=LABEL_POINTS, color=GRAY)
            x += self.width + GAP
        return x

    def _blend(self, gray: Floats, column: AttributionColumn, row: int, full: float) -> Images:
        """Return the colors of a map over the image in gray, as large as a tile."""
        values = upsample(column.maps[row].astype(np.float64), self.height, self.width)
        colors = _map_colors(values / full if full else np.zeros_like(values), column.signed)
        if gray.shape != (self.height, self.width):  # models may differ in the size of their input
            gray = upsample(gray, self.height, self.width)
        mixed = HEATMAP_WEIGHT * colors + (1 - HEATMAP_WEIGHT) * gray[..., None]
        pixels: Images = mixed.round().astype(np.uint8)
        return pixels

    def _draw_scales(self, scales: Sequence[bool], y: int) -> None:
        """Draw the meaning of the colors at the foot of the page."""
        x = GAP
        for signed in scales:
            ramp = np.linspace(-1 if signed else 0, 1, SCALE_WIDTH)[None]
            bar = _map_colors(ramp.repeat(self.line - 6, axis=0), signed).astype(np.uint8)
            low, high = (
                ("−v: against", "+v: for the class") if signed else ("0", "v, written above")
            )
            left = x + (95 if signed else 22)
            self.page.write(x, y - 5, low)
            self.page.put(left, y - self.line + 6, bar)
            self.page.write(left + SCALE_WIDTH + 8, y - 5, high)
            x += SCALE_WIDTH + SCALE_LABELS_WIDTH[signed]

    def _write(self, x: int, y: int, text: str, points: int = LABEL_POINTS, **style: Any) -> None:
        """Write a line just above `y`, cut to the width of a tile."""
        self.page.write(x, y - 5, text, self.width + GAP / 2, points, **style)


def map_scale(values: Floats) -> float:
    """Return the value of the full color: the 99.5th percentile of |value|, or the largest."""
    magnitudes = np.abs(values)
    return float(np.percentile(magnitudes, SCALE_PERCENTILE)) or float(magnitudes.max())


def upsample(values: Floats, height: int, width: int) -> Floats:
    """Resize a map `[h, w]` to `[height, width]`.

    A coarse map is interpolated linearly between the centers of its cells, as
    `torch.nn.functional.interpolate` does. A map finer than the target is averaged over blocks. A
    fine map whose sides divide the target's is repeated.
    """
    h, w = values.shape
    if h >= height and w >= width:
        block = min(h // height, w // width)
        cropped = values[: height * block, : width * block]
        averaged: Floats = cropped.reshape(height, block, width, block).mean(axis=(1, 3))
        return averaged
    if h > 16 and height % h == 0 and width % w == 0:  # as fine as the image, and drawn like it
        return values.repeat(height // h, axis=0).repeat(width // w, axis=1)

    def interpolate_rows(values: Floats, size: int) -> Floats:
        positions = (np.arange(size) + 0.5) * values.shape[0] / size - 0.5
        centers = np.arange(values.shape[0])
        return np.stack([np.interp(positions, centers, column) for column in values.T], axis=1)

    return interpolate_rows(interpolate_rows(values, height).T, width).T


def _map_colors(shares: Floats, signed: bool) -> Floats:
    """Return RGB from 0 to 255 `[h, w, 3]` for values from 0 (or -1, if signed) to 1."""
    if signed:
        rgba = matplotlib.colormaps[SIGNED_COLORMAP]((np.clip(shares, -1, 1) + 1) / 2)
    else:
        rgba = matplotlib.colormaps[UNSIGNED_COLORMAP](np.clip(shares, 0, 1))
    rgb: Floats = np.asarray(rgba)[..., :3] * 255
    return rgb


@use_style
def attribution_sanity(
    stages: Sequence[str],
    left: Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]],
    curves: Mapping[str, Mapping[str, Floats]],
    title: str = "",
) -> Figure:
    """Similarity of maps as weights are randomized, and deletion and insertion curves.

    Args:
        stages: randomized one after another, from the head down.
        left: under `spearman` and `ssim`, by method: the mean similarity to the original map and
            its 95% interval after each stage.
        curves: under `deletion` and `insertion`, by method (the last one is a baseline, e.g.
            `random order`): the mean probability, from no cell to all cells.
    """
    figure = Figure(figsize=(8, 6.2), layout="constrained")
    figure.suptitle(fit_text(title, 90), x=0.01, ha="left", fontsize=9)
    panels = figure.subplots(2, 2)
    names = list(curves["deletion"])
    styles = {name: line_style(number) for number, name in enumerate(names[:-1])}
    styles[names[-1]] = {"color": GRAY, "linestyle": ":", "linewidth": 2}
    measures = (("spearman", "rank correlation of |maps|"), ("ssim", "SSIM of |maps|"))
    for axes, (key, label) in zip(panels[0], measures, strict=True):
        _draw_similarities(axes, stages, left[key], styles)
        axes.set_ylabel(label)
    for axes, key in zip(panels[1], ("deletion", "insertion"), strict=True):
        for name, probs in curves[key].items():
            step = max(1, len(probs) // 8)
            axes.plot(np.linspace(0, 1, len(probs)), probs, markevery=step, **styles[name])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel(f"cells {'deleted' if key == 'deletion' else 'inserted'}, largest first")
        axes.set_ylabel("probability of the class")
        axes.set_title(f"{key}: {'low' if key == 'deletion' else 'high'} is good")
        axes.set_ylim(0, None)
    handles = [axes.plot([], [], label=name, **styles[name])[0] for name in names]
    labels = [fit_text(name, 40) for name in names]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), handlelength=3)
    return figure


def _draw_similarities(
    axes: Axes,
    stages: Sequence[str],
    left: Mapping[str, Sequence[tuple[float, Interval]]],
    styles: Mapping[str, Mapping[str, Any]],
) -> None:
    """Draw means with their intervals, shifted a little so that no method hides another."""
    positions = np.arange(len(stages) + 1)
    for number, (name, means) in enumerate(left.items()):
        values = np.array([1.0, *(mean for mean, _ in means)])
        ends = [(1.0, 1.0), *(interval or (mean, mean) for mean, interval in means)]
        errors = np.abs(np.array(ends).T - values)
        x = positions + (number - (len(left) - 1) / 2) * 0.08
        axes.errorbar(x, values, errors, capsize=2, elinewidth=0.8, **styles[name])
    axes.axhline(0, color=GRAY, linewidth=0.8)
    axes.set_xticks(positions, ["trained", *(fit_text(stage, 14) for stage in stages)])
    if len(stages) > 4:
        axes.tick_params("x", rotation=40)
    axes.set_xlabel("weights randomized down to")
    axes.set_title("randomized weights: low is good")
    axes.set_ylim(None, 1.05)
