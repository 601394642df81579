"""The training images that a network finds most like a given image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from convlens.data import Split
from convlens.data.similar import ALIKE, SIDE, correlation, is_plain
from convlens.errors import UsageError
from convlens.inspection.penultimate import penultimate
from convlens.inspection.subjects import Picture, Subject
from convlens.inspection.toppers import merged
from convlens.system.console import progress, quieted

BATCH = 256


@dataclass(frozen=True)
class Neighbour:
    """A training image: its cosine distance (0 same direction, 1 nothing in common), its class.

    `same`: `identical` pixel by pixel, `near-identical` (thumbnails that correlate by 0.985 or
    more), or empty.
    """

    id: str
    number: int
    label: str
    distance: float
    same: str


@dataclass(frozen=True)
class Nearest:
    """An image with what the network says of it and its nearest training images, nearest first."""

    image: str
    label: str | None
    prediction: str
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Neighbours:
    """What `nearest` found for each image, and its figure."""

    run: str
    searched: int
    found: tuple[Nearest, ...]
    file: Path

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "searched": self.searched,
            "images": [asdict(each) for each in self.found],
            "files": [str(self.file)],
        }


def nearest(
    subject: Subject,
    pictures: Sequence[Picture],
    count: int = 5,
    *,
    folder: Path,
    quiet: bool = False,
) -> Neighbours:
    """The `count` training images nearest to each picture, by cosine distance of last features.

    All training images of its run are searched, batch by batch; a picture that is one of them
    isn't its own neighbour. Draws `nearest.png` into `folder`.

    Raises:
        UsageError: no pictures, or no run; DataError: its images changed or have moved.
    """
    if not pictures or count < 1:
        raise UsageError(f"no images or {count} neighbours asked for", fix="name both")
    asked = torch.stack([picture.pixels for picture in pictures])
    with quieted(quiet):
        train = subject.split("train")
        seen = list(penultimate(subject, asked.split(BATCH)))
        query = F.normalize(torch.cat([each.features for each in seen]).double())
        guesses = torch.cat([each.logits.argmax(1) for each in seen]).tolist()
        similarity, number = _search(subject, train, query, pictures, min(count, len(train)))
    found = []
    for row, (picture, guess) in enumerate(zip(pictures, guesses, strict=True)):
        near = [
            Neighbour(
                id=str(train.ids[at]),
                number=at,
                label=subject.classes[int(train.labels[at])],
                distance=max(0.0, 1 - value),
                same=_same(picture.pixels, train.rows.gather(torch.tensor([at]))[0]),
            )
            for value, at in zip(similarity[row].tolist(), number[row].tolist(), strict=True)
            if at >= 0
        ]
        label = None if picture.label is None else subject.classes[picture.label]
        found.append(Nearest(picture.name, label, subject.classes[guess], tuple(near)))
    result = Neighbours(subject.name, len(train), tuple(found), folder / "nearest.png")
    _draw(result, asked, train)
    return result


def _search(
    subject: Subject, train: Split, query: Tensor, pictures: Sequence[Picture], count: int
) -> tuple[Tensor, Tensor]:
    """Cosines and numbers `[Q, count]` of the nearest, nearest first; -1 where there is none."""
    best = torch.full((len(query), count), -2.0, dtype=torch.float64)
    number = torch.full((len(query), count), -1)
    # By id and not by number: another run's `train:3` may be another image, or held out here.
    place = {str(each): at for at, each in enumerate(train.ids)}
    own = [-1 if p.id is None else place.get(p.id, -1) for p in pictures]
    done = 0
    pieces = (train.rows.gather(some) for some in torch.arange(len(train)).split(BATCH))
    with progress(f"{subject.name}: training images", len(train)) as bar:
        for seen in penultimate(subject, pieces):
            cosine = query @ F.normalize(seen.features.double()).T
            numbers = torch.arange(done, done + cosine.shape[1])
            cosine[numbers[None, :] == torch.tensor(own)[:, None]] = -2.0
            new = (cosine, numbers.expand(len(query), -1))
            best, number = merged((best, number), new, count)
            done += cosine.shape[1]
            bar.advance(cosine.shape[1])
    return best, torch.where(best > -2.0, number, -1)


def _same(one: Tensor, other: Tensor) -> str:
    if torch.equal(one, other):
        return "identical"
    pair = torch.stack([one, other]).float().mean(1, keepdim=True)
    small = F.interpolate(pair, (SIDE, SIDE), mode="bilinear", antialias=True)
    thumbs = small[:, 0].round().clamp(0, 255).to(torch.uint8).numpy()
    if is_plain(thumbs).any():
        return ""
    return "near-identical" if correlation(thumbs, np.array([[0, 1]]))[0] >= ALIKE else ""


def _draw(result: Neighbours, asked: Tensor, train: Split) -> None:
    from convlens import plots

    images: list[Tensor] = []
    captions: list[list[str]] = []
    for picture, one in zip(asked, result.found, strict=True):
        images.append(picture)
        captions.append([one.image, f"says {one.prediction}", f"is {one.label or 'not known'}"])
        numbers = torch.tensor([near.number for near in one.neighbours], dtype=torch.int64)
        images += list(train.rows.gather(numbers))
        captions += [
            [f"{near.distance:.3f}", near.label, near.same.upper()] for near in one.neighbours
        ]
    title = f"{result.run}: nearest of {result.searched:,} training images (cosine distance)"
    figure = plots.neighbours(torch.stack(images).numpy(), captions, len(result.found), title)
    plots.save(figure, result.file)
