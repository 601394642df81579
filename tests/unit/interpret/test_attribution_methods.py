"""Attribution methods: their common contract, and their values against direct computations."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torchvision
from torch import Tensor, nn

from convlens import models
from convlens.errors import ModelFileError, UsageError
from convlens.interpret import attribution_methods, features
from convlens.interpret.attribution_methods import (
    METHODS,
    attribution_maps,
    choose_cam_layer,
    logits_and_shapes,
    occlusion_window,
)
from convlens.models.stages import name_parts
from helpers.attribution_networks import PATCH, SIZE, Reds, images_of, red_patch

every = pytest.mark.parametrize("name", list(METHODS))


def network(name: str = "resnet18", **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = models.build_model(name, 4, 3, SIZE, options)
    with torch.no_grad():  # statistics of norms as after training
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def without_in_place(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return copied


# The contract of every method


@every
def test_map_marks_the_evidence_for_and_against_a_class(name: str) -> None:
    method, model, images = METHODS[name], Reds(), red_patch()
    (found,) = attribution_methods.upsample_maps(
        attribution_maps(method, model, images, torch.tensor([1]), "stage"), SIZE
    )
    row, column = divmod(int(found.argmax()), SIZE)
    assert 8 <= row < 14
    assert 20 <= column < 26
    inside = found[PATCH]
    outside = found.sum() - inside.sum()
    assert inside.mean() > 10 * abs(outside) / (SIZE**2 - inside.numel())
    # It is evidence against the other class, or none.
    (other,) = attribution_methods.upsample_maps(
        attribution_maps(method, model, images, torch.tensor([0]), "stage"), SIZE
    )
    if method.signed:
        assert abs(divmod(int(other.argmin()), SIZE)[0] - 10.5) <= 5
        assert other[PATCH].mean() < 0
    else:
        assert other.min() >= 0
        assert other[PATCH].max() == 0


@every
@pytest.mark.parametrize("channels", [1, 3])
def test_maps_are_finite_and_the_network_is_unchanged(name: str, channels: int) -> None:
    torch.manual_seed(0)
    model = models.build_model("cnn", 3, channels, 12, {"widths": [4, 8]}).train()
    model.stage1.eval()
    model.get_parameter("classifier.bias").requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images, targets = torch.randn(5, channels, 12, 12), torch.tensor([0, 1, 2, 1, 0])
    method = METHODS[name]
    found = attribution_maps(method, model, images, targets, "stage2")
    assert found.shape == (5, 3, 3) if method.layered else (5, 12, 12)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert method.signed or found.min() >= 0
    if method.complete:
        with torch.no_grad(), features.without_weight_gradients(model):
            start = model(torch.zeros_like(images[:1]))
            rises = (model(images) - start).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found.sum((1, 2)), rises, rtol=0.06, atol=1e-3)
    assert not model.stage1.training
    assert model.stage2.training
    assert not model.get_parameter("classifier.bias").requires_grad
    assert model.get_parameter("classifier.weight").requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@every
def test_maps_do_not_depend_on_the_batch_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, targets = network("cnn", widths=[4, 8]), images_of(5), torch.arange(5) % 4
    whole = attribution_maps(METHODS[name], model, images, targets, "stage2")
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(attribution_methods, "MAX_PIXELS_PER_PASS", 2 * SIZE**2)
    parts = attribution_maps(METHODS[name], model, images, targets, "stage2")
    assert max(seen) <= 2
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@every
def test_maps_that_are_not_finite_are_refused(name: str) -> None:
    model = network("cnn", widths=[4, 8])
    with torch.no_grad():
        model.get_parameter("classifier.weight")[0, 0] = float("nan")
    with pytest.raises(ModelFileError, match="not finite for 3 of 3"):
        attribution_maps(
            METHODS[name], model, images_of(), torch.zeros(3, dtype=torch.int64), "stage2"
        )


# Values


def test_grad_cam_equals_the_values_computed_by_hand() -> None:
    """Two maps of 2 x 2, whose weights are those of the head over 4 positions."""
    model = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([[2.0, -1.0], [0.0, 4.0]]))
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[4.0, 0.0], [0.0, 1.0]]]])
    found = attribution_methods.grad_cam(model, maps, torch.tensor([0]), "0")
    # The gradient at each position is weight / 4, and so is its mean.
    expected = torch.tensor([[[0.0, 1.0], [1.5, 1.75]]])  # (2a - b) / 4, cut off at 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layer", ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.1", "layer2.0"])
@pytest.mark.parametrize("name", ["grad-cam", "grad-cam++"])
def test_maps_are_not_changed_by_in_place_operations(name: str, layer: str) -> None:
    """bn1 is followed by an in-place ReLU, bn2 by `out += identity`."""
    model, images, targets = network(), images_of(), torch.tensor([0, 3, 1])
    reference = without_in_place(model)
    outputs = {}

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        outputs["maps"] = output
        return output * 1  # a copy for `out += identity`

    reference.get_submodule(layer).register_forward_hook(keep)
    score = reference(images).gather(1, targets[:, None]).sum()
    (gradients,) = torch.autograd.grad(score, outputs["maps"])
    if name == "grad-cam":
        weights = gradients.mean((2, 3), keepdim=True)
    else:
        mass = outputs["maps"].clamp(min=0).sum((2, 3), keepdim=True)
        weights = (gradients.clamp(min=0) / (2 + mass * gradients.clamp(min=0))).sum(
            (2, 3), keepdim=True
        )
    expected = (weights * outputs["maps"]).sum(1).clamp(min=0).detach()
    found = attribution_maps(METHODS[name], model, images, targets, layer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.max() > 0


def test_grad_cam_pp_equals_the_paper_by_third_derivatives() -> None:
    """Equation 10 at each position: three derivatives of exp(logit) by autograd."""
    torch.manual_seed(3)
    tail = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    model = nn.Sequential(nn.Identity(), tail)
    maps = torch.rand(1, 2, 3, 3, dtype=torch.float64)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    score = float(tail(maps)[0, 1].detach())
    for k in range(2):
        weight = 0.0
        for i, j in itertools.product(range(3), range(3)):
            value_at = maps[0, k, i, j].clone().requires_grad_()
            changed = maps.clone()
            changed[0, k, i, j] = value_at
            derivatives, value = [], tail(changed)[0, 1].exp()
            for _ in range(3):
                (value,) = torch.autograd.grad(value, value_at, create_graph=True)
                derivatives.append(float(value.detach()))
            first, second, third = derivatives
            if first > 0:  # otherwise nothing is added, or the position is dead: 0 / 0
                alpha = second / (2 * second + float(maps[0, k].sum()) * third)
                weight += alpha * first
        expected += weight * maps[0, k]
    found = attribution_methods.grad_cam_pp(model, maps, torch.tensor([1]), "0")[0]
    # The factor exp(logit), which the implementation omits.
    torch.testing.assert_close(found * math.exp(score), expected.clamp(min=0))
    assert found.max() > 0


def test_integrated_gradients_of_a_linear_network_are_weight_times_pixel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 3, 2))
    images = torch.randn(2, 2, 3, 3)
    found = attribution_methods.integrated_gradients(model, images, torch.tensor([0, 1]), "")
    weights = model[1].weight.view(2, 2, 3, 3)
    torch.testing.assert_close(found, (weights * images).sum(1).detach())


def test_images_with_a_large_completeness_error_get_more_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The logit rises only near the image, which few steps miss."""

    class Late(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            mean = images.mean((1, 2, 3))[:, None]
            return torch.cat([mean, (mean - 0.97).clamp(min=0) * 100], 1)

    images, target = torch.ones(1, 3, 4, 4), torch.tensor([1])
    monkeypatch.setattr(attribution_methods, "INTEGRATION_STEPS", (5,))
    rough = float(attribution_methods.integrated_gradients(Late(), images, target, "").sum())
    monkeypatch.setattr(attribution_methods, "INTEGRATION_STEPS", (5, 200))
    fine = float(attribution_methods.integrated_gradients(Late(), images, target, "").sum())
    assert abs(rough - 3) > 0.15
    assert abs(fine - 3) < 0.15


def test_occlusion_is_the_mean_over_all_squares_that_cover_a_pixel() -> None:
    model, images = network("cnn", widths=[4]), images_of(2)[..., :13, :13]
    targets, (side, stride) = torch.tensor([2, 0]), occlusion_window(13)
    assert (side, stride) == (3, 1)
    found = attribution_methods.occlusion(model, images, targets, "")
    total, count = torch.zeros(2, 13, 13), torch.zeros(13, 13)
    with torch.no_grad():
        start = model(images).gather(1, targets[:, None])[:, 0]
        for i, j in itertools.product(range(0, 11, stride), range(0, 11, stride)):
            covered = images.clone()
            covered[:, :, i : i + side, j : j + side] = 0
            lost = start - model(covered).gather(1, targets[:, None])[:, 0]
            total[:, i : i + side, j : j + side] += lost[:, None, None]
            count[i : i + side, j : j + side] += 1
    torch.testing.assert_close(found, total / count, rtol=1e-4, atol=1e-5)


def test_occlusion_windows_cover_images_of_any_size() -> None:
    assert occlusion_window(32) == (6, 2)
    assert occlusion_window(224) == (45, 14)
    for size in range(1, 600):
        side, stride = occlusion_window(size)
        positions = -(-(size - side) // stride) + 1
        assert 1 <= stride <= side <= size, "every pixel is covered"
        assert positions <= 14


# Layers


def sides(name: str, size: int = SIZE, **options: object) -> str:
    model = models.build_model(name, 4, 3, size, options).eval()
    images = torch.zeros(1, 3, size, size)
    return choose_cam_layer(logits_and_shapes(model, images, features.stage_names(model))[1])


def test_deepest_stage_with_maps_of_three_by_three_is_chosen() -> None:
    assert sides("resnet18", stem="imagenet") == "layer2.1"  # 4x4; after it 2x2 and 1x1
    assert sides("resnet18", stem="imagenet", size=96) == "layer4.1"  # 3x3
    assert sides("resnet18", stem="cifar") == "layer4.1"
    assert sides("fastnet", widths=[4, 8, 8]) == "block3"
    # If no stage has 3x3, the deepest of the largest.
    assert choose_cam_layer({"a": (1, 4, 2, 2), "b": (1, 4, 2, 2), "c": (1, 4, 1, 1)}) == "b"


@pytest.mark.parametrize(
    ("shapes", "requested", "message"),
    [
        ({"a": (1, 4, 1, 1)}, None, "no stage with maps larger than 1x1"),
        ({}, None, "no stage with maps"),
        ({"a": (1, 4, 1, 1)}, "a", "'a' has maps of 1x1"),
        ({"fc": (1, 10)}, "fc", "'fc' is 10, not channels of square maps"),
        ({"swin": (1, 7, 7, 96)}, "swin", "'swin' is 7 x 7 x 96"),
        ({}, "unused", "'unused' is not used in the forward pass"),
    ],
)
def test_layers_without_maps_are_refused_with_the_methods_that_work(
    shapes: attribution_methods.LayerShapes, requested: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        choose_cam_layer(shapes, requested)
    assert "integrated-gradients, occlusion" in caught.value.fix


def test_pixel_methods_work_for_transformers_and_grad_cam_in_the_patch_embedding() -> None:
    torch.manual_seed(0)
    sizes = {"num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "num_classes": 4}
    model = torchvision.models.VisionTransformer(32, 8, 1, **sizes).eval()
    nn.init.normal_(model.heads.head.weight)
    name_parts(model, "heads.head")
    shapes = logits_and_shapes(model, images_of(), features.stage_names(model))[1]
    assert all(len(shape) == 3 for shape in shapes.values())
    with pytest.raises(UsageError, match="no stage with maps"):
        choose_cam_layer(shapes)
    assert choose_cam_layer(
        {"conv_proj": logits_and_shapes(model, images_of(), ["conv_proj"])[1]["conv_proj"]}
    )
    for name, method in METHODS.items():
        found = attribution_maps(method, model, images_of(2), torch.tensor([0, 3]), "conv_proj")
        assert found.isfinite().all(), name
        assert found.abs().max() > 0, name


def test_methods_are_selected_in_order_and_unknown_ones_refused() -> None:
    assert list(attribution_methods.select_methods(["occlusion", "grad-cam", "occlusion"])) == [
        "occlusion",
        "grad-cam",
    ]
    assert list(attribution_methods.select_methods(["all"])) == list(METHODS)
    with pytest.raises(UsageError, match="unknown attribution method 'gradcam'") as caught:
        attribution_methods.select_methods(["gradcam"])
    assert "grad-cam" in caught.value.fix
    with pytest.raises(UsageError, match="no attribution method given"):
        attribution_methods.select_methods([])
