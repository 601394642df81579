"""Time of `look`: all stages of a ResNet-18 for one image, from pixels to PNG.

Network, images and matplotlib are loaded in advance. Medians over repeats; one thread, since
drawing uses only one. Prints one JSON object.

    python benchmarks/looking.py [--repeats 9]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import torch

from convlens import models
from convlens.device import Plan
from convlens.interpret import activations, features, look
from convlens.interpret.inputs import InspectedModel, LookInputs, Picture
from convlens.run import LoadedModel, Preprocessing

SIZES = (32, 224)


def subject(size: int) -> InspectedModel:
    """Return a ResNet-18 with random weights and the ImageNet stem."""
    torch.manual_seed(0)
    model = models.build_model("resnet18", 10, 3, size, {"stem": "imagenet"}).eval()
    preprocessing = Preprocessing(size, 3, "crop", [0.5] * 3, [0.25] * 3)
    loaded = LoadedModel(model, tuple("0123456789"), preprocessing, {})
    return InspectedModel("resnet18", loaded, Plan("cpu", "fp32", "contiguous"))


def seconds(call: Callable[[], object], repeats: int) -> dict[str, object]:
    """Return median and quartiles without the first call; CPU time is less sensitive to load."""
    times, busy = [], []
    for _ in range(repeats + 1):
        start, began = time.perf_counter(), time.process_time()
        call()
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - began)
    return {
        "seconds": round(statistics.median(times[1:]), 3),
        "quartiles": [round(each, 3) for each in statistics.quantiles(times[1:], n=4)],
        "cpu_seconds": round(statistics.median(busy[1:]), 3),
    }


def stages_to_png(size: int, folder: Path) -> Callable[[], object]:
    inspected = subject(size)
    pixels = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    picture = Picture("test:0", pixels, 0)
    opened = LookInputs([inspected], [(picture,)], folder, ["resnet18"], ["resnet18"])
    return lambda: look.look(opened, look.LookOptions())


def forward(size: int) -> Callable[[], object]:
    """Return the part without drawing: the forward pass that records all stages."""
    inspected = subject(size)
    picture = Picture("test:0", torch.zeros(3, size, size, dtype=torch.uint8), 0)
    names = features.stage_names(inspected.model)
    return lambda: activations.compute_activity(inspected, picture, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    figures: dict[str, object] = {"repeats": repeats}
    with tempfile.TemporaryDirectory() as folder:
        cases = {f"stages_to_png_{size}px": stages_to_png(size, Path(folder)) for size in SIZES}
        cases |= {f"forward_{size}px": forward(size) for size in SIZES}
        for name, call in cases.items():
            figures[name] = seconds(call, repeats)
    print(json.dumps(record("looking", figures)))


if __name__ == "__main__":
    main()
