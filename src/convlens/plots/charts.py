"""Figures made of numbers: training curves, confusion, calibration, accuracies.

Shares and accuracies are from 0 to 1 and shown as per cent.
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
from convlens.plots.style import BLUE, GREY, PALE, VERMILION, fit_text, text_width, use_style

History = Mapping[str, Sequence[float]]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PANELS = ("loss", "accuracy")
# Part, words, look: colour, dashes and marker all differ.
PARTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("train", "train", {"color": BLUE, "linestyle": "-", "marker": "o"}),
    ("val", "validation", {"color": VERMILION, "linestyle": "--", "marker": "s"}),
)


@use_style
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


@use_style
def learning_rate(
    positions: Sequence[float], rates: Sequence[float], title: str = "", unit: str = "epoch"
) -> Figure:
    """The learning rate against epochs or steps (`unit`)."""
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    look: dict[str, Any] = {"marker": "o"} if len(positions) <= 30 else {}
    axes.plot(positions, rates, color=BLUE, **look)
    axes.set(xlabel=unit, ylabel="learning rate", title=fit_text(title, 45))
    axes.ticklabel_format(axis="y", scilimits=(-4, 4))
    axes.set_ylim(bottom=0)
    over_epochs(axes, np.asarray(positions, dtype=np.float64), unit)
    return figure


@use_style
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
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="#BDBDBD")
    # Among many classes a single confusion is a faint dot, so low shares get more of the colours.
    norm = PowerNorm(1 if small else 0.5, vmin=0, vmax=1)
    image = axes.imshow(shares, cmap=colors, norm=norm, interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    _class_ticks(axes, classes, small)
    axes.set(xlabel="predicted", ylabel="truth", title=fit_text(title, side * 7))
    ticks = [0, 0.25, 0.5, 0.75, 1] if small else [0, 0.05, 0.25, 0.5, 1]
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, ticks=ticks)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    bar.set_label("share of the true class")
    if small:
        _cell_counts(axes, counts, shares.filled(0))
    else:
        _confused_pairs(figure.add_subplot(grid[1]), counts, classes)
    return figure


@use_style
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


@use_style
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
    axes.set_yticks(rows, [fit_text(name, 22) for name in names], fontsize=points)
    beside: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "fontsize": points}
    beside |= {"textcoords": "offset points", "xytext": (5 * points, 0)}
    for row, value in enumerate(values.tolist()):
        words = "–" if math.isnan(value) else f"{value:.2%}"
        axes.annotate(words, (1, row), ha="right", va="center", **beside)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set(xlabel="accuracy, 95% interval", title=fit_text(title, 45))
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
    loss.set(ylabel="loss (nats)", title=fit_text(title, 35, after=after))
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
    names = [fit_text(name, 12) for name in classes[::step]]
    places, points = range(0, len(classes), step), 8 if small else 6
    axes.set_yticks(places, names, fontsize=points)
    upright: dict[str, Any] = {"rotation": 90}
    if small:
        upright = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        if max(map(text_width, names), default=0) < 3.5:
            upright = {}
    axes.set_xticks(places, names, fontsize=points, **upright)
    axes.tick_params(length=0 if small else 2)


def _cell_counts(axes: Axes, counts: Ints, shares: Floats) -> None:
    digits = len(f"{counts.max(initial=0)}")
    points = 8 if digits < 5 else 6.5 if digits < 6 else 5.5
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": points}
    for (row, column), n in np.ndenumerate(counts):
        words = f"{n}" if n < 1_000_000 else f"{n / 1_000_000:.1f}M"
        color = "#A0A0A0" if n == 0 else "white" if shares[row, column] > 0.55 else "black"
        axes.text(column, row, words, color=color, **look)


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
        axes.text(
            0.17, y, f"{fit_text(classes[truth], 11)} → {fit_text(classes[said], 11)}", **look
        )


# ---- several ----------------------------------------
# Curves of several runs: seeds, splits or folds of one recipe, and variants side by side.

# Okabe and Ito's without yellow, which is too faint for a line on white.
COLORS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "osD^vPX*"


@use_style
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


@use_style
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
            look = {"label": fit_text(name, 30), **line_look(number)}
            _mean_and_band(axes, _longest(histories), runs, look)
        over_epochs(axes, _longest([h for histories in groups.values() for h in histories]))
        words = "validation" if part == "val" else "training"
        axes.set_ylabel(f"{words} {axes.get_ylabel()}")
    handles, words_ = panels[0].get_legend_handles_labels()
    figure.legend(handles, words_, loc="outside lower center", ncols=columns, handlelength=3.2)
    return figure


@use_style
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
    axes.set_yticks(range(len(gains)), [fit_text(name, 26) for name in gains], fontsize=8)
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.set_title(fit_text(reference, 30, before="accuracy over that of "))
    axes.set_xlabel("points, 95% interval (filled: distinguishable)")
    axes.grid(False, axis="y")
    return figure


def line_look(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of the n-th line: no two alike among 28."""
    again, color = divmod(number, len(COLORS))
    return {
        "color": COLORS[color],
        "linestyle": DASHES[(color + again) % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.3,
    }


def _columns(names: Sequence[str]) -> int:
    """How many names with their lines fit beside each other below the panels."""
    each = max(text_width(fit_text(name, 30)) for name in names) + 6
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


# ---- stages ----------------------------------------
# Figures of what was measured at the stages of networks: curves over depth, similarities.

Ends = tuple[float, float, float]  # value, low and high end of its interval; NaN where none
COLUMNS = 3


class StageLine(NamedTuple):
    """A network in `stage_measures`: for each measure a value a stage, in the stages' order."""

    name: str
    stages: Sequence[str]
    values: Mapping[str, Sequence[Ends]]
    dashed: bool = False


@use_style
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
    names = [fit_text(line.name, 40) for line in lines]
    inches = 2.7 * columns + 0.3
    beside = max(1, min(len(names), int(inches * 8 // (max(map(text_width, names)) + 7))))
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
        axes.set_xticks(
            range(len(deepest)), [fit_text(s, 24) for s in deepest], rotation=90, fontsize=7
        )
        axes.set_xlim(-0.5, len(deepest) - 0.5)
        axes.grid(False, axis="x")
        if not axes.lines:
            axes.annotate("nothing to measure", (0.5, 0.5), xycoords="axes fraction", ha="center")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], **look) for look in looks]
    figure.legend(handles, names, loc="outside upper left", ncols=beside, handlelength=3)
    if note:
        figure.supxlabel(fit_text(note, size[0] * 10), fontsize=7, color=GREY)
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


@use_style
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
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="#BDBDBD")
    shown = np.ma.masked_invalid(values.clip(0, 1))
    image = axes.imshow(shown, cmap=colors, vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    names = [fit_text(stage, 24) for _, stage in stages]
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
        words = fit_text(owners[start], max(room, 7))
        axes.annotate(
            words, (middle, -0.7), ha="center", va="bottom", annotation_clip=False, fontsize=7
        )
        axes.annotate(
            words,
            (count - 0.3, middle),
            rotation=270,
            ha="left",
            va="center",
            annotation_clip=False,
            fontsize=7,
        )
    if count <= 12:
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                ink = "black" if value > 0.6 else "white"
                look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6}
                axes.text(column, row, f"{value:.2f}", color=ink, **look)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.06)
    bar.set_label("linear CKA")
    bar.outline.set_edgecolor(PALE)
    axes.set_title(fit_text(title, side * 7), pad=16)
    return figure


