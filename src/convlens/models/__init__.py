"""The table of network families and the one function that builds from it.

To add a family: one file in this folder, one line in `MODELS`. Its constructor takes
`(classes, channels, image_size, *, its own options)`; the network has `stages` (the names of
its sub-modules in order, what `look` and fine-tuning go by) and `head` (the name of its last
linear layer, so that it can be replaced). `tests/integration/test_contracts.py` then runs it. Any other
name is torchvision's, or timm's as `timm/NAME` (`zoo.py`); `parts(model)` has the names of the
stages and the head of them all.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from convlens.errors import (
    ConvlensError,
    ResourceError,
    UsageError,
    close_matches,
    did_you_mean_suffix,
)
from convlens.models import zoo
from convlens.models.stages import DataInitialized, ModelParts, model_parts

__all__ = [
    "MODELS",
    "DataInitialized",
    "ModelParts",
    "build_model",
    "load_weights",
    "model_family",
    "model_options",
    "model_parts",
    "try_out",
]

# File and class in this folder. By name, since torchvision takes a second or two to import.
MODELS: dict[str, str] = {
    "cnn": "cnn.CNN",
    "fastnet": "fastnet.FastNet",
    "resnet18": "resnet.ResNet18",
    "resnet34": "resnet.ResNet34",
    "resnet50": "resnet.ResNet50",
    "wrn": "resnet.WRN",
}
# Image sizes that are tried in turn when a network refuses its own; every network takes 224.
USUAL_SIZES = (16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 288, 320, 384)
FAILURES = (TypeError, ValueError, RuntimeError, OverflowError, AssertionError)


def build_model(
    name: str, classes: int, channels: int, image_size: int, options: Mapping[str, Any]
) -> nn.Module:
    """The network `name` for `classes` classes of `[channels, image_size, image_size]` images.

    Raises:
        UsageError: unknown family, unknown option (all at once, with near misses), bad value.
        ResourceError: not enough memory for the weights.
    """
    known = model_options(name)
    unknown = [key for key in options if key not in known]
    if unknown:
        hints = []
        for key in unknown:
            close = [f"model.{other}" for other in close_matches(key, known)[:1]]
            hints.append(f"unknown key 'model.{key}'{did_you_mean_suffix(close)}")
        fix = f"model {name} has: {', '.join(known) or 'no keys of its own'}"
        raise UsageError("; ".join(hints), fix=fix)
    try:
        if name in MODELS:
            return model_family(name)(classes, channels, image_size, **options)
        return zoo.build_zoo_model(name, classes, channels, image_size, **options)
    except UsageError:
        raise
    # For example a text where a number belongs, or more weights than fit into memory.
    except FAILURES as error:
        raise _explain(name, error, fix=f"received {dict(options)}") from error


def model_family(name: str) -> Callable[..., nn.Module]:
    """The class behind a line of `MODELS`."""
    file, _, called = MODELS[name].partition(".")
    found: Callable[..., nn.Module] = getattr(import_module(f"convlens.models.{file}"), called)
    return found


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts a network's complete tensors, as a file has them, into `model`.

    Beside its tensors a state dict has version numbers of the modules, which a file of tensors
    lacks; MNASNet refuses to be loaded without. The file was written by this very class, so the
    network's own numbers are right.

    Raises:
        RuntimeError: names or shapes that differ.
    """
    state = OrderedDict(tensors)
    setattr(state, "_metadata", getattr(model.state_dict(), "_metadata"))  # noqa: B009, B010
    model.load_state_dict(state)


def model_options(name: str) -> dict[str, Any]:
    """The network's own options with their defaults.

    Of our families they are read from the constructor; of others None stands for the default.

    Raises:
        UsageError: no such network, with near misses.
    """
    if name not in MODELS:
        return zoo.zoo_options(name, MODELS)
    parameters = inspect.signature(model_family(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def try_out(
    name: str, channels: int, image_size: int, options: Mapping[str, Any], batch_size: int = 2
) -> nn.Module:
    """Build the network for two classes and run it once on zeros; return it.

    Random number generators are left as they were.

    Raises:
        UsageError: what `build` raises; images that are too small or otherwise unsuitable (names a
            size that works); a batch of one image where batch norm would see a single value.
        ResourceError: not enough memory for the network.
    """

    def works(size: int) -> bool:
        try:
            _forward_zeros(name, channels, size, options)
        except UsageError:
            return False
        return True

    try:
        model = _forward_zeros(name, channels, image_size, options)
    except UsageError as error:
        if image_size == 224 or not works(224):  # the image size is not the reason
            raise
        larger = [size for size in USUAL_SIZES if size > image_size]
        smaller = [size for size in reversed(USUAL_SIZES) if size < image_size]
        suits = next(filter(works, [*larger, *smaller]))
        reason = error.what.removeprefix(f"model {name}: ")
        raise UsageError(
            f"model {name} can't take images of {image_size} px: {reason}",
            fix=f"data.image_size={suits} works, or choose another network",
        ) from error
    if batch_size == 1:
        try:
            _forward_zeros(name, channels, image_size, options, train_on_one=True)
        except UsageError as error:
            raise UsageError(
                f"train.batch_size=1: {error.what}",
                fix="batch norm needs two values of each channel: train.batch_size=2 or more",
            ) from error
    return model


def _forward_zeros(
    name: str,
    channels: int,
    image_size: int,
    options: Mapping[str, Any],
    *,
    train_on_one: bool = False,
) -> nn.Module:
    """Build a network and run two images of zeros through it in eval mode, or one in train mode."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model = build_model(name, 2, channels, image_size, options)
        images = torch.zeros(1 if train_on_one else 2, channels, image_size, image_size)
        try:
            model.train(train_on_one)(images)
        except FAILURES as error:
            raise _explain(name, error) from error
    return model


def _explain(name: str, error: Exception, fix: str = "") -> ConvlensError:
    """Return the error to raise for a network that can't be built or run."""
    reason = " ".join(str(error).split())[:200]
    # torch has no class of its own for it; the words are those of its allocator for the CPU.
    if "DefaultCPUAllocator" in reason:
        return ResourceError(
            f"not enough memory for model {name}",
            where=reason,
            fix="use a smaller network or smaller images (data.image_size)",
        )
    return UsageError(f"model {name}: {reason}", fix=fix)
