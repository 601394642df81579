"""Images a second on the same networks: convlens beside the loops that people would use instead.

    make bench-peers                      builds the peers' environments first, then runs this
    python benchmarks/against_peers.py [--quick] [--rows strided mnist] [--peers lightning]

One process for each peer, all alive at once, of which one computes at a time. For each network
every variant of each peer is tried once (`peers/`: how images are fed, layout, fused optimiser),
and its fastest then takes part in rounds: a window of some seconds for each peer in turn, in an
order that rotates. Ratios are paired within a round. Warm-up, validation, saving and bars are left
out for all. `--quick` tries the first variant only, in two short rounds.
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

# First: it sets what libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np
import torch

from convlens import device, models, recipe
from convlens.data.dataset import channel_stats, load_data
from intervals import median_interval

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))
from turns import Row  # noqa: E402  (it lies beside the peers' programs, which can't import from here)


@dataclass(frozen=True)
class Peer:
    """A program in `peers/` and the environment it runs in (`""` is convlens's own)."""

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
BOUND = "bare"  # no peer: what no loop around the same step can beat


@dataclass(frozen=True)
class Case:
    """A row of the table: network, images and batch."""

    title: str
    net: str
    options: dict[str, Any]
    data: str
    batch: int
    steps: int  # of an epoch
    augment: bool = False


def cases() -> dict[str, Case]:
    strided = {"widths": [16, 32, 64], "pool": "stride", "head": "flatten"}
    fast, plain, large = (
        recipe.load_recipe(name) for name in ("mnist-fast", "mnist", "cifar10-cpu")
    )
    return {
        "strided": Case("strided CNN, MNIST", "cnn", strided, "mnist", 64, 100),
        "mnist-fast": _recipes(fast, 5120),
        "mnist": _recipes(plain, 3200),
        "resnet18": Case(
            "ResNet-18, ImageNet stem, CIFAR-10",
            "resnet18",
            {"stem": "imagenet"},
            "cifar10",
            128,
            5,
        ),
        # Its batches of 1000 would be one step a window.
        "cifar10-cpu": _recipes(large, 500, batch=125, augment=True),
    }


def _recipes(asked: recipe.Recipe, images: int, batch: int = 0, augment: bool = False) -> Case:
    """A recipe's network, in its own batches unless said otherwise."""
    batch = batch or asked.train.batch_size
    title = f"`{asked.name}`'s{', flip and crop' if augment else ''}"
    net, data = asked.model, asked.data.name
    return Case(title, net.name, net.options, data, batch, images // batch, augment)


class Process:
    """A peer's program: one line of JSON to it, one back.

    Args:
        scratch: an empty folder; what convlens remembers of other runs on this machine stays out.
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

    def tell(self, asked: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self.name} stopped:\n{self._log.read()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def variants(self, row: Row) -> list[str]:
        """How this peer may be run on `row`."""
        self.tell({"row": dataclasses.asdict(row)})
        return list(self.answer()["variants"])

    def start(self, row: Row, variant: str) -> str:
        """Trains for an epoch, to warm up; returns what the peer chose itself, if it did."""
        self.tell({"row": dataclasses.asdict(row), "variant": variant})
        return str(self.answer()["how"])

    def rate(self, seconds: float) -> float:
        """Images a second over whole epochs, for at least so many seconds."""
        self.tell({"do": "go", "seconds": seconds})
        window = self.answer()
        return float(window["images"] / window["seconds"])

    def stop(self) -> None:
        self.tell({"do": "stop"})
        self.answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def row_of(name: str, case: Case, folder: Path) -> Row:
    """The first images of the set, written to a file for every peer."""
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
    """Tries each variant once; leaves the process training the fastest."""
    tried = dict[str, float]()
    if len(names) > 1:
        for variant in names:
            process.start(row, variant)
            tried[variant] = round(process.rate(seconds), 1)
            process.stop()
    best = max(tried, key=tried.__getitem__, default=names[0])
    return process.start(row, best) or best, tried


def measure(
    case: Case, row: Row, processes: dict[str, Process], how: argparse.Namespace
) -> dict[str, Any]:
    """One row: rates of every peer, and convlens's over each, paired within rounds."""
    chosen, tried = dict[str, str](), dict[str, dict[str, float]]()
    for name, process in processes.items():
        variants = process.variants(row)[: 1 if how.quick else None]
        chosen[name], tried[name] = best_variant(process, row, variants, how.seconds / 2)
    rates: dict[str, list[float]] = {name: [] for name in processes}
    names = list(processes)
    for turn in range(how.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            rates[name].append(processes[name].rate(how.seconds))
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
    parser.add_argument("--seconds", type=float, default=2.0, help="of a timed window")
    parser.add_argument("--rows", nargs="*", help="by default all")
    parser.add_argument("--peers", nargs="*", help="beside convlens; by default all")
    parser.add_argument("--quick", action="store_true", help="one variant, 2 rounds, short windows")
    how = parser.parse_args()
    if how.quick:
        how.rounds, how.seconds = 2, 0.5
    names = [n for n in PEERS if how.peers is None or n in ("convlens", *how.peers)]
    asked = {n: c for n, c in cases().items() if how.rows is None or n in how.rows}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as log:
        rows = {name: row_of(name, case, Path(scratch)) for name, case in asked.items()}
        processes = {name: Process(name, how.environments, Path(scratch), log) for name in names}
        hello = {name: process.answer() for name, process in processes.items()}
        print(f"started after {time.perf_counter() - began:.0f} s", file=sys.stderr)
        torches = {h["versions"]["torch"] for h in hello.values() if "torch" in h["versions"]}
        if len(torches) != 1:
            raise SystemExit(f"the peers have different torches: {sorted(torches)}")
        found = {name: measure(case, rows[name], processes, how) for name, case in asked.items()}
        for process in processes.values():
            process.close()
    figures = {
        "rounds": how.rounds,
        "window_seconds": how.seconds,
        "quick": how.quick,
        "versions": {k: v for h in hello.values() for k, v in h["versions"].items()},
        "titles": {name: PEERS[name].title for name in names},
        "bound": BOUND,
        "rows": found,
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }
    print(json.dumps(record("peers", figures)))


if __name__ == "__main__":
    main()
