"""Which layers of a network are looked at, and what they give for a batch of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convlens.errors import UsageError
from convlens.inference import evaluating
from convlens.models import parts
from convlens.models.parts import has_layers
from convlens.names import hint, near

Maps = dict[str, Tensor]


def stages(model: nn.Module) -> tuple[str, ...]:
    """The stem and each block: the network's stages, those that are a row of blocks taken apart.

    Of a ResNet-18 `maxpool`, `layer1.0`, `layer1.1`, ..., `layer4.1`, each behind its last ReLU.
    """
    found: list[str] = []
    for name in parts(model).stages:
        module = model.get_submodule(name)
        blocks = dict(module.named_children()) if isinstance(module, nn.Sequential) else {}
        if blocks and all(has_layers(block) for block in blocks.values()):
            found += [f"{name}.{block}" for block in blocks]
        else:
            found.append(name)
    return tuple(found)


def find(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Checked names of layers, dotted as in `named_modules`; none given means `stages`.

    Raises:
        UsageError: layers that aren't there, all at once, with near misses.
    """
    if not names:
        return stages(model)
    there = [name for name, _ in model.named_modules() if name]
    wrong = [name for name in names if name not in there]
    if wrong:
        hints = [f"{name!r}{hint(near(name, dict.fromkeys(there)))}" for name in wrong]
        raise UsageError(
            f"the network has no layer {', '.join(hints)}",
            fix=f"its stages are: {', '.join(stages(model))}; any name inside them will do",
        )
    return tuple(dict.fromkeys(names))


@contextmanager
def recording(model: nn.Module, layers: Sequence[str], *, copy: bool = True) -> Iterator[Maps]:
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


def activations(model: nn.Module, images: Tensor, layers: Sequence[str]) -> Maps:
    """What each layer gives in eval mode, float32 `[N, C, H, W]` on the model's device.

    Args:
        images: normalised, `[N, C, H, W]`, on the model's device.

    Vectors `[N, D]` become `[N, D, 1, 1]`; other shapes (of transformers) are flattened behind
    the first two dimensions as far as they can be maps.

    Raises:
        UsageError: a layer that takes no part in the forward pass, or gives no activations.
    """
    with evaluating(model), torch.inference_mode(), recording(model, layers) as outputs:
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
