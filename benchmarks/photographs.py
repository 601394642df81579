"""Accuracy on photographs after some minutes: convlens and others from the same ImageNet weights.

    python benchmarks/photographs.py [--splits 3] [--minutes 1 2 4 8] [--only NAME ...]
                                     [--python PEERS_PYTHON] [--data data/trashnet]

The set is split into 70% training, 15% validation and 15% test images, stratified, differently for
each split. Each competitor gets the same images, the same backbone (EfficientNet-Lite0) with the
same weights, two threads, an empty cache and so many minutes from the start of its process to its
last prediction; its own number of epochs has to fit. They run one after another, in turns. A
training that takes longer counts as it is, and its time is reported.

- `convlens`: `convlens train LIST train.minutes=N`
- `fastai`: `vision_learner(...).fine_tune`
- `loop`: a fine-tuning loop as timm's and torchvision's tutorials write it
- `features`: features of the frozen backbone at 224 px and scikit-learn's logistic regression

The peers need an environment with fastai, timm and scikit-learn (`make bench-peers` makes it). The
test images are used once by each training. The same command continues where it was stopped: its
results so far are in `build/photographs`.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np

from convlens import metrics, serialization
from convlens.data.splits import hold_out
from convlens.recipe import ModelConfig
from convlens.training.pretrained import find_weights

HERE = Path(__file__).resolve().parent
PEERS = {
    "fastai": "photographs_fastai.py",
    "loop": "photographs_loop.py",
    "features": "photographs_features.py",
}
ENDLESS = ("features",)  # takes the time it takes: one result for all minutes


def write_list(folder: Path, split: int, target: Path) -> None:
    """Write the images of class folders as a CSV with a stratified split."""
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir())
    rows = [(str(path), name) for name in classes for path in sorted((folder / name).iterdir())]
    labels = np.array([classes.index(name) for _, name in rows])
    rest, test = hold_out(labels, 0.15, split)
    train, val = hold_out(labels[rest], 0.15 / 0.85, split + 1000)
    split_of = {int(i): "test" for i in test}
    split_of |= {int(rest[i]): "val" for i in val}
    split_of |= {int(rest[i]): "train" for i in train}
    with target.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        writer.writerows((*row, split_of[i]) for i, row in enumerate(rows))


def run_convlens(table: Path, minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train and test with the command line; return predictions, accuracy and seconds."""
    command = [sys.executable, "-m", "convlens", "train", str(table)]
    command += [f"train.minutes={minutes:g}", f"train.seed={seed}", "--name", "run"]
    environment = {**os.environ, "CONVLENS_CACHE": str(folder / "cache")}
    start = time.monotonic()
    subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    (path,) = (folder / "models" / "run").rglob("*test*.safetensors")
    tensors, _ = serialization.read_model_file(path)
    predicted = tensors["logits"].argmax(1)
    recipe = json.loads((folder / "models" / "run" / "run.json").read_text())
    return {
        "predicted": predicted.tolist(),
        "labels": tensors["labels"].tolist(),
        "accuracy": float((predicted == tensors["labels"]).float().mean()),
        "seconds": seconds,
        "epochs": recipe["epochs"],
    }


def run_peer(
    name: str, python: str, table: Path, weights: str, minutes: float, seed: int, folder: Path
) -> dict[str, Any]:
    """Run a peer in a process of its own; return what it wrote."""
    out = folder / "out.json"
    script = HERE / "peers" / PEERS[name]
    command = [python, str(script), str(table), weights, f"{minutes:g}", str(seed), str(out)]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def labels_of(table: Path) -> list[int]:
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    return [classes.index(row["label"]) for row in rows if row["split"] == "test"]


def compare(
    runs: dict[str, dict[str, dict[str, Any]]], labels: dict[str, list[int]]
) -> dict[str, Any]:
    """Return mean and sd of each competitor, and what convlens gains on the same images."""
    summary: dict[str, Any] = {}
    for name, of_split in runs.items():
        mean, sd = metrics.mean_sd([result["accuracy"] for result in of_split.values()])
        seconds = [result["seconds"] for result in of_split.values()]
        summary[name] = {"mean": mean, "sd": sd, "seconds": sorted(seconds)[len(seconds) // 2]}
        if name == "convlens" or "convlens" not in runs:
            continue
        counts = np.zeros((2, 2), int)
        for split, result in of_split.items():
            ours = np.array(runs["convlens"][split]["predicted"]) == labels[split]
            theirs = np.array(result["predicted"]) == labels[split]
            np.add.at(counts, (theirs.astype(int), ours.astype(int)), 1)
        gain = metrics.difference_on_images(
            int(counts[1, 1]), int(counts[1, 0]), int(counts[0, 1]), int(counts[0, 0])
        )
        summary[name] |= {"gain": gain.value, "gain_interval95": gain.interval95, "p": gain.p}
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--minutes", type=float, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--only", nargs="*", default=["convlens", *PEERS])
    parser.add_argument("--python", default=str(HERE / "peers/environments/torch/bin/python"))
    parser.add_argument("--data", type=Path, default=Path("data/trashnet"))
    parser.add_argument("--folder", type=Path, default=Path("build/photographs"))
    options = parser.parse_args(arguments)
    root = options.folder.absolute()
    root.mkdir(parents=True, exist_ok=True)
    weights = find_weights(ModelConfig(name="tf_efficientnet_lite0", weights="lite0")).where
    python = os.path.abspath(options.python)
    cases: dict[str, Any] = {}
    for minutes in options.minutes:
        runs: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in options.only}
        labels: dict[str, list[int]] = {}
        for split in range(options.splits):
            table = root / f"{options.data.name}-{split}.csv"
            if not table.exists():
                write_list(options.data.absolute(), split, table)
            labels[str(split)] = labels_of(table)
            for name in options.only:
                limit = "any" if name in ENDLESS else f"{minutes:g}"
                result_path = root / f"{options.data.name}-{split}-{name}-{limit}.json"
                if not result_path.exists():
                    folder = root / "work"
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    if name == "convlens":
                        result = run_convlens(table, minutes, split, folder)
                    else:
                        result = run_peer(name, python, table, weights, minutes, split, folder)
                    result_path.write_text(json.dumps(result))
                result = json.loads(result_path.read_text())
                assert result.get("labels", labels[str(split)]) == labels[str(split)]
                runs[name][str(split)] = result
                print(
                    f"{minutes:g} min, split {split}, {name}: {result['accuracy']:.4f} in "
                    f"{result['seconds']:.0f} s",
                    flush=True,
                )
        cases[f"{minutes:g}"] = {"runs": runs, "summary": compare(runs, labels)}
    figures = {"data": options.data.name, "splits": options.splits, "minutes": cases}
    for case in cases.values():  # the predictions are long, and stay in the folder
        for of_split in case["runs"].values():
            for result in of_split.values():
                result.pop("predicted", None)
                result.pop("labels", None)
    print(json.dumps(record("photographs", figures)))


if __name__ == "__main__":
    main()
