"""The training loop equals a plain PyTorch loop bit for bit and stops before a bad update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from convlens import optim
from convlens.data.loader import Batches, Normalize
from convlens.device import Plan, derive_seed
from convlens.engine.loop import Epoch, NonFiniteLoss, Step, TrainLoop, TrainState
from convlens.models.cnn import CNN
from convlens.recipe import OptimConfig
from helpers.support import PLAN, Memory, Split, Streamed, pictures, same
from helpers.train_loops import Listed, copy_state

EPOCHS, SEED = 3, 11


def data(steps: int = 4) -> Listed:
    generator = torch.Generator().manual_seed(5)
    return Listed(
        [
            (
                torch.randn(10 - step, 1, 8, 8, generator=generator),
                torch.randint(0, 3, (10 - step,), generator=generator),
            )
            for step in range(steps)
        ]
    )


def network(dropout: float = 0.3, **options: Any) -> CNN:
    torch.manual_seed(1)
    return CNN(3, 1, 8, widths=[4, 6], dropout=dropout, **options)


def fit(
    model: nn.Module,
    config: OptimConfig,
    batches: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    epochs: int = EPOCHS,
    **options: Any,
) -> Iterator[Step | Epoch]:
    state = options.pop("state", None)
    loop = TrainLoop(
        model,
        optimizer or optim.build_optimizer(model, config),
        nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        options.pop("plan", PLAN),
        clip_value=config.clip_value,
        clip_norm=config.clip_norm,
        **options,
    )
    return loop.run(
        batches if batches is not None else data(),
        optim.build_schedule(config),
        epochs=epochs,
        seed=SEED,
        state=state,
    )


def plain_loop(model: nn.Module, config: OptimConfig, batches: Any) -> list[float]:
    """Train with a plain PyTorch loop and return the losses; the reference for `TrainLoop`."""
    optimizer_class = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.name]
    arguments = {"momentum": config.momentum} if config.name == "sgd" else {"betas": config.betas}
    optimizer = optimizer_class(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True, **arguments
    )
    factor = optim.build_schedule(config)
    losses = []
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for step, (images, labels) in enumerate(batches.epoch(epoch)):
            done = ((epoch - 1) * len(batches) + step) / (EPOCHS * len(batches))
            optimizer.param_groups[0]["lr"] = config.lr * factor(done)
            torch.manual_seed(derive_seed(SEED, epoch, step, 1))
            loss = nn.functional.cross_entropy(
                model(images), labels, label_smoothing=config.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            if config.clip_value:
                nn.utils.clip_grad_value_(model.parameters(), config.clip_value)
            if config.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "sgd", "lr": 0.1},
        {"schedule": "one-cycle", "label_smoothing": 0.2},
        {"schedule": "cosine", "warmup": 0.3, "weight_decay": 0.1},
        {"name": "sgd", "lr": 0.5, "clip_value": 0.01},
        {"name": "sgd", "lr": 0.5, "clip_norm": 0.1, "schedule": "step"},
        {"name": "sgd", "lr": 0.5, "clip_value": 0.02, "clip_norm": 0.05, "momentum": 0.0},
    ],
)
@pytest.mark.parametrize("augmented", [False, True])
def test_training_equals_a_plain_loop(options: dict[str, Any], augmented: bool) -> None:
    config = OptimConfig(**{"lr": 0.02, **options})
    model, reference = network(), network()
    batches: Any = data()
    if augmented:
        batches = Batches(
            Split(Memory(pictures(33)), torch.arange(33) % 3),
            batch_size=8,
            normalize=Normalize([0.5], [0.25]),
            plan=PLAN,
            seed=SEED,
            augment=lambda images, labels, _, generator: (
                images + torch.rand(1, generator=generator),
                labels,
            ),
        )
    records = list(fit(model, config, batches))
    losses = plain_loop(reference, config, batches)
    same(dict(model.state_dict()), dict(reference.state_dict()))
    steps = [r for r in records if isinstance(r, Step)]
    assert [float(s.loss) for s in steps] == losses
    assert not torch.equal(model.classifier.weight, network().classifier.weight)


def test_records_contain_the_metrics_of_steps_and_epochs() -> None:
    config = OptimConfig(lr=0.02, schedule="linear")
    model = network()
    batches = data()
    reference = network()
    records = list(fit(model, config, batches))
    kinds = [type(r).__name__ for r in records]
    assert kinds == (["Step"] * 4 + ["Epoch"]) * EPOCHS
    steps = [r for r in records if isinstance(r, Step)]
    assert [(s.epoch, s.step, s.steps, s.images) for s in steps[3:6]] == [
        (1, 4, 4, 7),
        (2, 1, 4, 10),
        (2, 2, 4, 9),
    ]
    assert [s.lr for s in steps] == pytest.approx([0.02 * (1 - i / 12) for i in range(12)])
    for number, epoch in enumerate(r for r in records if isinstance(r, Epoch)):
        epoch_steps = steps[4 * number : 4 * number + 4]
        assert (epoch.epoch, epoch.images, epoch.lr) == (number + 1, 34, epoch_steps[-1].lr)
        mean = sum(float(s.loss) * s.images for s in epoch_steps) / 34
        assert float(epoch.loss) == pytest.approx(mean, rel=1e-6)
        assert float(epoch.accuracy) == pytest.approx(
            sum(int(s.num_correct) for s in epoch_steps) / 34
        )
    torch.manual_seed(derive_seed(SEED, 1, 0, 1))
    num_correct = (
        reference.train()(batches.batches[0][0]).argmax(1) == batches.batches[0][1]
    ).sum()
    assert int(steps[0].num_correct) == int(num_correct)


@pytest.mark.parametrize("stop", range(1, 15))
def test_training_interrupted_after_any_record_resumes_to_the_same_bits(stop: int) -> None:
    """The iteration ends after `stop` records and is started again from the state."""
    config = OptimConfig(lr=0.02, schedule="one-cycle")
    uninterrupted = network()
    expected = list(fit(uninterrupted, config))
    model, state = network(), TrainState()
    optimizer = optim.build_optimizer(model, config)
    first = fit(model, config, optimizer=optimizer, state=state)
    first_records = [next(first) for _ in range(stop)]
    first.close()
    resumed = list(fit(model, config, optimizer=optimizer, state=state))
    same(dict(model.state_dict()), dict(uninterrupted.state_dict()))
    records = [*first_records, *resumed]
    assert [type(r) for r in records] == [type(r) for r in expected]
    assert [(r.epoch, float(r.loss), r.lr) for r in records] == [
        (r.epoch, float(r.loss), r.lr) for r in expected
    ]
    assert (state.epoch, state.step) == (EPOCHS + 1, 0)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_training_on_streamed_rows_resumes_to_the_same_bits(stop: int) -> None:
    def batches(rows: Any) -> Batches:
        split = Split(rows, torch.arange(30) % 3)
        return Batches(
            split, batch_size=8, normalize=Normalize([0.5], [0.25]), plan=PLAN, seed=SEED
        )

    config = OptimConfig(lr=0.02)
    uninterrupted = network()
    list(fit(uninterrupted, config, batches(Memory(pictures(30)))))
    model, state, streamed = network(), TrainState(), batches(Streamed(pictures(30)))
    optimizer = optim.build_optimizer(model, config)
    first = fit(model, config, streamed, optimizer=optimizer, state=state)
    for _ in range(stop):
        next(first)
    first.close()
    list(fit(model, config, streamed, optimizer=optimizer, state=state))
    same(dict(model.state_dict()), dict(uninterrupted.state_dict()))


def test_dropout_depends_on_seed_epoch_and_step_only() -> None:
    first, second = network(0.5), network(0.5)
    list(fit(first, OptimConfig(lr=0.02)))
    for record in fit(second, OptimConfig(lr=0.02)):
        torch.manual_seed(int(record.epoch) + 77)  # other code uses the generator in between
        torch.rand(5)
    same(dict(first.state_dict()), dict(second.state_dict()))


class Dropping(nn.Sequential):
    """Network with functional dropout, which no dropout module announces."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        kept: torch.Tensor = super().forward(nn.functional.dropout(images, 0.5, self.training))
        return kept


