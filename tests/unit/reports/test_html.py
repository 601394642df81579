"""The drawn parts of a report, by numbers: charts, confusion, thumbnails, paired differences."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convlens import recipe
from convlens.data.dataset import Split
from convlens.evaluation import CachedPredictions
from convlens.metrics import newcombe_interval, summarize
from convlens.reports import compare, html as reports_html, sections
from convlens.reports.contents import ReportContents
from convlens.reports.html import (
    BOTTOM,
    HIGH,
    LEFT,
    RIGHT,
    TOP,
    WIDE,
    ChartLine,
    line_chart,
    reliability_chart,
)
from convlens.run import RunDir
from helpers.support import Memory


def judged(name: str, said: list[int], labels: list[int], classes: int = 2) -> ReportContents:
    """A run that said these classes, each with the same confidence."""
    logits = np.zeros((len(said), classes), np.float32)
    logits[np.arange(len(said)), said] = 1
    found = ReportContents(RunDir(Path("models") / name), split="test")
    found.facts = {"data": {"classes": [f"class {k}" for k in range(classes)]}}
    found.answers = CachedPredictions(logits, np.array(labels), "same")
    found.summary = summarize(logits, np.array(labels), found.classes)
    return found


def split_of(pixels: torch.Tensor) -> Split:
    ids = [f"{i}.png" for i in range(len(pixels))]
    return Split(Memory(pixels), torch.zeros(len(pixels), dtype=torch.int64), ids)  # type: ignore[arg-type]


# Charts


def test_a_chart_puts_values_where_they_belong() -> None:
    svg = line_chart([1, 2, 3], [ChartLine("a", "train", [0.0, 1.0, 0.5])], "Loss", mark=2)
    left, right = LEFT, WIDE - RIGHT
    top, bottom = TOP, HIGH - BOTTOM
    middle = (left + right) / 2
    path = re.search(r'd="([^"]+)"', svg)
    assert path is not None
    points = [tuple(map(float, p.split())) for p in re.findall(r"[ML]([\d.]+ [\d.]+)", path[1])]
    assert points == [(left, bottom), (middle, top), (right, pytest.approx((top + bottom) / 2))]
    assert f'class="mark" x1="{middle:.0f}"' in svg


def test_what_is_no_number_is_a_gap_in_a_chart() -> None:
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
def test_any_range_makes_a_chart(values: list[float]) -> None:
    svg = line_chart(list(range(1, len(values) + 1)), [ChartLine("a", "c0", values)], "x")
    assert "nan" not in svg
    heights = [float(y) for y in re.findall(r'class="grid"[^>]*y1="([\d.-]+)"', svg)]
    assert heights
    assert all(0 <= y <= HIGH for y in heights)


def test_names_in_a_chart_are_escaped() -> None:
    svg = line_chart([1, 2], [ChartLine('"><script>', "c0", [1, 2])], "x")
    assert "<script>" not in svg


def test_the_bars_of_calibration_are_as_high_as_the_accuracy() -> None:
    svg = reliability_chart([0.25, math.nan], [1.0, math.nan], [4, 0])
    high = HIGH - TOP - BOTTOM
    assert re.findall(r'class="bar"[^>]*height="([\d.]+)"', svg) == [str(high)]
    assert "4 of 4 images, on average 25.0% sure: 100.0% right" in svg


# Confusion


def test_the_most_frequent_confusions_come_first() -> None:
    table = np.array([[9, 2, 0], [5, 1, 0], [0, 2, 7]])
    assert sections.confused_pairs(table) == [(1, 0), (0, 1), (2, 1)]
    assert sections.confusion_cells(table) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (2, 2)]


def test_shades_go_by_the_share_of_the_row() -> None:
    assert [sections.cell_shade(n, 100, True) for n in (0, 1, 50, 100)] == [0, 1, 4, 9]
    assert [sections.cell_shade(n, 100, False) for n in (0, 1, 25, 100)] == [0, 1, 4, 9]


def test_a_hundred_classes_are_a_list_and_one_is_a_table() -> None:
    labels = [k for k in range(110) for _ in range(2)]
    said = [(k + 1) % 110 for k in labels]
    html = sections.confusion_section(judged("many", said, labels, 110))
    assert html is not None
    assert "110 classes make no readable table" in html
    assert html.count('scope="row"') == sections.MAX_PAIRS
    right = sections.confusion_section(judged("right", labels, labels, 110))
    assert right is not None
    assert "No test image was taken for another class" in right
    one = sections.confusion_section(judged("one", [0, 0], [0, 0], 1))
    assert one is not None
    assert one.count("<td") == 2  # the corner and the cell


def test_a_cell_holds_its_images_the_surest_mistakes_first() -> None:
    logits = np.array([[1, 0], [3, 0], [0, 1], [2, 0], [4, 0]], np.float32)
    labels = np.array([1, 1, 1, 0, 0])
    found = judged("x", [0, 0, 1, 0, 0], labels.tolist())
    found.answers = CachedPredictions(logits, labels, "")
    found.images = split_of(torch.zeros(5, 1, 4, 4, dtype=torch.uint8))
    shown = sections._pair_images(found, [(1, 0), (0, 0)])
    assert [image[1] for image in shown["1-0"]["images"]] == ["1.png", "0.png"]
    assert [image[1] for image in shown["0-0"]["images"]] == ["3.png", "4.png"]  # least sure first
    assert shown["1-0"]["images"][0][2] == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-4)


# Thumbnails


def opened(uri: str) -> np.ndarray:
    content = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("channels", [1, 3])
def test_small_pictures_keep_every_pixel(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 28, 32), dtype=np.uint8)
    shown = opened(reports_html.thumbnail(pixels))
    assert shown.shape == (28, 32, 3)
    assert np.array_equal(
        np.moveaxis(shown, 2, 0), pixels if channels == 3 else pixels.repeat(3, 0)
    )


def test_large_pictures_are_reduced() -> None:
    shown = opened(reports_html.thumbnail(np.full((3, 300, 200), 128, np.uint8)))
    assert shown.shape == (96, 64, 3)
    assert abs(int(shown.mean()) - 128) <= 2


def test_cells_show_fewer_pictures_where_the_page_would_be_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 16, 16), generator=random, dtype=torch.uint8)
    images, cells = split_of(pixels), {"0-0": list(range(25)), "0-1": [30, 31, 32]}
    whole = reports_html.cell_thumbnails(images, cells)
    assert {key: len(found) for key, found in whole.items()} == {"0-0": 20, "0-1": 3}
    each = len(whole["0-0"][0])
    monkeypatch.setattr(reports_html, "THUMBNAIL_BUDGET", each * 15 // 2 * 3 // 4)
    few = reports_html.cell_thumbnails(images, cells)
    assert {key: len(found) for key, found in few.items()} == {"0-0": 4, "0-1": 3}
    monkeypatch.setattr(reports_html, "THUMBNAIL_BUDGET", 1)
    least = reports_html.cell_thumbnails(images, cells)
    assert {key: len(found) for key, found in least.items()} == {"0-0": 1, "0-1": 1}


# Several runs


def test_differences_are_counted_image_by_image() -> None:
    labels = [0] * 10
    first = judged("first", [0] * 9 + [1], labels)
    other = judged("other", [1] * 3 + [0] * 7, labels)  # loses three, gains one
    both = compare.gather_runs([first, other])
    assert both.first is first
    (found,) = both.differences
    assert (found.name, found.gained, found.lost) == ("other", 1, 3)
    assert found.points == pytest.approx(-0.2)
    assert found.interval == pytest.approx(newcombe_interval(6, 3, 1, 0))
    assert found.p == pytest.approx(2 * (1 + 4) / 2**4)  # of four fair coins, three or more alike
    assert both.verdict == (
        "first: 90.0% of 10 test images; not distinguishable from other (McNemar's exact test)."
    )


def test_several_comparisons_are_paid_for() -> None:
    labels = [0] * 20
    first = judged("first", [0] * 20, labels)
    others = [judged(f"r{n}", [1] * 6 + [0] * 14, labels) for n in range(2)]
    both = compare.gather_runs([first, *others])
    assert [d.p for d in both.differences] == pytest.approx([2 * 2 / 2**6] * 2)
    assert both.verdict.endswith("; not distinguishable from r0 and r1 (McNemar's exact test).")
    alone = compare.gather_runs([first, others[0]])
    assert alone.verdict.endswith("; more accurate than r0 (McNemar's exact test).")
    turned = compare.gather_runs([others[0], first])
    assert turned.verdict.endswith("; less accurate than first (McNemar's exact test).")


def test_runs_on_other_images_are_not_compared() -> None:
    first, second = judged("a", [0, 1], [0, 1]), judged("b", [0, 1], [0, 1])
    assert second.answers is not None
    second.answers = second.answers._replace(images="other")
    both = compare.gather_runs([first, second])
    assert not both.alike
    assert both.differences == []
    assert "can't be compared" in both.verdict


# Where it comes from


def test_changes_to_a_published_recipe_are_marked() -> None:
    published = recipe.load_recipe("mnist")
    assert sections.recipe_differences(published) == []
    changed = published.replace(**{"optim.lr": 0.123, "train.epochs": 7})
    lr, epochs = str(published.optim.lr), str(published.train.epochs)
    assert sections.recipe_differences(changed) == [
        ("optim.lr", "0.123", lr),
        ("train.epochs", "7", epochs),
    ]
    assert sections.recipe_differences(changed.model_copy(update={"name": "mine"})) == []


def test_a_run_name_in_a_command_is_quoted() -> None:
    found = judged("it's; rm -rf x", [0], [0])
    found.recipe = recipe.load_recipe("mnist")
    html = sections.reproduce_section(found)
    assert html is not None
    assert "convlens report &#39;it&#39;&#34;&#39;&#34;&#39;s; rm -rf x&#39;" in html
