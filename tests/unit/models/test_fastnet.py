"""The fastnet family: whitening against numpy, the network against a slow reference, its start."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlens import models, recipe, serialization
from convlens.data.splits import Split
from convlens.errors import UsageError
from convlens.models.fastnet import WHITEN_EPS, FastNet, whitening_filters
from convlens.run import Preprocessing
from convlens.runtime import RuntimeContext
from convlens.training.resolve import validate_recipe
from convlens.training.setup import _sample_images, build_training_job
from convlens.training.train import run_train_loop
from helpers.support import PLAN, Memory, images_of, pictures, same, tiny

FAST = ["model.name=fastnet", "model.widths=[4,8]"]


def correlated(count: int, channels: int, size: int) -> Tensor:
    """Images whose neighboring pixels and channels are correlated, as in photographs."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(count, channels, size + 2, size + 2, generator=generator)
    smooth = F.avg_pool2d(noise, 3, stride=1) * 3 + 0.7
    return smooth + 0.5 * smooth.roll(1, 1)


def patches(images: np.ndarray) -> np.ndarray:
    """Every 2x2 patch as a row, extracted one by one."""
    count, _, height, width = images.shape
    positions = [
        (n, y, x) for n in range(count) for y in range(height - 1) for x in range(width - 1)
    ]
    return np.stack([images[n, :, y : y + 2, x : x + 2].reshape(-1) for n, y, x in positions])


# Whitening


@pytest.mark.parametrize("channels", [1, 3])
def test_whitening_filters_equal_those_of_numpy(channels: int) -> None:
    images = correlated(6, channels, 7)
    rows = patches(images.numpy().astype(np.float64))
    values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False, bias=True))
    found = whitening_filters(images, 2, 0.01)
    size = 4 * channels
    assert found.shape == (2 * size, channels, 2, 2)
    assert torch.equal(found[size:], -found[:size])
    flat = found[:size].reshape(size, size).numpy()
    for filter_, value, vector in zip(flat, values, vectors.T, strict=True):
        expected = vector / np.sqrt(value + 0.01)
        sign = np.sign(filter_ @ expected)  # the sign of an eigenvector is arbitrary
        np.testing.assert_allclose(filter_, sign * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_whitened_patches_have_unit_covariance(channels: int) -> None:
    images = correlated(40, channels, 12)
    size = 4 * channels
    out = F.conv2d(images, whitening_filters(images, 2, 0.0)[:size])
    white = out.transpose(0, 1).reshape(size, -1)
    assert torch.allclose(torch.cov(white, correction=0), torch.eye(size), atol=1e-4)
    before = F.unfold(images, 2).transpose(0, 1).reshape(size, -1)
    assert not torch.allclose(torch.cov(before), torch.eye(size), atol=0.3)


def test_whitening_filters_do_not_depend_on_the_chunk_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = correlated(9, 3, 8)
    expected = whitening_filters(images, 2, WHITEN_EPS)
    monkeypatch.setattr("convlens.models.fastnet.CHUNK_VALUES", 12 * 8 * 8 * 2)
    assert torch.allclose(whitening_filters(images, 2, WHITEN_EPS), expected, atol=1e-5)


def test_whitening_of_constant_images_is_finite() -> None:
    filters = whitening_filters(torch.ones(3, 1, 8, 8), 2, WHITEN_EPS)
    assert torch.isfinite(filters).all()
    assert filters.abs().max() <= WHITEN_EPS**-0.5 * 1.001


# The network


def reference_forward(model: FastNet, images: Tensor, depth: int, blocks: int) -> Tensor:
    """The network in training mode, written with functions and weights by name."""
    weights = model.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() + weights[f"{name}.bias"].view(1, -1, 1, 1)

    x = F.gelu(F.conv2d(images, weights["whiten.weight"], weights["whiten.bias"]))
    for block in (f"block{i + 1}" for i in range(blocks)):
        x = F.conv2d(x, weights[f"{block}.conv1.weight"], padding=1)
        if x.shape[2] > 1:
            x = F.max_pool2d(x, 2)
        x = F.gelu(norm(x, f"{block}.norm1"))
        inner = norm(F.conv2d(x, weights[f"{block}.conv2.weight"], padding=1), f"{block}.norm2")
        if depth == 3:
            inner = F.conv2d(F.gelu(inner), weights[f"{block}.conv3.weight"], padding=1)
            inner = x + norm(inner, f"{block}.norm3")
        x = F.gelu(inner)
    return x.flatten(2).max(2).values @ weights["classifier.weight"].T / x.shape[1]


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (3, 13), (1, 28), (3, 32)])
def test_the_output_equals_a_slow_reference(depth: int, channels: int, size: int) -> None:
    torch.manual_seed(1)
    model = FastNet(5, channels, size, widths=(6, 9, 7), depth=depth).double()
    # In double precision, because norms over four values amplify rounding errors.
    images = correlated(4, channels, size).double()
    model.initialize(images)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter)
    expected = reference_forward(model, images, depth, 3)
    found = model.train()(images)
    assert torch.allclose(found, expected, atol=1e-9)
    assert found.std() > 0.01
    model.to(memory_format=torch.channels_last)
    again = model(images.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(again, expected, atol=1e-9)


def test_the_number_of_weights_is_that_of_airbench94() -> None:
    model = FastNet(10, 3, 32)
    whiten, widths = 24 * 12 + 24, (24, 64, 256, 256)
    convolutions = sum(9 * (a * b + b * b) for a, b in pairwise(widths))
    norms = 2 * sum(2 * width for width in widths[1:])  # two in each block, of scale and shift
    assert sum(p.numel() for p in model.parameters()) == whiten + convolutions + norms + 2560
    sizes = []
    for name in model.stages:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: sizes.append(output.shape[2])
        )
    model(torch.zeros(2, 3, 32, 32))
    assert sizes == [31, 15, 7, 3]


