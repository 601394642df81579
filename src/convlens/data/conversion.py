"""The conversion of a set's images: size, channels, fit, value range and background.

`choose_conversion` replaces every `auto` of the recipe by what fits the images. It reads some
headers; only where these show deep images or transparency does it read pixels, and only those of
training images. The conversion becomes part of the model file, and every image that the model
sees later is converted in the same way.
"""

from __future__ import annotations

import statistics
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from convlens.data.cache import ImageRows, as_index, map_in_order
from convlens.data.decode import (
    ALPHA,
    MAX_PIXELS,
    Conversion,
    ImageFacts,
    Pixels,
    UnreadableImage,
    probe_image,
    read_values,
    scale_to_uint8,
)
from convlens.data.types import EncodedFiles, ImageSource, IndexArray, raise_if_transient
from convlens.errors import UsageError

if TYPE_CHECKING:
    from convlens.recipe import DataConfig

STANDARD_SIZES = (16, 28, 32, 48, 64, 96, 128)  # the choices of an automatic image size
MAX_PROBED_IMAGES = 200  # headers that are read
# `fit: auto` pads images whose median ratio of the long to the short side is larger. 3:2 is still
# cropped, also where the sides are rounded (640 x 426).
MAX_CROP_RATIO = 1.5 * 1.02
MIN_KEPT_AREA = 0.6  # a crop that keeps less of the images is noted
# The value range is found on so many training images, and on so many pixels of each.
MAX_RANGE_IMAGES, MAX_RANGE_PIXELS = 256, 1 << 15
RANGE_PERCENTILES = (0.1, 99.9)
MAX_ALPHA_IMAGES = 64
MIN_VISIBLE_ALPHA = 16  # the color of more transparent pixels is imprecise
MAX_COLOR_SPREAD = 8  # levels; colors within it count as one
MIN_CONTRAST = 64  # levels between a color and white
# Warnings: the values of a nearly constant image differ by fewer levels than the first number; all
# images should span the second number of the 256 levels; 90% of the pixels of deep images should
# fall into more levels than the third.
NEARLY_CONSTANT, MIN_SPAN, MIN_CENTRAL_LEVELS = 4, 32, 8
SUSPICIOUS_SHARE = 0.25  # of the images, that are constant or identical
MAX_CHECKED_IMAGES = 256  # decoded training images that are checked


@dataclass(frozen=True)
class NativeImages:
    """What the images of a set are like before they are converted.

    Attributes:
        side: Typical side in pixels: the median of the shorter sides or, for elongated images that
            are padded automatically, of the square root of the area.
        channels: 1 if all images are grey, otherwise 3.
        count: Number of images in the training part of the source, from which others may be held
            out.
    """

    side: int
    channels: int
    count: int = 0


# Returns the image size for a set whose recipe leaves it open; None for the default.
ChooseSize = Callable[[NativeImages], int | None]


@dataclass(frozen=True)
class ConversionChoice:
    """A conversion and what people should know about it.

    Attributes:
        conversion: The conversion.
        native: What the images are like before it.
        kept_area: Mean share of the area of the images that it keeps.
        notes: What was found in the pixels and how it is handled. Warnings begin with `warning:`.
        sample: Numbers of the images whose pixels it depends on.
    """

    conversion: Conversion
    native: NativeImages
    kept_area: float
    notes: tuple[str, ...] = ()
    sample: tuple[int, ...] = ()