def test_functional_dropout_depends_on_seed_epoch_and_step_only() -> None:
    first, second = (Dropping(network(0.0)) for _ in range(2))
    list(fit(first, OptimConfig(lr=0.02)))
    for record in fit(second, OptimConfig(lr=0.02)):
        torch.manual_seed(int(record.epoch) + 77)
    same(dict(first.state_dict()), dict(second.state_dict()))


def test_the_weight_average_is_updated_after_each_step() -> None:
    model = network()
    averager = optim.EMA(model, 0.9)
    list(fit(model, OptimConfig(lr=0.02), averager=averager))
    assert averager.steps == 12
    reference, slow = network(), optim.EMA(network(), 0.9)
    slow = optim.EMA(reference, 0.9)
    for record in fit(reference, OptimConfig(lr=0.02)):
        if isinstance(record, Step):
            slow.update()
    with optim.averaged_weights(averager), optim.averaged_weights(slow):
        same(dict(model.state_dict()), dict(reference.state_dict()))


def test_bf16_and_channels_last_train() -> None:
    model = Plan("cpu", "bf16", "channels_last").prepare_model(network(0.0))
    plan = Plan("cpu", "bf16", "channels_last")
    before = model.state_dict()["classifier.weight"].clone()
    records = list(fit(model, OptimConfig(lr=0.02), plan=plan, epochs=2))
    epochs = [r for r in records if isinstance(r, Epoch)]
    assert isinstance(epochs[-1].loss, float)  # summed from float32 losses in any precision
    assert float(epochs[-1].loss) < float(epochs[0].loss)
    assert model.state_dict()["classifier.weight"].dtype == torch.float32
    assert not torch.equal(before, model.state_dict()["classifier.weight"])


