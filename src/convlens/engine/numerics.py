"""Numerical safety of a training step: non-finite losses, undoing a step, fp16 loss scaling.

A loss that is NaN or infinite ends the training with `NonFiniteLoss`. The weights are never
updated with it. On a CPU the loss is read before each update. On CUDA reading it would make the
host wait for every step, so `DeferredFiniteCheck` skips the update on the device, and the host
reads the result later.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convlens.device import AsyncScalars
from convlens.errors import Diverged

CHECK_INTERVAL_STEPS = 50  # steps between two reads of the device-side flag
# GradScaler starts at 2^16 and skips steps until the scale fits; a run of 200 steps has none to
# spare. The gradients of a classifier's mean loss fit into fp16 with this scale from the start.
INITIAL_LOSS_SCALE = 2.0**12


class NonFiniteLoss(Diverged):
    """The loss became NaN or infinite; raised before the weights were updated with it."""

    def __init__(self, epoch: int, step: int, lr: float) -> None:
        self.epoch, self.step, self.lr = epoch, step, lr
        super().__init__(
            f"the loss became NaN or infinite in epoch {epoch}, step {step}; training stopped "
            "before the weights were updated with it",
            fix=f"lower optim.lr (it was {lr:.3g}) or set optim.clip_norm=1",
        )

    def locate_first_nonfinite(self, model: nn.Module, steps: int) -> None:
        """Name the step before, of `steps` per epoch, if the weights were not finite already.

        The loss of that step was finite and its gradient was not. Gradients are not checked,
        because that would cost a pass over all of them in each step.
        """
        if all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            return
        first = self.step == 1
        self.epoch, self.step = self.epoch - first, steps if first else self.step - 1
        self.what = (
            f"the update of epoch {self.epoch}, step {self.step} made weights NaN or infinite: its "
            "loss was finite, its gradient was not; these weights were not saved"
        )


class BufferSnapshot:
    """A copy of a model's buffers, to undo a forward pass.

    The forward pass updates the running statistics of batch norm before the loss is known, and
    before memory may run out.
    """

    def __init__(self, model: nn.Module) -> None:
        by_type: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for buffer in model.buffers():  # grouped: one kernel copies all tensors of a type on a GPU
            by_type.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        self._groups = [(live, [t.clone() for t in live]) for live in by_type.values()]

    @torch.no_grad()
    def save(self) -> None:
        """Copy the buffers' current values."""
        for live, saved in self._groups:
            torch._foreach_copy_(saved, live)

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers to the values of the last `save`."""
        for live, saved in self._groups:
            torch._foreach_copy_(live, saved)


class DeferredFiniteCheck:
    """Check losses on the device, and let the host read the result without waiting.

    From the first non-finite loss on, `update` returns 1, and optimizers that are given it as
    `found_inf` skip their update: the weights stay those of before that loss.
    """

    def __init__(self) -> None:
        self._all_finite: Tensor | None = None  # 1.0 until a loss was not finite
        self._finite_steps: Tensor | None = None  # steps of the epoch up to that loss
        self._start = self._steps = 0
        self._pending: AsyncScalars | None = None

    def start_epoch(self, step: int) -> None:
        """Start counting after `step` finished steps of an epoch."""
        self._start, self._steps, self._pending = step, 0, None
        self._all_finite = self._finite_steps = None

    @torch.no_grad()
    def update(self, loss: Tensor) -> Tensor:
        """Add the loss of a step; return 1.0 if it or an earlier one was not finite, else 0.0.

        Number and order of the kernels do not depend on the loss: the host reads nothing.
        """
        finite = loss.isfinite().float()
        if self._all_finite is None or self._finite_steps is None:
            self._all_finite, self._finite_steps = finite, finite.clone()
        else:
            self._all_finite.mul_(finite)
            self._finite_steps.add_(self._all_finite)
        self._steps += 1
        return 1 - self._all_finite

    def poll(self) -> int | None:
        """Every `CHECK_INTERVAL_STEPS` steps, read the result of the previous interval.

        Returns:
            The first step of the epoch, from 1, whose loss was not finite, as far as known.
        """
        if self._steps % CHECK_INTERVAL_STEPS:
            return None
        failed = None if self._pending is None else self._read(self._pending)
        self._pending = self._send()
        return failed

    def wait(self) -> int | None:
        """As `poll`, for all steps so far; waits for the device."""
        pending = self._send()
        return None if pending is None else self._read(pending)

    def _send(self) -> AsyncScalars | None:
        if self._all_finite is None or self._finite_steps is None:
            return None
        return AsyncScalars(self._all_finite, self._finite_steps)

    def _read(self, numbers: AsyncScalars) -> int | None:
        all_finite, finite_steps = numbers.values()
        return None if all_finite else self._start + int(finite_steps) + 1


def make_grad_scaler(device: str) -> torch.amp.GradScaler:
    """Return a loss scaler for fp16, in which small gradients would round to 0.

    Source: Micikevicius et al. 2018.
    """
    return torch.amp.GradScaler(torch.device(device).type, init_scale=INITIAL_LOSS_SCALE)


def init_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD zero momentum buffers before an update that may be skipped.

    torch's fused SGD allocates them in the first step without filling them. If `found_inf` skips
    that step, the next one would continue from uninitialized memory. Zeros lead to the same
    update as no buffer.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
