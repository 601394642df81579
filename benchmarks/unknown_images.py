"""Measure how well images of unknown classes are found, by leaving classes out of the training.

    python benchmarks/unknown_images.py [digits trashnet cifar10] [--draws N] [--quick]

Trains on some classes of a set and scores test images of these classes, of the classes that were
left out ("near"), and of other sets ("far"): trashnet with each of its 6 classes left out once,
CIFAR-10 (2,000 training images of each class) with 6 known and 4 unknown classes, digits with 8 and
2. Scores are the distance to the nearest training images, the energy of the logits, and, as a
baseline, the confidence (Hendrycks and Gimpel 2017). Results:

- AUROC: the probability that an unknown image has a higher score than a known one;
- FPR95: the share of unknown images that pass if 95% of the known ones do;
- marked: the share of images above the stored threshold, which 5% of known ones should be.

The same command continues where it was stopped: finished draws are in `--folder`, by default
`build/unknown-images`. `--quick` runs everything on a few images, in a minute. The result is
`benchmarks/results/unknown-images.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from convlens import ImageClassifier
from convlens.data.decode import decode, fit_arrays, read_bytes
from convlens.data.input_images import collect_inputs
from convlens.data.sources import find_source
from convlens.data.types import FilePaths, Part
from convlens.errors import ConvlensError
from convlens.prediction import iter_predictions
from convlens.run import LoadedModel
from convlens.uncertainty.calibration import OutlierDetector

MAX_SCORED = 2000  # images of each group
Images = np.ndarray  # uint8 [N, C, S, S]


@dataclass(frozen=True)
class Benchmark:
    """A set, the number of classes that are left out, and the recipe.

    Attributes:
        draws: number of choices of the unknown classes.
        per_class: number of training images of each class; None for all.
        far: sets without any of its classes.
    """

    recipe: str
    overrides: dict[str, Any]
    size: int
    unknown: int
    draws: int
    per_class: int | None
    far: tuple[str, ...]


BENCHMARKS = {
    "digits": Benchmark("digits", {}, 8, 2, 5, None, ("cifar10", "noise")),
    "trashnet": Benchmark(
        "folder",
        {"train.epochs": 40, "model.name": "cnn", "model.weights": "none"},
        64,
        1,
        6,
        None,
        ("flowers", "cifar10", "noise"),
    ),
    "cifar10": Benchmark("cifar10-cpu", {}, 32, 4, 3, 2000, ("mnist", "trashnet", "noise")),
}
QUICK: dict[str, Any] = {"train.epochs": 1}
QUICK_PER_CLASS = 80  # fewer would leave too few validation images for a threshold


def load_part(part: Part, size: int, chosen: np.ndarray) -> Images:
    if not isinstance(part.images, FilePaths):
        pixels = np.asarray(part.images[chosen])
        return fit_arrays(pixels, size=size, channels=pixels.shape[1], fit="crop")
    paths = [part.images[i] for i in chosen.tolist()]
    return np.stack([decode(read_bytes(p), size=size, channels=3, fit="crop") for p in paths])


def choose(labels: np.ndarray, per_class: int | None, seed: int) -> np.ndarray:
    """Return the indices of up to `per_class` random images of each class, in order."""
    order = np.random.default_rng(seed).permutation(len(labels))
    members = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(members))


@functools.cache
def load_set(
    name: str, size: int, per_class: int | None, seed: int = 0
) -> tuple[tuple[Images, np.ndarray], tuple[Images, np.ndarray], Sequence[str]]:
    """Return training images and labels, test images and labels, and the names of the classes."""
    source = find_source(name, image_size=size)
    train = source.parts["train"]
    if "test" in source.parts:
        test = source.parts["test"]
        pairs = []
        for part, limit in ((train, per_class), (test, MAX_SCORED // len(source.classes))):
            chosen = choose(part.labels, limit, seed)
            pairs.append((load_part(part, size, chosen), part.labels[chosen]))
        return pairs[0], pairs[1], source.classes
    chosen = choose(train.labels, None if per_class is None else 2 * per_class, seed)
    kept, held = train_test_split(
        chosen, test_size=0.2, random_state=seed, stratify=train.labels[chosen]
    )
    first, second = ((load_part(train, size, i), train.labels[i]) for i in (kept, held))
    return first, second, source.classes


def far_images(name: str, size: int, channels: int) -> Images:
    """Return test images of another set, or noise, in the format of the known images."""
    if name == "noise":
        random = np.random.default_rng(0)
        return random.integers(0, 256, (MAX_SCORED, channels, size, size), dtype=np.uint8)
    _, (images, _), _ = load_set(name, size, None if name != "cifar10" else 100)
    return fit_arrays(images[:MAX_SCORED], size=size, channels=channels, fit="crop")


def scores_of(loaded: LoadedModel, images: Images) -> dict[str, np.ndarray]:
    """Return the scores of images by name; thresholds are at 0 where there is one."""
    detector = loaded.calibration.detector
    assert detector is not None
    by_energy = replace(
        loaded,
        calibration=replace(
            loaded.calibration, detector=OutlierDetector(detector.energy_threshold)
        ),
    )
    inputs = collect_inputs(images, channels="first")
    predictions = list(iter_predictions(loaded, inputs, quiet=True))
    energies = iter_predictions(by_energy, inputs, quiet=True)
    return {
        "neighbors": np.array([each.unlike_score for each in predictions]),
        "energy": np.array([each.unlike_score for each in energies]),
        "confidence": np.array([-(each.prob or 0.0) for each in predictions]),
    }


def compare(known: dict[str, np.ndarray], unknown: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return AUROC, FPR95 and the share of marked images for each score."""
    result = {}
    for name, values in known.items():
        others = unknown[name]
        targets = np.repeat([0, 1], [len(values), len(others)])
        passing = np.quantile(values, 0.95)
        result[name] = {
            "auroc": float(roc_auc_score(targets, np.concatenate([values, others]))),
            "fpr95": float((others <= passing).mean()),
        }
        if name != "confidence":  # it has no threshold
            result[name]["marked"] = float((others > 0).mean())
    return result


