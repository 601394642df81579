"""Attribution methods: which parts of an image contribute to the logit of a class.

A method is a function `(model, images, targets, layer) -> maps [N, h, w]` and a line in `METHODS`.
It attributes the logit of the target class rather than its probability, which also changes with
the logits of other classes and hardly changes where the network is confident. Methods that need
a baseline image (integrated gradients, occlusion) use the mean color of the training images,
which is 0 after normalization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlens.errors import ModelFileError, UsageError, lookup
from convlens.interpret import features

ComputeMaps = Callable[[nn.Module, Tensor, Tensor, str], Tensor]
LayerShapes = dict[str, tuple[int, ...]]

MIN_CAM_SIDE = 3  # Grad-CAM maps smaller than 3 x 3 localize too little
MAX_PIXELS_PER_PASS = 16 * 224 * 224  # of the images in one pass with gradients
MAX_IMAGES_PER_PASS = 128
INTEGRATION_STEPS = (50, 200)  # the second for images whose completeness error is too large
COMPLETENESS_TOLERANCE = 0.05  # share of the expected sum that may be missing


@dataclass(frozen=True)
class Method:
    """An attribution method and how to read its maps.

    Attributes:
        title: name in the literature.
        compute: the function that computes the maps.
        unit: meaning of a value.
        layered: computed at a layer, at the resolution of its maps, rather than in pixels.
        signed: negative values are evidence against the class; otherwise there are none.
        complete: the values of a map add up to the logit minus that of the mean color.
    """

    title: str
    compute: ComputeMaps
    unit: str
    layered: bool = False
    signed: bool = False
    complete: bool = False


def grad_cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    """Grad-CAM: the layer's maps weighted by their mean gradients, summed and rectified.

    Selvaraju et al. 2017, ICCV (arXiv:1610.02391), equations 1 and 2. It takes one forward pass
    and one backward pass down to the layer. Captum passes on a copy of the layer's output, so
    in-place operations that follow (ReLU, `out += identity`) change neither maps nor gradients.
    """
    from captum.attr import LayerGradCam

    cam = LayerGradCam(model, model.get_submodule(layer))
    maps: Tensor = cam.attribute(images, targets, relu_attributions=True)
    return maps[:, 0]


def grad_cam_pp(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    """Grad-CAM++: Grad-CAM with weights from higher derivatives of the score.

    Chattopadhay et al. 2018, WACV (arXiv:1710.11063), equations 5, 10 and 19 for Y = exp(logit),
    whose second and third derivatives are `Y g^2` and `Y g^3` where the network after the layer
    is piecewise linear. So `alpha = g^2 / (2 g^2 + sum(A) g^3) = 1 / (2 + sum(A) g)`; the factor Y
    that all weights share is omitted, since it overflows and changes no map's shape. `sum(A)` is
    over positive activations, as in the paper: with GELU's small negative ones the denominator
    could become 0.
    """
    maps, gradients = _maps_and_gradients(model, images, targets, layer)
    positive = gradients.clamp(min=0)
    activation_sum = maps.clamp(min=0).sum((2, 3), keepdim=True)
    weights = (positive / (2 + activation_sum * positive)).sum((2, 3), keepdim=True)
    return (weights * maps).sum(1).clamp(min=0)


def _maps_and_gradients(
    model: nn.Module, images: Tensor, targets: Tensor, layer: str
) -> tuple[Tensor, Tensor]:
    """Return the layer's output `[N, C, h, w]` and the gradient of the target logits by it."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        outputs[:] = [output.detach().requires_grad_()]
        return outputs[0].clone()  # in-place operations after the layer change the copy

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        score = model(images).gather(1, targets[:, None]).sum()
    finally:
        handle.remove()
    (gradients,) = torch.autograd.grad(score, outputs)
    return outputs[0].detach(), gradients


