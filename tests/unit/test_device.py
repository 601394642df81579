"""Hardware: what is chosen, measured and seeded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from convlens import device
from convlens.device import Plan, derive_seed
from convlens.errors import ResourceError, UsageError
from convlens.training import autotune

# Seeds


def test_seeds_of_neighbouring_parts_are_all_different() -> None:
    triples = {derive_seed(a, b, c) for a in range(30) for b in range(30) for c in range(60)}
    assert len(triples) == 30 * 30 * 60
    assert all(0 <= seed < 1 << 63 for seed in triples)


def test_a_seed_depends_on_order_and_number_of_parts() -> None:
    parts = [(), (0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (1, 2), (2, 1), (1, 2, 0), (-1,)]
    assert len({derive_seed(*each) for each in parts}) == len(parts)


def test_seeds_are_those_of_splitmix64() -> None:
    # Steele, Lea, Flood 2014: the generator's first output for state 0, here without its last bit.
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1


def test_half_of_the_bits_change_with_one_part() -> None:
    flips = [bin(derive_seed(7, i, 3) ^ derive_seed(7, i + 1, 3)).count("1") for i in range(400)]
    assert 28 < sum(flips) / len(flips) < 35


def test_torch_takes_the_largest_parts() -> None:
    torch.Generator().manual_seed(derive_seed(2**64 - 1, 2**70, 10**30))


# Devices and plans


def test_the_best_device_there_is_or_the_one_asked_for() -> None:
    assert device.select_device("cpu") == "cpu"
    assert device.select_device() == device.select_device("auto")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert device.select_device() == "cpu"


@pytest.mark.parametrize("asked", ["cuda:99", "banana", "", "cpu:x", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused(asked: str) -> None:
    with pytest.raises(UsageError, match="can't be used"):
        device.select_device(asked)


BUSY = "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be"
OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). "
    "Please update your GPU driver by downloading and installing a new version from the URL"
)


@pytest.mark.parametrize("asked", [None, "auto"])
def test_a_gpu_that_is_busy_is_told_and_not_left_for_the_cpu(
    asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object, **__: object) -> None:
        raise RuntimeError(BUSY)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", busy)
    with pytest.raises(ResourceError, match="the GPU can't be used: CUDA error: all") as caught:
        device.select_device(asked)
    assert "\n" not in caught.value.what
    assert "--device cpu" in caught.value.fix
    with pytest.raises(
        UsageError, match="device 'cuda' can't be used: CUDA error: all"
    ) as asked_for:
        device.select_device("cuda")
    assert "--device cpu" in asked_for.value.fix


def test_with_a_driver_that_is_too_old_the_cpu_is_used_and_torch_warns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none() -> bool:
        warnings.warn(OLD, UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", none)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.warns(UserWarning, match=r"The NVIDIA driver on your system is too old"):
        assert device.select_device() == "cpu"
    assert device.select_device("cpu") == "cpu"


def fast_bf16(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(device, "cpu_flags", lambda: {"amx_bf16"} if there else {"avx2"})


def test_plans_list_what_is_open_the_safest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_bf16(monkeypatch, True)
    found = device.candidate_plans("cpu", "auto", "auto", False)
    assert [(p.precision, p.memory_format) for p in found] == [
        ("fp32", "contiguous"),
        ("fp32", "channels_last"),
        ("bf16", "contiguous"),
        ("bf16", "channels_last"),
    ]
    assert device.candidate_plans("cpu", "auto", "auto", True) == [
        Plan("cpu", "fp32", "contiguous", True)
    ]
    stated = device.candidate_plans("cpu", "bf16", "channels_last", True)
    assert stated == [Plan("cpu", "bf16", "channels_last", True)]
    fast_bf16(monkeypatch, False)
    assert {p.precision for p in device.candidate_plans("cpu", "auto", "auto", False)} == {"fp32"}
    with pytest.raises(UsageError, match="bf16"):
        device.candidate_plans("cpu", "bf16", "auto", False)


@pytest.mark.parametrize(("bf16", "half"), [(True, "bf16"), (False, "fp16")])
def test_on_tensor_cores_half_precision_and_channels_last_come_first(
    bf16: bool, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run too short to be timed takes the first; a T4 (2018) has no bf16."""
    monkeypatch.setattr(device, "has_fast_bf16", lambda where: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (7, 5))
    found = device.candidate_plans("cuda", "auto", "auto", False)
    assert [(p.precision, p.memory_format) for p in found] == [
        (half, "channels_last"),
        (half, "contiguous"),
        ("fp32", "channels_last"),
        ("fp32", "contiguous"),
    ]
    assert device.candidate_plans("cuda", "auto", "auto", True) == [
        Plan("cuda", "fp32", "contiguous", True)
    ]
    assert device.candidate_plans("cuda", "fp16", "contiguous", False) == [
        Plan("cuda", "fp16", "contiguous")
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (6, 1))
    assert device.candidate_plans("cuda", "auto", "auto", False)[0] == Plan(
        "cuda", "fp32", "contiguous"
    )


