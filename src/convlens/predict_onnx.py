#!/usr/bin/env python3
"""Classify image files with an ONNX model that `convlens export` wrote.

Needs Python 3.11, numpy, Pillow and onnxruntime; neither convlens nor torch:

    python predict_onnx.py photo.jpg more/*.png
    python predict_onnx.py --model other.onnx --top 3 --json photo.jpg

Images are prepared exactly as by `convlens predict`: this file repeats the steps of its decoder
with the settings in the metadata of the model. Scaling, normalization and temperature are inside
the model. `convlens export` has run this file and compared its answers.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageColor

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 89_478_485
MAX_DRAFT = 8  # JPEG can be decoded at 1/2, 1/4 and 1/8 of its size
ORIENTATION = 0x0112  # EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class OnnxClassifier:
    """A model with its classes and preprocessing.

    Args:
        model: path of the ONNX file.
    """

    def __init__(self, model: str | Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, not printed
        self.session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "preprocessing" not in metadata:
            raise ValueError(f"{model} was not written by `convlens export`")
        self.classes: list[str] = json.loads(metadata["classes"])
        self.preprocessing: dict[str, Any] = json.loads(metadata["preprocessing"])

    def probabilities(self, path: str | Path) -> np.ndarray:
        """Return the probability of each class for an image file, float32 `[K]`."""
        images = read_pixels(path, self.preprocessing)[None]
        (probs,) = self.session.run(["probabilities"], {"images": images})
        return np.asarray(probs[0])

    def predict(self, path: str | Path, top: int = 1) -> dict[str, Any]:
        """Return the most probable classes of an image file, in the form of `predict --json`."""
        probs = self.probabilities(path)
        order = np.argsort(-probs, kind="stable")[:top]
        best = [{"label": self.classes[i], "prob": float(probs[i])} for i in order]
        return {"filename": str(path), **best[0], "top": best}


def read_pixels(path: str | Path, preprocessing: dict[str, Any]) -> np.ndarray:
    """Return an image file as the input of the model, uint8 `[C, S, S]`.

    Args:
        path: of the file.
        preprocessing: the entry of that name in the metadata of the model.
    """
    size, fit = preprocessing["image_size"], preprocessing["fit"]
    value_range = preprocessing.get("value_range")
    with open_image(path) as image:
        reduce_scale(image, size, fit, preprocessing.get("max_pixels", MAX_PIXELS))
        values = None if value_range is None else read_deep(image, path)
        image.load()
        orientation = read_orientation(image)  # now, since Pillow turns TIFF when it loads
        source = image
        if value_range is not None and values is not None:
            source = scale_deep(values, value_range)
        if orientation in UPRIGHT:
            source = source.transpose(UPRIGHT[orientation])
        background = preprocessing.get("background", "white")
        source = to_eight_bit(source, image.format, preprocessing["channels"], background)
    pixels = np.asarray(resize(source, size, fit), dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def open_image(path: str | Path) -> Any:
    """Open an image file in one of the formats that convlens reads."""
    Image.init()
    return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])


def reduce_scale(image: Any, size: int, fit: str, max_pixels: int) -> None:
    """Let a large JPEG be decoded at a smaller scale; refuse other images that are too large."""
    scale = 1
    while image.width * image.height > max_pixels * scale**2:
        scale *= 2
    if scale > (MAX_DRAFT if image.format in ("JPEG", "MPO") else 1):
        raise ValueError(f"more than {max_pixels:,} pixels ({image.width} x {image.height})")
    # Twice the target size leaves enough detail for an antialiased resize.
    width, height = (2 * side for side in resized_size(image.size, size, fit))
    if scale > 1:
        width, height = min(width, image.width // scale), min(height, image.height // scale)
    image.draft(None, (width, height))


def read_orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF does not affect the pixels
        return 1


def read_deep(image: Any, path: str | Path) -> np.ndarray | None:
    """Return the values of an image with more than 8 bits per value; None for other images."""
    arguments = image.tile[0][3] if image.tile else None
    encoding = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    if isinstance(encoding, str) and encoding.startswith(("RGB;16", "RGBA;16")):
        return read_deep_color(image, encoding, path)
    if not (image.mode == "F" or image.mode.startswith("I")):
        return None
    maximum = None
    if image.format == "PPM" and image.mode == "I" and isinstance(arguments, tuple):
        maximum = int(arguments[1])
    tags = getattr(image, "tag_v2", {})  # of TIFF
    image.load()
    values = np.asarray(image)
    if maximum is not None:  # Pillow has scaled the values to 0..65535
        values = np.rint(values * (maximum / 65535)).astype(np.uint16)
    check_finite(values)
    is_unsigned = tags.get(258) == (32,) and tags.get(339, (1,)) == (1,)
    # Pillow reads unsigned integers of 32 bits as signed ones.
    return values.view(np.uint32) if image.mode == "I" and is_unsigned else values


def read_deep_color(image: Any, encoding: str, path: str | Path) -> np.ndarray:
    """Return 16-bit color, of which Pillow keeps only the upper byte of each value.

    Read a second time in the other byte order, the lower byte is the upper one.
    """
    kind, order = encoding.split(";16")
    order = sys.byteorder[0].upper() if order == "N" else order
    swapped = f"{kind};16{'B' if order == 'L' else 'L'}"
    with open_image(path) as again:
        again.tile = [
            tile._replace(
                args=(swapped, *tile.args[1:]) if isinstance(tile.args, tuple) else swapped
            )
            for tile in again.tile
        ]
        lower = np.asarray(again.convert(kind), dtype=np.uint16)
    image.load()
    return np.asarray(np.asarray(image, dtype=np.uint16) << np.uint16(8) | lower)


def scale_deep(values: np.ndarray, value_range: list[float]) -> Image.Image:
    """Map the range of values of the training to 0..255; alpha keeps its own range."""
    low, high = value_range

    def scale(channel: np.ndarray) -> np.ndarray:
        return to_levels((np.subtract(channel, low, dtype=np.float64) * 255) / (high - low))

    if values.ndim == 2:
        return Image.fromarray(scale(values))
    channels = [scale(values[..., c]) for c in range(3)]
    if values.shape[2] == 4:
        channels.append((values[..., 3].astype(np.uint16) >> np.uint16(8)).astype(np.uint8))
    return Image.fromarray(np.stack(channels, axis=2))


def to_levels(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.rint(np.nan_to_num(np.clip(values, 0, 255))).astype(np.uint8))


def check_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).any():
        raise ValueError("none of its values is finite")


def to_eight_bit(
    image: Image.Image, file_format: str, channels: int, background: str
) -> Image.Image:
    """Return an image as 8-bit grey or RGB, with a color behind its transparent parts."""
    if image.mode.startswith("I;16"):
        image = scale_16_bit(np.asarray(image))
    elif image.mode in ("I", "F"):
        is_16_bit = file_format in ("PPM", "PNG") and image.mode == "I"
        image = scale_32_bit(np.asarray(image), is_16_bit)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        if background == "alpha":
            image = image.getchannel("A")
        else:
            opaque = Image.new("RGBA", image.size, ImageColor.getrgb(background))
            opaque.alpha_composite(image)
            image = opaque.convert("RGB")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image.convert("L" if channels == 1 else "RGB")


def scale_16_bit(values: np.ndarray) -> Image.Image:
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def scale_32_bit(values: np.ndarray, is_16_bit: bool) -> Image.Image:
    """Scale 32-bit grey by the range that its values suggest: 0..1, 0..255, 0..65535 or its own."""
    check_finite(values)
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    if is_16_bit or (low >= 0 and 255 < high <= 65535 and values.dtype.kind == "i"):
        return scale_16_bit(np.clip(values.astype(np.int64), 0, 65535))
    scaled = values.astype(np.float64)
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        scaled = scaled * 255
    elif low < 0 or high > 255:
        scaled = (scaled - low) * (255 / max(high - low, 1e-300))
    return Image.fromarray(to_levels(scaled))


def resized_size(image_size: tuple[int, int], size: int, fit: str) -> tuple[int, int]:
    """Return width and height after the resize, before cropping or padding."""
    if fit == "stretch":
        return size, size
    width, height = image_size
    side = min(image_size) if fit == "crop" else max(image_size)
    return max(1, round(width * size / side)), max(1, round(height * size / side))


def resize(image: Image.Image, size: int, fit: str) -> Image.Image:
    """Crop the center, pad with black, or stretch; the resize is antialiased and bilinear."""
    if image.size == (size, size):
        return image
    if fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    width, height = resized_size(image.size, size, fit)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    padded = Image.new(image.mode, (size, size))
    padded.paste(image, ((size - width) // 2, (size - height) // 2))
    return padded


def find_model() -> Path:
    """Return the ONNX file beside this script.

    Raises:
        SystemExit: there is none, or several.
    """
    found = sorted(Path(__file__).parent.glob("*.onnx"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        sys.exit(f"error: choose the model with --model FILE (beside this script: {names})")
    return found[0]


def main() -> None:
    """Print file name, label and probability of each image; exit with 1 if one can't be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--model", help="ONNX file; by default the one beside this script")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="number of classes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    # `reduce_scale` has limits of its own, those of the training.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = None
    classifier = OnnxClassifier(arguments.model or find_model())
    predictions = []
    for path in arguments.images:
        try:
            predictions.append(classifier.predict(path, max(1, arguments.top)))
        except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as e:
            predictions.append({"filename": path, "error": str(e) or type(e).__name__})
    if arguments.json:
        print(json.dumps({"predictions": predictions}))
    for each in predictions if not arguments.json else ():
        if "error" in each:
            print(f"{each['filename']}  unreadable: {each['error']}")
        else:
            best = "  ".join(f"{entry['label']} {entry['prob']:.1%}" for entry in each["top"])
            print(f"{each['filename']}  {best}")
    sys.exit(any("error" in each for each in predictions))


if __name__ == "__main__":
    main()