def measure_draw(name: str, benchmark: Benchmark, draw: int, quick: bool) -> dict[str, Any]:
    """Train without some classes and score known, near and far images."""
    start, cpu_start = time.perf_counter(), time.process_time()
    per_class = QUICK_PER_CLASS if quick else benchmark.per_class
    (images, labels), (test, test_labels), classes = load_set(name, benchmark.size, per_class)
    if benchmark.unknown == 1:
        unknown = np.array([draw % len(classes)])
    else:
        unknown = np.random.default_rng(draw).permutation(len(classes))[: benchmark.unknown]
    is_known, test_is_known = ~np.isin(labels, unknown), ~np.isin(test_labels, unknown)
    classifier = ImageClassifier(
        benchmark.recipe,
        overrides={**benchmark.overrides, **(QUICK if quick else {})},
        random_state=draw,
    ).fit(images[is_known], labels[is_known])
    loaded = classifier.model_
    accuracy = classifier.score(test[test_is_known], test_labels[test_is_known])
    known = scores_of(loaded, test[test_is_known])
    groups = {"classes left out": test[~test_is_known]}
    for far in benchmark.far:
        try:
            groups[far] = far_images(far, benchmark.size, test.shape[1])
        except ConvlensError as error:
            print(f"without {far}: {error.what}")
    detector = loaded.calibration.detector
    assert detector is not None
    assert detector.reference is not None
    return {
        "unknown": [classes[i] for i in unknown.tolist()],
        "accuracy": accuracy,
        "n_known": int(test_is_known.sum()),
        "n": {group: len(pixels) for group, pixels in groups.items()},
        "temperature": loaded.calibration.temperature,
        "vectors": list(detector.reference.shape),
        "neighbors": detector.neighbors,
        "known_marked": {s: float((known[s] > 0).mean()) for s in ("neighbors", "energy")},
        "groups": {
            group: compare(known, scores_of(loaded, pixels)) for group, pixels in groups.items()
        },
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
    }


def finished_draw(
    folder: Path, name: str, benchmark: Benchmark, draw: int, quick: bool
) -> dict[str, Any]:
    """Return a draw from the folder, or measure it and write it there."""
    path = folder / f"{name}-{draw}{'-quick' if quick else ''}.json"
    if not path.exists():
        path.write_text(json.dumps(measure_draw(name, benchmark, draw, quick)))
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), metavar="SET")
    parser.add_argument("--draws", type=int, help="by default 5, 6 and 3")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("build/unknown-images"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CONVLENS_DATA", os.path.abspath("data"))
    sets: dict[str, Any] = {}
    for name in options.names:
        benchmark = BENCHMARKS[name]
        draws = options.draws or (1 if options.quick else benchmark.draws)
        sets[name] = {
            "recipe": benchmark.recipe,
            "overrides": benchmark.overrides,
            "size": benchmark.size,
            "draws": [
                finished_draw(options.folder, name, benchmark, i, options.quick)
                for i in range(draws)
            ],
        }
        print(name, json.dumps(sets[name]["draws"][-1]["groups"]), flush=True)
    print(json.dumps(record("unknown-images", {"quick": options.quick, "sets": sets})))


if __name__ == "__main__":
    main()
