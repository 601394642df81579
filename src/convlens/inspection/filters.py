"""The kernels of a convolution: of the first as colours, of deeper ones input by input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from convlens.errors import UsageError
from convlens.inspection import layers
from convlens.inspection.activity import limits
from convlens.inspection.subjects import Subject

FIRST = "first"
INPUTS = 8  # kernels shown of each channel of a deeper layer


@dataclass(frozen=True)
class Filters:
    """Kernels float32 `[out, in, h, w]` of a convolution; `order` has the most energetic first.

    Energy is the L2 norm of all of a channel's weights. `limit` is the 99.5th percentile of the
    absolute weights of the layer.
    """

    run: str
    layer: str
    weights: npt.NDArray[np.float32]
    energy: npt.NDArray[np.float64]
    order: npt.NDArray[np.int64]
    limit: float

    @property
    def coloured(self) -> bool:
        return bool(self.weights.shape[1] == 3)

    def inputs(self, channel: int) -> npt.NDArray[np.int64]:
        """The inputs whose kernels weigh most in a channel, in that order."""
        strength = np.sqrt((self.weights[channel].astype(np.float64) ** 2).sum((1, 2)))
        return np.argsort(-strength, kind="stable")[:INPUTS]

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "layer": self.layer,
            "shape": list(self.weights.shape),
            "scale": self.limit,
            "order": self.order.tolist(),
        }


def read(subject: Subject, layer: str = FIRST) -> Filters:
    """The kernels of a layer: of the convolution of that name, or the first one inside it.

    Raises:
        UsageError: no such layer, with near misses; or no convolution there.
    """
    wanted = [] if layer == FIRST else list(layers.find(subject.model, [layer]))
    inside = subject.model.get_submodule(wanted[0]) if wanted else subject.model
    for name, module in inside.named_modules():
        if isinstance(module, nn.Conv2d):
            full = ".".join(part for part in (*wanted, name) if part)
            weights = module.weight.detach().float().cpu().numpy()
            energy = np.sqrt((weights.astype(np.float64) ** 2).sum((1, 2, 3)))
            order = np.argsort(-np.nan_to_num(energy, nan=np.inf), kind="stable")
            return Filters(subject.name, full, weights, energy, order, limits([weights])[1])
    where = f"layer {layer} of {subject.name}" if wanted else subject.name
    raise UsageError(
        f"{where} has no convolution", fix=f"name a layer that has: {_some(subject.model)}"
    )


def _some(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "there is none"


def figure(filters: Filters, channels: int) -> Any:
    """The `channels` most energetic filters of a layer as a picture."""
    from convlens import plots

    shown = filters.order[:channels]
    count, inputs, high, wide = filters.weights.shape
    amount = f"all {count:,}" if len(shown) == count else f"{len(shown)} of {count:,}"
    title = f"{filters.run}, {filters.layer}: {amount} filters"
    scale = f"±{filters.limit:.3g} (99.5th percentile of the layer's absolute weights)"
    if filters.coloured:
        names = [str(number) for number in shown.tolist()]
        note = f"{high}×{wide} over red, green, blue; most energetic first. Grey is 0, the ends of "
        note += f"the colours are {scale}. Below: number of the channel."
        return plots.colour_filters(filters.weights[shown], names, filters.limit, title, note)
    chosen = np.stack([filters.weights[each][filters.inputs(each)] for each in shown.tolist()])
    names = [f"#{number}" for number in shown.tolist()]
    some = f"the {chosen.shape[1]} strongest of its {inputs:,} input kernels"
    some = some if inputs > 1 else "its kernel"
    note = (
        f"A row is a channel ({some}, {high}×{wide}); most energetic (L2) first. Colours: {scale}."
    )
    return plots.kernels(chosen, names, filters.limit, title, note)
