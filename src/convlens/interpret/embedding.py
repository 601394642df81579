"""Penultimate features of images: two-dimensional embeddings and nearest training images."""

from __future__ import annotations

import csv
import io
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
from convlens.recipe import DataConfig
from convlens.utils.console import progress_bar, quiet_mode
from convlens.utils.files import write_atomic

Floats = npt.NDArray[np.float64]
FEATURE_BATCH = 256  # images
MIN_EMBEDDED_IMAGES = 4
MIN_FEATURE_RANGE = 1e-6  # below, normalized features are equal up to rounding
TSNE_COMPONENTS = 50  # principal components before t-SNE; van der Maaten and Hinton 2008 use 30
TSNE_PERPLEXITY = 30.0
INDEX_BATCH = 64  # images: the first neighbors are found after the first batch
MAX_INDEX_BYTES = 1 << 28  # of the features of an index: a network may have 25,000 of them
NO_NEIGHBOR = -1
EXCLUDED = -2.0  # below every cosine similarity


# Embeddings


@dataclass(frozen=True)
class Embedding:
    """A two-dimensional embedding of images.

    Attributes:
        run: name of the network.
        method: a key of `EMBEDDINGS`.
        words: how the embedding was made.
        split: the split of the images.
        data: name of their data set.
        classes: classes of the data set.
        points: float64 `[N, 2]`.
        labels: int64 `[N]`, indices into `classes`.
        preds: int64 `[N]`, indices into `classes`; -1 for a class that the data set does not have.
        ids: of the images.
        seed: of the sample and the embedding.
        file: the figure; the CSV file has the same name.
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
        """Return everything except the points, which are in the CSV file."""
        return {
            "run": self.run,
            "method": self.method,
            "words": self.words,
            "split": self.split,
            "data": self.data,
            "seed": self.seed,
            "n": len(self.ids),
            "mistakes": int((self.labels != self.preds).sum()),
            "files": [str(self.file), str(self.file.with_suffix(".csv"))],
        }


def pca(features: Floats, seed: int) -> tuple[Floats, str]:
    """Return the first two principal components and their shares of the variance in words."""
    from sklearn.decomposition import PCA

    fitted = PCA(2, random_state=seed).fit(features)
    first, second = fitted.explained_variance_ratio_
    points: Floats = fitted.transform(features)
    return points, f"PCA: {first:.0%} and {second:.0%} of the variance"


def tsne(features: Floats, seed: int) -> tuple[Floats, str]:
    """Return t-SNE of the first 50 principal components and its settings in words.

    The perplexity is 30, or a third of the number of images if that is smaller.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    components = min(TSNE_COMPONENTS, *features.shape)
    reduced = PCA(components, random_state=seed).fit_transform(features)
    perplexity = min(TSNE_PERPLEXITY, (len(features) - 1) / 3)
    method = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1)
    points: Floats = method.fit_transform(reduced).astype(np.float64)
    return points, f"t-SNE, perplexity {perplexity:.0f}, of {components} principal components"


EMBEDDINGS: dict[str, Callable[[Floats, int], tuple[Floats, str]]] = {"pca": pca, "tsne": tsne}


