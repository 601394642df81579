"""Seeds, choice of device and plan, limits of the machine, and settings of torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from convlens import device
from convlens.device import Plan, derive_seed
from convlens.errors import ResourceError, UsageError

# Seeds


def test_seeds_of_neighboring_parts_are_all_different() -> None:
    triples = {derive_seed(a, b, c) for a in range(30) for b in range(30) for c in range(60)}
    assert len(triples) == 30 * 30 * 60
    assert all(0 <= seed < 1 << 63 for seed in triples)


def test_seed_depends_on_order_and_number_of_parts() -> None:
    parts = [(), (0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (1, 2), (2, 1), (1, 2, 0), (-1,)]
    assert len({derive_seed(*each) for each in parts}) == len(parts)


def test_seeds_are_those_of_splitmix64() -> None:
    # Steele, Lea, Flood 2014: the generator's first output for state 0, without its last bit.
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1


def test_one_changed_part_flips_half_of_the_bits() -> None:
    flips = [bin(derive_seed(7, i, 3) ^ derive_seed(7, i + 1, 3)).count("1") for i in range(400)]
    assert 28 < sum(flips) / len(flips) < 35


def test_seeds_of_large_parts_are_accepted_by_torch() -> None:
    torch.Generator().manual_seed(derive_seed(2**64 - 1, 2**70, 10**30))


# Devices and plans


def test_selected_device_is_the_requested_or_the_best_one() -> None:
    assert device.select_device("cpu") == "cpu"
    assert device.select_device() == device.select_device("auto")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert device.select_device() == "cpu"


@pytest.mark.parametrize("requested", ["cuda:99", "banana", "", "cpu:x", "cuda:-1"])
def test_unavailable_device_is_an_error(requested: str) -> None:
    with pytest.raises(UsageError, match="can't be used"):
        device.select_device(requested)


def test_processes_that_ask_for_cuda_touch_only_the_gpu_of_their_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = []
    ranks = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch, "empty", lambda *_, device: used.append(device))
    monkeypatch.setattr(torch, "Generator", used.append)
    assert device.select_device("cuda") == "cuda:1"
    assert used == [1, "cuda:1"]


BUSY = "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be"
OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). "
    "Please update your GPU driver by downloading and installing a new version from the URL"
)


@pytest.mark.parametrize("requested", [None, "auto"])
def test_busy_gpu_is_an_error_and_not_replaced_by_the_cpu(
    requested: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object, **__: object) -> None:
        raise RuntimeError(BUSY)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", busy)
    with pytest.raises(ResourceError, match="the GPU can't be used: CUDA error: all") as caught:
        device.select_device(requested)
    assert "\n" not in caught.value.what
    assert "--device cpu" in caught.value.fix
    with pytest.raises(
        UsageError, match="device 'cuda' can't be used: CUDA error: all"
    ) as explicit:
        device.select_device("cuda")
    assert "--device cpu" in explicit.value.fix


def test_cpu_is_used_if_the_driver_is_too_old_and_torch_warns(
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


def set_fast_bf16(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(device, "cpu_flags", lambda: {"amx_bf16"} if fast else {"avx2"})


def test_candidate_plans_begin_with_the_safest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    set_fast_bf16(monkeypatch, True)
    plans = device.candidate_plans("cpu", "auto", "auto", False)
    assert [(p.precision, p.memory_format) for p in plans] == [
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
    set_fast_bf16(monkeypatch, False)
    assert {p.precision for p in device.candidate_plans("cpu", "auto", "auto", False)} == {"fp32"}
    with pytest.raises(UsageError, match="bf16"):
        device.candidate_plans("cpu", "bf16", "auto", False)


@pytest.mark.parametrize(("bf16", "half"), [(True, "bf16"), (False, "fp16")])
def test_candidate_plans_of_tensor_cores_begin_with_half_precision(
    bf16: bool, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is too short to be timed uses the first. A T4 (2018) has no bf16."""
    monkeypatch.setattr(device, "has_fast_bf16", lambda name: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: (7, 5))
    plans = device.candidate_plans("cuda", "auto", "auto", False)
    assert [(p.precision, p.memory_format) for p in plans] == [
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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: (6, 1))
    assert device.candidate_plans("cuda", "auto", "auto", False)[0] == Plan(
        "cuda", "fp32", "contiguous"
    )


def test_fp16_is_refused_without_an_nvidia_gpu() -> None:
    for name in ("cpu", "mps"):
        with pytest.raises(UsageError, match=r"fp16 is for NVIDIA GPUs"):
            device.candidate_plans(name, "fp16", "auto", False)


