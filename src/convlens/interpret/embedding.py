"""A map of images by a network's last features, in two dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from convlens.data.dataset import Split
from convlens.data.duplicates import HASH_SIDE, MIN_CORRELATION, correlation, is_plain
from convlens.errors import DataError, UsageError, lookup
from convlens.interpret.feature_viz import merge_top_images
from convlens.interpret.features import penultimate_features
from convlens.interpret.inputs import InspectedModel, Picture, draw_sample
from convlens.utils.console import progress_bar, quiet_mode
from convlens.utils.files import write_atomic

Floats = npt.NDArray[np.float64]
FEATURE_BATCH = 256
MIN_DISTINCT = 1e-6  # between the coordinates of features that are one point but for rounding
BEFORE_TSNE = 50  # principal components, as van der Maaten and Hinton 2008 take 30


@dataclass(frozen=True)
class Embedding:
    """Where images lie: `points` float64 `[N, 2]`, int64 `labels` and `preds` `[N]`, `ids`.

    `words` say how the map was made; labels mean `classes`.
    """

    run: str
    method: str
    words: str
    split: str
    data: str
    classes: tuple[str, ...]
    points: Floats
    labels: npt.NDArray[np.int64]
    preds: npt.NDArray[np.int64]
    ids: tuple[str, ...]
    seed: int
    file: Path

    def to_dict(self) -> dict[str, Any]:
        """All of it but the points, which stand in the CSV beside the picture."""
        kept = ("run", "method", "words", "split", "data", "seed")
        return {
            **{key: getattr(self, key) for key in kept},
            "n": len(self.ids),
            "mistakes": int((self.labels != self.preds).sum()),
            "files": [str(self.file), str(self.file.with_suffix(".csv"))],
        }


def pca(features: Floats, seed: int) -> tuple[Floats, str]:
    """The first two principal components, and how much of the variance they hold."""
    from sklearn.decomposition import PCA

    found = PCA(2, random_state=seed).fit(features)
    first, second = found.explained_variance_ratio_
    points: Floats = found.transform(features)
    return points, f"PCA: {first:.0%} and {second:.0%} of the variance"


def tsne(features: Floats, seed: int) -> tuple[Floats, str]:
    """t-SNE of the first 50 principal components, perplexity 30 or a third of the images."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    components = min(BEFORE_TSNE, *features.shape)
    before = PCA(components, random_state=seed).fit_transform(features)
    perplexity = min(30.0, (len(features) - 1) / 3)
    found = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1)
    points: Floats = found.fit_transform(before).astype(np.float64)
    return points, f"t-SNE, perplexity {perplexity:.0f}, of {components} principal components"


EMBEDDINGS: dict[str, Callable[[Floats, int], tuple[Floats, str]]] = {"pca": pca, "tsne": tsne}


def embed(
    subject: InspectedModel,
    method: str = "tsne",
    *,
    folder: Path,
    split: str = "val",
    data: str | Path | None = None,
    images: int = 2000,
    seed: int = 0,
    quiet: bool = False,
) -> Embedding:
    """Draws a map of held-out images by what goes into the network's last layer, as directions
    (features scaled to length 1).

    Writes `embedding-METHOD.png` and a CSV of id, x, y, class and prediction into `folder`.

    Args:
        method: of `EMBEDDINGS`.
        split, data, images, seed: at most so many images of a split, drawn by `seed`; t-SNE of
            2,000 takes some ten seconds.

    Raises:
        UsageError: no such method; DataError: fewer than four images, or classes of another set
            that the network doesn't know.
    """
    make = lookup(EMBEDDINGS, method, "embedding")
    with quiet_mode(quiet):
        chosen = draw_sample(subject, split, data=data, most=images, seed=seed)
        if len(chosen) < 4:
            raise DataError(f"{len(chosen)} images make no map", fix="take a larger split")
        features, preds = [], []
        with progress_bar(f"{subject.name}: {split} images", len(chosen)) as bar:
            for seen in penultimate_features(
                subject, (some for some, _ in chosen.batches(FEATURE_BATCH))
            ):
                features.append(seen.features)
                preds.append(seen.logits.argmax(1))
                bar.advance(len(seen.features))
        # Of length 1: else a few images of large features would make the map theirs.
        directions = F.normalize(torch.cat(features).double()).numpy()
        if float(np.ptp(directions, axis=0).max()) < MIN_DISTINCT:  # t-SNE of them ends the program
            raise DataError(
                f"{subject.name}: its last features are the same for all {len(chosen)} images",
                fix="`convlens diagnose` says more about the run",
            )
        if directions.shape[1] == 1:  # a map has two dimensions, whatever the features have
            directions = np.pad(directions, ((0, 0), (0, 1)))
        points, words = make(directions, seed)
    # What the network says, in the order of the set's classes; -1 is a class of its own.
    position = {name: number for number, name in enumerate(chosen.classes)}
    theirs = np.array([position.get(name, -1) for name in subject.classes])
    result = Embedding(
        run=subject.name,
        method=method,
        words=words,
        split=split,
        data=chosen.data,
        classes=chosen.classes,
        points=points,
        labels=chosen.labels.numpy(),
        preds=theirs[torch.cat(preds).numpy()],
        ids=chosen.ids,
        seed=seed,
        file=folder / f"embedding-{method}.png",
    )
    _write_embedding(result)
    return result


