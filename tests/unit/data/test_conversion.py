"""The conversion of a set: size, fit, value range, background, and warnings about lost values."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from convlens.data import conversion as conversion_module
from convlens.data.audit import audit
from convlens.data.cache import ArrayRows, decode_images
from convlens.data.conversion import (
    choose_conversion,
    conversion_with_keys,
    deep_image_notes,
    kept_area,
    level_warnings,
    pixel_warnings,
    range_warnings,
    recorded_conversion,
    resolve_fit,
    value_range_of,
)
from convlens.data.dataset import Data, load_data
from convlens.data.decode import Conversion, Pixels
from convlens.data.types import EncodedFiles
from convlens.errors import UsageError
from convlens.recipe import DataConfig

PLENTY = 1 << 30
WHITE_HIDES = "one color, #ffffff"


class Encoded(EncodedFiles):
    """Encoded images in memory."""

    def __init__(self, contents: Sequence[bytes]) -> None:
        self.contents = contents

    def __len__(self) -> int:
        return len(self.contents)

    def name(self, number: int) -> str:
        return f"image {number}"

    def read(self, number: int) -> bytes:
        return self.contents[number]

    def stat_digest(self) -> str:
        return ""

    def subset(self, index: np.ndarray) -> EncodedFiles:
        return Encoded([self.contents[i] for i in index.tolist()])

    def concat(self, other: EncodedFiles) -> EncodedFiles:
        assert isinstance(other, Encoded)
        return Encoded([*self.contents, *other.contents])

    def numbers(self) -> np.ndarray:
        return np.arange(len(self))


def encoded(values: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def load(folder: Path, **config: object) -> Data:
    return load_data(DataConfig(name=str(folder), **config), memory_budget=PLENTY)  # type: ignore[arg-type]


def decoded(files: Encoded, conversion: Conversion) -> Pixels:
    return np.stack([conversion.file(content) for content in files.contents])


# ---- fit and size


def test_kept_area_by_hand() -> None:
    assert kept_area([(160, 120)], "crop") == 0.75
    assert kept_area([(1000, 50), (80, 80), (20, 40)], "crop") == pytest.approx(1.55 / 3)
    assert kept_area([(1000, 50)], "pad") == kept_area([(1000, 50)], "stretch") == 1


@pytest.mark.parametrize(
    ("sizes", "fit"),
    [
        ([(64, 64)], "crop"),
        ([(640, 426), (3000, 2000)], "crop"),  # 3:2, also when rounded
        ([(426, 640)], "crop"),
        ([(1920, 1080)], "pad"),
        ([(50, 1000), (1000, 50), (64, 64)], "pad"),  # by the median
        ([(1000, 50), (64, 64), (64, 64)], "crop"),
    ],
)
def test_elongated_images_are_padded_automatically(sizes: list[tuple[int, int]], fit: str) -> None:
    assert resolve_fit("auto", sizes) == fit
    assert resolve_fit("stretch", sizes) == "stretch"


def test_the_size_of_padded_images_keeps_their_number_of_pixels() -> None:
    panorama = Encoded([encoded(np.zeros((50, 1000), np.uint8), "PNG")])
    choice = choose_conversion(DataConfig(), panorama, panorama.numbers)
    assert choice.conversion == Conversion(128, 1, "pad")  # sqrt(50 * 1000) = 224
    assert choice.kept_area == 1
    assert "5% of their area" in choice.notes[0]
    cropped = choose_conversion(DataConfig(fit="crop"), panorama, panorama.numbers)
    assert cropped.conversion == Conversion(48, 1, "crop")  # as in earlier versions
    assert cropped.kept_area == 0.05
    assert "keeps 5% of the area" in cropped.notes[0]


def test_a_panorama_is_seen_as_a_whole(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number in range(10):
        for name, value in (("a", 0), ("b", 255)):
            image = np.full((50, 1000), 128, np.uint8)
            image[:, 60:110] = value
            write(root / name / f"{number}.png", image)
    data = load(root)
    images = data.train.rows.gather(torch.arange(len(data.train))).numpy()
    in_class_b = data.train.labels.numpy() == 1
    assert images[~in_class_b].max() < 140 < images[in_class_b].max()


# ---- the value range


def test_the_range_is_the_outer_percentiles_by_hand() -> None:
    assert value_range_of([np.arange(1001, dtype=np.uint16)]) == (1.0, 999.0)
    assert value_range_of([np.arange(1001) / 1000]) == pytest.approx((0.001, 0.999))
    # Percentiles of integers are rounded outwards.
    assert value_range_of([np.arange(101, dtype=np.int32)]) == (0.0, 100.0)
    # Fewer than 0.1% of the pixels differ: the whole range.
    sparse = np.full(5000, 7, np.uint16)
    sparse[0] = 9
    assert value_range_of([sparse]) == (7.0, 9.0)
    low, high = value_range_of([np.full(5, 3, np.int32)])
    assert low == 3 < high


def sensor_values(value: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-25, 26, (16, 16))
    return (value + noise).astype(np.uint16)


def test_held_out_images_do_not_affect_the_range(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number in range(20):
        for name, value in (("a", 1900), ("b", 1990)):
            write(root / name / f"{number}.png", sensor_values(value, number))
    # With a damaged file the images are drawn differently.
    (root / "a" / "0.png").write_bytes(b"no image")
    before = load(root, on_bad="skip")
    trained = set(before.train.ids)
    for path in root.glob("*/*.png"):
        if f"{path.parent.name}/{path.name}" not in trained and path.stat().st_size > 50:
            write(path, sensor_values(60_000))
    after = load(root, on_bad="skip")
    assert set(after.train.ids) == trained
    used = [np.asarray(Image.open(root / image)) for image in sorted(trained)]
    assert after.conversion.value_range == value_range_of(used)
    assert after.conversion.value_range[1] < 2020  # type: ignore[index]
    assert after.held_out == before.held_out


def test_large_sets_are_sampled_with_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_module, "MAX_RANGE_IMAGES", 3)
    monkeypatch.setattr(conversion_module, "MAX_RANGE_PIXELS", 100)
    files = Encoded([encoded(sensor_values(100 * n, n), "PNG") for n in range(1, 30)])
    choices = [choose_conversion(DataConfig(seed=seed), files, files.numbers) for seed in (0, 0, 1)]
    assert len(choices[0].sample) == 3
    assert choices[0] == choices[1] != choices[2]


def test_a_given_range_is_used_without_reading_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(conversion_module, "read_values")
    deep = Encoded([encoded(np.array([[0, 2048, 4095, 9000]] * 4, np.uint16), "PNG")])
    choice = choose_conversion(DataConfig(range=(0, 4095)), deep, deep.numbers)
    assert choice.conversion.value_range == (0, 4095)
    native = Conversion(4, 1, "crop", value_range=(0, 4095))
    assert native.file(deep.contents[0])[0, 0].tolist() == [0, 128, 255, 255]
    shallow = Encoded([encoded(np.zeros((4, 4), np.uint8), "PNG")])
    choice = choose_conversion(DataConfig(range=(0, 4095)), shallow, shallow.numbers)
    assert "no effect" in choice.notes[0]


def test_eight_bit_images_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(conversion_module, "read_values")
    files = Encoded([encoded(np.zeros((40, 40, 3), np.uint8), kind) for kind in ("PNG", "JPEG")])

    def fail() -> np.ndarray:
        raise AssertionError("the split is not needed")

    choice = choose_conversion(DataConfig(), files, fail)
    assert choice.conversion == Conversion(32, 3, "crop")
    assert (choice.notes, choice.sample) == ((), ())
    # Part of every cache key and fingerprint of earlier versions.
    assert repr(choice.conversion) == "Conversion(size=32, channels=3, fit='crop')"


def test_mixed_sets_keep_the_values_of_eight_bit_images() -> None:
    shallow = encoded(np.arange(256, dtype=np.uint8).reshape(16, 16), "PNG")
    files = Encoded([shallow, encoded(sensor_values(2000), "TIFF")])
    choice = choose_conversion(DataConfig(), files, files.numbers)
    assert choice.conversion.value_range == (1975, 2025)
    assert any("mixed" in note for note in choice.notes)
    np.testing.assert_array_equal(
        choice.conversion.file(shallow), Conversion(16, 1, "crop").file(shallow)
    )


def test_not_a_number_is_left_out_of_the_range_and_stated() -> None:
    good, bad = np.full((4, 4), 30, np.float32), np.full((4, 4), 30, np.float32)
    good[0], bad[0, 0] = 20, np.nan
    files = Encoded([encoded(good, "TIFF"), encoded(bad, "TIFF")])
    for requested in ("auto", (20.0, 30.0)):
        choice = choose_conversion(DataConfig(range=requested, image_size=8), files, files.numbers)
        assert choice.conversion.value_range == (20, 30)
        (warning,) = (note for note in choice.notes if note.startswith("warning:"))
        assert "1 of 2 training images have values that are NaN or infinite (6.2% of" in warning
        assert "NaN becomes black" in warning
        small = replace(choice.conversion, size=4)
        np.testing.assert_array_equal(small.file(files.contents[0])[0][:2], [[0] * 4, [255] * 4])
        assert small.file(files.contents[1]).ravel().tolist() == [0, *[255] * 15]


def test_deep_images_for_a_model_of_8_bit_images_are_stated() -> None:
    model = Conversion(4, 1, "crop")
    shallow, deep = encoded(np.zeros((4, 4), np.uint8), "PNG"), encoded(sensor_values(2000), "PNG")
    files = Encoded([shallow, deep, deep])
    (note,) = deep_image_notes(files, model)
    assert note.startswith(
        "warning: 2 of 3 images have more than 8 bits per value, the first is image 1;"
    )
    assert "data.range=[low, high]" in note
    assert deep_image_notes(files, replace(model, value_range=(0, 4095))) == []
    assert deep_image_notes(Encoded([shallow]), model) == []
    with_nan = np.full((4, 4), np.nan, np.float32)
    with_nan[0] = 1
    floats = Encoded([encoded(with_nan, "TIFF")])
    (note,) = deep_image_notes(floats, replace(model, value_range=(0, 1)))
    assert "1 of 1 images have values that are NaN or infinite (75.0% of their pixels)" in note


def test_keys_of_another_set_change_the_range_but_not_what_the_network_sees() -> None:
    model = Conversion(16, 1, "pad")
    given = DataConfig(range=(0, 4095), max_pixels=7, fit="pad", image_size=16)
    assert conversion_with_keys(model, given) == Conversion(
        16, 1, "pad", value_range=(0, 4095), max_pixels=7
    )
    assert conversion_with_keys(model, DataConfig()) == model
    with pytest.raises(UsageError, match=r"data.image_size=32, data.fit=crop can't be changed"):
        conversion_with_keys(model, DataConfig(image_size=32, fit="crop"))


def test_runs_of_earlier_versions_keep_their_conversion() -> None:
    old = DataConfig(image_size=32, channels=1, fit="crop")  # their recipe.yaml has no other keys
    assert recorded_conversion(old) == Conversion(32, 1, "crop")
    new = old.model_copy(update={"range": (3.0, 8.0), "background": "alpha", "max_pixels": 100})
    assert recorded_conversion(new) == Conversion(32, 1, "crop", (3.0, 8.0), "alpha", 100)
    assert recorded_conversion(DataConfig()) is None


# ---- what the raw values separate, the decoded values separate

INTEGERS = {"uint16": (0, 65_535), "int32": (-(2**31), 2**31 - 1)}
FORMATS = [("PNG", "uint16"), ("TIFF", "uint16"), ("PPM", "uint16"), ("TIFF", "int32")]
FLOAT_FORMATS = [("TIFF", "float32"), ("PPM", "float32")]


@st.composite
def separable_sets(draw: st.DrawFn) -> tuple[Encoded, np.ndarray]:
    """Images of two classes whose values do not overlap, and the label of each."""
    kind, dtype = draw(st.sampled_from([*FORMATS, *FLOAT_FORMATS]))
    if dtype == "float32":
        scale = 10.0 ** draw(st.integers(-4, 5))
        low = scale * draw(st.sampled_from([0.0, 1.0, 20.0, -900.0]))
        gap = scale * draw(st.sampled_from([0.25, 1.0, 15.0, 940.0]))
    else:
        smallest, largest = INTEGERS[dtype]
        gap = draw(st.sampled_from([1, 2, 12, 240, 48_000]))
        low = draw(st.integers(smallest, largest - gap - gap // 4))
    random = np.random.default_rng(draw(st.integers(0, 100)))
    noise = draw(st.booleans()) * gap / 4
    # A bright or dark bar in all images, which may determine the range.
    bar = draw(st.sampled_from([None, "low", "high"]))
    contents = []
    labels = np.array([0, 1] * 6)
    for label in labels:
        spread = random.random((6, 6)) * noise
        values = low + label * gap + (spread if dtype == "float32" else np.floor(spread))
        if bar is not None and dtype != "float32":
            values[:2] = INTEGERS[dtype][bar == "high"]
        elif bar is not None:
            values[:2] = low + (1 if bar == "high" else -1) * 1000 * gap
        stored = values.astype(np.int32) if kind == "PPM" and dtype == "uint16" else values
        stored = stored.astype(dtype) if kind != "PPM" or dtype == "float32" else stored
        contents.append(encoded(stored, kind))
    return Encoded(contents), labels


@settings(max_examples=60, deadline=None)
@given(separable_sets())
def test_decoding_separates_what_the_values_separate(case: tuple[Encoded, np.ndarray]) -> None:
    files, labels = case
    choice = choose_conversion(DataConfig(), files, files.numbers)
    images = decoded(files, Conversion(6, 1, "crop", choice.conversion.value_range))[:, 0, 3:]
    separated = images[labels == 0].max() < images[labels == 1].min()
    assert separated or any(note.startswith("warning:") for note in choice.notes)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("PNG", sensor_values(1900), sensor_values(1990)),  # 12 bits in 16
        ("TIFF", sensor_values(29_500), sensor_values(29_740)),  # thermal
        ("PNG", sensor_values(100), sensor_values(200)),  # 8 bits in 16
        ("TIFF", sensor_values(900) * np.float32(-1), sensor_values(40) * np.float32(1)),
        (
            "TIFF",
            sensor_values(25) / np.float32(100) + 20,
            sensor_values(25) / np.float32(100) + 22,
        ),
        (
            "TIFF",
            sensor_values(30_000).astype(np.int32) - 30_900,
            sensor_values(90).astype(np.int32),
        ),
    ],
)
def test_sensor_images_keep_many_levels(kind: str, first: np.ndarray, second: np.ndarray) -> None:
    files = Encoded([encoded(first, kind), encoded(second, kind)])
    choice = choose_conversion(DataConfig(), files, files.numbers)
    images = decoded(files, choice.conversion)
    assert images[1].mean() - images[0].mean() > 60
    assert images.min() == 0
    assert images.max() == 255
    assert [note for note in choice.notes if note.startswith("warning:")] == []


# ---- transparency


def drawing(color: Sequence[int], *, across: bool = False) -> np.ndarray:
    """Stripes of one color on a transparent image, whose hidden colors are random."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    image[..., 3] = 0
    rows = image[::4] if across else image[:, ::4]
    rows[...] = (*color, 255)
    return image


