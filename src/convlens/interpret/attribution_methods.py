"""Methods of attribution: which places of an image speak for a class, and which against it.

A method is a function `(model, images, targets, layer) -> maps [N, h, w]` and a line in `METHODS`.
What is attributed is always the logit of the target class: a probability also moves when other
classes' logits do, and hardly moves where the network is sure. Where a method needs a picture
without content (integrated gradients, occlusion) it is the mean colour of the training images,
which is 0 after normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlens.engine.inference import eval_mode
from convlens.errors import ModelFileError, UsageError, lookup
from convlens.interpret import features

ComputeMaps = Callable[[nn.Module, Tensor, Tensor, str], Tensor]
LayerShapes = dict[str, tuple[int, ...]]

LEAST = 3  # maps smaller than 3x3 say too little of where
PIXELS = 16 * 224 * 224  # of the images that go through the network at once with gradients
MOST = 128  # images at once, however small
STEPS = (50, 200)  # of integrated gradients; the second where the first leaves too much out
TOLERANCE = 0.05  # what may be missing of the sum they must have


@dataclass(frozen=True)
class Method:
    """A method by which maps are made, and how they are to be read.

    Attributes:
        title: as it is written in the literature.
        unit: what a value is.
        layered: made in a layer (and as coarse as its maps), not in the pixels.
        signed: negative values speak against the class; otherwise there are none.
        complete: the values of a map add up to the class's logit less that of a picture of the
            mean colour.
    """

    title: str
    compute: ComputeMaps
    unit: str
    layered: bool = False
    signed: bool = False
    complete: bool = False


def grad_cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    """The layer's maps, weighted by their mean gradients, summed; negative sums are cut off.

    Selvaraju et al. 2017, ICCV (arXiv:1610.02391), equations 1 and 2. One forward pass, and one
    backward down to the layer. Captum hands a copy of the layer's output on, so that what
    follows in place (ReLU, `out += identity`) changes neither maps nor gradients.
    """
    from captum.attr import LayerGradCam

    cam = LayerGradCam(model, model.get_submodule(layer))
    found: Tensor = cam.attribute(images, targets, relu_attributions=True)
    return found[:, 0]


def grad_cam_pp(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    """As Grad-CAM, with weights that count rises of the score by how far they would carry.

    Chattopadhay et al. 2018, WACV (arXiv:1710.11063), equations 5, 10 and 19 for Y = exp(logit),
    whose second and third derivatives are `Y g^2` and `Y g^3` where the network behind the layer
    is piecewise linear. So `alpha = g^2 / (2 g^2 + sum(A) g^3) = 1 / (2 + sum(A) g)`; the factor Y
    that all weights have in common is left out, since it overflows and changes no map's shape.
    `sum(A)` is over positive activations, as the paper's are: with GELU's small negative ones the
    denominator could become 0.
    """
    maps, slopes = _maps_and_slopes(model, images, targets, layer)
    rises = slopes.clamp(min=0)
    mass = maps.clamp(min=0).sum((2, 3), keepdim=True)
    weights = (rises / (2 + mass * rises)).sum((2, 3), keepdim=True)
    return (weights * maps).sum(1).clamp(min=0)


def _maps_and_slopes(
    model: nn.Module, images: Tensor, targets: Tensor, layer: str
) -> tuple[Tensor, Tensor]:
    """The layer's output `[N, C, h, w]`, and the gradient of the target logits by it."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        outputs[:] = [output.detach().requires_grad_()]
        return outputs[0].clone()  # in-place operations behind the layer get the copy

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        chosen = model(images).gather(1, targets[:, None]).sum()
    finally:
        handle.remove()
    (slopes,) = torch.autograd.grad(chosen, outputs)
    return outputs[0].detach(), slopes


