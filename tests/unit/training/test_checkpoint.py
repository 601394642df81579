"""A resumed run ends with the same bits as an uninterrupted one, wherever it was stopped."""

from __future__ import annotations

import math
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
# Only the head trains in the first 4 of 15 steps; one bias stops after 6; Lookahead averaging.
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
def test_a_run_stopped_at_any_step_resumes_to_the_same_bits(
    after: int, options: tuple[str, ...], interrupting: Interrupting
) -> None:
    recipe = tiny(*EVERYTHING, *options)
    uninterrupted = finish(recipe, "whole")
    stopped = stop(recipe, "stopped", interrupting, after)
    assert stopped.metadata()["status"] == "training"
    assert len(stopped.metrics()) == (after - 1) // STEPS
    equal(finish(recipe, "stopped"), uninterrupted)


@pytest.mark.parametrize("after", [3, STEPS + 1])
def test_a_run_with_options_for_unequal_classes_resumes_to_the_same_bits(
    after: int, interrupting: Interrupting
) -> None:
    recipe = tiny(
        *EVERYTHING,
        "data.balance=full",
        "optim.class_weights={0: 5, 1: 0.5}",
        "optim.loss=focal",
        "train.monitor=val_macro_f1",
    )
    uninterrupted = finish(recipe, "whole")
    stop(recipe, "stopped", interrupting, after)
    equal(finish(recipe, "stopped"), uninterrupted)


def test_checkpoints_without_the_newer_columns_resume(interrupting: Interrupting) -> None:
    """Earlier versions had neither macro F1 nor balanced accuracy; such epochs have NaN."""
    recipe = tiny()
    whole = finish(recipe, "whole")
    run_dir = stop(recipe, "stopped", interrupting, 2 * STEPS)
    state = run_dir.state()
    assert state is not None
    tensors, counters = state
    new = ("val_macro_f1", "val_balanced_accuracy")
    rows = [{k: v for k, v in row.items() if k not in new} for row in counters["rows"]]
    assert len(rows) == 1
    assert len(rows[0]) < len(counters["rows"][0])
    run_dir.save_state(tensors, {**counters, "rows": rows})
    resumed = finish(recipe, "stopped")
    assert [math.isnan(row["val_macro_f1"]) for row in resumed.metrics()] == [True, False, False]
    for old, row in zip(whole.metrics(), resumed.metrics(), strict=True):
        assert old["val_loss"] == row["val_loss"]
        assert old["val_macro_f1"] == row["val_macro_f1"] or row["epoch"] == 1


def test_a_run_stopped_repeatedly_resumes_to_the_same_bits(
    interrupting: Interrupting,
) -> None:
    recipe = tiny(*EVERYTHING, *SGD, "train.keep=last")
    uninterrupted = finish(recipe, "whole")
    for _ in range(STEPS):
        stop(recipe, "stopped", interrupting, 2)
    equal(finish(recipe, "stopped"), uninterrupted)


@pytest.mark.parametrize("after", [4, 6, 7, 15])
def test_parameter_windows_resume_at_their_boundaries(
    after: int, interrupting: Interrupting
) -> None:
    """Stopped right before and after a boundary, and right before Lookahead updates the weights."""
    recipe = tiny(*EVERYTHING, *WINDOWS, *MUON, "data.channels=3", "train.keep=last")
    uninterrupted = finish(recipe, "whole")
    stop(recipe, "stopped", interrupting, after)
    equal(finish(recipe, "stopped"), uninterrupted)


def after_an_epoch(checkpoints: CheckpointManager) -> bool:
    """Return whether an epoch has just ended; replaces the time limit of `should_save`."""
    return checkpoints._job.state.step == 0


def test_a_run_killed_between_two_saves_resumes_from_the_earlier_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if by SIGKILL after the second epoch's model was written, but not its checkpoint."""
    recipe = tiny(*EVERYTHING)
    uninterrupted = finish(recipe, "whole")
    original, saves = checkpoint.save_checkpoint, []

    def save(*arguments: Any) -> None:
        saves.append(1)
        if len(saves) == 2:
            raise MemoryError
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "should_save", property(after_an_epoch))
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(MemoryError):
            finish(recipe, "killed")
    assert len(RunDir(Path("models/killed")).metrics()) == 2
    equal(finish(recipe, "killed"), uninterrupted)


def test_checkpoints_are_saved_within_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(*EVERYTHING, "train.epochs=1")
    uninterrupted = finish(recipe, "whole")
    monkeypatch.setattr(checkpoint, "SAVE_INTERVAL_S", 0.0)
    original, saves = checkpoint.save_checkpoint, []

    def save(run_dir: RunDir, job: Any, *rest: Any) -> None:
        original(run_dir, job, *rest)
        saves.append(job.state.step)
        if len(saves) == 3:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(MemoryError):
            finish(recipe, "killed")
    assert saves == [1, 2, 3]
    equal(finish(recipe, "killed"), uninterrupted)


