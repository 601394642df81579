"""Arrays and tensors of every shape and type become uint8 `[N, C, H, W]`, or are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from convlens.data.arrays import (
    LAYOUTS,
    ONE_IMAGE,
    SEVERAL_IMAGES,
    as_array,
    check_range,
    is_array,
    to_nchw,
    to_uint8,
)
from convlens.errors import UsageError

SIDES = st.sampled_from([2, 5, 6, 7, 8])
COUNTS = st.sampled_from([1, 2, 3, 4, 9])
CHANNELS = st.sampled_from([1, 3, 4])


def in_layout(images: np.ndarray, layout: str) -> np.ndarray:
    """Return images `[N, C, H, W]` in another layout; N or C are 1 where it has no such axis."""
    if layout in ONE_IMAGE:
        images = images[0]
    if layout in ("HW", "NHW"):
        return images[..., 0, :, :]
    return np.moveaxis(images, -3, -1) if layout in ("HWC", "NHWC") else images


@given(COUNTS, CHANNELS, SIDES, SIDES, st.sampled_from(list(LAYOUTS)))
def test_every_layout_is_read_as_it_was_written(
    count: int, channels: int, height: int, width: int, layout: str
) -> None:
    """Without `channels` it is either read correctly or refused as ambiguous."""
    count = 1 if layout in ONE_IMAGE else count
    channels = 1 if layout in ("HW", "NHW") else channels
    images = np.random.default_rng(0).integers(0, 256, (count, channels, height, width))
    array = in_layout(images, layout)
    np.testing.assert_array_equal(to_nchw(array, channels=LAYOUTS[layout]), images)
    try:
        read = to_nchw(array)
    except UsageError as error:
        refusal = error
    else:
        np.testing.assert_array_equal(read, images)
        return
    assert "can be" in refusal.what
    assert f"channels={LAYOUTS[layout]!r}" in refusal.fix


@pytest.mark.parametrize(
    ("shape", "readings"),
    [
        ((3, 3, 3), ["last", "first", "none"]),
        ((3, 64, 3), ["last", "first"]),
        ((3, 64, 64), ["first", "none"]),
        ((3, 5, 2), ["first", "none"]),
        ((9, 4, 4), ["last", "none"]),
        ((7, 3, 64, 3), ["last", "first"]),
        ((7, 1, 64, 1), ["last", "first"]),
    ],
)
def test_a_shape_that_can_be_read_in_two_ways_needs_channels(
    shape: tuple[int, ...], readings: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        to_nchw(np.zeros(shape))
    assert error.value.fix == "give " + " or ".join(f"channels={each!r}" for each in readings)
    array = np.arange(np.prod(shape)).reshape(shape)
    results = [to_nchw(array, channels=each) for each in readings]
    assert len({(each.shape, each.tobytes()) for each in results}) == len(readings)


@pytest.mark.parametrize(
    ("shape", "read"),
    [
        ((8, 9), (1, 1, 8, 9)),
        ((1, 8, 9), (1, 1, 8, 9)),
        ((8, 9, 1), (1, 1, 8, 9)),
        ((8, 9, 3), (1, 3, 8, 9)),
        ((8, 9, 4), (1, 4, 8, 9)),
        ((5, 8, 9), (5, 1, 8, 9)),
        ((3, 8, 9, 3), None),
        ((5, 3, 8, 9), (5, 3, 8, 9)),
        ((5, 8, 9, 4), (5, 4, 8, 9)),
        ((0, 8, 9), (0, 1, 8, 9)),
        ((0, 8, 9, 3), (0, 3, 8, 9)),
    ],
)
def test_shapes_with_one_reading_need_no_channels(
    shape: tuple[int, ...], read: tuple[int, ...] | None
) -> None:
    read = read or (3, 3, 8, 9)
    assert to_nchw(np.zeros(shape)).shape == read


@pytest.mark.parametrize(
    "shape",
    [(0, 8), (8, 0), (0, 0), (0, 8, 3), (0, 3, 3), (3, 0, 8), (1, 0, 8), (1, 0, 30, 3), (2, 0, 9)],
)
def test_images_without_pixels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="without pixels"):
        to_nchw(np.zeros(shape))


@pytest.mark.parametrize("shape", [(), (5,), (0,), (2, 8, 8, 2), (2, 8, 8, 5), (1, 2, 8, 8, 3)])
def test_other_shapes_are_refused_with_those_that_are_possible(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="does not hold images") as error:
        to_nchw(np.zeros(shape), layouts=SEVERAL_IMAGES)
    assert error.value.fix == "give [N, H, W], [N, H, W, C], [N, C, H, W] with 1, 3 or 4 channels"


def test_only_the_given_layouts_are_possible() -> None:
    assert to_nchw(np.zeros((3, 8, 8)), layouts=SEVERAL_IMAGES).shape == (3, 1, 8, 8)
    assert to_nchw(np.zeros((1, 8, 8)), layouts=SEVERAL_IMAGES).shape == (1, 1, 8, 8)
    assert to_nchw(np.zeros((3, 8, 8)), layouts=ONE_IMAGE).shape == (1, 3, 8, 8)
    with pytest.raises(UsageError):
        to_nchw(np.zeros((9, 12, 3)), layouts=SEVERAL_IMAGES)


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown axis of the channels 'frist'"):
        to_nchw(np.zeros((8, 8)), channels="frist")


GREY = np.random.default_rng(0).integers(0, 256, (2, 1, 5, 6))


@pytest.mark.parametrize(
    "values",
    [
        GREY.astype(np.uint8),
        GREY.astype(np.int64),
        GREY.astype(np.uint32),
        GREY / 255,
        (GREY / 255).astype(np.float32),
        (GREY / 255).astype(">f8"),
    ],
    ids=lambda values: values.dtype.str,
)
def test_values_whose_range_is_known_need_no_range(values: np.ndarray) -> None:
    pixels = to_uint8(values)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, GREY)


def test_booleans_become_black_and_white() -> None:
    np.testing.assert_array_equal(to_uint8(GREY > 127), (GREY > 127) * 255)


def test_a_given_range_applies_to_every_type_and_values_outside_are_clipped() -> None:
    for dtype in (np.uint8, np.uint16, np.int16, np.int64, np.float32):
        values = np.array([0, 2, 8, 16, 17], dtype).reshape(1, 1, 1, 5)
        scaled = to_uint8(values, value_range=(0, 16), stored_range=(5, 6))
        assert scaled.ravel().tolist() == [0, 32, 128, 255, 255]  # 31.875 and 127.5, rounded


def test_the_range_of_the_model_applies_to_deep_images_only() -> None:
    values = np.array([[[[0, 4095, 2048]]]])
    for dtype in (np.uint16, np.int32, np.float64):
        scaled = to_uint8(values.astype(dtype), stored_range=(0, 4095))
        assert scaled.ravel().tolist() == [0, 255, 128]
    bright = np.full((1, 1, 1, 1), 200, np.uint8)
    assert to_uint8(bright, stored_range=(0, 4095)).item() == 200
    # Floats in 0..1 too: the model was trained on floats in that range.
    assert to_uint8(np.full((1, 1, 1, 1), 0.5), stored_range=(0, 2)).item() == 64


@pytest.mark.parametrize(
    ("values", "fix"),
    [
        (np.full((1, 1, 2, 2), 16.0), "divide them by 16 if that is the value of white"),
        (np.full((1, 1, 2, 2), 250.0), "divide them by 255 if that is the value of white"),
        (np.full((1, 1, 2, 2), 1.02), "clip them to 0..1"),
        (np.full((1, 1, 2, 2), -0.5), "scale them to 0..1"),
        (np.full((1, 1, 2, 2), 200, np.uint16), "range=(0, 255)"),
        (np.full((1, 1, 2, 2), 1000, np.uint16), "range=(0, 1023)"),
        (np.full((1, 1, 2, 2), 65535, np.uint16), "range=(0, 65535)"),
        (np.full((1, 1, 2, 2), 256), "range=(0, 1023)"),
        (np.full((1, 1, 2, 2), -1), "range=(black, white)"),
    ],
)
def test_values_of_an_unknown_range_are_refused_with_what_to_do(
    values: np.ndarray, fix: str
) -> None:
    with pytest.raises(UsageError, match=r"range of .* is not known") as error:
        to_uint8(values)
    assert fix in error.value.fix
    with pytest.raises(UsageError) as error:
        to_uint8(values, accepts_range=False)
    assert "range=" not in error.value.fix


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((1, 1, 2, 2), np.nan), "finite"),
        (np.full((1, 1, 2, 2), np.inf), "finite"),
        (np.full((1, 1, 2, 2), 1j), "complex128"),
        (np.full((1, 1, 2, 2), "a"), "must be numbers"),
        (np.full((1, 1, 2, 2), None), "must be numbers, not object"),
        (np.full((1, 4, 2, 2), 999, np.uint16), "not known"),
    ],
)
def test_other_values_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        to_uint8(values)


def test_a_range_does_not_apply_to_the_alpha_channel() -> None:
    with pytest.raises(UsageError, match="not to RGBA"):
        to_uint8(np.full((1, 4, 2, 2), 999, np.uint16), value_range=(0, 999))


@pytest.mark.parametrize("wrong", [5, (1,), (1, 2, 3), (2, 1), (1, 1), (0, np.inf), "ab", "12345"])
def test_a_wrong_range_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="is not a range"):
        check_range(wrong)


def test_a_range_is_two_numbers() -> None:
    assert check_range(None) is None
    assert check_range([0, np.int64(16)]) == (0.0, 16.0)


def test_tensors_and_arrays_of_other_libraries_are_converted() -> None:
    class Foreign:
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
            return np.ones((2, 3))

    tensor = torch.linspace(0, 1, 6).reshape(2, 3).requires_grad_()
    np.testing.assert_array_equal(as_array(tensor), tensor.detach().numpy())
    assert as_array(tensor.bfloat16()).dtype == np.float32
    assert as_array(tensor.half()).dtype == np.float16
    assert as_array(Foreign()).shape == (2, 3)
    assert all(map(is_array, (tensor, np.zeros(2), Foreign())))
    assert not any(map(is_array, ([1], b"a", None)))
    with pytest.raises(UsageError, match=r"can't be converted.*[Ss]parse"):
        as_array(torch.zeros(2, 3).to_sparse())


def test_two_channels_and_masked_values_are_refused() -> None:
    with pytest.raises(UsageError, match=r"shape \(8, 9, 2\) can be 8 grey images"):
        to_nchw(np.zeros((8, 9, 2), np.uint8))
    assert to_nchw(np.zeros((8, 9, 2), np.uint8), channels="none").shape == (8, 1, 9, 2)
    values = np.ma.masked_array(np.zeros((8, 8)), np.eye(8))
    with pytest.raises(UsageError, match="masked values") as error:
        as_array(values)
    assert "filled" in error.value.fix
    assert as_array(np.ma.masked_array(np.ones(3))).tolist() == [1, 1, 1]


def test_nan_in_a_range_is_black() -> None:
    values = np.array([np.nan, -np.inf, 2, np.inf]).reshape(1, 1, 2, 2)
    assert to_uint8(values, value_range=(0, 4)).ravel().tolist() == [0, 0, 128, 255]
    assert to_uint8(values, stored_range=(0, 4)).ravel().tolist() == [0, 0, 128, 255]
    with pytest.raises(UsageError, match=r"75\.0% are NaN"):
        to_uint8(values)
    both = np.concatenate([values, np.full_like(values, np.nan)])
    with pytest.raises(UsageError, match="finite"):
        to_uint8(both, value_range=(0, 4))
