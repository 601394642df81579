"""The training loop. `step` is the dozen lines everyone comes to read.

`fit` is a generator of `Step` and `Epoch` records: whoever reads it decides to log, validate,
save or stop (by not asking for the next record), so there are no callbacks. No disk, no
printing and no recipe in here. What is yielded stays on the device; reading a number off it
waits for the device, so the reader decides how often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from convlens import optim
from convlens.device import Plan, seed_generators, seed_of
from convlens.models.freezing import set_train_mode
from convlens.stepping.graphs import Captured
from convlens.stepping.guarding import (
    Guard,
    LookBack,
    NonFiniteLoss as NonFiniteLoss,  # part of what `fit` promises
    Spoilt,
    Waiting,
)
from convlens.stepping.memory import OutOfMemory, catch_oom, next_micro_batch_size
from convlens.stepping.scaling import LossScale
from convlens.stepping.together import Together
from convlens.system.later import AsyncScalars

Objective = Callable[[Tensor, Tensor], Tensor]
Records = Iterator["Step | Epoch"]
Take = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor]]
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
KNOWN = ("torch.", "convlens.")  # whose modules draw nothing unless they are among `DROPOUTS`


class EpochBatches(Protocol):
    """What `fit` trains on: `data.batches.Batches`, or a list-like of batches in a test."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass
