"""Training and evaluation by several processes, on `torch.nn.parallel.DistributedDataParallel`.

Each process computes its rows of every batch (`ProcessGroup.share`). Its loss is weighted by its
part of the batch, so gradients are those of the mean over all rows, however the batch divides.
Loss, number of correct predictions and the running statistics of batch norm are summed over the
processes, so everything decided after a step is the same in all of them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from convlens.data.loader import Labelled
from convlens.distributed import ProcessGroup, Share
from convlens.errors import UsageError

EVAL_CHUNK = 256  # images of a split are assigned to processes in chunks of this size


class DataParallel:
    """Average gradients, losses and batch norm statistics over the processes of a training.

    Args:
        batch_sizes: images in each batch of an epoch, of all processes together.
    """

    def __init__(self, process_group: ProcessGroup, batch_sizes: Sequence[int]) -> None:
        self._group, self._batch_sizes = process_group, batch_sizes
        self._wrapped: DistributedDataParallel | None = None
        self.share = process_group.share(max(batch_sizes))

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def world_size(self) -> int:
        return self._group.size

    def next_batch(self, step: int) -> Share:
        """Set `share` to this process's rows of batch number `step` of an epoch, and return it."""
        self.share = self._group.share(self._batch_sizes[step])
        return self.share

    def wrap(self, model: nn.Module, module: nn.Module, images: Tensor) -> nn.Module:
        """Return the model wrapped by DistributedDataParallel; built once per set of parameters.

        Args:
            model: what to call in the forward pass: `module`, or `module` compiled.
            module: the model itself.
            images: a few of them are used to find out which parameters get a gradient.
        """
        if self._wrapped is None:
            find_unused = _has_unused_parameters(module, images[:2])
            # Whether each forward pass copies rank 0's buffers; torch 2.15 has renamed the option.
            options = inspect.signature(DistributedDataParallel).parameters
            new, old = "forward_sync_buffers", "broadcast_buffers"
            sync_buffers: dict[str, Any] = {new if new in options else old: False}
            self._wrapped = DistributedDataParallel(
                model,
                gradient_as_bucket_view=True,
                find_unused_parameters=find_unused,
                **sync_buffers,  # `reduce` averages them
            )
        return self._wrapped

    def unwrap(self) -> None:
        """Wrap the model again before the next step: parameters were frozen or unfrozen.

        DistributedDataParallel waits for the gradient of each parameter that required one when it
        was built.
        """
        self._wrapped = None

    @contextlib.contextmanager
    def gradient_sync(self, is_last: bool) -> Iterator[None]:
        """Context of a micro-batch; gradients are averaged in the backward pass of the last one.

        The number of micro-batches may differ between processes.
        """
        assert self._wrapped is not None
        with contextlib.ExitStack() as stack:
            if not is_last:
                stack.enter_context(self._wrapped.no_sync())
            yield

    @torch.no_grad()
    def reduce(self, module: nn.Module, loss: Tensor, num_correct: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the numbers of a step over the processes, in one all-reduce on the device.

        Args:
            module: the running statistics of its batch norms become the average over the
                processes, weighted by rows.
            loss, num_correct: mean loss of this process's rows times `share.weight`, and its
                correct predictions.

        Returns:
            Mean loss and number of correct predictions of the whole batch.
        """
        weight = self.share.weight
        statistics = list(_running_statistics(module))
        # Filled on the device: a copy from the host would make a GPU wait.
        stop_vote = torch.full_like(loss, float(self._group.stop_requested()))
        numbers = torch.stack([loss, num_correct * float(weight > 0), stop_vote])
        flat = torch.cat([numbers, *(weight * tensor.flatten() for tensor in statistics)])
        self._group.all_reduce_(flat)
        parts = flat.split([3, *(tensor.numel() for tensor in statistics)])
        for tensor, part in zip(statistics, parts[1:], strict=True):
            tensor.copy_(part.view_as(tensor))
        loss, num_correct, stop_votes = parts[0].unbind()
        self._group.record_stop_votes(stop_votes)
        return loss, num_correct.long()


def _has_unused_parameters(module: nn.Module, images: Tensor) -> bool:
    """Return whether some trainable parameter gets no gradient, e.g. those of an auxiliary head.

    DistributedDataParallel must then look for them in each step, which is slower.
    """
    modes = [(m, m.training) for m in module.modules()]
    module.eval()  # uses no random numbers and changes no statistics
    try:
        # Not under autocast; cached outputs of a frozen backbone may have half precision.
        module(images.float()).sum().backward()
        return any(p.requires_grad and p.grad is None for p in module.parameters())
    finally:
        module.zero_grad(set_to_none=True)
        for submodule, training in modes:
            submodule.training = training


def _running_statistics(module: nn.Module) -> Iterator[Tensor]:
    """Running statistics that a forward pass changes, i.e. those of norms in training mode."""
    for norm in module.modules():
        if isinstance(norm, _NormBase) and norm.training and norm.track_running_stats:
            for tensor in (norm.running_mean, norm.running_var):
                if tensor is not None:
                    yield tensor


def convert_sync_batchnorm(model: nn.Module, process_group: ProcessGroup, device: str) -> nn.Module:
    """Replace batch norms by `torch.nn.SyncBatchNorm`, which computes statistics of whole batches.

    Raises:
        UsageError: on a CPU, for which torch has no SyncBatchNorm.
    """
    if process_group.size == 1:
        return model
    if not device.startswith("cuda"):
        raise UsageError(
            f"train.sync_batch_norm=true: torch's SyncBatchNorm needs GPUs, not {device!r}",
            fix="use train.sync_batch_norm=false (each process normalizes its own rows), or one "
            "process",
        )
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


@dataclass(frozen=True)
class SplitSlice:
    """Images `start` to `stop` of a split, as a split of their own."""

    split: Labelled
    start: int
    stop: int

    @property
    def rows(self) -> SplitSlice:
        return self

    @property
    def labels(self) -> Tensor:
        return self.split.labels[self.start : self.stop]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.stop - self.start, *self.split.rows.shape[1:])

    def gather(self, index: Tensor) -> Tensor:
        return self.split.rows.gather(index + self.start)

    def in_memory_tensor(self) -> Tensor | None:
        images = self.split.rows.in_memory_tensor()
        return None if images is None else images[self.start : self.stop]


def distributed_map(
    process_group: ProcessGroup,
    split: Labelled,
    compute: Callable[[Labelled], Sequence[Tensor | None]],
) -> tuple[Tensor | None, ...]:
    """Apply `compute` to a split, each image in exactly one process; all get the full result.

    Nothing is padded. The result is that of one process up to the last digits, which depend on
    the number of images computed at once.

    Args:
        compute: a split to tensors with one row per image; None for a tensor that is not computed.
    """
    if process_group.size == 1:
        return tuple(compute(split))
    counts = rows_per_rank(int(split.labels.numel()), process_group.size)
    rank = process_group.rank
    start = sum(counts[:rank])
    local = list(compute(SplitSlice(split, start, start + counts[rank]))) if counts[rank] else []
    # Rank 0 always has images.
    computed = process_group.broadcast(lambda: [part is not None for part in local])
    device = split.labels.device if not local or local[0] is None else local[0].device
    parts = local or [None] * len(computed)
    return tuple(
        process_group.all_gather(part, counts).to(device) if is_computed else None
        for part, is_computed in zip(parts, computed, strict=True)
    )


def rows_per_rank(images: int, size: int) -> list[int]:
    """Return the number of images of each process: chunks of `EVAL_CHUNK`, as even as possible."""
    num_chunks = -(-images // EVAL_CHUNK)
    per_rank, extra = divmod(num_chunks, size)  # the first `extra` ranks get one chunk more
    ends = [
        min(images, EVAL_CHUNK * (per_rank * (rank + 1) + min(rank + 1, extra)))
        for rank in range(size)
    ]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
