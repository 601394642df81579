"""Charts show the numbers they were given."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest

from convlens import metrics, plots
from convlens.errors import UsageError
from convlens.plots import StageLine
from helpers.figures import HOSTILE_NAMES, make_history, save_and_read, texts_of

NAN = math.nan
HOSTILE_NAME = "$x$_{a}^\\frac{1}{\N{SUNFLOWER}\udcff\n" + "W" * 100


@pytest.mark.parametrize("epochs", [1, 2, 15, 250])
def test_curves_show_the_history(epochs: int, tmp_path: Path) -> None:
    given, chosen = make_history(epochs), (epochs + 1) // 2
    figure = plots.curves(given, chosen, "a $run$")
    assert len(figure.axes) == 2
    for axes, key in zip(figure.axes, ("loss", "accuracy"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        train, validation = lines["train"], lines["validation"]
        for part, line in (("train", train), ("val", validation)):
            np.testing.assert_array_equal(line.get_xdata(), given["epoch"])
            np.testing.assert_array_equal(line.get_ydata(), given[f"{part}_{key}"])
        assert train.get_color() != validation.get_color()
        assert train.get_linestyle() != validation.get_linestyle()
        assert train.get_marker() != validation.get_marker()
        marked = [line for line in axes.lines if list(line.get_xdata()) == [chosen, chosen]]
        assert len(marked) == 1
        value = given[f"val_{key}"][chosen - 1]
        shown = f"{value:.2%}" if key == "accuracy" else f"{value:.4g}"
        assert texts_of(axes) == [f"epoch {chosen}: {shown}"]
        assert axes.get_xlabel() == "epoch"
    save_and_read(figure, tmp_path)
    ticks = [tick for axes in figure.axes for tick in axes.get_xticks()]
    assert all(tick == round(tick) for tick in ticks)


def test_curves_leave_gaps_and_missing_series_out(tmp_path: Path) -> None:
    given = make_history(5)
    given["train_accuracy"] = [math.nan] * 5
    del given["train_loss"]
    given["val_loss"][2] = math.nan
    loss, accuracy = plots.curves(given, 3).axes
    assert [line.get_label() for line in loss.lines[:-1]] == ["validation"]
    assert [line.get_label() for line in accuracy.lines[:-1]] == ["validation"]
    assert texts_of(loss) == ["epoch 3"]
    save_and_read(plots.curves({"epoch": []}, 1), tmp_path)
    assert all(not axes.texts for axes in plots.curves(given).axes)


def test_seed_curves_average_the_epochs_all_seeds_reached(tmp_path: Path) -> None:
    first, second = make_history(4), make_history(3)
    second["val_loss"] = [value + 0.2 for value in second["val_loss"]]
    figure = plots.seed_curves([first, second], "run")
    loss = figure.axes[0]
    mean = next(line for line in loss.lines if line.get_label() == "validation")
    np.testing.assert_allclose(mean.get_ydata(), np.array(first["val_loss"][:3]) + 0.1)
    band = loss.collections[1].get_paths()[0].vertices
    # Two values 0.2 apart: sample sd = 0.2 / sqrt(2), so the band is 0.2 * sqrt(2) high.
    at_first = band[band[:, 0] == 1][:, 1]
    assert at_first.max() - at_first.min() == pytest.approx(0.2 * math.sqrt(2))
    assert len(loss.lines) == 6
    assert "2 seeds" in loss.get_title(loc="left")
    save_and_read(figure, tmp_path)
    single = plots.seed_curves([first]).axes[0]
    assert not single.collections
    with pytest.raises(UsageError):
        plots.seed_curves([])


def test_variants_are_overlaid_each_with_its_own_line_style(tmp_path: Path) -> None:
    first, second = make_history(4), make_history(3)
    second["val_accuracy"] = [value + 0.2 for value in second["val_accuracy"]]
    figure = plots.variant_curves(
        {"both": [first, second], "one": [make_history(6)]}, "x", "2 seeds"
    )
    loss, accuracy = figure.axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == (
        "validation loss (nats)",
        "validation accuracy",
    )
    both, one = accuracy.lines
    np.testing.assert_allclose(both.get_ydata(), np.array(first["val_accuracy"][:3]) + 0.1)
    np.testing.assert_array_equal(one.get_ydata(), make_history(6)["val_accuracy"])
    (band,) = accuracy.collections  # a single run has no deviation
    at_first = band.get_paths()[0].vertices
    at_first = at_first[at_first[:, 0] == 1][:, 1]
    assert at_first.max() - at_first.min() == pytest.approx(0.2 * math.sqrt(2))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["both", "one"]
    assert "mean ± sd of 2 seeds" in loss.get_title(loc="left")
    save_and_read(figure, tmp_path)
    many = plots.variant_curves({f"variant {n}": [make_history(2)] for n in range(28)}).axes[0]
    styles = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in many.lines}
    assert len(styles) == 28
    with pytest.raises(UsageError):
        plots.variant_curves({})
    with pytest.raises(UsageError):
        plots.variant_curves({"a": []})


def test_variants_without_validation_show_training_metrics() -> None:
    given = {**make_history(3), "val_loss": [math.nan] * 3, "val_accuracy": [math.nan] * 3}
    loss = plots.variant_curves({"a": [given], "b": [given]}).axes[0]
    assert loss.get_ylabel() == "training loss (nats)"
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), given["train_loss"])


def test_legend_of_variants_stays_inside_the_figure() -> None:
    names = [f"RandomAdjustSharpness-{n}" for n in range(9)]
    figure = plots.variant_curves({name: [make_history(2)] for name in names})
    figure.savefig(io.BytesIO())
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_differences_are_shown_in_points_with_their_intervals(tmp_path: Path) -> None:
    gains = {
        "worse$": (-0.02, (-0.03, -0.01), True),
        "similar": (0.005, (-0.01, 0.02), False),
        "untested": (0.5, None, False),
    }
    figure = plots.differences(gains, "the first")
    axes = figure.axes[0]
    assert texts_of(axes) == ["\N{MINUS SIGN}2.00", "+0.50", "+50.00"]
    intervals = [c.get_segments()[0][:, 0].tolist() for c in axes.collections]
    assert intervals == [pytest.approx([-3, -1]), pytest.approx([-1, 2])]
    filled = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"]
    assert filled == ["#0072B2", "white", "white"]
    save_and_read(figure, tmp_path)
    hostile = dict.fromkeys(HOSTILE_NAMES, (0.0, (-0.1, 0.1), False))
    save_and_read(plots.differences(hostile, HOSTILE_NAMES[1]), tmp_path)
    with pytest.raises(UsageError):
        plots.differences({}, "a")


def test_learning_rate_over_steps() -> None:
    steps = np.arange(1000)
    axes = plots.learning_rate(steps, np.cos(steps / 999), unit="step").axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), np.cos(steps / 999))
    assert axes.get_xlabel() == "step"


def test_small_confusion_matrix_has_counts_in_its_cells(tmp_path: Path) -> None:
    matrix = np.array([[8, 2, 0], [0, 0, 0], [1, 4, 1_234_567]])
    figure = plots.confusion(matrix, ["cat", "$dog$", "eel"], "test")
    axes = figure.axes[0]
    assert texts_of(axes) == ["8", "2", "0", "0", "0", "0", "1", "4", "1.2M"]
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(shares[0], [0.8, 0.2, 0])
    assert shares.mask.tolist() == [[False] * 3, [True] * 3, [False] * 3], (
        "a row without images is gray"
    )
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", r"\$dog\$", "eel"]
    save_and_read(figure, tmp_path)
    assert len(plots.confusion(np.eye(20) * 100, list("abcdefghijklmnopqrst")).axes[0].texts) == 400
    with pytest.raises(UsageError):
        plots.confusion(matrix, ["cat", "dog"])


@pytest.mark.parametrize("classes", [21, 200, 1000])
def test_large_confusion_matrix_lists_the_most_frequent_confusions(
    classes: int, tmp_path: Path
) -> None:
    matrix = np.eye(classes, dtype=np.int64) * 50
    matrix[3, 7], matrix[5, 2] = 9, 11
    figure = plots.confusion(matrix, [f"c{index}" for index in range(classes)], "test")
    axes, pairs = figure.axes[0], next(a for a in figure.axes if "confused" in a.get_title("left"))
    assert not axes.texts
    assert len(axes.get_xticks()) <= 40
    assert texts_of(pairs) == ["11 of 61", "c5 → c2", "9 of 59", "c3 → c7"]
    save_and_read(figure, tmp_path)
    perfect = plots.confusion(np.eye(classes), ["$"] * classes)
    assert "nothing was confused" in [axes.get_title("left") for axes in perfect.axes]


def test_reliability_diagram_leaves_empty_bins_out(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    probs = metrics.softmax(generator.normal(size=(500, 10)) * 2)
    labels = generator.integers(0, 10, 500)
    confidence, right, count = metrics.reliability_bins(probs, labels)
    figure = plots.reliability(confidence, right, count, metrics.ece(probs, labels))
    top, bottom = figure.axes
    points = top.containers[0].lines[0]
    np.testing.assert_array_equal(points.get_xdata(), confidence[count > 0])
    np.testing.assert_array_equal(points.get_ydata(), right[count > 0])
    assert [bar.get_height() for bar in bottom.patches] == count.tolist()
    assert "500 images" in top.get_title(loc="left")
    save_and_read(figure, tmp_path)
    save_and_read(plots.reliability([math.nan] * 3, [math.nan] * 3, [0, 0, 0], 0), tmp_path)


def test_accuracy_bars_show_intervals(tmp_path: Path) -> None:
    figure = plots.accuracy_bars(
        ["a", "b", "none"], [0.5, 1.0, None], [(0.4, 0.6), (0.9, 1.0), (0.0, 1.0)]
    )
    axes = figure.axes[0]
    assert texts_of(axes) == ["50.00%", "100.00%", "–"]
    ends = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(ends[0], [[0.4, 0], [0.6, 0]])
    np.testing.assert_allclose(ends[1], [[0.9, 1], [1.0, 1]])
    save_and_read(figure, tmp_path)
    many = plots.accuracy_bars([f"c{i}" for i in range(200)], [0.5] * 200, [(0.4, 0.6)] * 200)
    assert save_and_read(many, tmp_path).shape[0] < 6000


def make_line(name: str, count: int, *, dashed: bool = False) -> StageLine:
    values = [(0.1 * i, 0.1 * i - 0.05, 0.1 * i + 0.05) for i in range(count)]
    stages = [f"layer{i}" for i in range(count)]
    return StageLine(name, stages, {"probe": values, "rank": [(NAN, NAN, NAN)] * count}, dashed)


def test_each_network_has_a_line_with_its_intervals(tmp_path: Path) -> None:
    panels = {"probe": ("accuracy", "percent"), "rank": ("rank", "log")}
    lines = [
        make_line("one", 3),
        make_line(HOSTILE_NAME, 7),
        make_line("one, untrained", 3, dashed=True),
    ]
    figure = plots.stage_measures(lines, panels, "a note")
    plots.save_figure(figure, tmp_path / "x.png")
    probe, rank = figure.axes
    assert [len(line.get_xdata()) for line in probe.lines] == [3, 7, 3]
    np.testing.assert_allclose(probe.lines[1].get_ydata(), 0.1 * np.arange(7))
    # The shallow network is spread over the stages of the deep one.
    assert np.diff(np.asarray(probe.lines[0].get_xdata())) == pytest.approx([3, 3])
    assert [text.get_text() for text in probe.get_xticklabels()] == [f"layer{i}" for i in range(7)]
    ends = probe.collections[0].get_segments()
    np.testing.assert_allclose(
        [s[:, 1] for s in ends], [(0.1 * i - 0.05, 0.1 * i + 0.05) for i in range(3)]
    )
    assert probe.lines[2].get_linestyle() == "--"
    assert len({line.get_color() for line in probe.lines}) == 3
    assert [text.get_text() for text in rank.texts] == ["nothing to measure"]
    with pytest.raises(UsageError, match="no measurements"):
        plots.stage_measures([], panels)


@pytest.mark.parametrize("networks", [1, 3, 12])
def test_figure_of_one_measure_or_many_networks(networks: int, tmp_path: Path) -> None:
    lines = [make_line(f"network {i}", 1 + i) for i in range(networks)]
    plots.save_figure(
        plots.stage_measures(lines, {"probe": ("accuracy", "percent")}), tmp_path / "x.png"
    )
    five = {name: (name, "number") for name in "abcde"}
    lines = [line._replace(values=dict.fromkeys(five, line.values["probe"])) for line in lines]
    plots.save_figure(plots.stage_measures(lines, five, "note"), tmp_path / "y.png")


@pytest.mark.parametrize("values", [[2.3, 3.4], [3.0, 5.0], [1.0, 500.0], [4.0]])
def test_log_scale_of_any_range_has_tick_labels(values: list[float]) -> None:
    ends = [(value, NAN, NAN) for value in values]
    line = StageLine("one", [f"layer{i}" for i in range(len(values))], {"rank": ends})
    figure = plots.stage_measures([line], {"rank": ("rank", "log")})
    plots.encode_png(figure)  # ticks are made when a figure is drawn
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    labels = [label for label in axes.get_yticklabels() if label.get_text()]
    assert sum(low <= label.get_position()[1] <= high for label in labels) >= 2


@pytest.mark.parametrize("count", [1, 3, 40])
def test_similarities_are_shown_cell_by_cell(count: int, tmp_path: Path) -> None:
    matrix: list[list[float | None]] = [[1.0] * count for _ in range(count)]
    matrix[0][-1] = None if count > 1 else 1.0
    stages = [("a" if i < 2 else HOSTILE_NAME, f"layer{i}") for i in range(count)]
    figure = plots.similarity(matrix, stages, "CKA")
    plots.save_figure(figure, tmp_path / "x.png")
    image = figure.axes[0].images[0].get_array()
    assert image is not None
    assert image.shape == (count, count)
    assert np.ma.getmaskarray(image).sum() == (count > 1)
    values = [text for text in figure.axes[0].texts if text.get_text() == "1.00"]
    assert len(values) == (count * count - (count > 1) if count <= 12 else 0)
    with pytest.raises(UsageError, match="similarities of shape"):
        plots.similarity(matrix, stages[1:])


@pytest.mark.parametrize("classes", [1, 2, 20, 60])
def test_embeddings_show_classes_and_ring_mistakes(classes: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(3 * classes) % classes
    preds = labels.copy()
    preds[: min(2, classes - 1)] += 1
    names = [HOSTILE_NAME, *(f"class {i}" for i in range(1, classes))]
    points = generator.normal(size=(len(labels), 2))
    figure = plots.embedding(points, labels, preds, names, "map")
    plots.save_figure(figure, tmp_path / "x.png")
    groups = figure.axes[0].collections
    assert len(groups) == (classes + 1 if classes <= 20 else 2)
    wrong = np.asarray(groups[-1].get_offsets())
    np.testing.assert_allclose(wrong, points[labels != preds].reshape(-1, 2))
    assert len(figure.axes[0].texts) == (classes if classes <= 40 else 0)
    with pytest.raises(UsageError, match="points of shape"):
        plots.embedding(points[1:], labels, preds, names)
