"""How data and work are divided among processes, simulated in a single process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from convlens import device, distributed
from convlens.data.loader import Batches, Normalize
from convlens.data.transforms.pipeline import AUGMENTS, MIXES, build_pipeline
from convlens.distributed import SINGLE_PROCESS, PeerLostError, ProcessGroup
from convlens.engine.data_parallel import (
    EVAL_CHUNK,
    SplitSlice,
    convert_sync_batchnorm,
    rows_per_rank,
)
from convlens.errors import UsageError
from convlens.utils import process
from helpers.augmentations import STRONG
from helpers.support import PLAN, Memory, Split, Streamed, begin, pictures, tiny

GREY_ARGUMENTS = {"Cutout": {"value": 0.3}}  # also valid for grey images
AUGMENTATIONS: list[list[tuple[str, dict[str, Any]]]] = [
    *([(name, {**STRONG[name], **GREY_ARGUMENTS.get(name, {})})] for name in AUGMENTS),
    *([(name, {})] for name in MIXES),
    [("RandomErasing", {"p": 0.5, "value": "random"})],
    # Operations that need the full batch, one that does not, and mixes, in sequence.
    [("TrivialAugmentWide", {}), ("RandomCrop", {"padding": 2}), ("CutMix", {}), ("MixUp", {})],
    [("RandomCrop", {"padding": 2}), ("ColorJitter", {"hue": 0.3}), ("RandomErasing", {"p": 0.5})],
]


def batches_of_rank(rank: int, size: int, ops: list[Any], channels: int, rows: Any) -> Batches:
    """44 images in batches of 13, 13, 13 and 5."""
    pipeline = build_pipeline(ops, image_size=8, channels=channels, classes=44)
    return Batches(
        Split(rows, torch.arange(44)),
        batch_size=13,
        normalize=Normalize([0.4] * channels, [0.2] * channels),
        plan=PLAN,
        seed=3,
        augment=pipeline,
        mixes=bool(pipeline.mixes),
        process_group=ProcessGroup(rank, size),
    )


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 7, 8, 13, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_shares_cover_the_batch_and_are_weighted_by_their_size(size: int, total: int) -> None:
    shares = [ProcessGroup(rank, size).share(total) for rank in range(size)]
    working = [share for share in shares if share.weight]
    rows = list(itertools.chain.from_iterable(range(s.start, s.stop) for s in working))
    assert rows == list(range(total))
    assert [s.weight for s in working] == [(s.stop - s.start) / total for s in working]
    assert sum(s.weight for s in shares) == pytest.approx(1)
    counts = [s.stop - s.start for s in working]
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= min(2, total)  # batch norm cannot train on one image
    # Ranks without rows of their own repeat the first ones with weight 0.
    assert all((s.start, s.stop) == (0, min(2, total)) for s in shares if not s.weight)


def test_a_single_process_gets_the_whole_batch() -> None:
    share = SINGLE_PROCESS.share(7)
    assert (share.start, share.stop, share.total, share.weight) == (0, 7, 7, 1.0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ops", AUGMENTATIONS, ids=lambda ops: "-".join(name for name, _ in ops))
def test_several_processes_train_on_the_samples_of_a_single_process(
    ops: list[tuple[str, dict[str, Any]]], channels: int
) -> None:
    images = pictures(44, channels)
    whole = list(batches_of_rank(0, 1, ops, channels, Memory(images)).epoch(2))
    for size in (2, 3, 4):
        worlds = [ProcessGroup(rank, size) for rank in range(size)]
        each = [
            list(batches_of_rank(w.rank, size, ops, channels, Memory(images)).epoch(2))
            for w in worlds
        ]
        for step, (pixels, labels) in enumerate(whole):
            for group, parts in zip(worlds, each, strict=True):
                rows = group.share(len(labels)).rows
                assert torch.equal(parts[step][0], pixels[rows])
                assert torch.equal(parts[step][1], labels[rows])


def test_each_image_is_read_by_one_process_only() -> None:
    images, ops = pictures(44), [("TrivialAugmentWide", {}), ("RandomCrop", {"padding": 1})]
    read = []
    for rank in range(3):
        rows = Streamed(images)
        list(batches_of_rank(rank, 3, ops, 1, rows).epoch(1))
        read.append(rows.reads)
    # The last batch has 5 images for two ranks; the third repeats rows of the first.
    assert read[2][3] == read[0][3][:2]
    once = [*itertools.chain.from_iterable(itertools.chain(*read[:2], read[2][:3]))]
    assert sorted(once) == list(range(44))
    mixed = Streamed(images)
    list(batches_of_rank(1, 3, [("MixUp", {})], 1, mixed).epoch(1))
    assert [len(rows) for rows in mixed.reads] == [13, 13, 13, 5]  # partners may be anywhere


@pytest.mark.parametrize("images", [1, 255, 256, 257, 1000, 2048, 2049])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
def test_slices_of_a_split_end_at_multiples_of_the_chunk(images: int, size: int) -> None:
    counts = rows_per_rank(images, size)
    assert sum(counts) == images
    assert len(counts) == size
    ends = list(itertools.accumulate(counts))
    assert all(end % EVAL_CHUNK == 0 or end == images for end in ends)
    assert counts[0] > 0
    assert max(counts) - min(counts) <= 2 * EVAL_CHUNK - 1


@pytest.mark.parametrize("rows", [Memory, Streamed])
def test_a_slice_behaves_like_a_split(rows: Any) -> None:
    images = pictures(10)
    part = SplitSlice(Split(rows(images), torch.arange(10)), 3, 7)
    assert part.rows.shape == (4, 1, 8, 8)
    assert part.labels.tolist() == [3, 4, 5, 6]
    assert torch.equal(part.gather(torch.tensor([2, 0])), images[[5, 3]])
    whole = part.in_memory_tensor()
    assert (whole is None) == (rows is Streamed)
    assert whole is None or torch.equal(whole, images[3:7])


# The environment of torchrun


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the third of four processes, which is the second on its machine."""
    for name, value in zip(
        process.TORCHRUN_VARIABLES, ("2", "4", "1", "2", "localhost", "1"), strict=True
    ):
        monkeypatch.setenv(name, value)


