"""The training loop: `TrainLoop.train_step` is one optimizer step, `TrainLoop.run` a training.

`run` is a generator of `Step` and `Epoch` records. Its caller decides to log, validate, save or
stop (by not asking for the next record), so there are no callbacks. This module reads no recipe,
writes no file and prints nothing. Losses and counts stay on the device: reading a number waits
for a GPU, so the caller decides how often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from convlens import optim
from convlens.device import AsyncScalars, Plan, derive_seed, seed_generators
from convlens.engine.data_parallel import DataParallel
from convlens.engine.depthwise import depthwise_gradients
from convlens.engine.numerics import (
    BufferSnapshot,
    DeferredFiniteCheck,
    NonFiniteLoss as NonFiniteLoss,
    init_momentum,
)
from convlens.engine.oom import OutOfMemory, catch_oom, next_micro_batch_size
from convlens.models.stages import set_train_mode

Criterion = Callable[[Tensor, Tensor], Tensor]
Records = Iterator["Step | Epoch"]
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# Modules of these packages draw random numbers only if they are among `DROPOUTS`.
KNOWN_PACKAGES = ("torch.", "convlens.")


class EpochBatches(Protocol):
    """The batches that `TrainLoop.run` trains on: `data.loader.Batches`, or a list in a test."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass
class TrainState:
    """Progress of a training: where `TrainLoop.run` starts, updated after each step.

    Attributes:
        epoch: the current epoch, from 1.
        step: finished steps of this epoch.
        images, loss_sum, num_correct: sums over this epoch so far.
        micro_batch_size: images computed at once since memory ran out; 0: as planned.
        seconds, cpu_seconds, data_seconds: time spent in this epoch, and waiting for batches.
            Kept by the caller; `run` does not measure time.
    """

    epoch: int = 1
    step: int = 0
    images: int = 0
    loss_sum: float | Tensor = 0.0
    num_correct: int | Tensor = 0
    micro_batch_size: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    data_seconds: float = 0.0

    def assign(self, other: TrainState) -> None:
        """Copy every field of `other` in place, because other code refers to this object."""
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    def add_step(self, images: int, loss: Tensor, num_correct: Tensor) -> None:
        """Add the numbers of one step to the sums of the epoch."""
        self.step, self.images = self.step + 1, self.images + images
        if loss.device.type == "cpu":  # Python's float64 sums are more exact, and reading is free
            self.loss_sum += loss.item() * images
            self.num_correct += int(num_correct.item())
        else:
            self.loss_sum = self.loss_sum + loss * images
            self.num_correct = self.num_correct + num_correct

    def finish_epoch(self, lr: float) -> Epoch:
        """Return the record of the finished epoch and move to the start of the next one."""
        loss, accuracy = self.loss_sum / self.images, self.num_correct / self.images
        record = Epoch(self.epoch, self.images, loss, accuracy, lr)
        self.epoch, self.step, self.images = self.epoch + 1, 0, 0
        self.loss_sum, self.num_correct = 0.0, 0
        return record


