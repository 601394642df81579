"""Interruptions, errors and lost files near the end of a run; restarts and extensions."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from convlens import run, serialization
from convlens.data.loader import Batches, epoch_order
from convlens.engine.loop import TrainLoop
from convlens.errors import DataError, Diverged, Stopped
from convlens.recipe import Recipe
from convlens.run import RunDir
from convlens.training import train as training_train
from convlens.training.checkpoint import CheckpointManager
from convlens.training.train import report_setup_changes
from helpers.commands import here, refused
from helpers.interrupted_runs import Interrupting, equal, finish, interrupting, stop
from helpers.support import begin, tiny
from selftest import differences

__all__ = ["interrupting"]  # a fixture

CONSTANT = ("optim.schedule=constant", "optim.warmup=0")


def train(recipe: Recipe, name: str, **options: bool) -> RunDir:
    return training_train.train(recipe, name=name, test=False, device="cpu", quiet=True, **options)


def test_a_run_without_its_model_file_is_not_finished(interrupting: Interrupting) -> None:
    uninterrupted, lost = train(tiny(), "uninterrupted"), train(tiny(), "lost")
    lost.model_path.unlink()
    interrupting.after = 7  # in the second epoch, after the model file was written again
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), "lost")
    assert lost.model_path.exists()
    assert not lost.is_finished
    train(tiny(), "lost")
    assert lost.is_finished
    assert differences(uninterrupted, lost) == []


def test_lost_weights_are_written_again_from_the_checkpoint() -> None:
    recipe = tiny("train.keep=last", "optim.ema=0.9")
    uninterrupted, lost = train(recipe, "uninterrupted"), train(recipe, "lost")
    lost.model_path.unlink()
    lost.metrics_path.unlink()
    train(recipe, "lost")
    assert differences(uninterrupted, lost) == []


def test_a_signal_before_training_starts_leaves_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(training_train, "build_training_job", prepare)
    Path("x.yaml").write_text(tiny().to_text())
    refused(here("train", "x.yaml", "--device", "cpu"), 75, "asked to stop (SIGUSR1)", "again")
    assert not RunDir(Path("models/x")).metadata()


@pytest.mark.parametrize("last", [1, 3])
def test_an_interrupted_validation_is_repeated_on_resume(last: int) -> None:
    """A validation may take long; the epoch is completed when the run resumes."""
    uninterrupted = finish(tiny("optim.ema=0.9"), "uninterrupted")
    job, run_dir = begin(tiny("optim.ema=0.9"), "stopped")
    validate, calls = job.inputs.validate, []

    def signalled(advance):  # type: ignore[no-untyped-def]
        calls.append(1)

        def advance_or_stop(images: int) -> None:
            if len(calls) == last:
                signal.raise_signal(signal.SIGTERM)
            advance(images)

        return validate(advance_or_stop)

    job.inputs = dataclasses.replace(job.inputs, validate=signalled)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM"):
        training_train.fit(job, run_dir)
    assert len(calls) == last
    assert len(run_dir.metrics()) == last - 1
    state = run_dir.state()
    assert state is not None
    position = state[1]["position"]
    assert (position["epoch"], position["step"]) == (last, 5)
    equal(finish(tiny("optim.ema=0.9"), "stopped"), uninterrupted)


def test_a_signal_after_the_last_validation_stops_the_training() -> None:
    uninterrupted = finish(tiny(), "uninterrupted")
    job, run_dir = begin(tiny(), "stopped")
    validate, calls = job.inputs.validate, []

    def signalled(advance):  # type: ignore[no-untyped-def]
        calls.append(1)
        result = validate(advance)
        if len(calls) == job.epochs:
            signal.raise_signal(signal.SIGINT)
        return result

    job.inputs = dataclasses.replace(job.inputs, validate=signalled)
    with pytest.raises(KeyboardInterrupt):
        training_train.fit(job, run_dir)
    assert run_dir.metadata()["status"] == "training"
    assert len(run_dir.metrics()) == job.epochs
    run_dir.metrics_path.write_text("damaged")
    equal(finish(tiny(), "stopped"), uninterrupted)


def test_a_non_finite_loss_names_the_images_of_its_batch() -> None:
    recipe = tiny("optim.name=sgd", "optim.lr=1e30")
    with pytest.raises(Diverged, match="became NaN or infinite") as caught:
        train(recipe, "x")
    diverged = RunDir(Path("models/x")).metadata()["diverged"]
    job, _ = begin(recipe, "again")
    ids = [job.data.train.ids[i] for i in epoch_order(80, 0, diverged["epoch"]).tolist()]
    assert diverged["images"] == ids[16 * (diverged["step"] - 1) : 16 * diverged["step"]]
    assert (
        f"images {', '.join(diverged['images'][:3])} ...: run.json lists all" in caught.value.what
    )


@pytest.mark.parametrize("calls_before", [6, 10])
def test_a_non_finite_gradient_is_attributed_to_its_step(
    calls_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first non-finite loss is that of the following step."""
    real, calls = TrainLoop.train_step, []

    def step(loop: TrainLoop, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == calls_before:
            weights = next(loop.model.parameters())
            weights.register_hook(lambda gradient: gradient * torch.nan)
        return real(loop, *arguments)

    monkeypatch.setattr(TrainLoop, "train_step", step)
    with pytest.raises(Diverged, match="its loss was finite, its gradient was not") as caught:
        train(tiny(), "x")
    epoch, index = divmod(calls_before - 1, 5)
    assert f"the update of epoch {epoch + 1}, step {index + 1} made" in caught.value.what
    run_dir = RunDir(Path("models/x"))
    diverged = run_dir.metadata()["diverged"]
    assert (diverged["epoch"], diverged["step"]) == (epoch + 1, index + 1)
    tensors, _ = serialization.read_model_file(run_dir.model_path)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_images_that_become_unreadable_lose_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uninterrupted = train(tiny(), "uninterrupted")
    real, read = Batches.epoch, []

    def epoch(batches: Batches, *arguments: int) -> Any:
        for batch in real(batches, *arguments):
            read.append(1)
            if len(read) == 8:
                raise DataError("the file has changed since it was read first")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "epoch", epoch)
        with pytest.raises(DataError, match="has changed"):
            train(tiny(), "x")
    state = RunDir(Path("models/x")).state()
    assert state is not None
    position = state[1]["position"]
    assert (position["epoch"], position["step"]) == (2, 2)
    assert differences(uninterrupted, train(tiny(), "x")) == []


