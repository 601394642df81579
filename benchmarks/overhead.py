"""Time that the engine, or a DataLoader, adds to the bare forward, backward and optimizer step.

All loops train the same network in one run, in turn, in windows of about a tenth of a second (the
load of a shared machine changes more slowly). Ratios are medians over the pairs, with a 95%
interval of the median. The bare loop repeats one resident, normalized batch, which is a lower
bound. Where images are augmented, the bare loop augments its batch, too. Prints one JSON object.

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

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from convlens import device, models, optim, recipe
from convlens.data.cache import ArrayRows
from convlens.data.dataset import Split
from convlens.data.loader import Augment, Batches, Normalize, to_unit
from convlens.data.transforms import pipeline
from convlens.data.transforms.random import SampleInfo
from convlens.device import Plan
from convlens.engine.loop import Step, TrainLoop, TrainState
from convlens.training import feature_cache
from convlens.utils import process
from intervals import median_interval

MEAN, STD = 0.1307, 0.3081


def images_of(count: int, channels: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator
    )
    return pixels, torch.randint(0, 10, (count,), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return optim.build_optimizer(model, recipe.OptimConfig(name="adam", lr=1e-4))


def bare(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a step on one resident batch: forward, backward, optimizer."""
    optimizer, objective = optimizer_of(model), nn.CrossEntropyLoss()
    model.train()

    def step() -> None:
        objective(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def with_augmentation(
    step: Callable[[], None], operations: Augment, pixels: Tensor, labels: Tensor
) -> Callable[[], None]:
    """Return a step that applies `operations` to a batch, discards the result and calls `step`."""
    generator = torch.Generator()
    sample_info = SampleInfo(torch.arange(len(labels)), 1, 0)

    def both() -> None:
        generator.manual_seed(0)
        operations(to_unit(pixels), labels, sample_info, generator)
        step()

    return both


def ours(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    batch: int,
    operations: Augment | None = None,
) -> Callable[[], None]:
    """Return a step of the engine on a resident set, as `train` runs it."""
    plan = Plan("cpu", "fp32", "contiguous")
    channels = pixels.shape[1]
    split = Split(ArrayRows(pixels), labels, [str(i) for i in range(len(labels))])
    batches = Batches(
        split,
        batch_size=batch,
        normalize=Normalize([MEAN] * channels, [STD] * channels),
        plan=plan,
        seed=0,
        augment=operations,
    )
    state = TrainState()
    loop = TrainLoop(model, optimizer_of(model), nn.CrossEntropyLoss(), plan)
    timed_batches = feature_cache.TimedBatches(batches, state)
    records = loop.run(timed_batches, lambda progress: 1.0, epochs=10**6, seed=0, state=state)

    def step() -> None:
        while not isinstance(next(records), Step):
            pass

    return step


class Pictures(Dataset[tuple[Tensor, int]]):
    """Data set as in tutorials: one PIL image at a time through torchvision's transforms."""

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


def with_dataloader(
    model: nn.Module, pixels: Tensor, labels: Tensor, batch: int
) -> Callable[[], None]:
    """Return a step with a DataLoader with its defaults (no workers), then the bare step."""
    optimizer, objective = optimizer_of(model), nn.CrossEntropyLoss()
    model.train()
    loader = DataLoader(Pictures(pixels, labels), batch_size=batch, shuffle=True, drop_last=True)

    def endless_batches() -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.chain.from_iterable(iter(loader) for _ in itertools.count())

    batches = endless_batches()

    def step() -> None:
        images, targets = next(batches)
        objective(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# Each loop and the loop that its time is divided by.
BASELINES = {"convlens": "bare", "dataloader": "bare", "augmented": "bare_and_operations"}


def compare(loops: dict[str, Callable[[], None]], steps: int, rounds: int) -> dict[str, object]:
    """Milliseconds a step (median) of each loop, and medians of paired ratios as in `BASELINES`."""
    spent: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds + 1):
        # The order rotates, so that load on the machine affects each loop equally often.
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
        if name in BASELINES:
            ratios = [a / b for a, b in zip(spent[name], spent[BASELINES[name]], strict=True)]
            figures[f"{name}_over_bare"] = round(statistics.median(ratios), 4)
            interval = median_interval(ratios)
            figures[f"{name}_over_bare_interval"] = [round(end, 4) for end in interval]
    return figures


def mnist_net() -> nn.Module:
    options = recipe.load_recipe("mnist").model.options
    return models.build_model("cnn", 10, 1, 28, options)


def fast_net() -> nn.Module:
    return models.build_model("cnn", 10, 1, 28, recipe.load_recipe("mnist-fast").model.options)


def tiny_net() -> nn.Module:
    options = {"widths": [8, 16, 32], "pool": "stride"}
    return models.build_model("cnn", 10, 1, 28, options)


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    process.keep_freed_memory()
    device.prepare(deterministic=False)
    figures: dict[str, object] = {"rounds": rounds}
    cases = (
        ("mnist_net_batch_64", mnist_net, 64, 1, 28, 5, False, None),
        ("mnist_fast_net_batch_64", fast_net, 64, 1, 28, 12, True, "mnist-best"),
        ("tiny_net_batch_64", tiny_net, 64, 1, 28, 20, True, None),
        ("resnet18_batch_128", resnet, 128, 3, 32, 1, False, "cifar10-cpu"),
    )
    for name, net, batch, channels, size, steps, dataloader, augmented in cases:
        pixels, labels = images_of(4096, channels, size)
        whole = pixels[:batch].float().div_(255).sub_(MEAN).div_(STD)
        loops = {
            "bare": bare(net(), whole, labels[:batch]),
            "convlens": ours(net(), pixels, labels, batch),
        }
        if augmented:
            operations = pipeline.build_pipeline(
                recipe.load_recipe(augmented).operations,
                image_size=size,
                channels=channels,
                classes=10,
            )
            loops["bare_and_operations"] = with_augmentation(
                bare(net(), whole, labels[:batch]), operations, pixels[:batch], labels[:batch]
            )
            loops["augmented"] = ours(net(), pixels, labels, batch, operations)
        if dataloader:
            loops["dataloader"] = with_dataloader(net(), pixels, labels, batch)
        figures[name] = compare(loops, steps, rounds)
    print(json.dumps(record("overhead", figures)))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
