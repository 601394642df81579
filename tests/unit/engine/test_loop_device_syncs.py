"""No step waits for a GPU, tested without a GPU on fake tensors of the device `cuda`.

`FakeTensorMode` runs the real code on tensors without values. Reading a value (`.item()`, a mask as
an index) fails, mixing devices fails, and every copy between host and device is detected. On a GPU
the same is tested with CUDA's own debug mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convlens import models, optim, recipe
from convlens.data import loader
from convlens.data.cache import ArrayRows
from convlens.data.loader import Batches, Normalize
from convlens.data.transforms import auto_augment, color, geometry, mixup, pipeline, random
from convlens.device import Plan
from convlens.engine import loop as engine_loop, numerics
from convlens.engine.losses import ClassificationLoss
from convlens.engine.numerics import make_grad_scaler
from convlens.models import stages
from convlens.recipe import Recipe
from convlens.training.transfer import choose_start
from convlens.utils.console import ProgressDisplay
from helpers.support import Split

RECIPES = recipe.recipe_names()
OPTIMIZERS = ["sgd", "adam", "adamw", "muon"]
AUGMENTS = [*pipeline.AUGMENTS, *pipeline.MIXES]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "RandomCrop": {"padding": 2, "fill": [0.1, 0.2, 0.3]},
    "RandomAffine": {"degrees": 9, "translate": [0.1, 0.1], "scale": [0.9, 1.1], "shear": 5},
    "RandomRotation": {"degrees": 9},
    "RandomErasing": {"value": [0.1, 0.2, 0.3]},
    "Cutout": {"size": 3},
    "ColorJitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1},
    "RandomAdjustSharpness": {"sharpness_factor": 2},
}
GREY = ("mnist", "digits")


class DetectSyncs(TorchDispatchMode):
    """Fail (once `strict`) on copies between host and device, also of tensors made from numbers."""

    strict = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        if "_fused_sgd_" in name:  # not implemented for fake tensors
            return None
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, out)) if isinstance(t, Tensor)}
        if self.strict and ("copy" in name or "lift" in name):
            assert devices == {"cuda"}, f"{name} between {devices}"
        return out


class NeverReady:
    """Replaces `AsyncScalars`, because CUDA events need a GPU; the copies never arrive."""

    def __init__(self, *tensors: Tensor) -> None:
        assert all(tensor.is_cuda for tensor in tensors if tensor.numel() != 1 or tensor.ndim)
        self.count = len(tensors)

    def ready(self) -> bool:
        return False

    def values(self) -> list[float]:
        return [1.0] * self.count


@contextmanager
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace everything that needs a real device; everything else is the real code."""

    def uniform_numbers(images: Tensor, generator: Any, rows: int, count: int = 0) -> Tensor:
        return torch.rand((rows, count or len(images)), device=images.device)

    for module in (color, geometry, mixup, auto_augment):
        monkeypatch.setattr(module, "uniform_numbers", uniform_numbers)
    make = loader._batch_generator
    monkeypatch.setattr(loader, "_batch_generator", lambda device, *parts: make("cpu", *parts))
    monkeypatch.setattr(
        loader, "to_device_async", lambda t, device: torch.empty_like(t, device=device)
    )  # from pinned memory, so without waiting: see test_device.py
    # Autocast queries the driver; the casts themselves are those of the device.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(engine_loop, "seed_generators", lambda device, seed: None)
    monkeypatch.setattr(engine_loop, "AsyncScalars", NeverReady)
    monkeypatch.setattr(numerics, "AsyncScalars", NeverReady)
    constants = (random.constant, loader._affine, auto_augment.magnitudes)
    for cached in constants:
        cached.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        for cached in constants:  # they now hold fake tensors
            cached.cache_clear()


