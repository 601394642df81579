"""Two checkpoints are kept, and the older one is used if the newest is corrupt."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from convlens import serialization
from convlens.errors import ModelFileError, ResourceError
from convlens.run import RunDir
from convlens.serialization import CheckpointStore
from convlens.training import checkpoint
from helpers.interrupted_runs import EVERYTHING, equal, finish
from helpers.killing import deaths
from helpers.support import BAD_DISK, same, tiny


def counters(epoch: int, step: int, **more: Any) -> dict[str, Any]:
    return {"position": {"epoch": epoch, "step": step}, **more}


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((3,), value)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_two_newest_are_kept_and_the_newest_is_read() -> None:
    store = CheckpointStore(Path("state"))
    assert store.read() is None
    for step in (1, 2, 3):
        store.save(tensors(step), counters(1, step))
    assert names(Path("state")) == [
        "0001-000002.safetensors",
        "0001-000003.safetensors",
    ]
    loaded = CheckpointStore(Path("state")).read()
    assert loaded is not None
    same(loaded.tensors, tensors(3))
    assert loaded.counters["position"] == {"epoch": 1, "step": 3}


def test_saving_the_same_step_again_keeps_the_checkpoint_before_it() -> None:
    store = CheckpointStore(Path("state"))
    store.save(tensors(1), counters(1, 1))
    store.save(tensors(2), counters(1, 2))
    store.save(tensors(2.5), counters(1, 2))
    assert names(Path("state")) == ["0001-000001.safetensors", "0001-000002.safetensors"]
    loaded = store.read()
    assert loaded is not None
    same(loaded.tensors, tensors(2.5))


def test_checkpoints_are_ordered_by_numbers_not_by_letters() -> None:
    store = CheckpointStore(Path("state"))
    for epoch, step in ((9999, 999_999), (10_000, 5), (10_000, 1_000_000)):
        store.save(tensors(step), counters(epoch, step))
    assert names(Path("state")) == ["10000-000005.safetensors", "10000-1000000.safetensors"]
    loaded = CheckpointStore(Path("state")).read()
    assert loaded is not None
    same(loaded.tensors, tensors(1_000_000))


DAMAGES = ["flipped", "truncated", "emptied", "deleted", "exchanged", "unreadable"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(damage: str) -> None:
    store = CheckpointStore(Path("state"))
    store.save(tensors(1), counters(1, 4))
    store.save(tensors(2), counters(3, 7))
    newest = Path("state/0003-000007.safetensors")
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[-2] ^= 1
        newest.write_bytes(content)
    elif damage == "truncated":
        newest.write_bytes(content[:-5])
    elif damage == "emptied":  # a power cut behind a rename that was not synced
        newest.write_bytes(bytes(len(content)))
    elif damage == "deleted":
        newest.unlink()
    elif damage == "unreadable":
        unreadable(newest)
    else:  # intact, but of another step than its name says
        serialization.write_model_file(newest, tensors(9), counters(3, 8))
    store = CheckpointStore(Path("state"))
    loaded = store.read()
    assert loaded is not None
    assert loaded.counters["position"] == {"epoch": 1, "step": 4}
    if damage == "deleted":
        assert store.corrupt == []
    else:
        (reason,) = store.corrupt
        assert reason.startswith("the checkpoint of epoch 3, step 7: ")
    # The next save keeps the intact checkpoint, not the damaged one.
    store.save(tensors(3), counters(1, 5))
    newest = Path("state/0001-000005.safetensors")
    newest.write_bytes(b"")
    loaded = CheckpointStore(Path("state")).read()
    assert loaded is not None
    assert loaded.counters["position"] == {"epoch": 1, "step": 4}


def unreadable(path: Path) -> None:
    """Replace a file by one whose reading fails with a real EIO."""
    path.unlink()
    path.symlink_to(BAD_DISK)
    with pytest.raises(OSError, match="Input/output error"):
        path.read_bytes()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_a_checkpoint_that_may_be_intact_is_not_skipped(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(Path("state"))
    store.save(tensors(1), counters(1, 4))
    store.save(tensors(2), counters(3, 7))
    original = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "0003-000007.safetensors":
            raise OSError(number, os.strerror(number))
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(ResourceError, match=os.strerror(number)) as caught:
            CheckpointStore(Path("state")).read()
    assert caught.value.where.endswith("0003-000007.safetensors")
    loaded = CheckpointStore(Path("state")).read()
    assert loaded is not None
    assert loaded.counters["position"] == {"epoch": 3, "step": 7}


def test_files_not_named_like_a_checkpoint_are_ignored() -> None:
    store = CheckpointStore(Path("state"))
    store.save(tensors(1), counters(1, 9))
    for name in ("notes.safetensors", "0002-000003.safetensors.part", "2-3.safetensors"):
        serialization.write_model_file(Path("state") / name, tensors(2), counters(2, 3))
    loaded = CheckpointStore(Path("state")).read()
    assert loaded is not None
    assert loaded.counters["position"] == {"epoch": 1, "step": 9}


def test_the_directory_of_an_earlier_version_is_read() -> None:
    """It had a manifest; the names of checkpoints were the same."""
    serialization.write_model_file(
        Path("state/0008-000000.safetensors"), tensors(8), counters(8, 0)
    )
    Path("state/manifest.json").write_text('{"format": 1, "generations": []}')
    store = CheckpointStore(Path("state"))
    loaded = store.read()
    assert loaded is not None
    same(loaded.tensors, tensors(8))
    store.save(tensors(9), counters(9, 0))
    assert names(Path("state")) == ["0008-000000.safetensors", "0009-000000.safetensors"]


def test_a_checkpoint_of_a_later_version_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(Path("state"))
    store.save(tensors(1), counters(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(serialization, "MODEL_FORMAT", serialization.MODEL_FORMAT + 1)
        store.save(tensors(2), counters(1, 2))
    with pytest.raises(serialization.NewerFormatError, match="newer convlens") as caught:
        CheckpointStore(Path("state")).read()  # the next save would delete it
    assert caught.value.fix == "update convlens"
    assert Path("state/0001-000002.safetensors").exists()


def test_leftover_files_are_deleted_and_a_directory_is_left_alone() -> None:
    store = CheckpointStore(Path("state"))
    store.save(tensors(1), counters(1, 1))
    Path("state/.0001-000002.safetensors.abcdefgh.part").write_bytes(b"half of it")
    Path("state/mine").mkdir()
    Path("state/mine/notes.txt").write_text("somebody's")
    loaded = CheckpointStore(Path("state")).read()
    assert loaded is not None
    store.save(tensors(2), counters(1, 2))
    kept = ["0001-000001.safetensors", "0001-000002.safetensors", "mine"]
    assert names(Path("state")) == kept
    store.clear()
    assert names(Path("state")) == ["mine"]
    assert Path("state/mine/notes.txt").exists()
    store.save(tensors(3), counters(1, 3))
    loaded = CheckpointStore(Path("state")).read()
    assert loaded is not None
    same(loaded.tensors, tensors(3))


def test_a_skipped_checkpoint_is_never_used_later() -> None:
    """It was skipped because the best weights it needs were lost, and they may reappear."""
    store = CheckpointStore(Path("state"))
    store.save(tensors(1), counters(1, 1))
    store.save(tensors(2), counters(5, 0, model_epoch=4))
    store = CheckpointStore(Path("state"))
    loaded = store.read(lambda c: "no weights" if "model_epoch" in c else "")
    assert loaded is not None
    same(loaded.tensors, tensors(1))
    assert store.corrupt == ["the checkpoint of epoch 5, step 0: no weights"]
    store.save(tensors(3), counters(1, 3))
    assert names(Path("state")) == ["0001-000001.safetensors", "0001-000003.safetensors"]


def test_a_corrupt_checkpoint_is_not_kept_as_the_one_before() -> None:
    store = CheckpointStore(Path("state"))
    store.save(tensors(1), counters(1, 4))
    store.save(tensors(2), counters(3, 7))
    Path("state/0003-000007.safetensors").write_bytes(b"")
    store = CheckpointStore(Path("state"))
    assert store.read() is not None
    store.save(tensors(3), counters(4, 0))  # further than the corrupt one
    assert names(Path("state")) == ["0001-000004.safetensors", "0004-000000.safetensors"]


def test_keep_newest_leaves_the_checkpoint_that_was_used_last() -> None:
    store = CheckpointStore(Path("state"))
    store.keep_newest()
    store.save(tensors(1), counters(1, 4))
    store.save(tensors(2), counters(3, 7))
    CheckpointStore(Path("state")).keep_newest()
    assert names(Path("state")) == ["0003-000007.safetensors"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("before", [1, 2])
def test_a_save_killed_at_any_step_leaves_an_intact_checkpoint(before: int) -> None:
    """A real SIGKILL right before and after each fsync, rename and deletion."""
    folder, new = Path("state"), before + 1
    stores = [CheckpointStore(folder)]

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        stores[0] = CheckpointStore(folder)
        for step in range(1, new):
            stores[0].save(tensors(step), counters(1, step))

    outcomes, left_over = list[tuple[str, int]](), 0
    for moment in deaths(lambda: stores[0].save(tensors(new), counters(1, new)), prepare):
        left_over += any(name.startswith(".") for name in names(folder))
        after = CheckpointStore(folder)
        state = after.read()
        assert state is not None, moment
        assert after.corrupt == []
        step = state.counters["position"]["step"]
        same(state.tensors, tensors(step))
        outcomes.append((moment, step))
        after.save(tensors(9), counters(1, 9))
        assert len(names(folder)) == serialization.NUM_KEPT, moment
        assert names(folder)[-1] == "0001-000009.safetensors", moment
    save = ["fsync", "replace", "fsync"] + ["unlink"] * (before == serialization.NUM_KEPT)
    assert [moment for moment, _ in outcomes] == [f"{w} {name}" for name in save for w in MOMENTS]
    # The rename commits the new checkpoint.
    assert [step for _, step in outcomes] == [before] * 3 + [new] * (len(outcomes) - 3)
    assert left_over == 3  # until the rename


MOMENTS = ("before", "after")


@pytest.mark.parametrize("at", range(1, 7))
def test_a_failed_write_leaves_an_intact_checkpoint(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at each step of a save: write, fsync, rename."""
    store = CheckpointStore(Path("state"))
    store.save(tensors(1), counters(1, 1))
    calls = []

    def failing(name: str) -> Any:
        original = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            calls.append(name)
            if len(calls) == at:
                raise OSError(28, "No space left on device")
            return original(*arguments, **more)

        return call

    raised = None
    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "chmod", "open"):
            patch.setattr(os, name, failing(name))
        try:
            store.save(tensors(2), counters(1, 2))
        except ResourceError as error:
            raised = error
    assert raised is None or "free disk space" in raised.fix
    loaded = CheckpointStore(Path("state")).read()
    assert loaded is not None
    step = loaded.counters["position"]["step"]
    same(loaded.tensors, tensors(step))
    assert step == 2 if raised is None else step in (1, 2)
    assert not [name for name in names(Path("state")) if name.startswith(".")]


