"""ResNets: equal to torchvision's in output and training; stems, dropout, channels."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from convlens import models, optim
from convlens.device import Plan, derive_seed
from convlens.errors import UsageError
from convlens.models.resnet import stem_for
from convlens.recipe import load_recipe
from convlens.training import train
from helpers.support import begin

PLAN = Plan("cpu", "fp32", "contiguous")


def build(
    name: str = "resnet18", size: int = 32, channels: int = 3, **options: object
) -> nn.Module:
    torch.manual_seed(0)
    return models.build_model(name, 10, channels, size, options)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_with_the_imagenet_stem_the_output_equals_torchvisions(name: str) -> None:
    ours = models.build_model(name, 1000, 3, 64, {"stem": "imagenet"}).eval()
    theirs = torchvision.models.get_model(name).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_number_of_parameters_for_ten_classes() -> None:
    # torchvision's 11,689,512, minus 513 weights for each of 990 classes.
    assert sum(p.numel() for p in build(stem="imagenet").parameters()) == 11689512 - 990 * 513
    # The CIFAR stem has 3x3 instead of 7x7 weights for each of 3 x 64 pairs of channels.
    assert sum(p.numel() for p in build(stem="cifar").parameters()) == 11181642 - 3 * 64 * 40


@pytest.mark.parametrize(
    ("stem", "sizes"),
    [("imagenet", [8, 4, 2, 1]), ("half", [16, 8, 4, 2]), ("cifar", [32, 16, 8, 4])],
)
def test_output_sizes_of_the_stages_by_stem(stem: str, sizes: list[int]) -> None:
    model = build(stem=stem).eval()
    sizes_seen = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: sizes_seen.append(output.shape[-1])
        )
    model(torch.randn(1, 3, 32, 32))
    assert sizes_seen == sizes


def test_the_automatic_stem_depends_on_the_image_size() -> None:
    assert [stem_for(size) for size in (28, 32, 48, 49, 96, 97, 224)] == [
        "cifar",
        "cifar",
        "cifar",
        "half",
        "half",
        "imagenet",
        "imagenet",
    ]
    assert isinstance(build(size=32).maxpool, nn.Identity)
    assert build(size=224).conv1.kernel_size == (7, 7)


def test_a_new_stem_is_initialized_as_in_torchvision() -> None:
    weight = build(stem="cifar", channels=1).conv1.weight.detach()
    assert weight.shape == (64, 1, 3, 3)
    # He initialization by fan-out: variance 2 / (64 * 9).
    assert float(weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_dropout_acts_after_each_relu_of_the_blocks() -> None:
    model = build(dropout=0.25, stem="imagenet")
    blocks = [m for m in model.modules() if isinstance(m, BasicBlock)]
    assert len(blocks) == 8
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(
                lambda module, inputs, output: calls.append((inputs[0].min(), output))
            )
    model.train()(torch.randn(4, 3, 32, 32))
    assert len(calls) == 16  # two ReLUs per block
    assert all(smallest >= 0 for smallest, _ in calls)  # inputs are outputs of the ReLU
    assert list(model.state_dict()) == list(build(stem="imagenet").state_dict())
    without_dropout = build(stem="imagenet")
    without_dropout.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), without_dropout.eval()(images))


def test_zero_init_makes_every_block_equal_to_its_shortcut() -> None:
    for name, kind in (("resnet18", BasicBlock), ("resnet50", Bottleneck)):
        model = build(name, zero_init=True, stem="imagenet").eval()
        block = next(m for m in model.modules() if isinstance(m, kind))
        shape = (2, block.conv1.in_channels, 8, 8)
        images = torch.rand(shape)
        shortcut = block.downsample(images) if block.downsample is not None else images
        torch.testing.assert_close(block(images), shortcut.relu())


@pytest.mark.parametrize(
    ("options", "message"), [({"stem": "cifr"}, "cifar"), ({"dropout": 1.0}, "dropout")]
)
def test_unsuitable_options_are_usage_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(**options)
    assert message in caught.value.what + caught.value.fix


def test_the_recipe_trains_like_a_plain_loop_with_torchvisions_network() -> None:
    """The recipe `resnet18` on a few images: the loss of each epoch, and the final weights."""
    few = [
        "data.name=shapes",
        "data.count=90",
        "data.image_size=32",
        "data.val_fraction=0.2",
        "augment=[]",
        "train.epochs=2",
        "train.batch_size=24",
        "train.precision=fp32",
        "train.memory_format=contiguous",
    ]
    job, run_dir = begin(load_recipe("resnet18", few), "ours")
    classes = len(job.data.classes)
    plain = torchvision.models.resnet18(num_classes=classes)
    plain.load_state_dict(job.model.state_dict())
    rows, _ = train.fit(job, run_dir)

    rows_of = job.data.train.rows
    images = job.preprocessing.normalize(rows_of.gather(torch.arange(len(job.data.train))), PLAN)
    labels = job.data.train.labels
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    steps = len(job.inputs.batches)
    factor = optim.build_schedule(job.recipe.optim)
    for epoch in (1, 2):
        generator = torch.Generator().manual_seed(derive_seed(0, epoch))
        losses = []
        for step, part in enumerate(torch.randperm(len(labels), generator=generator).split(24)):
            done = (epoch - 1) * steps + step
            optimizer.param_groups[0]["lr"] = 0.01 * factor(done / (2 * steps))
            loss = nn.functional.cross_entropy(plain.train()(images[part]), labels[part])
            loss.backward()
            nn.utils.clip_grad_value_(plain.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item() * len(part))
        assert rows[epoch - 1]["train_loss"] == pytest.approx(sum(losses) / len(labels), rel=1e-3)
    for name, tensor in plain.state_dict().items():
        found = job.model.state_dict()[name]
        torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-4, msg=name)
