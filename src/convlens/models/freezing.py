"""Frozen parts of a network: they stay as they are, whatever the mode."""

from __future__ import annotations

from torch import nn


def set_train_mode(model: nn.Module) -> None:
    """Train mode, with everything frozen left in eval mode.

    Frozen is a sub-module that has parameters of which none requires a gradient (so a frozen
    batch norm keeps its statistics), and all that comes before the first child with a trainable
    parameter: a frozen trunk is then one fixed function, dropout included.
    """
    model.train()
    for module in model.modules():
        if module is not model and _is_frozen(module):
            module.eval()
    for child in getattr(model, "_orig_mod", model).children():  # without torch.compile's wrapper
        if any(parameter.requires_grad for parameter in child.parameters()):
            break
        child.eval()


def _is_frozen(module: nn.Module) -> bool:
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    return bool(wanted) and not any(wanted)
