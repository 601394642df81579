"""Adam on a CPU: torch's own, which does not collect its tensors anew in each step."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convlens.device import has_fast_bf16

# ---- eager ----------------------------------------
# torch's optimisers without what they do for its compiler.
#
# The first call of `add_param_group`, `zero_grad`, `state_dict` or `step` of a torch optimiser
# imports `torch._dynamo`, which takes about as long as torch itself, to tell a compiler that isn't
# there not to look inside; and each later call tells it again. We never compile an optimiser, so
# these classes call what stands below the decorators (`functools.wraps` keeps it as `__wrapped__`).
# Where a version of torch decorates nothing, they are torch's own methods.

_Base = torch.optim.Optimizer
_step_of_adam: Callable[..., float | None] = inspect.unwrap(torch.optim.Adam.step)
_step_of_adamw: Callable[..., float | None] = inspect.unwrap(torch.optim.AdamW.step)
_step_of_sgd: Callable[..., float | None] = inspect.unwrap(torch.optim.SGD.step)


class Eager(_Base):
    """What all optimisers share; comes before torch's class among the bases."""

    add_param_group = inspect.unwrap(_Base.add_param_group)
    zero_grad = inspect.unwrap(_Base.zero_grad)
    state_dict = inspect.unwrap(_Base.state_dict)
    load_state_dict = inspect.unwrap(_Base.load_state_dict)


class Adam(Eager, torch.optim.Adam):
    """`torch.optim.Adam`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> float | None:  # type: ignore[override]
        """One update of everything that has a gradient."""
        return _step_of_adam(self, closure)


class AdamW(Eager, torch.optim.AdamW):
    """`torch.optim.AdamW`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> float | None:  # type: ignore[override]
        """One update of everything that has a gradient."""
        return _step_of_adamw(self, closure)


class SGD(Eager, torch.optim.SGD):
    """`torch.optim.SGD`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> float | None:  # type: ignore[override]
        """One update of everything that has a gradient."""
        return _step_of_sgd(self, closure)


@dataclass
class _Lists:
    """A group's tensors as the fused kernel takes them, and which of its parameters they are."""

    there: list[bool]  # of each parameter: whether it had a gradient
    parameters: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]
    counts: Tensor  # `[n]`, what `steps` are views of: one addition counts them all


class LeanAdam(Adam):
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


# ---- muon ----------------------------------------
# Muon: momentum whose update for a matrix has all its singular values near 1.

# The quintic a x + b x^3 + c x^5 of Jordan et al. 2024: steep at 0, so that small singular values
# rise fast; it never converges to 1, but stays within about 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)

Tensors = list[Tensor] | tuple[Tensor, ...]


@functools.cache
def _precision(on_gpu: bool) -> torch.dtype:
    return torch.bfloat16 if on_gpu and has_fast_bf16("cuda") else torch.float32


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """U f(S) V^T for each matrix U S V^T of `[B, rows, columns]`, with f(S) near 1.

    f is `QUINTIC` applied `iterations` times to the singular values, after the matrix was divided
    by its Frobenius norm (so that none is above 1); Newton-Schulz iteration gets there by
    products alone. In bf16 on GPUs that have it in hardware; else in float32.
    """
    a, b, c = QUINTIC
    x = matrices.to(_precision(matrices.is_cuda))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the smaller of the two Gram matrices
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _apply_update(parameters: list[Tensor], moves: Tensors, lr: float) -> None:
    """`w <- w - lr * move`."""
    torch._foreach_add_(parameters, moves, alpha=-lr)


class Muon(Eager):
    """Muon for the groups with `muon: True`, SGD for the others, in one optimiser.

    Both keep one momentum buffer, `m <- momentum * m + g`, and move along `u = m`, or with
    `nesterov` `u = g + momentum * m`:

    - SGD as torch's: `g` has `weight_decay * w` added, `w <- w - lr * u`.
    - Muon, for parameters of two or more dimensions, flattened to `[out, rest]`: weights shrink
      by `1 - lr * weight_decay`; with `normalize` they are rescaled to the norm sqrt(out); then
      `w <- w - lr * orthogonalised(u)`. The gradient's scale doesn't matter.

    `normalize` changes nothing in what a filter with a norm behind it computes, and holds its
    effective rate; without a norm behind it, leave it off. Source: Jordan et al. 2024 ("Muon: An
    optimizer for hidden layers in neural networks") and its CIFAR-10 record airbench94_muon.

    Args:
        iterations: of Newton-Schulz; 3 in the CIFAR-10 record, 5 elsewhere.
        normalize: whether Muon's weights are rescaled before each update.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        iterations: int = 3,
        normalize: bool = True,
    ) -> None:
        self.iterations, self.normalize = iterations, normalize
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "muon": False,
        }
        super().__init__(groups, defaults)
        # For `torch.amp.GradScaler`: it sets `found_inf` and leaves skipping to `step`.
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of everything that has a gradient; no number is read off the device.

        Where the attribute `found_inf` (0-d, as fused optimisers have it) is 1, it does nothing.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        skips = None if found_inf is None else found_inf.bool()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            self._begin_momentum(parameters, group)
            held = [] if skips is None else self._held(parameters)
            (self._muon if group["muon"] else self._sgd)(parameters, group)
            if skips is not None:
                for tensor, before in held:
                    torch.where(skips, before, tensor, out=tensor)
        return loss

    def _held(self, parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What a step changes, each with a copy."""
        changed = [*parameters, *(b for p in parameters for b in self.state[p].values())]
        copies = [torch.empty_like(tensor) for tensor in changed]
        torch._foreach_copy_(copies, changed)  # one kernel on a GPU
        return list(zip(changed, copies, strict=True))

    def _begin_momentum(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters if group["momentum"] else ():
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _sgd(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients: Tensors = [p.grad for p in parameters if p.grad is not None]
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        moves = self._with_momentum(parameters, gradients, group)
        _apply_update(parameters, moves, group["lr"])

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        moves = self._with_momentum(parameters, gradients, group)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        if self.normalize:
            norms = torch._foreach_norm(parameters)
            torch._foreach_clamp_min_(norms, 1e-12)
            torch._foreach_mul_(parameters, [len(p) ** 0.5 for p in parameters])
            torch._foreach_div_(parameters, norms)
        alike = defaultdict(list)  # one batch of products for all matrices of a shape
        for index, move in enumerate(moves):
            alike[len(move), move[0].numel()].append(index)
        for shape, indices in alike.items():
            matrices = torch.stack([moves[i].reshape(shape) for i in indices])
            updates = orthogonalize(matrices, self.iterations).unbind()
            targets = [parameters[i] for i in indices]
            shaped = [u.view(t.shape) for u, t in zip(updates, targets, strict=True)]
            _apply_update(targets, shaped, group["lr"])

    def _with_momentum(
        self, parameters: list[Tensor], gradients: Tensors, group: dict[str, Any]
    ) -> Tensors:
        """The buffers taken one step on, and where they say to go."""
        momentum = group["momentum"]
        if not momentum:
            return gradients
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        return (
            torch._foreach_add(gradients, buffers, alpha=momentum) if group["nesterov"] else buffers
        )
