"""Choice of the network and its initial weights: `auto` in the sections `model` and `optim`.

A training of photographs starts with a backbone that was trained on ImageNet, if one is on this
machine; nothing is downloaded. Small or grey images, such as digits and scans, have little in
common with ImageNet and start from scratch. `choose_start` replaces `auto` by the values of either
start, and says which and why. A run is identified by the recipe as it was requested; the values
are written into its recipe, so that a run that is continued keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convlens import models, run
from convlens.data.conversion import NativeImages
from convlens.errors import UsageError
from convlens.models.stages import model_parts
from convlens.models.zoo import TIMM_BY_NAME
from convlens.recipe import ModelConfig, Recipe
from convlens.training import pretrained
from convlens.training.backbones import (
    find_weights_package,
    install_command,
    installed_backbones,
)

# Images with a shorter typical side start from scratch: enlarged seven times, a digit of 28 px
# shows nothing that ImageNet's filters could recognize (docs/log.md).
MIN_SIDE = 48
# Image sizes of a fine-tuning: photographs are reduced to the first, and smaller images are
# enlarged to the second.
FINE_TUNING_SIZE, SMALL_FINE_TUNING_SIZE = 224, 128
# Random crops are this much smaller: they cost less, and objects in them are as large as in whole
# images (Touvron et al. 2019, "Fixing the train-test resolution discrepancy").
CROP_RATIO = 160 / 224
CROP_MULTIPLE = 16  # their size is a multiple of it, so that few layers need padding
# Networks of `installed_backbones` that take images of any size with the same weights.
ANY_SIZE = ("resnet18", "resnet34", "resnet50", *TIMM_BY_NAME)
# Share of the stages, from the input, that a fine-tuning keeps frozen: edges and textures are
# alike in all photographs, and these stages take most of the time.
FROZEN_SHARE = 0.4

FINE_TUNING: Mapping[str, Any] = {
    "model.freeze_batch_norm": True,
    "optim.lr": 1e-3,
    "optim.layer_decay": 0.7,
}
FROM_SCRATCH: Mapping[str, Any] = {
    "model.freeze_batch_norm": False,
    "optim.lr": 3e-3,
    "optim.layer_decay": 1.0,
}
# The network that is trained from scratch if `model.name` is `auto`; `cnn` has other defaults.
SCRATCH_NETWORK: Mapping[str, Any] = {"name": "cnn", "widths": [32, 64, 128, 256], "head": "avg"}


@dataclass(frozen=True)
class Start:
    """The network and the weights that a training starts with.

    Attributes:
        recipe: as requested, but without `auto` in the sections `model` and `optim`.
        reason: what was chosen and why, in one line; empty if nothing was left open.
    """

    recipe: Recipe
    reason: str = ""


# The values of `model.name` and `model.weights` of a pretrained network.
BackboneNames = tuple[str, str]


def has_open_start(recipe: Recipe) -> bool:
    """Return whether `auto` occurs in the sections `model` and `optim`."""
    config, optim = recipe.model, recipe.optim
    return "auto" in (
        config.name,
        config.weights,
        config.trainable,
        config.freeze_batch_norm,
        optim.lr,
        optim.layer_decay,
    )


def backbones_for(recipe: Recipe) -> list[BackboneNames]:
    """Return the names of the backbones on this machine, the best one first.

    They are looked up only if the recipe leaves the start open; otherwise none are returned.
    """
    if not has_open_start(recipe):
        return []
    return [(each.name, each.weights) for each in installed_backbones()]


def choose_start(
    requested: Recipe, native: NativeImages | None, backbones: Sequence[BackboneNames]
) -> Start:
    """Return the recipe with `auto` in the sections `model` and `optim` replaced, and the reason.

    Args:
        native: What the images are like; None while they are unknown: then the recipe that trains
            from scratch is returned.
        backbones: Those on this machine, the best one first (`backbones_for`).

    Raises:
        UsageError: `model.name` is `auto`, and the weights do not say what network they are of.
    """
    if not has_open_start(requested):
        return Start(requested)
    config, reason = requested.model, ""
    if config.weights == "auto":
        config, reason = _choose_weights(config, native, backbones)
    if config.name == "auto":
        config = _with_network_of_weights(config)
    if config.name == SCRATCH_NETWORK["name"]:
        config = ModelConfig(**{**SCRATCH_NETWORK, **config.model_dump(mode="json")})
    is_pretrained = config.weights != "none"
    if config.trainable == "auto":
        trainable = first_trained_stage(config) if is_pretrained else "all"
        config = config.model_copy(update={"trainable": trainable})
    recipe = requested.model_copy(update={"model": config})
    requested_values = {
        "model.freeze_batch_norm": config.freeze_batch_norm,
        "optim.lr": requested.optim.lr,
        "optim.layer_decay": requested.optim.layer_decay,
    }
    values = FINE_TUNING if is_pretrained else FROM_SCRATCH
    changes = {key: values[key] for key, value in requested_values.items() if value == "auto"}
    return Start(recipe.replace(**changes), reason)


def _choose_weights(
    config: ModelConfig, native: NativeImages | None, backbones: Sequence[BackboneNames]
) -> tuple[ModelConfig, str]:
    """Return the section with `weights`, and if it is `auto` `name`, replaced; and why."""
    if config.name != "auto":
        weights = next((weights for name, weights in backbones if name == config.name), "none")
        reason = ""
        if weights != "none":
            reason = f"{config.name} starts with pretrained weights ({weights})"
        elif config.name not in models.MODELS or config.name.startswith("resnet"):
            reason = f"{config.name} from scratch: no pretrained weights of it are on this machine"
        return config.model_copy(update={"weights": weights}), reason
    from_scratch = config.model_copy(update={"name": "cnn", "weights": "none"})
    if native is None:
        return from_scratch, ""
    if config.options:
        names = ", ".join(f"model.{key}" for key in config.options)
        return from_scratch, f"{names} without model.name: training a cnn from scratch"
    unlike = _unlike_photographs(native)
    if unlike:
        return from_scratch, f"{unlike}: training from scratch"
    if not backbones:
        return from_scratch, (
            "training from scratch, because no pretrained weights are on this machine; with them "
            f"photographs are usually recognized better: {install_command()}"
        )
    name, weights = backbones[0]
    reason = (
        f"photographs: starting with {name} pretrained on ImageNet ({weights}); "
        "model.name=cnn model.weights=none trains from scratch"
    )
    return config.model_copy(update={"name": name, "weights": weights}), reason


def _unlike_photographs(native: NativeImages) -> str:
    """Return in words why images have little in common with ImageNet; empty if they may."""
    if native.channels == 1:
        return "grey images"
    return f"small images ({native.side} px)" if native.side < MIN_SIDE else ""


def _with_network_of_weights(config: ModelConfig) -> ModelConfig:
    """Return the section with the network that the requested weights are of."""
    if config.weights == "none":
        return config.model_copy(update={"name": SCRATCH_NETWORK["name"]})
    package = find_weights_package(config.weights)
    if package is not None:
        return config.model_copy(update={"name": package.network})
    source = pretrained.run_of_weights(config)
    if source is not None:
        network = run.load_model(source.model_path).model_metadata["model"]
        if models.is_user_network(network["name"]):
            raise UsageError(
                f"the network of model.weights={config.weights} is user code, which must be named",
                fix=f"add model.name={network['name']}",
            )
        content = config.model_dump(mode="json")
        return ModelConfig(**{**network["options"], **content, "name": network["name"]})
    raise UsageError(
        f"model.weights={config.weights} does not say what network it is of",
        fix="set model.name, e.g. model.name=resnet18",
    )


def first_trained_stage(config: ModelConfig) -> str:
    """Return the value of `model.trainable` for a fine-tuning: all but the first stages.

    A ResNet is trained from `layer2` on, an EfficientNet from `blocks.2` on.
    """
    with torch.device("meta"):  # only its structure is needed
        model = models.build_model(config.name, 2, 3, 224, config.options)
    return trainable_from(model)


def trainable_from(model: nn.Module) -> str:
    """Return the `NAME+` of the first stage after the frozen ones; `all` if there is only one."""
    stages = model_parts(model).stages
    frozen = math.floor(FROZEN_SHARE * len(stages))
    return f"{stages[frozen]}+" if frozen else "all"


def choose_image_size(
    requested: Recipe, backbones: Sequence[BackboneNames], native: NativeImages
) -> int | None:
    """Return the image size of a fine-tuning if the recipe leaves it open; None from scratch."""
    if not has_open_start(requested):
        return None
    if choose_start(requested, native, backbones).recipe.model.weights == "none":
        return None
    return FINE_TUNING_SIZE if native.side >= SMALL_FINE_TUNING_SIZE else SMALL_FINE_TUNING_SIZE


def crop_size(recipe: Recipe, image_size: int) -> int | None:
    """Return the size of the random crops of a fine-tuning; None for the image size.

    Args:
        recipe: Without `auto` in the section `model`.
    """
    is_fine_tuning = recipe.model.weights != "none" and recipe.model.name in ANY_SIZE
    if not is_fine_tuning:
        return None
    size = CROP_MULTIPLE * round(CROP_RATIO * image_size / CROP_MULTIPLE)
    return size or image_size


def with_recorded_choices(requested: Recipe, recorded: Recipe) -> Recipe:
    """Return the requested recipe with every `auto` replaced by the choice that a run recorded."""
    values, chosen = requested.model_dump(mode="json"), recorded.model_dump(mode="json")
    if has_open_start(requested):  # with the options of the network that was chosen
        values["model"] = chosen["model"]
    for section in ("data", "model", "optim", "train"):
        for key, value in values[section].items():
            if value == "auto" and key in chosen[section]:
                values[section][key] = chosen[section][key]
    if values["augment"] == "auto":
        values["augment"] = chosen["augment"]
    if requested.train.minutes is not None:
        values["train"]["reference_images"] = chosen["train"]["reference_images"]
    return Recipe.model_validate(values)
