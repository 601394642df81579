"""Caching the features of a frozen backbone does not change the training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convlens import models, optim
from convlens.data.loader import to_unit
from convlens.data.transforms.random import SampleInfo
from convlens.device import Plan, derive_seed
from convlens.errors import ResourceError, UsageError
from convlens.models.stages import freeze, frozen_prefix, set_train_mode
from convlens.recipe import load_recipe
from convlens.runtime import RuntimeContext
from convlens.training import feature_cache, train
from convlens.training.setup import TrainingJob, build_training_job
from helpers.support import begin, same

PLAN = Plan("cpu", "fp32", "contiguous")
RESNET = (
    "conv1",
    "bn1",
    "relu",
    "maxpool",
    "layer1",
    "layer2",
    "layer3",
    "layer4",
    "avgpool",
    "fc",
)


def resnet(trainable: str = "all") -> nn.Module:
    torch.manual_seed(0)
    model = models.build_model("resnet18", 4, 3, 32, {"stem": "imagenet"})
    freeze(model, trainable)
    return model


def test_backbone_and_head_equal_the_network_and_share_its_weights() -> None:
    model = resnet("last:4").eval()
    images = torch.randn(6, 3, 32, 32)
    prefix = frozen_prefix(model)
    assert feature_cache.is_sequential_split(model, prefix, images)
    head = feature_cache.trainable_head(model, prefix).eval()
    features = feature_cache.compute_features(
        model, prefix, images.split(4), torch.arange(6) % 4, PLAN
    )
    assert features.values.shape == (6, 128, 4, 4)
    torch.testing.assert_close(head(features.values), model(images), rtol=1e-5, atol=1e-5)
    assert head.fc.weight is model.fc.weight
    assert head.layer4[0].bn1.running_mean is model.layer4[0].bn1.running_mean
    with torch.no_grad():
        model.fc.bias += 1
    torch.testing.assert_close(head(features.values), model(images), rtol=1e-5, atol=1e-5)


def test_a_skip_connection_around_the_backbone_is_detected() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(images)) + images

    model = Skips()
    model.first.requires_grad_(False)
    assert not feature_cache.is_sequential_split(model, ["first"], torch.randn(2, 3, 4, 4))


def test_a_network_that_asserts_the_shape_of_its_input_is_detected() -> None:
    class Asserts(nn.Module):  # as torchvision's vision transformers do
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 3, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            torch._assert(images.shape[1] == 3, "three channels")
            return self.second(self.first(images))

    model = Asserts()
    model.first.requires_grad_(False)
    assert not feature_cache.is_sequential_split(model, ["first"], torch.randn(2, 3, 4, 4))


FROZEN = (
    "data.name=shapes",
    "data.count=90",
    "data.image_size=32",
    "data.val_fraction=0.2",
    "augment=[]",
    "model.trainable=layer4+",
    "train.epochs=3",
    "train.batch_size=16",
    "train.precision=fp32",
    "train.memory_format=contiguous",
    "optim.lr=0.05",
    "train.patience=null",
    "train.keep=last",
)


def trained(name: str, *overrides: str) -> tuple[TrainingJob, list[dict[str, float]]]:
    job, run_dir = begin(load_recipe("resnet18", [*FROZEN, *overrides]), name)
    rows, _ = train.fit(job, run_dir)
    return job, rows


UNEQUAL = (
    "data.balance=full",
    "optim.class_weights={circle: 3}",
    "optim.loss=focal",
    "train.epochs=2",
)


@pytest.mark.parametrize("options", [(), UNEQUAL], ids=["", "unequal"])
def test_training_on_cached_features_gives_the_same_results(options: tuple[str, ...]) -> None:
    cached, cached_rows = trained("cached", *options)
    uncached, uncached_rows = trained("plain", "train.cache_trunk=false", *options)
    assert cached.inputs.cached_bytes > 0
    assert cached.inputs.model is not cached.model
    assert uncached.inputs.cached_bytes == 0
    assert uncached.inputs.model is uncached.model
    for name, tensor in cached.model.state_dict().items():
        torch.testing.assert_close(tensor, uncached.model.state_dict()[name], rtol=2e-4, atol=2e-5)
    for cached_row, uncached_row in zip(cached_rows, uncached_rows, strict=True):
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
            assert cached_row[key] == pytest.approx(uncached_row[key], rel=1e-3, abs=1e-4), key
    frozen = [n for n in cached.model.state_dict() if not n.startswith(("layer4", "fc"))]
    first = build_training_job(
        cached.recipe, cached.data, RuntimeContext("cpu", quiet=True)
    ).model.state_dict()
    same({n: first[n] for n in frozen}, {n: cached.model.state_dict()[n] for n in frozen})


def test_training_on_fixed_views_equals_a_plain_loop() -> None:
    augment = 'augment=[{"RandomCrop": {"padding": 4}}, "RandomHorizontalFlip"]'
    views, _ = trained("views", augment, "train.views=2")
    assert isinstance(views.inputs.batches, feature_cache.ViewBatches)

    reference = build_training_job(views.recipe, views.data, RuntimeContext("cpu", quiet=True))
    model, rows = reference.model, reference.data.train.rows
    count = len(reference.data.train)
    shown = []
    for view in range(2):
        parts = []
        for chunk, index in enumerate(torch.arange(count).split(feature_cache.CHUNK_IMAGES)):
            seed = derive_seed(0, view, chunk, feature_cache.VIEW_SEED)
            generator = torch.Generator().manual_seed(seed)
            images, labels = to_unit(rows.gather(index)), reference.data.train.labels[index]
            info = SampleInfo(index, view + 1, 0)
            parts.append(reference.augment(images, labels, info, generator)[0])
        shown.append(reference.preprocessing.normalize(torch.cat(parts), PLAN))
    step = 0
    total = 3 * len(views.inputs.batches)
    for epoch in (1, 2, 3):
        order = torch.randperm(
            count, generator=torch.Generator().manual_seed(derive_seed(0, epoch))
        )
        set_train_mode(model)
        for part in order.split(16):
            for group in reference.optimizer.param_groups:
                group["lr"] = 0.05 * reference.schedule(step / total)
            logits = model(shown[(epoch - 1) % 2][part])
            nn.functional.cross_entropy(logits, reference.data.train.labels[part]).backward()
            nn.utils.clip_grad_value_([p for p in model.parameters() if p.requires_grad], 0.1)
            reference.optimizer.step()
            reference.optimizer.zero_grad()
            step += 1
    assert step == total
    for name, tensor in model.state_dict().items():
        trained_tensor = views.model.state_dict()[name]
        torch.testing.assert_close(trained_tensor, tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_impossible_views_are_refused() -> None:
    for overrides in (
        [],
        ["model.trainable=all", "augment=[RandomHorizontalFlip]"],
        ["augment=[MixUp]"],
        ["augment=[RandomHorizontalFlip]", "train.cache_trunk=false"],
    ):
        with pytest.raises(UsageError, match=r"train\.views=2"):
            begin(load_recipe("resnet18", [*FROZEN, "train.views=2", *overrides]), "refused")


def test_views_are_refused_if_later_layers_bypass_the_backbone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feature_cache, "is_sequential_split", lambda *_: False)
    views = ["augment=[RandomHorizontalFlip]", "train.views=2"]
    with pytest.raises(UsageError, match="later layers read more than the output of layer3"):
        begin(load_recipe("resnet18", [*FROZEN, *views]), "refused")


def test_features_too_large_for_memory_are_computed_in_each_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many_views = [*FROZEN, "augment=[RandomHorizontalFlip]", "train.views=9"]
    monkeypatch.setenv("CONVLENS_MEMORY", "1KB")
    job, _ = begin(load_recipe("resnet18", FROZEN), "small")
    assert job.inputs.cached_bytes == 0
    with pytest.raises(ResourceError, match=r"train\.views=9 needs"):
        begin(load_recipe("resnet18", many_views), "views")


def test_the_average_of_a_trainable_head_leaves_out_the_backbone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    head = feature_cache.trainable_head(model, ["0"])
    averager = optim.EMA(model, 0.5, trained=head)
    before = [tensor.clone() for tensor in averager.state()["average"]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    averager.update()
    changed = [
        not torch.equal(*pair) for pair in zip(before, averager.state()["average"], strict=True)
    ]
    assert changed == [False, False, True, True]
