"""The end of a run: signals that come last, lost files, restarts, extensions cut short."""

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


def train(asked: Recipe, name: str, **options: bool) -> RunDir:
    return training_train.train(asked, name=name, test=False, device="cpu", quiet=True, **options)


def test_a_finished_run_without_its_weights_is_not_finished(interrupting: Interrupting) -> None:
    whole, lost = train(tiny(), "whole"), train(tiny(), "lost")
    lost.model_path.unlink()
    interrupting.after = 7  # in the second epoch: by then there are weights again
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), "lost")
    assert lost.model_path.exists()
    assert not lost.is_finished
    train(tiny(), "lost")
    assert lost.is_finished
    assert differences(whole, lost) == []


def test_the_last_weights_are_written_again_from_the_state() -> None:
    asked = tiny("train.keep=last", "optim.ema=0.9")
    whole, lost = train(asked, "whole"), train(asked, "lost")
    lost.model_path.unlink()
    lost.metrics_path.unlink()
    train(asked, "lost")
    assert differences(whole, lost) == []


def test_a_signal_while_all_is_made_ready_leaves_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(training_train, "build_training_job", prepare)
    Path("x.yaml").write_text(tiny().to_text())
    refused(here("train", "x.yaml", "--device", "cpu"), 75, "asked to stop (SIGUSR1)", "again")
    assert not RunDir(Path("models/x")).metadata()


@pytest.mark.parametrize("last", [1, 3])
def test_a_validation_is_left_and_made_up_for(last: int) -> None:
    """It may take long; its epoch ends when the run is taken up."""
    whole = finish(tiny("optim.ema=0.9"), "whole")
    job, place = begin(tiny("optim.ema=0.9"), "stopped")
    validate, calls = job.inputs.validate, []

    def signalled(advance):  # type: ignore[no-untyped-def]
        calls.append(1)

        def told(images: int) -> None:
            if len(calls) == last:
                signal.raise_signal(signal.SIGTERM)
            advance(images)

        return validate(told)

    job.inputs = dataclasses.replace(job.inputs, validate=signalled)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM"):
        training_train.fit(job, place)
    assert len(calls) == last
    assert len(place.metrics()) == last - 1
    found = place.state()
    assert found is not None
    at = found[1]["position"]
    assert (at["epoch"], at["step"]) == (last, 5)
    equal(finish(tiny("optim.ema=0.9"), "stopped"), whole)


def test_a_signal_behind_the_last_validation_is_heard() -> None:
    whole = finish(tiny(), "whole")
    job, place = begin(tiny(), "stopped")
    validate, calls = job.inputs.validate, []

    def signalled(advance):  # type: ignore[no-untyped-def]
        calls.append(1)
        found = validate(advance)
        if len(calls) == job.epochs:
            signal.raise_signal(signal.SIGINT)
        return found

    job.inputs = dataclasses.replace(job.inputs, validate=signalled)
    with pytest.raises(KeyboardInterrupt):
        training_train.fit(job, place)
    assert place.metadata()["status"] == "training"
    assert len(place.metrics()) == job.epochs
    place.metrics_path.write_text("damaged")
    equal(finish(tiny(), "stopped"), whole)


def test_a_loss_that_is_none_names_its_images() -> None:
    asked = tiny("optim.name=sgd", "optim.lr=1e30")
    with pytest.raises(Diverged, match="became NaN or infinite") as caught:
        train(asked, "x")
    told = RunDir(Path("models/x")).metadata()["diverged"]
    job, _ = begin(asked, "again")
    ids = [job.data.train.ids[i] for i in epoch_order(80, 0, told["epoch"]).tolist()]
    assert told["images"] == ids[16 * (told["step"] - 1) : 16 * told["step"]]
    assert f"images {', '.join(told['images'][:3])} ...: run.json lists all" in caught.value.what