def embed(
    subject: InspectedModel,
    method: str = "tsne",
    *,
    folder: Path,
    split: str = "val",
    data: str | Path | DataConfig | None = None,
    images: int = 2000,
    seed: int = 0,
    quiet: bool = False,
) -> Embedding:
    """Embed images by the direction of their penultimate features (scaled to length 1).

    Writes `embedding-METHOD.png` and a CSV file of id, x, y, class and prediction.

    Args:
        subject: the network.
        method: a key of `EMBEDDINGS`.
        folder: of the files.
        split: the split of the images.
        data: another data set than the run's own.
        images: maximum number of images; t-SNE of 2,000 takes about ten seconds.
        seed: of the sample and the embedding.
        quiet: print nothing.

    Raises:
        UsageError: an unknown method.
        DataError: fewer than four images, or features that are all equal.
    """
    compute = lookup(EMBEDDINGS, method, "embedding")
    with quiet_mode(quiet):
        sample = draw_sample(subject, split, data=data, max_images=images, seed=seed)
        if len(sample) < MIN_EMBEDDED_IMAGES:
            raise DataError(
                f"{len(sample)} images are too few for an embedding", fix="use a larger split"
            )
        features, preds = [], []
        batches = (pixels for pixels, _ in sample.batches(FEATURE_BATCH))
        with progress_bar(f"{subject.name}: {split} images", len(sample)) as bar:
            for outputs in penultimate_features(subject, batches):
                features.append(outputs.features)
                preds.append(outputs.logits.argmax(1))
                bar.advance(len(outputs.features))
        # Of length 1, so that a few images with large features do not dominate the embedding.
        directions = F.normalize(torch.cat(features).double()).numpy()
        # Checked because t-SNE of equal points crashes the process.
        if float(np.ptp(directions, axis=0).max()) < MIN_FEATURE_RANGE:
            raise DataError(
                f"{subject.name}: the penultimate features of all {len(sample)} images are equal",
                fix="`convlens diagnose` says more about the run",
            )
        if directions.shape[1] == 1:  # an embedding has two dimensions
            directions = np.pad(directions, ((0, 0), (0, 1)))
        points, words = compute(directions, seed)
    class_index = {name: index for index, name in enumerate(sample.classes)}
    to_data_class = np.array([class_index.get(name, -1) for name in subject.classes])
    embedding = Embedding(
        run=subject.name,
        method=method,
        words=words,
        split=split,
        data=sample.data,
        classes=sample.classes,
        points=points,
        labels=sample.labels.numpy(),
        preds=to_data_class[torch.cat(preds).numpy()],
        ids=sample.ids,
        seed=seed,
        file=folder / f"embedding-{method}.png",
    )
    _write_embedding(embedding)
    return embedding


def _write_embedding(embedding: Embedding) -> None:
    from convlens import plots

    names = [*embedding.classes, ""]  # the last for a prediction of -1
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "x", "y", "class", "prediction"])
    for identity, (x, y), label, pred in zip(
        embedding.ids, embedding.points, embedding.labels, embedding.preds, strict=True
    ):
        writer.writerow([identity, f"{x:.6g}", f"{y:.6g}", names[label], names[pred]])
    write_atomic(embedding.file.with_suffix(".csv"), text.getvalue())
    count = f"{len(embedding.ids):,} {embedding.split} images"
    is_pca = embedding.method == "pca"
    figure = plots.embedding(
        embedding.points,
        embedding.labels,
        embedding.preds,
        embedding.classes,
        f"{embedding.run}: {count}, {embedding.words}",
        ("first component", "second component") if is_pca else ("", ""),
    )
    plots.save_figure(figure, embedding.file)


# Nearest training images


@dataclass(frozen=True)
class Neighbor:
    """A training image that is close to a given image.

    Attributes:
        id: of the training image.
        number: its index in the training split.
        label: its class.
        distance: cosine distance (0 for the same direction, 1 for orthogonal features).
        same: `identical` pixels, `near-identical` (thumbnails that correlate by 0.985 or more), or
            empty.
    """

    id: str
    number: int
    label: str
    distance: float
    same: str


@dataclass(frozen=True)
class NearestImages:
    """An image, its class if known, its prediction and its neighbors, the nearest first."""

    image: str
    label: str | None
    prediction: str
    neighbors: tuple[Neighbor, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "image": self.image,
            "label": self.label,
            "prediction": self.prediction,
            "neighbours": [asdict(neighbor) for neighbor in self.neighbors],
        }


