"""What class weights, balanced sampling and focal loss gain on unequal classes.

    python benchmarks/unequal_classes.py [--seeds 5] [--only cifar10|trashnet] [--quick]
                                         [--data data] [--folder build/unequal-classes]

Makes a long-tailed CIFAR-10 (1:50) and a long-tailed trashnet (1:10): class number i of K keeps
`n * ratio^(-i / (K - 1))` training images, as in Cao et al. 2019 (Learning Imbalanced Datasets
with Label-Distribution-Aware Margin Loss). Each seed selects other images, holds out another
validation split of the long-tailed images, and trains each option once. Epochs are selected by
macro F1 on validation for all options. The test split of CIFAR-10 is its own, which is balanced;
that of trashnet is a quarter of each class, the same for all seeds. It is used once by each run.

The same command continues where it was stopped. The result is
`benchmarks/results/unequal-classes.json`; with `--quick`, which only shows that everything runs, it
stays in the folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np

import convlens
from convlens import metrics

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "class_weights=auto": {"optim.class_weights": "auto"},
    "balance=sqrt": {"data.balance": "sqrt"},
    "balance=full": {"data.balance": "full"},
    "loss=focal": {"optim.loss": "focal"},
}
METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
TEST_SHARE = 0.25  # of each class of trashnet


class Case(NamedTuple):
    """A data set.

    Attributes:
        folder: the class folders of the training images.
        test_folder: those of the test images; None to take a share of the training images.
        ratio: training images of the first class over those of the last one.
        most: training images of the first class.
    """

    folder: str
    test_folder: str | None
    ratio: float
    most: int
    overrides: Mapping[str, Any]


CASES = {
    "cifar10": Case(
        "cifar10/train",
        "cifar10/test",
        50,
        5000,
        {
            "data.image_size": 32,
            "model.name": "cnn",
            "model.weights": "none",
            "model.widths": [32, 64, 128],
            "train.epochs": 10,
            "train.batch_size": 64,
        },
    ),
    "trashnet": Case(
        "trashnet",
        None,
        10,
        445,
        {
            "data.image_size": 64,
            "model.name": "cnn",
            "model.weights": "none",
            "model.widths": [16, 32, 64, 128],
            "train.epochs": 30,
        },
    ),
}
QUICK = {"data.image_size": 16, "model.widths": [8, 16], "train.epochs": 2}


def class_sizes(classes: int, most: int, ratio: float) -> list[int]:
    """Return the number of training images of each class, by an exponential profile."""
    return [round(most * ratio ** (-i / (classes - 1))) for i in range(classes)]


def select_images(
    case: Case, root: Path, seed: int, most: int, test_limit: int | None
) -> list[tuple[Path, str, str]]:
    """Return path, class and split of each image; the largest classes keep the most images."""
    folder = root / case.folder
    classes = [each for each in sorted(folder.iterdir()) if each.is_dir()]
    files = {each.name: sorted(each.iterdir()) for each in classes}
    test: dict[str, list[Path]] = {}
    for name in files:
        if case.test_folder is not None:
            test[name] = sorted((root / case.test_folder / name).iterdir())
        else:  # the same for each seed
            order = np.random.default_rng(0).permutation(len(files[name]))
            count = round(TEST_SHARE * len(order))
            test[name] = [files[name][i] for i in sorted(order[:count])]
            files[name] = [files[name][i] for i in sorted(order[count:])]
    # A stable sort: the classes of CIFAR-10, which are equally large, stay in their order.
    names = sorted(files, key=lambda name: -len(files[name]))
    random = np.random.default_rng(seed)
    rows = []
    for name, size in zip(names, class_sizes(len(names), most, case.ratio), strict=True):
        chosen = random.choice(len(files[name]), size, replace=False)
        rows += [(files[name][i], name, "train") for i in sorted(chosen)]
    rows += [(path, name, "test") for name in names for path in test[name][:test_limit]]
    return rows


def write_list(path: Path, rows: Sequence[tuple[Path, str, str]]) -> None:
    """Write the images as a CSV for `convlens train`."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])


def run_option(name: str, table: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Train and test a run, or read the result of a run that is finished; return its figures."""
    run = convlens.train("folder", overrides, data=table, name=name, test=False)
    if not any(entry["split"] == "test" for entry in run.run_dir.evaluations()):
        run.evaluate("test")
    result = run.run_dir.evaluations()[0]
    metadata = run.run_dir.metadata()
    return {
        **{metric: result[metric] for metric in METRICS},
        "recall": {label: scores["recall"] for label, scores in result["per_class"].items()},
        "n": result["n"],
        "kept_epoch": metadata["kept_epoch"],
        "cpu_seconds": metadata["cpu_seconds"],
    }


def summarize(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return mean and standard deviation of each option, and its paired gain over the first one."""
    first, *_ = runs
    summary: dict[str, Any] = {}
    for option, results in runs.items():
        summary[option] = {}
        for metric in METRICS:
            values = [result[metric] for result in results]
            mean, sd = metrics.mean_sd(values)
            summary[option][metric] = {"mean": mean, "sd": sd}
            if option != first and len(values) > 1:
                before = [result[metric] for result in runs[first]]
                gain = metrics.paired_difference(before, values)
                summary[option][metric] |= {
                    "gain": gain.value,
                    "gain_interval95": gain.interval95,
                    "p": gain.p,
                }
    return summary


def measure(name: str, root: Path, *, seeds: int, quick: bool) -> dict[str, Any]:
    """Train every option with every seed on one data set."""
    case = CASES[name]
    most = 150 if quick else case.most
    runs: dict[str, list[dict[str, Any]]] = {option: [] for option in OPTIONS}
    counts: dict[str, int] = {}
    for seed in range(seeds):
        rows = select_images(case, root, seed, most, 20 if quick else None)
        counts = {label: 0 for _, label, split in rows if split == "train"}
        for _, label, split in rows:
            counts[label] += split == "train"
        table = Path(f"{name}-{seed}.csv").absolute()
        write_list(table, rows)
        for option, changes in OPTIONS.items():
            overrides = {
                **case.overrides,
                **(QUICK if quick else {}),
                "train.monitor": "val_macro_f1",
                "train.seed": seed,
                "data.seed": seed,
                **changes,
            }
            run_name = f"{name}-{option.replace('=', '-')}-{seed}"
            runs[option].append(run_option(run_name, table, overrides))
    return {
        "counts": counts,
        "ratio": case.ratio,
        "overrides": dict(case.overrides),
        "runs": runs,
        "summary": summarize(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", default="data")
    parser.add_argument("--folder", default="build/unequal-classes", help="of the runs")
    options = parser.parse_args()
    root = Path(options.data).absolute()
    folder = Path(options.folder).absolute() / ("quick" if options.quick else "")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CONVLENS_FIGURES", "none")
    os.chdir(folder)  # runs are kept there
    seeds = 2 if options.quick else options.seeds
    names = [options.only] if options.only else list(CASES)
    cases = {name: measure(name, root, seeds=seeds, quick=options.quick) for name in names}
    figures = {"seeds": seeds, "recipe": "folder", "monitor": "val_macro_f1", "cases": cases}
    if options.quick:
        Path("unequal-classes.json").write_text(json.dumps(figures, indent=1))
        print(json.dumps(figures))
    else:
        print(json.dumps(record("unequal-classes", figures)))


if __name__ == "__main__":
    main()