@pytest.mark.parametrize("calls_before", [6, 10])
def test_a_gradient_that_is_none_is_blamed_on_its_step(
    calls_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the step after it is the first that isn't finite."""
    real, calls = TrainLoop.train_step, []

    def step(loop: TrainLoop, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == calls_before:
            weights = next(loop.model.parameters())
            weights.register_hook(lambda gradient: gradient * torch.nan)
        return real(loop, *arguments)

    monkeypatch.setattr(TrainLoop, "train_step", step)
    with pytest.raises(Diverged, match="its loss was finite, its gradient wasn't") as caught:
        train(tiny(), "x")
    epoch, index = divmod(calls_before - 1, 5)
    assert f"the update of epoch {epoch + 1}, step {index + 1} made" in caught.value.what
    place = RunDir(Path("models/x"))
    told = place.metadata()["diverged"]
    assert (told["epoch"], told["step"]) == (epoch + 1, index + 1)
    tensors, _ = serialization.read_model_file(place.model_path)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_images_that_can_not_be_read_any_more_cost_no_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = train(tiny(), "whole")
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
    found = RunDir(Path("models/x")).state()
    assert found is not None
    assert (found[1]["position"]["epoch"], found[1]["position"]["step"]) == (2, 2)
    assert differences(whole, train(tiny(), "x")) == []


def test_a_gpu_that_is_taken_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler would start it again and again; a stand-in: torch's error at the first use."""

    def step(*arguments: Any, **more: Any) -> Any:
        raise torch.AcceleratorError(
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
        )

    monkeypatch.setattr(TrainLoop, "train_step", step)
    Path("x.yaml").write_text(tiny().to_text())
    done = here("train", "x.yaml", "--no-test", "--device", "cpu")
    refused(done, 5, "the GPU is busy", "--device")


def test_a_gpu_that_is_lost_costs_what_was_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: the error that torch raises, in the seventh step."""
    whole = train(tiny(), "whole")
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
    assert differences(whole, RunDir(Path("models/x"))) == []


def test_torchrun_goes_on_with_a_fresh_run(
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


def test_patience_that_has_not_run_out_goes_on_counting() -> None:
    # It only gets worse, so no epoch is better than the first one.
    options = (*CONSTANT, "optim.name=sgd", "optim.lr=0.3", "train.patience=4")
    train(tiny(*options), "short")
    longer = tiny(*options, "train.epochs=9")
    extended, whole = train(longer, "extended", extend=True), train(longer, "whole")
    assert extended.metadata()["extends"]["exact"] is True
    assert len(whole.metrics()) < 9
    assert differences(whole, extended) == []


def test_an_extension_that_was_killed_leaves_its_name_free() -> None:
    whole, other = train(tiny(), "whole"), train(tiny("optim.lr=0.5"), "other")
    stray = Path("models/x/state")
    shutil.copytree(other.path / "state", stray)
    begun = train(tiny(), "x")
    assert begun.path == Path("models/x")
    assert differences(whole, begun) == []


def test_another_run_that_is_damaged_is_not_in_the_way_of_an_extension() -> None:
    train(tiny(*CONSTANT), "short")
    train(tiny("optim.lr=0.5"), "damaged")
    with Path("models/damaged/recipe.yaml").open("a") as file:
        file.write("about: something else\n")
    Path("models/another").mkdir()
    Path("models/another/run.json").write_text('{"status": ')
    extended = train(tiny(*CONSTANT, "train.epochs=4"), "longer", extend=True)
    assert extended.metadata()["extends"]["run"] == "short"


def test_the_kept_epoch_is_that_of_the_weights_in_the_file(
    interrupting: Interrupting, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = stop(tiny(), "stopped", interrupting, 12)
    job, place = begin(tiny(), "stopped")
    checkpoints = CheckpointManager(job, place)
    assert checkpoints.best.epoch in (1, 2)
    assert checkpoints.kept_epoch() == checkpoints.best.epoch
    assert capsys.readouterr().err == ""
    # Killed behind the model file and before the state, on hardware that repeats no bits.
    tensors, model_metadata = serialization.read_model_file(stopped.model_path)
    serialization.write_model_file(
        stopped.model_path,
        tensors,
        {**model_metadata, "chosen": {**model_metadata["chosen"], "epoch": 3}},
    )
    checkpoints = CheckpointManager(*begin(tiny(), "stopped"))
    assert checkpoints.kept_epoch() == 3
    assert "the weights of epoch 3 are kept" in capsys.readouterr().err


def test_a_trunk_that_no_longer_fits_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    place = train(tiny(), "x")
    facts = place.metadata()
    report_setup_changes(place, facts, {**facts, "trunk_cached": True})
    assert "trunk_cached False, now True" in capsys.readouterr().err
    assert place.metadata()["changed"] == [{"trunk_cached": [False, True]}]