def test_frozen_parameters_and_initial_weights() -> None:
    torch.manual_seed(0)
    model = FastNet(10, 3, 32, widths=(64, 16), depth=3, batch_norm_momentum=0.3)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    norms = {f"block{i}.norm{k}.weight" for i in (1, 2) for k in (1, 2, 3)}
    assert frozen == {"whiten.weight", *norms}
    assert model.block1.norm1.momentum == 0.3
    assert all(
        torch.equal(model.get_parameter(n), torch.ones_like(model.get_parameter(n))) for n in norms
    )
    # A convolution is the identity on its first channels; the others are random.
    images = torch.randn(2, 24, 5, 5)
    out = model.block1.conv1(images)
    assert torch.equal(out[:, :24], images)
    assert out[:, 24:].std() > 0.1
    images = torch.randn(2, 64, 5, 5)
    assert torch.equal(model.block2.conv1(images), images[:, :16])
    assert not model.whiten.bias.any()


def test_the_scale_changes_the_learning_speed_of_the_head_and_not_its_logits() -> None:
    logits, updates = [], []
    for scale in (None, 1 / 9, 1.0):
        torch.manual_seed(0)
        model = FastNet(4, 1, 8, widths=(6,), scale=scale).train()
        images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        out = model(images)
        logits.append(out)
        out[:, 0].sum().backward()
        factor = 1 / 6 if scale is None else scale
        # A step of SGD moves the logits by the square of the scale.
        updates.append(model.classifier.weight.grad * factor / factor**2)
        assert torch.allclose(model.classifier.weight * 6 * factor, logits_weight(), atol=1e-6)
    assert torch.allclose(logits[0], logits[1], atol=1e-6)
    assert torch.allclose(logits[0], logits[2], atol=1e-6)
    assert torch.allclose(updates[0], updates[1], atol=1e-5)
    assert torch.allclose(updates[0], updates[2], atol=1e-5)
    assert logits[0].std() > 0


def logits_weight() -> Tensor:
    """The head's weights with standard deviation 1, drawn after all the others."""
    torch.manual_seed(0)
    return FastNet(4, 1, 8, widths=(6,), scale=1 / 6).classifier.weight


