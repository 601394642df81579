"""Figures of images hold exactly the pixels and captions they were given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convlens import plots
from convlens.errors import UsageError
from convlens.plots import style
from helpers.figures import make_images, make_maps, make_panel, save_and_read, texts_of


def test_label_review_shows_the_given_and_the_suggested_label() -> None:
    figure = plots.label_review(
        make_images(2),
        ["cat", "a$"],
        ["dog", "b"],
        [0.9951, 0.6],
        "sheet",
        first=49,
        copied=[False, True],
    )
    assert texts_of(figure.axes[0]) == [
        "sheet",
        "#49 cat",
        "→ dog >99%",
        r"#50 a\$ (copy)",
        "→ b 60%",
    ]


def test_blank_and_broken_channels_are_marked(tmp_path: Path) -> None:
    marks = [np.arange(4) == channel for channel in (1, 2)]
    maps = make_maps(4)
    maps[2] = np.nan
    panel = plots.Panel("layer", "note", maps, (-1.0, 1.0), *marks)
    figure = plots.activations(make_images(1)[0], [panel], "run", "words", "scale")
    assert {"blank channel", "NaN or infinite"} <= set(texts_of(figure.axes[0]))
    pixels = save_and_read(figure, tmp_path).reshape(-1, 3)
    assert (pixels == style.BROKEN).all(1).sum() > 1000
    assert (pixels == style.BLANK_GRAY).all(1).sum() > 1000
    without = save_and_read(plots.activations(make_images(1)[0], [make_panel()]), tmp_path).reshape(
        -1, 3
    )
    assert not (without == style.BROKEN).all(1).any()


@pytest.mark.parametrize(("size", "channels", "times"), [(8, 1, 15), (28, 1, 4), (64, 3, 2)])
def test_small_images_are_enlarged_by_an_integer_factor(
    size: int, channels: int, times: int, tmp_path: Path
) -> None:
    given = make_images(5, channels, size)
    pixels = save_and_read(plots.contact_sheet(given, [""] * 5, columns=3), tmp_path)
    painted = (pixels < 255).all(axis=2)
    rows, columns = painted.any(axis=1), painted.any(axis=0)
    assert (rows.sum(), columns.sum()) == (2 * size * times, 3 * size * times)
    pixels = pixels[rows][:, columns]
    side = size * times
    for index, image in enumerate(given):
        row, column = divmod(index, 3)
        tile = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
        expected = np.kron(np.moveaxis(image, 0, 2), np.ones((times, times, 1), np.uint8))
        np.testing.assert_array_equal(tile, np.broadcast_to(expected, tile.shape))


def test_large_images_are_averaged(tmp_path: Path) -> None:
    given = np.zeros((1, 3, 256, 256), np.uint8)
    given[:, :, ::2] = 100
    pixels = save_and_read(plots.contact_sheet(given, [""]), tmp_path)
    painted = (pixels == 50).all(axis=2)
    assert painted.sum() == 128 * 128


def test_sheets_hold_any_number_of_images(tmp_path: Path) -> None:
    none = make_images(0)
    for figure in (
        plots.contact_sheet(none, [], "sheet"),
        plots.augmented_batch(none, none),
        plots.worst_mistakes(none, [], [], [], "no mistakes at all"),
    ):
        assert "none" in texts_of(figure.axes[0])
        save_and_read(figure, tmp_path)
    for n in (1, 7, 8, 9, 65):
        figure = plots.contact_sheet(make_images(n), ["name"] * n, columns=8)
        assert texts_of(figure.axes[0]) == ["name"] * n
        save_and_read(figure, tmp_path)


def test_captions_of_mistakes_and_augmented_batches(tmp_path: Path) -> None:
    figure = plots.worst_mistakes(make_images(2), ["cat", "a$b"], ["dog", "L" * 99], [0.987, 0.5])
    captions = texts_of(figure.axes[0])
    assert captions[:3] == ["99% dog", "is cat", captions[2]]
    assert captions[2].startswith("50% LL")
    assert captions[2].endswith("…")
    assert captions[3] == r"is a\$b"
    before, after = make_images(5), make_images(5, seed=1)
    sheet = plots.augmented_batch(before, after, columns=3)
    assert texts_of(sheet.axes[0]) == ["original", "augmented"] * 2
    canvas = sheet.axes[0].images[0].get_array()
    drawn = canvas[(canvas < 255).all(axis=2)]
    given = np.concatenate([np.moveaxis(part, 1, 3).reshape(-1, 3) for part in (before, after)])
    assert len(drawn) == len(given) * 15 * 15
    assert {tuple(pixel) for pixel in drawn.tolist()} == {tuple(pixel) for pixel in given.tolist()}
    with pytest.raises(UsageError):
        plots.augmented_batch(before, after[:3])


def test_augmented_batches_name_classes_and_mixed_shares() -> None:
    before, after = make_images(3), make_images(3, seed=1)
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
    # The last line of each caption stands on its image, whatever the number of lines.
    assert texts_at["100% cat"][1] == texts_at["38% cat"][1] > texts_at["62% dog"][1]
    assert texts_at["62% dog"][0] == texts_at["dog"][0] > texts_at["cat"][0]


def test_images_of_a_wrong_shape_or_type_are_refused() -> None:
    for images in (
        np.zeros((2, 3, 8, 8), np.float32),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
    ):
        with pytest.raises(UsageError, match="images must be"):
            plots.contact_sheet(images, ["a"] * len(images))
    with pytest.raises(UsageError, match="1 titles for 2"):
        plots.contact_sheet(make_images(2), ["a"])
