"""The only forward pass of evaluate, predict and every measurement on a trained network.

Always float32 and always in eval mode, whatever the training used: a number must not depend on
who asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from convlens import metrics
from convlens.data.batches import Labelled, Prepare, Rows
from convlens.device import Plan, choose
from convlens.views import Views, averaged

# Eval mode has no batch statistics, so the size of a batch changes nothing but speed.
BATCH = 256


def placed(model: nn.Module, on: str | None) -> Plan:
    """Moves `model` to the device asked for (by default the best); returns the plan it runs by."""
    plan = Plan(choose(on), "fp32", "contiguous")
    plan.place(model)
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
    # Module by module: parts that were frozen in eval mode must stay so.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def split_logits(
    model: nn.Module, split: Labelled, normalise: Prepare, plan: Plan,
    *, advance: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logits float32 `[N, classes]` and labels int64 `[N]` of a split, both on the device.

    Each image counts exactly once; nothing is dropped or padded. `advance(n)` is told of
    progress.
    """
    answers, labels = split_answers(model, split, normalise, plan, None, advance=advance)
    return answers.plain, labels


def split_answers(
    model: nn.Module, split: Labelled, normalise: Prepare, plan: Plan, views: Views | None,
    *, advance: Callable[[int], None] = lambda count: None,
) -> tuple[Answers, Tensor]:  # fmt: skip
    """As `split_logits`, with the mean over `views`: one loop, batch by batch, for both."""
    plain, tta = [], []
    for images in _batches(split.rows):
        answers = batch_answers(model, images, normalise, plan, views)
        plain.append(answers.plain)
        if answers.tta is not None:
            tta.append(answers.tta)
        advance(len(images))
    mean = torch.cat(tta) if tta else None
    return Answers(torch.cat(plain), mean), split.labels.to(plan.device)


def _batches(rows: Rows) -> Iterator[Tensor]:
    whole = rows.resident()
    for index in torch.arange(rows.shape[0]).split(BATCH):
        yield rows.gather(index) if whole is None else whole[index[0] : index[-1] + 1]


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