def integrated_gradients(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    """Integrated gradients from the mean color to the image, summed over color channels.

    Sundararajan et al. 2017, ICML (arXiv:1703.01365). A map adds up to the difference of the
    logits. 50 steps (Gauss-Legendre), or 200 for images for which the sum is off by more than 5%.
    """
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(model)
    attributions = torch.zeros_like(images)
    pending = torch.arange(len(images), device=images.device)
    for steps in INTEGRATION_STEPS:
        values, delta = method.attribute(
            images[pending],
            target=targets[pending],
            n_steps=steps,
            internal_batch_size=max(images_per_pass(images), len(pending)),
            return_convergence_delta=True,
        )
        values = values.detach()
        attributions[pending] = values.to(attributions.dtype)
        expected = values.sum((1, 2, 3)) - delta
        pending = pending[delta.abs() > COMPLETENESS_TOLERANCE * expected.abs()]
        if not len(pending):
            break
    return attributions.sum(1)


def occlusion(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> Tensor:
    """Occlusion: the decrease of the logit when a square of the mean color covers a pixel.

    Zeiler and Fergus 2014, ECCV (arXiv:1311.2901). The value of a pixel is the mean over all
    positions of the square that cover it; see `occlusion_window` for its size.
    """
    from captum.attr import Occlusion

    channels = images.shape[1]
    sides, strides = zip(*(occlusion_window(size) for size in images.shape[2:]), strict=True)
    maps: Tensor = Occlusion(model).attribute(
        images,
        (channels, *sides),
        strides=(channels, *strides),
        baselines=0,
        target=targets,
        perturbations_per_eval=max(1, images_per_pass(images) // len(images)),
    )
    return maps[:, 0]  # the square covers all color channels, so they are equal


def occlusion_window(size: int) -> tuple[int, int]:
    """Return side and stride of the square: a fifth and a sixteenth of the image's side.

    That makes at most 14 x 14 positions, and as many forward passes, for any size.
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
    """Return the named methods, in the order of the names; `all` stands for all methods.

    Raises:
        UsageError: an unknown method, with close matches; no names.
    """
    if not names:
        raise UsageError(
            "no attribution method given", fix=f"choose from: all, {', '.join(METHODS)}"
        )
    expanded = [each for name in names for each in (METHODS if name == "all" else [name])]
    return {name: lookup(METHODS, name, "attribution method") for name in expanded}


@torch.no_grad()
def logits_and_shapes(
    model: nn.Module, images: Tensor, layers: Sequence[str]
) -> tuple[Tensor, LayerShapes]:
    """Return the logits and the shapes of the layers' outputs.

    A layer that is not used in the forward pass has no entry.
    """
    with (
        features.without_weight_gradients(model),
        features.record_outputs(model, layers, copy=False) as outputs,
    ):
        logits: Tensor = model(images)
    return logits.float(), {name: tuple(value.shape) for name, value in outputs.items()}


def choose_cam_layer(shapes: LayerShapes, requested: str | None = None) -> str:
    """Return the layer for Grad-CAM: the requested one, or the most suitable stage.

    That is the deepest stage with maps of at least 3 x 3, or, if there is none, the deepest stage
    with the largest maps. The last stage has learned most about the classes, but with maps of a
    single value (a ResNet with the ImageNet stem on 32 px images) it does not localize. Measured by
    deletion and insertion on CIFAR-10, 3 x 3 maps of the last stage beat 7 x 7 maps of the stage
    before it, whereas 2 x 2 maps were no better than chance.

    Args:
        shapes: output shapes of the stages, or of `requested`, in the order of the forward pass.
        requested: a layer given by the user.

    Raises:
        UsageError: no layer has maps, or the requested one has none or maps of 1 x 1.
    """
    sides = {name: _map_side(shape) for name, shape in shapes.items()}
    min_side = min(MIN_CAM_SIDE, max(sides.values(), default=0))
    suitable = [name for name, side in sides.items() if side >= min_side]
    if suitable and sides[suitable[-1]] > 1:
        return suitable[-1]
    if requested is None:
        problem = "the network has no stage with maps larger than 1x1, which Grad-CAM needs"
    elif requested not in shapes:
        problem = f"layer {requested!r} is not used in the forward pass"
    elif sides[requested] == 1:
        problem = f"layer {requested!r} has maps of 1x1: Grad-CAM would be constant"
    else:
        shape = " x ".join(map(str, shapes[requested][1:]))
        problem = f"the output of layer {requested!r} is {shape}, not channels of square maps"
    without_layer = ", ".join(name for name, method in METHODS.items() if not method.layered)
    raise UsageError(
        problem, fix=f"choose another layer, or use {without_layer}, which need no layer"
    )


def _map_side(shape: tuple[int, ...]) -> int:
    """Return the side of square maps `[N, C, S, S]`; 0 for tokens and for channels in last place.

    Images are square, so maps are, too; this distinguishes Swin's `[N, S, S, C]`.
    """
    return shape[2] if len(shape) == 4 and shape[2] == shape[3] else 0


def attribution_maps(
    method: Method, model: nn.Module, images: Tensor, targets: Tensor, layer: str
) -> Tensor:
    """Compute the maps of a method batch by batch.

    Args:
        method: one of `METHODS`.
        model: the network; its mode and `requires_grad` flags are restored.
        images: normalized, `[N, C, H, W]`, on the model's device.
        targets: int64 `[N]`, the classes whose logits are attributed.
        layer: for methods that are `layered`.

    Returns:
        float32 `[N, h, w]` on the CPU, at the resolution of the method.

    Raises:
        ModelFileError: values that are not finite.
    """
    parts = []
    size = images_per_pass(images)
    with features.without_weight_gradients(model):
        for x, y in zip(images.split(size), targets.split(size), strict=True):
            parts.append(method.compute(model, x, y, layer).detach().float().cpu())
    maps = torch.cat(parts)
    broken = ~maps.isfinite().flatten(1).all(1)
    if broken.any():
        raise ModelFileError(
            f"{method.title} is not finite for {int(broken.sum())} of {len(broken)} images, "
            "because activations or gradients are not",
            where=layer if method.layered else "",
            fix="choose another --layer, or a checkpoint from before the training diverged",
        )
    return maps


def upsample_maps(maps: Tensor, size: int) -> Tensor:
    """Resize maps `[N, h, w]` to `[N, size, size]`, bilinear between the centers of positions."""
    if maps.shape[1:] == (size, size):
        return maps
    resized = nn.functional.interpolate(maps[:, None], (size, size), mode="bilinear")
    return resized[:, 0]


def images_per_pass(images: Tensor) -> int:
    """Return how many images of this size to process at once, which bounds the memory."""
    return max(
        1, min(MAX_IMAGES_PER_PASS, MAX_PIXELS_PER_PASS // (images.shape[2] * images.shape[3]))
    )
