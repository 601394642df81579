"""The training loop. `step` is the dozen lines everyone comes to read.

`fit` is a generator of `Step` and `Epoch` records: whoever reads it decides to log, validate,
save or stop (by not asking for the next record), so there are no callbacks. No disk, no
printing and no recipe in here. What is yielded stays on the device; reading a number off it
waits for the device, so the reader decides how often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from convlens import optim
from convlens.device import Plan, seed_generators, seed_of
from convlens.errors import Stopped
from convlens.models.freezing import set_train_mode
from convlens.together import Together

Objective = Callable[[Tensor, Tensor], Tensor]
Records = Iterator["Step | Epoch"]
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class EpochBatches(Protocol):
    """What `fit` trains on: `data.batches.Batches`, or a list-like of batches in a test."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass
class Position:
    """Where in a training a network is: what `fit` starts from and keeps up to date.

    `epoch` is the one being trained (from 1), `step` how many of its steps are done; the rest
    are this epoch's sums so far. `seconds`, `cpu_seconds` and `data_seconds` (those spent waiting
    for batches) are for whoever times the epoch; `fit` doesn't.
    """

    epoch: int = 1
    step: int = 0
    images: int = 0
    loss_sum: float | Tensor = 0.0
    correct: int | Tensor = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    data_seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """One optimiser step. `loss` (mean over the batch) and `correct` are tensors on the device."""

    epoch: int
    step: int
    steps: int
    images: int
    loss: Tensor
    correct: Tensor
    lr: float


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images; `loss` and `accuracy` as seen while training."""

    epoch: int
    images: int
    loss: float | Tensor
    accuracy: float | Tensor
    lr: float


class NonFiniteLoss(Stopped):
    """The loss became NaN or infinite; raised before the weights were updated with it."""

    def __init__(self, epoch: int, step: int, lr: float) -> None:
        self.epoch, self.step, self.lr = epoch, step, lr
        super().__init__(
            f"the loss became NaN or infinite in epoch {epoch}, step {step}; training stopped "
            "before the weights were updated with it",
            fix=f"lower optim.lr (it was {lr:.3g}) or set optim.clip_norm=1",
        )


def step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    objective: Objective,
    optimiser: torch.optim.Optimizer,
    plan: Plan,
    clip: Callable[[], None],
    together: Together | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Forward, backward, update; returns loss and number of right answers, on the device.

    Of labels that are probabilities `[B, K]` (mixed images) the likeliest class is the right one.
    A loss that isn't finite returns None, before anything was updated with it. Where the plan
    computes a batch in parts, their gradients add up to those of the whole. With other processes
    (`together`) these are this one's rows of a batch, and the step is that of the whole.
    """
    sums: list[tuple[Tensor, Tensor]] = []
    for few, answers in plan.parts(images, labels):
        with plan.autocast():
            logits = model(few)
        # Half precision is for the network; a loss in it would be rounded to three digits.
        loss: Tensor = objective(logits.float(), answers)
        if len(few) < len(images):
            loss = loss * (len(few) / len(images))
        truths = answers.argmax(1) if answers.ndim == 2 else answers
        sums.append((loss.detach(), (logits.detach().argmax(1) == truths).sum()))
        (loss if together is None else loss * together.share.weight).backward()
    loss, right = sums[0] if len(sums) == 1 else _summed(sums)
    if together is not None:
        loss, right = together.sum(loss, right)
    if not math.isfinite(loss.item()):  # a tenth of `torch.isfinite`'s time on the CPU
        optimiser.zero_grad(set_to_none=True)
        return None, right
    clip()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss, right


def _summed(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    losses, rights = zip(*parts, strict=True)
    return torch.stack(losses).sum(), torch.stack(rights).sum()


def fit(
    model: nn.Module,
    batches: EpochBatches,
    optimiser: torch.optim.Optimizer,
    schedule: optim.Schedule,
    *,
    epochs: int,
    objective: Objective,
    plan: Plan,
    seed: int,
    position: Position | None = None,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    averager: optim.Average | None = None,
    together: Together | None = None,
) -> Records:
    """Trains `model` in place and yields a record after each step and each epoch.

    Args:
        batches: `len` is steps per epoch; `epoch(n)` gives the n-th epoch's batches.
        optimiser: made by `optim.build`: its groups know their rates, and when they train.
        schedule: factor on the learning rate by progress, 0 at the first step.
        objective: `(logits, labels) -> mean loss`.
        position: where to go on; it is advanced with every step, so that whoever holds it can
            save it with the weights and continue as if nothing had happened.
        clip_value, clip_norm: bound on each gradient, on the norm of all of them.
        together: the other processes, if there are any; `batches` are this one's rows.

    Raises:
        NonFiniteLoss: before the update with it; the weights are the last good ones.
    """
    at = position if position is not None else Position()
    steps = len(batches)
    clip = clipper(model, clip_value, clip_norm)
    statistics = _Statistics(model)
    draws = any(isinstance(module, DROPOUTS) for module in model.modules())
    timetable = optim.Timetable(optimiser, schedule, epochs * steps)

    def set_rate(index: int) -> float:
        done = (at.epoch - 1) * steps + index
        if timetable.turn(done):  # a group was frozen or unfrozen
            set_train_mode(model)
        return timetable.set_rates(done)

    while at.epoch <= epochs:
        # Taken up after an epoch's last step, there is no other step to take the rate from.
        lr = set_rate(max(at.step - 1, 0))
        set_train_mode(model)
        for index, (images, labels) in enumerate(batches.epoch(at.epoch, at.step), at.step):
            lr = set_rate(index)
            if draws:  # dropout's masks depend on (seed, epoch, step) only
                seed_generators(plan.device, seed_of(seed, at.epoch, index, 1))
            statistics.keep()
            count = len(labels) if together is None else together.begin(index)
            loss, correct = step(model, images, labels, objective, optimiser, plan, clip, together)
            if loss is None:
                statistics.put_back()
                raise NonFiniteLoss(at.epoch, index + 1, lr)
            if averager is not None:
                averager.update()
            at.step, at.images = index + 1, at.images + count
            at.loss_sum += loss * count
            at.correct += correct
            yield Step(at.epoch, at.step, steps, count, loss, correct, lr)
        count = at.images
        record = Epoch(at.epoch, count, at.loss_sum / count, at.correct / count, lr)
        at.epoch, at.step, at.images, at.loss_sum, at.correct = at.epoch + 1, 0, 0, 0.0, 0
        yield record


class _Statistics:
    """The norms' running statistics: the forward pass of a bad loss has already moved them."""

    def __init__(self, model: nn.Module) -> None:
        # They are floats and counters; one list of both would be copied one by one.
        self._floats = [b for b in model.buffers() if b.is_floating_point()]
        self._counters = [b for b in model.buffers() if not b.is_floating_point()]
        self._kept = [b.clone() for b in self._floats], [b.clone() for b in self._counters]

    def keep(self) -> None:
        _copy(self._kept[0], self._floats)
        _copy(self._kept[1], self._counters)

    def put_back(self) -> None:
        _copy(self._floats, self._kept[0])
        _copy(self._counters, self._kept[1])


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def clipper(
    model: nn.Module, clip_value: float | None, clip_norm: float | None
) -> Callable[[], None]:
    """Bounds the gradients of `model` after a backward pass; does nothing where neither is set."""
    parameters: Sequence[nn.Parameter] = list(model.parameters())  # frozen: without a gradient

    def clip() -> None:
        if clip_value is not None:
            nn.utils.clip_grad_value_(parameters, clip_value)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)

    return clip
