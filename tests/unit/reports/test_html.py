"""HTML parts of a page: templates, embedded JSON, charts and thumbnails."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import tomllib
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convlens import reports
from convlens.reports import html
from convlens.reports.html import (
    CHART_HEIGHT,
    CHART_WIDTH,
    MARGIN_BOTTOM,
    MARGIN_LEFT,
    MARGIN_RIGHT,
    MARGIN_TOP,
    ChartLine,
    PageFigure,
    _environment,
    embed_json,
    line_chart,
    reliability_chart,
    render_figures,
)
from helpers.reports import split_of


def test_json_in_a_page_cannot_end_its_script() -> None:
    content = {"</script><!--": ["<b>&'\"", "\u2028", "ü"]}
    text = embed_json(content)
    assert json.loads(text) == content
    assert not {"<", ">", "&", "'"} & set(text)
    assert text.isascii()


def test_every_template_is_packaged_and_escapes_its_values() -> None:
    folder = resources.files("convlens.reports") / "templates"
    names = [file.name for file in folder.iterdir()]
    assert {"page.html", "page.css", "page.js"} <= set(names)
    project = Path(str(reports.__file__)).parents[3] / "pyproject.toml"
    if project.exists():  # absent where the package is installed
        globs = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["convlens"]
        shipped = [f"reports/templates/{name}" for name in names]
        assert all(any(fnmatch(path, glob) for glob in globs) for path in shipped)
    for name in names:
        if name.endswith(".html"):
            assert _environment().get_template(name)
            source = (folder / name).read_text("utf-8")
            assert "|safe" not in source.replace(" ", "")


def test_finished_thumbnailsbecome_a_section() -> None:
    figures = [
        PageFigure(b"\x89PNG....", "text <alternative>", "below"),
        PageFigure(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "drawn"),
    ]
    html = render_figures(figures, "lead")
    assert html is not None
    assert "data:image/png;base64,iVBORy4uLi4=" in html
    assert "data:image/svg+xml;base64," in html
    assert "text &lt;alternative&gt;" in html
    assert render_figures([]) is None
    with pytest.raises(ValueError, match="PNG"):
        render_figures([PageFigure(b"GIF89a", "x")])


def test_chart_draws_values_at_their_coordinates() -> None:
    svg = line_chart([1, 2, 3], [ChartLine("a", "train", [0.0, 1.0, 0.5])], "Loss", mark=2)
    left, right = MARGIN_LEFT, CHART_WIDTH - MARGIN_RIGHT
    top, bottom = MARGIN_TOP, CHART_HEIGHT - MARGIN_BOTTOM
    middle = (left + right) / 2
    path = re.search(r'd="([^"]+)"', svg)
    assert path is not None
    points = [tuple(map(float, p.split())) for p in re.findall(r"[ML]([\d.]+ [\d.]+)", path[1])]
    assert points == [(left, bottom), (middle, top), (right, pytest.approx((top + bottom) / 2))]
    assert f'class="mark" x1="{middle:.0f}"' in svg


def test_values_that_are_not_finite_are_gaps_in_a_chart() -> None:
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 2.0, 1.0]
    svg = line_chart(list(range(1, 8)), [ChartLine("a", "val", values)], "Loss")
    path = re.search(r'd="([^"]+)"', svg)
    assert path is not None
    assert re.sub("[^ML]", "", path[1]) == "MLML"
    assert svg.count('class="val dot"') == 1  # the 3 stands alone
    assert "nan" not in svg
    assert "inf" not in svg
    assert line_chart([1], [ChartLine("a", "val", [math.nan])], "Loss") == ""


@pytest.mark.parametrize("values", [[0.5], [3.0, 3.0], [0.0], [1e-9, 1e9], [-1.0, 2.0]])
def test_values_of_any_range_can_be_drawn(values: list[float]) -> None:
    svg = line_chart(list(range(1, len(values) + 1)), [ChartLine("a", "c0", values)], "x")
    assert "nan" not in svg
    heights = [float(y) for y in re.findall(r'class="grid"[^>]*y1="([\d.-]+)"', svg)]
    assert heights
    assert all(0 <= y <= CHART_HEIGHT for y in heights)


def test_names_in_a_chart_are_escaped() -> None:
    svg = line_chart([1, 2], [ChartLine('"><script>', "c0", [1, 2])], "x")
    assert "<script>" not in svg


def test_bars_of_calibration_are_as_high_as_the_accuracy() -> None:
    svg = reliability_chart([0.25, math.nan], [1.0, math.nan], [4, 0])
    height = CHART_HEIGHT - MARGIN_TOP - MARGIN_BOTTOM
    assert re.findall(r'class="bar"[^>]*height="([\d.]+)"', svg) == [str(height)]
    assert "4 of 4 images, mean confidence 25.0%, accuracy 100.0%" in svg


def decode(uri: str) -> np.ndarray:
    content = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("channels", [1, 3])
def test_small_thumbnails_keep_every_pixel(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 28, 32), dtype=np.uint8)
    shown = decode(html.thumbnail(pixels))
    assert shown.shape == (28, 32, 3)
    assert np.array_equal(
        np.moveaxis(shown, 2, 0), pixels if channels == 3 else pixels.repeat(3, 0)
    )


def test_large_thumbnails_are_reduced() -> None:
    shown = decode(html.thumbnail(np.full((3, 300, 200), 128, np.uint8)))
    assert shown.shape == (96, 64, 3)
    assert abs(int(shown.mean()) - 128) <= 2


def test_image_is_encoded_with_the_side_that_was_asked_for() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 300, 150), dtype=np.uint8)
    for side, expected in ((512, (150, 300)), (200, (100, 200))):
        content, media_type = html.encode_image(pixels, side)
        image = Image.open(io.BytesIO(content))
        assert (image.size, f"image/{image.format}".lower()) == (expected, media_type)


def test_cells_show_fewer_images_if_the_page_would_be_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 16, 16), generator=random, dtype=torch.uint8)
    images, cells = split_of(pixels), {"0-0": list(range(25)), "0-1": [30, 31, 32]}
    sources = html.cell_thumbnails(images, cells)
    assert {key: len(thumbnails) for key, thumbnails in sources.items()} == {"0-0": 20, "0-1": 3}
    size = len(sources["0-0"][0])
    monkeypatch.setattr(html, "THUMBNAIL_BUDGET_BYTES", size * 15 // 2 * 3 // 4)
    fewer = html.cell_thumbnails(images, cells)
    assert {key: len(thumbnails) for key, thumbnails in fewer.items()} == {"0-0": 4, "0-1": 3}
    monkeypatch.setattr(html, "THUMBNAIL_BUDGET_BYTES", 1)
    least = html.cell_thumbnails(images, cells)
    assert {key: len(thumbnails) for key, thumbnails in least.items()} == {"0-0": 1, "0-1": 1}
