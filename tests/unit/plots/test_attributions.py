"""Attribution maps over images: interpolation, scales, colors and captions."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from convlens import plots
from convlens.plots import attributions
from convlens.plots.attributions import (
    AttributionColumn,
    AttributionPanel,
    attribution_grid,
    map_scale,
    upsample,
)

HOSTILE_NAMES = ["$x$", "a_{b}^{c}", "line\nbreak", "\udcff", "日本語", "", "W" * 200]


def draw_grid(
    panels: list[AttributionPanel], names: list[tuple[str, str]]
) -> tuple[np.ndarray, list[str]]:
    figure = attribution_grid(names, panels)
    plots.save_figure(figure, Path("grid.png"))
    with Image.open("grid.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels, [text.get_text() for text in figure.axes[0].texts]


def make_panel(
    maps: np.ndarray, signed: bool = False, gray: int = 100, size: int = 40
) -> AttributionPanel:
    images = np.full((len(maps), 3, size, size), gray, dtype=np.uint8)
    return AttributionPanel(
        "net", images, [AttributionColumn("M", "", maps, signed)], [("cat", 0.5)] * len(maps)
    )


@pytest.mark.parametrize("size", [1, 3, 4, 7, 16])
def test_coarse_maps_are_interpolated_as_torch_does(size: int) -> None:
    values = np.random.default_rng(0).normal(size=(size, size))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], (120, 112), mode="bilinear"
    )[0, 0]
    np.testing.assert_allclose(upsample(values, 120, 112), expected.numpy(), atol=1e-12)


def test_fine_maps_are_repeated_or_averaged() -> None:
    values = np.random.default_rng(0).normal(size=(32, 32))
    assert (upsample(values, 128, 128) == values.repeat(4, 0).repeat(4, 1)).all()
    large = values.repeat(7, 0).repeat(7, 1)  # 224
    np.testing.assert_allclose(
        upsample(large, 112, 112), large.reshape(112, 2, 112, 2).mean((1, 3))
    )


def test_scale_ends_at_a_high_percentile() -> None:
    values = np.zeros((32, 32))
    values[0, :10] = -3  # a percent
    values[5, 5] = 1000
    assert map_scale(values) == 3
    values[0, :10] = 0
    assert map_scale(values) == 1000, "a single pixel is visible, too"
    assert map_scale(np.zeros((4, 4))) == 0


@pytest.mark.parametrize(("signed", "name"), [(False, "viridis"), (True, "PuOr_r")])
def test_colors_are_those_of_the_map_over_the_image_in_gray(signed: bool, name: str) -> None:
    colors = matplotlib.colormaps[name]
    values = np.zeros((1, 40, 40))
    values[0, :20] = 2.0
    values[0, 30:] = -2.0 if signed else 0.0
    pixels, texts = draw_grid([make_panel(values, signed)], [("a", "cat")])
    for share in (1.0, 0.0, -1.0 if signed else 0.0):
        position = (share + 1) / 2 if signed else share
        expected = 0.6 * 255 * np.array(colors(position)[:3]) + 0.4 * 100
        distance = np.abs(pixels.astype(float) - expected).max(axis=2)
        assert (distance <= 1).sum() >= 10 * 3 * 40 * 3, share
    assert ("±2" in texts) == signed
    assert ("to 2" in texts) != signed
    assert {"net", "a", "is cat", "cat 50%", "M"} <= set(texts)


def test_grid_of_blank_maps_hostile_names_and_several_models() -> None:
    rows = [(name, name) for name in HOSTILE_NAMES]
    blank = np.zeros((len(rows), 4, 4))
    panels = [
        AttributionPanel(
            name,
            np.zeros((len(rows), channels, size, size), dtype=np.uint8),
            [
                AttributionColumn(name, name, blank, False),
                AttributionColumn("Two words", "", blank, True),
            ],
            [(name, 1.0) for name in HOSTILE_NAMES],
        )
        for name, channels, size in (("$a$", 1, 28), ("W" * 300, 3, 224), ("c", 3, 32))
    ]
    pixels, texts = draw_grid(panels, rows)
    assert "0 everywhere" in texts
    assert {"Two", "words"} <= set(texts)
    assert pixels.shape[1] > 7 * 112
    assert attributions.HEATMAP_WEIGHT < 1


def test_unknown_true_class_is_not_written() -> None:
    _, texts = draw_grid([make_panel(np.ones((1, 3, 3)))], [("file.png", "")])
    assert "file.png" in texts
    assert not any(text.startswith("is ") for text in texts)


def test_sanity_figure_shows_the_given_similarities_and_curves() -> None:
    left = {
        "spearman": {"A": [(0.5, (0.4, 0.7)), (0.1, None)]},
        "ssim": {"A": [(0.6, None), (float("nan"), None)]},
    }
    curve = np.linspace(0.9, 0.1, 33)
    curves = {key: {"A": curve, "random order": curve[::-1]} for key in ("deletion", "insertion")}
    figure = plots.attribution_sanity(["fc", "layer1"], left, curves, "net")
    plots.save_figure(figure, Path("sanity.png"))
    first, _, deletion, insertion = figure.axes
    lines = [list(line.get_ydata()) for line in first.lines]
    assert [1, 0.5, 0.1] in lines, "the means"
    assert [1, 0.4, 0.1] in lines, "the lower ends"
    assert [1, 0.7, 0.1] in lines, "the upper ends"
    assert [label.get_text() for label in first.get_xticklabels()] == ["trained", "fc", "layer1"]
    assert (deletion.lines[0].get_ydata() == curve).all()
    assert (insertion.lines[1].get_ydata() == curve[::-1]).all()
    assert "low is good" in deletion.get_title(loc="left")