def test_white_stripes_in_the_alpha_channel_become_a_grey_image(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number in range(10):
        for name in ("a", "b"):
            write(root / name / f"{number}.png", drawing((255, 255, 255), across=name == "b"))
    data = load(root, image_size=16)
    assert data.conversion == Conversion(16, 1, "crop", background="alpha")
    assert any(WHITE_HIDES in note for note in data.notes)
    stripes = np.where(np.arange(16) % 4 == 0, 255, 0)
    images = data.train.rows.gather(torch.arange(len(data.train))).numpy()[:, 0]
    for image, label in zip(images, data.train.labels.tolist(), strict=True):
        expected = np.tile(stripes, (16, 1))
        np.testing.assert_array_equal(image, expected.T if label else expected)
    report = audit(DataConfig(name=str(root)))
    assert report.channels == 1
    assert report.mean == [0.25]
    white = load(root, background="white")
    assert white.conversion.channels == 3
    assert "constant" in pixel_warnings(white.train.rows)[0]
    report = audit(DataConfig(name=str(root), background="white"))
    assert report.notes[0].startswith("warning: 14 of 14 training images are (nearly) constant")


@pytest.mark.parametrize(
    "images",
    [
        [drawing((0, 0, 0))],  # white shows it
        [drawing((255, 255, 255)), drawing((250, 20, 20))],  # not one color
        [np.full((16, 16, 4), 255, np.uint8)],  # nothing is drawn
        [np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)],
        [drawing((255, 255, 255)), np.full((16, 16, 3), 9, np.uint8)],  # not all are transparent
    ],
)
def test_other_transparent_images_stay_on_white(images: list[np.ndarray]) -> None:
    files = Encoded([encoded(image, "PNG") for image in images])
    choice = choose_conversion(DataConfig(), files, files.numbers)
    assert choice.conversion == Conversion(16, 3, "crop")
    assert choice.notes == ()


