"""How long looking inside takes: all stages of a ResNet-18 for one image, from pixels to PNG.

The network, its images and matplotlib are loaded before. Medians over repeats; one thread, since
drawing has no more. Prints one JSON object.

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

# First: it sets what libgomp reads when torch is imported.
from recording import record  # isort: skip

import torch

from convlens import models
from convlens.device import Plan
from convlens.interpret import activations, features, look
from convlens.interpret.inputs import InspectedModel, LookInputs, Picture
from convlens.run import LoadedModel, Preprocessing

SIZES = (32, 224)


def subject(size: int) -> InspectedModel:
    """A ResNet-18 with random weights and the ImageNet stem: as fast as a trained one."""
    torch.manual_seed(0)
    model = models.build_model("resnet18", 10, 3, size, {"stem": "imagenet"}).eval()
    preprocessing = Preprocessing(size, 3, "crop", [0.5] * 3, [0.25] * 3)
    loaded = LoadedModel(model, tuple("0123456789"), preprocessing, {})
    return InspectedModel("resnet18", loaded, Plan("cpu", "fp32", "contiguous"))


def seconds(what: Callable[[], object], repeats: int) -> dict[str, object]:
    """Medians and quartiles, the first call left out; CPU time is what a busy neighbour spares."""
    times, busy = [], []
    for _ in range(repeats + 1):
        start, began = time.perf_counter(), time.process_time()
        what()
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - began)
    return {
        "seconds": round(statistics.median(times[1:]), 3),
        "quartiles": [round(each, 3) for each in statistics.quantiles(times[1:], n=4)],
        "cpu_seconds": round(statistics.median(busy[1:]), 3),
    }


def stages_to_png(size: int, folder: Path) -> Callable[[], object]:
    one = subject(size)
    pixels = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    picture = Picture("test:0", pixels, 0)
    opened = LookInputs([one], [(picture,)], folder, ["resnet18"], ["resnet18"])
    return lambda: look.look(opened, look.LookOptions())


def forward(size: int) -> Callable[[], object]:
    """What is not drawing: the forward pass with the recording of all stages."""
    one = subject(size)
    picture = Picture("test:0", torch.zeros(3, size, size, dtype=torch.uint8), 0)
    names = features.stage_names(one.model)
    return lambda: activations.compute_activity(one, picture, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    figures: dict[str, object] = {"repeats": repeats}
    with tempfile.TemporaryDirectory() as folder:
        cases = {f"stages_to_png_{size}px": stages_to_png(size, Path(folder)) for size in SIZES}
        cases |= {f"forward_{size}px": forward(size) for size in SIZES}
        for name, what in cases.items():
            figures[name] = seconds(what, repeats)
    print(json.dumps(record("looking", figures)))


if __name__ == "__main__":
    main()
