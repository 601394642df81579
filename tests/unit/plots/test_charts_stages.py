"""Figures of measurements hold what they were given, whatever the names and however many."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from convlens import plots
from convlens.errors import UsageError
from convlens.plots import StageLine

NAN = math.nan
HOSTILE = "$x$_{a}^\\frac{1}{\N{SUNFLOWER}\udcff\n" + "W" * 100


def line(name: str, count: int, *, dashed: bool = False) -> StageLine:
    values = [(0.1 * i, 0.1 * i - 0.05, 0.1 * i + 0.05) for i in range(count)]
    stages = [f"layer{i}" for i in range(count)]
    return StageLine(name, stages, {"probe": values, "rank": [(NAN, NAN, NAN)] * count}, dashed)


def test_each_network_has_a_line_with_its_intervals(tmp_path: Path) -> None:
    panels = {"probe": ("accuracy", "percent"), "rank": ("rank", "log")}
    lines = [line("one", 3), line(HOSTILE, 7), line("one, untrained", 3, dashed=True)]
    figure = plots.stage_measures(lines, panels, "what was measured")
    plots.save_figure(figure, tmp_path / "x.png")
    probe, rank = figure.axes
    assert [len(drawn.get_xdata()) for drawn in probe.lines] == [3, 7, 3]
    np.testing.assert_allclose(probe.lines[1].get_ydata(), 0.1 * np.arange(7))
    # The shallow network is spread over the deep one's stages.
    assert np.diff(np.asarray(probe.lines[0].get_xdata())) == pytest.approx([3, 3])
    assert [text.get_text() for text in probe.get_xticklabels()] == [f"layer{i}" for i in range(7)]
    ends = probe.collections[0].get_segments()
    np.testing.assert_allclose(
        [s[:, 1] for s in ends], [(0.1 * i - 0.05, 0.1 * i + 0.05) for i in range(3)]
    )
    assert probe.lines[2].get_linestyle() == "--"
    assert len({drawn.get_color() for drawn in probe.lines}) == 3
    assert [text.get_text() for text in rank.texts] == ["nothing to measure"]
    with pytest.raises(UsageError, match="no measurements"):
        plots.stage_measures([], panels)


@pytest.mark.parametrize("networks", [1, 3, 12])
def test_one_measure_or_many_networks_still_make_a_figure(networks: int, tmp_path: Path) -> None:
    lines = [line(f"network {i}", 1 + i) for i in range(networks)]
    plots.save_figure(
        plots.stage_measures(lines, {"probe": ("accuracy", "percent")}), tmp_path / "x.png"
    )
    five = {name: (name, "number") for name in "abcde"}
    lines = [each._replace(values=dict.fromkeys(five, each.values["probe"])) for each in lines]
    plots.save_figure(plots.stage_measures(lines, five, "note"), tmp_path / "y.png")


@pytest.mark.parametrize("count", [1, 3, 40])
def test_similarities_are_shown_cell_by_cell(count: int, tmp_path: Path) -> None:
    matrix: list[list[float | None]] = [[1.0] * count for _ in range(count)]
    matrix[0][-1] = None if count > 1 else 1.0
    stages = [("a" if i < 2 else HOSTILE, f"layer{i}") for i in range(count)]
    figure = plots.similarity(matrix, stages, "CKA")
    plots.save_figure(figure, tmp_path / "x.png")
    image = figure.axes[0].images[0].get_array()
    assert image is not None
    assert image.shape == (count, count)
    assert np.ma.getmaskarray(image).sum() == (count > 1)
    written = [text for text in figure.axes[0].texts if text.get_text() == "1.00"]
    assert len(written) == (count * count - (count > 1) if count <= 12 else 0)
    with pytest.raises(UsageError, match="similarities of shape"):
        plots.similarity(matrix, stages[1:])


@pytest.mark.parametrize("classes", [1, 2, 20, 60])
def test_embeddings_show_classes_and_ring_mistakes(classes: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(3 * classes) % classes
    preds = labels.copy()
    preds[: min(2, classes - 1)] += 1
    names = [HOSTILE, *(f"class {i}" for i in range(1, classes))]
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