@dataclass(frozen=True)
class Step:
    """One optimizer step. `loss` (mean over the batch) and `num_correct` are on the device."""

    epoch: int
    step: int
    steps: int
    images: int
    loss: Tensor
    num_correct: Tensor
    lr: float

    def numbers(self) -> AsyncScalars:
        """Loss and number of correct predictions, copied to the host without waiting."""
        return AsyncScalars(self.loss, self.num_correct)


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images; `loss` and `accuracy` as measured while training."""

    epoch: int
    images: int
    loss: float | Tensor
    accuracy: float | Tensor
    lr: float


@dataclass(frozen=True)
class StepResult:
    """Mean loss and number of correct predictions of a batch, on the device.

    `is_finite` is False where the loss was found to be NaN or infinite before the update: nothing
    was updated then. Where losses are checked later (`DeferredFiniteCheck`), it is always True.
    """

    loss: Tensor
    num_correct: Tensor
    is_finite: bool = True


class TrainLoop:
    """Train a model in place, step by step (`train_step`) or for many epochs (`run`).

    Args:
        model: on the plan's device. It is compiled here if the plan says so.
        optimizer: made by `optim.build_optimizer`, whose groups have initial rates and windows.
        criterion: `(logits float32 [B, K], targets) -> mean loss`.
        plan: device, precision, memory format, micro-batch size, eager or compiled.
        clip_value, clip_norm: bounds on each gradient, and on the norm of all of them.
        averager: moving average of the weights, updated after each step.
        scaler: loss scaling, for fp16.
        data_parallel: gradient averaging over several processes; `train_step` then gets the rows
            of this process.
        check_loss_synchronously: read each loss before the update with it. Default: on every
            device but CUDA, where that would make the host wait for each step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Criterion,
        plan: Plan,
        *,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        averager: optim.WeightAverage | None = None,
        scaler: torch.amp.GradScaler | None = None,
        data_parallel: DataParallel | None = None,
        check_loss_synchronously: bool | None = None,
    ) -> None:
        self.model, self.optimizer, self.criterion, self.plan = model, optimizer, criterion, plan
        self.clip_value, self.clip_norm = clip_value, clip_norm
        self.averager, self.data_parallel = averager, data_parallel
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self._compiled = compile_model(model, plan)
        self._gradients = depthwise_gradients(model, plan)
        self._parameters = list(model.parameters())
        self._buffers = BufferSnapshot(model)
        if check_loss_synchronously is None:
            check_loss_synchronously = not plan.device.startswith("cuda")
        self._deferred_check = None if check_loss_synchronously else DeferredFiniteCheck()
        if self._deferred_check is not None or self.scaler.is_enabled():
            init_momentum(optimizer)

    def train_step(self, images: Tensor, targets: Tensor) -> StepResult:
        """Forward, backward, gradient clipping, finite check and optimizer step.

        The update is that of the whole batch, also where the batch is computed in micro-batches
        or shared by several processes.

        Args:
            images: float32 `[B, C, H, W]`; of several processes, the rows of this one.
            targets: int64 `[B]`, or float32 `[B, K]` probabilities, of which the likeliest class
                counts as the correct one.

        Raises:
            OutOfMemory: no memory for a micro-batch. No weight was updated; call `undo_step`.
        """
        ddp = self.data_parallel
        rank_weight, world_size = (1.0, 1) if ddp is None else (ddp.share.weight, ddp.world_size)
        forward = self._compiled if ddp is None else ddp.wrap(self._compiled, self.model, images)
        self._buffers.save()
        self.optimizer.zero_grad(set_to_none=True)
        losses, counts = list[Tensor](), list[Tensor]()
        micro_batches = list(self.plan.micro_batches(images, targets))
        for number, (x, y) in enumerate(micro_batches, 1):
            is_last = number == len(micro_batches)
            with catch_oom(len(x)), ddp.gradient_sync(is_last) if ddp else nullcontext():
                with self.plan.autocast(), self._gradients:
                    logits = forward(x)
                # Half precision is for the network: a loss in it would have three digits.
                loss = self.criterion(logits.float(), y)
                weight = rank_weight * len(x) / len(images)
                loss = loss if weight == 1 else loss * weight
                # DistributedDataParallel averages gradients over the processes.
                self.scaler.scale(loss if world_size == 1 else loss * world_size).backward()
                losses.append(loss.detach())
                counts.append(count_correct(logits.detach(), y))
        loss, num_correct = _sum(losses), _sum(counts)
        if ddp is not None:
            loss, num_correct = ddp.reduce(self.model, loss, num_correct)
        self.scaler.unscale_(self.optimizer)
        self._clip_gradients()
        if self._deferred_check is not None:
            found_inf = self._deferred_check.update(loss)
            if not self.scaler.is_enabled():  # `scaler.step` sets its own
                # Fused optimizers skip the update on the device where this is 1.
                self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        elif not math.isfinite(loss.item()):  # ten times as fast as torch.isfinite on a CPU
            self.undo_step()
            return StepResult(loss, num_correct, is_finite=False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return StepResult(loss, num_correct)

    def undo_step(self) -> None:
        """Undo a step that failed before its update: drop its gradients, restore its buffers."""
        self.optimizer.zero_grad(set_to_none=True)
        self._buffers.restore()

    def run(
        self,
        batches: EpochBatches,
        schedule: optim.Schedule,
        *,
        epochs: int,
        seed: int,
        state: TrainState | None = None,
    ) -> Records:
        """Train up to the end of epoch `epochs`; yield a record after each step and each epoch.

        Args:
            batches: `len` is the number of steps per epoch; `epoch(n)` yields its batches.
            schedule: factor on the learning rate as a function of progress, 0 at the first step.
            seed: of dropout, together with epoch, step and rank.
            state: where to start; updated with every step. Saved with weights and optimizer
                state, it lets a training be resumed with the same result.

        Raises:
            NonFiniteLoss: a loss was NaN or infinite. Weights, optimizer and average are those
                before that step. On CUDA the error is raised some steps later: the average and
                the statistics of batch norm have moved on by then, and in fp16 the weights too,
                because GradScaler skips only the steps whose own gradients are not finite.
            ResourceError: no memory even for the smallest micro-batch.
        """
        state = TrainState() if state is None else state
        timetable = optim.GroupSchedule(self.optimizer, schedule, epochs * len(batches))
        if state.micro_batch_size:
            self._use_micro_batches(state.micro_batch_size)
        while state.epoch <= epochs:
            try:
                yield from self._run_epoch(batches, timetable, seed, state)
            except OutOfMemory as failure:  # the loop continues with the step that failed
                self.undo_step()
                # The check starts again with the next step: losses that are not read yet count.
                self._raise_if_nonfinite(len(batches), timetable, state.epoch)
                state.micro_batch_size = next_micro_batch_size(
                    self.model,
                    failure,
                    self.plan.micro_batch_size,
                    distributed=self.data_parallel is not None,
                )
                self._use_micro_batches(state.micro_batch_size)

    def _use_micro_batches(self, size: int) -> None:
        """Compute `size` images at once from now on, without CUDA graphs.

        The gradient of a parameter would be memory of the graph, which the next micro-batch
        overwrites (github.com/pytorch/pytorch/issues/169545).
        """
        self.plan = replace(self.plan, micro_batch_size=size)
        if self.plan.step_mode == "reduce-overhead":
            self.plan = replace(self.plan, step_mode="compiled")
            self._compiled = compile_model(self.model, self.plan)

    def _raise_if_nonfinite(self, steps: int, timetable: optim.GroupSchedule, epoch: int) -> None:
        """Raise `NonFiniteLoss` if a finished step of the epoch had a loss that was not finite."""
        check = self._deferred_check
        if check is not None and (failed := check.wait()) is not None:
            step = (epoch - 1) * steps + failed - 1
            raise NonFiniteLoss(epoch, failed, timetable.lr_at(step))

    def _run_epoch(
        self, batches: EpochBatches, timetable: optim.GroupSchedule, seed: int, state: TrainState
    ) -> Records:
        """Run the rest of epoch `state.epoch`, from step `state.step` on."""
        steps, check = len(batches), self._deferred_check
        first = (state.epoch - 1) * steps
        lr = self._set_rates(timetable, first + max(state.step - 1, 0))  # if no step is left
        set_train_mode(self.model)
        is_stochastic = any(_is_stochastic(module) for module in self.model.modules())
        rank = () if self.data_parallel is None else (self.data_parallel.rank,)
        if check is not None:
            check.start_epoch(state.step)
        batches_left = batches.epoch(state.epoch, state.step)
        for index, (images, targets) in enumerate(batches_left, state.step):
            lr = self._set_rates(timetable, first + index)
            if is_stochastic:  # dropout is a function of (seed, epoch, step, rank)
                seed_generators(self.plan.device, derive_seed(seed, state.epoch, index, 1, *rank))
            count = len(targets)
            if self.data_parallel is not None:
                count = self.data_parallel.next_batch(index).total
            result = self.train_step(images, targets)
            if not result.is_finite:
                raise NonFiniteLoss(state.epoch, index + 1, lr)
            if self.averager is not None:
                self.averager.update()
            state.add_step(count, result.loss, result.num_correct)
            if check is not None and (failed := check.poll()) is not None:
                raise NonFiniteLoss(state.epoch, failed, timetable.lr_at(first + failed - 1))
            yield Step(state.epoch, state.step, steps, count, result.loss, result.num_correct, lr)
        self._raise_if_nonfinite(steps, timetable, state.epoch)
        yield state.finish_epoch(lr)

    def _set_rates(self, timetable: optim.GroupSchedule, step: int) -> float:
        """Freeze, unfreeze and set the learning rates for a step of the whole training."""
        if timetable.apply_windows(step):  # a parameter group may have been frozen or unfrozen
            set_train_mode(self.model)
            if self.data_parallel is not None:
                self.data_parallel.unwrap()
        return timetable.set_rates(step)

    def _clip_gradients(self) -> None:
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(self._parameters, self.clip_value)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.clip_norm)


def compile_model(model: nn.Module, plan: Plan) -> nn.Module:
    """Return the model as the plan runs it: unchanged, or wrapped by `torch.compile`.

    On a CPU compilation rarely pays within a few minutes: a small network's step gains 2 to 4%,
    and 6 to 8% with the C++ wrapper, which leaves no Python between the kernels.
    """
    if plan.step_mode == "eager":
        return model
    if plan.step_mode == "reduce-overhead" and plan.device.startswith("cuda"):
        return cast(nn.Module, torch.compile(model, mode="reduce-overhead"))
    options: dict[str, Any] | None = {"cpp_wrapper": True} if plan.device == "cpu" else None
    return cast(nn.Module, torch.compile(model, options=options))


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the number of rows whose largest logit is that of the target class, 0-d."""
    labels = targets.argmax(1) if targets.ndim == 2 else targets
    return (logits.argmax(1) == labels).sum()


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _is_stochastic(module: nn.Module) -> bool:
    """Return whether a module may draw random numbers.

    Modules of other libraries count as random: they may call dropout as a function.
    """
    return isinstance(module, DROPOUTS) or not type(module).__module__.startswith(KNOWN_PACKAGES)