def integrated_gradients(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    """Gradients by the pixels, averaged on the way from the mean colour, times that way.

    Sundararajan et al. 2017, ICML (arXiv:1703.01365), summed over colours. A map adds up to the
    logit's rise on that way: 50 steps (Gauss-Legendre), 200 for images where 5% are missing then.
    """
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(model)
    found = torch.zeros_like(images)
    left = torch.arange(len(images), device=images.device)
    for steps in STEPS:
        part, gap = method.attribute(
            images[left],
            target=targets[left],
            n_steps=steps,
            internal_batch_size=max(at_once(images), len(left)),
            return_convergence_delta=True,
        )
        found[left] = part.detach().to(found.dtype)
        rise = part.detach().sum((1, 2, 3)) - gap
        left = left[gap.abs() > TOLERANCE * rise.abs()]
        if not len(left):
            break
    return found.sum(1)


def occlusion(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    """By how much the logit falls when a square of the mean colour covers a place.

    Zeiler and Fergus 2014, ECCV (arXiv:1311.2901). The value of a pixel is the mean over all
    positions of the square that cover it. See `windows` for its size.
    """
    from captum.attr import Occlusion

    channels = images.shape[1]
    sides, strides = zip(*(windows(size) for size in images.shape[2:]), strict=True)
    found: Tensor = Occlusion(model).attribute(
        images,
        (channels, *sides),
        strides=(channels, *strides),
        baselines=0,
        target=targets,
        perturbations_per_eval=max(1, at_once(images) // len(images)),
    )
    return found[:, 0]  # the square covers all colours alike


def windows(size: int) -> tuple[int, int]:
    """Side and stride of the square: a fifth and a sixteenth of the image's side.

    So there are at most 14 x 14 positions, and as many forward passes, for any size.
    """
    return max(1, round(size / 5)), max(1, math.ceil(size / 16))


METHODS: dict[str, Method] = {
    "grad-cam": Method("Grad-CAM", grad_cam, "logit (gradient x activation)", layered=True),
    "grad-cam++": Method("Grad-CAM++", grad_cam_pp, "gradient x activation", layered=True),
    "integrated-gradients": Method(
        "Integrated gradients", integrated_gradients, "logit", signed=True, complete=True
    ),
    "occlusion": Method("Occlusion", occlusion, "logit lost when covered", signed=True),
}


def select_methods(names: Sequence[str]) -> dict[str, Method]:
    """The methods asked for, in that order; `all` are all.

    Raises:
        UsageError: a name that is no method, with near misses; none given.
    """
    if not names:
        raise UsageError("no method of attribution", fix=f"choose from: all, {', '.join(METHODS)}")
    asked = [each for name in names for each in (METHODS if name == "all" else [name])]
    return {name: lookup(METHODS, name, "method of attribution") for name in asked}


@torch.no_grad()
def shapes_of(model: nn.Module, images: Tensor, names: Sequence[str]) -> tuple[Tensor, LayerShapes]:
    """Logits, and the shapes of what the layers give; a layer that takes no part has none."""
    with still(model), features.record_outputs(model, names, copy=False) as outputs:
        logits: Tensor = model(images)
    return logits.float(), {name: tuple(value.shape) for name, value in outputs.items()}


def find_layer(shapes: LayerShapes, asked: str | None = None) -> str:
    """The layer in which Grad-CAM is done: the one asked for, or the best among the stages.

    By default that is the deepest stage with maps of at least 3x3, and where no stage has such,
    the deepest of those with the largest. The last stage has learned most of the classes, but
    where it is down to a single point (a ResNet with ImageNet's stem on 32 px) it knows no place.
    Measured by deletion and insertion on CIFAR-10, 3x3 maps of a last stage beat 7x7 ones of the
    stage before it, while 2x2 ones were no better than chance.

    Args:
        shapes: of the stages, or of `asked`, in the order of the forward pass.

    Raises:
        UsageError: no layer has maps, or the one asked for hasn't, or they are 1x1.
    """
    sides = {name: _side(shape) for name, shape in shapes.items()}
    large = [
        name for name, side in sides.items() if side >= min(LEAST, max(sides.values(), default=0))
    ]
    if large and sides[large[-1]] > 1:
        return large[-1]
    others = ", ".join(name for name, method in METHODS.items() if not method.layered)
    if asked is None:
        what = "the network has no stage with maps larger than 1x1, which Grad-CAM needs"
    elif asked not in shapes:
        what = f"layer {asked!r} takes no part in the forward pass"
    elif sides[asked] == 1:
        what = f"layer {asked!r} gives maps of 1x1: Grad-CAM in it would be the same everywhere"
    else:
        shape = " x ".join(map(str, shapes[asked][1:]))
        what = f"layer {asked!r} gives {shape}, not channels of square maps"
    raise UsageError(what, fix=f"name another layer, or use {others}, which need none")


def _side(shape: tuple[int, ...]) -> int:
    """The side of square maps `[N, C, S, S]`; 0 for tokens and channels that come last.

    Images are square, so maps are; Swin's `[N, S, S, C]` are told apart by that.
    """
    return shape[2] if len(shape) == 4 and shape[2] == shape[3] else 0


def attribution_maps(
    method: Method, model: nn.Module, images: Tensor, targets: Tensor, layer: str
) -> Tensor:
    """float32 maps `[N, h, w]` on the CPU, a batch at a time, as fine as the method makes them.

    Args:
        images: normalised, `[N, C, H, W]`, on the model's device.
        targets: int64 `[N]`, the classes whose logits are attributed.
        layer: for methods that need one.

    Raises:
        ModelFileError: values that are not finite.
    """
    found = []
    with still(model):
        pairs = zip(images.split(at_once(images)), targets.split(at_once(images)), strict=True)
        for part, wanted in pairs:
            found.append(method.compute(model, part, wanted, layer).detach().float().cpu())
    maps = torch.cat(found)
    bad = ~maps.isfinite().flatten(1).all(1)
    if bad.any():
        raise ModelFileError(
            f"{method.title} has values that are not finite for {int(bad.sum())} of {len(bad)} "
            "images: the network's activations or gradients aren't",
            where=layer if method.layered else "",
            fix="name another --layer, or use a checkpoint from before the training diverged",
        )
    return maps


def upsample_maps(maps: Tensor, size: int) -> Tensor:
    """Maps `[N, h, w]` as fine as the images, `[N, size, size]`, bilinear between centres."""
    if maps.shape[1:] == (size, size):
        return maps
    wide = nn.functional.interpolate(maps[:, None], (size, size), mode="bilinear")
    return wide[:, 0]


def at_once(images: Tensor) -> int:
    """How many images go through the network together: memory is bounded by their pixels."""
    return max(1, min(MOST, PIXELS // (images.shape[2] * images.shape[3])))


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients for weights: nobody asks for them, and they cost a third."""
    learning: Mapping[nn.Parameter, bool] = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        with eval_mode(model):
            yield
    finally:
        for parameter, needed in learning.items():
            parameter.requires_grad_(needed)
