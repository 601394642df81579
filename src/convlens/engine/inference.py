"""Inference: the only forward pass of evaluate, predict and all measurements on a trained network.

It is always in float32 and eval mode, whatever the training used, so that a number does not depend
on the command that computed it. In eval mode there are no batch statistics: batch size and memory
format change only the speed and the last digits. `Forward` chooses both.

Test-time augmentation averages the logits of several views of an image (`VIEWS`), not the
probabilities. The softmax of mean logits is the geometric mean of the views' probabilities,
renormalized: a class that one view practically excludes stays excluded, which an arithmetic mean
would not preserve. Cross entropy is convex in the logits, so the loss of the mean is never above
the mean loss of the views. The published records average logits, too. Views contain mirror images,
which is wrong for text, digits and other images whose class depends on the orientation.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
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
from convlens.models import model_parts
from convlens.utils.console import print_status
from convlens.utils.process import submit_task, wait_for_result

# Largest total size of input and output of a network's largest layer in a batch, in bytes (a few
# other tensors of that size exist at the same time), and largest number of images. On a CPU, small
# networks are a fifth faster with 4096 images than with 256, but lose half their speed to page
# faults if freed memory is not kept (`utils.process.keep_freed_memory`); for larger networks,
# 256 MiB hold enough images for full speed.
MAX_ACTIVATION_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
MAX_BATCH = 4096
FIRST_BATCH = 16  # images in the first batch, which determines the size of the others
TRIAL_ROUNDS = 3  # batches on which each memory format is timed
TRIAL_BATCH = 32  # images in such a batch
MIN_TRIAL_IMAGES = 64  # formats are timed only for at least as many images
MIN_TRIAL_S = 0.001  # formats are timed only if such a batch takes at least this long
CLEAR_RATIO = 1.3  # a format that is faster by this factor is chosen after two rounds
# Images that are not in memory are read in chunks of at most this size.
CHUNK_BYTES = 1 << 22
MAX_CHUNK_IMAGES = 4096

# Maps images `[B, C, H, W]` to pairs of weight and view, of the same shape, one at a time so that
# only one is in memory. Weights add up to one. The first view is the images themselves.
ViewFunction = Callable[[Tensor], Iterator[tuple[float, Tensor]]]


# The list that inputs of the head are recorded in, in this thread; None: they are not recorded.
_head_inputs: ContextVar[list[Tensor] | None] = ContextVar("convlens_head_inputs", default=None)


class ModelOutputs(NamedTuple):
    """Outputs of a network for a batch.

    Attributes:
        logits: of the images, float32 `[N, classes]`.
        tta_logits: their mean over all views (TTA), if any.
        features: outputs of the penultimate layer for the images, float32 `[N, D]`, if requested.
    """

    logits: Tensor
    tta_logits: Tensor | None
    features: Tensor | None = None


def place_model(model: nn.Module, device: str | None) -> Plan:
    """Move `model` to a device (default: the best one); return the plan for inference."""
    plan = Plan(select_device(device), "fp32", "contiguous")
    plan.prepare_model(model)
    return plan


def batch_logits(model: nn.Module, images: Tensor, normalize: Prepare, plan: Plan) -> Tensor:
    """Return logits float32 `[B, classes]`, on the device, of uint8 images `[B, C, H, W]`."""
    return batch_outputs(model, images, normalize, plan, None).logits


@torch.inference_mode()
def batch_outputs(
    model: nn.Module,
    images: Tensor,
    normalize: Prepare,
    plan: Plan,
    views: ViewFunction | None,
    *,
    with_features: bool = False,
) -> ModelOutputs:
    """Like `batch_logits`, with the mean over `views` if given, and with the features."""
    recording: AbstractContextManager[list[Tensor]] = (
        _record_head_inputs(model) if with_features else nullcontext([])
    )
    with eval_mode(model), recording as features:
        inputs = normalize(images.to(plan.device), plan)
        if views is None:
            logits, mean = model(inputs).float(), None
        else:
            logits, mean = average_views(model, inputs, views)
    # The first pass is that of the images themselves.
    return ModelOutputs(logits, mean, features[0] if features else None)


@torch.inference_mode()
def opened_outputs(
    model: nn.Module, images: Tensor, normalize: Prepare, plan: Plan, *, with_features: bool
) -> ModelOutputs:
    """Like `batch_outputs`, for a network in eval mode.

    Features are recorded by `prepare_head_inputs`, which was called before. For small networks the
    contexts of `batch_outputs` take a tenth of the time of a pass.
    """
    features: list[Tensor] = []
    token = _head_inputs.set(features if with_features else None)
    try:
        logits = model(normalize(images.to(plan.device), plan)).float()
    except (RuntimeError, MemoryError) as error:
        if oom.is_oom(error):
            raise oom.out_of_memory_error(error) from error
        raise
    finally:
        _head_inputs.reset(token)
    return ModelOutputs(logits, None, features[0] if features else None)


def has_penultimate_layer(model: nn.Module) -> bool:
    """Return whether the features of a network, the input of its head, can be read."""
    head = model_parts(model).head
    return bool(head) and head in dict(model.named_modules())


@contextmanager
def _record_head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the inputs of the head in each pass, float32 `[B, D]`; maps are averaged."""
    recorded: list[Tensor] = []
    head = model.get_submodule(model_parts(model).head)
    is_hooked = _append_head_input in head._forward_pre_hooks.values()
    handle = None if is_hooked else head.register_forward_pre_hook(_append_head_input)
    token = _head_inputs.set(recorded)
    try:
        yield recorded
    finally:
        _head_inputs.reset(token)
        if handle is not None:
            handle.remove()


