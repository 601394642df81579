"""One training step of several processes, so that it is the step of one with the whole batch.

Each process takes its rows of the batch (`ProcessGroup.share`). Losses are weighted by the rows'
share of the batch, so that gradients add up to those of the mean over all rows, however it divides.
After `sum` every process has the same bits: gradients, running statistics, loss, right answers.
So whatever is decided, averaged, clipped or saved afterwards needs no more words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from convlens.data.batches import Labelled
from convlens.distributed.processes import ProcessGroup
from convlens.errors import UsageError

BATCH = 256  # images of a split are dealt out in such pieces
# What zeroes values or whole channels: the same function with a mask for the whole batch.
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Together:
    """What the engine needs to take a step with others.

    Args:
        model: what is trained. Its dropouts from now on draw masks for the whole batch and use
            their rows.
        sizes: images in each batch of an epoch, of all processes together.
    """

    def __init__(self, model: nn.Module, world: ProcessGroup, sizes: Sequence[int]) -> None:
        self._model, self._world, self._sizes = model, world, sizes
        self._flat = torch.empty(0)
        self.share = world.share(max(sizes))
        for module in model.modules():
            if isinstance(module, DROPOUTS):
                module.forward = functools.partial(self._dropped, module)  # type: ignore[method-assign]

    def begin(self, step: int) -> int:
        """Before step number `step` of an epoch; returns the images in its batch."""
        self.share = self._world.share(self._sizes[step])
        return self.share.total

    @torch.no_grad()
    def sum(self, loss: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """After the backward pass: all that was found, summed.

        Args:
            loss, right: this process's mean loss times `share.weight`, its right answers.

        Returns:
            Mean loss and right answers of the whole batch. Gradients and the running statistics
            of norms, in place, are the whole batch's, too: statistics as the mean over the
            processes, by their rows.
        """
        weight = self.share.weight
        learning = [p for p in self._model.parameters() if p.grad is not None]
        moving = list(_running_statistics(self._model))
        # Filled, not copied from the host: a GPU would have to be waited for.
        asks = torch.full_like(loss, float(self._world.stop_requested()))
        numbers = torch.stack([loss, right * float(weight > 0), asks])
        views = self._views([*learning, *moving, numbers])
        owned = [p.grad for p in learning if p.grad is not None]
        weighted = torch._foreach_mul(moving, weight) if moving else ()
        torch._foreach_copy_(views, [*owned, *weighted, numbers])
        self._world.all_reduce_(self._flat)
        for parameter, view in zip(learning, views, strict=False):
            parameter.grad = view
        if moving:
            torch._foreach_copy_(moving, views[len(learning) : -1])
        loss, right, asked = views[-1].clone().unbind()
        self._world.record_stop_votes(asked)
        return loss, right.long()

    def _views(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Parts of one flat tensor that lie in it as `like` lie in memory."""
        total = sum(tensor.numel() for tensor in like)
        if self._flat.numel() != total or self._flat.device != like[0].device:
            self._flat = torch.empty(total, device=like[0].device)
        views, done = [], 0
        for tensor in like:
            views.append(self._flat.as_strided(tensor.shape, tensor.stride(), done))
            done += tensor.numel()
        return views

    def _dropped(self, module: nn.Module, values: Tensor) -> Tensor:
        """Dropout whose mask is the own rows of one that is drawn for the whole batch.

        A dropout of ones is a mask. They are laid out as the whole batch's values would be, so
        that one process draws the same.
        """
        plain: Callable[[Tensor], Tensor] = functools.partial(type(module).forward, module)
        if not module.training or len(values) != self.share.stop - self.share.start:
            return plain(values)
        ends = values.shape[1:]
        if not isinstance(module, nn.Dropout):
            ends = torch.Size([ends[0], *(1 for _ in ends[1:])])  # whole channels
        layout = torch.contiguous_format
        if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        whole = torch.empty(
            (self.share.total, *ends), dtype=values.dtype, device=values.device,
            memory_format=layout,
        )  # fmt: skip
        with torch.no_grad():
            mask = plain(whole.fill_(1))
        return values * mask[self.share.rows]


def _running_statistics(model: nn.Module) -> Iterator[Tensor]:
    """Those that a forward pass moves: norms in eval mode keep theirs, bit by bit."""
    for module in model.modules():
        if isinstance(module, _NormBase) and module.training and module.track_running_stats:
            for tensor in (module.running_mean, module.running_var):
                if tensor is not None:
                    yield tensor


def synchronised(model: nn.Module, world: ProcessGroup, device: str) -> nn.Module:
    """The network with norms over the whole batch, not over each process's rows.

    Raises:
        UsageError: on a CPU, where torch has no such norm.
    """
    if world.size == 1:
        return model
    if not device.startswith("cuda"):
        raise UsageError(
            f"train.sync_batch_norm=true: torch's SyncBatchNorm needs GPUs, this is {device!r}",
            fix="train.sync_batch_norm=false norms each process's own rows; or use one process",
        )
    synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return synced


@dataclass(frozen=True)
class Part:
    """Images `start` to `stop` of a split, as a split of their own."""

    split: Labelled
    start: int
    stop: int

    @property
    def rows(self) -> Part:
        return self

    @property
    def labels(self) -> Tensor:
        return self.split.labels[self.start : self.stop]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.stop - self.start, *self.split.rows.shape[1:])

    def gather(self, index: Tensor) -> Tensor:
        return self.split.rows.gather(index + self.start)

    def resident(self) -> Tensor | None:
        whole = self.split.rows.resident()
        return None if whole is None else whole[self.start : self.stop]


Asked = Callable[[Labelled], Sequence[Tensor | None]]


def answered(world: ProcessGroup, split: Labelled, ask: Asked) -> tuple[Tensor | None, ...]:
    """What `ask` gives for the images of a split, each asked about by exactly one process.

    Nothing is padded; the answers are those of one process but for the last digits, which depend
    on how many images are computed at once.

    Args:
        ask: a split to tensors with a row for each image, or None where there is none.
    """
    if world.size == 1:
        return tuple(ask(split))
    counts = _counts(int(split.labels.numel()), world.size)
    start = sum(counts[: world.rank])
    own = list(ask(Part(split, start, start + counts[world.rank]))) if counts[world.rank] else []
    # Rank 0 always has images.
    there = world.broadcast(lambda: [part is not None for part in own])
    device = split.labels.device if not own or own[0] is None else own[0].device
    parts = own or [None] * len(there)
    return tuple(
        world.all_gather(part, counts).to(device) if given else None
        for part, given in zip(parts, there, strict=True)
    )


def _counts(images: int, size: int) -> list[int]:
    """Images of each process: whole batches, as even as they are."""
    batches = -(-images // BATCH)
    each, more = divmod(batches, size)
    ends = [min(images, BATCH * (each * (r + 1) + min(r + 1, more))) for r in range(size)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
