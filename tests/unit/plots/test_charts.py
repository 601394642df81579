"""Figures hold the facts they were given, and PNG files are exact and repeatable."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from convlens import metrics, plots
from convlens.errors import ResourceError, UsageError
from convlens.plots import style
from convlens.plots.attributions import AttributionColumn, AttributionPanel
from convlens.plots.style import fit_text, text_width

HOSTILE = [
    "$x$",
    "a_{b}^{c} $\\frac{1}{",
    "\\$5",
    "line\nbreak",
    "nul\0",
    "\udcff",
    "日本語",
    "العربية",
    "\N{SUNFLOWER}",
    "",
    " ",
    "_underscore",
    "W" * 300,
    "%s {0}",
]


def history(epochs: int) -> dict[str, list[float]]:
    steps = np.arange(1, epochs + 1)
    return {
        "epoch": steps.tolist(),
        "train_loss": (1 / steps).tolist(),
        "val_loss": (1 / steps + 0.1).tolist(),
        "train_accuracy": (1 - 0.5 / steps).tolist(),
        "val_accuracy": (0.97 - 0.5 / steps).tolist(),
    }


def pictures(n: int, channels: int = 3, size: int = 8, seed: int = 0) -> np.ndarray:
    # No pixel is white, so that pictures stand out from the paper.
    generator = np.random.default_rng(seed)
    return generator.integers(0, 255, (n, channels, size, size), dtype=np.uint8)


def png(figure: Figure, folder: Path, name: str = "plot.png", **how: int) -> np.ndarray:
    plots.save_figure(figure, folder / name, **how)
    with Image.open(folder / name) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB"))


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def maps(*shape: int, size: int = 3) -> np.ndarray:
    generator = np.random.default_rng(1)
    return generator.normal(size=(*shape, size, size)).astype(np.float32)


def panel(count: int = 10, size: int = 3) -> plots.Panel:
    none = np.zeros(count, dtype=bool)
    return plots.Panel("layer", "note", np.abs(maps(count, size=size)), (0.0, 2.0), none, none)


def attributions() -> AttributionPanel:
    maps = np.linspace(-1, 1, 16).reshape(1, 4, 4)
    columns = [
        AttributionColumn("Grad-CAM", "layer", maps.clip(0), False),
        AttributionColumn("IG", "", maps, True),
    ]
    return AttributionPanel("model", pictures(1), columns, [("cat", 0.9)])


def examples() -> dict[str, Figure]:
    """One figure for every name in the table."""
    share = np.array([0.9, 0.5])
    made = {
        "curves": plots.curves(history(3), 2, "run"),
        "seed_curves": plots.seed_curves([history(3), history(2)], "run"),
        "variant_curves": plots.variant_curves({"a": [history(3)], "b": [history(2)] * 2}, "run"),
        "differences": plots.differences({"b": (-0.01, (-0.02, 0.0), True)}, "a"),
        "learning_rate": plots.learning_rate([1, 2], [0.1, 0.01]),
        "confusion": plots.confusion([[3, 1], [0, 2]], ["cat", "dog"], "test"),
        "reliability": plots.reliability([math.nan, 0.8], [math.nan, 0.7], [0, 10], 0.1),
        "accuracy_bars": plots.accuracy_bars(["a", "b"], share, [(0.8, 0.95), (0.4, 0.6)]),
        "contact_sheet": plots.contact_sheet(pictures(3), ["a", "b", "c"], "sheet"),
        "augmented_batch": plots.augmented_batch(pictures(3), pictures(3, seed=1)),
        "label_review": plots.label_review(pictures(2), ["cat", "a"], ["dog", "b"], [0.9, 0.6]),
        "worst_mistakes": plots.worst_mistakes(pictures(1), ["cat"], ["dog"], [0.9]),
        "activations": plots.activations(pictures(1)[0], [panel()], "run", "cat", "max: 1"),
        "activations_side_by_side": plots.activations_side_by_side(
            pictures(1)[0], [plots.Column("a", "cat", [panel()]), plots.Column("b", "dog", [])]
        ),
        "colour_filters": plots.color_filters(maps(5, 3), list("abcde"), 1.0, "conv1", "note"),
        "kernels": plots.kernels(maps(5, 8), list("abcde"), 1.0, "conv2", "note"),
        "top_images": plots.top_images([pictures(3)], [[None] * 3], [("#1", "3/3 cat")], "layer"),
        "made_inputs": plots.made_inputs(pictures(2), [("#1", "peak 3")] * 2, "layer", "note"),
        "neighbours": plots.neighbors_sheet(pictures(4), [["a"], ["b", "c"], ["d"], []], 2, "near"),
        "stage_measures": plots.stage_measures(
            [plots.StageLine("run", ["a", "b"], {"rank": [(3, 2, 4), (5, 4, 6)]})],
            {"rank": ("effective rank", "log")},
        ),
        "similarity": plots.similarity([[1, None], [None, 1]], [("x", "a"), ("y", "a")], "CKA"),
        "embedding": plots.embedding([[0, 1], [1, 0]], [0, 1], [0, 0], ["cat", "dog"], "map"),
        "attribution_grid": plots.attribution_grid([("a", "cat")], [attributions()]),
        "attribution_sanity": plots.attribution_sanity(
            ["head"],
            {key: {"A": [(0.5, (0.4, 0.6))]} for key in ("spearman", "ssim")},
            {key: {"A": share, "random order": share} for key in ("deletion", "insertion")},
        ),
    }
    assert set(made) == set(plots.PLOTS)
    return made


def test_a_label_review_says_which_label_was_given_and_which_is_suggested() -> None:
    figure = plots.label_review(
        pictures(2),
        ["cat", "a$"],
        ["dog", "b"],
        [0.9951, 0.6],
        "sheet",
        first=49,
        copied=[False, True],
    )
    said = texts(figure.axes[0])
    assert said == ["sheet", "#49 cat", "→ dog >99%", r"#50 a\$ (copy)", "→ b 60%"]


def test_every_plot_is_saved_with_its_size_and_the_same_bytes(tmp_path: Path) -> None:
    again = examples()
    for name, figure in examples().items():
        inches = figure.get_size_inches()
        pixels = png(figure, tmp_path / "made" / "here", f"{name}.png")
        assert pixels.shape == (*(int(side * 150) for side in inches[::-1]), 3)
        assert 0 < (pixels < 128).mean() < 0.9, "something is drawn, on white"
        plots.save_figure(again[name], tmp_path / "again.png")
        first = (tmp_path / "made" / "here" / f"{name}.png").read_bytes()
        assert first == (tmp_path / "again.png").read_bytes()
        assert b"matplotlib" not in first
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        figure = plots.learning_rate([1, 2], [0.1, 0.01])
        plots.save_figure(figure, tmp_path / "theirs.png")
    ours = (tmp_path / "made" / "here" / "learning_rate.png").read_bytes()
    assert (tmp_path / "theirs.png").read_bytes() == ours, "the user's style changes nothing"


def test_laying_a_figure_out_by_itself_changes_no_byte_and_nothing_about_it() -> None:
    """Against what matplotlib does by itself: draw all of it once to have it laid out."""
    one, two = examples(), examples()
    for name in ("curves", "confusion", "activations"):
        figure, theirs, buffer = one[name], two[name], io.BytesIO()
        layout = figure.get_layout_engine()
        ours = plots.encode_png(figure)
        with style._our_style(), matplotlib.rc_context(style.VECTOR):
            FigureCanvasAgg(theirs)
            kept = {"metadata": plots.FORMATS["png"], "pil_kwargs": {"compress_level": 4}}
            theirs.savefig(buffer, format="png", dpi=150, **kept)
        assert ours == buffer.getvalue(), name
        assert figure.get_layout_engine() is layout


@pytest.mark.parametrize(("kind", "begins"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_vector_figures_are_the_same_bytes_each_time(
    kind: str, begins: bytes, tmp_path: Path
) -> None:
    for draw in (
        lambda: plots.curves(history(3), 2, "run"),
        lambda: plots.activations(pictures(1)[0], [panel()], "run", "cat", "max: 1"),
    ):
        written = []
        for turn in range(2):
            plots.save_figure(draw(), tmp_path / f"{turn}.{kind}")
            written.append((tmp_path / f"{turn}.{kind}").read_bytes())
        assert written[0] == written[1]
        assert written[0].startswith(begins)
        assert b"CreationDate" not in written[0]
        assert b"<dc:date>" not in written[0]
    with pytest.raises(UsageError, match="no figures of format 'gif'"):
        plots.save_figure(plots.curves(history(3)), tmp_path / "plot.gif")


def test_a_mosaic_holds_each_channel_as_squares_of_one_colour() -> None:
    values = np.float32([[[0, 1], [2, 4]], [[4, 0], [0, 0]], [[0, 0], [0, 0]]])
    drawn = style.tiles(values, (0.0, 4.0), 6)
    assert drawn.shape == (3, 6, 6, 3)
    colors = (np.array(matplotlib.colormaps["viridis"]([0, 64, 128, 255]))[:, :3] * 255).round()
    for number, (y, x) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        block = drawn[0, y : y + 3, x : x + 3].reshape(-1, 3)
        np.testing.assert_allclose(block, np.broadcast_to(colors[number], block.shape), atol=2)
    assert (style.tiles(values - 2, (-2.0, 2.0), 2)[0, 1, 0] > 240).all(), "0 is white"
    whole = style.mosaic(drawn, 2, gap=2)
    assert whole.shape == (14, 14, 3)
    assert (whole[6:8] == 255).all()
    np.testing.assert_array_equal(whole[8:, :6], drawn[2])
    # Larger maps than tiles are averaged.
    checks = np.indices((8, 8)).sum(0)[None] % 2
    grey = style.tiles(checks.astype(np.float32), (0.0, 1.0), 4)
    half = style.tiles(np.full((1, 4, 4), 0.5, np.float32), (0.0, 1.0), 4)
    np.testing.assert_array_equal(grey, half)


def test_blank_and_broken_channels_are_marked(tmp_path: Path) -> None:
    marks = [np.arange(4) == place for place in (1, 2)]
    given = maps(4)
    given[2] = np.nan
    shown = plots.Panel("layer", "note", given, (-1.0, 1.0), *marks)
    figure = plots.activations(pictures(1)[0], [shown], "run", "words", "scale")
    said = texts(figure.axes[0])
    assert {"blank channel", "NaN or infinite"} <= set(said)
    drawn = png(figure, tmp_path).reshape(-1, 3)
    assert (drawn == style.BROKEN).all(1).sum() > 1000
    assert (drawn == style.PAPER).all(1).sum() > 1000
    plain = png(plots.activations(pictures(1)[0], [panel()]), tmp_path).reshape(-1, 3)
    assert not (plain == style.BROKEN).all(1).any()


def test_dpi_and_folders_that_can_not_be_written(tmp_path: Path) -> None:
    figure = plots.learning_rate([1, 2], [0.1, 0.01])
    assert png(figure, tmp_path, dpi=100).shape == (280, 520, 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError):
        plots.save_figure(figure, tmp_path / "file" / "plot.png")


def test_pyplot_stays_out() -> None:
    code = (
        "import sys; from convlens import plots; plots.learning_rate([1], [1]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("epochs", [1, 2, 15, 250])
def test_curves_show_the_history(epochs: int, tmp_path: Path) -> None:
    given, chosen = history(epochs), (epochs + 1) // 2
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
        assert texts(axes) == [f"epoch {chosen}: {shown}"]
        assert axes.get_xlabel() == "epoch"
    png(figure, tmp_path)
    ticks = [tick for axes in figure.axes for tick in axes.get_xticks()]
    assert all(tick == round(tick) for tick in ticks)


def test_curves_with_gaps(tmp_path: Path) -> None:
    given = history(5)
    given["train_accuracy"] = [math.nan] * 5
    del given["train_loss"]
    given["val_loss"][2] = math.nan
    loss, accuracy = plots.curves(given, 3).axes
    assert [line.get_label() for line in loss.lines[:-1]] == ["validation"]
    assert [line.get_label() for line in accuracy.lines[:-1]] == ["validation"]
    assert texts(loss) == ["epoch 3"]
    png(plots.curves({"epoch": []}, 1), tmp_path)
    assert all(not axes.texts for axes in plots.curves(given).axes)


def test_seed_curves_average_what_all_seeds_reached(tmp_path: Path) -> None:
    first, second = history(4), history(3)
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
    png(figure, tmp_path)
    alone = plots.seed_curves([first]).axes[0]
    assert not alone.collections
    with pytest.raises(UsageError):
        plots.seed_curves([])


def test_variants_are_overlaid_each_with_a_look_of_its_own(tmp_path: Path) -> None:
    first, second = history(4), history(3)
    second["val_accuracy"] = [value + 0.2 for value in second["val_accuracy"]]
    figure = plots.variant_curves({"both": [first, second], "one": [history(6)]}, "x", "2 seeds")
    loss, accuracy = figure.axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == (
        "validation loss (nats)",
        "validation accuracy",
    )
    both, one = accuracy.lines
    np.testing.assert_allclose(both.get_ydata(), np.array(first["val_accuracy"][:3]) + 0.1)
    np.testing.assert_array_equal(one.get_ydata(), history(6)["val_accuracy"])
    (band,) = accuracy.collections  # of one run there is no deviation
    at_first = band.get_paths()[0].vertices
    at_first = at_first[at_first[:, 0] == 1][:, 1]
    assert at_first.max() - at_first.min() == pytest.approx(0.2 * math.sqrt(2))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["both", "one"]
    assert "mean ± sd of 2 seeds" in loss.get_title(loc="left")
    png(figure, tmp_path)
    many = plots.variant_curves({f"variant {n}": [history(2)] for n in range(28)}).axes[0]
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in many.lines}
    assert len(looks) == 28
    with pytest.raises(UsageError):
        plots.variant_curves({})
    with pytest.raises(UsageError):
        plots.variant_curves({"a": []})


def test_variants_without_validation_show_their_training() -> None:
    given = {**history(3), "val_loss": [math.nan] * 3, "val_accuracy": [math.nan] * 3}
    loss = plots.variant_curves({"a": [given], "b": [given]}).axes[0]
    assert loss.get_ylabel() == "training loss (nats)"
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), given["train_loss"])


def test_the_names_of_variants_stay_on_the_paper() -> None:
    names = [f"RandomAdjustSharpness-{n}" for n in range(9)]
    figure = plots.variant_curves({name: [history(2)] for name in names})
    figure.savefig(io.BytesIO())
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_learning_rate_of_steps() -> None:
    steps = np.arange(1000)
    axes = plots.learning_rate(steps, np.cos(steps / 999), unit="step").axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), np.cos(steps / 999))
    assert axes.get_xlabel() == "step"


def test_small_confusion_has_counts_in_its_cells(tmp_path: Path) -> None:
    matrix = np.array([[8, 2, 0], [0, 0, 0], [1, 4, 1_234_567]])
    figure = plots.confusion(matrix, ["cat", "$dog$", "eel"], "test")
    axes = figure.axes[0]
    assert texts(axes) == ["8", "2", "0", "0", "0", "0", "1", "4", "1.2M"]
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(shares[0], [0.8, 0.2, 0])
    assert shares.mask.tolist() == [[False] * 3, [True] * 3, [False] * 3], "no images: grey"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", r"\$dog\$", "eel"]
    png(figure, tmp_path)
    assert len(plots.confusion(np.eye(20) * 100, list("abcdefghijklmnopqrst")).axes[0].texts) == 400
    with pytest.raises(UsageError):
        plots.confusion(matrix, ["cat", "dog"])


@pytest.mark.parametrize("classes", [21, 200, 1000])
def test_large_confusion_lists_the_worst_pairs(classes: int, tmp_path: Path) -> None:
    matrix = np.eye(classes, dtype=np.int64) * 50
    matrix[3, 7], matrix[5, 2] = 9, 11
    figure = plots.confusion(matrix, [f"c{index}" for index in range(classes)], "test")
    axes, pairs = figure.axes[0], next(a for a in figure.axes if "confused" in a.get_title("left"))
    assert not axes.texts
    assert len(axes.get_xticks()) <= 40
    assert texts(pairs) == ["11 of 61", "c5 → c2", "9 of 59", "c3 → c7"]
    png(figure, tmp_path)
    perfect = plots.confusion(np.eye(classes), ["$"] * classes)
    assert "nothing was confused" in [axes.get_title("left") for axes in perfect.axes]


def test_reliability_leaves_empty_bins_out(tmp_path: Path) -> None:
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
    png(figure, tmp_path)
    png(plots.reliability([math.nan] * 3, [math.nan] * 3, [0, 0, 0], 0), tmp_path)


def test_accuracy_bars_show_intervals(tmp_path: Path) -> None:
    figure = plots.accuracy_bars(
        ["a", "b", "none"], [0.5, 1.0, None], [(0.4, 0.6), (0.9, 1.0), (0.0, 1.0)]
    )
    axes = figure.axes[0]
    assert texts(axes) == ["50.00%", "100.00%", "–"]
    ends = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(ends[0], [[0.4, 0], [0.6, 0]])
    np.testing.assert_allclose(ends[1], [[0.9, 1], [1.0, 1]])
    png(figure, tmp_path)
    many = plots.accuracy_bars([f"c{i}" for i in range(200)], [0.5] * 200, [(0.4, 0.6)] * 200)
    assert png(many, tmp_path).shape[0] < 6000


@pytest.mark.parametrize(("size", "channels", "times"), [(8, 1, 15), (28, 1, 4), (64, 3, 2)])
def test_small_pictures_are_enlarged_exactly(
    size: int, channels: int, times: int, tmp_path: Path
) -> None:
    given = pictures(5, channels, size)
    pixels = png(plots.contact_sheet(given, [""] * 5, columns=3), tmp_path)
    painted = (pixels < 255).all(axis=2)
    rows, columns = painted.any(axis=1), painted.any(axis=0)
    assert (rows.sum(), columns.sum()) == (2 * size * times, 3 * size * times)
    pixels = pixels[rows][:, columns]
    side = size * times
    for index, picture in enumerate(given):
        row, column = divmod(index, 3)
        tile = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
        expected = np.kron(np.moveaxis(picture, 0, 2), np.ones((times, times, 1), np.uint8))
        np.testing.assert_array_equal(tile, np.broadcast_to(expected, tile.shape))


def test_large_pictures_are_averaged(tmp_path: Path) -> None:
    given = np.zeros((1, 3, 256, 256), np.uint8)
    given[:, :, ::2] = 100
    pixels = png(plots.contact_sheet(given, [""]), tmp_path)
    painted = (pixels == 50).all(axis=2)
    assert painted.sum() == 128 * 128


def test_sheets_of_any_length(tmp_path: Path) -> None:
    none = pictures(0)
    for figure in (
        plots.contact_sheet(none, [], "sheet"),
        plots.augmented_batch(none, none),
        plots.worst_mistakes(none, [], [], [], "no mistakes at all"),
    ):
        assert "none" in texts(figure.axes[0])
        png(figure, tmp_path)
    for n in (1, 7, 8, 9, 65):
        figure = plots.contact_sheet(pictures(n), ["name"] * n, columns=8)
        assert texts(figure.axes[0]) == ["name"] * n
        png(figure, tmp_path)


def test_mistakes_and_augmented_batches_say_what_is_what(tmp_path: Path) -> None:
    figure = plots.worst_mistakes(pictures(2), ["cat", "a$b"], ["dog", "L" * 99], [0.987, 0.5])
    said = texts(figure.axes[0])
    assert said[:3] == ["99% dog", "is cat", said[2]]
    assert said[2].startswith("50% LL")
    assert said[2].endswith("…")
    assert said[3] == r"is a\$b"
    before, after = pictures(5), pictures(5, seed=1)
    sheet = plots.augmented_batch(before, after, columns=3)
    assert texts(sheet.axes[0]) == ["original", "augmented"] * 2
    canvas = sheet.axes[0].images[0].get_array()
    found = canvas[(canvas < 255).all(axis=2)]
    given = np.concatenate([np.moveaxis(part, 1, 3).reshape(-1, 3) for part in (before, after)])
    assert len(found) == len(given) * 15 * 15
    assert {tuple(pixel) for pixel in found.tolist()} == {tuple(pixel) for pixel in given.tolist()}
    with pytest.raises(UsageError):
        plots.augmented_batch(before, after[:3])


def test_augmented_batches_name_classes_and_what_was_mixed() -> None:
    before, after = pictures(3), pictures(3, seed=1)
    mixed = [[("cat", 1.0)], [("dog", 0.625), ("cat", 0.375)], [("a$b", 0.5), ("dog", 0.5)]]
    sheet = plots.augmented_batch(
        before, after, columns=2, labels=["cat", "dog", "a$b"], mixed=mixed
    )
    texts_at = {t.get_text(): t.get_position() for t in sheet.axes[0].texts[:5]}
    assert [t.get_text() for t in sheet.axes[0].texts] == [
        "cat",
        "dog",
        "100% cat",
        "62% dog",
        "38% cat",
        r"a\$b",
        r"50% a\$b",
        "50% dog",
        *["original", "augmented"] * 2,
    ]
    # The last line of each caption stands on its picture, whatever the number of lines.
    assert texts_at["100% cat"][1] == texts_at["38% cat"][1] > texts_at["62% dog"][1]
    assert texts_at["62% dog"][0] == texts_at["dog"][0] > texts_at["cat"][0]


def test_pictures_of_the_wrong_kind() -> None:
    for wrong in (
        np.zeros((2, 3, 8, 8), np.float32),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
    ):
        with pytest.raises(UsageError, match="pictures must be"):
            plots.contact_sheet(wrong, ["a"] * len(wrong))
    with pytest.raises(UsageError, match="1 titles for 2"):
        plots.contact_sheet(pictures(2), ["a"])


@pytest.mark.filterwarnings("error")
def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    n = len(HOSTILE)
    table = np.eye(n, dtype=np.int64)
    many = HOSTILE * 2
    for figure in (
        plots.contact_sheet(pictures(n), HOSTILE, HOSTILE[0]),
        plots.worst_mistakes(pictures(n), HOSTILE, HOSTILE[::-1], [0.5] * n, HOSTILE[1]),
        plots.confusion(table, HOSTILE, HOSTILE[1]),
        plots.confusion(np.ones((2 * n, 2 * n)), many, HOSTILE[3]),
        plots.accuracy_bars(HOSTILE, [0.5] * n, [(0.4, 0.6)] * n, HOSTILE[1]),
        plots.curves(history(3), 2, HOSTILE[1]),
        plots.seed_curves([history(3)] * 2, HOSTILE[1]),
        plots.variant_curves({name: [history(3)] for name in HOSTILE}, HOSTILE[1]),
    ):
        png(figure, tmp_path)


def test_names_are_cut_to_their_room() -> None:
    assert fit_text("daisy", 10) == "daisy"
    assert fit_text("$5", 10) == r"\$5"
    assert fit_text("x" * 99, 5, before="98% ", after="!").startswith("98% x")
    for name in HOSTILE:
        cut = fit_text(name, 8)
        assert text_width(cut.replace(r"\$", "$")) <= 8
        assert cut.replace("…", "").isprintable()


def test_width_is_not_less_than_drawn() -> None:
    """The estimate must err on the wide side, or names run into each other."""
    figure = Figure(dpi=72)
    for words in ("American_Staffordshire_terrier", "automobile", "WWWW", "0123456789", "Émeu"):
        text = figure.text(0, 0, words, fontsize=100, family="DejaVu Sans")
        figure.savefig(io.BytesIO())
        drawn = text.get_window_extent().width / 100
        assert drawn * 0.97 <= text_width(words) <= drawn * 1.25


def test_differences_stand_in_points_with_their_intervals(tmp_path: Path) -> None:
    gains = {
        "worse$": (-0.02, (-0.03, -0.01), True),
        "like it": (0.005, (-0.01, 0.02), False),
        "untested": (0.5, None, False),
    }
    figure = plots.differences(gains, "the first")
    axes = figure.axes[0]
    assert texts(axes) == ["\N{MINUS SIGN}2.00", "+0.50", "+50.00"]
    reaches = [c.get_segments()[0][:, 0].tolist() for c in axes.collections]
    assert reaches == [pytest.approx([-3, -1]), pytest.approx([-1, 2])]
    filled = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"]
    assert filled == ["#0072B2", "white", "white"]
    png(figure, tmp_path)
    for name in HOSTILE:
        png(plots.differences({name: (0.0, (-0.1, 0.1), False)}, name), tmp_path)
    with pytest.raises(UsageError):
        plots.differences({}, "a")
