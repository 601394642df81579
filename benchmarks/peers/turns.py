"""What every peer's program shares: the row it is asked to train, and taking turns.

`against_peers.py` starts one process for each peer. It tells it over stdin what to train, and the
peer's own loop then calls `Turns.epoch` at the end of each epoch: the first is warm-up, and later
ones are timed while it is this peer's turn. Between turns the process waits inside that call, so
that only one of them computes at a time, and windows that are compared lie seconds apart.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """One network on one set of images, the same for all peers.

    `pixels` is a `.npz` with `images`, uint8 `[N, H, W]` or `[N, H, W, 3]`, and `labels`; N is a
    whole number of batches. `mean` and `std` are those of the channels, in units of 0..1.
    """

    name: str
    net: str
    options: dict[str, Any]
    batch: int
    steps: int  # of an epoch
    lr: float
    augment: bool
    pixels: str
    mean: list[float]
    std: list[float]
    parameters: int  # that are trained

    @property
    def channels(self) -> int:
        return len(self.mean)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        with np.load(self.pixels) as content:
            return content["images"], content["labels"]

    def check(self, parameters: int) -> None:
        """Whether the peer trains the same network, as far as its number of weights tells."""
        if parameters != self.parameters:
            raise SystemExit(f"{self.name}: {parameters} trained weights, not {self.parameters}")


class RowOver(Exception):  # noqa: N818 (no error)
    """Raised out of the peer's loop when its row is over."""


class Turns:
    """The timed windows of one training. `how` may say what the peer itself chose."""

    def __init__(self, images: int, answer: Callable[[dict[str, Any]], None]) -> None:
        self._images, self._answer, self.how = images, answer, ""
        self._seconds = 0.0
        self._begin()

    def _begin(self) -> None:
        self._done, self._began, self._cpu = 0, time.perf_counter(), time.process_time()

    def epoch(self) -> None:
        """To be called at the end of each epoch, when all of its work is done.

        Raises:
            RowOver: the peer is to leave its loop.
        """
        spent = time.perf_counter() - self._began
        self._done += self._images
        if spent < self._seconds:
            return
        cpu = time.process_time() - self._cpu
        window = {"images": self._done, "seconds": spent, "cpu_seconds": cpu, "how": self.how}
        self._answer(window)
        asked = json.loads(sys.stdin.readline())
        if asked["do"] == "stop":
            raise RowOver("the peer is to leave its loop")
        self._seconds = asked["seconds"]
        self._begin()


Train = Callable[[Row, str, Turns], None]


def serve(train: Train, variants: Callable[[Row], list[str]], packages: Sequence[str]) -> None:
    """Answers `against_peers.py` until it hangs up.

    Args:
        train: trains a row in one of the peer's variants, for ever.
        variants: how it may be run on a row; the likeliest winner first.
        packages: whose versions are to be told.
    """
    # Whatever libraries print goes to stderr; the answers have the real stdout for themselves.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    answer({"versions": {package: version(package) for package in packages}})
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        row = Row(**asked["row"])
        if "variant" not in asked:
            answer({"variants": variants(row)})
            continue
        images, _ = row.load()
        try:
            train(row, asked["variant"], Turns(len(images), answer))
        except RowOver:
            answer({"stopped": True})
