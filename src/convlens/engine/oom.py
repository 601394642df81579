"""Out-of-memory errors: recognize them, and choose a smaller micro-batch.

Gradients add up, so a step computed in micro-batches is the step of the whole batch. The exception
is batch norm in training mode, whose statistics are those of a micro-batch.
`TrainLoop.run` undoes the step that failed, halves the micro-batch and repeats the step.
`TrainState.micro_batch_size` keeps the size, so that a resumed run computes the same steps.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from convlens.errors import ResourceError

# Only CUDA has an exception class for this. These are the messages of torch's allocators (Linux
# and macOS, Windows, MPS), of the C++ runtime, and of NVIDIA's libraries, which allocate memory
# themselves.
OOM_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "std::bad_alloc",
    "bad allocation",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
OOM_HELP = "end other programs; or use a smaller network, smaller images (data.image_size), a GPU"


def is_oom(error: BaseException) -> bool:
    """Return whether `error` is a failed allocation of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OOM_MESSAGES)


def out_of_memory_error(error: BaseException) -> ResourceError:
    """Return the error to report where no smaller batch can be tried."""
    lines = str(error).strip().splitlines() or ["no reason was given"]
    reason = next((line for line in lines if "allocate" in line), lines[0])
    return ResourceError("not enough memory", where=" ".join(reason.split())[:200], fix=OOM_HELP)


class OutOfMemory(Exception):  # noqa: N818 (control flow: the step is repeated in micro-batches)
    """Not enough memory to compute `images` images at once; no weight was updated with them."""

    def __init__(self, images: int) -> None:
        super().__init__(f"no memory for {images} images at once")
        self.images = images


class catch_oom:  # noqa: N801 (a context manager, named like a function)
    """Convert an out-of-memory error of any kind inside the context into `OutOfMemory`.

    A class, because `contextlib.contextmanager` costs several times as much per step.
    """

    __slots__ = ("_images",)

    def __init__(self, images: int) -> None:
        self._images = images

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and is_oom(error):
            raise OutOfMemory(self._images) from error


def next_micro_batch_size(
    model: nn.Module, failure: OutOfMemory, micro_batch_size: int, *, distributed: bool
) -> int:
    """Return half of the number of images that failed.

    Args:
        micro_batch_size: images that were to be computed at once; 0: the whole batch. (A smaller
            last batch may have failed, or a micro-batch that was one larger because a single
            image was left over.)
        distributed: whether other processes share the batch. They already wait for the gradients
            of this process, so the micro-batch size can no longer be changed.

    Raises:
        ResourceError: no smaller micro-batch is possible.
    """
    images, smallest = failure.images, 2 if uses_batch_statistics(model) else 1
    if distributed:
        raise ResourceError(
            f"not enough memory for the {images} images of a batch that this process computes",
            fix="use a smaller train.batch_size, or more processes",
        ) from failure.__cause__
    tried = min(images, micro_batch_size or images)
    if tried <= smallest:
        count = "a single image" if images == 1 else f"{images} images at once"
        why = " (batch norm can't train on one)" if smallest == 2 else ""
        raise ResourceError(
            f"not enough memory to train on {count}{why}", fix=OOM_HELP
        ) from failure.__cause__
    return max(tried // 2, smallest)


def uses_batch_statistics(model: nn.Module) -> bool:
    """Return whether batch norm in training mode makes the output depend on micro-batches."""
    return any(module.training and isinstance(module, _BatchNorm) for module in model.modules())


def micro_batching_message(model: nn.Module, batch_size: int, micro_batch_size: int) -> str:
    """Return the message that training continues in micro-batches, and what that changes."""
    count = "1 image" if micro_batch_size == 1 else f"{micro_batch_size} images"
    if uses_batch_statistics(model):
        effect = (
            "updates are still those of whole batches, but batch norm uses the statistics of a "
            "micro-batch: they are noisier, and accuracy may differ"
        )
    else:
        effect = "this changes only the speed and the last digits"
    return f"out of memory: a batch of {batch_size} is now computed {count} at a time; {effect}"