def prepare_head_inputs(model: nn.Module) -> None:
    """Attach the hook that records features for good.

    Threads that share a model need this: a hook that one thread attaches or removes changes a
    dictionary that another may be reading. Each thread records only its own passes.
    """
    model.get_submodule(model_parts(model).head).register_forward_pre_hook(_append_head_input)


def _append_head_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    recorded = _head_inputs.get()
    if recorded is not None:
        values = inputs[0].float()
        recorded.append(values.flatten(2).mean(2) if values.ndim > 2 else values)


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the model is in eval mode; then each module has its mode again."""
    # Module by module: frozen modules that were in eval mode must stay so. Nothing is
    # set if the network is in eval mode already: that would cost 1% of a pass over one image.
    modules = [model]
    for module in modules:  # `model.modules()` takes ten times as long
        if module._modules:
            modules += [child for child in module._modules.values() if child is not None]
    training = [module for module in modules if module.training]
    return _switch_to_eval(model, training) if training else nullcontext()


@contextmanager
def _switch_to_eval(model: nn.Module, training: Sequence[nn.Module]) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Forward:
    """Run a network on any number of images; choose batch size and memory format by measuring.

    The first batch is small. The size of its largest layer determines the batch size: the
    largest power of two that stays within `MAX_ACTIVATION_BYTES`, halved whenever memory runs out.
    With `choose_memory_format`, the next batches alternate between both memory formats, and the
    faster one is used for all others: depending on network and machine, channels_last is twice as
    fast as contiguous, or half as fast. The outputs of the timed batches are used, so no image is
    computed twice.

    Args:
        normalize: converts images as read into inputs of the network.
        plan: device and precision; its memory format is the one to start with.
        total: approximate number of images; with few images, timing formats doesn't pay.
        batch_size: size of the batches after the first one if `measure_batch_size` has determined
            it; then nothing is measured, and memory formats are not timed.
        choose_memory_format: whether the memory format of `model` may be changed. It stays changed.
        with_features: also return the outputs of the penultimate layer, from the same pass.
    """

    def __init__(
        self,
        model: nn.Module,
        normalize: Prepare,
        plan: Plan,
        *,
        views: ViewFunction | None = None,
        total: int,
        batch_size: int | None = None,
        choose_memory_format: bool = False,
        with_features: bool = False,
    ) -> None:
        self._model, self._normalize, self.plan, self._views = model, normalize, plan, views
        self._with_features = with_features
        self.batch_size: int | None = None  # None before the first batch
        self._measured_batch_size = batch_size
        trial_size = min(TRIAL_BATCH, total // MIN_TRIAL_IMAGES)
        self._trial_size = trial_size if choose_memory_format else 0
        self._trial: _FormatTrial | None = None  # while memory formats are being timed

    @property
    def is_choosing(self) -> bool:
        """Whether the batch size or the memory format has still to be chosen."""
        return self.batch_size is None or self._trial is not None

    def outputs(self, images: Tensor) -> Iterator[ModelOutputs]:
        """Yield the outputs for images `[N, ...]`, batch by batch, in order."""
        count, start = images.shape[0], 0
        while start < count:
            size = self._next_batch_size()
            batch = images if start == 0 and size >= count else images[start : start + size]
            outputs = None
            try:
                outputs = self._run(batch)
            except (RuntimeError, MemoryError) as error:
                if not oom.is_oom(error):
                    raise
                if len(batch) == 1:
                    raise oom.out_of_memory_error(error) from error
            # Outside of `except`: the traceback there keeps the tensors of the failed pass alive.
            if outputs is None:
                self._reduce_batch_size(len(batch))
                continue
            start += len(batch)
            yield outputs

    def _next_batch_size(self) -> int:
        if self.batch_size is None:
            return FIRST_BATCH
        return self.batch_size if self._trial is None else min(self._trial_size, self.batch_size)

    def _run(self, images: Tensor) -> ModelOutputs:
        if self.batch_size is None:
            return self._run_first(images)
        if self._trial is not None:
            return self._run_trial(self._trial, images)
        return self._forward(images)

    def _forward(self, images: Tensor) -> ModelOutputs:
        return batch_outputs(
            self._model,
            images,
            self._normalize,
            self.plan,
            self._views,
            with_features=self._with_features,
        )

    def _run_first(self, images: Tensor) -> ModelOutputs:
        """Run the first batch; choose the batch size, and whether to time memory formats."""
        if self._measured_batch_size is not None:
            self.batch_size = self._measured_batch_size
            return self._forward(images)
        with _record_layer_sizes(self._model) as sizes:
            outputs, seconds = self._time(images)
        self.batch_size = _largest_batch(max(sizes), len(images), self.plan)
        if seconds * self._trial_size >= MIN_TRIAL_S:
            self._trial = _FormatTrial(self.plan.memory_format)
        return outputs

    def _run_trial(self, trial: _FormatTrial, images: Tensor) -> ModelOutputs:
        self._set_memory_format(trial.schedule[0])
        outputs, seconds = self._time(images)
        best = trial.record(seconds)
        if best is not None:
            self._set_memory_format(best)
            self._trial = None
        return outputs

    def _time(self, images: Tensor) -> tuple[ModelOutputs, float]:
        """Return the outputs, and the seconds per image."""
        synchronize(self.plan.device)
        start = time.perf_counter()
        outputs = self._forward(images)
        synchronize(self.plan.device)
        return outputs, (time.perf_counter() - start) / len(images)

    def _set_memory_format(self, memory_format: str) -> None:
        if memory_format != self.plan.memory_format:
            self.plan = replace(self.plan, memory_format=memory_format)
            self.plan.prepare_model(self._model)

    def _reduce_batch_size(self, failed: int) -> None:
        """Halve the batch size after `failed` images ran out of memory."""
        self.batch_size = failed // 2
        if self.plan.device.startswith("cuda"):
            torch.cuda.empty_cache()
        print_status(f"out of memory with a batch of {failed}; continuing with {self.batch_size}")


def measure_batch_size(model: nn.Module, image: Tensor, normalize: Prepare, plan: Plan) -> int:
    """Return the batch size that `Forward` chooses, from a pass over `image`, `[1, C, H, W]`."""
    with _record_layer_sizes(model) as sizes:
        batch_outputs(model, image, normalize, plan, None)
    return _largest_batch(max(sizes), len(image), plan)


def _largest_batch(layer_bytes: int, count: int, plan: Plan) -> int:
    """Return the batch size, given the size of the largest layer for `count` images."""
    device_type = torch.device(plan.device).type
    max_bytes = MAX_ACTIVATION_BYTES.get(device_type, MAX_ACTIVATION_BYTES["cpu"])
    max_images = max_bytes * count // layer_bytes
    return min(MAX_BATCH, 1 << max(0, max_images.bit_length() - 1))


class _FormatTrial:
    """Times of batches that alternate between the current memory format and the other one.

    The first batch in the other format is a warm-up and is not counted.
    """

    def __init__(self, current: str) -> None:
        (other,) = (name for name in MEMORY_FORMATS if name != current)
        self._current, self._other = current, other
        self._seconds: dict[str, list[float]] = {current: [], other: []}
        self.schedule = [other, *[current, other] * TRIAL_ROUNDS]  # formats of the next batches

    def record(self, seconds: float) -> str | None:
        """Record the time of the next batch; return the format to use once it is clear."""
        name = self.schedule.pop(0)
        if len(self.schedule) < 2 * TRIAL_ROUNDS:
            self._seconds[name].append(seconds)
        current, other = self._seconds[self._current], self._seconds[self._other]
        if not len(current) == len(other) >= 2:
            return None
        is_clear = min(current) > CLEAR_RATIO * max(other) or min(other) > CLEAR_RATIO * max(
            current
        )
        if self.schedule and not is_clear:
            return None
        # A few percent may be noise, and the last digits of a network should be reproducible.
        is_faster = statistics.median(other) < 0.95 * statistics.median(current)
        return self._other if is_faster else self._current


@contextmanager
def _record_layer_sizes(model: nn.Module) -> Iterator[list[int]]:
    """Record the bytes of inputs and outputs of each layer called in the context; never empty."""
    sizes = [1]

    def record(_: nn.Module, inputs: object, output: object) -> None:
        tensors = (*inputs, output) if isinstance(inputs, tuple) else (output,)
        sizes.append(sum(t.nbytes for t in tensors if isinstance(t, Tensor)))

    layers = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [layer.register_forward_hook(record) for layer in layers]
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
    choose_memory_format: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return logits float32 `[N, classes]` and labels int64 `[N]` of a split, on the device.

    Each image counts exactly once; nothing is dropped or padded.

    Args:
        advance: called with the number of images after each batch, for progress bars.
        choose_memory_format: as in `Forward`.
    """
    outputs, labels = split_outputs(
        model,
        split,
        normalize,
        plan,
        None,
        advance=advance,
        choose_memory_format=choose_memory_format,
    )
    return outputs.logits, labels