def choose_conversion(
    config: DataConfig,
    images: ImageSource | EncodedFiles,
    train_numbers: Callable[[], IndexArray],
    *,
    known: Conversion | None = None,
    choose_size: ChooseSize | None = None,
) -> ConversionChoice:
    """Return the conversion of a recipe, with `auto` replaced by what fits the images.

    Args:
        config: The data section of a recipe.
        images: All images of the source's training part.
        train_numbers: Returns the numbers of the training split; those beyond `images` are not
            used. Called only where pixels must be read.
        known: The conversion, if it was chosen before.
        choose_size: Chooses the image size if `data.image_size` is `auto`. By default it is that
            of the images, or the largest standard size that is not above their typical side.
    """
    if not isinstance(images, EncodedFiles):
        count, channels, height, width = images.shape
        native, size = NativeImages(height, channels, count), [(width, height)]
        conversion = known or _resolve(config, size, native, height, choose_size)
        return ConversionChoice(conversion, native, kept_area(size, conversion.fit))
    headers = list(_probe(images, config.max_pixels or MAX_PIXELS).values())
    sizes = [(header.width, header.height) for header in headers] or [(32, 32)]
    shows_alpha = config.background == ALPHA
    is_grey = [header.grey or (shows_alpha and header.alpha) for header in headers]
    channels = 1 if is_grey and all(is_grey) else 3
    native = NativeImages(_typical_side(config, sizes), channels, len(images))
    if known is not None:
        return ConversionChoice(known, native, kept_area(sizes, known.fit))
    default_size = max((s for s in STANDARD_SIZES if s <= native.side), default=STANDARD_SIZES[0])
    conversion = _resolve(config, sizes, native, default_size, choose_size)
    pixels = _Pixels(images, train_numbers, config.seed, conversion.max_pixels)
    notes = _fit_notes(config.fit, conversion.fit, sizes)
    is_deep = [header.deep for header in headers]
    if any(is_deep):
        has_floats = any(header.mode == "F" for header in headers)
        if config.range == "auto" or has_floats:
            values = pixels.deep_values()
            notes += not_finite_notes(values, "training images")
            if config.range == "auto":
                conversion = replace(conversion, value_range=_find_range(values, notes))
        if not all(is_deep):
            notes.append(
                "images of 8 bits and of more bits are mixed: the values of 8-bit images are kept, "
                "the range applies to the others"
            )
    elif config.range != "auto":
        notes.append("data.range has no effect on images of 8 bits")
    is_transparent = [header.alpha and not header.deep for header in headers]
    if config.background == "auto" and headers and all(is_transparent):
        color = pixels.find_hidden_color()
        if color is not None:
            channels = 1 if config.channels == "auto" else int(config.channels)
            conversion = replace(conversion, background=ALPHA, channels=channels)
            notes.append(
                f"all that is visible in these transparent images has one color, {color}, which a "
                "white background would hide: the alpha channel is used as a grey image "
                "(data.background=white uses the colors)"
            )
    area = kept_area(sizes, conversion.fit)
    return ConversionChoice(conversion, native, area, tuple(notes), pixels.sample)


def kept_area(sizes: Sequence[tuple[int, int]], fit: str) -> float:
    """Return the mean share of the area of images that `fit` keeps; 1 for `pad` and `stretch`.

    Args:
        sizes: Width and height of each image.
        fit: `crop`, `pad` or `stretch`.
    """
    if fit != "crop":
        return 1.0
    return statistics.fmean(min(size) / max(size) for size in sizes)


def _fit_notes(requested: str, fit: str, sizes: Sequence[tuple[int, int]]) -> list[str]:
    if requested == "auto" and fit == "pad":
        return [
            f"most images are elongated and are padded: a crop would keep "
            f"{kept_area(sizes, 'crop'):.0%} of their area (data.fit=crop crops them)"
        ]
    if kept_area(sizes, fit) < MIN_KEPT_AREA:
        return [f"the crop keeps {kept_area(sizes, fit):.0%} of the area (data.fit=pad keeps all)"]
    return []


def recorded_conversion(config: DataConfig) -> Conversion | None:
    """Return the conversion that the resolved recipe of a run records; None if it is incomplete.

    Recipes of earlier versions have no range and no background: deep images are converted one by
    one, as these versions did.
    """
    if "auto" in (config.image_size, config.channels, config.fit):
        return None
    native = NativeImages(int(config.image_size), int(config.channels))
    return _resolve(config, [], native, native.side)


def resolve_fit(fit: str, sizes: Sequence[tuple[int, int]]) -> str:
    """Return how images of these sizes become square: `auto` crops, or pads elongated images."""
    if fit != "auto":
        return fit
    ratio = statistics.median(max(size) / min(size) for size in sizes)
    return "pad" if ratio > MAX_CROP_RATIO else "crop"


def _typical_side(config: DataConfig, sizes: Sequence[tuple[int, int]]) -> int:
    # An elongated image that is padded automatically keeps about its number of pixels.
    by_area = config.fit == "auto" and resolve_fit(config.fit, sizes) == "pad"
    return int(statistics.median((w * h) ** 0.5 if by_area else min(w, h) for w, h in sizes))


def _resolve(
    config: DataConfig,
    sizes: Sequence[tuple[int, int]],
    native: NativeImages,
    default_size: int,
    choose_size: ChooseSize | None = None,
) -> Conversion:
    """Return the conversion as far as the sizes of the images determine it."""
    if config.image_size == "auto":
        size = (choose_size and choose_size(native)) or default_size
    else:
        size = config.image_size
    return Conversion(
        size=size,
        channels=native.channels if config.channels == "auto" else int(config.channels),
        fit=resolve_fit(config.fit, sizes),
        value_range=None if config.range == "auto" else config.range,
        background="white" if config.background == "auto" else config.background,
        max_pixels=config.max_pixels or MAX_PIXELS,
    )


