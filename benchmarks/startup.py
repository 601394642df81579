"""Waiting times that are not training: `--help`, and the second start on 100,000 small images.

python benchmarks/startup.py [--images 100000]
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
import torch, convlens.data, convlens.recipe  # imports are counted apart
from convlens import data, recipe
begin = time.perf_counter()
found = data.load(recipe.DataConfig(name={folder!r}), memory_budget={budget})
print(time.perf_counter() - begin, len(found.train))
"""


def seconds_of(command: list[str], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return round(statistics.median(times), 3)


def write_images(folder: Path, count: int) -> None:
    """Small PNGs in ten class folders; a few thousand different ones, written many times."""
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
    count = parser.parse_args().images
    program = [sys.executable, "-m", "convlens"]
    figures: dict[str, object] = {
        "help_seconds": seconds_of([*program, "--help"], 5),
        "recipes_seconds": seconds_of([*program, "recipes"], 5),
        "images": count,
    }
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        write_images(images, count)
        os.environ["CONVLENS_CACHE"] = str(Path(folder) / "cache")
        # In memory, and streamed: what the second start costs must not depend on the size.
        for kind, budget in (("resident", 2**33), ("streamed", 2**20)):
            for start in ("first", "second", "third"):
                script = START.format(folder=str(images), budget=budget)
                done = subprocess.run(
                    [sys.executable, "-c", script], check=True, capture_output=True, text=True
                )
                figures[f"{kind}_{start}_start_seconds"] = round(float(done.stdout.split()[0]), 3)
    print(json.dumps(record("startup", figures)))


if __name__ == "__main__":
    main()
