"""The only forward pass of evaluate, predict and every measurement on a trained network.

Always float32 and always in eval mode, whatever the training used: a number must not depend on
who asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from convlens.data.batches import Labelled, Prepare, Rows
from convlens.device import Plan, choose

# Eval mode has no batch statistics, so the size of a batch changes nothing but speed.
BATCH = 256


def placed(model: nn.Module, on: str | None) -> Plan:
    """Moves `model` to the device asked for (by default the best); returns the plan it runs by."""
    plan = Plan(choose(on), "fp32", "contiguous")
    plan.place(model)
    return plan


@torch.inference_mode()
def batch_logits(model: nn.Module, images: Tensor, normalise: Prepare, plan: Plan) -> Tensor:
    """Logits float32 `[B, classes]` on the device for uint8 images `[B, C, H, W]`."""
    # Module by module: parts that were frozen in eval mode must stay so.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        logits: Tensor = model(normalise(images.to(plan.device), plan))
        return logits.float()
    finally:
        for module, training in modes:
            module.training = training


def split_logits(
    model: nn.Module,
    split: Labelled,
    normalise: Prepare,
    plan: Plan,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, Tensor]:
    """Logits float32 `[N, classes]` and labels int64 `[N]` of a split, both on the device.

    Each image counts exactly once; nothing is dropped or padded. `advance(n)` is told of
    progress.
    """
    parts = []
    for images in _batches(split.rows):
        parts.append(batch_logits(model, images, normalise, plan))
        advance(len(images))
    return torch.cat(parts), split.labels.to(plan.device)


def _batches(rows: Rows) -> Iterator[Tensor]:
    whole = rows.resident()
    for index in torch.arange(rows.shape[0]).split(BATCH):
        yield rows.gather(index) if whole is None else whole[index[0] : index[-1] + 1]


@torch.inference_mode()
def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross entropy (nats, without smoothing) and accuracy; what validation goes by."""
    loss = nn.functional.cross_entropy(logits, labels)
    return float(loss), float((logits.argmax(1) == labels).float().mean())


def probabilities(logits: Tensor) -> np.ndarray:
    """Softmax of logits `[N, K]` as float64 numpy, rows adding up to 1."""
    result: np.ndarray = logits.double().softmax(1).cpu().numpy()
    return result
