"""Figures made of numbers: training curves, confusion, calibration, accuracies.

Shares and accuracies are from 0 to 1 and shown as per cent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from convlens.errors import UsageError
from convlens.metrics import wilson_interval
from convlens.plots.style import BLUE, GREY, VERMILION, fit, styled, width

History = Mapping[str, Sequence[float]]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PANELS = ("loss", "accuracy")
# Part, words, look: colour, dashes and marker all differ.
PARTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("train", "train", {"color": BLUE, "linestyle": "-", "marker": "o"}),
    ("val", "validation", {"color": VERMILION, "linestyle": "--", "marker": "s"}),
)


@styled
def curves(history: History, chosen_epoch: int | None = None, title: str = "") -> Figure:
    """Loss and accuracy against epochs for train and validation, the chosen epoch marked.

    `history` holds one value an epoch under `epoch`, `train_loss`, `val_loss`, `train_accuracy`
    and `val_accuracy`; NaN leaves a gap, a series that is missing or all NaN is left out.
    """
    figure, panels = two_panels(title)
    epochs = np.asarray(history["epoch"], dtype=np.float64)
    for axes, key in zip(panels, PANELS, strict=True):
        for part, words, look in PARTS:
            values = series(history, f"{part}_{key}")
            if np.isfinite(values).any():
                axes.plot(epochs, values, label=words, markevery=sparse(len(epochs)), **look)
        if chosen_epoch is not None and len(epochs):
            _mark(axes, epochs, series(history, f"val_{key}"), chosen_epoch, key)
        over_epochs(axes, epochs)
    legend(panels)
    return figure


@styled
def learning_rate(
    positions: Sequence[float], rates: Sequence[float], title: str = "", unit: str = "epoch"
) -> Figure:
    """The learning rate against epochs or steps (`unit`)."""
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    look: dict[str, Any] = {"marker": "o"} if len(positions) <= 30 else {}
    axes.plot(positions, rates, color=BLUE, **look)
    axes.set(xlabel=unit, ylabel="learning rate", title=fit(title, 45))
    axes.ticklabel_format(axis="y", scilimits=(-4, 4))
    axes.set_ylim(bottom=0)
    over_epochs(axes, np.asarray(positions, dtype=np.float64), unit)
    return figure


@styled
def confusion(matrix: npt.ArrayLike, classes: Sequence[str], title: str = "") -> Figure:
    """A confusion matrix [K, K] (rows = truth) coloured by the share of each row.

    Up to 20 classes the counts stand in the cells; beyond, some class names stand at the axes
    and the pairs confused most often beside. A row without images is grey.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    k = len(classes)
    if counts.shape != (k, k):
        raise UsageError(f"a confusion matrix of shape {counts.shape} for {k} classes")
    support = counts.sum(axis=1, keepdims=True)
    shares = np.ma.masked_invalid(counts / np.where(support > 0, support, np.nan))
    small = k <= 20
    side = 1.6 + 0.42 * max(k, 3)
    figure = Figure(figsize=(side + 0.9, side) if small else (10, 6), layout="constrained")
    grid = figure.add_gridspec(1, 1 if small else 2, width_ratios=None if small else (1.9, 1))
    axes = figure.add_subplot(grid[0])
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="#BDBDBD")
    # Among many classes a single confusion is a faint dot, so low shares get more of the colours.
    norm = PowerNorm(1 if small else 0.5, vmin=0, vmax=1)
    image = axes.imshow(shares, cmap=colours, norm=norm, interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    _class_ticks(axes, classes, small)
    axes.set(xlabel="predicted", ylabel="truth", title=fit(title, side * 7))
    ticks = [0, 0.25, 0.5, 0.75, 1] if small else [0, 0.05, 0.25, 0.5, 1]
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, ticks=ticks)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    bar.set_label("share of the true class")
    if small:
        _cell_counts(axes, counts, shares.filled(0))
    else:
        _confused_pairs(figure.add_subplot(grid[1]), counts, classes)
    return figure