def split_outputs(
    model: nn.Module,
    split: Labelled,
    normalize: Prepare,
    plan: Plan,
    views: ViewFunction | None,
    *,
    advance: Callable[[int], None] = lambda count: None,
    choose_memory_format: bool = False,
    with_features: bool = False,
    reduce_features: Callable[[ModelOutputs], Tensor] | None = None,
) -> tuple[ModelOutputs, Tensor]:
    """Like `split_logits`, with the mean over `views` if given, and with the features.

    Args:
        reduce_features: returns what is kept of each batch instead of its features, one row for
            each image.
    """
    batches: list[ModelOutputs] = []
    total = split.rows.shape[0]
    forward = Forward(
        model,
        normalize,
        plan,
        views=views,
        total=total,
        choose_memory_format=choose_memory_format,
        with_features=with_features,
    )
    for images in _read_chunks(split.rows):
        for outputs in forward.outputs(images):
            if reduce_features is not None:
                outputs = outputs._replace(features=reduce_features(outputs))
            batches.append(outputs)
            advance(len(outputs.logits))
    return join_outputs(batches), split.labels.to(plan.device)


def join_outputs(batches: Sequence[ModelOutputs]) -> ModelOutputs:
    """Return the outputs for the images of all batches."""
    if len(batches) == 1:  # copying them would take as long as a small layer
        return batches[0]
    logits, tta_logits, features = zip(*batches, strict=True)
    return ModelOutputs(
        torch.cat(logits),
        None if tta_logits[0] is None else torch.cat(tta_logits),
        None if features[0] is None else torch.cat(features),
    )


