"""Looking back ends where waiting for each loss ends, bit for bit, and promises the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import engine, optim
from convlens.engine import NonFiniteLoss, Position, Step
from convlens.models.cnn import CNN
from convlens.schema import OptimConfig
from convlens.stepping import guarding
from convlens.stepping.scaling import LossScale
from support import PLAN, same
from test_engine import Listed, everything

OPTIMISERS = {
    "sgd": {"name": "sgd", "lr": 0.1},
    "nesterov": {"name": "sgd", "lr": 0.1, "nesterov": True, "weight_decay": 0.01},
    "adam": {"name": "adam", "lr": 0.02},
    "adamw": {"name": "adamw", "lr": 0.02, "weight_decay": 0.1, "clip_norm": 0.5},
    "muon": {"name": "muon", "lr": 0.05, "aux_lr": 0.1, "momentum": 0.6, "nesterov": True},
    "ema": {"name": "sgd", "lr": 0.1, "ema": 0.9},
    "lookahead": {"name": "adam", "lr": 0.02, "lookahead": {"every": 2}},
    "windows": {
        "name": "sgd",
        "lr": 0.1,
        "groups": [{"params": "classifier.*", "end": 0.4}, {"params": "stage1.*", "start": 0.2}],
    },
}


def batches(steps: int, spoilt: int | None, value: float = float("nan")) -> Listed:
    generator = torch.Generator().manual_seed(5)
    found = [
        (torch.randn(9 - step % 2, 1, 8, 8, generator=generator), torch.arange(9 - step % 2) % 3)
        for step in range(steps)
    ]
    if spoilt is not None:
        found[spoilt] = (found[spoilt][0] * value, found[spoilt][1])
    return Listed(found)


class Run:
    """A small training that can look back; `waits` is the slow reference."""

    def __init__(self, asked: dict[str, Any], steps: int, waits: bool, epochs: int = 2) -> None:
        torch.manual_seed(1)
        self.config = OptimConfig(**asked)
        self.model = CNN(3, 1, 8, widths=[4, 6], dropout=0.3)
        self.optimiser = optim.build(self.model, self.config)
        self.averager = optim.averager(self.model, self.config, epochs * steps)
        self.position = Position()
        self.waits, self.epochs = waits, epochs

    def fit(self, listed: Listed) -> engine.Records:
        return engine.fit(
            self.model, listed, self.optimiser, optim.schedule(self.config), epochs=self.epochs,
            objective=nn.CrossEntropyLoss(), plan=PLAN, seed=3, position=self.position,
            clip_norm=self.config.clip_norm, averager=self.averager, waits=self.waits,
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        found = everything(self.model, self.optimiser)
        if self.averager is not None:
            found |= {f"average.{i}": t for i, t in enumerate(self.averager.state()["average"])}
            found["average.steps"] = torch.tensor(self.averager.steps)
        at = self.position
        numbers = [float(v) for v in (at.epoch, at.step, at.images, at.loss_sum, at.correct)]
        return {**found, "position": torch.tensor(numbers, dtype=torch.float64)}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look every three steps, so that there are several in these short epochs."""

    def look_back(*arguments: Any) -> guarding.LookBack:
        return guarding.LookBack(*arguments, every=3)

    monkeypatch.setattr(engine, "LookBack", look_back)


@pytest.mark.parametrize("asked", OPTIMISERS.values(), ids=OPTIMISERS.keys())
def test_looking_back_changes_no_bit_where_all_is_finite(asked: dict[str, Any]) -> None:
    back, waiting = Run(asked, 8, waits=False), Run(asked, 8, waits=True)
    told = [(type(r), float(r.loss), r.lr) for r in back.fit(batches(8, None))]
    assert told == [(type(r), float(r.loss), r.lr) for r in waiting.fit(batches(8, None))]
    same(back.state(), waiting.state())


@pytest.mark.parametrize("asked", OPTIMISERS.values(), ids=OPTIMISERS.keys())
@pytest.mark.parametrize("spoilt", [0, 4, 7])
def test_what_is_left_is_what_was_before_the_loss_failed(
    asked: dict[str, Any], spoilt: int
) -> None:
    back, waiting = Run(asked, 8, waits=False), Run(asked, 8, waits=True)
    raised = []
    for run in (back, waiting):
        with pytest.raises(NonFiniteLoss) as caught:
            list(run.fit(batches(8, spoilt)))
        raised.append(str(caught.value))
    assert raised[0] == raised[1]
    assert f"epoch 1, step {spoilt + 1};" in raised[0]
    same(back.state(), waiting.state())
    assert all(tensor.isfinite().all() for tensor in back.state().values())


@pytest.mark.parametrize("spoilt", range(10))
def test_wherever_it_fails_in_a_later_epoch(spoilt: int) -> None:
    """Also with steps at which a look has just been taken, or is on its way."""

    class Later(Listed):
        def epoch(self, epoch: int, start: int = 0) -> Any:
            good, bad = batches(10, None), batches(10, spoilt, float("inf"))
            yield from (good if epoch == 1 else bad).batches[start:]

    ends = []
    for waits in (False, True):
        run = Run(OPTIMISERS["ema"], 10, waits)
        with pytest.raises(NonFiniteLoss) as caught:
            list(run.fit(Later(batches(10, None).batches)))
        assert (caught.value.epoch, caught.value.step) == (2, spoilt + 1)
        ends.append(run.state())
    same(*ends)


def test_it_looks_three_steps_later_and_tells_those_between() -> None:
    run, seen = Run(OPTIMISERS["sgd"], 20, waits=False), []
    with pytest.raises(NonFiniteLoss):
        seen.extend(run.fit(batches(20, 4)))
    steps = [record.step for record in seen if isinstance(record, Step)]
    # The look at step 6 sees that sum at step 9; then from the look at step 3 on again.
    assert steps == [*range(1, 10), 4]


def test_a_loss_that_fails_once_only_stops_nothing() -> None:
    """Where a device doesn't repeat itself, what is done again may go well: then it goes on."""

    class Once(Listed):
        asked = 0

        def epoch(self, epoch: int, start: int = 0) -> Any:
            self.asked += 1
            yield from (batches(8, 5) if self.asked == 1 else batches(8, None)).batches[start:]

    back, waiting = Run(OPTIMISERS["adam"], 8, waits=False), Run(OPTIMISERS["adam"], 8, waits=True)
    list(back.fit(Once(batches(8, None).batches)))
    list(waiting.fit(batches(8, None)))
    same(back.state(), waiting.state())


def test_a_training_taken_up_amid_an_epoch_looks_back_no_further() -> None:
    whole, parts = Run(OPTIMISERS["ema"], 8, waits=False), Run(OPTIMISERS["ema"], 8, waits=False)
    list(whole.fit(batches(8, None)))
    records = parts.fit(batches(8, None))
    for _ in range(5):
        next(records)
    records.close()
    list(parts.fit(batches(8, None)))
    same(parts.state(), whole.state())


def test_the_scale_of_the_loss_is_looked_back_at_too() -> None:
    run = Run(OPTIMISERS["sgd"], 6, waits=False)
    scale = LossScale(run.optimiser, "cpu", growth_steps=2)
    guard = guarding.LookBack(run.model, run.optimiser, None, scale, every=3)
    guard.before(run.position)
    scale.scale.fill_(3.0)
    run.position.loss_sum = torch.tensor(float("nan"))
    with pytest.raises(guarding.Spoilt):
        guard.end(run.position)
    guard.back(run.position)
    assert float(scale.scale) == 2.0**12
    assert run.position.loss_sum == 0.0
