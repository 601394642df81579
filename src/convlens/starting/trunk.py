"""The frozen beginning of a network, computed once instead of in every epoch.

Where the first layers don't learn, they give the same numbers for the same image in every epoch.
`compute` runs them once over a split and keeps what they give; `tail` is the rest of the network,
which then trains on that. The weights of both are the network's own, so that whoever holds the
network sees it learn. An epoch then costs no more than the part that learns.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlens.data.batches import Batches
from convlens.device import Plan

CHUNK = 256
Images = Iterable[Tensor]


@dataclass(frozen=True)
class Features:
    """What the trunk gives for a split: `[N, ...]` on the device. Takes the place of its images."""

    values: Tensor
    labels: Tensor

    @property
    def rows(self) -> Features:
        return self

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, c, h, w = (*self.values.shape, 1, 1)[:4]  # behind the last pooling there are no maps
        return n, c, h, w

    def gather(self, index: Tensor) -> Tensor:
        return self.values.index_select(0, index.to(self.values.device))

    def resident(self) -> Tensor:
        return self.values


class ViewBatches:
    """Epoch after epoch the next of several fixed views of the same images, then the first again.

    Args:
        views: batches of the same images in the same order of the same sizes.
    """

    def __init__(self, views: Sequence[Batches]) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views[0])

    @property
    def sizes(self) -> list[int]:
        return self.views[0].sizes

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from number `start` on; epochs count from 1."""
        return self.views[(epoch - 1) % len(self.views)].epoch(epoch, start)

    def numbers(self, epoch: int, step: int) -> list[int]:
        """As `Batches.numbers`."""
        return self.views[0].numbers(epoch, step)


def tail(model: nn.Module, prefix: Sequence[str]) -> nn.Module:
    """The network without its trunk, sharing every weight and statistic with `model`."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    rest = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name in prefix:
        rest.set_submodule(name, nn.Identity())
    return rest


def fits_together(model: nn.Module, prefix: Sequence[str], images: Tensor) -> bool:
    """Whether trunk and tail in a row are the network: not so where it skips from one to the other.

    Tried on normalised `images` `[B, C, H, W]` in eval mode.
    """
    with torch.no_grad():
        whole = model.eval()(images)
        reached = _reached(model, prefix[-1], images)
        try:
            parts = tail(model, prefix).eval()(reached)
        except Exception:
            return False
    return whole.shape == parts.shape and torch.allclose(whole, parts, rtol=1e-3, atol=1e-4)


def compute(
    model: nn.Module,
    prefix: Sequence[str],
    batches: Images,
    labels: Tensor,
    plan: Plan,
    advance: Callable[[int], None] = lambda count: None,
) -> Features:
    """The trunk's activations for normalised images, batch by batch, in the plan's precision.

    Args:
        batches: float32 `[B, C, H, W]` on the device, all images of the split in order.
        labels: int64 `[N]`.
        advance: is told how many images are done.
    """
    kept: Tensor | None = None
    done = 0
    for images in batches:
        with torch.no_grad(), plan.autocast():
            values = _reached(model, prefix[-1], images)
        if kept is None:
            kept = values.new_empty((len(labels), *values.shape[1:]))
        kept[done : done + len(values)] = values
        done += len(values)
        advance(len(values))
    assert kept is not None
    return Features(kept, labels.to(plan.device))


def image_bytes(model: nn.Module, prefix: Sequence[str], images: Tensor, plan: Plan) -> int:
    """Bytes that the activations of one image take; tried on `images`, normalised."""
    with torch.no_grad(), plan.autocast():
        values = _reached(model, prefix[-1], images)
    return values[0].numel() * values.element_size()


def as_they_are(features: Tensor, plan: Plan) -> Tensor:
    """Takes the place of `Normalise`: activations need none, only the plan's memory format.

    Always a copy: a network may begin with an in-place operation, and these are used again.
    """
    return features.clone(
        memory_format=plan.torch_memory_format if features.ndim == 4 else torch.preserve_format
    )


class _Reached(Exception):  # noqa: N818 (control flow, no error)
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values


def _reached(model: nn.Module, last: str, images: Tensor) -> Tensor:
    """What the module `last` gives for `images` in eval mode; nothing behind it is computed."""

    def stop(module: nn.Module, inputs: object, output: Tensor) -> None:
        raise _Reached(output)

    hook = model.get_submodule(last).register_forward_hook(stop)
    model.eval()
    try:
        model(images)
    except _Reached as reached:
        return reached.values
    finally:
        hook.remove()
    raise RuntimeError(f"{last} takes no part in the forward pass")
