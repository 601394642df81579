"""Training steps as CUDA graphs, and the choice between them, `torch.compile` and neither.

A small network's step is a few hundred kernels of microseconds each, and a host that launches
them one by one is slower than the GPU. A graph is launched once. It reads and writes always the
same memory: batches are copied in, rates are tensors (`optim.put_rate`), what comes out is copied.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from convlens.device import Plan, seed_generators, synchronise
from convlens.stepping.memory import OutOfMemory
from convlens.system.console import say

Take = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor]]
WARM = 3  # steps before the capture: they choose algorithms and make the optimiser's state


class Captured:
    """A step that is recorded once, on batches of the size that comes first, and then replayed.

    Batches of another size (an epoch's last one) and the first few steps run as they are, and so
    does everything if the capture fails, which is said. Numbers drawn inside (dropout) depend on
    the device's generator as ever: it is seeded before each step, and a replay reads the seed.

    Args:
        take: `(images, labels) -> (loss, right)`, which must not read any number off the device.
        optimiser: its rates become tensors.
    """

    def __init__(self, take: Take, optimiser: torch.optim.Optimizer) -> None:
        self._take, self._optimiser = take, optimiser
        self._size: tuple[object, ...] | None = None
        self._seen, self._refused = 0, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        for group in optimiser.param_groups:
            if not isinstance(group["lr"], Tensor):
                where = group["params"][0].device
                group["lr"] = torch.full((), float(group["lr"]), device=where)

    def forget(self) -> None:
        """Records anew: other parameters learn from here on."""
        if self._graph is not None:
            torch.cuda.synchronize()  # its memory goes back
        self._graph, self._seen = None, 0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        size = (images.shape, images.dtype, labels.shape, labels.dtype)
        self._size = self._size or size
        if self._refused or size != self._size:
            return self._take(images, labels)
        if self._graph is None:
            self._seen += 1
            if self._seen <= WARM:
                return self._aside(images, labels)
            if not self._capture(images, labels):
                return self._take(images, labels)
        return self._replay(images, labels)

    def _aside(self, images: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        """A step on a stream of its own, as a capture needs those before it to be."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        # Each waits for the other, so that memory which either frees is free for both.
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                return self._take(images, labels)
        finally:  # also if it failed: what it changed is put back on this stream
            torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, images: Tensor, labels: Tensor) -> bool:
        """Records a step without doing it; whether that worked."""
        self._images, self._labels = torch.empty_like(images), torch.empty_like(labels)
        graph = torch.cuda.CUDAGraph()
        self._mark_capturable(True)
        try:
            # Other threads (one that reads images) may do as they like meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss, self._right = self._take(self._images, self._labels)
        except (RuntimeError, OutOfMemory) as error:
            self._refused = True
            reason = (str(error).splitlines() or ["?"])[0]
            say(f"the step can't be recorded as a CUDA graph, it goes on without: {reason}")
            self._optimiser.zero_grad(set_to_none=True)
            _free_generators(images.device)
            return False
        finally:
            self._mark_capturable(False)
        self._graph = graph
        return True

    def _mark_capturable(self, on: bool) -> None:
        # Adam checks this during a capture, and warns of it outside of one; the fused kernels
        # themselves don't care.
        for group in self._optimiser.param_groups:
            if "capturable" in group:
                group["capturable"] = on

    def _replay(self, images: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        assert self._graph is not None
        assert self._loss is not None
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._loss.clone(), self._right.clone()


def _free_generators(device: torch.device) -> None:
    """A capture that failed may leave the generator believing that one is still going on."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    generator = torch.cuda.default_generators[index]
    try:
        generator.manual_seed(0)  # the engine seeds it before each step that draws
    except RuntimeError:
        generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())


def possible(plan: Plan) -> bool:
    """Whether the device has graphs of commands at all."""
    return plan.device.startswith("cuda")


def compiled(model: nn.Module, device: str) -> nn.Module:
    """`torch.compile`d: on a CPU it rarely pays within a few minutes.

    There a small network's step gains 2 to 4% by it, and 6 to 8% if no Python is left between
    the kernels.
    """
    options: dict[str, Any] | None = {"cpp_wrapper": True} if device == "cpu" else None
    return cast(nn.Module, torch.compile(model, options=options))


# What is worth trying at all, before anything is tried: an upper bound on what can be saved
# (a share of the step's time) against a lower bound on what it costs (seconds).
GRAPH_COSTS, COMPILE_SAVES, COMPILE_COSTS = 0.3, 0.35, 30.0
TIMED = 8


@dataclass(frozen=True)
class Timing:
    """Seconds a step, and once before the first of them; `told` is the host's part of a step."""

    step: float
    once: float
    told: float
    losses: tuple[float, ...]


Trial = Callable[[Plan], Callable[[], Tensor]]


def choose(
    plan: Plan,
    trial: Trial,
    steps: int,
    *,
    shapes: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """`plan` with the way of taking steps that makes `steps` of them soonest, all costs counted.

    Only on CUDA; elsewhere, and where runs are too short to earn anything back, nothing is tried.

    Args:
        trial: `trial(plan)` prepares a copy of the network and returns a function that takes one
            step by `plan.step`, always on the same batch, and returns the loss.
        steps: of the whole run.
        shapes: how many sizes of batches there are: each is compiled.
    """
    if not possible(plan) or plan.deterministic:
        return plan
    try:
        eager = measure(plan, trial, clock)
    except OutOfMemory:  # the training will find out what there is memory for
        return plan
    best, total = plan, eager.step * steps
    for step in worth_trying(eager, steps):
        candidate = replace(plan, step=step)
        try:
            found = measure(candidate, trial, clock)
        except Exception as error:  # a compiler has many ways to fail, none of which matters here
            say(f"steps can't be {step} here: {(str(error).splitlines() or ['?'])[0][:200]}")
            continue
        if not agree(eager.losses, found.losses):
            say(f"steps {step} give other losses than steps as they are, so they aren't used")
            continue
        costs = found.once * (shapes if step == "compiled" else 1) + found.step * steps
        if costs < 0.95 * total:
            best, total = candidate, costs
    return best


def worth_trying(eager: Timing, steps: int) -> list[str]:
    """Which other ways could earn back what they cost, by the time of plain steps."""
    found = []
    # Where the host tells a step in less time than the device takes, launches cost nothing.
    idle = min(1.0, eager.told / eager.step)
    if idle > 0.7 and 0.5 * eager.step * steps > 2 * GRAPH_COSTS:
        found.append("graph")
    if COMPILE_SAVES * eager.step * steps > 2 * COMPILE_COSTS:
        found.append("compiled")
    return found


def measure(plan: Plan, trial: Trial, clock: Callable[[], float]) -> Timing:
    """The median step of `TIMED` after those that capture or compile."""
    take = trial(plan)
    seed_generators(plan.device, 0)  # the same dropout for all, so that losses can be compared
    start = clock()
    losses = [take() for _ in range(WARM + 2)]
    synchronise(plan.device)
    first = clock() - start
    spent, told = [], []
    for _ in range(TIMED):
        start = clock()
        losses += [take(), take()]
        told.append((clock() - start) / 2)
        synchronise(plan.device)
        spent.append((clock() - start) / 2)
    step = statistics.median(spent)
    once = max(0.0, first - (WARM + 2) * step)
    values = tuple(float(loss) for loss in losses)
    return Timing(step, once, statistics.median(told), values)


def agree(plain: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether both learn alike: the first steps' losses within a tenth of each other.

    Half precision and other kernels round differently, so that later losses part. A recording
    that reads stale memory, or doesn't move the weights, differs at once.
    """
    few = slice(0, WARM + 3)
    pairs = zip(plain[few], other[few], strict=True)
    # Where plain steps don't stay finite, on one batch again and again, nothing can be compared.
    return all(abs(a - b) <= 0.1 * max(abs(a), 0.1) for a, b in pairs if math.isfinite(a))