def test_plan_moves_the_model_and_is_stored_and_loaded() -> None:
    plan = Plan("cpu", "bf16", "channels_last", True)
    assert Plan.from_dict(plan.to_dict()) == plan
    model = plan.prepare_model(nn.Conv2d(3, 4, 3))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    with plan.autocast():
        assert model(torch.zeros(1, 3, 8, 8)).dtype == torch.bfloat16
    with Plan("cpu", "fp32", "contiguous").autocast():
        assert model(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


# The machine


def patch_system_files(monkeypatch: pytest.MonkeyPatch, **contents: str) -> None:
    known = {
        "cpu": "/sys/fs/cgroup/cpu.max",
        "limit": "/sys/fs/cgroup/memory.max",
        "used": "/sys/fs/cgroup/memory.current",
        "meminfo": "/proc/meminfo",
        "cpuinfo": "/proc/cpuinfo",
    }
    table = {known[name]: content for name, content in contents.items()}
    monkeypatch.setattr(device, "_read_text", lambda path: table.get(path, ""))


def test_cores_respect_the_limit_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for content, cores in [
        ("", 8),
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("50000 100000\n", 1),
        ("250000 100000\n", 2),
        ("9900000 100000\n", 8),
    ]:
        patch_system_files(monkeypatch, cpu=content)
        assert device.usable_cores() == cores


def test_memory_respects_the_limit_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVLENS_MEMORY", raising=False)
    meminfo = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:   4000 kB\n"
    patch_system_files(monkeypatch, meminfo=meminfo)
    assert device.available_memory() == 4000 * 1024
    assert device.memory_budget("cpu") == 2000 * 1024
    patch_system_files(monkeypatch, meminfo=meminfo, limit="max\n", used="5\n")
    assert device.available_memory() == 4000 * 1024
    patch_system_files(monkeypatch, meminfo=meminfo, limit="2000000\n", used="500000\n")
    assert device.available_memory() == 1_500_000
    patch_system_files(monkeypatch, meminfo=meminfo, limit="1000\n", used="5000\n")
    assert device.available_memory() == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MB", 64 << 20), ("1.5GB", 3 << 29), (" 10 kb ", 10240), ("0MB", 0)],
)
def test_memory_budget_is_set_by_the_environment(
    text: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVLENS_MEMORY", text)
    assert device.memory_budget("cpu") == size


@pytest.mark.parametrize("text", ["64", "MB", "x MB", "-1MB", "1.2.3GB", "64TB", "nanMB", "²MB"])
def test_invalid_memory_budgets_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLENS_MEMORY", text)
    with pytest.raises(UsageError, match="is not a size"):
        device.memory_budget("cpu")


def test_cpu_flags_are_compared_as_words(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_system_files(
        monkeypatch, cpuinfo="model name\t: X\nflags\t\t: fpu avx512_bf16_not avx2\n"
    )
    assert device.cpu_flags() == {"fpu", "avx512_bf16_not", "avx2"}
    assert not device.has_fast_bf16("cpu")
    assert device.describe_hardware("cpu")["cpu"] == "X"


def torch_settings() -> list[object]:
    return [
        torch.get_num_threads(),
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ]


@pytest.fixture
def own_settings() -> Iterator[list[object]]:
    """A program that has chosen 3 threads and benchmark mode, in a container of 2 cores."""
    before = torch_settings()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setattr(device, "usable_cores", lambda: 2)
        torch.set_num_threads(3)
        torch.backends.cudnn.benchmark = True
        yield torch_settings()
    torch.set_num_threads(before[0])
    torch.backends.cudnn.benchmark = before[1]
    torch.use_deterministic_algorithms(before[2], warn_only=before[3])


@pytest.mark.parametrize("deterministic", [True, False])
def test_torch_settings_are_restored(deterministic: bool, own_settings: list[object]) -> None:
    torch.use_deterministic_algorithms(not deterministic, warn_only=not deterministic)
    before = torch_settings()
    with device.preserve_torch_settings():
        assert torch_settings() == [2, *before[1:]]
        device.prepare(deterministic)
        assert torch_settings() == [2, not deterministic, deterministic, False]
        with device.preserve_torch_settings():
            assert torch_settings() == [2, not deterministic, deterministic, False]
        assert torch_settings() == [2, not deterministic, deterministic, False]
    assert torch_settings() == before


def test_last_of_overlapping_calls_restores_the_settings(
    own_settings: list[object],
) -> None:
    """As with two threads, of which the one that started first also ends first."""
    first, second = device.preserve_torch_settings(), device.preserve_torch_settings()
    first.__enter__()
    device.prepare(False)
    torch.backends.cudnn.benchmark = False
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch_settings() == [2, False, False, False]
    second.__exit__(None, None, None)
    assert torch_settings() == own_settings


def test_gradients_that_the_caller_turned_off_are_computed_within() -> None:
    for turn_off in (torch.no_grad, torch.inference_mode):
        with turn_off():
            with device.preserve_torch_settings():
                weight = torch.ones(1, requires_grad=True)
                (2 * weight).sum().backward()
                assert weight.grad is not None
                assert weight.grad.item() == 2
            assert not torch.is_grad_enabled()


def test_random_generators_are_restored() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3).tolist()
    torch.manual_seed(1)
    with device.preserve_rng():
        device.seed_generators("cpu", 7)
        torch.rand(5)
    assert torch.rand(3).tolist() == expected


def test_deterministic_training_on_cuda_needs_a_cublas_workspace(
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


def test_devices_are_texts_or_those_of_torch() -> None:
    assert device.select_device(torch.device("cpu")) == "cpu"
    for wrong in (0, [], {}, b"cpu", object()):
        with pytest.raises(UsageError, match="device: an object of type"):
            device.select_device(wrong)  # type: ignore[arg-type]