def _probe(files: EncodedFiles, max_pixels: int) -> dict[int, ImageFacts]:
    """Return the headers of up to 200 images, evenly spaced, by number."""
    headers = {}
    numbers = np.linspace(0, len(files) - 1, MAX_PROBED_IMAGES).round().astype(int)
    for i in np.unique(numbers).tolist():
        try:
            headers[i] = probe_image(files.read(i), files.name(i), max_pixels=max_pixels)
        except UnreadableImage:
            continue  # decoding will list all unreadable files with their reasons
    return headers


def conversion_with_keys(conversion: Conversion, config: DataConfig) -> Conversion:
    """Return the conversion of a model for another data set, whose keys may change some of it.

    Raises:
        UsageError: A key would change what the network was trained on.
    """
    own = {
        "image_size": conversion.size,
        "channels": conversion.channels,
        "fit": conversion.fit,
        "background": conversion.background,
    }
    wrong = [
        f"data.{key}={getattr(config, key)}"
        for key, value in own.items()
        if getattr(config, key) not in ("auto", value)
    ]
    if wrong:
        raise UsageError(
            f"{', '.join(wrong)} can't be changed: the network was trained with "
            f"{', '.join(f'{key}={value}' for key, value in own.items())}",
            fix="leave it out; data.range and data.max_pixels may differ",
        )
    if config.range != "auto":
        conversion = replace(conversion, value_range=config.range)
    return replace(conversion, max_pixels=config.max_pixels or conversion.max_pixels)


def deep_image_notes(images: ImageSource | EncodedFiles, conversion: Conversion) -> list[str]:
    """Return warnings about deep images among those that a trained model is tested on.

    Args:
        images: Of another data set.
        conversion: That of the model.
    """
    if not isinstance(images, EncodedFiles):
        return []
    headers = _probe(images, conversion.max_pixels)
    deep = [number for number, header in headers.items() if header.deep]
    notes = []
    if deep and conversion.value_range is None:
        notes.append(
            by_itself_note(
                len(deep),
                len(headers),
                images.name(deep[0]),
                "data.range=[low, high] sets the values that become black and white",
            )
        )
    floats = [number for number in deep if headers[number].mode == "F"]
    if floats:
        numbers = np.array(floats, np.int64)
        pixels = _Pixels(images, lambda: numbers, 0, conversion.max_pixels)
        notes += not_finite_notes(pixels.deep_values(), "images")
    return notes


def by_itself_note(count: int, total: int, first: str, fix: str) -> str:
    """Return a warning about deep images given to a model that has no value range.

    Args:
        count, total: Number of deep images, and of all images that were looked at.
        first: Name of the first deep image.
        fix: How to give a range.
    """
    return (
        f"warning: {count:,} of {total:,} images have more than 8 bits per value, the first is "
        f"{first}; the model has no value range (it was trained on 8-bit images, or by an earlier "
        f"version), so each is scaled by its type and its own values; {fix}"
    )


def not_finite_note(
    count: int, total: int, share: float, *, what: str = "images", first: str = ""
) -> str:
    """Return a warning about images with NaN or infinite values.

    Args:
        count, total: Number of such images, and of all images that were looked at.
        share: That of these values in such images.
        what: What the images are, e.g. `training images`.
        first: Name of the first such image, if it is known.
    """
    example = f", the first is {first}" if first else ""
    return (
        f"warning: {count:,} of {total:,} {what} have values that are NaN or infinite ({share:.1%} "
        f"of their pixels){example}: NaN becomes black, as the lowest value; if it means something "
        "else, replace it in the files"
    )


def not_finite_notes(values: Sequence[npt.NDArray[np.generic]], what: str) -> list[str]:
    """Return a warning if values of deep images are NaN or infinite.

    Args:
        values: Of each image.
        what: What the images are, e.g. `training images`.
    """
    shares = [1 - float(np.isfinite(each).mean()) for each in values if len(each)]
    found = [share for share in shares if share > 0]
    if not found:
        return []
    return [not_finite_note(len(found), len(shares), statistics.fmean(found), what=what)]


