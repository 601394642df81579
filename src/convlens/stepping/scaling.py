"""The loss scale of fp16: gradients that half precision would round to 0 are made larger.

`torch.amp.GradScaler`'s rule and its own device operations, without its way of stepping: here the
gradients are right again before they are clipped, a step that has to be left out is left out on
the device (`optimiser.found_inf`), and no number is read by the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# GradScaler begins at 2^16 and leaves out steps until that fits; a run of 200 steps has none to
# spare. Mean losses of classifiers have gradients that are at home with this from the start.
START = 2.0**12
GROWTH_STEPS = 2_000  # good steps before the scale is doubled, as in GradScaler


class LossScale:
    """Scales losses, unscales gradients, halves the scale where they overflowed (that step is
    left out) and doubles it after `growth_steps` good ones. Loss scaling: Micikevicius et al. 2018.

    Args:
        optimiser: fused, or `Muon`: those look at `found_inf`.
        device: where the network is.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        device: str,
        *,
        start: float = START,
        growth_steps: int = GROWTH_STEPS,
    ) -> None:
        self._optimiser, self._growth_steps = optimiser, growth_steps
        self.scale = torch.full((), start, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.found_inf = torch.zeros((), device=device)
        optimiser.found_inf = self.found_inf  # type: ignore[attr-defined]
        _begin_momentum(optimiser)

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients those of the scaled loss."""
        (loss * self.scale).backward()

    @torch.no_grad()
    def unscale(self, clip: Callable[[], None] = lambda: None) -> None:
        """Makes the gradients true ones and clips them; call it before the optimiser's step.

        Where they overflowed, that step will do nothing.
        """
        parameters = (p for group in self._optimiser.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(
            gradients, self.found_inf, self.scale.reciprocal()
        )
        torch._amp_update_scale_(
            self.scale, self._good_steps, self.found_inf, 2.0, 0.5, self._growth_steps
        )
        clip()

    def state(self) -> dict[str, Tensor]:
        """What an unfinished run keeps; the tensors themselves."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load(self, state: dict[str, Tensor]) -> None:
        for key, tensor in self.state().items():
            tensor.copy_(state[key])


def _begin_momentum(optimiser: torch.optim.Optimizer) -> None:
    """Momentum from 0, which the first step makes the gradient.

    torch's fused SGD makes its buffers in the first step without filling them; if that step is
    left out, it would go on from what the memory happened to hold.
    """
    if isinstance(optimiser, torch.optim.SGD):
        for group in optimiser.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
