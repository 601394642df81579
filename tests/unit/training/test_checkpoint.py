"""A run that is stopped anywhere and taken up ends with the bits of one that never stopped."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from convlens import optim
from convlens.errors import DataError, Stopped
from convlens.recipe import load_recipe
from convlens.run import RunDir
from convlens.training import checkpoint, train
from convlens.training.checkpoint import BestEpoch, CheckpointManager
from convlens.training.train import run_train_loop
from helpers.interrupted_runs import (
    EVERYTHING,
    SGD,
    Interrupting,
    equal,
    finish,
    stop,
)
from helpers.support import begin, same, tiny

STEPS = 5  # in each of 3 epochs
# The head alone for four of 15 steps; one bias stops after six; an average that pulls back.
WINDOWS = (
    "optim.head_first=0.25",
    "optim.layer_decay=0.5",
    "optim.groups=[{params: stage1.2.bias, lr: 0.05, end: 0.4}, {params: head, weight_decay: 0.1}]",
    "optim.ema=null",
    "optim.lookahead={every: 2, decay: 0.9, power: 1}",
)
MUON = ("optim.name=muon", "optim.momentum=0.6", "optim.nesterov=true", "optim.lr=0.1")


@pytest.mark.parametrize("after", [1, 3, STEPS, STEPS + 1, 2 * STEPS, 3 * STEPS])
@pytest.mark.parametrize(
    "options",
    [(), SGD, WINDOWS, (*WINDOWS, *MUON)],
    ids=["adamw", "sgd", "windows", "windows-muon"],
)
def test_a_run_stopped_at_a_step_ends_as_one_that_was_not(
    after: int, options: tuple[str, ...], interrupting: Interrupting
) -> None:
    asked = tiny(*EVERYTHING, *options)
    whole = finish(asked, "whole")
    stopped = stop(asked, "stopped", interrupting, after)
    assert stopped.metadata()["status"] == "training"
    assert len(stopped.metrics()) == (after - 1) // STEPS
    equal(finish(asked, "stopped"), whole)


def test_a_run_stopped_again_and_again_ends_as_one_that_was_not(
    interrupting: Interrupting,
) -> None:
    asked = tiny(*EVERYTHING, *SGD, "train.keep=last")
    whole = finish(asked, "whole")
    for _ in range(STEPS):
        stop(asked, "stopped", interrupting, 2)
    equal(finish(asked, "stopped"), whole)


@pytest.mark.parametrize("after", [4, 6, 7, 15])
def test_windows_go_on_from_where_they_open_and_close(
    after: int, interrupting: Interrupting
) -> None:
    """Stopped right before and after a turn, and right before the network takes its average."""
    asked = tiny(*EVERYTHING, *WINDOWS, *MUON, "data.channels=3", "train.keep=last")
    whole = finish(asked, "whole")
    stop(asked, "stopped", interrupting, after)
    equal(finish(asked, "stopped"), whole)


def after_an_epoch(checkpoints: CheckpointManager) -> bool:
    """Instead of by time: due after each epoch."""
    return checkpoints._job.state.step == 0


def test_a_run_killed_between_two_saves_goes_on_from_the_former(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if by SIGKILL: after the second epoch's model was written, before its state was."""
    asked = tiny(*EVERYTHING)
    whole = finish(asked, "whole")
    real, saves = checkpoint.save_checkpoint, []

    def save(*arguments: Any) -> None:
        saves.append(1)
        if len(saves) == 2:
            raise MemoryError
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "should_save", property(after_an_epoch))
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(MemoryError):
            finish(asked, "killed")
    assert len(RunDir(Path("models/killed")).metrics()) == 2
    equal(finish(asked, "killed"), whole)


def test_a_long_epoch_is_saved_in_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tiny(*EVERYTHING, "train.epochs=1")
    whole = finish(asked, "whole")
    monkeypatch.setattr(checkpoint, "SAVE_INTERVAL_S", 0.0)
    real, saves = checkpoint.save_checkpoint, []

    def save(place: RunDir, job: Any, *rest: Any) -> None:
        real(place, job, *rest)
        saves.append(job.state.step)
        if len(saves) == 3:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(MemoryError):
            finish(asked, "killed")
    assert saves == [1, 2, 3]
    equal(finish(asked, "killed"), whole)


def test_early_stopping_goes_on_counting(
    monkeypatch: pytest.MonkeyPatch, interrupting: Interrupting
) -> None:
    losses = {1: 0.5, 2: 0.4, 3: 0.9, 4: 0.8, 5: 0.7, 6: 0.1}
    real = train._validate

    def validate(job: Any, record: Any, flag: Any, *, seconds: float) -> dict[str, float]:
        return {**real(job, record, flag, seconds=seconds), "val_loss": losses[record.epoch]}

    monkeypatch.setattr(train, "_validate", validate)
    asked = tiny("train.epochs=6", "train.patience=3")
    whole = finish(asked, "whole")
    assert len(whole.metrics()) == 5
    assert whole.metadata()["kept_epoch"] == 2
    stop(asked, "stopped", interrupting, 4 * STEPS - 2)
    equal(finish(asked, "stopped"), whole)