@styled
def reliability(
    confidence: npt.ArrayLike, accuracy: npt.ArrayLike, count: npt.ArrayLike, ece: float
) -> Figure:
    """Accuracy against confidence per bin with 95% intervals, above a histogram of the bins.

    Takes what `metrics.reliability` gives: bins of equal width, NaN where they are empty.
    """
    means, shares = np.asarray(confidence, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    counts = np.asarray(count, dtype=np.int64)
    full = counts > 0
    figure = Figure(figsize=(4.2, 4.8), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="perfect calibration")
    pairs = zip(shares[full].tolist(), counts[full].tolist(), strict=True)
    intervals = [wilson_interval(round(share * n), n) for share, n in pairs]
    look: dict[str, Any] = {"color": BLUE, "marker": "o", "elinewidth": 1, "capsize": 2}
    errors = _errors(shares[full], intervals)
    top.errorbar(means[full], shares[full], errors, label="model, 95% interval", **look)
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    top.set_title(f"expected calibration error {ece:.2%}, {counts.sum():,} images")
    figure.legend(loc="outside lower center", ncols=2)
    step = 1 / len(counts)
    left = np.arange(len(counts)) * step
    bottom.bar(left, counts, width=step, align="edge", color=BLUE, edgecolor="white")
    bottom.set(xlabel="confidence (highest probability)", ylabel="images")
    if full.any() and counts.max() > 20 * counts[full].min():
        bottom.set_yscale("log")
        bottom.set_ylim(bottom=0.7)
        bottom.set_ylabel("images (log)")
        bottom.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axis in (top.xaxis, top.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return figure


@styled
def accuracy_bars(
    names: Sequence[str],
    accuracies: Sequence[float | None],
    intervals: Sequence[tuple[float, float]],
    title: str = "",
) -> Figure:
    """Accuracies with their 95% intervals (low, high), one row each, the first on top.

    `None` is an accuracy that can't be known: its row stays empty.
    Points rather than bars: a bar has to start at 0 and hides the differences that matter.
    """
    few = len(names) <= 30
    rows, values = np.arange(len(names)), np.asarray(list(accuracies), dtype=np.float64)
    size = (6, 0.9 + len(names) * (0.28 if few else 0.15))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    look: dict[str, Any] = {"fmt": "o", "color": BLUE, "elinewidth": 1.2, "capsize": 2.5}
    axes.errorbar(values, rows, xerr=_errors(values, intervals), **look)
    points = 8 if few else 6
    axes.set_yticks(rows, [fit(name, 22) for name in names], fontsize=points)
    beside: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "fontsize": points}
    beside |= {"textcoords": "offset points", "xytext": (5 * points, 0)}
    for row, value in enumerate(values.tolist()):
        words = "–" if math.isnan(value) else f"{value:.2%}"
        axes.annotate(words, (1, row), ha="right", va="center", **beside)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set(xlabel="accuracy, 95% interval", title=fit(title, 45))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(False, axis="y")
    return figure


def _errors(values: Floats, intervals: Sequence[tuple[float, float]]) -> Floats:
    """Lengths [2, N] of error bars; rounding may leave a value just outside its interval."""
    low, high = np.asarray(intervals, dtype=np.float64).reshape(-1, 2).T
    return np.stack([values - low, high - values]).clip(min=0)


def two_panels(title: str, after: str = "") -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.set(ylabel="loss (nats)", title=fit(title, 35, after=after))
    accuracy.set(ylabel="accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    return figure, (loss, accuracy)


def series(history: History, key: str) -> Floats:
    missing = [math.nan] * len(history["epoch"])
    return np.asarray(history.get(key, missing), dtype=np.float64)


def sparse(count: int) -> int:
    """Every how many points a marker stands: all of few, about a dozen of many."""
    return 1 if count <= 30 else math.ceil(count / 12)


def over_epochs(axes: Axes, epochs: Floats, unit: str = "epoch") -> None:
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)


def _mark(axes: Axes, epochs: Floats, values: Floats, chosen: int, key: str) -> None:
    """A line at the chosen epoch with its value, on the side that has room.

    Losses fall and accuracies rise, so the words stand above the one and below the other.
    """
    axes.axvline(chosen, color=GREY, linestyle=":", linewidth=1.2)
    value = values[epochs == chosen]
    shown = ""
    if value.size and np.isfinite(value[0]):
        shown = f": {value[0]:.2%}" if key == "accuracy" else f": {value[0]:.4g}"
    late = chosen > (epochs[0] + epochs[-1]) / 2
    axes.annotate(
        f"epoch {chosen}{shown}",
        (chosen, 0.98 if key == "loss" else 0.03),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-4 if late else 4, 0),
        textcoords="offset points",
        ha="right" if late else "left",
        va="top" if key == "loss" else "bottom",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def legend(panels: Sequence[Axes]) -> None:
    """Above the right panel, where no curve can run through it."""
    for axes in panels:
        handles, words = axes.get_legend_handles_labels()
        if handles:
            place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1)}
            panels[-1].legend(handles, words, ncols=2, columnspacing=1.2, **place)
            return


def _class_ticks(axes: Axes, classes: Sequence[str], small: bool) -> None:
    step = 1 if small else math.ceil(len(classes) / 40)
    names = [fit(name, 12) for name in classes[::step]]
    places, points = range(0, len(classes), step), 8 if small else 6
    axes.set_yticks(places, names, fontsize=points)
    upright: dict[str, Any] = {"rotation": 90}
    if small:
        upright = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        if max(map(width, names), default=0) < 3.5:
            upright = {}
    axes.set_xticks(places, names, fontsize=points, **upright)
    axes.tick_params(length=0 if small else 2)


def _cell_counts(axes: Axes, counts: Ints, shares: Floats) -> None:
    digits = len(f"{counts.max(initial=0)}")
    points = 8 if digits < 5 else 6.5 if digits < 6 else 5.5
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": points}
    for (row, column), n in np.ndenumerate(counts):
        words = f"{n}" if n < 1_000_000 else f"{n / 1_000_000:.1f}M"
        colour = "#A0A0A0" if n == 0 else "white" if shares[row, column] > 0.55 else "black"
        axes.text(column, row, words, color=colour, **look)


def _confused_pairs(axes: Axes, counts: Ints, classes: Sequence[str]) -> None:
    """The pairs confused most often, as a list of count, truth and prediction."""
    axes.set_axis_off()
    wrong = counts - np.diag(counts.diagonal())
    support = counts.sum(axis=1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:20]
    pairs = [divmod(int(place), len(classes)) for place in order if wrong.flat[place]]
    axes.set_title("confused most often" if pairs else "nothing was confused")
    for line, (truth, said) in enumerate(pairs):
        y = 0.985 - line * 0.049
        look: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 7, "va": "top"}
        axes.text(0.13, y, f"{wrong[truth, said]} of {support[truth]}", ha="right", **look)
        axes.text(0.17, y, f"{fit(classes[truth], 11)} → {fit(classes[said], 11)}", **look)
