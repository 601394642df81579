"""Figures made of numbers: training curves, confusion, calibration, accuracies, embeddings.

Accuracies and other shares are numbers from 0 to 1, shown as percentages. Curves exist for one run,
for the seeds, splits or folds of one recipe, and for variants of a recipe side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    ScalarFormatter,
    StrMethodFormatter,
)

from convlens.errors import UsageError
from convlens.metrics import wilson_interval
from convlens.plots.style import BLUE, GRAY, PALE, VERMILION, fit_text, text_width, use_style

History = Mapping[str, Sequence[float]]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Ends = tuple[float, float, float]  # value, low and high end of its interval; NaN where unknown

METRICS = ("loss", "accuracy")
# Split, label and line style: color, dashes and marker all differ.
SPLITS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("train", "train", {"color": BLUE, "linestyle": "-", "marker": "o"}),
    ("val", "validation", {"color": VERMILION, "linestyle": "--", "marker": "s"}),
)
# Okabe and Ito's colors without yellow, which is too faint for a line on white.
COLORS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "osD^vPX*"
BASELINE_MARKERS = "x+1234"
THIN_LINE: dict[str, Any] = {"linewidth": 1.3, "markersize": 3.5}
LIGHT_GRAY = "#BDBDBD"

MAX_CONFUSION_CELLS = 20  # classes: with more, the matrix has no counts in its cells
MAX_SIMILARITY_CELLS = 12  # stages: likewise
MAX_BAR_ROWS = 30  # accuracies: with more, rows are lower
MAX_STAGE_COLUMNS = 3  # panels beside each other
# With three of Tol's muted colors, so that ten classes are distinguishable by color alone.
CLASS_COLORS = (*COLORS, "#999933", "#882255", "#44AA99")
CLASS_MARKERS = "os^D"
MAX_COLORED_CLASSES = 20  # with more, colors and shapes are no longer distinguishable
MAX_NAMED_CLASSES = 40


class StageLine(NamedTuple):
    """A network in `stage_measures`.

    Attributes:
        stages: in order.
        values: by measure, for each stage the value and its interval.
        dashed: drawn as a baseline, gray and dashed.
    """

    name: str
    stages: Sequence[str]
    values: Mapping[str, Sequence[Ends]]
    dashed: bool = False


@use_style
def curves(history: History, chosen_epoch: int | None = None, title: str = "") -> Figure:
    """Training and validation loss and accuracy over epochs.

    Args:
        history: one value per epoch under `epoch`, `train_loss`, `val_loss`, `train_accuracy` and
            `val_accuracy`. NaN leaves a gap; a series that is missing or all NaN is left out.
        chosen_epoch: the epoch to mark, usually the one whose weights were kept.
    """
    figure, panels = _two_panels(title)
    epochs = np.asarray(history["epoch"], dtype=np.float64)
    for axes, metric in zip(panels, METRICS, strict=True):
        for split, label, style in SPLITS:
            values = _series(history, f"{split}_{metric}")
            if np.isfinite(values).any():
                axes.plot(epochs, values, label=label, markevery=_mark_every(len(epochs)), **style)
        if chosen_epoch is not None and len(epochs):
            _mark_epoch(axes, epochs, _series(history, f"val_{metric}"), chosen_epoch, metric)
        _format_epochs(axes, epochs)
    _draw_legend(panels)
    return figure


@use_style
def learning_rate(
    positions: Sequence[float], rates: Sequence[float], title: str = "", unit: str = "epoch"
) -> Figure:
    """The learning rate over epochs or steps (`unit`)."""
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    marker: dict[str, Any] = {"marker": "o"} if len(positions) <= 30 else {}
    axes.plot(positions, rates, color=BLUE, **marker)
    axes.set(xlabel=unit, ylabel="learning rate", title=fit_text(title, 45))
    axes.ticklabel_format(axis="y", scilimits=(-4, 4))
    axes.set_ylim(bottom=0)
    _format_epochs(axes, np.asarray(positions, dtype=np.float64), unit)
    return figure


@use_style
def confusion(matrix: npt.ArrayLike, classes: Sequence[str], title: str = "") -> Figure:
    """A confusion matrix [K, K] (rows are true classes), colored by the share of each row.

    Up to 20 classes, the counts stand in the cells. With more, some class names stand at the axes
    and the most frequent confusions beside the matrix. A row without images is gray.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    k = len(classes)
    if counts.shape != (k, k):
        raise UsageError(f"a confusion matrix of shape {counts.shape} for {k} classes")
    support = counts.sum(axis=1, keepdims=True)
    shares = np.ma.masked_invalid(counts / np.where(support > 0, support, np.nan))
    small = k <= MAX_CONFUSION_CELLS
    side = 1.6 + 0.42 * max(k, 3)
    figure = Figure(figsize=(side + 0.9, side) if small else (10, 6), layout="constrained")
    grid = figure.add_gridspec(1, 1 if small else 2, width_ratios=None if small else (1.9, 1))
    axes = figure.add_subplot(grid[0])
    colors = matplotlib.colormaps["Blues"].with_extremes(bad=LIGHT_GRAY)
    # With many classes a single confusion is a faint dot, so low shares get more of the colors.
    norm = PowerNorm(1 if small else 0.5, vmin=0, vmax=1)
    image = axes.imshow(shares, cmap=colors, norm=norm, interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    _set_class_ticks(axes, classes, small)
    axes.set(xlabel="predicted class", ylabel="true class", title=fit_text(title, side * 7))
    ticks = [0, 0.25, 0.5, 0.75, 1] if small else [0, 0.05, 0.25, 0.5, 1]
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, ticks=ticks)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    bar.set_label("share of the true class")
    if small:
        _write_counts(axes, counts, shares.filled(0))
    else:
        _list_confused_pairs(figure.add_subplot(grid[1]), counts, classes)
    return figure


