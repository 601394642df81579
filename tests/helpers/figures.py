"""Inputs for figures, and ways to read a figure back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from convlens import plots

HOSTILE_NAMES = [
    "$x$",
    "a_{b}^{c} $\\frac{1}{",
    "\\$5",
    "line\nbreak",
    "nul\0",
    "\udcff",
    "日本語",
    "العربية",
    "\N{SUNFLOWER}",
    "",
    " ",
    "_underscore",
    "W" * 300,
    "%s {0}",
]


def make_history(epochs: int) -> dict[str, list[float]]:
    """Training curves of a run."""
    steps = np.arange(1, epochs + 1)
    return {
        "epoch": steps.tolist(),
        "train_loss": (1 / steps).tolist(),
        "val_loss": (1 / steps + 0.1).tolist(),
        "train_accuracy": (1 - 0.5 / steps).tolist(),
        "val_accuracy": (0.97 - 0.5 / steps).tolist(),
    }


def make_images(n: int, channels: int = 3, size: int = 8, seed: int = 0) -> np.ndarray:
    """Random images without a white pixel, so that they stand out from the page."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 255, (n, channels, size, size), dtype=np.uint8)


def make_maps(*shape: int, size: int = 3) -> np.ndarray:
    generator = np.random.default_rng(1)
    return generator.normal(size=(*shape, size, size)).astype(np.float32)


def make_panel(count: int = 10, size: int = 3) -> plots.Panel:
    """A layer of so many channels, none of them blank or broken."""
    none = np.zeros(count, dtype=bool)
    maps = np.abs(make_maps(count, size=size))
    return plots.Panel("layer", "note", maps, (0.0, 2.0), none, none)


def save_and_read(
    figure: Figure, folder: Path, name: str = "plot.png", **options: int
) -> np.ndarray:
    """Save a figure as PNG and return its pixels, RGB `[H, W, 3]`."""
    plots.save_figure(figure, folder / name, **options)
    with Image.open(folder / name) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB"))


def texts_of(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]
