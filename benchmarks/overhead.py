"""What the engine adds to bare forward + backward + optimiser, and what a DataLoader would.

All loops train the same network on the same machine in the same run, in turn, in windows of about
a tenth of a second (a neighbour's load changes more slowly); ratios are medians over the pairs.
The bare loop repeats one resident, normalised batch: nothing can be faster. Prints one JSON object.

    python benchmarks/overhead.py [--rounds 40]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from convlens import device, engine, models, optim, recipe
from convlens.data import Split
from convlens.data.batches import Batches, Normalise
from convlens.data.rows import ArrayRows
from convlens.device import Plan
from recording import record

MEAN, STD = 0.1307, 0.3081


def images_of(count: int, channels: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator
    )
    return pixels, torch.randint(0, 10, (count,), generator=generator)


def optimiser_of(model: nn.Module) -> torch.optim.Optimizer:
    return optim.build(model, recipe.OptimConfig(name="adam", lr=1e-4))


def bare(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward, backward, optimiser on one batch that is there already."""
    optimiser, objective = optimiser_of(model), nn.CrossEntropyLoss()
    model.train()

    def step() -> None:
        objective(model(images), labels).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def ours(model: nn.Module, pixels: Tensor, labels: Tensor, batch: int) -> Callable[[], None]:
    """The engine on a resident set, without augmentation, as `train` runs it."""
    plan = Plan("cpu", "fp32", "contiguous")
    channels = pixels.shape[1]
    split = Split(ArrayRows(pixels), labels, [str(i) for i in range(len(labels))])
    batches = Batches(
        split,
        batch_size=batch,
        normalise=Normalise([MEAN] * channels, [STD] * channels),
        plan=plan,
        seed=0,
    )
    records = engine.fit(
        model,
        batches,
        optimiser_of(model),
        lambda progress: 1.0,
        epochs=10**6,
        objective=nn.CrossEntropyLoss(),
        plan=plan,
        seed=0,
    )

    def step() -> None:
        while not isinstance(next(records), engine.Step):
            pass

    return step


class Pictures(Dataset[tuple[Tensor, int]]):
    """The usual data set: one PIL image at a time through torchvision's transforms."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels.numpy(), labels.tolist()
        channels = pixels.shape[1]
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([MEAN] * channels, [STD] * channels),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        array = np.moveaxis(self.pixels[index], 0, 2).squeeze()
        return self.transform(Image.fromarray(array)), self.labels[index]


def usual(model: nn.Module, pixels: Tensor, labels: Tensor, batch: int) -> Callable[[], None]:
    """The usual loop: DataLoader with its default (no workers), then the bare step."""
    optimiser, objective = optimiser_of(model), nn.CrossEntropyLoss()
    model.train()
    loader = DataLoader(Pictures(pixels, labels), batch_size=batch, shuffle=True, drop_last=True)

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.chain.from_iterable(iter(loader) for _ in itertools.count())

    coming = forever()

    def step() -> None:
        images, targets = next(coming)
        objective(model(images), targets).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def compare(loops: dict[str, Callable[[], None]], steps: int, rounds: int) -> dict[str, object]:
    """Seconds a step (median) of each loop and their medians of paired ratios to `bare`."""
    spent: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds + 1):
        # The order turns, so that a slow moment of the machine hits each loop equally often.
        names = list(loops)[turn % len(loops) :] + list(loops)[: turn % len(loops)]
        for name in names:
            start = time.perf_counter()
            for _ in range(steps):
                loops[name]()
            if turn:
                spent[name].append((time.perf_counter() - start) / steps)
    figures: dict[str, object] = {
        f"{name}_ms_a_step": round(1000 * statistics.median(times), 3)
        for name, times in spent.items()
    }
    for name in spent:
        if name != "bare":
            ratios = [a / b for a, b in zip(spent[name], spent["bare"], strict=True)]
            figures[f"{name}_over_bare"] = round(statistics.median(ratios), 4)
            quartiles = statistics.quantiles(ratios, n=4)
            figures[f"{name}_over_bare_quartiles"] = [round(q, 4) for q in quartiles]
    return figures


def mnist_net() -> nn.Module:
    options = recipe.load("mnist").model.options
    return models.build("cnn", 10, 1, 28, options)


def fast_net() -> nn.Module:
    return models.build("cnn", 10, 1, 28, recipe.load("mnist-fast").model.options)


def tiny_net() -> nn.Module:
    options = {"widths": [8, 16, 32], "pool": "stride"}
    return models.build("cnn", 10, 1, 28, options)


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    device.prepare(deterministic=False)
    figures: dict[str, object] = {"rounds": rounds}
    cases = (
        ("mnist_net_batch_64", mnist_net, 64, 1, 28, 5, False),
        ("mnist_fast_net_batch_64", fast_net, 64, 1, 28, 12, True),
        ("tiny_net_batch_64", tiny_net, 64, 1, 28, 20, True),
        ("resnet18_batch_128", resnet, 128, 3, 32, 1, False),
    )
    for name, net, batch, channels, size, steps, with_usual in cases:
        pixels, labels = images_of(4096, channels, size)
        whole = pixels[:batch].float().div_(255).sub_(MEAN).div_(STD)
        loops = {
            "bare": bare(net(), whole, labels[:batch]),
            "convlens": ours(net(), pixels, labels, batch),
        }
        if with_usual:
            loops["dataloader"] = usual(net(), pixels, labels, batch)
        figures[name] = compare(loops, steps, rounds)
    print(json.dumps(record("overhead", figures)))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