class Position:
    """Where in a training a network is: what `fit` starts from and keeps up to date.

    `epoch` is the one being trained (from 1), `step` how many of its steps are done; the rest
    are this epoch's sums so far. `part` is how many images are computed at once since memory ran
    out; 0: as planned. `seconds`, `cpu_seconds` and `data_seconds` (those spent waiting for
    batches) are for whoever times the epoch; `fit` doesn't.
    """

    epoch: int = 1
    step: int = 0
    images: int = 0
    loss_sum: float | Tensor = 0.0
    correct: int | Tensor = 0
    part: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    data_seconds: float = 0.0

    def advance(self, images: int, loss: Tensor, correct: Tensor) -> None:
        """Takes in a step. New tensors each time: a guard may hold on to older ones.

        On a CPU they are numbers, whose sums are exact to more digits and cost nothing.
        """
        self.step, self.images = self.step + 1, self.images + images
        if loss.device.type == "cpu":
            self.loss_sum, self.correct = (
                self.loss_sum + loss.item() * images,
                self.correct + int(correct.item()),
            )
            return
        self.loss_sum, self.correct = self.loss_sum + loss * images, self.correct + correct

    def turn(self, lr: float) -> Epoch:
        """The record of the epoch that is at its end; goes on to the next one's beginning."""
        loss, accuracy = self.loss_sum / self.images, self.correct / self.images
        record = Epoch(self.epoch, self.images, loss, accuracy, lr)
        self.epoch, self.step, self.images = self.epoch + 1, 0, 0
        self.loss_sum, self.correct = 0.0, 0
        return record


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

    def numbers(self) -> AsyncScalars:
        """Loss and number of right answers, to be read when they have arrived."""
        return AsyncScalars(self.loss, self.correct)


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images; `loss` and `accuracy` as seen while training."""

    epoch: int
    images: int
    loss: float | Tensor
    accuracy: float | Tensor
    lr: float


def step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    objective: Objective,
    optimiser: torch.optim.Optimizer,
    plan: Plan,
    clip: Callable[[], None] = lambda: None,
    lets: Callable[[Tensor], bool] = lambda loss: True,
    backward: Callable[[Tensor], None] = Tensor.backward,
    together: Together | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Forward, backward, update; returns loss and number of right answers, on the device.

    Of labels that are probabilities `[B, K]` (mixed images) the likeliest class is the right one.
    A loss that `lets` refuses returns None, before anything was updated with it. Where the plan
    computes a batch in parts, or other processes (`together`) have rows of it, too, gradients add
    up to those of the whole.

    Raises:
        OutOfMemory: no memory for a part; weights are as they were, gradients and norms aren't.
    """
    weight = 1.0 if together is None else together.share.weight
    losses, rights = list[Tensor](), list[Tensor]()
    for few, answers in plan.parts(images, labels):
        with catch_oom(len(few)):  # or `OutOfMemory` is raised
            with plan.autocast():
                logits = model(few)
            # Half precision is for the network; a loss in it would be rounded to three digits.
            loss: Tensor = objective(logits.float(), answers)
            share = weight * len(few) / len(images)
            loss = loss if share == 1 else loss * share
            backward(loss)
            truths = answers.argmax(1) if answers.ndim == 2 else answers
            losses.append(loss.detach())
            rights.append((logits.detach().argmax(1) == truths).sum())
    loss, right = _sum(losses), _sum(rights)
    if together is not None:
        loss, right = together.sum(loss, right)
    if not lets(loss):
        optimiser.zero_grad(set_to_none=True)
        return None, right
    clip()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss, right


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def fit(
    model: nn.Module, batches: EpochBatches, optimiser: torch.optim.Optimizer,
    schedule: optim.Schedule, *, epochs: int, objective: Objective, plan: Plan, seed: int,
    position: Position | None = None,
    clip_value: float | None = None, clip_norm: float | None = None,
    averager: optim.Average | None = None, scale: LossScale | None = None,
    waits: bool | None = None, together: Together | None = None,
) -> Records:  # fmt: skip
    """Trains `model` in place and yields a record after each step and each epoch.

    Args:
        batches: `len` is steps per epoch; `epoch(n)` gives the n-th epoch's batches.
        optimiser: made by `optim.build`: its groups know their rates, and when they train.
        schedule: factor on the learning rate by progress, 0 at the first step.
        objective: `(logits, labels) -> mean loss`; `scale` is of that, where the plan is fp16.
        position: where to go on; it is advanced with every step, so that whoever holds it can
            save it with the weights and continue as if nothing had happened.
        clip_value, clip_norm: bound on each gradient, on the norm of all of them.
        waits: reads each loss before the update with it; by default unless on CUDA (`guarding`).
        together: the other processes, if there are any; `batches` are this one's rows.

    Raises:
        NonFiniteLoss: the weights are those from before that step, and so is all else.
        ResourceError: there is no memory even for the smallest part of a batch.
    """
    at, steps = position or Position(), len(batches)
    clip = clipper(model, clip_value, clip_norm)
    draws = any(_may_draw(module) for module in model.modules())
    timetable = optim.Timetable(optimiser, schedule, epochs * steps)
    taking = partial(_taking, model, objective, optimiser, plan, clip, averager, scale, together)
    waits = not plan.device.startswith("cuda") if waits is None else waits
    guard, take = taking(at.part, waits)

    def set_rate(index: int) -> float:
        done = (at.epoch - 1) * steps + index
        if timetable.turn(done):  # a group was frozen or unfrozen
            set_train_mode(model)
            take.forget() if isinstance(take, Captured) else None
        return timetable.set_rates(done)

    while at.epoch <= epochs:
        lr = set_rate(max(at.step - 1, 0))  # should no step of this epoch be left
        set_train_mode(model)
        try:
            for index, (images, labels) in enumerate(batches.epoch(at.epoch, at.step), at.step):
                lr = set_rate(index)
                if draws:  # what is dropped depends on (seed, epoch, step) only
                    seed_generators(plan.device, seed_of(seed, at.epoch, index, 1))
                guard.before(at)
                count = len(labels) if together is None else together.begin(index)
                loss, correct = take(images, labels)
                if loss is None:
                    guard.back(at)
                    raise NonFiniteLoss(at.epoch, index + 1, lr)
                averager.update() if averager is not None else None
                at.advance(count, loss, correct)
                yield Step(at.epoch, at.step, steps, count, loss, correct, lr)
            guard.end(at)
            yield at.turn(lr)
        except Spoilt:  # some loss was none: from the last good state on, wait for each
            guard.back(at)
            waits = True
            guard, take = taking(at.part, waits)
        except OutOfMemory as failed:  # from before the step on (or the last good state), in parts
            optimiser.zero_grad(set_to_none=True)
            guard.back(at)
            at.part = next_micro_batch_size(
                model, failed, at.part or plan.part, distributed=together is not None
            )
            guard, take = taking(at.part, waits)


def _taking(
    model: nn.Module, objective: Objective, optimiser: torch.optim.Optimizer, plan: Plan,
    clip: Callable[[], None], averager: optim.Average | None, scale: LossScale | None,
    together: Together | None, part: int, waits: bool,
) -> tuple[Guard, Take]:  # fmt: skip
    """A guard, and `step` with all but a batch filled in: recorded if the plan says so."""
    plan = replace(plan, part=part or plan.part)
    guard = Waiting(model) if waits else LookBack(model, optimiser, averager, scale)
    backward: Callable[[Tensor], None] = Tensor.backward
    if scale is not None:
        backward, clip = scale.backward, partial(scale.unscale, clip)
    take = partial(
        step, model, objective=objective, optimiser=optimiser, plan=plan, clip=clip,
        lets=guard.lets, backward=backward, together=together,
    )  # fmt: skip
    if plan.step == "graph" and not waits:  # for a number, which a graph can't
        return guard, Captured(take, optimiser)
    return guard, take


def _may_draw(module: nn.Module) -> bool:
    """Whether its training may depend on chance: other libraries drop layers, or by functions."""
    return isinstance(module, DROPOUTS) or not type(module).__module__.startswith(KNOWN)


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
