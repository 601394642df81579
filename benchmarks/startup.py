"""Start-up times: `--help`, the first run, and opening a set of many images.

Commands are timed from start to end, with compiled bytecode and cached files; `import torch` is the
lower bound of every command that computes. `train digits` trains from scratch, tests and draws its
plots; the second call finds the run and tests it. `--images 0` skips the set of many images.

    python benchmarks/startup.py [--images 100000] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from recording import record

CLASSES = 10
START = """
import time
import torch, convlens.data.dataset, convlens.recipe  # imports are not counted
from convlens import recipe
from convlens.data import dataset
start = time.perf_counter()
found = dataset.load_data(recipe.DataConfig(name={folder!r}), memory_budget={budget})
print(time.perf_counter() - start, len(found.train))
"""


def environment() -> dict[str, str]:
    """Return the environment, in which Python may cache bytecode as it does by default."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def run(command: list[str], folder: str) -> tuple[float, float]:
    """Return wall and CPU seconds of a command."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=environment())
    wall, after = time.perf_counter() - start, os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])  # user and system time of child processes
    return wall, cpu


def commands(repeats: int) -> dict[str, float]:
    """Return medians of wall and CPU seconds of each command; the first round warms up."""
    program = [sys.executable, "-m", "convlens"]
    spent: dict[str, list[tuple[float, float]]] = {}
    training = []
    with tempfile.TemporaryDirectory() as root:
        image = str(Path(root) / "seven.png")
        Image.fromarray(np.full((8, 8), 200, np.uint8)).save(image)
        for turn in range(repeats + 1):
            folder = str(Path(root) / str(turn))
            Path(folder).mkdir()
            named = {
                "help": [*program, "--help"],
                "recipes": [*program, "recipes"],
                "import_torch": [sys.executable, "-c", "import torch"],
                "train_digits": [*program, "train", "digits"],
                "train_digits_again": [*program, "train", "digits"],
                "predict_one_file": [*program, "predict", "digits", image],
            }
            for name, command in named.items():
                measured = run(command, folder)
                if turn:
                    spent.setdefault(name, []).append(measured)
            facts = json.loads((Path(folder) / "models" / "digits" / "run.json").read_text())
            training.append(facts["training_seconds"])
    figures = {"train_digits_training_alone_seconds": round(statistics.median(training[1:]), 3)}
    for name, pairs in spent.items():
        figures[f"{name}_seconds"] = round(statistics.median(wall for wall, _ in pairs), 3)
        figures[f"{name}_cpu_seconds"] = round(statistics.median(cpu for _, cpu in pairs), 3)
    return figures


def write_images(folder: Path, count: int) -> None:
    """Write small PNGs with random pixels in ten class folders."""
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
    for number in range(count):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        path = folder / f"class{number % CLASSES}" / f"{number}.png"
        Image.fromarray(pixels).save(path, compress_level=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    count = arguments.images
    figures: dict[str, object] = {**commands(arguments.repeats), "images": count}
    if count:
        figures |= starts(count)
    print(json.dumps(record("startup", figures)))


def starts(count: int) -> dict[str, float]:
    """Measure opening a set of `count` small images: decoding, then reading from the cache."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        write_images(images, count)
        os.environ["CONVLENS_CACHE"] = str(Path(folder) / "cache")
        # In memory and streamed: the time of the second start must not depend on the size.
        for kind, budget in (("resident", 2**33), ("streamed", 2**20)):
            for start in ("first", "second", "third"):
                script = START.format(folder=str(images), budget=budget)
                done = subprocess.run(
                    [sys.executable, "-c", script], check=True, capture_output=True, text=True
                )
                figures[f"{kind}_{start}_start_seconds"] = round(float(done.stdout.split()[0]), 3)
    return figures


if __name__ == "__main__":
    main()
