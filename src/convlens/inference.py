"""The only forward pass of evaluate, predict and every measurement on a trained network.

Always float32 and always in eval mode, whatever the training used: a number must not depend on
who asked for it. Eval mode has no batch statistics, so how many images are computed at once, and in
which memory format, changes nothing but speed and the last digits: `Forward` finds both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from convlens import metrics
from convlens.data.batches import Labelled, Prepare, Rows
from convlens.device import MEMORY_FORMATS, Plan, choose, synchronise, use_cores
from convlens.stepping import memory
from convlens.system.console import say
from convlens.views import Views, averaged

# The most that input and output of a network's largest layer may take for one batch, in bytes (a
# few other tensors of that size come and go beside them), and the most images in one. On a CPU
# small networks are a fifth faster by 4096 than by 256, but lose half their speed to page faults
# where freed memory isn't kept (`device.keep_freed_memory`); of larger ones 256 MiB hold enough
# images for all of their speed.
ACTIVATIONS = {"cpu": 1 << 28, "cuda": 1 << 30}
LARGEST = 4096
FIRST = 16  # images in the first batch, which tells how large the others can be
TRIALS, TRIED = 3, 32  # batches that each memory format is timed on, and images in each
SHORTEST, CLEAR = 0.001, 1.3  # least seconds of such a batch; what ends the timing after two
READ, MOST_READ = 1 << 22, 4096  # bytes and images that are read at once where not in memory


def placed(model: nn.Module, on: str | None) -> Plan:
    """Moves `model` to the device asked for (by default the best); returns the plan it runs by."""
    use_cores()
    plan = Plan(choose(on), "fp32", "contiguous")
    plan.prepare_model(model)
    return plan


class Answers(NamedTuple):
    """Logits float32 `[N, classes]` of the images as they are, and their mean over all views."""

    plain: Tensor
    tta: Tensor | None


def batch_logits(model: nn.Module, images: Tensor, normalise: Prepare, plan: Plan) -> Tensor:
    """Logits float32 `[B, classes]` on the device for uint8 images `[B, C, H, W]`."""
    return batch_answers(model, images, normalise, plan, None).plain


@torch.inference_mode()
def batch_answers(
    model: nn.Module, images: Tensor, normalise: Prepare, plan: Plan, views: Views | None
) -> Answers:
    """As `batch_logits`, with the mean over `views` beside it where there are any."""
    with evaluating(model):
        ready = normalise(images.to(plan.device), plan)
        if views is None:
            return Answers(model(ready).float(), None)
        return Answers(*averaged(model, ready, views))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and back to what each module was in."""
    # Module by module: parts that were frozen in eval mode must stay so. And of a network that is
    # in eval mode nothing is set, which at some µs an image would be 1% of a pass.
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Forward:
    """A network's answers to any number of images, in batches that it finds for itself.

    The first batch is small and tells how many images (a power of two) keep within `ACTIVATIONS`;
    if memory runs out all the same, there are half as many from then on. Where `free`, the next
    batches go through the network in each memory format by turns, and the quicker one does the
    rest: on one CPU channels_last is twice as fast as contiguous, on another network or machine
    twice as slow. No image is computed twice for any of that.

    Args:
        normalise: from what the rows hold to the network's input.
        plan: where and how; its memory format is where a free choice begins.
        total: about how many images there will be; few can't earn back a choice.
        free: whether `model`'s memory format may be changed. It stays changed.
    """

    def __init__(
        self, model: nn.Module, normalise: Prepare, plan: Plan, *,
        views: Views | None = None, total: int, free: bool = False,
    ) -> None:  # fmt: skip
        self._model, self._normalise, self.plan, self._views = model, normalise, plan, views
        self.batch = 0  # images at once; 0: not known yet
        self._piece = min(TRIED, total // 64) if free else 0  # images in a timed batch
        formats = [plan.memory_format, *(f for f in MEMORY_FORMATS if f != plan.memory_format)]
        self._seconds: dict[str, list[float]] = {name: [] for name in formats}
        self._coming: list[str] = []  # memory formats of the batches that are to be timed

    def answers(self, images: Tensor) -> Iterator[Answers]:
        """Batch by batch for what the rows hold, `[N, ...]`, in order."""
        start = 0
        while start < len(images):
            step, size = self._plain, self.batch
            if not self.batch:
                step, size = self._measured, FIRST
            elif self._coming:
                step, size = self._timed, min(self._piece, self.batch)
            some, found = images[start : start + size], None
            try:
                found = step(some)
            except (RuntimeError, MemoryError) as error:
                if not memory.is_oom(error):
                    raise
                if len(some) == 1:
                    raise memory.out_of_memory_error(error) from error
            # Outside, since what an exception came through keeps its tensors alive.
            if found is None:
                self._halve(len(some))
                continue
            start += len(some)
            yield found

    def _plain(self, images: Tensor) -> Answers:
        return batch_answers(self._model, images, self._normalise, self.plan, self._views)

    def _measured(self, images: Tensor) -> Answers:
        """The first batch: how large the others are, and whether formats are worth timing."""
        with _largest_layer(self._model) as bytes_of:
            found, seconds = self._clocked(images)
        kind = torch.device(self.plan.device).type
        fit = ACTIVATIONS.get(kind, ACTIVATIONS["cpu"]) * len(images) // max(bytes_of)
        self.batch = min(LARGEST, 1 << max(0, fit.bit_length() - 1))
        if seconds * self._piece >= SHORTEST:
            first, other = self._seconds  # the first of them is warm by now
            self._coming = [other, *[first, other] * TRIALS]
        return found

    def _timed(self, images: Tensor) -> Answers:
        self._lay_out(self._coming[0])
        found, seconds = self._clocked(images)
        warm = len(self._coming) <= 2 * TRIALS
        name = self._coming.pop(0)
        if warm:
            self._seconds[name].append(seconds)
        one, two = self._seconds.values()
        if len(one) == len(two) >= 2:
            apart = min(one) > CLEAR * max(two) or min(two) > CLEAR * max(one)
            if apart or not self._coming:
                self._choose()
        return found

    def _clocked(self, images: Tensor) -> tuple[Answers, float]:
        """Answers, and the seconds an image."""
        synchronise(self.plan.device)
        begun = time.perf_counter()
        found = self._plain(images)
        synchronise(self.plan.device)
        return found, (time.perf_counter() - begun) / len(images)

    def _choose(self) -> None:
        self._coming = []
        medians = {name: statistics.median(times) for name, times in self._seconds.items()}
        first, best = next(iter(medians)), min(medians, key=lambda name: medians[name])
        # Not for noise: the same network should give the same digits tomorrow.
        self._lay_out(best if medians[best] < 0.95 * medians[first] else first)

    def _lay_out(self, memory_format: str) -> None:
        if memory_format != self.plan.memory_format:
            self.plan = replace(self.plan, memory_format=memory_format)
            self.plan.prepare_model(self._model)

    def _halve(self, failed: int) -> None:
        """After a batch of `failed` images there was no memory for."""
        self.batch = failed // 2
        if self.plan.device.startswith("cuda"):
            torch.cuda.empty_cache()
        say(f"out of memory with {failed} images at once: going on with {self.batch}")


@contextmanager
def _largest_layer(model: nn.Module) -> Iterator[list[int]]:
    """Bytes of the inputs and outputs of each layer that is called inside; never empty."""
    sizes = [1]

    def note(_: nn.Module, inputs: object, output: object) -> None:
        tensors = (*inputs, output) if isinstance(inputs, tuple) else (output,)
        sizes.append(sum(t.nbytes for t in tensors if isinstance(t, Tensor)))

    layers = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def split_logits(
    model: nn.Module, split: Labelled, normalise: Prepare, plan: Plan,
    *, advance: Callable[[int], None] = lambda count: None, free: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logits float32 `[N, classes]` and labels int64 `[N]` of a split, both on the device.

    Each image counts exactly once; nothing is dropped or padded. `advance(n)` is told of
    progress; `free` is as in `Forward`.
    """
    answers, labels = split_answers(model, split, normalise, plan, None, advance=advance, free=free)
    return answers.plain, labels


def split_answers(
    model: nn.Module, split: Labelled, normalise: Prepare, plan: Plan, views: Views | None,
    *, advance: Callable[[int], None] = lambda count: None, free: bool = False,
) -> tuple[Answers, Tensor]:  # fmt: skip
    """As `split_logits`, with the mean over `views`: one loop, batch by batch, for both."""
    plain, tta = [], []
    total = split.rows.shape[0]
    forward = Forward(model, normalise, plan, views=views, total=total, free=free)
    for images in _read(split.rows):
        for answers in forward.answers(images):
            plain.append(answers.plain)
            if answers.tta is not None:
                tta.append(answers.tta)
            advance(len(answers.plain))
    mean = torch.cat(tta) if tta else None
    return Answers(torch.cat(plain), mean), split.labels.to(plan.device)


def _read(rows: Rows) -> Iterator[Tensor]:
    """What the rows hold: all of it where it is in memory, else a piece ahead of what is used."""
    whole = rows.resident()
    if whole is not None:
        yield whole
        return
    count, *each = rows.shape
    fit = max(FIRST, min(MOST_READ, READ // math.prod(each)))
    size = 1 << (fit.bit_length() - 1)  # a power of two, as the batches are
    parts = torch.arange(count).split(size)
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(rows.gather, parts[0])
        for following in [*parts[1:], None]:
            images = coming.result()
            if following is not None:
                coming = reader.submit(rows.gather, following)
            yield images


def flops(model: nn.Module, shape: tuple[int, int, int], device: str) -> int:
    """Floating-point operations of the forward pass for one image `[C, H, W]`, in eval mode.

    A multiplication with its addition counts as two; only convolutions and matrix products are
    counted (`torch.utils.flop_counter`): all but a few per cent.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape, device=device))
    return int(counter.get_total_flops())


@torch.inference_mode()
def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross entropy (nats, without smoothing) and accuracy; what validation goes by."""
    loss = nn.functional.cross_entropy(logits, labels)
    return float(loss), float((logits.argmax(1) == labels).float().mean())


def probabilities(logits: Tensor) -> np.ndarray:
    """Softmax of logits `[N, K]` as float64 numpy, rows adding up to 1.

    Raises:
        ModelFileError: logits that are not finite, which only the weights can bring about.
    """
    return metrics.softmax(logits.cpu().numpy())
