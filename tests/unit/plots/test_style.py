"""Figures are written reproducibly, text is cut to fit, and tiles show exact values."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from convlens import plots
from convlens.errors import ResourceError, UsageError
from convlens.plots import style
from convlens.plots.style import fit_text, text_width
from convlens.utils.console import message_scope
from helpers.figures import HOSTILE_NAMES, make_history, make_images, make_panel, save_and_read


@pytest.mark.parametrize(("kind", "prefix"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_vector_figures_are_the_same_bytes_each_time(
    kind: str, prefix: bytes, tmp_path: Path
) -> None:
    for draw in (
        lambda: plots.curves(make_history(3), 2, "run"),
        lambda: plots.activations(make_images(1)[0], [make_panel()], "run", "cat", "max: 1"),
    ):
        files = []
        for number in range(2):
            plots.save_figure(draw(), tmp_path / f"{number}.{kind}")
            files.append((tmp_path / f"{number}.{kind}").read_bytes())
        assert files[0] == files[1]
        assert files[0].startswith(prefix)
        assert b"CreationDate" not in files[0]
        assert b"<dc:date>" not in files[0]
    with pytest.raises(UsageError, match="unknown figure format 'gif'"):
        plots.save_figure(plots.curves(make_history(3)), tmp_path / "plot.gif")


def test_dpi_sets_the_size_and_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    figure = plots.learning_rate([1, 2], [0.1, 0.01])
    assert save_and_read(figure, tmp_path, dpi=100).shape == (280, 520, 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError):
        plots.save_figure(figure, tmp_path / "file" / "plot.png")


def test_names_are_cut_to_the_maximum_width() -> None:
    assert fit_text("daisy", 10) == "daisy"
    assert fit_text("$5", 10) == r"\$5"
    assert fit_text("x" * 99, 5, before="98% ", after="!").startswith("98% x")
    for name in HOSTILE_NAMES:
        cut = fit_text(name, 8)
        assert text_width(cut.replace(r"\$", "$")) <= 8
        assert cut.replace("…", "").isprintable()


def test_estimated_text_width_is_at_least_the_drawn_width() -> None:
    """Otherwise names would overlap."""
    figure = Figure(dpi=72)
    for words in ("American_Staffordshire_terrier", "automobile", "WWWW", "0123456789", "Émeu"):
        text = figure.text(0, 0, words, fontsize=100, family="DejaVu Sans")
        figure.savefig(io.BytesIO())
        drawn = text.get_window_extent().width / 100
        assert drawn * 0.97 <= text_width(words) <= drawn * 1.25


def test_mosaic_shows_each_value_as_a_square_of_one_color() -> None:
    values = np.float32([[[0, 1], [2, 4]], [[4, 0], [0, 0]], [[0, 0], [0, 0]]])
    tiles = style.map_tiles(values, (0.0, 4.0), 6)
    assert tiles.shape == (3, 6, 6, 3)
    colors = (np.array(matplotlib.colormaps["viridis"]([0, 64, 128, 255]))[:, :3] * 255).round()
    for number, (y, x) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        block = tiles[0, y : y + 3, x : x + 3].reshape(-1, 3)
        np.testing.assert_allclose(block, np.broadcast_to(colors[number], block.shape), atol=2)
    assert (style.map_tiles(values - 2, (-2.0, 2.0), 2)[0, 1, 0] > 240).all(), "0 is white"
    mosaic = style.mosaic(tiles, 2, gap=2)
    assert mosaic.shape == (14, 14, 3)
    assert (mosaic[6:8] == 255).all()
    np.testing.assert_array_equal(mosaic[8:, :6], tiles[2])
    # Maps larger than their tile are averaged.
    checks = np.indices((8, 8)).sum(0)[None] % 2
    gray = style.map_tiles(checks.astype(np.float32), (0.0, 1.0), 4)
    half = style.map_tiles(np.full((1, 4, 4), 0.5, np.float32), (0.0, 1.0), 4)
    np.testing.assert_array_equal(gray, half)


# Letters that the fonts do not have


def test_a_font_with_the_missing_letters_is_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`STIXGeneral` comes with matplotlib and has letters that `DejaVu Sans` lacks."""
    fonts = {
        name: font_manager.get_font(font_manager.findfont(name)).get_charmap()
        for name in ("DejaVu Sans", "STIXGeneral")
    }
    letter = chr(min(set(fonts["STIXGeneral"]) - set(fonts["DejaVu Sans"])))
    monkeypatch.setattr(style, "_font_families", lambda: ("DejaVu Sans",))
    figure = Figure()
    text = figure.text(0.1, 0.5, f"class {letter}")
    style.encode_png(figure)
    assert "DejaVu Sans" in text.get_fontfamily()
    assert len(text.get_fontfamily()) > 1
    assert "no installed font" not in capsys.readouterr().err


def test_letters_without_a_font_are_those_of_the_texts() -> None:
    """matplotlib only reports the space before this combining mark."""
    figure = Figure()
    figure.text(0.1, 0.5, "class \u0359\nb")
    assert style._letters_without_font(figure, ["DejaVu Sans"]) == {0x359}
    assert style._letters_without_font(figure, ["DejaVu Sans", "STIXGeneral"]) == frozenset()


def test_one_line_says_that_figures_show_placeholders(capsys: pytest.CaptureFixture[str]) -> None:
    unassigned = "\U0010fffd"  # for private use; no font has it
    with message_scope():
        for _ in range(2):
            figure = Figure()
            axes = figure.add_subplot()
            axes.set_xticks([0, 1], [f"cat {unassigned}", "dog"])
            assert style.encode_png(figure).startswith(b"\x89PNG")
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("note: no installed font has") == 1
    assert "the HTML page the right names" in err


def test_placeholder_fonts_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [entry for entry in font_manager.fontManager.ttflist if entry.name == "DejaVu Sans"]
    manager = SimpleNamespace(ttflist=[replace(entries[0], name="Last Resort"), entries[0]])
    monkeypatch.setattr(font_manager, "fontManager", manager)
    style._fonts_with.cache_clear()
    assert style._fonts_with(frozenset({ord("a")})) == ("DejaVu Sans",)
    style._fonts_with.cache_clear()
