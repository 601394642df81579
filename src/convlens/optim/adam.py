"""Adam on a CPU: torch's own, which does not collect its tensors anew in each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convlens.optim import eager


@dataclass
class _Lists:
    """A group's tensors as the fused kernel takes them, and which of its parameters they are."""

    there: list[bool]  # of each parameter: whether it had a gradient
    parameters: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]
    counts: Tensor  # `[n]`, what `steps` are views of: one addition counts them all


class LeanAdam(eager.Adam):
    """torch's fused Adam, or AdamW with `decoupled_weight_decay`, with the same bits.

    torch gathers parameters, gradients and state in every step, in Python; on a CPU that takes
    several times as long as updating a network of 30,000 weights. Here the lists are kept as
    long as the same parameters have gradients; the first step, and any after a change, is torch's.
    Step hooks are not called, and the profiler sees the kernel only.

    Kept because it counts for small networks. With `torch.optim.AdamW(fused=True)` a whole
    training step takes 1.020 times as long with the network of `mnist-fast` (16,786 weights) and
    1.029 times with that of `digits` (32,282). (CPU time of one thread, batches of 128, torch
    2.15; medians of 244 and 307 paired ratios, interleaved, on a busy machine.)
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self._kept = list[_Lists]()
        super().__init__(groups, fused=True, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._kept = []  # a state that was loaded, or copied, has other tensors

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As `torch.optim.Adam.step`."""
        gradients = [[p.grad for p in group["params"]] for group in self.param_groups]
        there = [[g is not None for g in its] for its in gradients]
        scaled = getattr(self, "found_inf", None) is not None  # by a gradient scaler
        known = there == [kept.there for kept in self._kept] and all(map(self._holds, self._kept))
        if closure is not None or scaled or not known:
            loss = super().step(closure)
            self._kept = [self._lists(group) for group in self.param_groups]
            return loss
        for group, kept, its in zip(self.param_groups, self._kept, gradients, strict=True):
            if kept.parameters:
                kept.counts.add_(1)
                _update(group)(
                    kept.parameters,
                    [g for g in its if g is not None],
                    kept.averages,
                    kept.squares,
                    [],
                    kept.steps,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )
        return None

    # Else torch wraps it for its profiler and for hooks: 60 µs a step, a hundredth of a small one.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Adam.zero_grad`."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _holds(self, kept: _Lists) -> bool:
        """Whether the state is still made of these tensors: somebody may have put it back."""
        for parameter, average in zip(kept.parameters[:1], kept.averages, strict=False):
            return self.state[parameter].get("exp_avg") is average
        return True

    def _lists(self, group: dict[str, Any]) -> _Lists:
        there = [p.grad is not None for p in group["params"]]
        parameters = [p for p in group["params"] if p.grad is not None]
        state = [self.state[p] for p in parameters]
        averages, squares = ([s[key] for s in state] for key in ("exp_avg", "exp_avg_sq"))
        counts = torch.stack([s["step"] for s in state]) if state else torch.empty(0)
        steps = list(counts.unbind())
        for its, count in zip(state, steps, strict=True):
            its["step"] = count
        return _Lists(there, parameters, averages, squares, steps, counts)


def _update(group: dict[str, Any]) -> Callable[..., None]:
    """torch's kernel for the group's way to decay weights."""
    update: Callable[..., None] = (
        torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    )
    return update