# ---- embeddings ----------------------------------------
# A figure of where images lie in a network's features.

# With three of Tol's muted colours, so that ten classes need no shapes to be told apart.
TEN = (*COLORS, "#999933", "#882255", "#44AA99")
SHAPES = "os^D"
TOLD_APART = 20  # classes: beyond, colours and shapes can't be
NAMED = 40


@use_style
def embedding(
    points: npt.ArrayLike,
    labels: npt.ArrayLike,
    preds: npt.ArrayLike,
    classes: Sequence[str],
    title: str = "",
    axes_named: tuple[str, str] = ("", ""),
) -> Figure:
    """Points [N, 2] coloured by their true class, with a ring round each mistake.

    Up to 20 classes have a colour and shape of their own and stand in the legend; beyond, right
    answers are pale and mistakes coloured. Up to 40 names stand at the median of their points.
    """
    places = np.asarray(points, dtype=np.float64)
    truth, said = np.asarray(labels, dtype=np.int64), np.asarray(preds, dtype=np.int64)
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
            axes.scatter(x, y, label=fit_text(classes[c], 18), **look, **dots)
    else:
        x, y = places[~wrong].T
        axes.scatter(x, y, color="#BDBDBD", label="right", **dots)
        ring = {"color": COLORS[1], "linewidths": 0}
    x, y = places[wrong].T
    words = f"mistake ({len(x):,} of {len(truth):,})"
    axes.scatter(x, y, s=size * 2.2, label=words, **ring)
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    named: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "path_effects": halo}
    for c in present if len(present) <= NAMED else []:
        x, y = np.median(places[truth == c], axis=0)
        axes.text(x, y, fit_text(classes[c], 14), **named)
    axes.set(xlabel=axes_named[0], ylabel=axes_named[1], title=fit_text(title, 55))
    if not any(axes_named):  # t-SNE's axes mean nothing
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.tick_params(colors=GREY)
    _, names = axes.get_legend_handles_labels()
    columns = max(1, int(50 // (max(map(text_width, names)) + 3)))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, markerscale=2)
    return figure
