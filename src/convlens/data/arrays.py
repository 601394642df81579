"""Images in memory: arrays and tensors of every usual shape and type, as uint8 `[N, C, H, W]`.

Nothing is guessed. A shape that can be read in two ways, or values whose range is unknown, are
errors that say what to give.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convlens.data.decode import Pixels, scale_to_uint8
from convlens.errors import UsageError, lookup

Array = npt.NDArray[Any]
ValueRange = tuple[float, float]

CHANNEL_COUNTS = (1, 3, 4)  # grey, RGB, RGBA
# Values of the argument `channels`: which axis of an image holds its channels.
CHANNEL_AXES = ("first", "last", "none")
# Layouts by that axis. N: images, H: height, W: width, C: channels.
LAYOUTS = {
    "HW": "none",
    "HWC": "last",
    "CHW": "first",
    "NHW": "none",
    "NHWC": "last",
    "NCHW": "first",
}
SEVERAL_IMAGES = ("NHW", "NHWC", "NCHW")
ONE_IMAGE = ("HW", "HWC", "CHW")
# Integers without a range of their own: Python's and NumPy's default types.
_WIDE_INTEGERS = ("int32", "int64", "uint32", "uint64")


def is_array(value: object) -> bool:
    """Return whether `value` is an array or tensor of any library."""
    return isinstance(value, torch.Tensor) or hasattr(value, "__array__")


def as_array(value: Any) -> Array:
    """Return an array or tensor as a NumPy array, which may share its memory.

    Raises:
        UsageError: it can't be converted, or values are masked.
    """
    if np.ma.is_masked(value):
        raise UsageError(
            "an array with masked values is not an image",
            fix="give these pixels a value: array.filled(0)",
        )
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            # NumPy has no bfloat16.
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:  # libraries raise nearly anything
        reason = " ".join(str(error).split())[:160]
        raise UsageError(
            f"a {type(value).__name__} can't be converted to a NumPy array: {reason}",
            fix="give a NumPy array",
        ) from error


def to_nchw(
    array: Array,
    *,
    channels: str | None = None,
    layouts: Collection[str] = tuple(LAYOUTS),
    where: str = "",
) -> Array:
    """Return images as a view `[N, C, H, W]` with 1, 3 or 4 channels.

    Args:
        array: one image or several, in one of `LAYOUTS`.
        channels: the axis of the channels of an image: `first`, `last` or `none`. Needed only for
            shapes that can be read in two ways.
        layouts: layouts that are possible here.
        where: name of the array in errors.

    Raises:
        UsageError: the shape is not that of images, is ambiguous, or holds no pixels.
    """
    layout = _select_layout(array.shape, channels, layouts, where)
    if layout in ONE_IMAGE:
        array = array[None]
    if layout in ("HW", "NHW"):
        return array[:, None]
    return np.moveaxis(array, 3, 1) if layout in ("HWC", "NHWC") else array


def _select_layout(
    shape: tuple[int, ...], channels: str | None, layouts: Collection[str], where: str
) -> str:
    if channels is not None:
        lookup(dict.fromkeys(CHANNEL_AXES), channels, "axis of the channels")
    candidates = [
        layout
        for layout in _possible_layouts(shape, channels)
        if layout in layouts and channels in (None, LAYOUTS[layout])
    ]
    if shape[:1] == (1,) and "CHW" in candidates and "NHW" in candidates:
        candidates.remove("NHW")  # one grey image either way
    is_empty_batch = shape[:1] == (0,) and all(shape[1:]) and set(candidates) <= {*SEVERAL_IMAGES}
    if 0 in shape and not is_empty_batch:
        raise UsageError(
            f"an image without pixels: shape {_text(shape)}", where=where, fix="leave it out"
        )
    if not candidates and channels is None and len(shape) == 3 and "NHW" in layouts:
        raise UsageError(
            f"an array of shape {_text(shape)} can be {_describe('NHW', shape)} [N, H, W] or one "
            "image of grey and alpha [H, W, 2], which is not supported",
            where=where,
            fix="give channels='none' for grey images, or leave out the alpha channel",
        )
    if not candidates:
        axis = "" if channels is None else f" with channels={channels!r}"
        possible = ", ".join(f"[{', '.join(layout)}]" for layout in layouts)
        raise UsageError(
            f"an array of shape {_text(shape)} does not hold images{axis}",
            where=where,
            fix=f"give {possible} with 1, 3 or 4 channels",
        )
    if len(candidates) > 1:
        readings = [f"{_describe(each, shape)} [{', '.join(each)}]" for each in candidates]
        choices = [f"channels={LAYOUTS[each]!r}" for each in candidates]
        raise UsageError(
            f"an array of shape {_text(shape)} can be {' or '.join(readings)}",
            where=where,
            fix=f"give {' or '.join(choices)}",
        )
    return candidates[0]


def _possible_layouts(shape: tuple[int, ...], channels: str | None) -> list[str]:
    """Return the layouts that a shape can have.

    An axis of size 1, 3 or 4 can hold the channels. Grey images of such a width are not expected
    without `channels="none"`, unless they are square.
    """
    if len(shape) == 2:
        return ["HW"]
    if len(shape) not in (3, 4):
        return []
    *_, first, middle, last = shape
    layouts = []
    if last in CHANNEL_COUNTS:
        layouts.append("HWC" if len(shape) == 3 else "NHWC")
    if first in CHANNEL_COUNTS:
        layouts.append("CHW" if len(shape) == 3 else "NCHW")
    # Two values are gray and alpha, which is not supported, rather than a width; unless the first
    # axis can hold the channels, so that a width of 2 is possible.
    is_pair = last == 2 and first not in CHANNEL_COUNTS
    is_grey_batch = last not in CHANNEL_COUNTS and not is_pair
    is_grey_batch = is_grey_batch or last == middle or channels == "none"
    if len(shape) == 3 and is_grey_batch:
        layouts.append("NHW")
    return layouts


def _describe(layout: str, shape: tuple[int, ...]) -> str:
    if layout in ONE_IMAGE:
        return "one image"
    return f"{shape[0]:,} grey images" if layout == "NHW" else f"{shape[0]:,} images"


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def to_uint8(
    array: Array,
    *,
    value_range: ValueRange | None = None,
    stored_range: ValueRange | None = None,
    accepts_range: bool = True,
    where: str = "",
) -> Pixels:
    """Return images `[N, C, H, W]` of any type as contiguous uint8.

    Booleans become 0 and 255. uint8, and wider integers within 0..255, are kept. Floats in 0..1
    are scaled and rounded. All other values need a range, in which NaN becomes 0.

    Args:
        value_range: the values that become 0 and 255, given by the caller; applies to all types.
        stored_range: the range that the model was trained with; applies to all types but uint8 and
            booleans.
        accepts_range: whether the caller can give a range; for the advice in errors.
        where: name of the array in errors.

    Raises:
        UsageError: not numbers, values whose range is unknown, NaN without a range, or an image
            without a finite value.
    """
    kind = array.dtype
    if kind.kind == "b":
        return np.ascontiguousarray(array * np.uint8(255))
    if kind.kind not in "uif":
        raise UsageError(f"images must be numbers, not {kind}", where=where)
    if kind == np.uint8 and value_range is None:
        return np.ascontiguousarray(array)
    value_range = check_range(value_range) or stored_range
    if kind.kind == "f":
        _check_finite(array, where, has_range=value_range is not None)
    if value_range is not None:
        if array.shape[1] == 4:
            raise UsageError(
                "a range of values applies to grey and RGB images, not to RGBA",
                where=where,
                fix="give RGBA images as uint8, or leave out their alpha channel",
            )
        return np.ascontiguousarray(scale_to_uint8(array, value_range))
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if kind.kind == "f" and low >= 0 and high <= 1:
        return np.ascontiguousarray(np.rint(array * 255).astype(np.uint8))
    if kind.name in _WIDE_INTEGERS and low >= 0 and high <= 255:
        return np.ascontiguousarray(array.astype(np.uint8))
    raise UsageError(
        f"the range of {kind} images with values from {low:g} to {high:g} is not known",
        where=where,
        fix=_scaling_advice(kind, float(low), float(high), accepts_range),
    )


def _check_finite(array: Array, where: str, *, has_range: bool) -> None:
    """Refuse NaN and infinities where no range says what they become, and images of nothing else.

    Args:
        array: Floats `[N, C, H, W]`.
    """
    finite = np.isfinite(array)
    if finite.all() or (has_range and finite.any(axis=(1, 2, 3)).all()):
        return
    raise UsageError(
        f"image values must be finite; {1 - finite.mean():.1%} are NaN or infinite",
        where=where,
        fix="replace them by a number, e.g. with numpy.nan_to_num",
    )


def check_range(value_range: Any) -> ValueRange | None:
    """Return a range given by the caller as two floats; None for None.

    Raises:
        UsageError: it is not a pair of finite, increasing numbers.
    """
    if value_range is None:
        return None
    try:
        low, high = map(float, value_range)
    except (TypeError, ValueError):
        low = high = 0.0
    if not (low < high and np.isfinite([low, high]).all()):
        raise UsageError(
            f"range={value_range!r} is not a range", fix="give (low, high), e.g. (0, 4095)"
        )
    return low, high


def _scaling_advice(kind: np.dtype[Any], low: float, high: float, accepts_range: bool) -> str:
    """Say what to do with images whose values are between `low` and `high`."""
    if low < 0:
        return "scale them to 0..1" + ", or give range=(black, white)" * accepts_range
    if kind.kind == "f" and high <= 2:
        return "clip them to 0..1" + f", or give range=(0, {high:g})" * accepts_range
    # The maximum of such images: 16 (the digits of scikit-learn), or all bits set.
    maxima = (16, *((1 << bits) - 1 for bits in (8, 10, 12, 14, 16)))
    maximum = next((each for each in maxima if high <= each), round(high))
    if kind.kind != "f" and maximum == 16:
        maximum = 255
    option = f", or give range=(0, {maximum})" * accepts_range
    return f"divide them by {maximum} if that is the value of white{option}"
