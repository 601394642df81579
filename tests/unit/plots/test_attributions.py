"""Maps over pictures: interpolation, scales and colours are what the words beside them say."""

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

HOSTILE = ["$x$", "a_{b}^{c}", "line\nbreak", "\udcff", "日本語", "", "W" * 200]


def drawn(
    panels: list[AttributionPanel], names: list[tuple[str, str]]
) -> tuple[np.ndarray, list[str]]:
    figure = attribution_grid(names, panels)
    plots.save_figure(figure, Path("grid.png"))
    with Image.open("grid.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels, [text.get_text() for text in figure.axes[0].texts]


def panel(
    maps: np.ndarray, signed: bool = False, grey: int = 100, size: int = 40
) -> AttributionPanel:
    pictures = np.full((len(maps), 3, size, size), grey, dtype=np.uint8)
    return AttributionPanel(
        "net", pictures, [AttributionColumn("M", "", maps, signed)], [("cat", 0.5)] * len(maps)
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


def test_the_scale_ends_where_few_pixels_are_beyond() -> None:
    values = np.zeros((32, 32))
    values[0, :10] = -3  # a percent
    values[5, 5] = 1000
    assert map_scale(values) == 3
    values[0, :10] = 0
    assert map_scale(values) == 1000, "a single point is seen, too"
    assert map_scale(np.zeros((4, 4))) == 0


@pytest.mark.parametrize(("signed", "name"), [(False, "viridis"), (True, "PuOr_r")])
def test_colours_are_the_map_s_over_the_picture_in_grey(signed: bool, name: str) -> None:
    colors = matplotlib.colormaps[name]
    values = np.zeros((1, 40, 40))
    values[0, :20] = 2.0
    values[0, 30:] = -2.0 if signed else 0.0
    pixels, words = drawn([panel(values, signed)], [("a", "cat")])
    for share in (1.0, 0.0, -1.0 if signed else 0.0):
        place = (share + 1) / 2 if signed else share
        expected = 0.6 * 255 * np.array(colors(place)[:3]) + 0.4 * 100
        far = np.abs(pixels.astype(float) - expected).max(axis=2)
        assert (far <= 1).sum() >= 10 * 3 * 40 * 3, share
    assert ("±2" in words) == signed
    assert ("to 2" in words) != signed
    assert {"net", "a", "is cat", "cat 50%", "M"} <= set(words)


def test_blank_maps_hostile_names_and_many_models() -> None:
    rows = [(name, name) for name in HOSTILE]
    blank = np.zeros((len(rows), 4, 4))
    panels = [
        AttributionPanel(
            name,
            np.zeros((len(rows), channels, size, size), dtype=np.uint8),
            [
                AttributionColumn(name, name, blank, False),
                AttributionColumn("Two words", "", blank, True),
            ],
            [(each, 1.0) for each in HOSTILE],
        )
        for name, channels, size in (("$a$", 1, 28), ("W" * 300, 3, 224), ("c", 3, 32))
    ]
    pixels, words = drawn(panels, rows)
    assert "0 everywhere" in words
    assert {"Two", "words"} <= set(words)
    assert pixels.shape[1] > 7 * 112
    assert attributions.HEAT < 1


def test_an_unknown_truth_is_not_written() -> None:
    _, words = drawn([panel(np.ones((1, 3, 3)))], [("file.png", "")])
    assert "file.png" in words
    assert not any(word.startswith("is ") for word in words)


def test_what_is_left_of_maps_and_curves_are_drawn_as_given() -> None:
    left = {
        "spearman": {"A": [(0.5, (0.4, 0.7)), (0.1, None)]},
        "ssim": {"A": [(0.6, None), (float("nan"), None)]},
    }
    curve = np.linspace(0.9, 0.1, 33)
    curves = {key: {"A": curve, "random order": curve[::-1]} for key in ("deletion", "insertion")}
    figure = plots.attribution_sanity(["fc", "layer1"], left, curves, "net")
    plots.save_figure(figure, Path("sanity.png"))
    first, _, deletion, insertion = figure.axes
    lines = [list(each.get_ydata()) for each in first.lines]
    assert [1, 0.5, 0.1] in lines, "the means"
    assert [1, 0.4, 0.1] in lines, "the lower ends"
    assert [1, 0.7, 0.1] in lines, "the upper ends"
    assert [label.get_text() for label in first.get_xticklabels()] == ["trained", "fc", "layer1"]
    assert (deletion.lines[0].get_ydata() == curve).all()
    assert (insertion.lines[1].get_ydata() == curve[::-1]).all()
    assert "low is good" in deletion.get_title(loc="left")
