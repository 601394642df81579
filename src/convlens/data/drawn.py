"""The built-in set `shapes`: ten kinds of shapes in random colours, drawn from their formulas.

Image `i` depends on `i` and the size alone, so any part of a set of any length can be drawn at
any time, always the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from convlens.data.decode import Pixels

SHAPES = (
    "arrow", "bar", "circle", "crescent", "cross", "heart", "ring", "square", "star", "triangle",
)  # fmt: skip

Plane = npt.NDArray[np.float32]
_BLOCK = 256  # images drawn together
_SEED = 20240


class Drawn:
    """`count` images uint8 `[3, size, size]`, drawn when asked for; `i` has class `i % 10`."""

    def __init__(self, count: int, size: int) -> None:
        self.shape: tuple[int, ...] = (count, 3, size, size)
        self.labels: npt.NDArray[np.int64] = np.arange(count, dtype=np.int64) % len(SHAPES)

    def __getitem__(self, index: npt.NDArray[np.int64], /) -> Pixels:
        out = np.empty((len(index), *self.shape[1:]), np.uint8)
        for start in range(0, len(index), _BLOCK):
            out[start : start + _BLOCK] = _draw(index[start : start + _BLOCK], self.shape[2])
        return out


def _draw(index: npt.NDArray[np.int64], size: int) -> Pixels:
    n = len(index)
    numbers = np.empty((n, 16), np.float32)
    noise = np.empty((n, 3, size, size), np.float32)
    for row, i in enumerate(index.tolist()):
        random = np.random.default_rng([_SEED, i])
        numbers[row] = random.random(16, np.float32)
        noise[row] = random.standard_normal((3, size, size), np.float32)
    u = numbers.T[:, :, None, None]
    scale = 0.45 + 0.4 * u[0]  # half the image's side is 1
    angle = 2 * np.pi * u[1]
    room = 1 - 0.8 * scale
    middle_x, middle_y = (2 * u[2] - 1) * room, (2 * u[3] - 1) * room
    grid = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    dx, dy = grid[None, None, :] - middle_x, grid[None, :, None] - middle_y
    x = (np.cos(angle) * dx + np.sin(angle) * dy) / scale
    y = (np.cos(angle) * dy - np.sin(angle) * dx) / scale
    inside = np.empty((n, size, size), np.float32)
    for kind in range(len(SHAPES)):
        mine = index % len(SHAPES) == kind
        inside[mine] = _FORMULAS[SHAPES[kind]](x[mine], y[mine])
    # From distance (about, in units of the shape) to cover: one pixel wide soft edges.
    cover = np.clip(inside * scale * (size / 2) + 0.5, 0, 1)[:, None]
    paper = numbers[:, 4:7, None, None]
    ink = numbers[:, 7:10, None, None]
    # Too alike to tell apart: the ink goes to the far side of each channel.
    alike = np.abs(ink - paper).max(axis=1, keepdims=True) < 0.35
    ink = np.where(alike, np.where(paper < 0.5, paper + 0.5, paper - 0.5), ink)
    slope = (u[10] - 0.5) * grid[None, None, :] + (u[11] - 0.5) * grid[None, :, None]
    image = paper + 0.5 * slope[:, None] + cover * (ink - paper)
    image += (0.02 + 0.1 * u[12])[:, None] * noise
    pixels: Pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return pixels


def _box(x: Plane, y: Plane, half_x: float, half_y: float) -> Plane:
    inside: Plane = np.minimum(half_x - np.abs(x), half_y - np.abs(y))
    return inside


def _disc(x: Plane, y: Plane, radius: float) -> Plane:
    distance: Plane = np.subtract(np.float32(radius), np.hypot(x, y))
    return distance


def _triangle(x: Plane, y: Plane) -> Plane:
    # Three half planes at 120 degrees; 0.5 is the inner radius of a triangle in the unit circle.
    low = 0.5 - y
    inside: Plane = np.minimum(low, 0.5 + 0.5 * y - np.float32(0.8660254) * np.abs(x))
    return inside


def _star(x: Plane, y: Plane) -> Plane:
    """Five points: the radius falls linearly from tip to notch in each tenth of the circle."""
    tenth = np.pi / 5
    fold = np.abs((np.arctan2(x, y) % (2 * tenth)) - tenth)
    radius = np.hypot(x, y)
    # The edge from the tip (1, at fold = tenth) to the notch (0.42, at fold = 0) is a line.
    px, py = radius * np.cos(fold), radius * np.sin(fold)
    tip_x, tip_y = np.cos(tenth), np.sin(tenth)
    normal_x, normal_y = tip_y, 0.42 - tip_x
    length = np.hypot(normal_x, normal_y)
    edge: Plane = -((px - 0.42) * normal_x + py * normal_y) / length
    return edge


def _heart(x: Plane, y: Plane) -> Plane:
    """A square on its corner with two half discs."""
    half = 0.5
    a, b = (x + y) * np.float32(0.70710678), (x - y) * np.float32(0.70710678)
    square = _box(a, b, half, half)
    left, right = _disc(a + half, b, half), _disc(a, b - half, half)
    return np.maximum(square, np.maximum(left, right))


def _arrow(x: Plane, y: Plane) -> Plane:
    head = np.minimum(y + 0.1, (0.9 - y) * 0.75 - np.abs(x) * 0.8)
    inside: Plane = np.maximum(head, _box(x, y + 0.45, 0.2, 0.45))
    return inside


_FORMULAS: dict[str, Callable[[Plane, Plane], Plane]] = {
    "arrow": _arrow,
    "bar": lambda x, y: _box(x, y, 0.95, 0.28),
    "circle": lambda x, y: _disc(x, y, 0.8),
    "crescent": lambda x, y: np.minimum(_disc(x, y, 0.9), -_disc(x - 0.45, y, 0.75)),
    "cross": lambda x, y: np.maximum(_box(x, y, 0.9, 0.25), _box(x, y, 0.25, 0.9)),
    "heart": _heart,
    "ring": lambda x, y: np.minimum(_disc(x, y, 0.9), -_disc(x, y, 0.55)),
    "square": lambda x, y: _box(x, y, 0.7, 0.7),
    "star": _star,
    "triangle": _triangle,
}