@pytest.mark.parametrize(
    ("background", "expected"),
    [("white", 255), ("black", 0), ("grey", 128), ("#204060", 0x40), ("alpha", 0)],
)
def test_transparent_parts_show_the_background(background: str, expected: int) -> None:
    content = encoded(drawing((255, 255, 255)), "PNG")
    image = Conversion(16, 3, "crop", background=background).file(content)
    assert (image[1, :, 1] == expected).all()
    assert (image[:, :, 0] == 255).all()


# ---- warnings


def rows(images: np.ndarray) -> ArrayRows:
    return ArrayRows(torch.from_numpy(images.astype(np.uint8)))


def test_warnings_about_decoded_images() -> None:
    random = np.random.default_rng(0)
    good = random.integers(0, 256, (40, 1, 8, 8))
    assert pixel_warnings(rows(good)) == []
    assert pixel_warnings(rows(np.where(good > 127, 255, 0))) == []  # drawings use two levels
    assert pixel_warnings(rows(good[:0])) == []
    (warning,) = pixel_warnings(rows(7 + good // 128))
    assert warning.startswith("warning: 40 of 40 training images are (nearly) constant")
    constant = np.arange(40).reshape(40, 1, 1, 1) + np.zeros((40, 1, 8, 8))
    assert "40 of 40" in pixel_warnings(rows(constant))[0]
    (warning,) = pixel_warnings(rows(90 + good // 10))
    assert warning.startswith("warning: the training images use 26 of 256 levels (90 to 115)")
    same = np.concatenate([np.repeat(good[:1], 21, axis=0), good[:19]])
    (warning,) = pixel_warnings(rows(same))
    assert warning.startswith("warning: 22 of 40 training images are identical")
    assert level_warnings(np.zeros((2, 1), np.uint8), np.full((2, 1), 255, np.uint8), [1, 1]) == []


def test_only_some_images_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_module, "MAX_CHECKED_IMAGES", 5)
    (warning,) = pixel_warnings(rows(np.zeros((100, 1, 2, 2))))
    assert "5 of 5" in warning


def test_outliers_that_determine_the_range_get_a_warning() -> None:
    values = np.concatenate([np.arange(100, 160), np.full(5, 60_000)]).astype(np.uint16)
    (warning,) = range_warnings([values], (100, 60_000))
    assert warning.startswith("warning: 90% of the pixels")
    assert "fall into 2 of 256 levels" in warning
    assert "e.g. data.range=[100,159], which leaves out 7.69% of the pixels" in warning
    assert range_warnings([values], (100, 160)) == []


@pytest.mark.parametrize(
    ("outliers", "share"),
    [(65_535.0, 0.005), (-9999.0, 0.06), (-9999.0, 0.2), (1e9, 0.01)],
)
def test_the_suggested_range_is_that_of_the_other_values(outliers: float, share: float) -> None:
    """Hot pixels, and numbers that stand for missing values."""
    values = np.random.default_rng(0).uniform(20, 35, 10_000)
    values[: round(share * len(values))] = outliers
    found = value_range_of([values])
    (warning,) = range_warnings([values], found)
    suggested = re.search(r"data\.range=\[(.*),(.*)\]", warning)
    assert suggested is not None
    low, high = float(suggested[1]), float(suggested[2])
    assert low == pytest.approx(20, abs=0.02)
    assert high == pytest.approx(35, abs=0.02)
    assert f"leaves out {share:.2%} of the pixels" in warning
    assert range_warnings([values], (low, high)) == []


def test_a_constant_background_does_not_hide_the_suggested_range() -> None:
    values = np.concatenate([np.zeros(8000), np.arange(1000, 1995, 0.5), np.full(10, 65_535)])
    (warning,) = range_warnings([values.astype(np.uint16)], (0, 65_535))
    assert "e.g. data.range=[0,1994]" in warning


def test_loading_for_a_trained_model_converts_as_it_was_trained(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number in range(10):
        for name, value in (("a", 1900), ("b", 1990)):
            write(root / name / f"{number}.png", sensor_values(value, number))
    config = DataConfig(name=str(root))
    data = load_data(config, memory_budget=PLENTY)
    known = load_data(config, memory_budget=PLENTY, conversion=data.conversion)
    assert known.fingerprint == data.fingerprint
    earlier = load_data(config, memory_budget=PLENTY, conversion=Conversion(16, 1, "crop"))
    images = earlier.train.rows.gather(torch.arange(len(earlier.train)))
    assert images.unique().tolist() == [7, 8]  # 65,535 becomes 255
    assert "constant" in pixel_warnings(earlier.train.rows)[0]


def test_the_cache_keeps_conversions_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLENS_CACHE", str(tmp_path))
    files = Encoded([encoded(np.array([[0, 100], [200, 50]], np.uint16), "PNG")])
    first = decode_images(files, Conversion(2, 1, "crop", (0, 200)), memory_budget=PLENTY)
    second = decode_images(files, Conversion(2, 1, "crop", (0, 400)), memory_budget=PLENTY)
    assert first.rows.gather(torch.tensor([0])).flatten().tolist() == [0, 128, 255, 64]
    assert second.rows.gather(torch.tensor([0])).flatten().tolist() == [0, 64, 128, 32]
