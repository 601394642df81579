"""The names by which a network's parts are known: its stages in order, and its head.

Our own families say them (`stages`, `head`). Networks of other libraries don't, and may have
sub-modules of just these names; for them `name_parts` finds out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn

# Containers that hold a whole trunk: their children are the stages, not they themselves.
TRUNKS = ("features", "encoder", "layers", "blocks", "stages", "trunk_output")
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)
ATTRIBUTE = "convlens_parts"


@dataclass(frozen=True)
class Parts:
    """Dotted names of sub-modules: `stages` in the order of the forward pass, and the `head`."""

    stages: tuple[str, ...]
    head: str


@runtime_checkable
class Initialised(Protocol):
    """A network some of whose weights are computed from images before it is trained."""

    def initialise(self, images: Tensor) -> None:
        """Takes some thousand training images, normalised, float32 `[N, C, H, W]`."""
        ...


def parts(model: nn.Module) -> Parts:
    """The names of `model`'s stages and head; what fine-tuning and looking inside go by."""
    found = getattr(model, ATTRIBUTE, None)
    if isinstance(found, Parts):
        return found
    stages, head = getattr(model, "stages", ()), getattr(model, "head", "")
    return Parts(tuple(cast(Sequence[str], stages)), cast(str, head))


def stage_of(model: nn.Module) -> dict[str, str]:
    """The stage of each parameter, by the names that `named_parameters` gives.

    A stage is all that lies behind the one before it, up to and including the sub-module that
    gives it its name, in the order of registration: for a ResNet with
    `stages = ("maxpool", "layer1", ...)`, `conv1` and `bn1` are in `maxpool`. Names may be dotted
    (`features.4`). What lies behind the last stage belongs to the head, by the head's name.
    """
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    ends: list[tuple[int, str]] = []
    known = parts(model)
    for stage in known.stages:
        below = (place for name, place in order.items() if is_below(name, stage))
        ends.append((max(below), stage))
    found = {}
    for name, _ in model.named_parameters():
        place = order[name.rpartition(".")[0]]
        found[name] = next((stage for end, stage in ends if place <= end), known.head)
    return found


def is_below(name: str, module: str) -> bool:
    """Whether `name` (of a module or parameter) is `module` itself or inside it."""
    return name == module or name.startswith(f"{module}.")


def name_parts(model: nn.Module, head: str) -> None:
    """Gives a network of another library its `parts`.

    They are also its attributes `stages` and `head`, unless it has sub-modules of that name.
    """
    found = Parts(tuple(_stages(model, head)), head)
    setattr(model, ATTRIBUTE, found)
    for name, value in (("stages", found.stages), ("head", found.head)):
        if not hasattr(model, name):
            setattr(model, name, value)


def last_layer(model: nn.Module) -> str:
    """The name of the last linear layer or, where there is none, of the last convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        names: list[str] = [
            name for name, module in model.named_modules() if isinstance(module, kind)
        ]
        if names:
            return names[-1]
    raise ValueError("it has no layer that gives logits")


def _stages(model: nn.Module, head: str, prefix: str = "") -> Iterator[str]:
    """The children in order up to the head, a trunk's children in its place.

    Single layers are no stages but for the poolings: these end a block in networks that are one
    long chain, and the stem in others.
    """
    for name, child in model.named_children():
        full = prefix + name
        if head == full or head.startswith(f"{full}."):
            return
        if name in TRUNKS:
            yield from _stages(child, head, f"{full}.")
        elif isinstance(child, POOLINGS) or has_layers(child):
            yield full


def has_layers(module: nn.Module) -> bool:
    """Whether it is made of modules that have weights, and can be called."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # its children are called, it is not
        return False
    return any(True for child in module.children() for _ in child.parameters())