def test_fp16_is_refused_where_there_is_no_nvidia_gpu() -> None:
    for where in ("cpu", "mps"):
        with pytest.raises(UsageError, match=r"fp16 is for NVIDIA GPUs"):
            device.candidate_plans(where, "fp16", "auto", False)


def chosen(monkeypatch: pytest.MonkeyPatch, *seconds: Callable[[int], float]) -> int:
    """Which of several plans is chosen when the n-th step of each takes so many seconds."""
    clock = [0.0]
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock[0])
    plans = [Plan("cpu", "fp32", str(number)) for number in range(len(seconds))]

    def trial(plan: Plan) -> Callable[[], None]:
        turns = iter(range(100))

        def step() -> None:
            clock[0] += seconds[int(plan.memory_format)](next(turns))

        return step

    return plans.index(autotune.fastest(plans, trial)[0])


def test_the_fastest_plan_wins_by_its_median(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, lambda n: 1.0, lambda n: 0.5) == 1
    assert chosen(monkeypatch, lambda n: 0.5, lambda n: 1.0) == 0
    assert chosen(monkeypatch, lambda n: 1.0, lambda n: 0.5, lambda n: 0.3) == 2
    # One slow round, or a slow warm-up, changes nothing.
    assert chosen(monkeypatch, lambda n: 1.0, lambda n: 9.0 if n == 2 else 0.5) == 1
    assert chosen(monkeypatch, lambda n: 1.0, lambda n: 9.0 if n == 0 else 0.5) == 1


def test_a_later_plan_must_win_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, lambda n: 1.0, lambda n: 0.96) == 0
    assert chosen(monkeypatch, lambda n: 1.0, lambda n: 0.94) == 1


def test_who_is_far_behind_is_timed_twice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def slow(n: int) -> float:
        done.append(n)
        return 2.0

    assert chosen(monkeypatch, lambda n: 1.0, slow) == 0
    assert done == [0, 1, 2]  # the warm-up and two rounds


