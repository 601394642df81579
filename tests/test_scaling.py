"""The loss scale against torch's GradScaler, and optimisers that leave a step out on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import engine, optim
from convlens.device import Plan
from convlens.models.cnn import CNN
from convlens.resuming import states
from convlens.resuming.states import Best, restore
from convlens.schema import OptimConfig
from convlens.stepping.scaling import START, LossScale
from support import begin, same, tiny
from test_engine import everything

OPTIMISERS = [
    {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"name": "sgd", "lr": 0.1, "momentum": 0.0},
    {"name": "adam", "lr": 0.02},
    {"name": "adamw", "lr": 0.02, "weight_decay": 0.1},
    {"name": "muon", "lr": 0.05, "aux_lr": 0.1, "momentum": 0.6},
]
ids = [f"{o['name']}-{o.get('momentum', '')}" for o in OPTIMISERS]
every = pytest.mark.parametrize("asked", OPTIMISERS, ids=ids)


def network() -> CNN:
    torch.manual_seed(0)
    return CNN(3, 1, 8, widths=[4, 6])


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 3


def step(
    model: nn.Module, optimiser: Any, seed: int, scale: LossScale | None, blow_up: float = 1.0
) -> None:
    plan = Plan("cpu", "fp32", "contiguous")
    backward = Tensor.backward if scale is None else scale.backward

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels) * blow_up

    clip = scale.unscale if scale is not None else lambda: None
    engine.step(model, *batch(seed), objective, optimiser, plan, clip, backward=backward)


@every
def test_a_scale_that_fits_changes_no_bit(asked: dict[str, Any]) -> None:
    """It is a power of two, so that scaling and unscaling are exact."""
    ends = []
    for scaled in (False, True):
        model = network()
        optimiser = optim.build(model, OptimConfig(**asked))
        scale = LossScale(optimiser, "cpu", growth_steps=3) if scaled else None
        for seed in range(7):
            step(model, optimiser, seed, scale)
        ends.append(everything(model, optimiser))
        if scale is not None:
            assert float(scale.scale) == 4 * START  # doubled after steps 3 and 6
    same(*ends)


@every
def test_a_step_whose_gradients_overflow_is_left_out(asked: dict[str, Any]) -> None:
    """The first one, where there is no momentum yet, and a later one; averages don't see it."""
    ends = []
    for overflows in (False, True):
        model = network()
        optimiser = optim.build(model, OptimConfig(**asked))
        scale = LossScale(optimiser, "cpu")
        for seed in range(4):
            if overflows and seed in (0, 2):
                kept, statistics = float(scale.scale), [b.clone() for b in model.buffers()]
                before = everything(model, optimiser)
                step(model, optimiser, 9, scale, blow_up=1e38)
                assert float(scale.found_inf) == 1
                assert float(scale.scale) == kept / 2
                after = everything(model, optimiser)
                params = {key for key in before if "running" not in key and "num_" not in key}
                same({k: before[k] for k in params}, {k: after[k] for k in params & after.keys()})
                scale.scale.fill_(kept)
                for buffer, held in zip(model.buffers(), statistics, strict=True):
                    buffer.copy_(held)
            step(model, optimiser, seed, scale)
        ends.append(everything(model, optimiser))
    same(*ends)


def test_it_is_the_rule_of_grad_scaler() -> None:
    """Scale and weights, step by step, with overflows among them."""
    mine, theirs = network(), network()
    ours = torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9, fused=True)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    scale = LossScale(ours, "cpu", start=64.0, growth_steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    for seed in range(12):
        blow_up = 1e38 if seed in (4, 5, 9) else 1.0
        images, labels = batch(seed)
        loss = nn.functional.cross_entropy(mine(images), labels)
        scale.backward(loss * blow_up)
        scale.unscale()
        ours.step()
        ours.zero_grad()
        scaler.scale(nn.functional.cross_entropy(theirs(images), labels) * blow_up).backward()
        scaler.step(plain)
        scaler.update()
        plain.zero_grad()
        assert float(scale.scale) == scaler.get_scale(), seed
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_gradients_are_true_ones_before_they_are_clipped() -> None:
    model = network()
    optimiser = optim.build(model, OptimConfig(name="sgd", lr=0.1))
    scale = LossScale(optimiser, "cpu")
    images, labels = batch(0)
    for half in (slice(0, 4), slice(4, 8)):  # in two parts
        scale.backward(nn.functional.cross_entropy(model.eval()(images[half]), labels[half]) / 2)
    scale.unscale()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    for mine, p in zip(found, model.parameters(), strict=True):
        assert torch.allclose(mine, p.grad, rtol=1e-4, atol=1e-7)


def test_half_precision_learns_with_it() -> None:
    """The whole way in fp16 on the CPU, which `device.plans` refuses only because it is slow."""
    plan = Plan("cpu", "fp16", "channels_last")
    model = plan.place(network())
    optimiser = optim.build(model, OptimConfig(name="adamw", lr=0.02))
    scale, losses = LossScale(optimiser, "cpu"), []
    images, labels = batch(0)
    for _ in range(20):
        loss, _ = engine.step(
            model, images, labels, nn.CrossEntropyLoss(), optimiser, plan, scale.unscale,
            backward=scale.backward,
        )  # fmt: skip
        assert loss is not None
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_run_that_is_taken_up_has_its_scale() -> None:
    (first, place), (again, _) = begin(tiny(), "scaled"), begin(tiny(), "scaled")
    for setup in (first, again):
        setup.scale = LossScale(setup.optimiser, "cpu")
    assert first.scale is not None
    assert again.scale is not None
    records = first.fit()
    for _ in range(4):
        next(records)
    first.scale.scale.fill_(32.0)
    states.save(place, first, Best("val_loss"), [])
    restore(place, again, Best("val_loss"))
    same(first.scale.state(), again.scale.state())
    assert float(again.scale.scale) == 32.0
    assert int(again.scale.state()["good_steps"]) == 4
    list(records)
    list(again.fit())
    same(everything(first.trained, first.optimiser), everything(again.trained, again.optimiser))


def test_nothing_is_saved_once_a_loss_has_failed() -> None:
    """On a GPU a state may be due before the engine has noticed."""
    setup, place = begin(tiny(), "failed")
    next(setup.fit())
    setup.position.loss_sum = torch.tensor(float("nan"))
    states.save(place, setup, Best("val_loss"), [])
    assert place.state() is None
