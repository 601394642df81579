"""Where memory runs out: a batch is computed in smaller parts, or an error says what to do.

A step in parts is the step of the whole batch, since gradients add up; only a batch norm that
learns notices, because it sees a part at a time. `engine.fit` undoes the step that failed, halves
the part, and goes on; `Position.part` remembers it, so that a continued run does the same.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from convlens.errors import ResourceError

# Only CUDA has an exception of its own for it. Texts of torch's allocators (Linux and macOS,
# Windows, MPS), of C++ behind it, and of NVIDIA's libraries, which allocate for themselves.
SAID = (
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
HELP = "end other programs; or use a smaller network, smaller images (data.image_size), a GPU"


def ran_out(error: BaseException) -> bool:
    """Whether this means that there was no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


def explained(error: BaseException) -> ResourceError:
    """What a user is told where nothing smaller can be tried."""
    lines = str(error).strip().splitlines() or ["no reason was given"]
    told = next((line for line in lines if "allocate" in line), lines[0])
    return ResourceError("not enough memory", where=" ".join(told.split())[:200], fix=HELP)


class TooLarge(Exception):  # noqa: N818 (control flow: the engine goes back, and on in parts)
    """There was no memory to compute that many images at once; nothing was updated with them."""

    def __init__(self, images: int) -> None:
        super().__init__(f"no memory for {images} images at once")
        self.images = images


class Trying:
    """Turns running out of memory inside into `TooLarge`, and leaves all else as it is."""

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
        if error is not None and ran_out(error):
            raise TooLarge(self._images) from error


def smaller(model: nn.Module, failed: TooLarge, part: int, *, several: bool) -> int:
    """How many images at once to try after `failed`: half as many.

    Args:
        part: how many there were to be; 0: all of a batch. (Fewer failed in a smaller last batch,
            one more where a single image was left over.)
        several: whether other processes have rows of the batch, too. They wait for this one's in
            the middle of the same step, so that nothing can be agreed upon any more.

    Raises:
        ResourceError: there is nothing smaller.
    """
    images, least = failed.images, 2 if norms_batches(model) else 1
    if several:
        raise ResourceError(
            f"not enough memory for the {images} images of a batch that are this process's",
            fix="a smaller train.batch_size, or more processes that share it",
        ) from failed.__cause__
    tried = min(images, part or images)
    if tried <= least:
        count = "a single image" if images == 1 else f"{images} images at once"
        why = " (batch norm can't train on one)" if least == 2 else ""
        raise ResourceError(
            f"not enough memory to train on {count}{why}", fix=HELP
        ) from failed.__cause__
    return max(tried // 2, least)


def norms_batches(model: nn.Module) -> bool:
    """Whether a batch norm goes by the batch's own statistics: then its parts aren't the whole."""
    return any(module.training and isinstance(module, _BatchNorm) for module in model.modules())


def told(model: nn.Module, batch_size: int, part: int) -> str:
    """What a user is told of a training that goes on in parts of `part` images."""
    count = "1 image" if part == 1 else f"{part} images"
    if norms_batches(model):
        rest = (
            "updates are still those of whole batches, but batch norm goes by the images of a "
            "part: its statistics are noisier, and accuracy may differ"
        )
    else:
        rest = "which changes speed and last digits only"
    return f"out of memory: a batch of {batch_size} is now computed {count} at a time; {rest}"
