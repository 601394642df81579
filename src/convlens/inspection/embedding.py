"""A map of images by a network's last features, in two dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from convlens.errors import DataError
from convlens.inspection.penultimate import penultimate
from convlens.inspection.sampling import sample
from convlens.inspection.subjects import Subject
from convlens.names import pick
from convlens.system.console import progress, quieted
from convlens.system.files import write_atomic

Floats = npt.NDArray[np.float64]
BATCH = 256
SAME = 1e-6  # between the coordinates of features that are one point but for rounding
BEFORE_TSNE = 50  # principal components, as van der Maaten and Hinton 2008 take 30


@dataclass(frozen=True)
class Embedded:
    """Where images lie: `points` float64 `[N, 2]`, int64 `labels` and `guesses` `[N]`, `ids`.

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
    guesses: npt.NDArray[np.int64]
    ids: tuple[str, ...]
    seed: int
    file: Path

    def to_dict(self) -> dict[str, Any]:
        """All of it but the points, which stand in the CSV beside the picture."""
        kept = ("run", "method", "words", "split", "data", "seed")
        return {
            **{key: getattr(self, key) for key in kept},
            "n": len(self.ids),
            "mistakes": int((self.labels != self.guesses).sum()),
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
    subject: Subject,
    method: str = "tsne",
    *,
    folder: Path,
    split: str = "val",
    data: str | Path | None = None,
    images: int = 2000,
    seed: int = 0,
    quiet: bool = False,
) -> Embedded:
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
    make = pick(EMBEDDINGS, method, "embedding")
    with quieted(quiet):
        chosen = sample(subject, split, data=data, most=images, seed=seed)
        if len(chosen) < 4:
            raise DataError(f"{len(chosen)} images make no map", fix="take a larger split")
        features, guesses = [], []
        with progress(f"{subject.name}: {split} images", len(chosen)) as bar:
            for seen in penultimate(subject, (some for some, _ in chosen.batches(BATCH))):
                features.append(seen.features)
                guesses.append(seen.logits.argmax(1))
                bar.advance(len(seen.features))
        # Of length 1: else a few images of large features would make the map theirs.
        directions = F.normalize(torch.cat(features).double()).numpy()
        if float(np.ptp(directions, axis=0).max()) < SAME:  # t-SNE of them ends the program
            raise DataError(
                f"{subject.name}: its last features are the same for all {len(chosen)} images",
                fix="`convlens diagnose` says more about the run",
            )
        if directions.shape[1] == 1:  # a map has two dimensions, whatever the features have
            directions = np.pad(directions, ((0, 0), (0, 1)))
        points, words = make(directions, seed)
    # What the network says, in the order of the set's classes; -1 is a class of its own.
    place = {name: number for number, name in enumerate(chosen.classes)}
    theirs = np.array([place.get(name, -1) for name in subject.classes])
    result = Embedded(
        run=subject.name,
        method=method,
        words=words,
        split=split,
        data=chosen.data,
        classes=chosen.classes,
        points=points,
        labels=chosen.labels.numpy(),
        guesses=theirs[torch.cat(guesses).numpy()],
        ids=chosen.ids,
        seed=seed,
        file=folder / f"embedding-{method}.png",
    )
    _write(result)
    return result


def _write(result: Embedded) -> None:
    import csv
    import io

    from convlens import plots

    names = [*result.classes, ""]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "x", "y", "class", "prediction"])
    rows = zip(result.ids, result.points, result.labels, result.guesses, strict=True)
    for identity, (x, y), label, guess in rows:
        writer.writerow([identity, f"{x:.6g}", f"{y:.6g}", names[label], names[guess]])
    write_atomic(result.file.with_suffix(".csv"), text.getvalue())
    title = f"{result.run}: {len(result.ids):,} {result.split} images, {result.words}"
    named = ("first component", "second component") if result.method == "pca" else ("", "")
    figure = plots.embedding(
        result.points, result.labels, result.guesses, result.classes, title, named
    )
    plots.save(figure, result.file)