@dataclass
class _Pixels:
    """Samples of the training images, with the values as they are stored.

    Attributes:
        sample: Numbers of all images that were read.
    """

    files: EncodedFiles
    train_numbers: Callable[[], IndexArray]
    seed: int
    max_pixels: int
    sample: tuple[int, ...] = ()

    def deep_values(self) -> list[npt.NDArray[np.generic]]:
        """Return values of up to 256 deep images; other images are left out."""
        numbers = self._draw(MAX_RANGE_IMAGES)
        read = map_in_order(partial(self._deep_values, MAX_RANGE_PIXELS), numbers)
        return [found for found in read if found is not None]

    def find_hidden_color(self) -> str | None:
        """Return the color, `#rrggbb`, of all visible pixels if white would hide it, or None."""
        low, high = np.full(4, 255), np.zeros(4, np.int64)
        for found in map_in_order(self._visible_colors, self._draw(MAX_ALPHA_IMAGES)):
            if found is None:
                continue
            low, high = np.minimum(low, found[0]), np.maximum(high, found[1])
            if (high - low)[:3].max() > MAX_COLOR_SPREAD:
                return None
        is_drawing = high[3] - low[3] >= MIN_CONTRAST
        is_hidden = 255 - low[:3].min() < MIN_CONTRAST
        return f"#{bytes(high[:3].tolist()).hex()}" if is_drawing and is_hidden else None

    def _draw(self, count: int) -> list[int]:
        """Draw up to `count` training images and return their numbers, in order."""
        numbers = self.train_numbers()
        numbers = numbers[numbers < len(self.files)]
        if len(numbers) > count:
            numbers = np.random.default_rng(self.seed).choice(numbers, count, replace=False)
        drawn: list[int] = np.sort(numbers).tolist()
        self.sample = tuple(sorted({*self.sample, *drawn}))
        return drawn

    def _read(self, number: int) -> npt.NDArray[np.generic] | None:
        try:
            content, name = self.files.read(number), self.files.name(number)
            return read_values(content, max_pixels=self.max_pixels, name=name)
        except UnreadableImage as error:
            raise_if_transient(error)
            return None  # decoding will give the reason

    def _deep_values(self, count: int, number: int) -> npt.NDArray[np.generic] | None:
        """Return up to `count` values of a deep image, drawn at random; None for other images."""
        values = self._read(number)
        if values is None or values.dtype == np.uint8:
            return None
        colors = values[..., :3] if values.ndim == 3 else values
        flat = colors.reshape(-1)
        if len(flat) <= count:
            return flat
        return flat[np.random.default_rng(number).integers(0, len(flat), count)]

    def _visible_colors(self, number: int) -> tuple[IndexArray, IndexArray] | None:
        """Return the smallest and the largest red, green, blue and alpha of an image.

        Colors count only where they are visible. None: nothing is visible, or it is unreadable.
        """
        values = self._read(number)
        if values is None:
            return None
        if values.dtype != np.uint8 or values.shape[2] != 4:  # not transparent: all is visible
            return np.zeros(4, np.int64), np.full(4, 255)
        levels = values.astype(np.int64)
        alpha = levels[..., 3]
        visible = levels[alpha >= MIN_VISIBLE_ALPHA]
        if not len(visible):
            return None
        low, high = visible.min(0), visible.max(0)
        low[3], high[3] = alpha.min(), alpha.max()
        return low, high


def _find_range(
    values: Sequence[npt.NDArray[np.generic]], notes: list[str]
) -> tuple[float, float] | None:
    """Return the value range of deep images; None without any values. Adds to `notes`."""
    finite = [each[np.isfinite(each)] for each in values]
    finite = [each for each in finite if len(each)]
    if not finite:
        return None
    value_range = value_range_of(finite)
    low, high = value_range
    notes.append(
        f"values of more than 8 bits: {low:.6g} to {high:.6g} become 0 to 255 (the 0.1 and "
        f"99.9 percentiles of {len(finite)} training images; data.range=[low, high] sets "
        "others)"
    )
    notes += range_warnings(finite, value_range)
    return value_range


def value_range_of(values: Sequence[npt.NDArray[np.generic]]) -> tuple[float, float]:
    """Return the range that values of deep images are converted with.

    It is the 0.1 and 99.9 percentile of all values; where these are equal, smallest and largest.

    Args:
        values: Finite values of each image.
    """
    joined = np.concatenate([each.astype(np.float64) for each in values])
    low, high = np.percentile(joined, RANGE_PERCENTILES)
    if all(each.dtype.kind in "iu" for each in values):
        # Rounded first: interpolation may add 1e-13.
        low, high = np.floor(np.round(low, 6)), np.ceil(np.round(high, 6))
    if not low < high:
        low, high = joined.min(), joined.max()
    if not low < high:  # one single value
        high = np.nextafter(low + 1, np.inf)
    return float(low), float(high)


