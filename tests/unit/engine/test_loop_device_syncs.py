"""No step waits for a GPU: rehearsed without one, on tensors that only say where they would be.

`FakeTensorMode` runs the real code on tensors of device `cuda` that hold no numbers. What would
read one (`.item()`, a mask as an index) fails, what would mix devices fails, and every copy
between host and device is seen. On a GPU the same is asked of CUDA itself.
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
from convlens.engine.numerics import make_grad_scaler
from convlens.models import stages
from convlens.recipe import Recipe
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


class Waits(TorchDispatchMode):
    """Fails, once `strict`, at copies between host and device and at tensors made of numbers."""

    strict = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        if "_fused_sgd_" in name:  # has nothing to run on tensors without numbers
            return None
        out = func(*args, **(kwargs or {}))
        where = {t.device.type for t in tree_leaves((args, out)) if isinstance(t, Tensor)}
        if self.strict and ("copy" in name or "lift" in name):
            assert where == {"cuda"}, f"{name} between {where}"
        return out


class NeverHere:
    """Numbers that are on their way; no event exists without a GPU."""

    def __init__(self, *tensors: Tensor) -> None:
        assert all(tensor.is_cuda for tensor in tensors if tensor.numel() != 1 or tensor.ndim)
        self.count = len(tensors)

    def ready(self) -> bool:
        return False

    def values(self) -> list[float]:
        return [1.0] * self.count


@contextmanager
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything that really asks for the device replaced; the rest is the real code."""

    def drawn(images: Tensor, generator: Any, rows: int, count: int = 0) -> Tensor:
        return torch.rand((rows, count or len(images)), device=images.device)

    for module in (color, geometry, mixup, auto_augment):
        monkeypatch.setattr(module, "uniform_numbers", drawn)
    make = loader._batch_generator
    monkeypatch.setattr(loader, "_batch_generator", lambda device, *parts: make("cpu", *parts))
    monkeypatch.setattr(
        loader, "to_device_async", lambda t, device: torch.empty_like(t, device=device)
    )  # pinned, so without waiting: test_later
    # Autocast asks the driver; the casts themselves are done as on the device.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(engine_loop, "seed_generators", lambda device, seed: None)
    monkeypatch.setattr(engine_loop, "AsyncScalars", NeverHere)
    monkeypatch.setattr(numerics, "AsyncScalars", NeverHere)
    constants = (random.constant, loader._affine, auto_augment.magnitudes)
    for cached in constants:
        cached.cache_clear()
    try:
        with FakeTensorMode():
            yield
    finally:
        for cached in constants:  # what they keep now holds no numbers
            cached.cache_clear()