def test_contents_are_fsynced_before_the_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that survives a power cut: contents, name, folder."""
    store = CheckpointStore(Path("state"))
    calls = []

    def synced(handle: int) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        return "folder" if path.is_dir() else "contents"

    def traced(name: str, describe: Any) -> Any:
        original = getattr(os, name)

        def call(*arguments: Any) -> Any:
            calls.append(describe(*arguments))
            return original(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", traced("fsync", synced))
        patch.setattr(os, "replace", traced("replace", lambda *_: "name"))
        store.save(tensors(1), counters(1, 1))
    # The first is the directory above, which got a new entry.
    assert calls == ["folder", "contents", "name", "folder"]


# Training runs


def killed_after(saves: int, name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Train a run that saves after each step until it is killed right after `saves` saves."""
    original, done = checkpoint.save_checkpoint, []

    def save(*arguments: Any) -> None:
        original(*arguments)
        done.append(1)
        if len(done) == saves:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setenv("CONVLENS_SAVE_SECONDS", "0")
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(MemoryError):
            finish(tiny(*EVERYTHING, *options), name)


def full(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a full disk: a real ENOSPC of /dev/full in write, or an injected one in fsync."""

    def opened(handle: int, mode: str) -> Any:
        os.close(handle)
        return open("/dev/full", mode)

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "write":
        monkeypatch.setattr(os, "fdopen", opened)
    else:
        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(("call", "saves"), [("write", 1), ("write", 8), ("fsync", 3)])
def test_a_full_disk_loses_only_unsaved_steps(
    call: str, saves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = finish(tiny(*EVERYTHING), "whole")
    original, done = checkpoint.save_checkpoint, list[tuple[int, int]]()

    def save(*arguments: Any) -> None:
        if len(done) == saves - 1:
            full(call, patch)
        original(*arguments)
        done.append((arguments[1].state.epoch, arguments[1].state.step))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "RETRY_PAUSES_S", (0, 0))
        patch.setenv("CONVLENS_SAVE_SECONDS", "0")
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(ResourceError, match="No space left on device") as caught:
            finish(tiny(*EVERYTHING), "full")
    assert "free disk space" in caught.value.fix
    assert len(done) == saves - 1
    run_dir = RunDir(Path("models/full"))
    state = run_dir.state()
    saved = [(state[1]["position"]["epoch"], state[1]["position"]["step"])] if state else []
    assert saved == done[-1:]  # that of the previous save
    assert not list(run_dir.path.rglob("*.part"))
    equal(finish(tiny(*EVERYTHING), "full"), uninterrupted)


@pytest.mark.parametrize("saves", [1, 2, 7, 14])
def test_a_run_with_a_damaged_checkpoint_resumes_to_the_same_bits(
    saves: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = finish(tiny(*EVERYTHING), "whole")
    killed_after(saves, "damaged", monkeypatch)
    folder = Path("models/damaged/state")
    newest = max(folder.glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 64
    newest.write_bytes(content)
    equal(finish(tiny(*EVERYTHING), "damaged"), uninterrupted)
    messages = capsys.readouterr().err
    assert "cannot be used: the checkpoint of epoch" in messages
    start = "the beginning" if saves == 1 else "epoch"
    assert f"resuming from {start}" in messages
    assert "later steps are trained again" in messages


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_failed_save_is_retried(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ninth save, in the third step of the second epoch, fails for a while."""
    uninterrupted = finish(tiny(*EVERYTHING), "whole")
    monkeypatch.setenv("CONVLENS_SAVE_SECONDS", "0")
    monkeypatch.setattr(checkpoint, "RETRY_PAUSES_S", (0, 0))
    original, saves = checkpoint.save_checkpoint, []

    def save(*arguments: Any) -> None:
        saves.append(1)
        if 9 <= len(saves) < 9 + failures:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", stale_handle)
                original(*arguments)
        else:
            original(*arguments)

    def stale_handle(handle: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    messages = list[str]()
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    monkeypatch.setattr(checkpoint, "print_status", messages.append)
    if failures == 3:
        with pytest.raises(ResourceError, match="can't write: Stale file handle"):
            finish(tiny(*EVERYTHING), "away")
        loaded = RunDir(Path("models/away")).state()
        assert loaded is not None
        position = loaded[1]["position"]
        assert (position["epoch"], position["step"]) == (2, 2)  # the step before
    equal(finish(tiny(*EVERYTHING), "away"), uninterrupted)
    assert len(messages) == min(failures, 2)
    assert all(each.startswith("not saved: can't write: Stale file handle") for each in messages)


@pytest.mark.parametrize("damage", ["cut", "unreadable"])
def test_lost_best_weights_are_trained_again(
    damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = finish(tiny(*EVERYTHING), "whole")
    killed_after(9, "damaged", monkeypatch)
    run_dir = RunDir(Path("models/damaged"))
    assert serialization.read_model_file(run_dir.model_path)[1]["chosen"]["epoch"] == 1
    if damage == "cut":
        run_dir.model_path.write_bytes(run_dir.model_path.read_bytes()[:-1])
    else:
        unreadable(run_dir.model_path)
        with pytest.raises(ModelFileError, match="the disk cannot return the file") as caught:
            serialization.read_model_file(run_dir.model_path)
        assert caught.value.fix
    equal(finish(tiny(*EVERYTHING), "damaged"), uninterrupted)
    messages = capsys.readouterr().err
    assert "the weights of epoch 1, the best ones, are lost" in messages
    assert "resuming from the beginning" in messages


def test_the_save_interval_is_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    from convlens.errors import UsageError

    monkeypatch.setenv("CONVLENS_SAVE_SECONDS", "30")
    assert checkpoint.save_interval_s() == 30
    monkeypatch.setenv("CONVLENS_SAVE_SECONDS", "often")
    with pytest.raises(UsageError, match="CONVLENS_SAVE_SECONDS='often' is not a number"):
        checkpoint.save_interval_s()
    monkeypatch.delenv("CONVLENS_SAVE_SECONDS")
    assert checkpoint.save_interval_s() == checkpoint.SAVE_INTERVAL_S == 60
    assert serialization.NUM_KEPT == 2
