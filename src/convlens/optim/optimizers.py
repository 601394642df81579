"""Optimizers: torch's without its compiler, a fast Adam for the CPU, and Muon.

The first call of `add_param_group`, `zero_grad`, `state_dict` or `step` of a torch optimizer
imports `torch._dynamo`, which takes about as long as importing torch, to exclude the method from
compilation; each later call repeats this. Optimizers are never compiled here, so these classes call
the undecorated methods (`functools.wraps` keeps them as `__wrapped__`). If a version of torch has
no such decorators, the methods are torch's own.
"""

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

# Coefficients of a x + b x^3 + c x^5 from Jordan et al. 2024. It is steep at 0, so that small
# singular values grow fast. It does not converge to 1, but stays within about 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)

Tensors = list[Tensor] | tuple[Tensor, ...]

_Optimizer = torch.optim.Optimizer
_adam_step: Callable[..., float | None] = inspect.unwrap(torch.optim.Adam.step)
_adamw_step: Callable[..., float | None] = inspect.unwrap(torch.optim.AdamW.step)
_sgd_step: Callable[..., float | None] = inspect.unwrap(torch.optim.SGD.step)


class Eager(_Optimizer):
    """Base class of all optimizers here; must come before torch's class among the bases."""

    add_param_group = inspect.unwrap(_Optimizer.add_param_group)
    zero_grad = inspect.unwrap(_Optimizer.zero_grad)
    state_dict = inspect.unwrap(_Optimizer.state_dict)
    load_state_dict = inspect.unwrap(_Optimizer.load_state_dict)


class Adam(Eager, torch.optim.Adam):
    """`torch.optim.Adam`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        return _adam_step(self, closure)


class AdamW(Eager, torch.optim.AdamW):
    """`torch.optim.AdamW`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        return _adamw_step(self, closure)


