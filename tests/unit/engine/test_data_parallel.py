"""Training with two and four processes equals training with one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed import TCPStore

from convlens.distributed import SINGLE_PROCESS, ProcessGroup
from convlens.engine.data_parallel import DataParallel, _has_unused_parameters
from helpers.launching import Forked, rank_variables
from helpers.support import same
from helpers.training_together import Result, WithUnused, network, results, whole_batches

TRAIN = "from helpers.training_together import main; main('found')"


@pytest.fixture(scope="module")
def single_process() -> dict[str, Result]:
    return results(SINGLE_PROCESS)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_train_like_one(size: int, single_process: dict[str, Result]) -> None:
    """Batches do not divide evenly; two of four processes have no rows of the small ones."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [Forked(TRAIN, **rank_variables(rank, size, store.port)) for rank in range(size)]
    for process in processes:
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
    by_rank = [torch.load(f"found-{rank}", weights_only=True) for rank in range(size)]
    for results_of_rank in by_rank[1:]:  # all processes have the same bits
        for name, result in by_rank[0].items():
            same(result["weights"], results_of_rank[name]["weights"])
            assert result["losses"] == results_of_rank[name]["losses"]
    found = by_rank[0]

    for name in ("one step", "weighted step"):
        close(found[name], single_process[name], rtol=1e-6, atol=1e-7)
    for name in ("three epochs", "adamw", "micro-batches", "weighted", "unused"):
        close(found[name], single_process[name], rtol=2e-4, atol=2e-5)

    images, _ = whole_batches(1)[0]
    mean, var = torch.zeros(1), torch.zeros(1)
    for rank in range(size):  # the mean over the processes, weighted by rows
        rows = images[ProcessGroup(rank, size).share(len(images)).rows]
        mean += rows.mean() * len(rows) / len(images)
        var += rows.var() * len(rows) / len(images)
    weights = found["norm"]["weights"]
    torch.testing.assert_close(weights["0.running_mean"], 0.1 * mean)
    torch.testing.assert_close(weights["0.running_var"], 0.9 + 0.1 * var)
    assert int(weights["0.num_batches_tracked"]) == 1

    # Dropout differs from that of one process, and is a function of (seed, epoch, step, rank).
    assert found["dropout"]["losses"] != single_process["dropout"]["losses"]
    if size == 2:  # sums of two numbers do not depend on their order
        same(found["dropout"]["weights"], found["resumed"]["weights"])
        assert found["dropout"]["losses"] == found["resumed"]["losses"]
    close(found["dropout"], found["resumed"], rtol=1e-5, atol=1e-6)


def close(found: Result, expected: Result, *, rtol: float, atol: float) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["weights"].keys() == expected["weights"].keys()
    for key, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], tensor, rtol=rtol, atol=atol, msg=key)


def test_the_search_for_unused_parameters_changes_nothing() -> None:
    images = torch.randn(2, 1, 8, 8)
    assert _has_unused_parameters(WithUnused(), images)
    model = network("norm")
    model[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seed = torch.get_rng_state()
    assert not _has_unused_parameters(model, images)
    same(before, dict(model.state_dict()))
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model] == [False, True, True]


def test_frozen_parameters_are_not_unused() -> None:
    model = WithUnused()
    model.unused.requires_grad_(False)
    assert not _has_unused_parameters(model, torch.randn(2, 1, 8, 8))


def test_the_share_is_that_of_the_current_batch() -> None:
    parallel = DataParallel(ProcessGroup(1, 2), [8, 5])
    assert (parallel.next_batch(1).start, parallel.share.stop, parallel.share.total) == (3, 5, 5)
    assert parallel.share.weight == 2 / 5


@pytest.mark.gpu
def test_batch_norm_is_converted_to_sync_batch_norm() -> None:
    from convlens.engine.data_parallel import convert_sync_batchnorm

    model = convert_sync_batchnorm(network("norm").cuda(), ProcessGroup(0, 2), "cuda:0")
    assert isinstance(model[0], nn.SyncBatchNorm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unused_parameters_are_found_with_cached_outputs_of_half_precision(
    dtype: torch.dtype,
) -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    features = torch.zeros(2, 3, 2, 2, dtype=dtype)
    assert not _has_unused_parameters(head, features)
    head.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    assert _has_unused_parameters(head, features)