def network(config: Recipe, classes: int, channels: int, size: int) -> nn.Module:
    """Build the network on the device, channels last (`Module.to` can't move fake tensors)."""
    net = config.model
    with torch.device("cuda"):
        model = models.build_model(net.name, classes, channels, size, net.options)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.ndim == 4:
                last = p.data.contiguous(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(last, p.requires_grad)
    stages.freeze(model, net.trainable)
    return model


def make_criterion(config: Recipe) -> nn.Module:
    """Build the loss of a recipe; with class weights, 2 for the first class."""
    options = config.optim
    if options.loss == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    return ClassificationLoss(
        [2.0, *[1.0] * 9], gamma=options.focal_gamma, label_smoothing=options.label_smoothing
    )


def count_records(config: Recipe, monkeypatch: pytest.MonkeyPatch, precision: str = "bf16") -> int:
    """Run two epochs of two steps; fail if it synchronizes from the second step on."""
    size = config.data.image_size
    size = size if isinstance(size, int) else 32
    channels = 1 if config.data.name in GREY else 3
    plan = Plan("cuda", precision, "channels_last")
    with no_gpu_needed(monkeypatch):
        model = network(config, 10, channels, size)

        def backward(*_: Any) -> None:  # autograd would start a thread per real device
            for p in model.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None

        monkeypatch.setattr(Tensor, "backward", backward)
        count = 2 * 16 - 5
        images = torch.zeros(count, channels, size, size, dtype=torch.uint8, device="cuda")
        labels = torch.zeros(count, dtype=torch.int64, device="cuda")
        operations = pipeline.build_pipeline(
            config.operations, image_size=size, channels=channels, classes=10
        )
        with torch.device("cuda"):
            criterion = make_criterion(config)
        optimizer = optim.build_optimizer(model, config.optim)
        scaler = make_grad_scaler("cuda") if precision == "fp16" else None
        feed = Batches(
            Split(ArrayRows(images), labels),
            batch_size=16,
            normalize=Normalize([0.5] * channels, [0.25] * channels),
            plan=plan,
            seed=0,
            augment=operations if config.operations else None,
        )
        loop = engine_loop.TrainLoop(
            model,
            optimizer,
            criterion,
            plan,
            clip_value=config.optim.clip_value,
            clip_norm=config.optim.clip_norm,
            averager=optim.build_averager(model, config.optim, steps=4),
            scaler=scaler,
        )
        records = loop.run(feed, optim.build_schedule(config.optim), epochs=2, seed=0)
        display, seen = ProgressDisplay(FailingBar(), 2), []
        display.interval_s = 0.0
        with DetectSyncs() as detector:
            detector.strict = False
            for record in records:
                detector.strict = True  # constants are copied in the first step
                seen.append(record)
                if isinstance(record, engine_loop.Step):
                    display.step(record)
        assert all(
            t.device.type == "cuda"
            for r in seen
            if isinstance(r, engine_loop.Step)
            for t in (r.loss, r.num_correct)
        )
        return len(seen)


class FailingBar:
    def advance(self, amount: int = 1, text: str | None = None) -> None:
        raise AssertionError("numbers that have not arrived were displayed")

    def set_total(self, total: int) -> None:
        raise AssertionError("the training is not shortened")


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = choose_start(recipe.load_recipe(name), None, []).recipe
    if config.augment == "auto":
        config = config.replace(augment=[{"RandomHorizontalFlip": {}}])
    assert count_records(config, monkeypatch) == 6


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_optimizer_waits_for_the_device(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["optim.clip_norm=1", "optim.clip_value=0.1", f"optim.name={name}", "optim.ema=0.9"]
    config = recipe.load_recipe("mnist", [*changes, "optim.lr=0.01", "model.dropout=0.2"])
    assert count_records(config, monkeypatch, precision) == 6


WEIGHTED = ["optim.loss=focal", "optim.label_smoothing=0.1"]


@pytest.mark.parametrize("augment", [[], [{"MixUp": {}}]], ids=["hard", "soft"])
def test_the_weighted_focal_loss_does_not_wait_for_the_device(
    augment: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe.load_recipe("mnist", WEIGHTED).replace(augment=augment)
    assert count_records(config, monkeypatch) == 6


@pytest.mark.parametrize("name", AUGMENTS)
def test_no_augmentation_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe.load_recipe("digits", ["data.name=shapes"])
    config = config.replace(augment=[{name: ARGUMENTS.get(name, {})}])
    assert count_records(config, monkeypatch) == 6


def test_every_kind_of_synchronization_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    with no_gpu_needed(monkeypatch):
        images = torch.zeros(4, 3, 8, 8, device="cuda")
        synchronizing = {
            "item": lambda: images.sum().item(),
            "float": lambda: float(images[0, 0, 0, 0]),
            "if": lambda: bool(images.any()),
            "mask": lambda: images[images > 0],
            "nonzero": lambda: images.nonzero(),
            "upload": lambda: torch.tensor([1.0, 2.0], device="cuda"),
            "download": lambda: images.cpu(),
            "mixed": lambda: images + torch.zeros(8),
        }
        with DetectSyncs():
            images.add_(1).clamp_(0, 1)
            for name, call in synchronizing.items():
                try:
                    call()
                except Exception:
                    continue
                pytest.fail(f"{name} was not detected")


# On a GPU


@contextmanager
def no_syncs() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def count_records_on_gpu(config: Recipe, plan: Plan) -> int:
    size = config.data.image_size
    size = size if isinstance(size, int) else 32
    channels = 1 if config.data.name in GREY else 3
    net = config.model
    model = models.build_model(net.name, 10, channels, size, net.options)
    stages.freeze(model, net.trainable)
    model = plan.prepare_model(model)
    num_images = 9 * 16 - 5
    images = torch.randint(0, 256, (num_images, channels, size, size), dtype=torch.uint8)
    operations = pipeline.build_pipeline(
        config.operations, image_size=size, channels=channels, classes=10
    )
    optimizer = optim.build_optimizer(model, config.optim)
    feed = Batches(
        Split(ArrayRows(images), torch.arange(num_images) % 10),
        batch_size=16,
        normalize=Normalize([0.5] * channels, [0.25] * channels),
        plan=plan,
        seed=0,
        augment=operations if config.operations else None,
    )
    loop = engine_loop.TrainLoop(
        model,
        optimizer,
        make_criterion(config).to("cuda"),
        plan,
        clip_value=config.optim.clip_value,
        clip_norm=config.optim.clip_norm,
        averager=optim.build_averager(model, config.optim, 9),
        scaler=make_grad_scaler("cuda") if plan.precision == "fp16" else None,
    )
    records = loop.run(feed, optim.build_schedule(config.optim), epochs=1, seed=0)
    display, count = ProgressDisplay(SilentBar(), 1), 0
    display.interval_s = 0.0
    # Constants are copied in the first step, algorithms are chosen in the first few.
    for _ in range(5):
        next(records)
    with no_syncs():
        for record in records:
            if isinstance(record, engine_loop.Step):
                display.step(record)
            count += 1
    return count


class SilentBar:
    def advance(self, amount: int = 1, text: str | None = None) -> None:
        pass

    def set_total(self, total: int) -> None:
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_waits_for_a_real_device(name: str) -> None:
    config = choose_start(recipe.load_recipe(name), None, []).recipe
    if config.augment == "auto":
        config = config.replace(augment=[{"RandomHorizontalFlip": {}}])
    # The learning rates of recipes for batches of 2,000 would diverge here.
    config = config.replace(**{"optim.lr": 1e-4, "optim.groups": []})
    assert count_records_on_gpu(config, Plan("cuda", "bf16", "channels_last")) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_optimizer_waits_for_a_real_device(name: str, precision: str) -> None:
    changes = [f"optim.name={name}", "optim.clip_norm=1", "optim.clip_value=0.1", "optim.ema=0.9"]
    config = recipe.load_recipe("mnist", [*changes, "optim.lr=0.001", "model.dropout=0.2"])
    assert count_records_on_gpu(config, Plan("cuda", precision, "channels_last")) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_weighted_focal_loss_does_not_wait_for_a_real_device(precision: str) -> None:
    config = recipe.load_recipe("mnist", [*WEIGHTED, "optim.lr=0.001"])
    config = config.replace(augment=[{"MixUp": {}}])
    assert count_records_on_gpu(config, Plan("cuda", precision, "channels_last")) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUGMENTS)
def test_no_augmentation_waits_for_a_real_device(name: str) -> None:
    config = recipe.load_recipe("digits", ["data.name=shapes", "optim.lr=0.001"])
    config = config.replace(augment=[{name: ARGUMENTS.get(name, {})}])
    assert count_records_on_gpu(config, Plan("cuda", "fp32", "contiguous")) == 5