@dataclass(frozen=True)
class NeighborReport:
    """The result of `nearest_neighbors`.

    Attributes:
        run: name of the network.
        searched: number of training images searched.
        found: the neighbors of each image.
        file: the figure.
    """

    run: str
    searched: int
    found: tuple[NearestImages, ...]
    file: Path

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "searched": self.searched,
            "images": [each.to_dict() for each in self.found],
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
    """Find the training images nearest to each image by cosine distance of penultimate features.

    All training images of the run are searched, batch by batch. A training image is not its own
    neighbor. Writes `nearest.png`.

    Args:
        subject: the run.
        pictures: the images.
        count: neighbors of each image.
        folder: of the figure.
        quiet: print nothing.

    Raises:
        UsageError: no images, or the network is not a run.
        DataError: images that have changed or moved.
    """
    if not pictures:
        raise UsageError("no images given", fix="name files, test:17, worst:5 or class:a:3")
    if count < 1:
        raise UsageError(f"{count} neighbors requested", fix="use at least one")
    queries = torch.stack([picture.pixels for picture in pictures])
    with quiet_mode(quiet):
        train = subject.split("train")
        outputs = list(penultimate_features(subject, queries.split(FEATURE_BATCH)))
        directions = F.normalize(torch.cat([each.features for each in outputs]).double())
        preds = torch.cat([each.logits.argmax(1) for each in outputs]).tolist()
        similarity, numbers = _search(subject, train, directions, pictures, min(count, len(train)))
    found = []
    for row, (picture, pred) in enumerate(zip(pictures, preds, strict=True)):
        neighbors = _describe_neighbors(subject, train, picture, similarity[row], numbers[row])
        label = None if picture.label is None else subject.classes[picture.label]
        found.append(NearestImages(picture.name, label, subject.classes[pred], neighbors))
    report = NeighborReport(subject.name, len(train), tuple(found), folder / "nearest.png")
    _draw_neighbors(report, queries, train)
    return report


def _describe_neighbors(
    subject: InspectedModel, train: Split, picture: Picture, similarity: Tensor, numbers: Tensor
) -> tuple[Neighbor, ...]:
    """Return the training images with these numbers as neighbors of a picture."""
    return tuple(
        Neighbor(
            id=str(train.ids[number]),
            number=number,
            label=subject.classes[int(train.labels[number])],
            distance=max(0.0, 1 - cosine),
            same=_describe_equality(picture.pixels, train.rows.gather(torch.tensor([number]))[0]),
        )
        for cosine, number in zip(similarity.tolist(), numbers.tolist(), strict=True)
        if number != NO_NEIGHBOR
    )


@dataclass(frozen=True)
class FeatureIndex:
    """Penultimate features of training images, kept to search them for many images.

    Attributes:
        train: the training split.
        numbers: of the indexed images in that split, int64 `[N]`.
        directions: their features divided by their lengths, float32 `[N, D]`.
    """

    train: Split
    numbers: Tensor
    directions: Tensor

    def __len__(self) -> int:
        return len(self.numbers)


