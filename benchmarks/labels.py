"""Plant label errors in a data set and measure how many `convlens labels` finds.

    python benchmarks/labels.py digits|mnist|cifar10 [--images N] [--rate 0.05] [--folds 5]
                                [--seed 0] [--recipe R] [--keep FOLDER] [key=value ...]

Takes N training images of the set (all of `digits`), equally many per class, and gives a share of
them a wrong label, once symmetrically (any other class) and once asymmetrically (each class to the
next). Writes them as image files with a CSV and searches label errors as a user would. The labels
of the set count as true, so its own errors count as false positives. The result is
`benchmarks/results/labels-<set>.json`, with precision and recall for every rule of cleanlab on the
same probabilities, and with the number of suspects in the unchanged set.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np
from PIL import Image

from convlens.analysis import label_errors
from convlens.data.decode import decode, read_bytes
from convlens.data.sources import find_source
from convlens.data.types import FilePaths

RULES = (
    "prune_by_noise_rate",
    "prune_by_class",
    "both",
    "confident_learning",
    "predicted_neq_given",
    "low_normalized_margin",
    "low_self_confidence",
)
DEFAULTS: dict[str, tuple[str, list[str]]] = {
    "digits": ("digits", ["train.epochs=15"]),
    # The epochs are for 2,000 images; the network is that of the first measurement.
    "mnist": (
        "mnist-fast",
        [
            *("model.widths=[16,32,64]", "model.kernel=3", "model.padding=same", "model.pool=max"),
            *("train.epochs=12", "train.batch_size=64", "optim.lr=0.005"),
        ],
    ),
    "cifar10": ("folder", ["model.widths=[32,64,128]", "train.epochs=20"]),
}


def flipped(labels: np.ndarray, rate: float, kind: str, seed: int, classes: int) -> np.ndarray:
    """Return labels of which a share of `rate` is wrong: any other class, or the next one."""
    random = np.random.default_rng(seed)
    wrong = random.choice(len(labels), round(rate * len(labels)), replace=False)
    step = random.integers(1, classes, len(wrong)) if kind == "symmetric" else 1
    out = labels.copy()
    out[wrong] = (labels[wrong] + step) % classes
    return out


def written(folder: Path, name: str, count: int | None, seed: int) -> tuple[list[Path], np.ndarray]:
    """Write `count` images of a set as PNG files, evenly over classes; return paths and labels."""
    source = find_source(name)
    part = source.parts["train"]
    chosen = np.arange(len(part.labels))
    if count is not None:
        random, each = np.random.default_rng(seed), count // len(source.classes)
        of_class = [np.flatnonzero(part.labels == c) for c in range(len(source.classes))]
        chosen = np.sort(np.concatenate([random.permutation(i)[:each] for i in of_class]))
    paths = []
    for number in chosen.tolist():
        if isinstance(part.images, FilePaths):
            pixels = decode(read_bytes(part.images[number]), size=None, channels=3, fit="crop")
        else:
            pixels = part.images[np.array([number])][0]
        path = folder / "images" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(path)
        paths.append(path)
    return paths, part.labels[chosen]


def average_precision(planted: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean precision at the rank of each error; the lowest score ranks first."""
    order = np.argsort(scores, kind="stable")
    hits = planted[order]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def figures(planted: np.ndarray, named: np.ndarray) -> dict[str, Any]:
    found = int((planted & named).sum())
    return {
        "named": int(named.sum()),
        "found": found,
        "precision": found / max(int(named.sum()), 1),
        "recall": found / max(int(planted.sum()), 1),
    }


def measured(
    folder: Path, name: str, kind: str, paths: list[Path], targets: np.ndarray, options: Any
) -> dict[str, Any]:
    """Measure precision, recall and average precision of our rule and of all rules of cleanlab."""
    recipe, overrides = DEFAULTS[name]
    classes = int(targets.max()) + 1
    rate = 0.0 if kind == "clean" else options.rate
    given = flipped(targets, rate, kind, options.seed, classes)
    table = folder / f"{name}-{kind}.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *zip(paths, given.tolist(), strict=True)])
    start = time.process_time()
    report = label_errors.find_label_errors(
        options.recipe or recipe,
        [*overrides, *options.overrides],
        data=table,
        folds=options.folds,
    )
    seconds = time.process_time() - start
    wrong = dict(zip(map(str, paths), given != targets, strict=True))
    planted = np.array([wrong[image.id] for image in report.images])
    labels = np.array([report.classes.index(image.label) for image in report.images])
    probs = np.stack([image.probs for image in report.images])
    if options.keep:
        np.savez(
            Path(options.keep) / f"{name}-{kind}.npz",
            planted=planted,
            labels=labels,
            probs=probs,
        )
    named = np.array([image.rank is not None for image in report.images])
    out = {
        "images": len(planted),
        "planted": int(planted.sum()),
        "accuracy": report.accuracy,
        "noise": report.noise,
        "cpu_seconds": round(seconds, 1),
        **figures(planted, named),
    }
    if rate:
        own = np.array([image.score for image in report.images])
        others = probs.copy()
        others[np.arange(len(own)), labels] = -1
        out |= {
            "average_precision": average_precision(planted, own),
            "average_precision_margin": average_precision(planted, own - others.max(1)),
        }
    rules = {}
    for rule in RULES:
        verdict = label_errors.find_issues(labels, probs, rule=rule)
        rules[rule] = figures(planted, verdict.suspected)
    return out | {"rules": rules}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(DEFAULTS))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe")
    parser.add_argument("--keep", help="folder for the probabilities")
    options = parser.parse_intermixed_args()
    options.keep = options.keep and os.path.abspath(options.keep)
    os.environ.setdefault("CONVLENS_DATA", os.path.abspath("data"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.chdir(folder)  # runs and plots are temporary
        count = None if options.name == "digits" else options.images
        paths, targets = written(folder, options.name, count, options.seed)
        kinds = ("clean", "symmetric", "asymmetric")
        found = {k: measured(folder, options.name, k, paths, targets, options) for k in kinds}
        os.chdir(Path(__file__).parent)
    recipe, overrides = DEFAULTS[options.name]
    facts = {
        "data": options.name,
        "recipe": options.recipe or recipe,
        "overrides": [*overrides, *options.overrides],
        "rate": options.rate,
        "folds": options.folds,
        "seed": options.seed,
        "rule": label_errors.FILTER_METHOD,
    }
    print(json.dumps(record(f"labels-{options.name}", {**facts, "cases": found})))


if __name__ == "__main__":
    main()
