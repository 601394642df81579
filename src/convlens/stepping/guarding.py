"""How a loss that isn't finite is kept from spoiling anything: by waiting, or by looking back.

The promise is the same: training stops, and weights, optimiser, averages, norm statistics and
position are those from before the step whose loss was NaN or infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from convlens.errors import Diverged
from convlens.optim import Average
from convlens.stepping.scaling import LossScale
from convlens.system.later import AsyncScalars


class Place(Protocol):
    """The part of `engine.Position` that a step moves."""

    epoch: int
    step: int
    images: int
    loss_sum: float | Tensor
    correct: int | Tensor


class NonFiniteLoss(Diverged):
    """The loss became NaN or infinite; raised before the weights were updated with it."""

    def __init__(self, epoch: int, step: int, lr: float) -> None:
        self.epoch, self.step, self.lr = epoch, step, lr
        super().__init__(
            f"the loss became NaN or infinite in epoch {epoch}, step {step}; training stopped "
            "before the weights were updated with it",
            fix=f"lower optim.lr (it was {lr:.3g}) or set optim.clip_norm=1",
        )

    def blame(self, model: nn.Module, steps: int) -> None:
        """Names the step before, of `steps` an epoch, if the weights were none already.

        Its loss was finite and its gradient wasn't, which nobody looks at: that would cost a pass
        over all gradients in each step.
        """
        if all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            return
        first = self.step == 1
        self.epoch, self.step = self.epoch - first, steps if first else self.step - 1
        self.what = (
            f"the update of epoch {self.epoch}, step {self.step} made weights NaN or infinite: its "
            "loss was finite, its gradient wasn't; they were not saved"
        )


class Spoilt(Exception):  # noqa: N818 (control flow: the engine goes back and on)
    """Some loss since the last look was not finite."""


class Guard(Protocol):
    """What the engine asks around each step."""

    def before(self, at: Place) -> None:
        """Before a step; keeps what it needs to undo it. May raise `Spoilt`."""

    def lets(self, loss: Tensor) -> bool:
        """Whether the step may update anything with this loss."""

    def end(self, at: Place) -> None:
        """After an epoch's last step. May raise `Spoilt`."""

    def back(self, at: Place) -> None:
        """Undoes a step that was not let through, or everything since the last good look."""


