"""The network a training begins with: built, filled with pretrained weights, frozen as asked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor, nn

from convlens import device, models
from convlens.data import Data, Split, channel_stats
from convlens.models import freezing
from convlens.recipe import Recipe
from convlens.run import Preprocessing
from convlens.starting import weights
from convlens.system.console import print_status


@dataclass(frozen=True)
class Begun:
    """What an unfinished run that began with pretrained weights has instead of their source.

    The network must be whole before anything is computed with it: a frozen trunk's activations are.
    """

    network: dict[str, Tensor]
    weights: dict[str, Any]  # as `weights.record` made it


def network(
    recipe: Recipe, data: Data, begun: Begun | None, where: str = "cpu"
) -> tuple[nn.Module, Preprocessing, dict[str, Any] | None]:
    """The network, the preprocessing its input needs, and the record of its pretrained weights.

    Args:
        recipe: resolved.
        begun: what an unfinished run has, whose pretrained weights are then not needed again.
        where: the device on which something is computed from the training images, if anything is.
    """
    net = recipe.model
    torch.manual_seed(device.seed_of(recipe.train.seed))
    model = models.build(net.name, len(data.classes), data.channels, data.image_size, net.options)
    record = _begin(recipe, data, model, begun) if net.weights != "none" else None
    preprocessing = _preprocessing(data, record)
    if record is None and isinstance(model, models.Initialised):
        model.initialise(_some_images(data.train, preprocessing, where))
    freezing.freeze(model, net.trainable)
    return model, preprocessing, record


def _begin(recipe: Recipe, data: Data, model: nn.Module, begun: Begun | None) -> dict[str, Any]:
    """Fills `model` with the pretrained weights asked for, says how, returns the record."""
    if begun is not None:
        models.load(model, begun.network)
        return begun.weights
    source = weights.find(recipe.model)
    fitted = weights.start(source, model, data.classes)
    print_status(f"weights of [bold]{escape(source.origin)}[/]")
    for line in fitted.lines():
        print_status(f"  {escape(line)}")
    return weights.record(source, fitted)


def _preprocessing(data: Data, record: dict[str, Any] | None) -> Preprocessing:
    """As the pretrained weights were trained, where that is known: a frozen trunk expects it."""
    told = weights.normalisation(record, data.channels) if record else None
    mean, std = told or channel_stats(data.train)
    return Preprocessing(data.image_size, data.channels, data.fit, mean, std)


def _some_images(split: Split, preprocessing: Preprocessing, where: str = "cpu") -> Tensor:
    """Up to 5,000 training images, evenly spaced, without augmentation: normalised float32.

    Of larger images fewer are taken, so that they never need more than 64 MB. On `where` if that
    is a GPU of NVIDIA's, else on the CPU: what is computed from them wants double precision.
    """
    count, *shape = split.rows.shape
    wanted = max(1, min(count, 5_000, (1 << 24) // math.prod(shape)))
    chosen = torch.linspace(0, count - 1, wanted, dtype=torch.float64).round().long()
    plan = device.Plan(where if where.startswith("cuda") else "cpu", "fp32", "contiguous")
    return preprocessing.normalise(split.rows.gather(chosen).to(plan.device), plan)
