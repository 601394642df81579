"""Stages and layers of a network, and their outputs for batches of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from convlens.engine.inference import eval_mode
from convlens.errors import ModelFileError, UsageError, close_matches, did_you_mean_suffix
from convlens.interpret.inputs import InspectedModel
from convlens.models import model_parts
from convlens.models.stages import has_layers

Maps = dict[str, Tensor]


def stage_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the stem and of each block.

    A stage that is a sequence of blocks is replaced by its blocks. For a ResNet-18: `maxpool`,
    `layer1.0`, `layer1.1`, ..., `layer4.1`, each after its last ReLU.
    """
    names: list[str] = []
    for name in model_parts(model).stages:
        module = model.get_submodule(name)
        blocks = dict(module.named_children()) if isinstance(module, nn.Sequential) else {}
        if blocks and all(has_layers(block) for block in blocks.values()):
            names += [f"{name}.{block}" for block in blocks]
        else:
            names.append(name)
    return tuple(names)


def find_layers(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Check names of layers, dotted as in `named_modules`, and remove duplicates.

    Without names, return `stage_names(model)`.

    Raises:
        UsageError: unknown layers, all at once, with close matches.
    """
    if not names:
        return stage_names(model)
    known = dict.fromkeys(name for name, _ in model.named_modules() if name)
    unknown = [name for name in names if name not in known]
    if unknown:
        hints = [f"{name!r}{did_you_mean_suffix(close_matches(name, known))}" for name in unknown]
        raise UsageError(
            f"the network has no layer {', '.join(hints)}",
            fix=f"its stages are: {', '.join(stage_names(model))}; layers inside them work, too",
        )
    return tuple(dict.fromkeys(names))


@contextmanager
def record_outputs(model: nn.Module, layers: Sequence[str], *, copy: bool = True) -> Iterator[Maps]:
    """Record the outputs of `layers` in the yielded dictionary during each forward pass.

    A layer that is used several times in a pass leaves its last output; a layer that is not used
    leaves none.

    Args:
        copy: clone the outputs at once, since an in-place ReLU after a layer would overwrite
            them. Without it they are the network's own tensors, for which gradients can be
            computed; this is only safe if no in-place operation follows.
    """
    outputs: Maps = {}

    def register(name: str) -> RemovableHandle:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            value = output[0] if isinstance(output, tuple | list) else output
            if isinstance(value, Tensor):
                outputs[name] = value.clone() if copy else value

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [register(name) for name in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients of weights, which are not needed and cost a third of the time."""
    requires_grad: Mapping[nn.Parameter, bool] = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        with eval_mode(model):
            yield
    finally:
        for parameter, required in requires_grad.items():
            parameter.requires_grad_(required)


def layer_activations(model: nn.Module, images: Tensor, layers: Sequence[str]) -> Maps:
    """Return the outputs of layers in eval mode, in the shapes of `as_maps`.

    Args:
        images: normalized, `[N, C, H, W]`, on the model's device.
        layers: names of layers, as `find_layers` returns them.

    Returns:
        float32 `[N, C, H, W]` by layer, on the model's device.

    Raises:
        UsageError: a layer that is not used in the forward pass, or whose output is not a map.
    """
    with eval_mode(model), torch.inference_mode(), record_outputs(model, layers) as outputs:
        model(images)
    return as_maps(outputs, layers)


def as_maps(outputs: Mapping[str, Tensor], layers: Sequence[str]) -> Maps:
    """Return recorded outputs as float32 `[N, C, H, W]`, in the order of `layers`.

    Vectors `[N, D]` become D maps of 1 x 1, tokens `[N, T, D]` become D maps of 1 x T.

    Raises:
        UsageError: a layer that was not used in the forward pass, or whose output is not a map.
    """
    missing = [name for name in layers if name not in outputs]
    if missing:
        raise UsageError(
            f"{', '.join(missing)}: not used in the forward pass", fix="choose other layers"
        )
    maps: Maps = {}
    for name in layers:
        value = outputs[name].float()
        if value.ndim == 2:
            value = value[:, :, None, None]
        elif value.ndim == 3:
            value = value.transpose(1, 2).unsqueeze(2)
        elif value.ndim != 4:
            raise UsageError(
                f"{name}: an output of shape {list(value.shape)} has no maps",
                fix="choose other layers",
            )
        maps[name] = value
    return maps


class PenultimateOutputs(NamedTuple):
    """Input of the head and logits for a batch, on the CPU.

    Attributes:
        features: float32 `[B, D]`.
        logits: float32 `[B, K]`.
    """

    features: Tensor
    logits: Tensor


def penultimate_features(
    subject: InspectedModel, batches: Iterable[Tensor]
) -> Iterator[PenultimateOutputs]:
    """Yield the input of the head for each batch; maps are averaged over positions.

    Args:
        subject: the network.
        batches: uint8 images `[B, C, S, S]`.

    Raises:
        UsageError: a network whose head is unknown.
        ModelFileError: features that are NaN or infinite.
    """
    model, head = subject.model, model_parts(subject.model).head
    if not head:
        raise UsageError(f"{subject.name}: its last layer is unknown", fix="use another network")
    head_inputs: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        value = inputs[0].float()
        head_inputs[:] = [value.mean((2, 3)) if value.ndim == 4 else value.flatten(1)]

    handle = model.get_submodule(head).register_forward_pre_hook(hook)
    try:
        for images in batches:
            with torch.inference_mode():
                logits = model(subject.prepared(images)).float().cpu()
            features = head_inputs[0].cpu()
            if not torch.isfinite(features).all():
                raise ModelFileError(
                    f"{subject.name}: the features before {head} are NaN or infinite",
                    fix="the training diverged: use another run",
                )
            yield PenultimateOutputs(features, logits)
    finally:
        handle.remove()