class Waiting:
    """Reads every loss before the update with it. On a CPU that costs nothing.

    The norms' running statistics are kept before each step: the forward pass has moved them by
    the time that the loss is known. They are laid side by side in memory for that, so that one
    copy keeps all of a kind; the tensors stay the same objects.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = [_side_by_side(list(group)) for group in _by_type(model.buffers())]
        self._kept = [tensor.clone() for tensor in self._live]

    def before(self, at: Place) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            kept.copy_(live)

    def lets(self, loss: Tensor) -> bool:
        return math.isfinite(loss.item())  # a tenth of `torch.isfinite`'s time on the CPU

    def end(self, at: Place) -> None:
        pass

    def back(self, at: Place) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            live.copy_(kept)


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors by dtype and device, in order."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    """One flat tensor that holds the values of all; from now on they are views of it.

    Each begins at a multiple of 64 bytes, as a tensor of its own would: kernels round differently
    where it doesn't.
    """
    step = 64 // tensors[0].element_size()
    sizes = [-(-tensor.numel() // step) * step for tensor in tensors]
    flat = torch.zeros(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
    for tensor, room in zip(tensors, flat.split(sizes), strict=True):
        part = room[: tensor.numel()].view(tensor.shape)
        part.copy_(tensor)
        tensor.data = part
    return flat


class LookBack:
    """Never waits for a loss: every `every` steps it looks whether those a while ago were finite.

    The epoch's sum of losses is the flag: once it isn't finite, no later loss makes it so again.
    With each look goes a copy of all that steps change, on the device, which counts as good once
    its sum has arrived and is finite: one look later, when the device has long passed it. If one
    isn't, the engine goes back to the last good copy and does the few steps since again with
    `Waiting`, which ends where the loss first fails: steps depend on (seed, epoch, step) only.

    Memory: twice the trained weights, optimiser state, averages and norm statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        averager: Average | None = None,
        scale: LossScale | None = None,
        *,
        every: int = 50,
    ) -> None:
        self._model, self._optimiser = model, optimiser
        self._averager, self._scale, self._every = averager, scale, every
        self._good: _Copy | None = None
        self._newest: tuple[_Copy, AsyncScalars] | None = None
        self._spare: _Copy | None = None
        self._since = 0

    def before(self, at: Place) -> None:
        if self._good is None:  # an epoch begins here: everything so far is known to be good
            self._good = self._copy(at)
        elif self._since % self._every == 0:
            self._judge()
            self._newest = self._copy(at), AsyncScalars(_tensor(at.loss_sum))
        self._since += 1

    def lets(self, loss: Tensor) -> bool:
        return True

    def end(self, at: Place) -> None:
        if not math.isfinite(AsyncScalars(_tensor(at.loss_sum)).values()[0]):
            self._judge()
            raise Spoilt
        self._spare = self._good if self._newest is None else self._newest[0]
        self._good, self._newest, self._since = None, None, 0

    def back(self, at: Place) -> None:
        assert self._good is not None
        self._good.put_back(self._optimiser, self._averager)
        vars(at).update(self._good.position)

    def _judge(self) -> None:
        """Takes the newest copy for good, or raises: then the last good one stays."""
        if self._newest is None:
            return
        copy, loss_sum = self._newest
        if not math.isfinite(loss_sum.values()[0]):
            raise Spoilt
        self._spare, self._good, self._newest = self._good, copy, None

    def _copy(self, at: Place) -> _Copy:
        spare, self._spare = self._spare, None
        keys = ("epoch", "step", "images", "loss_sum", "correct")
        position = {key: getattr(at, key) for key in keys}
        steps = self._averager.steps if self._averager is not None else 0
        return _Copy.of(list(self._tensors()), position, steps, spare)

    def _tensors(self) -> Iterator[Entry]:
        """All that a step changes, with the parameter and key of what the optimiser holds."""
        for group in self._optimiser.param_groups:
            for parameter in group["params"]:
                yield parameter.data, None, ""
                for key, value in self._optimiser.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        yield value, parameter, key
        for buffer in self._model.buffers():
            yield buffer, None, ""
        if self._averager is not None:
            yield from ((tensor, None, "") for tensor in self._averager.state()["average"])
        if self._scale is not None:
            yield from ((tensor, None, "") for tensor in self._scale.state().values())


Entry = tuple[Tensor, Tensor | None, str]


@dataclass
class _Copy:
    entries: list[Entry]
    copies: list[Tensor]
    position: dict[str, Any]
    averager_steps: int

    @classmethod
    def of(
        cls, entries: list[Entry], position: dict[str, Any], steps: int, spare: _Copy | None
    ) -> _Copy:
        """A copy of the tensors of `entries`, in the memory of `spare` where that fits."""
        live = [tensor for tensor, _, _ in entries]
        if spare is not None and len(spare.copies) == len(live):
            copies = spare.copies
            _copy(copies, live)
        else:  # the first, or the optimiser has more state than it had
            copies = [tensor.clone() for tensor in live]
        return cls(entries, copies, position, steps)

    def put_back(self, optimiser: torch.optim.Optimizer, averager: Average | None) -> None:
        held = {(id(parameter), key) for _, parameter, key in self.entries if parameter is not None}
        for parameter, values in optimiser.state.items():
            for key in [key for key in values if (id(parameter), key) not in held]:
                del values[key]
        _copy([tensor for tensor, _, _ in self.entries], self.copies)
        if averager is not None:
            averager.steps = self.averager_steps


def _tensor(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
