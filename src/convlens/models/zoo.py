"""Networks of torchvision, by their names there, and of timm, as `timm/NAME`.

Each network is built by its library, without pretrained weights, for the number of channels and
classes of the data. `stages.name_parts` then determines its stages and head.
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
# Networks of timm that need no prefix: pip packages have weights for them (`training.backbones`).
TIMM_BY_NAME = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
# Numeric arguments of torchvision's builders, by module. Arguments that a builder sets itself
# (Swin's stochastic depth) can't be passed.
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
    """Return the names of torchvision's classification networks (not of those for other tasks)."""
    torchvision_models = import_module("torchvision.models")
    return cast(list[str], torchvision_models.list_models(module=torchvision_models))


def timm_name(name: str) -> str | None:
    """Return the name that a network of timm has there; None for other networks."""
    if name in TIMM_BY_NAME:
        return name
    return name.removeprefix(TIMM) if name.startswith(TIMM) else None


def zoo_options(name: str, families: Iterable[str]) -> dict[str, Any]:
    """Return the options of a torchvision or timm network; None stands for the library's default.

    Args:
        families: names of the families of convlens, for the error.

    Raises:
        UsageError: unknown network, with near misses; or timm is not installed.
    """
    if (its_name := timm_name(name)) is not None:
        timm = import_timm()
        if not timm.is_model(its_name):
            close = close_matches(its_name.partition(".")[0], timm.list_models())
            fix = did_you_mean(TIMM + match for match in close) or "see timm.list_models()"
            raise UsageError(f"timm has no network {its_name!r}", fix=fix)
        return dict.fromkeys(TIMM_OPTIONS)
    torchvision_names = zoo_names()
    if name not in torchvision_names:
        close = close_matches(name, dict.fromkeys([*families, *TIMM_BY_NAME, *torchvision_names]))
        choices = f"choose from: {', '.join(families)}, a name in torchvision, or timm/NAME"
        raise UsageError(f"unknown model {name!r}", fix=did_you_mean(close) or choices)
    return dict.fromkeys(OPTIONS.get(_torchvision_module(name), ()))


def build_zoo_model(
    name: str, classes: int, channels: int, image_size: int, **options: float | None
) -> nn.Module:
    """Build a torchvision or timm network without pretrained weights; see `zoo_options`."""
    given = {key: value for key, value in options.items() if value is not None}
    build = _build_torchvision if timm_name(name) is None else _build_timm
    model, head = build(name, classes, channels, image_size, given)
    if not isinstance(model.get_submodule(head), nn.Linear | nn.Conv2d):
        raise UsageError(
            f"model {name}: its head is not a single layer", fix="choose another network"
        )
    name_parts(model, head)
    return model


def _build_torchvision(
    name: str, classes: int, channels: int, image_size: int, options: Mapping[str, float]
) -> tuple[nn.Module, str]:
    """Return the network and the name of its head."""
    module = _torchvision_module(name)
    extra: dict[str, Any] = {}
    if module in ("googlenet", "inception"):
        # With auxiliary outputs the network would return a tuple in training. `init_weights` is
        # set because torchvision has announced a change of its default.
        extra = {"aux_logits": False, "init_weights": True}
    elif module == "vision_transformer":
        extra = {"image_size": image_size}
    elif module == "maxvit":
        extra = {"input_size": (image_size, image_size)}
    builder = import_module("torchvision.models").get_model_builder(name)
    with _CPUConstants() if module == "regnet" else contextlib.nullcontext():
        model: nn.Module = builder(num_classes=classes, **extra, **options)
    if channels != 3:
        _set_input_channels(model, channels)
    return model, last_layer(model)


def _build_timm(
    name: str, classes: int, channels: int, image_size: int, options: Mapping[str, float]
) -> tuple[nn.Module, str]:
    """Return the network and the name of its head."""
    timm, its_name = import_timm(), timm_name(name) or name
    config = timm.models.get_pretrained_cfg(its_name)
    # Only networks whose weights depend on the image size accept it.
    has_fixed_size = config is not None and config.fixed_input_size
    extra = {"img_size": image_size} if has_fixed_size else {}
    model: nn.Module = timm.create_model(
        its_name, num_classes=classes, in_chans=channels, **extra, **options
    )
    classifier = model.get_classifier()  # type: ignore[operator]
    heads = [key for key, module in model.named_modules() if module is classifier]
    if not heads:
        raise UsageError(
            f"model {name}: it has no single classifier layer", fix="choose another network"
        )
    return model, heads[0]


def _set_input_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one for `channels`, with the network's initialization."""
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


def _torchvision_module(name: str) -> str:
    """Return the module of `torchvision.models` that defines a network."""
    builder = import_module("torchvision.models").get_model_builder(name)
    return str(builder.__module__.rpartition(".")[2])


def import_timm() -> ModuleType:
    """Import timm, which is optional.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UsageError("timm is not installed", fix="pip install timm") from error


class _CPUConstants(TorchFunctionMode):
    """Create constants on the CPU: RegNets compute their widths with tensors, also on `meta`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.arange, torch.tensor):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)