# Non-finite losses


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("config", [OptimConfig(lr=0.02), OptimConfig(name="sgd", lr=0.02)])
def test_a_non_finite_loss_stops_before_the_update(value: float, config: OptimConfig) -> None:
    batches = data()
    images, labels = batches.batches[2]
    batches.batches[2] = (images.clone().fill_(value), labels)
    model, state = network(), TrainState()
    optimizer = optim.build_optimizer(model, config)
    averager = optim.EMA(model, 0.9)
    records = fit(model, config, batches, optimizer=optimizer, state=state, averager=averager)
    for _ in range(2):
        next(records)
    before = copy_state(model, optimizer)
    # Including norm statistics and counters, which the forward pass has already updated.
    assert any("num_batches_tracked" in key for key in before)
    assert any("optim.0" in key for key in before)
    with pytest.raises(NonFiniteLoss) as caught:
        next(records)
    same(before, copy_state(model, optimizer))
    assert averager.steps == 2
    assert (state.epoch, state.step) == (1, 2)
    assert "epoch 1, step 3" in caught.value.what
    assert "0.02" in caught.value.fix
    assert caught.value.exit_code == 6


def test_a_non_finite_first_loss_stops_before_the_update() -> None:
    batches = data()
    batches.batches[0] = (batches.batches[0][0] * float("nan"), batches.batches[0][1])
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(NonFiniteLoss):
        next(fit(model, OptimConfig(), batches))
    same(before, dict(model.state_dict()))


def test_evaluating_between_records_changes_nothing() -> None:
    """The caller may leave the network in eval mode after an epoch."""
    first, second = network(), network()
    list(fit(first, OptimConfig(lr=0.02)))
    for record in fit(second, OptimConfig(lr=0.02)):
        if isinstance(record, Epoch):
            second.eval()
    same(dict(first.state_dict()), dict(second.state_dict()))


def test_a_finished_state_yields_no_records() -> None:
    model = network()
    assert list(fit(model, OptimConfig(), state=TrainState(epoch=EPOCHS + 1))) == []
