"""The only forward pass of evaluate, predict and every measurement on a trained network.

Always float32 and always in eval mode, whatever the training used: a number must not depend on
which command computed it. Eval mode has no batch statistics, so batch size and memory format change
nothing but speed and the last digits: `Forward` chooses both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convlens import metrics
from convlens.data.loader import Labelled, Prepare, RowReader
from convlens.device import MEMORY_FORMATS, Plan, select_device, synchronize
from convlens.engine import oom
from convlens.errors import lookup
from convlens.utils.console import print_status

# The most that input and output of a network's largest layer may take for one batch, in bytes (a
# few other tensors of that size come and go beside them), and the most images in one. On a CPU
# small networks are a fifth faster by 4096 than by 256, but lose half their speed to page faults
# where freed memory isn't kept (`process.keep_freed_memory`); of larger ones 256 MiB hold enough
# images for all of their speed.
MAX_ACTIVATION_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
MAX_BATCH = 4096
FIRST_BATCH = 16  # images in the first batch, which tells how large the others can be
TRIALS, TRIED = 3, 32  # batches that each memory format is timed on, and images in each
SHORTEST, CLEAR = 0.001, 1.3  # least seconds of such a batch; what ends the timing after two
READ, MOST_READ = 1 << 22, 4096  # bytes and images that are read at once where not in memory


def place_model(model: nn.Module, on: str | None) -> Plan:
    """Moves `model` to the device asked for (by default the best); returns the plan it runs by."""
    plan = Plan(select_device(on), "fp32", "contiguous")
    plan.prepare_model(model)
    return plan


class ModelOutputs(NamedTuple):
    """Logits float32 `[N, classes]` of the images as they are, and their mean over all views."""

    plain: Tensor
    tta: Tensor | None


def batch_logits(model: nn.Module, images: Tensor, normalize: Prepare, plan: Plan) -> Tensor:
    """Logits float32 `[B, classes]` on the device for uint8 images `[B, C, H, W]`."""
    return batch_outputs(model, images, normalize, plan, None).plain


@torch.inference_mode()
def batch_outputs(
    model: nn.Module, images: Tensor, normalize: Prepare, plan: Plan, views: ViewFunction | None
) -> ModelOutputs:
    """As `batch_logits`, with the mean over `views` beside it where there are any."""
    with eval_mode(model):
        ready = normalize(images.to(plan.device), plan)
        if views is None:
            return ModelOutputs(model(ready).float(), None)
        return ModelOutputs(*average_views(model, ready, views))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
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
    """Runs a network on any number of images, in batches whose size and memory format it chooses.

    The first batch is small. The size of the largest layer in it gives the batch size: the largest
    power of two that keeps within `ACTIVATIONS`, halved whenever memory runs out. Where `free`, the
    next batches are timed in both memory formats by turns, and the faster one does the rest: on
    one CPU channels_last is twice as fast as contiguous, on another network or machine twice as
    slow. The timed batches are answered, too, so that no image is computed twice.

    Args:
        normalize: from what the rows hold to the network's input.
        plan: device and precision; its memory format is the one to start with.
        total: about how many images there will be; with few, timing formats doesn't pay.
        free: whether `model`'s memory format may be changed. It stays changed.
    """

    def __init__(
        self,
        model: nn.Module,
        normalize: Prepare,
        plan: Plan,
        *,
        views: ViewFunction | None = None,
        total: int,
        free: bool = False,
    ) -> None:
        self._model, self._normalise, self.plan, self._views = model, normalize, plan, views
        self.batch_size: int | None = None  # None before the first batch
        self._trial_size = min(TRIED, total // 64) if free else 0  # images in a timed batch
        self._trial: _FormatTrial | None = None  # while memory formats are being timed

    def answers(self, images: Tensor) -> Iterator[ModelOutputs]:
        """Batch by batch for what the rows hold, `[N, ...]`, in order."""
        while len(images):
            batch = images[: self._next_batch_size()]
            found = None
            try:
                found = self._run(batch)
            except (RuntimeError, MemoryError) as error:
                if not oom.is_oom(error):
                    raise
                if len(batch) == 1:
                    raise oom.out_of_memory_error(error) from error
            # Outside of `except`: the traceback there keeps the tensors of the failed pass alive.
            if found is None:
                self._reduce_batch_size(len(batch))
                continue
            images = images[len(batch) :]
            yield found

    def _next_batch_size(self) -> int:
        if self.batch_size is None:
            return FIRST_BATCH
        return self.batch_size if self._trial is None else min(self._trial_size, self.batch_size)

    def _run(self, images: Tensor) -> ModelOutputs:
        if self.batch_size is None:
            return self._run_first(images)
        if self._trial is not None:
            return self._run_trial(self._trial, images)
        return batch_outputs(self._model, images, self._normalise, self.plan, self._views)

    def _run_first(self, images: Tensor) -> ModelOutputs:
        """Run the first batch; choose the batch size, and whether to time memory formats."""
        with _largest_layer(self._model) as layer_bytes:
            found, seconds = self._time(images)
        kind = torch.device(self.plan.device).type
        fit = (
            MAX_ACTIVATION_BYTES.get(kind, MAX_ACTIVATION_BYTES["cpu"])
            * len(images)
            // max(layer_bytes)
        )
        self.batch_size = min(MAX_BATCH, 1 << max(0, fit.bit_length() - 1))
        if seconds * self._trial_size >= SHORTEST:
            self._trial = _FormatTrial(self.plan.memory_format)
        return found

    def _run_trial(self, trial: _FormatTrial, images: Tensor) -> ModelOutputs:
        self._set_memory_format(trial.coming[0])
        found, seconds = self._time(images)
        best = trial.record(seconds)
        if best is not None:
            self._set_memory_format(best)
            self._trial = None
        return found

    def _time(self, images: Tensor) -> tuple[ModelOutputs, float]:
        """Answers, and the seconds per image."""
        synchronize(self.plan.device)
        start = time.perf_counter()
        found = batch_outputs(self._model, images, self._normalise, self.plan, self._views)
        synchronize(self.plan.device)
        return found, (time.perf_counter() - start) / len(images)

    def _set_memory_format(self, memory_format: str) -> None:
        if memory_format != self.plan.memory_format:
            self.plan = replace(self.plan, memory_format=memory_format)
            self.plan.prepare_model(self._model)

    def _reduce_batch_size(self, failed: int) -> None:
        """Halve the batch size after `failed` images ran out of memory."""
        self.batch_size = failed // 2
        if self.plan.device.startswith("cuda"):
            torch.cuda.empty_cache()
        print_status(f"out of memory with {failed} images at once: going on with {self.batch_size}")


class _FormatTrial:
    """Times of batches in the current memory format and in the other one, by turns.

    The first batch of the other format warms it up and doesn't count.
    """

    def __init__(self, current: str) -> None:
        (other,) = (name for name in MEMORY_FORMATS if name != current)
        self._current, self._other = current, other
        self._seconds: dict[str, list[float]] = {current: [], other: []}
        self.coming = [other, *[current, other] * TRIALS]  # formats of the batches to come

    def record(self, seconds: float) -> str | None:
        """Record the time of the next batch; return the format to use once it is clear."""
        name = self.coming.pop(0)
        if len(self.coming) < 2 * TRIALS:
            self._seconds[name].append(seconds)
        current, other = self._seconds[self._current], self._seconds[self._other]
        if not len(current) == len(other) >= 2:
            return None
        clear = min(current) > CLEAR * max(other) or min(other) > CLEAR * max(current)
        if self.coming and not clear:
            return None
        # Not for a few per cent, which may be noise: a network should give the same last digits
        # every time.
        faster = statistics.median(other) < 0.95 * statistics.median(current)
        return self._other if faster else self._current


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
    model: nn.Module,
    split: Labelled,
    normalize: Prepare,
    plan: Plan,
    *,
    advance: Callable[[int], None] = lambda count: None,
    free: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits float32 `[N, classes]` and labels int64 `[N]` of a split, both on the device.

    Each image counts exactly once; nothing is dropped or padded. `advance(n)` is told of
    progress; `free` is as in `Forward`.
    """
    answers, labels = split_outputs(model, split, normalize, plan, None, advance=advance, free=free)
    return answers.plain, labels