class SGD(Eager, torch.optim.SGD):
    """`torch.optim.SGD`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        return _sgd_step(self, closure)


@dataclass
class _GroupTensors:
    """Tensors of a parameter group in the form that the fused kernel takes.

    Attributes:
        has_grad: for each parameter of the group, whether it has a gradient. The lists below
            contain only those that have one.
        steps: views of `step_counts`, `[n]`; one addition increments all of them.
    """

    has_grad: list[bool]
    parameters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    step_counts: Tensor


class LeanAdam(Adam):
    """torch's fused Adam, or AdamW with `decoupled_weight_decay`, with the same bits.

    torch gathers parameters, gradients and state in Python in every step. On a CPU that takes
    several times as long as the update of a network with 30,000 weights. Here the lists are reused
    as long as the same parameters have gradients; the first step, and each one after a change, is
    torch's. Step hooks are not called, and the profiler shows the kernel only.

    Kept because it matters for small networks. With `torch.optim.AdamW(fused=True)` a whole
    training step takes 1.020 times as long with the network of `mnist-fast` (16,786 weights) and
    1.029 times with that of `digits` (32,282). (CPU time of one thread, batches of 128, torch
    2.15; medians of 244 and 307 paired ratios, interleaved, on a busy machine.)
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self._cache = list[_GroupTensors]()
        super().__init__(groups, fused=True, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._cache = []  # a loaded or copied state has other tensors

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As `torch.optim.Adam.step`."""
        gradients = [[p.grad for p in group["params"]] for group in self.param_groups]
        has_grad = [[grad is not None for grad in group] for group in gradients]
        has_scaler = getattr(self, "found_inf", None) is not None
        is_cached = has_grad == [cached.has_grad for cached in self._cache] and all(
            map(self._is_current, self._cache)
        )
        if closure is not None or has_scaler or not is_cached:
            loss = super().step(closure)
            self._cache = [self._collect(group) for group in self.param_groups]
            return loss
        for group, cached, group_gradients in zip(
            self.param_groups, self._cache, gradients, strict=True
        ):
            if not cached.parameters:
                continue
            cached.step_counts.add_(1)
            update: Callable[..., None] = (
                torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            )
            update(
                cached.parameters,
                [grad for grad in group_gradients if grad is not None],
                cached.exp_avgs,
                cached.exp_avg_sqs,
                [],
                cached.steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
        return None

    # Otherwise torch wraps it for its profiler and hooks: 60 µs, 1% of a small network's step.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Adam.zero_grad`."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _is_current(self, cached: _GroupTensors) -> bool:
        """Whether the optimizer state still consists of these tensors; it may have been replaced.

        The first parameter stands for all.
        """
        if not cached.parameters:
            return True
        return self.state[cached.parameters[0]].get("exp_avg") is cached.exp_avgs[0]

    def _collect(self, group: dict[str, Any]) -> _GroupTensors:
        has_grad = [p.grad is not None for p in group["params"]]
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in parameters]
        exp_avgs, exp_avg_sqs = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq"))
        step_counts = torch.stack([s["step"] for s in states]) if states else torch.empty(0)
        steps = list(step_counts.unbind())
        for state, step in zip(states, steps, strict=True):
            state["step"] = step
        return _GroupTensors(has_grad, parameters, exp_avgs, exp_avg_sqs, steps, step_counts)


class Muon(Eager):
    """Muon for the groups with `muon: True`, SGD for the others.

    Muon is SGD with momentum whose update for a matrix has all its singular values near 1. Both
    rules keep one momentum buffer, `m <- momentum * m + g`, and move along `u = m`, or with
    `nesterov` along `u = g + momentum * m`:

    - SGD as in torch: `weight_decay * w` is added to `g`; `w <- w - lr * u`.
    - Muon, for parameters of two or more dimensions, flattened to `[out, rest]`: weights are
      multiplied by `1 - lr * weight_decay`; with `normalize` they are rescaled to the norm
      sqrt(out); then `w <- w - lr * orthogonalized(u)`. The scale of the gradient has no effect.

    `normalize` does not change the output of a filter followed by a norm, and keeps its effective
    learning rate constant; without a norm after the filter, leave it off. Source: Jordan et al.
    2024 ("Muon: An optimizer for hidden layers in neural networks") and its CIFAR-10 record
    airbench94_muon.

    Args:
        iterations: Newton-Schulz iterations; 3 in the CIFAR-10 record, 5 elsewhere.
        normalize: whether Muon rescales the weights before each update.
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
        # For `torch.amp.GradScaler`: it sets `found_inf` and lets `step` skip the update.
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient, without reading numbers from the device.

        If the attribute `found_inf` (0-d tensor, as in torch's fused optimizers) is 1, nothing is
        updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf.bool()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            self._init_momentum(parameters, group)
            copies = [] if skip is None else self._copies(parameters)
            (self._muon if group["muon"] else self._sgd)(parameters, group)
            if skip is not None:
                for tensor, before in copies:
                    torch.where(skip, before, tensor, out=tensor)
        return loss

    def _copies(self, parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return every tensor that a step changes, with a copy."""
        changed = [*parameters, *(b for p in parameters for b in self.state[p].values())]
        copies = [torch.empty_like(tensor) for tensor in changed]
        torch._foreach_copy_(copies, changed)  # one kernel on a GPU
        return list(zip(changed, copies, strict=True))

    def _init_momentum(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters if group["momentum"] else ():
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _sgd(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients: Tensors = [p.grad for p in parameters if p.grad is not None]
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        directions = self._apply_momentum(parameters, gradients, group)
        torch._foreach_add_(parameters, directions, alpha=-group["lr"])

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        directions = self._apply_momentum(parameters, gradients, group)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        if self.normalize:
            norms = torch._foreach_norm(parameters)
            torch._foreach_clamp_min_(norms, 1e-12)
            torch._foreach_mul_(parameters, [len(p) ** 0.5 for p in parameters])
            torch._foreach_div_(parameters, norms)
        by_shape = defaultdict(list)  # all matrices of a shape are computed in one batch
        for index, direction in enumerate(directions):
            by_shape[len(direction), direction[0].numel()].append(index)
        for shape, indices in by_shape.items():
            matrices = torch.stack([directions[i].reshape(shape) for i in indices])
            updates = orthogonalize(matrices, self.iterations).unbind()
            updated = [parameters[i] for i in indices]
            shaped = [u.view(p.shape) for u, p in zip(updates, updated, strict=True)]
            torch._foreach_add_(updated, shaped, alpha=-group["lr"])

    def _apply_momentum(
        self, parameters: list[Tensor], gradients: Tensors, group: dict[str, Any]
    ) -> Tensors:
        """Update the momentum buffers; return the direction of each parameter's update."""
        momentum = group["momentum"]
        if not momentum:
            return gradients
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        if group["nesterov"]:
            return torch._foreach_add(gradients, buffers, alpha=momentum)
        return buffers


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Return U f(S) V^T for each matrix U S V^T of `[B, rows, columns]`, with f(S) near 1.

    f applies `QUINTIC` `iterations` times to the singular values, after division of the matrix by
    its Frobenius norm (so that none is above 1). Newton-Schulz iteration computes this by matrix
    products only. In bf16 on GPUs with hardware support, else in float32.
    """
    a, b, c = QUINTIC
    x = matrices.to(_product_dtype(matrices.is_cuda))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x  # for the smaller of the two Gram matrices
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


@functools.cache
def _product_dtype(on_gpu: bool) -> torch.dtype:
    return torch.bfloat16 if on_gpu and has_fast_bf16("cuda") else torch.float32
