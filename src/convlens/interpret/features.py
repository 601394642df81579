"""Which layers of a network are looked at, and what they give for a batch of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convlens.engine.inference import eval_mode
from convlens.errors import ModelFileError, UsageError, close_matches, did_you_mean_suffix
from convlens.interpret.inputs import InspectedModel
from convlens.models import model_parts
from convlens.models.stages import has_layers

Maps = dict[str, Tensor]


def stage_names(model: nn.Module) -> tuple[str, ...]:
    """The stem and each block: the network's stages, those that are a row of blocks taken apart.

    Of a ResNet-18 `maxpool`, `layer1.0`, `layer1.1`, ..., `layer4.1`, each behind its last ReLU.
    """
    found: list[str] = []
    for name in model_parts(model).stages:
        module = model.get_submodule(name)
        blocks = dict(module.named_children()) if isinstance(module, nn.Sequential) else {}
        if blocks and all(has_layers(block) for block in blocks.values()):
            found += [f"{name}.{block}" for block in blocks]
        else:
            found.append(name)
    return tuple(found)


def find_layers(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Checked names of layers, dotted as in `named_modules`; none given means `stages`.

    Raises:
        UsageError: layers that aren't there, all at once, with near misses.
    """
    if not names:
        return stage_names(model)
    there = [name for name, _ in model.named_modules() if name]
    wrong = [name for name in names if name not in there]
    if wrong:
        hints = [
            f"{name!r}{did_you_mean_suffix(close_matches(name, dict.fromkeys(there)))}"
            for name in wrong
        ]
        raise UsageError(
            f"the network has no layer {', '.join(hints)}",
            fix=f"its stages are: {', '.join(stage_names(model))}; any name inside them will do",
        )
    return tuple(dict.fromkeys(names))


@contextmanager
def record_outputs(model: nn.Module, layers: Sequence[str], *, copy: bool = True) -> Iterator[Maps]:
    """While it is open, each forward pass leaves the layers' outputs in the mapping it gives.

    Args:
        copy: outputs are cloned at once, since an in-place ReLU behind a layer would overwrite
            them. Without it they are the network's own tensors, for gradients to be asked of;
            only safe where nothing in place follows.

    A layer that is used several times in a pass leaves its last output. A layer that takes no part
    leaves none.
    """
    outputs: Maps = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            value = output[0] if isinstance(output, tuple | list) else output
            if isinstance(value, Tensor):
                outputs[name] = value.clone() if copy else value

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [keep(name) for name in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]


def layer_activations(model: nn.Module, images: Tensor, layers: Sequence[str]) -> Maps:
    """What each layer gives in eval mode, float32 `[N, C, H, W]` on the model's device.

    Args:
        images: normalised, `[N, C, H, W]`, on the model's device.

    Vectors `[N, D]` become `[N, D, 1, 1]`; other shapes (of transformers) are flattened behind
    the first two dimensions as far as they can be maps.

    Raises:
        UsageError: a layer that takes no part in the forward pass, or gives no activations.
    """
    with eval_mode(model), torch.inference_mode(), record_outputs(model, layers) as outputs:
        model(images)
    return as_maps(outputs, layers)


def as_maps(outputs: Mapping[str, Tensor], layers: Sequence[str]) -> Maps:
    """The outputs in the layers' order as float32 `[N, C, H, W]`.

    Tokens `[N, T, D]` become D maps of `[1, T]`.

    Raises:
        UsageError: a layer has left none, or something that is no maps.
    """
    missing = [name for name in layers if name not in outputs]
    if missing:
        raise UsageError(
            f"{', '.join(missing)}: takes no part in the forward pass", fix="name other layers"
        )
    found: Maps = {}
    for name in layers:
        value = outputs[name].float()
        if value.ndim == 2:
            value = value[:, :, None, None]
        elif value.ndim == 3:
            value = value.transpose(1, 2).unsqueeze(2)
        elif value.ndim != 4:
            raise UsageError(f"{name}: gives {list(value.shape)}, no maps", fix="name other layers")
        found[name] = value
    return found


# ---- penultimate ----------------------------------------
# The features that a network's last layer tells classes by.


class PenultimateOutputs(NamedTuple):
    """Features float32 `[B, D]` before the last layer, and logits `[B, K]`, on the CPU."""

    features: Tensor
    logits: Tensor


def penultimate_features(
    subject: InspectedModel, batches: Iterable[Tensor]
) -> Iterator[PenultimateOutputs]:
    """What goes into the head for each batch of uint8 images; maps are averaged over positions.

    Raises:
        UsageError: a network whose head isn't known; ModelFileError: features that are NaN.
    """
    model, name = subject.model, model_parts(subject.model).head
    if not name:
        raise UsageError(f"{subject.name}: its last layer isn't known", fix="look at another one")
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        value = inputs[0].float()
        kept[:] = [value.mean((2, 3)) if value.ndim == 4 else value.flatten(1)]

    handle = model.get_submodule(name).register_forward_pre_hook(keep)
    try:
        for images in batches:
            with torch.inference_mode():
                logits = model(subject.prepared(images)).float().cpu()
            features = kept[0].cpu()
            if not torch.isfinite(features).all():
                raise ModelFileError(
                    f"{subject.name}: the features before {name} are NaN or infinite",
                    fix="its training diverged: look at a run that didn't",
                )
            yield PenultimateOutputs(features, logits)
    finally:
        handle.remove()