def _set_class_ticks(axes: Axes, classes: Sequence[str], small: bool) -> None:
    step = 1 if small else math.ceil(len(classes) / 40)
    names = [fit_text(name, 12) for name in classes[::step]]
    positions, points = range(0, len(classes), step), 8 if small else 6
    axes.set_yticks(positions, names, fontsize=points)
    rotation: dict[str, Any] = {"rotation": 90}
    if small:
        rotation = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        if max(map(text_width, names), default=0) < 3.5:
            rotation = {}
    axes.set_xticks(positions, names, fontsize=points, **rotation)
    axes.tick_params(length=0 if small else 2)


def _write_counts(axes: Axes, counts: Ints, shares: Floats) -> None:
    digits = len(f"{counts.max(initial=0)}")
    points = 8 if digits < 5 else 6.5 if digits < 6 else 5.5
    for (row, column), n in np.ndenumerate(counts):
        text = f"{n}" if n < 1_000_000 else f"{n / 1_000_000:.1f}M"
        color = "#A0A0A0" if n == 0 else "white" if shares[row, column] > 0.55 else "black"
        axes.text(column, row, text, color=color, ha="center", va="center", fontsize=points)


def _list_confused_pairs(axes: Axes, counts: Ints, classes: Sequence[str]) -> None:
    """List the most frequent confusions with their count, true class and predicted class."""
    axes.set_axis_off()
    wrong = counts - np.diag(counts.diagonal())
    support = counts.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:20]
    pairs = [divmod(int(cell), len(classes)) for cell in order if wrong.flat[cell]]
    axes.set_title("confused most often" if pairs else "nothing was confused")
    style: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 7, "va": "top"}
    for line, (target, pred) in enumerate(pairs):
        y = 0.985 - line * 0.049
        names = f"{fit_text(classes[target], 11)} → {fit_text(classes[pred], 11)}"
        axes.text(0.13, y, f"{wrong[target, pred]} of {support[target]}", ha="right", **style)
        axes.text(0.17, y, names, **style)