def network(asked: Recipe, classes: int, channels: int, size: int) -> nn.Module:
    """On the device, channels last. (`Module.to` can't move what holds no numbers.)"""
    net = asked.model
    with torch.device("cuda"):
        model = models.build_model(net.name, classes, channels, size, net.options)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.ndim == 4:
                last = p.data.contiguous(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(last, p.requires_grad)
    stages.freeze(model, net.trainable)
    return model


def rehearse(asked: Recipe, monkeypatch: pytest.MonkeyPatch, precision: str = "bf16") -> int:
    """Two epochs of two steps by the real loop; from the second step on it may not wait."""
    size = asked.data.image_size
    size = size if isinstance(size, int) else 32
    channels = 1 if asked.data.name in GREY else 3
    plan = Plan("cuda", precision, "channels_last")
    with no_gpu_needed(monkeypatch):
        model = network(asked, 10, channels, size)

        def backward(*_: Any) -> None:  # autograd starts a thread for each real device
            for p in model.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None

        monkeypatch.setattr(Tensor, "backward", backward)
        count = 2 * 16 - 5
        images = torch.zeros(count, channels, size, size, dtype=torch.uint8, device="cuda")
        labels = torch.zeros(count, dtype=torch.int64, device="cuda")
        operations = pipeline.build_pipeline(
            asked.operations, image_size=size, channels=channels, classes=10
        )
        optimizer = optim.build_optimizer(model, asked.optim)
        scaler = make_grad_scaler("cuda") if precision == "fp16" else None
        feed = Batches(
            Split(ArrayRows(images), labels),
            batch_size=16,
            normalize=Normalize([0.5] * channels, [0.25] * channels),
            plan=plan,
            seed=0,
            augment=operations if asked.operations else None,
        )
        loop = engine_loop.TrainLoop(
            model,
            optimizer,
            nn.CrossEntropyLoss(label_smoothing=asked.optim.label_smoothing),
            plan,
            clip_value=asked.optim.clip_value,
            clip_norm=asked.optim.clip_norm,
            averager=optim.build_averager(model, asked.optim, steps=4),
            scaler=scaler,
        )
        records = loop.run(feed, optim.build_schedule(asked.optim), epochs=2, seed=0)
        watch, told = ProgressDisplay(Bar(), 2), []
        watch.interval_s = 0.0
        with Waits() as waits:
            waits.strict = False
            for record in records:
                waits.strict = True  # constants are sent in the first step
                told.append(record)
                if isinstance(record, engine_loop.Step):
                    watch.step(record)
        assert all(
            t.device.type == "cuda"
            for r in told
            if isinstance(r, engine_loop.Step)
            for t in (r.loss, r.num_correct)
        )
        return len(told)


class Bar:
    def advance(self, amount: int = 1, text: str | None = None) -> None:
        raise AssertionError("numbers that aren't there were shown")


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe.load_recipe(name)
    if asked.augment == "auto":
        asked = asked.replace(augment=[{"RandomHorizontalFlip": {}}])
    assert rehearse(asked, monkeypatch) == 6


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_optimiser_waits_for_the_device(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["optim.clip_norm=1", "optim.clip_value=0.1", f"optim.name={name}", "optim.ema=0.9"]
    asked = recipe.load_recipe("mnist", [*changes, "optim.lr=0.01", "model.dropout=0.2"])
    assert rehearse(asked, monkeypatch, precision) == 6


@pytest.mark.parametrize("name", AUGMENTS)
def test_no_augmentation_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe.load_recipe("digits", ["data.name=shapes"])
    asked = asked.replace(augment=[{name: ARGUMENTS.get(name, {})}])
    assert rehearse(asked, monkeypatch) == 6


def test_the_rehearsal_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of waiting fails in it."""
    with no_gpu_needed(monkeypatch):
        images = torch.zeros(4, 3, 8, 8, device="cuda")
        ways = {
            "item": lambda: images.sum().item(),
            "float": lambda: float(images[0, 0, 0, 0]),
            "if": lambda: bool(images.any()),
            "mask": lambda: images[images > 0],
            "nonzero": lambda: images.nonzero(),
            "upload": lambda: torch.tensor([1.0, 2.0], device="cuda"),
            "download": lambda: images.cpu(),
            "mixed": lambda: images + torch.zeros(8),
        }
        with Waits():
            images.add_(1).clamp_(0, 1)
            for name, way in ways.items():
                try:
                    way()
                except Exception:
                    continue
                pytest.fail(f"{name} went through")


# On a GPU


@contextmanager
def forbidden() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loop_on_gpu(asked: Recipe, plan: Plan) -> int:
    size = asked.data.image_size
    size = size if isinstance(size, int) else 32
    channels = 1 if asked.data.name in GREY else 3
    net = asked.model
    model = models.build_model(net.name, 10, channels, size, net.options)
    stages.freeze(model, net.trainable)
    model = plan.prepare_model(model)
    count = 9 * 16 - 5
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)
    operations = pipeline.build_pipeline(
        asked.operations, image_size=size, channels=channels, classes=10
    )
    optimizer = optim.build_optimizer(model, asked.optim)
    feed = Batches(
        Split(ArrayRows(images), torch.arange(count) % 10),
        batch_size=16,
        normalize=Normalize([0.5] * channels, [0.25] * channels),
        plan=plan,
        seed=0,
        augment=operations if asked.operations else None,
    )
    loop = engine_loop.TrainLoop(
        model,
        optimizer,
        nn.CrossEntropyLoss(label_smoothing=asked.optim.label_smoothing),
        plan,
        clip_value=asked.optim.clip_value,
        clip_norm=asked.optim.clip_norm,
        averager=optim.build_averager(model, asked.optim, 9),
        scaler=make_grad_scaler("cuda") if plan.precision == "fp16" else None,
    )
    records = loop.run(feed, optim.build_schedule(asked.optim), epochs=1, seed=0)
    watch, taken = ProgressDisplay(Silent(), 1), 0
    watch.interval_s = 0.0
    # Constants are sent in the first step, algorithms are chosen in the first ones.
    for _ in range(5):
        next(records)
    with forbidden():
        for record in records:
            if isinstance(record, engine_loop.Step):
                watch.step(record)
            taken += 1
    return taken


class Silent:
    def advance(self, amount: int = 1, text: str | None = None) -> None:
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_waits_for_a_real_device(name: str) -> None:
    asked = recipe.load_recipe(name)
    if asked.augment == "auto":
        asked = asked.replace(augment=[{"RandomHorizontalFlip": {}}])
    # A rate for batches of 2,000 would not stay finite here.
    asked = asked.replace(**{"optim.lr": 1e-4, "optim.groups": []})
    assert loop_on_gpu(asked, Plan("cuda", "bf16", "channels_last")) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_optimiser_waits_for_a_real_device(name: str, precision: str) -> None:
    changes = [f"optim.name={name}", "optim.clip_norm=1", "optim.clip_value=0.1", "optim.ema=0.9"]
    asked = recipe.load_recipe("mnist", [*changes, "optim.lr=0.001", "model.dropout=0.2"])
    assert loop_on_gpu(asked, Plan("cuda", precision, "channels_last")) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUGMENTS)
def test_no_augmentation_waits_for_a_real_device(name: str) -> None:
    asked = recipe.load_recipe("digits", ["data.name=shapes", "optim.lr=0.001"])
    asked = asked.replace(augment=[{name: ARGUMENTS.get(name, {})}])
    assert loop_on_gpu(asked, Plan("cuda", "fp32", "contiguous")) == 5