def index_features(
    subject: InspectedModel,
    train: Split,
    max_images: int,
    *,
    seed: int = 0,
    on_batch: Callable[[FeatureIndex], None] = lambda index: None,
) -> FeatureIndex:
    """Compute the features of the training images, or of a seeded sample if there are too many.

    Args:
        max_images: at most so many, and so many that `MAX_INDEX_BYTES` are enough.
        on_batch: gets the index of the images so far, which are a random sample at any time.
    """
    (first,) = penultimate_features(subject, [train.rows.gather(torch.tensor([0]))])
    max_images = min(max_images, MAX_INDEX_BYTES // first.features.nbytes)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    # Sorted, so that neighboring images are read from disk together.
    batches = [numbers.sort().values for numbers in order[:max_images].split(INDEX_BATCH)]
    index = FeatureIndex(train, order[:0], first.features[:0])
    with progress_bar(f"{subject.name}: training images", len(order[:max_images])) as bar:
        images = (train.rows.gather(numbers) for numbers in batches)
        for numbers, outputs in zip(batches, penultimate_features(subject, images), strict=True):
            index = FeatureIndex(
                train,
                torch.cat([index.numbers, numbers]),
                torch.cat([index.directions, F.normalize(outputs.features)]),
            )
            on_batch(index)
            bar.advance(len(numbers))
    by_number = index.numbers.argsort()
    return FeatureIndex(train, index.numbers[by_number], index.directions[by_number])


def nearest_in_index(
    subject: InspectedModel, index: FeatureIndex, picture: Picture, count: int = 5
) -> tuple[Neighbor, ...]:
    """Return the indexed images nearest to a picture, as `nearest_neighbors` finds them."""
    (outputs,) = penultimate_features(subject, [picture.pixels[None]])
    cosine = index.directions @ F.normalize(outputs.features)[0]
    if picture.id is not None:
        is_itself = [str(index.train.ids[number]) == picture.id for number in index.numbers]
        cosine[torch.tensor(is_itself)] = EXCLUDED
    best = cosine.argsort(descending=True, stable=True)[:count]
    best = best[cosine[best] > EXCLUDED]
    return _describe_neighbors(subject, index.train, picture, cosine[best], index.numbers[best])


def _search(
    subject: InspectedModel,
    train: Split,
    directions: Tensor,
    pictures: Sequence[Picture],
    count: int,
) -> tuple[Tensor, Tensor]:
    """Return cosine similarities and numbers `[Q, count]` of the nearest training images.

    The nearest come first; `NO_NEIGHBOR` where there are not enough.
    """
    best = torch.full((len(directions), count), EXCLUDED, dtype=torch.float64)
    best_numbers = torch.full((len(directions), count), NO_NEIGHBOR)
    # By id rather than by number: `train:3` of another run may be another image, or held out here.
    position = {str(each): number for number, each in enumerate(train.ids)}
    itself = torch.tensor(
        [NO_NEIGHBOR if p.id is None else position.get(p.id, NO_NEIGHBOR) for p in pictures]
    )
    start = 0
    batches = (train.rows.gather(index) for index in torch.arange(len(train)).split(FEATURE_BATCH))
    with progress_bar(f"{subject.name}: training images", len(train)) as bar:
        for outputs in penultimate_features(subject, batches):
            cosine = directions @ F.normalize(outputs.features.double()).T
            numbers = torch.arange(start, start + cosine.shape[1])
            cosine[numbers[None, :] == itself[:, None]] = EXCLUDED
            new = (cosine, numbers.expand(len(directions), -1))
            best, best_numbers = merge_top_images((best, best_numbers), new, count)
            start += cosine.shape[1]
            bar.advance(cosine.shape[1])
    return best, torch.where(best > EXCLUDED, best_numbers, NO_NEIGHBOR)


def _describe_equality(one: Tensor, other: Tensor) -> str:
    """Return `identical`, `near-identical` or an empty string for two uint8 images."""
    if torch.equal(one, other):
        return "identical"
    pair = torch.stack([one, other]).float().mean(1, keepdim=True)
    small = F.interpolate(pair, (HASH_SIDE, HASH_SIDE), mode="bilinear", antialias=True)
    thumbnails = small[:, 0].round().clamp(0, 255).to(torch.uint8).numpy()
    if is_plain(thumbnails).any():
        return ""
    is_near = correlation(thumbnails, np.array([[0, 1]]))[0] >= MIN_CORRELATION
    return "near-identical" if is_near else ""


def _draw_neighbors(report: NeighborReport, queries: Tensor, train: Split) -> None:
    from convlens import plots

    images: list[Tensor] = []
    captions: list[list[str]] = []
    for query, result in zip(queries, report.found, strict=True):
        images.append(query)
        truth = f"truth: {result.label or 'unknown'}"
        captions.append([result.image, f"predicted: {result.prediction}", truth])
        numbers = [neighbor.number for neighbor in result.neighbors]
        images += list(train.rows.gather(torch.tensor(numbers, dtype=torch.int64)))
        captions += [
            [f"{neighbor.distance:.3f}", neighbor.label, neighbor.same.upper()]
            for neighbor in result.neighbors
        ]
    title = f"{report.run}: nearest of {report.searched:,} training images (cosine distance)"
    figure = plots.neighbors_sheet(torch.stack(images).numpy(), captions, len(report.found), title)
    plots.save_figure(figure, report.file)