def test_bf16_is_close_to_fp32() -> None:
    torch.manual_seed(0)
    images = correlated(16, 3, 32)
    model = FastNet(10, 3, 32, widths=(16, 32, 32), scale=1.0).to(memory_format=torch.channels_last)
    model.initialize(images)
    expected = model.train()(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images.contiguous(memory_format=torch.channels_last)).float()
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    logits.sum().backward()
    assert torch.isfinite(model.block1.conv1.weight.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 4}, "model.depth=4"),
        ({"widths": []}, "model.widths=[]"),
        ({"widths": [4, -1]}, "model.widths=[4, -1]"),
        ({"batch_norm_momentum": 0}, "model.batch_norm_momentum=0"),
        ({"scale": 0}, "model.scale=0"),
        ({"scale": float("inf")}, "model.scale=inf"),
        ({"activation": "tanh"}, "unknown model.activation 'tanh'"),
        ({"widths": "wide"}, "model fastnet"),
        ({"width": 3}, "did you mean model.widths?"),
    ],
)
def test_unsuitable_options_are_usage_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        models.build_model("fastnet", 2, 1, 8, options)
    assert message in str(caught.value)


# In a run


def test_a_run_computes_the_whitening_from_its_training_images() -> None:
    config = tiny(*FAST)
    validate_recipe(config)
    data = images_of(config)
    job = build_training_job(config, data, RuntimeContext("cpu", quiet=True))
    images = job.preprocessing.normalize(
        data.train.rows.gather(torch.arange(len(data.train))), PLAN
    )
    expected = whitening_filters(images, 2, WHITEN_EPS)
    assert torch.equal(job.model.get_parameter("whiten.weight"), expected)
    before = job.model.get_parameter("block1.conv1.weight").detach().clone()
    for _ in run_train_loop(job, job.process_group):
        pass
    assert torch.equal(job.model.get_parameter("whiten.weight"), expected)
    assert not torch.equal(job.model.get_parameter("block1.conv1.weight"), before)
    # The whitening uses no random numbers.
    torch.manual_seed(7)
    first = FastNet(3, 1, 8)
    first.initialize(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    drawn = torch.rand(3)
    torch.manual_seed(7)
    FastNet(3, 1, 8)
    assert torch.equal(drawn, torch.rand(3))


def test_a_model_file_contains_the_whitening(tmp_path: Any) -> None:
    model = FastNet(3, 1, 9, widths=(4,)).eval()
    model.initialize(correlated(5, 1, 9))
    serialization.write_model_file(tmp_path / "m", model.state_dict(), {})
    again = models.build_model("fastnet", 3, 1, 9, {"widths": [4]})
    models.load_weights(again, serialization.read_model_file(tmp_path / "m")[0])
    same(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(30, 8, 30), (12_000, 8, 5_000), (9, 1024, 5)]
)
def test_images_for_the_initialization_are_evenly_spaced_and_bounded(
    count: int, size: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size == 1024:  # 64 MB hold 5 of them
        images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
        images[:, 0, 0, 0] = torch.arange(count)
    else:
        images = pictures(count, 1, size)
        images[:, 0, 0, 1] = torch.arange(count) // 256
    channels = images.shape[1]
    steps = Preprocessing(size, channels, "crop", [0.0] * channels, [1 / 255] * channels)
    split = Split(Memory(images), torch.zeros(count, dtype=torch.int64), [""] * count)
    found = _sample_images(split, steps)
    assert found.shape == (expected, channels, size, size)
    numbers = (found[:, 0, 0, 0] + (256 * found[:, 0, 0, 1] if size == 8 else 0)).round().long()
    assert (numbers[0], numbers[-1]) == (0, count - 1)
    gaps = numbers.diff()
    assert gaps.min() >= count // expected
    assert gaps.max() <= -(-count // expected)


def test_a_recipe_can_select_fastnet() -> None:
    config = recipe.load_recipe("digits", ["model.name=fastnet", "model.depth=3"])
    validate_recipe(config)
    assert config.model.options == {"depth": 3}