def range_warnings(
    values: Sequence[npt.NDArray[np.generic]], value_range: tuple[float, float]
) -> list[str]:
    """Return a warning if most values of deep images fall into few of the 256 levels.

    It is then likely that some outliers, such as a bright background, determine the range.
    """
    joined = np.concatenate([each.astype(np.float64) for each in values])
    joined = joined[:: max(1, len(joined) >> 20)]
    low, high = np.percentile(joined, (5, 95))
    central = joined[(joined >= low) & (joined <= high)]
    levels = len(np.unique(scale_to_uint8(central, value_range)))
    if levels >= MIN_CENTRAL_LEVELS or len(np.unique(central)) == levels:
        return []
    low_limit, high_limit = _suggest_range(joined)
    return [
        f"warning: 90% of the pixels, {low:.6g} to {high:.6g}, fall into {levels} of 256 levels: "
        "smaller differences are lost; set data.range to the values that matter, e.g. "
        f"data.range=[{low_limit:.6g},{high_limit:.6g}], which leaves out "
        f"{_share_outside(joined, low_limit, high_limit):.2%} of the pixels"
    ]


def _suggest_range(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the range of the values without those that are far from the middle half.

    "Far" is beyond twice the distance of the quartiles from them: normally distributed values stay
    in (3.4 standard deviations), while hot pixels and numbers that stand for missing values
    (-9999) do not. If the middle half is constant, as a background is, the middle 90% count.
    """
    for percentiles, factor in (((25, 75), 2.0), ((5, 95), 0.5)):
        low, high = np.percentile(values, percentiles)
        if low < high:
            margin = factor * (high - low)
            near = values[(values >= low - margin) & (values <= high + margin)]
            return float(near.min()), float(near.max())
    return float(values.min()), float(values.max())


def _share_outside(values: npt.NDArray[np.float64], low: float, high: float) -> float:
    return float(((values < low) | (values > high)).mean())


def pixel_warnings(rows: ImageRows) -> list[str]:
    """Return warnings about decoded training images that can hardly be told apart.

    Args:
        rows: The training images. Up to 256 of them, evenly spaced, are checked.
    """
    count = min(rows.shape[0], MAX_CHECKED_IMAGES)
    numbers = np.linspace(0, rows.shape[0] - 1, count).round().astype(np.int64)
    lows, highs, keys = list[Pixels](), list[Pixels](), list[Hashable]()
    for start in range(0, count, 32):
        images = rows.gather(as_index(numbers[start : start + 32])).numpy()
        lows.append(images.min((2, 3)))
        highs.append(images.max((2, 3)))
        keys += [zlib.crc32(np.ascontiguousarray(image).data) for image in images]
    return level_warnings(np.concatenate(lows), np.concatenate(highs), keys) if count else []


def level_warnings(low: Pixels, high: Pixels, keys: Iterable[Hashable]) -> list[str]:
    """Return warnings about images that are constant, of low contrast, or all the same.

    Args:
        low, high: Smallest and largest value of each channel of each image, uint8 `[N, C]`.
        keys: A key for each image; equal images have equal keys.
    """
    n = len(low)
    if not n:
        return []
    fix = "see data.range, data.background and data.fit"
    constant = int(((high - low).max(1) < NEARLY_CONSTANT).sum())
    if constant > SUSPICIOUS_SHARE * n:
        return [
            f"warning: {constant:,} of {n:,} training images are (nearly) constant once they are "
            f"decoded, so little tells them apart; {fix}"
        ]
    warnings = []
    # A few unusual images do not count.
    darkest, brightest = np.percentile(low.min(1), 5), np.percentile(high.max(1), 95)
    span = int(brightest - darkest) + 1
    if span < MIN_SPAN:
        warnings.append(
            f"warning: the training images use {span} of 256 levels ({darkest:.0f} to "
            f"{brightest:.0f}) once they are decoded: finer differences are lost; {fix}"
        )
    identical = Counter(keys).most_common(1)[0][1]
    if identical > max(2, SUSPICIOUS_SHARE * n):
        warnings.append(
            f"warning: {identical:,} of {n:,} training images are identical once they are decoded; "
            f"{fix}"
        )
    return warnings
