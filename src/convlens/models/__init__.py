"""The table of network families and the one function that builds from it.

To add a family: one file in this folder, one line in `MODELS`. Its constructor takes
`(classes, channels, image_size, *, its own options)`; the network has `stages` (the names of
its sub-modules in order, what `look` and fine-tuning go by) and `head` (the name of its last
linear layer, so that it can be replaced). `tests/test_contracts.py` then runs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from convlens.errors import UsageError
from convlens.models.cnn import CNN
from convlens.models.fastnet import FastNet
from convlens.models.parts import Initialised, Parts, parts
from convlens.models.resnet import ResNet18, ResNet34, ResNet50
from convlens.models.wrn import WRN
from convlens.names import near, pick

__all__ = ["MODELS", "Initialised", "Parts", "build", "options_of", "parts"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": CNN,
    "fastnet": FastNet,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "wrn": WRN,
}


def build(
    name: str, classes: int, channels: int, image_size: int, options: Mapping[str, Any]
) -> nn.Module:
    """The network `name` for `classes` classes of `[channels, image_size, image_size]` images.

    Raises:
        UsageError: unknown family, unknown option (all at once, with near misses), bad value.
    """
    family = pick(MODELS, name, "model")
    known = options_of(name)
    unknown = [key for key in options if key not in known]
    if unknown:
        hints = []
        for key in unknown:
            close = near(key, known)
            hint = f" (did you mean model.{close[0]}?)" if close else ""
            hints.append(f"unknown key 'model.{key}'{hint}")
        fix = f"model {name} has: {', '.join(known)}"
        raise UsageError("; ".join(hints), fix=fix)
    try:
        return family(classes, channels, image_size, **options)
    except UsageError:
        raise
    # A text where a number belongs, or more weights than there is memory for.
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"model {name}: {reason}", fix=f"received {dict(options)}") from error


def options_of(name: str) -> dict[str, Any]:
    """The family's own options with their defaults, read from its constructor."""
    parameters = inspect.signature(pick(MODELS, name, "model")).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
