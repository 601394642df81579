"""Registry of network families, and `build_model`, which builds any network by name.

To add a family, write one file in this folder and add one line to `MODELS`. The constructor takes
`(classes, channels, image_size, *, options)`. The network has two attributes: `stages`, the names
of its sub-modules in order, used by `look` and fine-tuning, and `head`, the name of its last linear
layer, which can be replaced. `tests/integration/test_contracts.py` tests every entry. Other names
are networks of torchvision, of timm as `timm/NAME` (`zoo.py`), or of the user as `FILE.py:NAME`
(`user_network.py`). `model_parts(model)` returns the stages and the head of any network.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from convlens import user_code
from convlens.errors import (
    ConvlensError,
    ResourceError,
    UsageError,
    close_matches,
    did_you_mean_suffix,
)
from convlens.models import user_network, zoo
from convlens.models.stages import DataInitialized, ModelParts, model_parts

__all__ = [
    "MODELS",
    "DataInitialized",
    "ModelParts",
    "build_model",
    "initializes_from_data",
    "is_user_network",
    "load_weights",
    "model_family",
    "model_options",
    "model_parts",
    "try_out",
]

# Module and class in this package, as text: importing torchvision takes a second or two.
MODELS: dict[str, str] = {
    "cnn": "cnn.CNN",
    "fastnet": "fastnet.FastNet",
    "resnet18": "resnet.ResNet18",
    "resnet34": "resnet.ResNet34",
    "resnet50": "resnet.ResNet50",
    "wrn": "resnet.WRN",
}
# Keys of the section `model` that every network has, for suggestions.
COMMON_KEYS = ("name", "weights", "trainable", "freeze_batch_norm")
# Image sizes to suggest where a network refuses the requested one. Every network accepts 224.
SUGGESTED_IMAGE_SIZES = (16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 288, 320, 384)
# What a network may raise for unsuitable options or images.
MODEL_ERRORS = (TypeError, ValueError, RuntimeError, OverflowError, AssertionError)


def build_model(
    name: str, classes: int, channels: int, image_size: int, options: Mapping[str, Any]
) -> nn.Module:
    """Build the network `name` for images `[N, channels, image_size, image_size]`.

    Args:
        classes: number of logits.
        options: the network's own options; see `model_options`.

    Raises:
        UsageError: unknown network, unknown options (all of them, with near misses), or an
            unsuitable value.
        ResourceError: not enough memory for the weights.
        ModelFileError: the network is user code that was not trusted.
    """
    if is_user_network(name):
        model = user_network.build_user_network(name, classes, channels, image_size, options)
        user_network.prepare_user_network(model, name, classes, channels, image_size)
        return model
    known = model_options(name)
    unknown = [key for key in options if key not in known]
    if unknown:
        problems = []
        for key in unknown:
            choices = [*known, *COMMON_KEYS]
            close = [f"model.{match}" for match in close_matches(key, choices)[:1]]
            problems.append(f"unknown key 'model.{key}'{did_you_mean_suffix(close)}")
        fix = f"options of model {name}: {', '.join(known) or 'none'}"
        raise UsageError("; ".join(problems), fix=fix)
    try:
        if name in MODELS:
            return model_family(name)(classes, channels, image_size, **options)
        return zoo.build_zoo_model(name, classes, channels, image_size, **options)
    except UsageError:
        raise
    except MODEL_ERRORS as error:  # e.g. text instead of a number, or too little memory
        raise _model_error(name, error, fix=f"received {dict(options)}") from error


def model_family(name: str) -> Callable[..., nn.Module]:
    """Import and return the class of an entry of `MODELS`."""
    module, _, class_name = MODELS[name].partition(".")
    family: Callable[..., nn.Module] = getattr(
        import_module(f"convlens.models.{module}"), class_name
    )
    return family


def is_user_network(name: str) -> bool:
    """Return whether a name means a network that a user wrote."""
    return name not in MODELS and user_code.is_user_code("models", name)


def initializes_from_data(model: nn.Module) -> TypeGuard[DataInitialized]:
    """Return whether a network of convlens computes some of its weights from images.

    Networks of users may have a method of the same name that does something else.
    """
    is_own = type(model).__module__.startswith("convlens.")
    return is_own and isinstance(model, DataInitialized)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load all tensors of a model file into `model`.

    A state dict also holds version numbers of the modules, which a model file lacks and without
    which MNASNet refuses to load. The file was written by the same class, so the version numbers
    of `model` apply.

    Raises:
        RuntimeError: names or shapes differ.
    """
    state_dict = OrderedDict(tensors)
    setattr(state_dict, "_metadata", getattr(model.state_dict(), "_metadata"))  # noqa: B009, B010
    model.load_state_dict(state_dict)


def model_options(name: str) -> dict[str, Any]:
    """Return the options of a network with their default values.

    For the families in `MODELS` they are read from the constructor. For other networks, None
    stands for the default of their library.

    Raises:
        UsageError: unknown network, with near misses.
    """
    if is_user_network(name):
        return user_network.network_options(name)
    if name not in MODELS:
        return zoo.zoo_options(name, MODELS)
    parameters = inspect.signature(model_family(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def try_out(
    name: str, channels: int, image_size: int, options: Mapping[str, Any], batch_size: int = 2
) -> nn.Module:
    """Build the network for two classes, run it once on zeros, and return it.

    The state of random number generators is restored.

    Raises:
        UsageError: as `build_model`; images of an unsuitable size (the error names one that
            works); a batch of one image where batch norm would get a single value per channel.
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
        larger = [size for size in SUGGESTED_IMAGE_SIZES if size > image_size]
        smaller = [size for size in reversed(SUGGESTED_IMAGE_SIZES) if size < image_size]
        suggestion = next(filter(works, [*larger, *smaller]))
        reason = error.what.removeprefix(f"model {name}: ")
        raise UsageError(
            f"model {name} can't take images of {image_size} px: {reason}",
            fix=f"data.image_size={suggestion} works, or choose another network",
        ) from error
    if batch_size == 1:
        try:
            _forward_zeros(name, channels, image_size, options, train_on_one=True)
        except UsageError as error:
            raise UsageError(
                f"train.batch_size=1: {error.what}",
                fix="use train.batch_size=2 or more: batch norm needs two values per channel",
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
        if is_user_network(name):
            model = user_network.build_user_network(name, 2, channels, image_size, options)
            classes = 2 if user_network.has_variable_outputs(name) else None
            user_network.prepare_user_network(model, name, classes, channels, image_size)
        else:
            model = build_model(name, 2, channels, image_size, options)
        images = torch.zeros(1 if train_on_one else 2, channels, image_size, image_size)
        try:
            model.train(train_on_one)(images)
        except MODEL_ERRORS as error:
            raise _model_error(name, error) from error
        except Exception as error:
            if is_user_network(name):
                raise user_network.code_error(name, error) from error
            raise
    return model


def _model_error(name: str, error: Exception, fix: str = "") -> ConvlensError:
    """Return the error to raise for a network that can't be built or run."""
    reason = " ".join(str(error).split())[:200]
    # torch has no exception class for this; the name is that of its CPU allocator.
    if "DefaultCPUAllocator" in reason:
        return ResourceError(
            f"not enough memory for model {name}",
            where=reason,
            fix="use a smaller network or smaller images (data.image_size)",
        )
    return UsageError(f"model {name}: {reason}", fix=fix)
