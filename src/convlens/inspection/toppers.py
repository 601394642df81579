"""The images of a data set that excite each channel of a layer most."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convlens.data import Split
from convlens.errors import DataError
from convlens.inspection import layers
from convlens.inspection.subjects import Subject
from convlens.system.console import progress

IMAGES = 9  # for each channel
BATCH, BYTES = 128, 1 << 26  # images at a time, and the most that their maps may take
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TopImages:
    """The strongest answers of each channel over a split, strongest first.

    `peaks` float64 `[C, K]` are maxima over positions, `images` int64 `[C, K]` the images'
    numbers in the split and `places` int64 `[C, K, 2]` row and column of the peak in maps of
    `shape`. `selectivity` float64 `[C]` says how far the peaks stand out: their mean above the
    mean over all images, in standard deviations; 0 for a channel that never changes, NaN for one
    with values that aren't finite. `labels` int64 `[N]` are the split's.
    """

    run: str
    layer: str
    split: str
    shape: tuple[int, int]
    peaks: Floats
    images: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    selectivity: Floats
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """The channels, most selective first; silent and broken ones last."""
        return np.argsort(-np.nan_to_num(self.selectivity, nan=-1), kind="stable")

    @property
    def silent(self) -> int:
        """Channels that give the same for all images."""
        return int((self.selectivity == 0).sum())

    @property
    def broken(self) -> int:
        return int(np.isnan(self.selectivity).sum())

    def commonest(self, channel: int) -> tuple[str, int]:
        """The class most frequent among a channel's images, and how often."""
        found = Counter(self.labels[self.images[channel]].tolist()).most_common(1)[0]
        return self.classes[found[0]], found[1]

    def to_dict(self, channels: int) -> dict[str, Any]:
        rows = [
            {
                "channel": each,
                "selectivity": float(self.selectivity[each]),
                "peaks": self.peaks[each].tolist(),
                "images": [f"{self.split}:{i}" for i in self.images[each].tolist()],
                "classes": [self.classes[i] for i in self.labels[self.images[each]].tolist()],
            }
            for each in self.shown(channels)
        ]
        counts = {"n": len(self.labels), "silent": self.silent, "broken": self.broken}
        return {"run": self.run, "layer": self.layer, "split": self.split, **counts, "top": rows}

    def shown(self, channels: int) -> list[int]:
        """The most selective channels, none silent or broken, each with images of its own.

        A channel a third of whose images are those of one before it waits behind the others:
        of the last layer's hundreds many answer to the same few images.
        """
        alive = len(self.selectivity) - self.silent - self.broken
        first: list[int] = []
        waiting: list[int] = []
        seen: list[set[int]] = []
        for channel in self.order[:alive].tolist():
            mine = set(self.images[channel].tolist())
            alike = any(len(mine & other) * 3 > len(mine) for other in seen)
            (waiting if alike else first).append(channel)
            if not alike:
                seen.append(mine)
            if len(first) == channels:
                break
        return [*first, *waiting][:channels]


def strongest(
    subject: Subject, split: Split, layer: str, name: str, count: int = IMAGES
) -> TopImages:
    """Runs a split through the network and keeps the strongest `count` images of each channel.

    Streams: what is held is a batch and the best so far. Of equally strong images the earlier
    ones are kept.

    Args:
        name: what the split is called.

    Raises:
        UsageError: no such layer. DataError: a split without images.
    """
    (layer,) = layers.find(subject.model, [layer])
    if not len(split):
        raise DataError(f"the {name} split has no images", fix="take another with --split")
    best: tuple[Tensor, ...] | None = None
    sums = squares = torch.zeros(())
    finite = torch.ones((), dtype=torch.bool)
    shape, step, start = (1, 1), 1, 0
    with progress(f"{subject.name} {layer}", len(split)) as bar:
        while start < len(split):
            index = torch.arange(start, min(start + step, len(split)))
            images = subject.prepared(split.rows.gather(index))
            maps = layers.activations(subject.model, images, [layer])[layer]
            shape = (maps.shape[2], maps.shape[3])
            step = max(1, min(BATCH, BYTES // (4 * maps[0].numel())))
            flat = maps.flatten(2)
            finite = finite & flat.isfinite().all(2).all(0).cpu()
            peaks, places = flat.nan_to_num(nan=-torch.inf, posinf=-torch.inf).max(2)
            values = peaks.T.double().cpu()  # [C, B]
            sums, squares = sums + values.sum(1), squares + values.square().sum(1)
            best = merged(best, (values, index.expand(len(values), -1), places.T.cpu()), count)
            start += len(index)
            bar.advance(len(index))
    assert best is not None
    peaks_, numbers, places_ = (each.numpy() for each in best)
    selectivity = _selectivity(peaks_, sums.numpy(), squares.numpy(), len(split))
    selectivity[~finite.numpy()] = np.nan
    where = np.stack([places_ // shape[1], places_ % shape[1]], axis=2)
    return TopImages(
        subject.name, layer, name, shape, peaks_, numbers, where, selectivity,
        split.labels.numpy(), subject.classes,
    )  # fmt: skip


def _selectivity(peaks: Floats, sums: Floats, squares: Floats, count: int) -> Floats:
    with np.errstate(invalid="ignore"):  # of channels that are not finite
        mean = sums / count
        spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
        # Rounding leaves a trace of spread in a channel that never changes.
        alive = spread > 1e-7 * np.maximum(np.abs(mean), 1e-30)
        above = (peaks.mean(1) - mean) / np.where(alive, spread, 1)
    return np.where(alive, above, 0.0)


def merged(
    best: tuple[Tensor, ...] | None, new: tuple[Tensor, ...], count: int
) -> tuple[Tensor, ...]:
    """Of each row the `count` greatest values of both, and what belongs to them.

    All are `[rows, any number]`, the values first; stable, so that of equals the earlier win.
    """
    joined = new if best is None else tuple(torch.cat(p, 1) for p in zip(best, new, strict=True))
    order = joined[0].argsort(dim=1, descending=True, stable=True)[:, :count]
    return tuple(each.gather(1, order) for each in joined)


def figure(found: TopImages, split: Split, channels: int) -> Any:
    """Rows of the strongest images of the most selective channels."""
    from convlens import plots
    from convlens.plots.kernels import Mark

    shown = found.shown(channels)
    high, wide = found.shape
    marks: list[list[Mark | None]] = []
    names = []
    for channel in shown:
        boxes = [
            Mark(x / wide, y / high, (x + 1) / wide, (y + 1) / high) if high * wide > 1 else None
            for y, x in found.places[channel].tolist()
        ]
        marks.append(boxes)
        label, times = found.commonest(channel)
        names.append((f"#{channel}", f"{times}/{found.images.shape[1]} {label}"))
    images = [split.rows.gather(torch.from_numpy(found.images[c])).numpy() for c in shown]
    place = "the frame is the peak's place in the layer's map" if high * wide > 1 else ""
    place = place or "the layer has one value an image, so no place is marked"
    silent = f" {found.silent} never change." if found.silent else ""
    silent += f" {found.broken} are NaN or infinite." if found.broken else ""
    note = (
        f"The {found.images.shape[1]} of {len(found.labels):,} {found.split} images that excite a "
        f"channel most, strongest first; {place}. Channels whose peaks stand out most (in standard "
        f"deviations over the images) first, those with much the same images left out; beside them "
        f"the commonest class.{silent}"
    )
    title = f"{found.run}, {found.layer}: {len(shown)} of {len(found.selectivity):,} channels"
    return plots.top_images(images, marks, names, title, note)