def test_a_plan_places_casts_and_is_stored() -> None:
    plan = Plan("cpu", "bf16", "channels_last", True)
    assert Plan.from_dict(plan.to_dict()) == plan
    placed = plan.prepare_model(nn.Conv2d(3, 4, 3))
    assert placed.weight.is_contiguous(memory_format=torch.channels_last)
    with plan.autocast():
        assert placed(torch.zeros(1, 3, 8, 8)).dtype == torch.bfloat16
    with Plan("cpu", "fp32", "contiguous").autocast():
        assert placed(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


# The machine


def files_say(monkeypatch: pytest.MonkeyPatch, **contents: str) -> None:
    known = {
        "cpu": "/sys/fs/cgroup/cpu.max",
        "limit": "/sys/fs/cgroup/memory.max",
        "used": "/sys/fs/cgroup/memory.current",
        "meminfo": "/proc/meminfo",
        "cpuinfo": "/proc/cpuinfo",
    }
    table = {known[name]: content for name, content in contents.items()}
    monkeypatch.setattr(device, "_read_text", lambda path: table.get(path, ""))


def test_cores_are_those_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for content, cores in [
        ("", 8),
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("50000 100000\n", 1),
        ("250000 100000\n", 2),
        ("9900000 100000\n", 8),
    ]:
        files_say(monkeypatch, cpu=content)
        assert device.usable_cores() == cores


def test_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVLENS_MEMORY", raising=False)
    meminfo = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:   4000 kB\n"
    files_say(monkeypatch, meminfo=meminfo)
    assert device.available_memory() == 4000 * 1024
    assert device.memory_budget("cpu") == 2000 * 1024
    files_say(monkeypatch, meminfo=meminfo, limit="max\n", used="5\n")
    assert device.available_memory() == 4000 * 1024
    files_say(monkeypatch, meminfo=meminfo, limit="2000000\n", used="500000\n")
    assert device.available_memory() == 1_500_000
    files_say(monkeypatch, meminfo=meminfo, limit="1000\n", used="5000\n")
    assert device.available_memory() == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MB", 64 << 20), ("1.5GB", 3 << 29), (" 10 kb ", 10240), ("0MB", 0)],
)
def test_a_memory_budget_can_be_set(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLENS_MEMORY", text)
    assert device.memory_budget("cpu") == size


@pytest.mark.parametrize("text", ["64", "MB", "x MB", "-1MB", "1.2.3GB", "64TB", "nanMB", "²MB"])
def test_other_memory_budgets_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLENS_MEMORY", text)
    with pytest.raises(UsageError, match="is no size"):
        device.memory_budget("cpu")


def test_cpu_flags_are_whole_words(monkeypatch: pytest.MonkeyPatch) -> None:
    files_say(monkeypatch, cpuinfo="model name\t: X\nflags\t\t: fpu avx512_bf16_not avx2\n")
    assert device.cpu_flags() == {"fpu", "avx512_bf16_not", "avx2"}
    assert not device.has_fast_bf16("cpu")
    assert device.describe_hardware("cpu")["cpu"] == "X"


def settings() -> list[object]:
    return [
        torch.get_num_threads(),
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ]


@pytest.fixture
def own_settings() -> Iterator[list[object]]:
    """A program that has chosen 3 threads and benchmark mode, in a container of 2 cores."""
    before = settings()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setattr(device, "usable_cores", lambda: 2)
        torch.set_num_threads(3)
        torch.backends.cudnn.benchmark = True
        yield settings()
    torch.set_num_threads(before[0])
    torch.backends.cudnn.benchmark = before[1]
    torch.use_deterministic_algorithms(before[2], warn_only=before[3])


@pytest.mark.parametrize("deterministic", [True, False])
def test_torch_settings_are_those_of_the_caller_again(
    deterministic: bool, own_settings: list[object]
) -> None:
    torch.use_deterministic_algorithms(not deterministic, warn_only=not deterministic)
    before = settings()
    with device.preserve_torch_settings():
        assert settings() == [2, *before[1:]]
        device.prepare(deterministic)
        assert settings() == [2, not deterministic, deterministic, False]
        with device.preserve_torch_settings():
            assert settings() == [2, not deterministic, deterministic, False]
        assert settings() == [2, not deterministic, deterministic, False]
    assert settings() == before


def test_settings_are_restored_by_the_last_of_calls_that_overlap(
    own_settings: list[object],
) -> None:
    """Two threads: the one that began first ends first, while the other still computes."""
    first, second = device.preserve_torch_settings(), device.preserve_torch_settings()
    first.__enter__()
    device.prepare(False)
    torch.backends.cudnn.benchmark = False
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings() == [2, False, False, False]
    second.__exit__(None, None, None)
    assert settings() == own_settings


def test_random_generators_are_those_of_the_caller_again() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3).tolist()
    torch.manual_seed(1)
    with device.preserve_rng():
        device.seed_generators("cpu", 7)
        torch.rand(5)
    assert torch.rand(3).tolist() == expected


def test_deterministic_training_on_cuda_needs_the_workspace_of_cublas(
    monkeypatch: pytest.MonkeyPatch, own_settings: list[object]
) -> None:
    for config in (None, ":4096:2"):
        if config is not None:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
        else:
            monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        with pytest.raises(UsageError, match="needs CUBLAS_WORKSPACE_CONFIG") as error:
            device.prepare(True, "cuda:1")
        assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in error.value.fix
        device.prepare(False, "cuda")
        device.prepare(True, "cpu")
        device.prepare(False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    device.prepare(True, "cuda")
    assert torch.are_deterministic_algorithms_enabled()
