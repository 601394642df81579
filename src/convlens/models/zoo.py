"""Networks of other libraries by name: torchvision's as they are there, timm's as `timm/NAME`.

Nothing is re-written here: they are built by their library, without weights, for the images'
channels and the number of classes, and get the names of their parts (`parts.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from convlens.errors import UsageError, close_matches, did_you_mean
from convlens.models.stages import last_layer, name_parts

TIMM = "timm/"
# The plain numbers among a torchvision builder's arguments, by the file it stands in. A builder
# that sets an argument itself (Swin's stochastic depth) can't be given it again.
OPTIONS: dict[str, tuple[str, ...]] = {
    "alexnet": ("dropout",),
    "convnext": ("stochastic_depth_prob",),
    "densenet": ("drop_rate",),
    "efficientnet": ("dropout", "stochastic_depth_prob"),
    "googlenet": ("dropout",),
    "inception": ("dropout",),
    "maxvit": (),
    "mnasnet": ("dropout",),
    "mobilenetv2": ("dropout",),
    "mobilenetv3": ("dropout",),
    "regnet": (),
    "resnet": ("zero_init_residual",),
    "shufflenetv2": (),
    "squeezenet": ("dropout",),
    "swin_transformer": ("dropout", "attention_dropout"),
    "vgg": ("dropout",),
    "vision_transformer": ("dropout", "attention_dropout"),
}
TIMM_OPTIONS = ("drop_rate", "drop_path_rate")


def zoo_names() -> list[str]:
    """torchvision's classification networks (those for detection, video, ... are not here)."""
    vision = import_module("torchvision.models")
    return cast(list[str], vision.list_models(module=vision))


def zoo_options(name: str, own: Iterable[str]) -> dict[str, Any]:
    """The options of a torchvision or timm network; None stands for the library's own default.

    Args:
        own: our own families, for the error.

    Raises:
        UsageError: no such network, with near misses; or timm isn't installed.
    """
    if name.startswith(TIMM):
        timm, called = _timm(), name.removeprefix(TIMM)
        if not timm.is_model(called):
            close = close_matches(called.partition(".")[0], timm.list_models())
            fix = did_you_mean(TIMM + c for c in close) or "see timm.list_models()"
            raise UsageError(f"timm has no network {called!r}", fix=fix)
        return dict.fromkeys(TIMM_OPTIONS)
    theirs = zoo_names()
    if name not in theirs:
        close = close_matches(name, dict.fromkeys([*own, *theirs]))
        choice = f"choose from: {', '.join(own)}, torchvision's or timm/NAME"
        fix = did_you_mean(close) or choice
        raise UsageError(f"unknown model {name!r}", fix=fix)
    return dict.fromkeys(OPTIONS.get(_file(name), ()))


def build_zoo_model(
    name: str, classes: int, channels: int, image_size: int, **options: float | None
) -> nn.Module:
    """The network `name` (known to `options_of`) without weights of its library."""
    given = {key: value for key, value in options.items() if value is not None}
    make = _from_timm if name.startswith(TIMM) else _from_torchvision
    model, head = make(name, classes, channels, image_size, given)
    if not isinstance(model.get_submodule(head), nn.Linear | nn.Conv2d):
        raise UsageError(f"model {name}: its head is no single layer", fix="choose another network")
    name_parts(model, head)
    return model


def _from_torchvision(
    name: str, classes: int, channels: int, image_size: int, options: Mapping[str, float]
) -> tuple[nn.Module, str]:
    file = _file(name)
    more: dict[str, Any] = {}
    if file in ("googlenet", "inception"):
        # The side outputs change what the network returns in training. Initialisation is said
        # for its default is announced to change.
        more = {"aux_logits": False, "init_weights": True}
    elif file == "vision_transformer":
        more = {"image_size": image_size}
    elif file == "maxvit":
        more = {"input_size": (image_size, image_size)}
    builder = import_module("torchvision.models").get_model_builder(name)
    with _NumbersOnCPU() if file == "regnet" else contextlib.nullcontext():
        model: nn.Module = builder(num_classes=classes, **more, **options)
    if channels != 3:
        _take_channels(model, channels)
    return model, last_layer(model)


def _from_timm(
    name: str, classes: int, channels: int, image_size: int, options: Mapping[str, float]
) -> tuple[nn.Module, str]:
    timm, called = _timm(), name.removeprefix(TIMM)
    config = timm.models.get_pretrained_cfg(called)
    # Only networks whose weights depend on it take the size of the image.
    sized = config is not None and config.fixed_input_size
    more = {"img_size": image_size} if sized else {}
    model: nn.Module = timm.create_model(
        called, num_classes=classes, in_chans=channels, **more, **options
    )
    layer = model.get_classifier()  # type: ignore[operator]
    found = [key for key, module in model.named_modules() if module is layer]
    if not found:
        raise UsageError(f"model {name}: it has no single classifier", fix="choose another network")
    return model, found[0]


def _take_channels(model: nn.Module, channels: int) -> None:
    """Replaces the first convolution by one for `channels`, initialised as the network did."""
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        old.out_channels,
        kernel_size=cast(tuple[int, int], old.kernel_size),
        stride=cast(tuple[int, int], old.stride),
        padding=cast(tuple[int, int], old.padding),
        bias=old.bias is not None,
    )
    with torch.no_grad():
        new.weight.copy_(old.weight[:, :channels])
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    model.set_submodule(name, new)


def _file(name: str) -> str:
    """The file of torchvision that a network's builder stands in."""
    builder = import_module("torchvision.models").get_model_builder(name)
    return str(builder.__module__.rpartition(".")[2])


def _timm() -> ModuleType:
    try:
        return import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UsageError("timm is not installed", fix="pip install timm") from error


class _NumbersOnCPU(TorchFunctionMode):
    """RegNets compute their widths with tensors, which need values on the meta device, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.arange, torch.tensor):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)
