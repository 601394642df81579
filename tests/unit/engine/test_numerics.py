"""A non-finite loss ends training before its update, read at once or on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from convlens.engine import numerics
from convlens.engine.loop import NonFiniteLoss, Step
from convlens.engine.numerics import BufferSnapshot, DeferredFiniteCheck
from helpers.nonfinite_runs import OPTIMIZERS, Run, batches
from helpers.support import same
from helpers.train_loops import Listed

each_optimizer = pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


class BadInSecondEpoch(Listed):
    """Batches of which one in the second epoch has a non-finite loss."""

    def __init__(self, steps: int, bad: int) -> None:
        super().__init__(batches(steps, None).batches)
        self.bad = bad

    def epoch(self, epoch: int, start: int = 0) -> Any:
        listed = batches(len(self), self.bad if epoch == 2 else None, float("inf"))
        yield from listed.batches[start:]


@pytest.fixture(autouse=True)
def short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag is read several times in these short epochs."""
    monkeypatch.setattr(numerics, "CHECK_INTERVAL_STEPS", 3)


@each_optimizer
def test_a_deferred_check_changes_no_bit_if_all_losses_are_finite(options: dict[str, Any]) -> None:
    deferred, synchronous = Run(options, 8, False), Run(options, 8, True)
    numbers = [(type(r), float(r.loss), r.lr) for r in deferred.fit(batches(8, None))]
    assert numbers == [(type(r), float(r.loss), r.lr) for r in synchronous.fit(batches(8, None))]
    same(deferred.state(), synchronous.state())


@each_optimizer
@pytest.mark.parametrize("bad", [0, 4, 7])
def test_weights_and_optimizer_state_are_those_before_the_bad_loss(
    options: dict[str, Any], bad: int
) -> None:
    runs = Run(options, 8, True), Run(options, 8, False)
    messages = []
    for run in runs:
        with pytest.raises(NonFiniteLoss) as caught:
            list(run.fit(batches(8, bad)))
        messages.append((str(caught.value), caught.value.lr))
    assert messages[0] == messages[1]
    assert f"epoch 1, step {bad + 1};" in messages[0][0]
    synchronous, deferred = (run.learned() for run in runs)
    assert all(tensor.isfinite().all() for tensor in runs[0].state().values())
    if "lookahead" in options:  # changes the weights in the steps until the error
        return
    # With momentum, a skipped first step leaves zeros where the other run has no buffer yet.
    zeros = {key: tensor for key, tensor in deferred.items() if key not in synchronous}
    assert all(not tensor.any() for tensor in zeros.values())
    same({key: deferred[key] for key in synchronous}, synchronous)


@pytest.mark.parametrize("bad", range(10))
@pytest.mark.parametrize("synchronous", [True, False])
def test_the_error_names_the_step_of_the_loss(bad: int, synchronous: bool) -> None:
    run = Run(OPTIMIZERS["sgd"], 10, synchronous)
    with pytest.raises(NonFiniteLoss) as caught:
        list(run.fit(BadInSecondEpoch(10, bad)))
    assert (caught.value.epoch, caught.value.step) == (2, bad + 1)


def test_the_error_names_the_step_in_a_resumed_epoch() -> None:
    run = Run(OPTIMIZERS["sgd"], 10, False)
    records = run.fit(batches(10, 8))
    for _ in range(5):
        next(records)
    records.close()
    with pytest.raises(NonFiniteLoss) as caught:
        list(run.fit(batches(10, 8)))
    assert (caught.value.epoch, caught.value.step) == (1, 9)


def test_the_error_is_raised_at_the_second_read_after_the_loss() -> None:
    run, seen = Run(OPTIMIZERS["sgd"], 20, False), []
    with pytest.raises(NonFiniteLoss):
        seen.extend(run.fit(batches(20, 4)))
    # The flag that was copied after step 6 is read after step 9.
    assert [record.step for record in seen if isinstance(record, Step)] == list(range(1, 9))


def test_a_deferred_check_finds_the_first_bad_step() -> None:
    check = DeferredFiniteCheck()
    check.start_epoch(10)
    flags = [float(check.update(torch.tensor(loss))) for loss in (1.0, 2.0, float("inf"), 3.0)]
    assert flags == [0, 0, 1, 1]
    assert check.wait() == 13
    check.start_epoch(0)
    assert float(check.update(torch.tensor(1.0))) == 0
    assert check.wait() is None


def test_a_buffer_snapshot_restores_every_buffer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    snapshot = BufferSnapshot(model)
    model(torch.randn(4, 3))
    snapshot.save()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, 3))
    assert int(model[0].num_batches_tracked) == 2
    snapshot.restore()
    same(before, dict(model.named_buffers()))
    assert int(model[0].num_batches_tracked) == 1
