"""fp16 loss scaling: torch's GradScaler with our optimizers, clipping and checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import optim
from convlens.device import Plan
from convlens.engine.loop import TrainLoop
from convlens.engine.numerics import INITIAL_LOSS_SCALE, make_grad_scaler
from convlens.models.cnn import CNN
from convlens.recipe import OptimConfig
from convlens.training import checkpoint
from convlens.training.checkpoint import BestEpoch, restore_checkpoint
from convlens.training.train import run_train_loop
from helpers.support import PLAN, begin, same, tiny
from helpers.train_loops import copy_state

OPTIMIZERS = [
    {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"name": "sgd", "lr": 0.1, "momentum": 0.0},
    {"name": "adam", "lr": 0.02},
    {"name": "adamw", "lr": 0.02, "weight_decay": 0.1},
    {"name": "muon", "lr": 0.05, "aux_lr": 0.1, "momentum": 0.6},
]
ids = [f"{o['name']}-{o.get('momentum', '')}" for o in OPTIMIZERS]
each_optimizer = pytest.mark.parametrize("options", OPTIMIZERS, ids=ids)


class Loss(nn.Module):
    """Cross entropy times a factor, with which gradients may overflow."""

    factor = 1.0

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, targets) * self.factor


def network() -> CNN:
    torch.manual_seed(0)
    return CNN(3, 1, 8, widths=[4, 6])


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 3


def scaled_loop(options: dict[str, Any], **scaler_options: Any) -> TrainLoop:
    """A loop on the CPU that scales the loss and, as on a GPU, does not read it in each step."""
    model = network()
    optimizer = optim.build_optimizer(model, OptimConfig(**options))
    scaler = torch.amp.GradScaler("cpu", **{"init_scale": INITIAL_LOSS_SCALE, **scaler_options})
    return TrainLoop(model, optimizer, Loss(), PLAN, scaler=scaler, check_loss_synchronously=False)


@each_optimizer
def test_a_scale_that_fits_changes_no_bit(options: dict[str, Any]) -> None:
    """The scale is a power of two, so scaling and unscaling are exact."""
    scaled = scaled_loop(options, growth_interval=3)
    reference_model = network()
    optimizer = optim.build_optimizer(reference_model, OptimConfig(**options))
    reference = TrainLoop(reference_model, optimizer, Loss(), PLAN)
    for seed in range(7):
        assert torch.equal(
            scaled.train_step(*batch(seed)).loss, reference.train_step(*batch(seed)).loss
        )
    same(copy_state(scaled.model, scaled.optimizer), copy_state(reference_model, optimizer))
    assert scaled.scaler.get_scale() == 4 * INITIAL_LOSS_SCALE  # doubled after steps 3 and 6


@each_optimizer
def test_a_step_whose_gradients_overflow_is_skipped(options: dict[str, Any]) -> None:
    """Both the first step, where there is no momentum yet, and a later one."""
    loop, reference = scaled_loop(options), scaled_loop(options)
    for seed in range(4):
        if seed in (0, 2):
            before = copy_state(loop.model, loop.optimizer)
            scale = loop.scaler.get_scale()
            loop.criterion.factor = 1e38  # type: ignore[attr-defined]
            loop.train_step(*batch(9))
            loop.criterion.factor = 1.0  # type: ignore[attr-defined]
            assert loop.scaler.get_scale() == scale / 2
            loop._buffers.restore()  # batch norm statistics were updated, as they should be
            after = copy_state(loop.model, loop.optimizer)
            same(before, {key: after[key] for key in before})
        loop.train_step(*batch(seed))
        reference.train_step(*batch(seed))
    first, second = (copy_state(each.model, each.optimizer) for each in (loop, reference))
    same(first, second)


@each_optimizer
def test_no_optimizer_reads_the_overflow_on_the_host(options: dict[str, Any]) -> None:
    """GradScaler reads it on the host for optimizers that do not support `found_inf`."""
    optimizer = optim.build_optimizer(network(), OptimConfig(**options))
    assert optimizer._step_supports_amp_scaling


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    """A step with clipping, in two micro-batches, equals one written with torch only."""
    model = network().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    plan = Plan("cpu", "fp32", "contiguous", micro_batch_size=4)
    scaler = make_grad_scaler("cpu")
    loop = TrainLoop(model, optimizer, Loss(), plan, clip_norm=0.01, scaler=scaler)
    expected = network().eval()
    nn.functional.cross_entropy(expected(batch(0)[0]), batch(0)[1]).backward()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), 0.01)
    assert float(norm) > 0.01
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    loop.train_step(*batch(0))
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_training_in_fp16_reduces_the_loss() -> None:
    """Training in fp16 on the CPU, which plans exclude only because it is slow."""
    plan = Plan("cpu", "fp16", "channels_last")
    model = plan.prepare_model(network())
    optimizer = optim.build_optimizer(model, OptimConfig(name="adamw", lr=0.02))
    loop = TrainLoop(model, optimizer, nn.CrossEntropyLoss(), plan, scaler=make_grad_scaler("cpu"))
    losses = [float(loop.train_step(*batch(0)).loss) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_resumed_run_has_the_same_loss_scale() -> None:
    (first, run_dir), (again, _) = begin(tiny(), "scaled"), begin(tiny(), "scaled")
    for job in (first, again):
        job.scaler = make_grad_scaler("cpu")
    assert first.scaler is not None
    assert again.scaler is not None
    records = run_train_loop(first, first.process_group)
    for _ in range(4):
        next(records)
    first.scaler.update(32.0)
    checkpoint.save_checkpoint(run_dir, first, BestEpoch("val_loss"), [])
    restore_checkpoint(run_dir, again, BestEpoch("val_loss"))
    assert first.scaler.state_dict() == again.scaler.state_dict()
    assert again.scaler.state_dict()["scale"] == 32.0
    assert again.scaler.state_dict()["_growth_tracker"] == 4
    list(records)
    list(run_train_loop(again, again.process_group))
    same(copy_state(first.model, first.optimizer), copy_state(again.model, again.optimizer))


def test_no_checkpoint_is_saved_after_a_non_finite_loss() -> None:
    """On a GPU a checkpoint may be due before the loop has read the loss."""
    job, run_dir = begin(tiny(), "failed")
    next(run_train_loop(job, job.process_group))
    job.state.loss_sum = torch.tensor(float("nan"))
    checkpoint.save_checkpoint(run_dir, job, BestEpoch("val_loss"), [])
    assert run_dir.state() is None
