"""Time of each attribution method, relative to one forward and backward pass.

The pass is that of a training step on the same images (gradients of all weights, no optimizer).
Passes and methods take turns in one run; ratios are medians over the pairs. The time of a method
includes the forward pass that chooses class and layer, batching, and copying maps to the CPU.
Prints one JSON object.

    python benchmarks/attribution.py [--rounds 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import torch
import torchvision
from torch import Tensor, nn

from convlens import device, models
from convlens.interpret import attribution_methods, features
from convlens.utils import process

CASES = (
    # name, network, images, size, layer
    ("resnet18_32_px_1_image", "resnet18", 1, 32, "layer2.1"),
    ("resnet18_32_px_16_images", "resnet18", 16, 32, "layer2.1"),
    ("fastnet_32_px_16_images", "fastnet", 16, 32, "block3"),
    ("resnet18_224_px_1_image", "resnet18", 1, 224, "layer4.1"),
)
SLOW = ("integrated-gradients", "occlusion")  # many passes: measured in one case only


def network(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    if name == "resnet18":
        return torchvision.models.resnet18(num_classes=10).eval()
    return models.build_model(name, 10, 3, size, {}).eval()


def one_pass(model: nn.Module, images: Tensor, targets: Tensor) -> Callable[[], None]:
    def step() -> None:
        nn.functional.cross_entropy(model(images), targets).backward()
        model.zero_grad(set_to_none=True)

    return step


def attribute_with(
    name: str, model: nn.Module, images: Tensor, targets: Tensor, layer: str
) -> Callable[[], None]:
    stages = features.stage_names(model)

    def step() -> None:
        attribution_methods.logits_and_shapes(model, images, stages)  # which class, and which layer
        maps = attribution_methods.attribution_maps(
            attribution_methods.METHODS[name], model, images, targets, layer
        )
        attribution_methods.upsample_maps(maps, images.shape[2])

    return step


def paired(first: Callable[[], None], second: Callable[[], None], rounds: int) -> dict[str, object]:
    """Median seconds of both and the median of paired ratios, `first` over `second`."""
    spent: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        order = ((first, spent[0]), (second, spent[1]))
        for step, times in order if turn % 2 else order[::-1]:
            start = time.perf_counter()
            step()
            if turn:  # the first round warms up
                times.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*spent, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ms": round(1000 * statistics.median(spent[0]), 2),
        "pass_ms": round(1000 * statistics.median(spent[1]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(q, 3) for q in quartiles],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    process.keep_freed_memory()
    device.prepare(deterministic=False)
    figures: dict[str, object] = {"rounds": rounds, "threads": torch.get_num_threads()}
    for case, name, count, size, layer in CASES:
        model = network(name, size)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, size, size, generator=generator)
        targets = torch.arange(count) % 10
        bare = one_pass(model, images, targets)
        figures[case] = {
            method: paired(attribute_with(method, model, images, targets, layer), bare, rounds)
            for method in attribution_methods.METHODS
            if method not in SLOW or case == CASES[0][0]
        }
    print(json.dumps(record("attribution", figures)))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