def _read_chunks(rows: RowReader) -> Iterator[Tensor]:
    """Yield all images at once if they are in memory, else chunks, read one ahead."""
    in_memory = rows.in_memory_tensor()
    if in_memory is not None:
        yield in_memory
        return
    count, *image_shape = rows.shape
    max_images = max(FIRST_BATCH, min(MAX_CHUNK_IMAGES, CHUNK_BYTES // math.prod(image_shape)))
    chunk_size = 1 << (max_images.bit_length() - 1)  # a power of two, as batch sizes are
    chunks = torch.arange(count).split(chunk_size)
    with ThreadPoolExecutor(max_workers=1) as reader:
        # In a copy of this thread's context, which holds the verbosity.
        pending = submit_task(reader, copy_context().run, rows.gather, chunks[0])
        for following in [*chunks[1:], None]:
            images = wait_for_result(pending)
            if following is not None:
                pending = submit_task(reader, copy_context().run, rows.gather, following)
            yield images


def flops(model: nn.Module, shape: tuple[int, int, int], device: str) -> int:
    """Return the floating-point operations of a forward pass for one image `[C, H, W]`.

    A multiply-add counts as two. Only convolutions and matrix products are counted
    (`torch.utils.flop_counter`): all but a few percent.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with eval_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape, device=device))
    return int(counter.get_total_flops())


@torch.inference_mode()
def validation_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the metrics of a validation by their names in `metrics.csv`.

    The loss is the mean cross-entropy, in nats, without label smoothing and class weights.
    """
    loss, preds = nn.functional.cross_entropy(logits, labels), logits.argmax(1)
    table = metrics.confusion_matrix(labels.cpu().numpy(), preds.cpu().numpy(), logits.shape[1])
    macro_f1, balanced_accuracy = metrics.class_means(table)
    return {
        "val_loss": float(loss),
        "val_accuracy": float((preds == labels).float().mean()),
        "val_macro_f1": macro_f1,
        "val_balanced_accuracy": balanced_accuracy,
    }


def probabilities(logits: Tensor, temperature: float = 1.0) -> np.ndarray:
    """Return the softmax of logits `[N, K]` as float64 numpy array; rows add up to 1.

    Args:
        temperature: of the model (`ModelCalibration`).

    Raises:
        ModelFileError: logits that are not finite, which only the weights can cause.
    """
    return metrics.softmax(logits.cpu().numpy(), temperature)


def flip_views(images: Tensor) -> Iterator[tuple[float, Tensor]]:
    """The images and their mirror images, with equal weight; float `[B, C, H, W]`."""
    yield 0.5, images
    yield 0.5, images.flip(-1)


def flip_shift_views(images: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Six views: the pair of `flip_views` with half the weight, and two translated pairs.

    Translations are up-left and down-right, with reflect padding, by one pixel at 32 pixels
    (multi-crop evaluation of Jordan 2024, arXiv:2404.00498). For other sizes, which the paper does
    not cover, by `translation_pixels`. Float `[B, C, H, W]`; each pair is an image and its mirror
    image.
    """
    shift = translation_pixels(images.shape[-1])
    height, width = images.shape[-2:]
    padded = F.pad(images, (shift, shift, shift, shift), mode="reflect")
    up_left = padded[..., 2 * shift :, 2 * shift :]
    down_right = padded[..., :height, :width]
    for weight, translated in ((0.5, images), (0.25, up_left), (0.25, down_right)):
        for _, view in flip_views(translated):
            yield weight / 2, view


def translation_pixels(size: int) -> int:
    """Return the translation for images of `size` pixels: size / 32, rounded, at least 1."""
    return max(1, (size + 16) // 32)


VIEWS: dict[str, ViewFunction] = {"flip": flip_views, "flip+shifts": flip_shift_views}


def select_views(name: str | None) -> ViewFunction | None:
    """Return the views of that name; None for None.

    Raises:
        UsageError: unknown name, with near misses.
    """
    return None if name is None else lookup(VIEWS, name, "test-time augmentation")


def average_views(
    forward: Callable[[Tensor], Tensor], images: Tensor, views: ViewFunction
) -> tuple[Tensor, Tensor]:
    """Return the logits of the images and the weighted mean over all views, float32 `[B, K]`.

    The images themselves are the first view, so they need no pass of their own. Each view is a
    pass with the same batch size, so the logits of the images have the same bits as without
    test-time augmentation.

    Args:
        images: normalized, `[B, C, H, W]`.
    """
    pairs = views(images)
    weight, view = next(pairs)
    logits = forward(view).float()
    mean = weight * logits
    for weight, view in pairs:
        mean += weight * forward(view).float()
    return logits, mean