def test_a_busy_gpu_is_an_error_without_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With exit code 75 a scheduler would retry forever. The error of torch is simulated."""

    def step(*arguments: Any, **more: Any) -> Any:
        raise torch.AcceleratorError(
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
        )

    monkeypatch.setattr(TrainLoop, "train_step", step)
    Path("x.yaml").write_text(tiny().to_text())
    done = here("train", "x.yaml", "--no-test", "--device", "cpu")
    refused(done, 5, "the GPU is busy", "--device")


def test_a_failing_gpu_loses_only_unsaved_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that torch raises is simulated in the seventh step."""
    uninterrupted = train(tiny(), "uninterrupted")
    Path("x.yaml").write_text(tiny().to_text())
    real, calls = TrainLoop.train_step, []

    def step(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with ...")
        return real(*arguments, **more)

    monkeypatch.setattr(TrainLoop, "train_step", step)
    monkeypatch.setenv("CONVLENS_SAVE_SECONDS", "0")
    command = ("train", "x.yaml", "--name", "x", "--no-test", "--device", "cpu")
    refused(here(*command), 75, "the GPU failed: CUDA error: unspecified launch failure", "resume")
    assert here(*command).code == 0
    assert len(calls) == 7 + 9  # six steps of fifteen were kept
    assert differences(uninterrupted, RunDir(Path("models/x"))) == []


def test_a_torchrun_restart_resumes_a_fresh_run(
    monkeypatch: pytest.MonkeyPatch, interrupting: Interrupting
) -> None:
    first = train(tiny(), "x")
    interrupting.after = 3
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), "x", fresh=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    second = train(tiny(), "x", fresh=True)
    assert second.path != first.path
    assert len(run.list_runs()) == 2
    assert differences(first, second) == []


def test_an_extension_continues_counting_patience() -> None:
    # With this learning rate no epoch is better than the first.
    options = (*CONSTANT, "optim.name=sgd", "optim.lr=0.3", "train.patience=4")
    train(tiny(*options), "short")
    longer = tiny(*options, "train.epochs=9")
    extended, uninterrupted = train(longer, "extended", extend=True), train(longer, "uninterrupted")
    assert extended.metadata()["extends"]["exact"] is True
    assert len(uninterrupted.metrics()) < 9
    assert differences(uninterrupted, extended) == []


def test_the_name_of_a_killed_extension_can_be_used() -> None:
    uninterrupted, other = train(tiny(), "uninterrupted"), train(tiny("optim.lr=0.5"), "other")
    stray = Path("models/x/state")
    shutil.copytree(other.path / "state", stray)
    started = train(tiny(), "x")
    assert started.path == Path("models/x")
    assert differences(uninterrupted, started) == []


def test_a_damaged_other_run_does_not_prevent_an_extension() -> None:
    train(tiny(*CONSTANT), "short")
    train(tiny("optim.lr=0.5"), "damaged")
    with Path("models/damaged/recipe.yaml").open("a") as file:
        file.write("about: something else\n")
    Path("models/another").mkdir()
    Path("models/another/run.json").write_text('{"status": ')
    extended = train(tiny(*CONSTANT, "train.epochs=4"), "longer", extend=True)
    assert extended.metadata()["extends"]["run"] == "short"


def test_the_kept_epoch_is_that_of_the_model_file(
    interrupting: Interrupting, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = stop(tiny(), "stopped", interrupting, 12)
    job, run_dir = begin(tiny(), "stopped")
    checkpoints = CheckpointManager(job, run_dir)
    assert checkpoints.best.epoch in (1, 2)
    assert checkpoints.kept_epoch() == checkpoints.best.epoch
    assert capsys.readouterr().err == ""
    # Killed after writing the model file, before the checkpoint, on non-deterministic hardware.
    tensors, model_metadata = serialization.read_model_file(stopped.model_path)
    serialization.write_model_file(
        stopped.model_path,
        tensors,
        {**model_metadata, "chosen": {**model_metadata["chosen"], "epoch": 3}},
    )
    checkpoints = CheckpointManager(*begin(tiny(), "stopped"))
    assert checkpoints.kept_epoch() == 3
    assert "the weights of epoch 3 are kept" in capsys.readouterr().err


def test_a_feature_cache_that_no_longer_fits_is_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = train(tiny(), "x")
    metadata = run_dir.metadata()
    report_setup_changes(run_dir, metadata, {**metadata, "trunk_cached": True})
    assert "trunk_cached False, now True" in capsys.readouterr().err
    assert run_dir.metadata()["changed"] == [{"trunk_cached": [False, True]}]