def test_sigterm_is_a_stop_that_can_be_taken_up(interrupting: Interrupting) -> None:
    asked = tiny(*EVERYTHING)
    whole = finish(asked, "whole")
    interrupting.after, interrupting.number = 7, signal.SIGTERM
    with pytest.raises(Stopped, match="SIGTERM") as caught:
        finish(asked, "stopped")
    assert caught.value.exit_code == 75
    equal(finish(asked, "stopped"), whole)


def test_the_handlers_are_given_back(interrupting: Interrupting) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop(tiny(), "stopped", interrupting, 2)
    finish(tiny(), "stopped")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_moments_of_a_channels_last_network_lie_as_its_weights(
    interrupting: Interrupting,
) -> None:
    """Fused kernels walk both side by side in memory."""
    from convlens.training.checkpoint import restore_checkpoint

    asked = tiny(*EVERYTHING, "data.channels=3", "augment=[]")
    stop(asked, "stopped", interrupting, 3)
    job, place = begin(asked, "stopped")
    restore_checkpoint(place, job, BestEpoch("val_loss"))
    moments = job.optimizer.state[job.model.get_parameter("stage1.0.weight")]
    weight = job.model.get_parameter("stage1.0.weight")
    assert weight.stride() != weight.contiguous().stride()
    assert moments["exp_avg"].stride() == weight.stride()
    assert moments["exp_avg"].abs().sum() > 0


def test_everything_that_is_restored_is_what_was_saved(interrupting: Interrupting) -> None:
    from convlens.training.checkpoint import restore_checkpoint, save_checkpoint

    asked = tiny(*EVERYTHING)
    stop(asked, "stopped", interrupting, 8)
    job, place = begin(asked, "stopped")
    best = BestEpoch("val_loss")
    rows = restore_checkpoint(place, job, best)
    stored = place.state()
    save_checkpoint(place, job, best, rows)
    again = place.state()
    assert stored is not None
    assert again is not None
    same(stored[0], again[0])
    assert stored[1] == again[1]
    assert (job.state.epoch, job.state.step, len(rows)) == (2, 3, 1)
    assert any(name.startswith("ema.") for name in stored[0])
    assert isinstance(job.averager, optim.EMA)
    assert job.averager.steps == 8
    assert isinstance(job.state.loss_sum, float)


def test_other_images_are_refused_when_a_run_is_taken_up(interrupting: Interrupting) -> None:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for label in "abc":
        Path("photos", label).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(Path("photos", label, f"{number}.png"))
    tree = {**tiny().model_dump(mode="json"), "data": {"name": "photos", "image_size": 8}}
    asked = load_recipe(tree)
    interrupting.after = 3
    with pytest.raises(KeyboardInterrupt):
        train.train(asked, is_unmodified_recipe=True, test=False, device="cpu", quiet=True)
    changed = Path("photos/a/0.png")
    before = changed.read_bytes()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(changed)
    with pytest.raises(DataError, match="not those that run 'tiny' started with") as caught:
        train.train(asked, is_unmodified_recipe=True, test=False, device="cpu", quiet=True)
    assert "--fresh" in caught.value.fix
    changed.write_bytes(before)
    place = train.train(asked, is_unmodified_recipe=True, device="cpu", quiet=True)
    assert place.is_finished
    changed.unlink()
    with pytest.raises(DataError, match="changed since this model was trained"):
        train.train(asked, is_unmodified_recipe=True, device="cpu", quiet=True)


def test_progress_is_stored_in_the_keys_of_earlier_versions() -> None:
    """So that a run that an earlier version has saved can be resumed or extended."""
    job, place = begin(tiny(), "keys")
    records = run_train_loop(job, job.process_group)
    for _ in range(2):
        next(records)
    job.state.micro_batch_size = 8
    checkpoint.save_checkpoint(place, job, checkpoint.BestEpoch("val_loss"), [])
    stored = place.state()
    assert stored is not None
    position = stored[1]["position"]
    assert set(position) == {
        "epoch",
        "step",
        "images",
        "loss_sum",
        "correct",
        "part",
        "seconds",
        "cpu_seconds",
        "data_seconds",
    }
    again, _ = begin(tiny(), "keys")
    checkpoint.restore_checkpoint(place, again, checkpoint.BestEpoch("val_loss"))
    assert again.state == job.state
