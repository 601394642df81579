"""Images per second of convlens and of other training loops on the same networks.

    make bench-peers                      builds the peers' environments first, then runs this
    python benchmarks/against_peers.py [--quick] [--rows strided mnist] [--peers lightning]

Each peer runs in its own process; all are alive at once, and one computes at a time. For each
network every variant of each peer is tried once (`peers/`: input pipeline, memory format, fused
optimizer). The fastest variant then takes part in rounds: a window of some seconds for each peer in
turn, in rotating order. Ratios are paired within a round. Warm-up, validation, saving and progress
bars are excluded for all. `--quick` tries only the first variant, in two short rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np
import torch

from convlens import device, models, recipe
from convlens.data.dataset import channel_stats, load_data
from intervals import median_interval

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))
from turns import Row  # noqa: E402  (in the folder of the peers' programs)


@dataclass(frozen=True)
class Peer:
    """A program in `peers/` and its environment (`""` is that of convlens)."""

    title: str
    command: list[str]
    environment: str = "torch"
    variables: dict[str, str] = field(default_factory=dict)


PEERS = {
    "convlens": Peer("convlens", ["with_convlens.py"], ""),
    "bare": Peer("bare step, one resident batch", ["with_bare_step.py"]),
    "dataloader": Peer("DataLoader loop, as in tutorials", ["with_dataloader.py"]),
    "dataloader-tuned": Peer("DataLoader loop, tuned", ["with_dataloader.py", "--tuned"]),
    "lightning": Peer("Lightning", ["with_lightning.py"]),
    "fastai": Peer("fastai", ["with_fastai.py"]),
    "skorch": Peer("skorch", ["with_skorch.py"]),
    "keras-jax": Peer("Keras, JAX", ["with_keras.py"], "jax", {"KERAS_BACKEND": "jax"}),
    "keras-torch": Peer("Keras, torch", ["with_keras.py"], "torch", {"KERAS_BACKEND": "torch"}),
}
BOUND = "bare"  # not a peer but the upper bound of every loop


@dataclass(frozen=True)
class Case:
    """A row of the table: network, images and batch."""

    title: str
    net: str
    options: dict[str, Any]
    data: str
    batch: int
    steps: int  # per epoch
    augment: bool = False


def cases() -> dict[str, Case]:
    strided = {"widths": [16, 32, 64], "pool": "stride", "head": "flatten"}
    fast, plain, large = (
        recipe.load_recipe(name) for name in ("mnist-fast", "mnist", "cifar10-cpu")
    )
    return {
        "strided": Case("strided CNN, MNIST", "cnn", strided, "mnist", 64, 100),
        "mnist-fast": _case_of_recipe(fast, 5120),
        "mnist": _case_of_recipe(plain, 3200),
        "resnet18": Case(
            "ResNet-18, ImageNet stem, CIFAR-10",
            "resnet18",
            {"stem": "imagenet"},
            "cifar10",
            128,
            5,
        ),
        # With its batch size of 1000 a window would have one step.
        "cifar10-cpu": _case_of_recipe(large, 500, batch=125, augment=True),
    }


def _case_of_recipe(
    config: recipe.Recipe, images: int, batch: int = 0, augment: bool = False
) -> Case:
    """Return the network of a recipe, with its batch size by default."""
    batch = batch or config.train.batch_size
    title = f"`{config.name}`'s{', flip and crop' if augment else ''}"
    net, data = config.model, config.data.name
    return Case(title, net.name, net.options, data, batch, images // batch, augment)


class Process:
    """The process of a peer, which answers each line of JSON with another.

    Args:
        scratch: an empty folder for the cache of convlens.
    """

    def __init__(self, name: str, environments: Path, scratch: Path, log: IO[str]) -> None:
        self.name, self._log, peer = name, log, PEERS[name]
        folder = environments / peer.environment
        python = str(folder / "bin" / "python") if peer.environment else sys.executable
        self._process = subprocess.Popen(
            [python, str(HERE / "peers" / peer.command[0]), *peer.command[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(HERE.parent / "src"),
                "CONVLENS_CACHE": str(scratch),
                **peer.variables,
            },
        )

    def send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self.name} stopped:\n{self._log.read()[-3000:]}")
        message: dict[str, Any] = json.loads(line)
        return message

    def variants(self, row: Row) -> list[str]:
        """Return the variants of this peer for `row`."""
        self.send({"row": dataclasses.asdict(row)})
        return list(self.receive()["variants"])

    def start(self, row: Row, variant: str) -> str:
        """Train an epoch to warm up; return the plan that the peer chose, if it did."""
        self.send({"row": dataclasses.asdict(row), "variant": variant})
        return str(self.receive()["how"])

    def rate(self, seconds: float) -> float:
        """Return images per second over whole epochs of at least `seconds` in total."""
        self.send({"do": "go", "seconds": seconds})
        window = self.receive()
        return float(window["images"] / window["seconds"])

    def stop(self) -> None:
        self.send({"do": "stop"})
        self.receive()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def row_of(name: str, case: Case, folder: Path) -> Row:
    """Write the first images of the set to a file that all peers read."""
    data = load_data(recipe.DataConfig(name=case.data), memory_budget=device.memory_budget("cpu"))
    count = case.batch * case.steps
    images = data.train.rows.gather(torch.arange(count))
    pixels = np.ascontiguousarray(images.numpy().transpose(0, 2, 3, 1))
    if data.channels == 1:
        pixels = pixels[..., 0]
    path = folder / f"{name}.npz"
    np.savez(path, images=pixels, labels=data.train.labels[:count].numpy())
    mean, std = channel_stats(data.train)
    net = models.build_model(case.net, 10, data.channels, data.image_size, case.options)
    return Row(
        name=name,
        net=case.net,
        options=case.options,
        batch=case.batch,
        steps=case.steps,
        lr=1e-3,
        augment=case.augment,
        pixels=str(path),
        mean=mean,
        std=std,
        parameters=sum(p.numel() for p in net.parameters() if p.requires_grad),
    )


def best_variant(
    process: Process, row: Row, names: list[str], seconds: float
) -> tuple[str, dict[str, float]]:
    """Try each variant once and start training with the fastest."""
    tried = dict[str, float]()
    if len(names) > 1:
        for variant in names:
            process.start(row, variant)
            tried[variant] = round(process.rate(seconds), 1)
            process.stop()
    best = max(tried, key=tried.__getitem__, default=names[0])
    return process.start(row, best) or best, tried


def measure(
    case: Case, row: Row, processes: dict[str, Process], options: argparse.Namespace
) -> dict[str, Any]:
    """Measure the rates of every peer, and the ratios of convlens to each, paired in rounds."""
    chosen, tried = dict[str, str](), dict[str, dict[str, float]]()
    for name, process in processes.items():
        variants = process.variants(row)[: 1 if options.quick else None]
        chosen[name], tried[name] = best_variant(process, row, variants, options.seconds / 2)
    rates: dict[str, list[float]] = {name: [] for name in processes}
    names = list(processes)
    for turn in range(options.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            rates[name].append(processes[name].rate(options.seconds))
    for process in processes.values():
        process.stop()
    found = dict[str, Any]()
    for name, mine in rates.items():
        ratios = [a / b for a, b in zip(rates["convlens"], mine, strict=True)]
        found[name] = {
            "variant": chosen[name],
            "images_per_second": round(statistics.median(mine), 1),
            "each": [round(rate, 1) for rate in mine],
            "convlens_over": round(statistics.median(ratios), 3),
            "convlens_over_interval": [round(end, 3) for end in median_interval(ratios)],
            "tried": tried[name],
        }
        summary = f"{statistics.median(mine):>9,.0f} images/s   {found[name]['convlens_over']:.2f}"
        print(f"{row.name:12} {name:18} {summary}  {chosen[name]}", file=sys.stderr)
    return {
        "title": case.title,
        "batch": row.batch,
        "augment": case.augment,
        "parameters": row.parameters,
        "peers": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=HERE / "peers" / "environments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a timed window")
    parser.add_argument("--rows", nargs="*", help="by default all")
    parser.add_argument("--peers", nargs="*", help="beside convlens; by default all")
    parser.add_argument("--quick", action="store_true", help="one variant, 2 rounds, short windows")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 2, 0.5
    names = [n for n in PEERS if options.peers is None or n in ("convlens", *options.peers)]
    selected = {n: c for n, c in cases().items() if options.rows is None or n in options.rows}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as log:
        rows = {name: row_of(name, case, Path(scratch)) for name, case in selected.items()}
        processes = {
            name: Process(name, options.environments, Path(scratch), log) for name in names
        }
        hello = {name: process.receive() for name, process in processes.items()}
        print(f"started after {time.perf_counter() - start:.0f} s", file=sys.stderr)
        torches = {h["versions"]["torch"] for h in hello.values() if "torch" in h["versions"]}
        if len(torches) != 1:
            raise SystemExit(f"the peers have different torches: {sorted(torches)}")
        found = {
            name: measure(case, rows[name], processes, options) for name, case in selected.items()
        }
        for process in processes.values():
            process.close()
    figures = {
        "rounds": options.rounds,
        "window_seconds": options.seconds,
        "quick": options.quick,
        "versions": {k: v for h in hello.values() for k, v in h["versions"].items()},
        "titles": {name: PEERS[name].title for name in names},
        "bound": BOUND,
        "rows": found,
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    print(json.dumps(record("peers", figures)))


if __name__ == "__main__":
    main()