@use_style
def reliability(
    confidence: npt.ArrayLike, accuracy: npt.ArrayLike, count: npt.ArrayLike, ece: float
) -> Figure:
    """A reliability diagram: accuracy over confidence with 95% intervals, and a histogram below.

    Args:
        confidence, accuracy, count: of each bin, as `metrics.reliability_bins` returns them: bins
            of equal width, NaN where they are empty.
        ece: expected calibration error.
    """
    means, shares = np.asarray(confidence, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    counts = np.asarray(count, dtype=np.int64)
    filled = counts > 0
    figure = Figure(figsize=(4.2, 4.8), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color=GRAY, linestyle=":", label="perfect calibration")
    bins = zip(shares[filled].tolist(), counts[filled].tolist(), strict=True)
    intervals = [wilson_interval(round(share * n), n) for share, n in bins]
    style: dict[str, Any] = {"color": BLUE, "marker": "o", "elinewidth": 1, "capsize": 2}
    errors = _error_lengths(shares[filled], intervals)
    top.errorbar(means[filled], shares[filled], errors, label="model, 95% interval", **style)
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    top.set_title(f"expected calibration error {ece:.2%}, {counts.sum():,} images")
    figure.legend(loc="outside lower center", ncols=2)
    width = 1 / len(counts)
    left = np.arange(len(counts)) * width
    bottom.bar(left, counts, width=width, align="edge", color=BLUE, edgecolor="white")
    bottom.set(xlabel="confidence (highest probability)", ylabel="images")
    if filled.any() and counts.max() > 20 * counts[filled].min():
        bottom.set_yscale("log")
        bottom.set_ylim(bottom=0.7)
        bottom.set_ylabel("images (log)")
        bottom.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axis in (top.xaxis, top.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return figure


@use_style
def risk_coverage(coverage: npt.ArrayLike, risk: npt.ArrayLike, title: str = "") -> Figure:
    """The error rate among the most confident images, over the share of images that they are.

    Args:
        coverage, risk: as `uncertainty.selective.risk_coverage_curve` returns them.
    """
    shares, risks = np.asarray(coverage, dtype=np.float64), np.asarray(risk, dtype=np.float64)
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(shares, risks, color=BLUE, linewidth=1.5)
    if len(risks):
        axes.axhline(risks[-1], color=GRAY, linestyle=":", linewidth=1)
    axes.set(xlim=(0, 1), xlabel="coverage (most confident images first)", ylabel="error rate")
    axes.set_ylim(bottom=0, top=max(0.01, 1.1 * float(risks.max(initial=0))))
    axes.set_title(title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return figure


@use_style
def accuracy_bars(
    names: Sequence[str],
    accuracies: Sequence[float | None],
    intervals: Sequence[tuple[float, float]],
    title: str = "",
) -> Figure:
    """Accuracies with their 95% intervals, one row each, the first on top.

    Points are drawn rather than bars: a bar has to start at 0 and hides small differences.

    Args:
        accuracies: an accuracy of None is unknown, and its row stays empty.
        intervals: (low, high) of each.
    """
    tall_rows = len(names) <= MAX_BAR_ROWS
    rows, values = np.arange(len(names)), np.asarray(list(accuracies), dtype=np.float64)
    size = (6, 0.9 + len(names) * (0.28 if tall_rows else 0.15))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    style: dict[str, Any] = {"fmt": "o", "color": BLUE, "elinewidth": 1.2, "capsize": 2.5}
    axes.errorbar(values, rows, xerr=_error_lengths(values, intervals), **style)
    points = 8 if tall_rows else 6
    axes.set_yticks(rows, [fit_text(name, 22) for name in names], fontsize=points)
    for row, value in enumerate(values.tolist()):
        text = "–" if math.isnan(value) else f"{value:.2%}"
        _write_beside(axes, row, text, points, 5 * points)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set(xlabel="accuracy, 95% interval", title=fit_text(title, 45))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(False, axis="y")
    return figure


def _error_lengths(values: Floats, intervals: Sequence[tuple[float, float]]) -> Floats:
    """Return the lengths [2, N] of error bars; rounding may put a value outside its interval."""
    low, high = np.asarray(intervals, dtype=np.float64).reshape(-1, 2).T
    return np.stack([values - low, high - values]).clip(min=0)


def _write_beside(axes: Axes, row: int, text: str, points: float, offset: float) -> None:
    """Write a number beside a row, its right end `offset` points to the right of the axes."""
    axes.annotate(
        text,
        (1, row),
        ha="right",
        va="center",
        xycoords=axes.get_yaxis_transform(),
        fontsize=points,
        textcoords="offset points",
        xytext=(offset, 0),
    )


def _two_panels(title: str, after: str = "") -> tuple[Figure, tuple[Axes, Axes]]:
    """Return a figure with a panel for the loss and one for the accuracy."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.set(ylabel="loss (nats)", title=fit_text(title, 35, after=after))
    accuracy.set(ylabel="accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    return figure, (loss, accuracy)


def _series(history: History, key: str) -> Floats:
    missing = [math.nan] * len(history["epoch"])
    return np.asarray(history.get(key, missing), dtype=np.float64)


def _mark_every(count: int) -> int:
    """Return the distance between markers; long lines get about a dozen of them."""
    return 1 if count <= 30 else math.ceil(count / 12)


def _format_epochs(axes: Axes, epochs: Floats, unit: str = "epoch") -> None:
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)


def _mark_epoch(axes: Axes, epochs: Floats, values: Floats, chosen: int, metric: str) -> None:
    """Draw a line at the chosen epoch and write its value on the side with more space.

    Losses fall and accuracies rise, so the text stands at the top for the one and at the bottom for
    the other.
    """
    axes.axvline(chosen, color=GRAY, linestyle=":", linewidth=1.2)
    value = values[epochs == chosen]
    text = f"epoch {chosen}"
    if value.size and np.isfinite(value[0]):
        text += f": {value[0]:.2%}" if metric == "accuracy" else f": {value[0]:.4g}"
    late = chosen > (epochs[0] + epochs[-1]) / 2
    axes.annotate(
        text,
        (chosen, 0.98 if metric == "loss" else 0.03),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-4 if late else 4, 0),
        textcoords="offset points",
        ha="right" if late else "left",
        va="top" if metric == "loss" else "bottom",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def _draw_legend(panels: Sequence[Axes]) -> None:
    """Draw one legend above the right panel, where no curve can run through it."""
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            panels[-1].legend(
                handles,
                labels,
                ncols=2,
                columnspacing=1.2,
                loc="lower right",
                bbox_to_anchor=(1, 1),
            )
            return


@use_style
def seed_curves(histories: Sequence[History], title: str = "", averaged_over: str = "") -> Figure:
    """Loss and accuracy of several seeds: a thin line for each, and mean ± 1 sd as a band.

    The band (sample standard deviation) covers the epochs that every seed reached. A mean over the
    seeds that happened to train longer would describe another experiment.

    Args:
        averaged_over: the runs that are averaged, e.g. `5 folds`; by default `N seeds`.
    """
    if not histories:
        raise UsageError("no histories to draw")
    averaged_over = averaged_over or f"{len(histories)} seeds"
    figure, panels = _two_panels(
        title, f": mean ± sd of {averaged_over}" if len(histories) > 1 else ""
    )
    epochs = _longest_epochs(histories)
    for axes, metric in zip(panels, METRICS, strict=True):
        for split, label, style in SPLITS:
            runs = [_series(history, f"{split}_{metric}") for history in histories]
            if any(np.isfinite(run).any() for run in runs):
                for run in runs:
                    axes.plot(epochs[: len(run)], run, color=style["color"], lw=0.6, alpha=0.5)
                _draw_mean_and_band(axes, epochs, runs, {"label": label, **style})
        _format_epochs(axes, epochs)
    _draw_legend(panels)
    return figure


@use_style
def variant_curves(
    groups: Mapping[str, Sequence[History]], title: str = "", averaged_over: str = ""
) -> Figure:
    """Validation loss and accuracy of several variants, each with its own line style.

    Several runs of a variant are drawn as their mean, with ± 1 sample standard deviation as a band,
    over the epochs that all of them reached. Without validation the training metrics are shown.

    Args:
        groups: one history for each run, by the name of the variant.
        averaged_over: the runs that are averaged, e.g. `3 seeds`; part of the title.
    """
    if not groups or not all(groups.values()):
        raise UsageError("no histories to draw")
    averaged = any(len(histories) > 1 for histories in groups.values())
    after = f": mean ± sd of {averaged_over}" if averaged and averaged_over else ""
    columns = _legend_columns(list(groups))
    figure, panels = _two_panels(title, after)
    rows = -(-len(groups) // columns)
    figure.set_size_inches(8, 3.2 + 0.19 * rows)
    split = "val" if any(_has_validation(histories) for histories in groups.values()) else "train"
    longest = _longest_epochs([h for histories in groups.values() for h in histories])
    for axes, metric in zip(panels, METRICS, strict=True):
        for number, (name, histories) in enumerate(groups.items()):
            runs = [_series(history, f"{split}_{metric}") for history in histories]
            style = {"label": fit_text(name, 30), **line_style(number), **THIN_LINE}
            _draw_mean_and_band(axes, _longest_epochs(histories), runs, style)
        _format_epochs(axes, longest)
        prefix = "validation" if split == "val" else "training"
        axes.set_ylabel(f"{prefix} {axes.get_ylabel()}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)
    return figure


def line_style(number: int) -> dict[str, Any]:
    """Return color, dashes and marker of the n-th line; 28 combinations of color and dashes."""
    repeat, color = divmod(number, len(COLORS))
    return {
        "color": COLORS[color],
        "linestyle": DASHES[(color + repeat) % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _legend_columns(names: Sequence[str]) -> int:
    """Return how many names fit beside each other below the panels."""
    width = max(text_width(fit_text(name, 30)) for name in names) + 6
    return max(1, min(len(names), int(64 // width)))  # 8 inches are 64 font sizes of 9 points


def _longest_epochs(histories: Sequence[History]) -> Floats:
    return max((np.asarray(h["epoch"], dtype=np.float64) for h in histories), key=len)


def _has_validation(histories: Sequence[History]) -> bool:
    return any(np.isfinite(_series(history, "val_loss")).any() for history in histories)


def _draw_mean_and_band(
    axes: Axes, epochs: Floats, runs: Sequence[Floats], style: Mapping[str, Any]
) -> None:
    common = min(map(len, runs))
    values = np.stack([run[:common] for run in runs])
    mean = values.mean(axis=0)
    axes.plot(epochs[:common], mean, markevery=_mark_every(common), **style)
    if len(runs) > 1:
        sd = values.std(axis=0, ddof=1)
        axes.fill_between(
            epochs[:common], mean - sd, mean + sd, color=style["color"], alpha=0.2, linewidth=0
        )


@use_style
def differences(
    gains: Mapping[str, tuple[float, tuple[float, float] | None, bool]], reference: str
) -> Figure:
    """Differences of accuracy from a reference with their 95% intervals, one row each.

    Args:
        gains: by name, the difference as a share, its interval if it is known, and whether the
            difference is significant. Significant points are filled, the others hollow.
    """
    if not gains:
        raise UsageError("no differences to draw")
    figure = Figure(figsize=(6, 1.3 + 0.3 * len(gains)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color=GRAY, linewidth=1)
    for row, (gain, interval, significant) in enumerate(gains.values()):
        style: dict[str, Any] = {"color": BLUE, "markerfacecolor": BLUE if significant else "white"}
        if interval:
            low, high = interval
            errors = [[100 * max(gain - low, 0)], [100 * max(high - gain, 0)]]
            style |= {"xerr": errors, "elinewidth": 1.2, "capsize": 2.5}
        axes.errorbar([100 * gain], [row], fmt="o", **style)
        text = f"{100 * gain:+.2f}".replace("-", "\N{MINUS SIGN}")
        _write_beside(axes, row, text, 8, 36)
    axes.set_yticks(range(len(gains)), [fit_text(name, 26) for name in gains], fontsize=8)
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.set_title(fit_text(reference, 30, before="accuracy over that of "))
    axes.set_xlabel("points, 95% interval (filled: distinguishable)")
    axes.grid(False, axis="y")
    return figure


@use_style
def stage_measures(
    lines: Sequence[StageLine],
    panels: Mapping[str, tuple[str, str]],
    note: str = "",
) -> Figure:
    """A panel for each measure, with a line over the stages for each network.

    Networks of other depths are spread over the axis of the deepest, whose stages name the ticks.

    Args:
        panels: title and scale (`percent`, `number`, `log`) of each measure.
        note: the data that was measured on, written small below the panels.
    """
    if not lines or not panels:
        raise UsageError("no measurements to draw")
    columns = 2 if len(panels) == 4 else min(MAX_STAGE_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    deepest = max((line.stages for line in lines), key=len)
    tick_height = 0.058 * max(map(len, deepest)) if len(deepest) > 1 else 0.2
    names = [fit_text(line.name, 40) for line in lines]
    width = 2.7 * columns + 0.3
    legend_columns = int(width * 8 // (max(map(text_width, names)) + 7))
    legend_columns = max(1, min(len(names), legend_columns))
    height = (1.85 + tick_height) * rows + 0.3 + 0.2 * math.ceil(len(names) / legend_columns)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    styles = _stage_line_styles(lines)
    for axes, (name, (title, scale)) in zip(grid.flat, panels.items(), strict=False):
        for number, (line, style) in enumerate(zip(lines, styles, strict=True)):
            shift = 0.09 * (number - (len(lines) - 1) / 2)
            _draw_stage_line(axes, line.values[name], len(deepest), shift, style)
        axes.set_title(title)
        _set_scale(axes, scale)
        ticks = [fit_text(stage, 24) for stage in deepest]
        axes.set_xticks(range(len(deepest)), ticks, rotation=90, fontsize=7)
        axes.set_xlim(-0.5, len(deepest) - 0.5)
        axes.grid(False, axis="x")
        if not axes.lines:
            axes.annotate("nothing to measure", (0.5, 0.5), xycoords="axes fraction", ha="center")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], **style) for style in styles]
    figure.legend(handles, names, loc="outside upper left", ncols=legend_columns, handlelength=3)
    if note:
        figure.supxlabel(fit_text(note, width * 10), fontsize=7, color=GRAY)
    return figure


def _stage_line_styles(lines: Sequence[StageLine]) -> list[dict[str, Any]]:
    """Return a style for each line: baselines are gray and dashed, with different markers."""
    styles: list[dict[str, Any]] = []
    baselines = [line.name for line in lines if line.dashed]
    networks = 0
    for line in lines:
        if line.dashed:
            marker = BASELINE_MARKERS[baselines.index(line.name) % len(BASELINE_MARKERS)]
            style = {"color": GRAY, "linestyle": (0, (4, 2)), "marker": marker}
            styles.append({**style, "linewidth": 1.1, "markersize": 3.5})
        else:
            styles.append({**line_style(networks), **THIN_LINE})
            networks += 1
    return styles


def _draw_stage_line(
    axes: Axes, values: Sequence[Ends], depth: int, shift: float, style: Mapping[str, Any]
) -> None:
    """Draw the values of a network with their intervals, spread over `depth` positions."""
    value, low, high = np.asarray(values, dtype=np.float64).reshape(-1, 3).T
    if not np.isfinite(value).any():
        return
    x = np.linspace(0, depth - 1, len(value)) + shift
    axes.plot(x, value, **style)
    known = np.isfinite(low)
    axes.vlines(x[known], low[known], high[known], color=style["color"], linewidth=1)


def _set_scale(axes: Axes, scale: str) -> None:
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        powers = [2**k for k in range(13) if low <= 2**k <= high]
        if len(powers) < 2:  # a range too small for powers of two gets round numbers
            axes.yaxis.set_major_locator(MaxNLocator(4))
        else:
            axes.set_yticks(powers if len(powers) < 8 else powers[::2])
        return
    # An axis that does not start at 0 exaggerates small differences.
    negative = any((np.asarray(line.get_ydata()) < 0).any() for line in axes.lines)
    low, high = axes.get_ylim()
    axes.set_ylim(low if negative else 0, max(high, 0.02) if scale == "percent" else high)
    if scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if high > 0.05 else 1))


@use_style
def similarity(
    matrix: Sequence[Sequence[float | None]],
    stages: Sequence[tuple[str, str]],
    title: str = "",
) -> Figure:
    """Linear CKA `[M, M]` between stages: 0 is dark, 1 bright, None gray.

    White lines separate the networks. Up to 12 stages, the values stand in the cells.

    Args:
        stages: (network, stage) of each row.
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
    colors = matplotlib.colormaps["viridis"].with_extremes(bad=LIGHT_GRAY)
    shown = np.ma.masked_invalid(values.clip(0, 1))
    image = axes.imshow(shown, cmap=colors, vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    ticks = [fit_text(stage, 24) for _, stage in stages]
    axes.set_xticks(range(count), ticks, rotation=90, fontsize=7)
    axes.set_yticks(range(count), ticks, fontsize=7)
    axes.tick_params(length=0)
    _separate_networks(axes, [network for network, _ in stages])
    if count <= MAX_SIMILARITY_CELLS:
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                color = "black" if value > 0.6 else "white"
                text = f"{value:.2f}"
                axes.text(column, row, text, color=color, ha="center", va="center", fontsize=6)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.06)
    bar.set_label("linear CKA")
    bar.outline.set_edgecolor(PALE)
    axes.set_title(fit_text(title, side * 7), pad=16)
    return figure


def _separate_networks(axes: Axes, networks: Sequence[str]) -> None:
    """Draw lines between the stages of different networks, and their names above and beside."""
    count = len(networks)
    starts = [i for i in range(count) if i == 0 or networks[i] != networks[i - 1]]
    style: dict[str, Any] = {"va": "center", "annotation_clip": False, "fontsize": 7}
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        if start:
            axes.axhline(start - 0.5, color="white", linewidth=2)
            axes.axvline(start - 0.5, color="white", linewidth=2)
        middle = (start + end - 1) / 2
        name = fit_text(networks[start], max((end - start) * 2.1, 7))
        axes.annotate(name, (middle, -0.7), ha="center", **{**style, "va": "bottom"})
        axes.annotate(name, (count - 0.3, middle), rotation=270, ha="left", **style)


@use_style
def embedding(
    points: npt.ArrayLike,
    labels: npt.ArrayLike,
    preds: npt.ArrayLike,
    classes: Sequence[str],
    title: str = "",
    axes_named: tuple[str, str] = ("", ""),
) -> Figure:
    """Points [N, 2] colored by their true class, with a ring around each mistake.

    Up to 20 classes have a color and shape of their own and stand in the legend. With more, correct
    predictions are pale and mistakes colored. Up to 40 class names stand at the median of their
    points.

    Args:
        axes_named: labels of the axes; empty for axes without a meaning, as those of t-SNE.
    """
    positions = np.asarray(points, dtype=np.float64)
    targets, predicted = np.asarray(labels, dtype=np.int64), np.asarray(preds, dtype=np.int64)
    if positions.shape != (len(targets), 2) or len(predicted) != len(targets):
        raise UsageError(f"points of shape {positions.shape} for {len(targets)} images")
    figure = Figure(figsize=(6.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    present = [c for c in range(len(classes)) if (targets == c).any()]
    wrong = targets != predicted
    size = max(4.0, min(18.0, 9000 / max(1, len(targets))))
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": "black", "linewidths": 0.7}
    if len(present) <= MAX_COLORED_CLASSES:
        for number, c in enumerate(present):
            x, y = positions[targets == c].T
            axes.scatter(
                x,
                y,
                label=fit_text(classes[c], 18),
                color=CLASS_COLORS[number % 10],
                marker=CLASS_MARKERS[(number + number // 10) % 4],
                alpha=0.75,
                s=size,
                linewidths=0,
            )
    else:
        x, y = positions[~wrong].T
        axes.scatter(x, y, color=LIGHT_GRAY, label="correct", s=size, linewidths=0)
        ring = {"color": COLORS[1], "linewidths": 0}
    label = f"mistake ({wrong.sum():,} of {len(targets):,})"
    x, y = positions[wrong].T
    axes.scatter(x, y, s=size * 2.2, label=label, **ring)
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "path_effects": halo}
    for c in present if len(present) <= MAX_NAMED_CLASSES else []:
        x, y = np.median(positions[targets == c], axis=0)
        axes.text(x, y, fit_text(classes[c], 14), **style)
    axes.set(xlabel=axes_named[0], ylabel=axes_named[1], title=fit_text(title, 55))
    if not any(axes_named):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.tick_params(colors=GRAY)
    _, names = axes.get_legend_handles_labels()
    columns = max(1, int(50 // (max(map(text_width, names)) + 3)))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, markerscale=2)
    return figure