def test_rank_and_size_are_read_from_the_environment(
    torchrun: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (process.global_rank(), process.world_size()) == (2, 4)
    assert (process.local_rank(), process.local_size()) == (1, 2)
    monkeypatch.delenv("MASTER_ADDR")  # a WORLD_SIZE alone does not count
    assert (process.global_rank(), process.world_size()) == (0, 1)
    assert (process.local_rank(), process.local_size()) == (0, 1)


def test_the_memory_of_a_machine_is_divided_among_its_processes(
    torchrun: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVLENS_MEMORY", "64MB")
    assert device.memory_budget("cpu") == 32 * 2**20


def test_each_process_uses_its_own_gpu(torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # the GPUs are free
    assert device.select_device() == "cuda:1"
    assert chosen == [1]
    assert device.select_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes on this machine, which has 1 GPUs"):
        device.select_device()


def test_sync_batch_norm_requires_gpus() -> None:
    # A single process does not need to synchronize.
    job, _ = begin(tiny("train.sync_batch_norm=true"), "one")
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in job.model.modules())
    with pytest.raises(UsageError, match="SyncBatchNorm needs GPUs"):
        convert_sync_batchnorm(job.model, ProcessGroup(0, 2), "cpu")
    synced = convert_sync_batchnorm(job.model, ProcessGroup(0, 2), "cuda:0")
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())


class NeverReached:
    """A CUDA event behind a kernel that waits for a dead process."""

    def query(self) -> bool:
        return False


def test_waiting_for_a_hanging_gpu_step_ends_after_a_stop_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "STOP_GRACE_S", 0.05)
    group = ProcessGroup(1, 2, stop_requested=lambda: True)
    steps = distributed.STOP_VOTE_LAG_STEPS + 1
    group._votes.extend((torch.zeros(()), NeverReached()) for _ in range(steps))  # type: ignore[misc]
    with pytest.raises(PeerLostError, match="another process of this training ended") as caught:
        group.should_stop(now=False)
    assert "did not finish" in caught.value.where
    assert caught.value.exit_code == 75


def test_recorded_votes_stop_all_ranks_once() -> None:
    group = ProcessGroup(1, 2)
    group.record_stop_votes(torch.tensor(0.0))
    assert not group.should_stop(now=False)
    group.record_stop_votes(torch.tensor(1.0))
    assert group.should_stop(now=False)
    assert not group.should_stop(now=False)


def test_a_stop_callback_applies_only_to_the_new_group() -> None:
    group = SINGLE_PROCESS.with_stop_requested(lambda: True)
    assert group.should_stop(now=False)
    assert not SINGLE_PROCESS.should_stop(now=True)


def test_collectives_of_a_single_process_change_nothing() -> None:
    group, tensor = SINGLE_PROCESS, torch.tensor([1.0, 2.0])
    group.all_reduce_(tensor)
    group.broadcast_tensors_([tensor])
    group.barrier()
    assert tensor.tolist() == [1.0, 2.0]
    assert (group.all_reduce_sum(3.0), group.all_reduce_min(3.0)) == (3.0, 3.0)
    assert group.broadcast(lambda: (1, 2)) == (1, 2)
    assert group.all_gather(tensor, [2]) is tensor
    assert group.first_rank_that_differs("text") is None


def test_only_errors_of_the_communication_become_a_lost_peer() -> None:
    group = ProcessGroup(1, 2)
    closed = "[gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:1"
    with pytest.raises(PeerLostError) as lost, group.annotate_errors(lambda: "epoch 3"):
        raise RuntimeError(closed)
    assert "rank 1 of 2 on" in lost.value.where
    assert "in epoch 3: [gloo" in lost.value.where
    with pytest.raises(RuntimeError, match="shape"), group.annotate_errors(lambda: "epoch 3"):
        raise RuntimeError("shape '[2]' is invalid for input of size 3")
    with pytest.raises(RuntimeError, match="gloo"), SINGLE_PROCESS.annotate_errors(lambda: ""):
        raise RuntimeError(closed)


def test_the_first_process_of_a_machine_that_fails_decides_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = []
    for local_rank, code in ((1, 3), (0, 75), (2, 75)):
        folder = tmp_path / "attempt_0" / str(local_rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        codes.append(process.first_exit_code(code))
    assert codes == [None, 3, 3]


def test_without_error_files_each_process_keeps_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert process.first_exit_code(5) is None
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    assert process.first_exit_code(5) is None
