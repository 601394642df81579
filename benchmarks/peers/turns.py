"""Shared by the programs of all peers: the row to train, and the protocol of taking turns.

`against_peers.py` starts one process per peer and sends it the row to train over stdin. The peer's
loop calls `Turns.epoch` at the end of each epoch: the first one is warm-up, later ones are timed
in this peer's turn. Between turns the process waits inside that call, so that only one peer
computes at a time and the compared windows are seconds apart.
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
    multiple of the batch size. `mean` and `std` are per channel, for pixels in 0..1.
    """

    name: str
    net: str
    options: dict[str, Any]
    batch: int
    steps: int  # per epoch
    lr: float
    augment: bool
    pixels: str
    mean: list[float]
    std: list[float]
    parameters: int  # number of trained weights

    @property
    def channels(self) -> int:
        return len(self.mean)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        with np.load(self.pixels) as content:
            return content["images"], content["labels"]

    def check(self, parameters: int) -> None:
        """Exit if the network of the peer has another number of trained weights."""
        if parameters != self.parameters:
            raise SystemExit(f"{self.name}: {parameters} trained weights, not {self.parameters}")


class RowOver(Exception):  # noqa: N818 (not an error)
    """Raised to end the loop of a peer when its row is finished."""


class Turns:
    """The timed windows of one training; `how` may name the plan that the peer chose."""

    def __init__(self, images: int, answer: Callable[[dict[str, Any]], None]) -> None:
        self._images, self._answer, self.how = images, answer, ""
        self._seconds = 0.0
        self._begin()

    def _begin(self) -> None:
        self._done, self._began, self._cpu = 0, time.perf_counter(), time.process_time()

    def epoch(self) -> None:
        """End an epoch; to be called when all of its work is done.

        Raises:
            RowOver: The peer must leave its loop.
        """
        spent = time.perf_counter() - self._began
        self._done += self._images
        if spent < self._seconds:
            return
        cpu = time.process_time() - self._cpu
        window = {"images": self._done, "seconds": spent, "cpu_seconds": cpu, "how": self.how}
        self._answer(window)
        request = json.loads(sys.stdin.readline())
        if request["do"] == "stop":
            raise RowOver("the row is finished")
        self._seconds = request["seconds"]
        self._begin()


Train = Callable[[Row, str, Turns], None]


def serve(train: Train, variants: Callable[[Row], list[str]], packages: Sequence[str]) -> None:
    """Answer the requests of `against_peers.py` until stdin is closed.

    Args:
        train: trains a row in one of the peer's variants until `RowOver` is raised.
        variants: returns the variants for a row, the most promising one first.
        packages: packages whose versions are reported.
    """
    # Output of libraries goes to stderr; stdout is reserved for answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    answer({"versions": {package: version(package) for package in packages}})
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        row = Row(**request["row"])
        if "variant" not in request:
            answer({"variants": variants(row)})
            continue
        images, _ = row.load()
        try:
            train(row, request["variant"], Turns(len(images), answer))
        except RowOver:
            answer({"stopped": True})