def split_outputs(
    model: nn.Module,
    split: Labelled,
    normalize: Prepare,
    plan: Plan,
    views: ViewFunction | None,
    *,
    advance: Callable[[int], None] = lambda count: None,
    free: bool = False,
) -> tuple[ModelOutputs, Tensor]:
    """As `split_logits`, with the mean over `views`: one loop, batch by batch, for both."""
    plain, tta = [], []
    total = split.rows.shape[0]
    forward = Forward(model, normalize, plan, views=views, total=total, free=free)
    for images in _read_chunks(split.rows):
        for answers in forward.answers(images):
            plain.append(answers.plain)
            if answers.tta is not None:
                tta.append(answers.tta)
            advance(len(answers.plain))
    mean = torch.cat(tta) if tta else None
    return ModelOutputs(torch.cat(plain), mean), split.labels.to(plan.device)


def _read_chunks(rows: RowReader) -> Iterator[Tensor]:
    """What the rows hold: all of it where it is in memory, else a piece ahead of what is used."""
    whole = rows.in_memory_tensor()
    if whole is not None:
        yield whole
        return
    count, *each = rows.shape
    fit = max(FIRST_BATCH, min(MOST_READ, READ // math.prod(each)))
    size = 1 << (fit.bit_length() - 1)  # a power of two, as the batches are
    parts = torch.arange(count).split(size)
    with ThreadPoolExecutor(max_workers=1) as reader:
        # With this thread's context: what is quiet here is quiet there.
        coming = reader.submit(copy_context().run, rows.gather, parts[0])
        for following in [*parts[1:], None]:
            images = coming.result()
            if following is not None:
                coming = reader.submit(copy_context().run, rows.gather, following)
            yield images


def flops(model: nn.Module, shape: tuple[int, int, int], device: str) -> int:
    """Floating-point operations of the forward pass for one image `[C, H, W]`, in eval mode.

    A multiplication with its addition counts as two; only convolutions and matrix products are
    counted (`torch.utils.flop_counter`): all but a few per cent.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
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


# ---- views ----------------------------------------
# Test-time augmentation: the views of an image that a network is asked about, and their mean.
#
# Logits are averaged, not probabilities: softmax of mean logits is the geometric mean of the views'
# probabilities, renormalised. A class that one view all but rules out stays ruled out, which an
# arithmetic mean would forget; and cross entropy is convex in the logits, so that the loss of the
# mean is never above the mean loss of the views. The published records average logits, too.
#
# A mirror image must not change the class: these views are wrong for text, digits and the like.

# Weights (they add up to one) and images `[B, C, H, W]` of the same shape, one view at a time so
# that no more than one is in memory. The first view is the images as they are.
ViewFunction = Callable[[Tensor], Iterator[tuple[float, Tensor]]]


def flip_views(images: Tensor) -> Iterator[tuple[float, Tensor]]:
    """The images and their mirror images, half each; float `[B, C, H, W]`."""
    yield 0.5, images
    yield 0.5, images.flip(-1)


def flip_shift_views(images: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Six views: half the weight on the untranslated pair of `flip`, half on two translated pairs.

    They are translated up-left and down-right, with reflect padding, by one pixel at 32 pixels
    (Jordan 2024, arXiv:2404.00498, multi-crop evaluation). Other sizes are our generalisation:
    `shift(size)` pixels. Float `[B, C, H, W]`; each pair is an image and its mirror image.
    """
    by = shift_images(images.shape[-1])
    height, width = images.shape[-2:]
    padded = F.pad(images, (by, by, by, by), mode="reflect")
    up_left = padded[..., 2 * by :, 2 * by :]
    down_right = padded[..., :height, :width]
    for weight, moved in ((0.5, images), (0.25, up_left), (0.25, down_right)):
        for _, view in flip_views(moved):
            yield weight / 2, view


def shift_images(size: int) -> int:
    """Pixels of translation for images of `size` pixels: size / 32, halves up, at least 1."""
    return max(1, (size + 16) // 32)


VIEWS: dict[str, ViewFunction] = {"flip": flip_views, "flip+shifts": flip_shift_views}


def select_views(name: str | None) -> ViewFunction | None:
    """The views of that name; None for None.

    Raises:
        UsageError: no such views, with near misses.
    """
    return None if name is None else lookup(VIEWS, name, "test-time augmentation")


def average_views(
    forward: Callable[[Tensor], Tensor], images: Tensor, views: ViewFunction
) -> tuple[Tensor, Tensor]:
    """Plain logits and the weighted mean over all views, both float32 `[B, K]`.

    `images` are normalised ones, `[B, C, H, W]`. The plain view is one of the views, so it costs
    no pass of its own; each view is a pass over the same batch size, so that the plain logits are
    bit for bit those without test-time augmentation.
    """
    pairs = views(images)
    weight, view = next(pairs)
    plain = forward(view).float()
    total = weight * plain
    for weight, view in pairs:
        total += weight * forward(view).float()
    return plain, total
