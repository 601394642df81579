"""torch's optimisers without what they do for its compiler.

The first call of `add_param_group`, `zero_grad`, `state_dict` or `step` of a torch optimiser
imports `torch._dynamo`, which takes about as long as torch itself, to tell a compiler that isn't
there not to look inside; and each later call tells it again. We never compile an optimiser, so
these classes call what stands below the decorators (`functools.wraps` keeps it as `__wrapped__`).
Where a version of torch decorates nothing, they are torch's own methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

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
