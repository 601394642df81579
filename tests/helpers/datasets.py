"""Files of data sets as tests need them: folders of images, CIFAR-10, MNIST's format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from convlens.data.types import EncodedFiles, Part


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    """Write an image of one color, with `value % 256` as its red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value % 256, 0, 0)).save(path)
    return path


def write_class_folders(root: Path, counts: dict[str, int]) -> Path:
    """Write `0.png`, `1.png` and so on into each folder below `root`; returns `root`."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            write_image(root / folder / f"{i}.png", i)
    return root


def write_idx_files(folder: Path, count: int = 20) -> np.ndarray:
    """Write random images and labels 0, 1, ..., 9, 0, ... in MNIST's format; returns the images."""
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
    image_header = np.array([2051, count, 28, 28], ">u4").tobytes()
    label_header = np.array([2049, count], ">u4").tobytes()
    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(image_header + images.tobytes())
        labels = bytes(i % 10 for i in range(count))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(label_header + labels)
    return images


def cifar10_files() -> dict[str, bytes]:
    """Return CIFAR-10's binary files by name, with four random images each."""
    random = np.random.default_rng(1)
    files = {}
    for i, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        records = random.integers(0, 256, (4, 3073), np.uint8)
        records[:, 0] = [i, (i + 1) % 10, (i + 2) % 10, 9]
        files[name] = records.tobytes()
    return files


def all_pixels(part: Part) -> np.ndarray:
    """Return all images of a part that consists of pixels."""
    assert not isinstance(part.images, EncodedFiles)
    return part.images[np.arange(part.images.shape[0])]