def _write_embedding(result: Embedding) -> None:
    import csv
    import io

    from convlens import plots

    names = [*result.classes, ""]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "x", "y", "class", "prediction"])
    rows = zip(result.ids, result.points, result.labels, result.preds, strict=True)
    for identity, (x, y), label, guess in rows:
        writer.writerow([identity, f"{x:.6g}", f"{y:.6g}", names[label], names[guess]])
    write_atomic(result.file.with_suffix(".csv"), text.getvalue())
    title = f"{result.run}: {len(result.ids):,} {result.split} images, {result.words}"
    named = ("first component", "second component") if result.method == "pca" else ("", "")
    figure = plots.embedding(
        result.points, result.labels, result.preds, result.classes, title, named
    )
    plots.save_figure(figure, result.file)


# ---- neighbours ----------------------------------------
# The training images that a network finds most like a given image.

SEARCH_BATCH = 256


@dataclass(frozen=True)
class Neighbor:
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
class NearestImages:
    """An image with what the network says of it and its nearest training images, nearest first."""

    image: str
    label: str | None
    prediction: str
    neighbors: tuple[Neighbor, ...]


@dataclass(frozen=True)
class NeighborReport:
    """What `nearest` found for each image, and its figure."""

    run: str
    searched: int
    found: tuple[NearestImages, ...]
    file: Path

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "searched": self.searched,
            "images": [asdict(each) for each in self.found],
            "files": [str(self.file)],
        }


def nearest_neighbors(
    subject: InspectedModel,
    pictures: Sequence[Picture],
    count: int = 5,
    *,
    folder: Path,
    quiet: bool = False,
) -> NeighborReport:
    """The `count` training images nearest to each picture, by cosine distance of last features.

    All training images of its run are searched, batch by batch; a picture that is one of them
    isn't its own neighbour. Draws `nearest.png` into `folder`.

    Raises:
        UsageError: no pictures, or no run; DataError: its images changed or have moved.
    """
    if not pictures or count < 1:
        raise UsageError(f"no images or {count} neighbours asked for", fix="name both")
    asked = torch.stack([picture.pixels for picture in pictures])
    with quiet_mode(quiet):
        train = subject.split("train")
        seen = list(penultimate_features(subject, asked.split(SEARCH_BATCH)))
        query = F.normalize(torch.cat([each.features for each in seen]).double())
        preds = torch.cat([each.logits.argmax(1) for each in seen]).tolist()
        similarity, number = _search_neighbors(
            subject, train, query, pictures, min(count, len(train))
        )
    found = []
    for row, (picture, guess) in enumerate(zip(pictures, preds, strict=True)):
        near = [
            Neighbor(
                id=str(train.ids[at]),
                number=at,
                label=subject.classes[int(train.labels[at])],
                distance=max(0.0, 1 - value),
                same=_is_same_image(picture.pixels, train.rows.gather(torch.tensor([at]))[0]),
            )
            for value, at in zip(similarity[row].tolist(), number[row].tolist(), strict=True)
            if at >= 0
        ]
        label = None if picture.label is None else subject.classes[picture.label]
        found.append(NearestImages(picture.name, label, subject.classes[guess], tuple(near)))
    result = NeighborReport(subject.name, len(train), tuple(found), folder / "nearest.png")
    _draw_neighbors(result, asked, train)
    return result


def _search_neighbors(
    subject: InspectedModel, train: Split, query: Tensor, pictures: Sequence[Picture], count: int
) -> tuple[Tensor, Tensor]:
    """Cosines and numbers `[Q, count]` of the nearest, nearest first; -1 where there is none."""
    best = torch.full((len(query), count), -2.0, dtype=torch.float64)
    number = torch.full((len(query), count), -1)
    # By id and not by number: another run's `train:3` may be another image, or held out here.
    position = {str(each): at for at, each in enumerate(train.ids)}
    own = [-1 if p.id is None else position.get(p.id, -1) for p in pictures]
    done = 0
    pieces = (train.rows.gather(some) for some in torch.arange(len(train)).split(SEARCH_BATCH))
    with progress_bar(f"{subject.name}: training images", len(train)) as bar:
        for seen in penultimate_features(subject, pieces):
            cosine = query @ F.normalize(seen.features.double()).T
            numbers = torch.arange(done, done + cosine.shape[1])
            cosine[numbers[None, :] == torch.tensor(own)[:, None]] = -2.0
            new = (cosine, numbers.expand(len(query), -1))
            best, number = merge_top_images((best, number), new, count)
            done += cosine.shape[1]
            bar.advance(cosine.shape[1])
    return best, torch.where(best > -2.0, number, -1)


def _is_same_image(one: Tensor, other: Tensor) -> str:
    if torch.equal(one, other):
        return "identical"
    pair = torch.stack([one, other]).float().mean(1, keepdim=True)
    small = F.interpolate(pair, (HASH_SIDE, HASH_SIDE), mode="bilinear", antialias=True)
    thumbs = small[:, 0].round().clamp(0, 255).to(torch.uint8).numpy()
    if is_plain(thumbs).any():
        return ""
    return "near-identical" if correlation(thumbs, np.array([[0, 1]]))[0] >= MIN_CORRELATION else ""


def _draw_neighbors(result: NeighborReport, asked: Tensor, train: Split) -> None:
    from convlens import plots

    images: list[Tensor] = []
    captions: list[list[str]] = []
    for picture, one in zip(asked, result.found, strict=True):
        images.append(picture)
        captions.append([one.image, f"says {one.prediction}", f"is {one.label or 'not known'}"])
        numbers = torch.tensor([near.number for near in one.neighbors], dtype=torch.int64)
        images += list(train.rows.gather(numbers))
        captions += [
            [f"{near.distance:.3f}", near.label, near.same.upper()] for near in one.neighbors
        ]
    title = f"{result.run}: nearest of {result.searched:,} training images (cosine distance)"
    figure = plots.neighbors_sheet(torch.stack(images).numpy(), captions, len(result.found), title)
    plots.save_figure(figure, result.file)
