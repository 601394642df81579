"""Parameter groups that train in a part of the steps, compared with a plain PyTorch loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import optim
from convlens.device import derive_seed
from convlens.engine.loop import Epoch, NonFiniteLoss, Step, TrainLoop, TrainState
from convlens.models.cnn import CNN
from convlens.recipe import OptimConfig
from helpers.support import PLAN, same
from helpers.train_loops import Listed

EPOCHS, STEPS, SEED = 3, 4, 11  # 12 steps
HEAD_FIRST: dict[str, Any] = {"head_first": 0.3, "layer_decay": 0.5}
BIAS_STOPS: dict[str, Any] = {
    "groups": [{"params": "stage1.2.bias", "lr": 0.3, "end": 0.375}, {"params": "head", "lr": 0.2}]
}
IN_THE_MIDDLE: dict[str, Any] = {
    "groups": [{"params": "stage2.*", "start": 0.25, "end": 0.75, "weight_decay": 0.5}]
}


def make_batches() -> Listed:
    """Return four batches that are the same in each epoch."""
    generator = torch.Generator().manual_seed(5)
    return Listed(
        [
            (
                torch.randn(8, 1, 8, 8, generator=generator) + 1,
                torch.randint(0, 3, (8,), generator=generator),
            )
            for _ in range(STEPS)
        ]
    )


def network() -> CNN:
    torch.manual_seed(1)
    return CNN(3, 1, 8, widths=[4, 6], pool="stride", dropout=0.2)


def fit(model: nn.Module, config: OptimConfig, **more: Any) -> Any:
    optimizer = more.pop("optimizer", None) or optim.build_optimizer(model, config)
    criterion = nn.CrossEntropyLoss()
    loop = TrainLoop(model, optimizer, criterion, PLAN, clip_norm=config.clip_norm)
    return loop.run(make_batches(), optim.build_schedule(config), epochs=EPOCHS, seed=SEED, **more)


def config_of(options: dict[str, Any]) -> OptimConfig:
    defaults = {"name": "sgd", "lr": 0.1, "schedule": "linear", "weight_decay": 0.01}
    return OptimConfig(**{**defaults, **options})


def expected_settings(options: dict[str, Any]) -> dict[str, tuple[float, float, int, int]]:
    """Return learning rate, weight decay, and window (first step, end) of each parameter."""
    settings = {}
    for name, _ in network().named_parameters():
        rate, decay, first, last = 0.1, 0.01, 0, 12
        if options is HEAD_FIRST and not name.startswith("classifier"):
            rate *= {"stage1": 0.25, "stage2": 0.5}[name.partition(".")[0]]
            first = 4  # 0.3 of 12 steps is between the fourth and the fifth
        if options is BIAS_STOPS and name == "stage1.2.bias":
            rate, last = 0.3, 5  # 0.375 of 12 steps is 4.5
        if options is BIAS_STOPS and name.startswith("classifier"):
            rate = 0.2
        if options is IN_THE_MIDDLE and name.startswith("stage2"):
            decay, first, last = 0.5, 3, 9
        settings[name] = (rate, decay, first, last)
    return settings


def plain_loop(model: CNN, options: dict[str, Any]) -> dict[str, Tensor]:
    """Train with a plain PyTorch loop in which layers with only frozen parameters are in eval mode.

    So is everything before the first trained layer, here the dropout before the classifier.
    """
    plan, named = expected_settings(options), dict(model.named_parameters())
    optimizer = torch.optim.SGD(
        [{"params": [p], "weight_decay": plan[n][1]} for n, p in named.items()],
        lr=0.1,
        momentum=0.9,
        fused=True,
    )
    for done in range(EPOCHS * STEPS):
        model.train()
        for group, (name, parameter) in zip(optimizer.param_groups, named.items(), strict=True):
            rate, _, first, last = plan[name]
            parameter.requires_grad_(first <= done < last)
            if parameter.requires_grad:
                group["lr"] = rate * (1 - (done - first) / (last - first))
        for module in model.modules():
            parameters = list(module.parameters(recurse=False))
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        epoch, step = divmod(done, STEPS)
        torch.manual_seed(derive_seed(SEED, epoch + 1, step, 1))
        images, labels = make_batches().batches[step]
        nn.functional.cross_entropy(model(images), labels).backward()
        for name, parameter in named.items():
            assert (parameter.grad is None) == (not parameter.requires_grad), name
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


@pytest.mark.parametrize(
    "options", [HEAD_FIRST, BIAS_STOPS, IN_THE_MIDDLE], ids=["head-first", "bias", "middle"]
)
def test_training_equals_a_loop_that_freezes_by_hand(options: dict[str, Any]) -> None:
    model = network()
    list(fit(model, config_of(options)))
    same(dict(model.state_dict()), plain_loop(network(), options))


def test_only_the_head_changes_while_it_trains_alone() -> None:
    """Neither weight decay nor norm statistics change the rest; the schedule is unaffected."""
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = config_of({**HEAD_FIRST, "weight_decay": 0.5})
    optimizer = optim.build_optimizer(model, config)
    rates = []
    for record in fit(model, config, optimizer=optimizer):
        if isinstance(record, Epoch):
            continue
        rates.append(record.lr)
        state = model.state_dict()
        moved = {name for name in before if not torch.equal(before[name], state[name])}
        if len(rates) <= 4:
            assert moved == {"classifier.weight", "classifier.bias"}
            assert len(optimizer.state) == 2
        else:
            assert moved == set(before)
    # The reported rate is that of the recipe, whichever groups are training.
    assert rates == pytest.approx([0.1 * (1 - i / 12) for i in range(12)])


@pytest.mark.parametrize("stop", range(1, 16))
@pytest.mark.parametrize(
    "options",
    [
        {**HEAD_FIRST, "name": "adamw", "lr": 0.01},
        {**BIAS_STOPS, "name": "muon", "nesterov": True},
        {**IN_THE_MIDDLE, "clip_norm": 0.1},
    ],
    ids=["head-first", "muon", "middle"],
)
def test_training_interrupted_after_any_record_resumes_to_the_same_bits(
    stop: int, options: dict[str, Any]
) -> None:
    """With a new optimizer and a network whose parameters all require gradients again."""
    config = config_of(options)
    uninterrupted = network()
    expected = list(fit(uninterrupted, config))
    first, progress = network(), TrainState()
    optimizer = optim.build_optimizer(first, config)
    records = fit(first, config, optimizer=optimizer, state=progress)
    for _ in range(stop):
        next(records)
    records.close()
    model = network()
    model.load_state_dict(first.state_dict())
    again = optim.build_optimizer(model, config)
    again.load_state_dict(optimizer.state_dict())
    remaining = list(fit(model, config, optimizer=again, state=progress))
    same(dict(model.state_dict()), dict(uninterrupted.state_dict()))
    assert [float(r.loss) for r in remaining] == [float(r.loss) for r in expected[stop:]]


def test_a_non_finite_loss_with_frozen_parameters_changes_nothing() -> None:
    model, config = network(), config_of(HEAD_FIRST)
    batches = make_batches()
    batches.batches[2] = (batches.batches[2][0] * float("nan"), batches.batches[2][1])
    loop = TrainLoop(model, optim.build_optimizer(model, config), nn.CrossEntropyLoss(), PLAN)
    records = loop.run(batches, optim.build_schedule(config), epochs=1, seed=SEED)
    for _ in range(2):
        assert isinstance(next(records), Step)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NonFiniteLoss):
        next(records)
    same(before, dict(model.state_dict()))
