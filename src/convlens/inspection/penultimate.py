"""The features that a network's last layer tells classes by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convlens.errors import ModelFileError, UsageError
from convlens.inspection.subjects import Subject
from convlens.models import parts


class Seen(NamedTuple):
    """Features float32 `[B, D]` before the last layer, and logits `[B, K]`, on the CPU."""

    features: Tensor
    logits: Tensor


def penultimate(subject: Subject, batches: Iterable[Tensor]) -> Iterator[Seen]:
    """What goes into the head for each batch of uint8 images; maps are averaged over positions.

    Raises:
        UsageError: a network whose head isn't known; ModelFileError: features that are NaN.
    """
    model, name = subject.model, parts(subject.model).head
    if not name:
        raise UsageError(f"{subject.name}: its last layer isn't known", fix="look at another one")
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        value = inputs[0].float()
        kept[:] = [value.mean((2, 3)) if value.ndim == 4 else value.flatten(1)]

    handle = model.get_submodule(name).register_forward_pre_hook(keep)
    try:
        for images in batches:
            with torch.inference_mode():
                logits = model(subject.prepared(images)).float().cpu()
            features = kept[0].cpu()
            if not torch.isfinite(features).all():
                raise ModelFileError(
                    f"{subject.name}: the features before {name} are NaN or infinite",
                    fix="its training diverged: look at a run that didn't",
                )
            yield Seen(features, logits)
    finally:
        handle.remove()
