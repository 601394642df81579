"""Small pictures as data URIs, and how many of them a page can carry."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, features

from convlens.data import Split

SIDE = 96  # pixels: larger images are reduced
EXACT = 40  # up to this size the pixels are kept as they are
CAPS = (20, 12, 8, 4, 2, 1)  # images of one cell, the first that fits
BUDGET = 7 << 20  # bytes of all of them; base64 adds a third

Pixels = npt.NDArray[np.uint8]


def thumbnail(pixels: Pixels) -> str:
    """uint8 `[C, H, W]`, C = 1 or 3, as a data URI: WebP, lossless where it is small.

    PNG where Pillow was built without WebP.
    """
    grey = pixels.shape[0] == 1
    image = Image.fromarray(pixels[0] if grey else np.ascontiguousarray(np.moveaxis(pixels, 0, 2)))
    exact = max(image.size) <= EXACT
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if features.check("webp"):
        kind = "webp"
        image.convert("RGB").save(buffer, "WEBP", lossless=exact, quality=80, method=4)
    else:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), f"image/{kind}")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def of_cells(images: Split, cells: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """Thumbnails of the first images of each cell, as many as the page can carry.

    Args:
        cells: positions in the split by the name of their cell, in the order they are shown.
    """
    for cap in CAPS:
        found: dict[str, list[str]] = {}
        size = 0
        for name, where in cells.items():
            found[name] = thumbnails(images, where[:cap])
            size += sum(map(len, found[name]))
            if size > BUDGET * 4 // 3 and cap > CAPS[-1]:
                break
        else:
            return found
    return found


def thumbnails(images: Split, where: Sequence[int]) -> list[str]:
    """The images of a split at these positions."""
    if not len(where):
        return []
    pixels = images.rows.gather(torch.as_tensor(list(where), dtype=torch.int64)).cpu().numpy()
    return [thumbnail(each) for each in pixels]