def test_early_stopping_keeps_its_count_after_a_resume(
    monkeypatch: pytest.MonkeyPatch, interrupting: Interrupting
) -> None:
    losses = {1: 0.5, 2: 0.4, 3: 0.9, 4: 0.8, 5: 0.7, 6: 0.1}
    original = train._validate

    def validate(job: Any, record: Any, flag: Any, *, seconds: float) -> dict[str, float]:
        return {**original(job, record, flag, seconds=seconds), "val_loss": losses[record.epoch]}

    monkeypatch.setattr(train, "_validate", validate)
    recipe = tiny("train.epochs=6", "train.patience=3")
    uninterrupted = finish(recipe, "whole")
    assert len(uninterrupted.metrics()) == 5
    assert uninterrupted.metadata()["kept_epoch"] == 2
    stop(recipe, "stopped", interrupting, 4 * STEPS - 2)
    equal(finish(recipe, "stopped"), uninterrupted)


def test_a_run_stopped_by_sigterm_resumes_to_the_same_bits(interrupting: Interrupting) -> None:
    recipe = tiny(*EVERYTHING)
    uninterrupted = finish(recipe, "whole")
    interrupting.after, interrupting.number = 7, signal.SIGTERM
    with pytest.raises(Stopped, match="SIGTERM") as caught:
        finish(recipe, "stopped")
    assert caught.value.exit_code == 75
    equal(finish(recipe, "stopped"), uninterrupted)


def test_signal_handlers_are_restored(interrupting: Interrupting) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop(tiny(), "stopped", interrupting, 2)
    finish(tiny(), "stopped")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_restored_optimizer_state_has_the_memory_format_of_the_weights(
    interrupting: Interrupting,
) -> None:
    """Fused kernels read both in memory order."""
    from convlens.training.checkpoint import restore_checkpoint

    recipe = tiny(*EVERYTHING, "data.channels=3", "augment=[]")
    stop(recipe, "stopped", interrupting, 3)
    job, run_dir = begin(recipe, "stopped")
    restore_checkpoint(run_dir, job, BestEpoch("val_loss"))
    moments = job.optimizer.state[job.model.get_parameter("stage1.0.weight")]
    weight = job.model.get_parameter("stage1.0.weight")
    assert weight.stride() != weight.contiguous().stride()
    assert moments["exp_avg"].stride() == weight.stride()
    assert moments["exp_avg"].abs().sum() > 0


def test_a_restored_job_saves_the_same_checkpoint(interrupting: Interrupting) -> None:
    from convlens.training.checkpoint import restore_checkpoint, save_checkpoint

    recipe = tiny(*EVERYTHING)
    stop(recipe, "stopped", interrupting, 8)
    job, run_dir = begin(recipe, "stopped")
    best = BestEpoch("val_loss")
    rows = restore_checkpoint(run_dir, job, best)
    stored = run_dir.state()
    save_checkpoint(run_dir, job, best, rows)
    again = run_dir.state()
    assert stored is not None
    assert again is not None
    same(stored[0], again[0])
    assert stored[1] == again[1]
    assert (job.state.epoch, job.state.step, len(rows)) == (2, 3, 1)
    assert any(name.startswith("ema.") for name in stored[0])
    assert isinstance(job.averager, optim.EMA)
    assert job.averager.steps == 8
    assert isinstance(job.state.loss_sum, float)


def test_resuming_with_changed_images_is_refused(interrupting: Interrupting) -> None:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for label in "abc":
        Path("photos", label).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(Path("photos", label, f"{number}.png"))
    tree = {**tiny().model_dump(mode="json"), "data": {"name": "photos", "image_size": 8}}
    recipe = load_recipe(tree)
    interrupting.after = 3
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe, is_unmodified_recipe=True, test=False, device="cpu", quiet=True)
    changed = Path("photos/a/0.png")
    before = changed.read_bytes()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(changed)
    with pytest.raises(DataError, match="not those that run 'tiny' started with") as caught:
        train.train(recipe, is_unmodified_recipe=True, test=False, device="cpu", quiet=True)
    assert "--fresh" in caught.value.fix
    changed.write_bytes(before)
    run_dir = train.train(recipe, is_unmodified_recipe=True, device="cpu", quiet=True)
    assert run_dir.is_finished
    changed.unlink()
    with pytest.raises(DataError, match="changed since this model was trained"):
        train.train(recipe, is_unmodified_recipe=True, device="cpu", quiet=True)


def test_progress_is_stored_in_the_keys_of_earlier_versions() -> None:
    """So that runs saved by an earlier version can be resumed and extended."""
    job, run_dir = begin(tiny(), "keys")
    records = run_train_loop(job, job.process_group)
    for _ in range(2):
        next(records)
    job.state.micro_batch_size = 8
    checkpoint.save_checkpoint(run_dir, job, checkpoint.BestEpoch("val_loss"), [])
    stored = run_dir.state()
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
    checkpoint.restore_checkpoint(run_dir, again, checkpoint.BestEpoch("val_loss"))
    assert again.state == job.state
