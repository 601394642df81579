"""Hardware: device, precision, memory format, threads, memory, seeds. The one place that knows.

A `Plan` is what was decided for a run; it is written into the run and used again by resume,
because part of it is chosen by timing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convlens.errors import ResourceError, UsageError
from convlens.utils import process

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The two of cuBLAS's workspaces with which it is deterministic, and torch says so.
CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")
# Fields of `Plan` that are stored by another name.
STORED_KEYS = {"micro_batch_size": "part", "step_mode": "step"}
MEMORY_UNITS = {"KB": 2**10, "MB": 2**20, "GB": 2**30}


@dataclass(frozen=True)
class Plan:
    """Where and how a run computes; `to_dict` of it is stored in the run.

    Attributes:
        memory_format: a key of `MEMORY_FORMATS`.
        micro_batch_size: images of a batch that are computed at once; 0: all of them.
        step_mode: `eager`, `compiled` (torch.compile) or `reduce-overhead` (torch.compile with
            CUDA graphs).
    """

    device: str
    precision: str
    memory_format: str
    deterministic: bool = False
    micro_batch_size: int = 0
    step_mode: str = "eager"

    def prepare_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move `model` to the device, in this plan's memory format."""
        # `Module.to(memory_format=...)` is missing from torch's type stubs for this overload.
        return model.to(device=self.device, memory_format=self.torch_memory_format)  # type: ignore[call-overload,no-any-return]

    @property
    def torch_memory_format(self) -> torch.memory_format:
        return MEMORY_FORMATS[self.memory_format]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for the forward pass: half precision where planned, else nothing."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=HALF_DTYPES[self.precision])

    def micro_batches(self, images: Tensor, labels: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Split the batch `[B, ...]` and its labels into micro-batches.

        A single left-over image joins the micro-batch before it: batch norm can't train on one.
        """
        if not 0 < self.micro_batch_size < len(images):
            return ((images, labels),)
        whole, rest = divmod(len(images), self.micro_batch_size)
        sizes = [self.micro_batch_size] * whole + [rest] * (rest > 1)
        sizes[-1] += rest == 1
        return zip(images.split(sizes), labels.split(sizes), strict=True)

    def to_dict(self) -> dict[str, Any]:
        """The plan as it is stored, in the keys that stored runs have always had."""
        stored = asdict(self)
        for name, key in STORED_KEYS.items():
            stored[key] = stored.pop(name)
        return stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` stored, also by an earlier version."""
        fields = {name: stored[key] for name, key in STORED_KEYS.items() if key in stored}
        fields |= {k: value for k, value in stored.items() if k not in STORED_KEYS.values()}
        if fields.get("step_mode") == "graph":  # CUDA graphs of our own, in earlier versions
            fields["step_mode"] = "reduce-overhead"
        return cls(**fields)

    def __str__(self) -> str:
        """E.g. `fp32 channels_last by 32`."""
        size = f" by {self.micro_batch_size}" * bool(self.micro_batch_size)
        mode = f" {self.step_mode}" * (self.step_mode != "eager")
        return f"{self.precision} {self.memory_format}{size}{mode}"


def select_device(asked: str | None = None) -> str:
    """The device to use: what was asked for, or CUDA, then MPS, then the CPU.

    Of several processes on a machine each has a GPU of its own, in order.

    Raises:
        UsageError: the device asked for isn't there; never a silent fall-back to the CPU.
        ResourceError: there is a GPU, but it can't be used now.
    """
    if asked is None or asked == "auto":
        # (Apple's one GPU is not for several processes.) Of a driver that is too old torch warns.
        if not torch.cuda.is_available():
            return (
                "mps" if torch.backends.mps.is_available() and process.world_size() == 1 else "cpu"
            )
        try:
            gpu = _own_gpu("cuda")
            torch.empty(1, device=gpu)
        except RuntimeError as error:  # another process has it to itself, or it is full
            raise ResourceError(
                f"the GPU can't be used: {str(error).splitlines()[0]}"[:200],
                fix="wait until it is free (nvidia-smi says who has it), or use --device cpu",
            ) from error
        return gpu
    try:
        torch.empty(1, device=asked)
        torch.Generator(asked)  # `meta` has memory, but no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        # Where torch lists its twenty device types, or its build options, at length.
        if reason.startswith("Expected one of"):
            reason = "there is no such device; NVIDIA's are cuda, cuda:1 and so on, Apple's is mps"
        elif isinstance(error, NotImplementedError):
            reason = "this PyTorch is built without it"
        raise UsageError(
            f"device {asked!r} can't be used: {reason}",
            fix="leave out --device to take the best one there is, or use --device cpu",
        ) from error
    return asked if asked == "cpu" else _own_gpu(asked)


def _own_gpu(asked: str) -> str:
    """This process's GPU, which from here on is torch's current one.

    Events, streams and generators are of the current device, whatever the tensors are on.
    """
    if process.world_size() == 1:
        if asked.startswith("cuda:"):
            torch.cuda.set_device(asked)
        return asked
    count = torch.cuda.device_count()
    if asked != "cuda" or process.local_size() > count:
        raise UsageError(
            f"device {asked!r} is not for {process.local_size()} processes on this machine, which "
            f"has {count} GPUs: each process takes one",
            fix=f"leave out --device and start {count} processes; or use --device cpu",
        )
    torch.cuda.set_device(process.local_rank())
    return f"cuda:{process.local_rank()}"


def has_fast_bf16(device: str) -> bool:
    """Whether bf16 is computed in hardware; elsewhere it can be hundreds of times slower."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags()) and device == "cpu"


def has_tensor_cores(device: str) -> bool:
    """Whether a GPU multiplies matrices of half precision in hardware (Volta, 2017, and later)."""
    where = torch.device(device)
    return where.type == "cuda" and torch.cuda.get_device_capability(where) >= (7, 0)


def half_precision(device: str) -> str | None:
    """The half precision that is in hardware: bf16 where it is, else fp16 on GPUs, else None."""
    if has_fast_bf16(device):
        return "bf16"
    return "fp16" if device.startswith("cuda") else None


def cpu_flags() -> set[str]:
    """The CPU's own feature flags (Linux; elsewhere empty)."""
    for line in _read_text("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def candidate_plans(
    device: str, precision: str, memory_format: str, deterministic: bool
) -> list[Plan]:
    """The plans that fit what the recipe asks for; the first is taken where nothing is timed.

    On a CPU that is the safest one: fp32, contiguous. On a GPU with tensor cores it is the one
    that they are made for: half precision, channels last. `deterministic` leaves nothing to
    timing: fp32 and contiguous unless stated.
    """
    _check_precision(device, precision)
    half = half_precision(device)
    precisions, formats = [precision], [memory_format]
    if precision == "auto":
        precisions = ["fp32"] if half is None or deterministic else ["fp32", half]
    if memory_format == "auto":
        formats = ["contiguous"] if deterministic else ["contiguous", "channels_last"]
    if has_tensor_cores(device):
        precisions, formats = precisions[::-1], formats[::-1]
    return [Plan(device, p, f, deterministic) for p in precisions for f in formats]


def _check_precision(device: str, precision: str) -> None:
    if precision == "bf16" and device == "cpu" and not has_fast_bf16(device):
        raise UsageError(
            "train.precision=bf16: this CPU has no bf16 instructions, it would be far slower",
            fix="use train.precision=auto or fp32",
        )
    if precision == "fp16" and not device.startswith("cuda"):
        raise UsageError(
            f"train.precision=fp16 is for NVIDIA GPUs; on {device} it would be slower than fp32, "
            "and needs a loss scale for nothing",
            fix="use train.precision=auto, which takes the best that this device has",
        )


def synchronize(device: str) -> None:
    """Waits for the device's queue; nothing to wait for on the CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that is a function of `parts` only, e.g. `(seed, epoch, step)`.

    SplitMix64's finaliser (Steele, Lea, Flood 2014): neighbouring parts give unrelated seeds.
    """
    mask = (1 << 64) - 1
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def seed_generators(device: str, seed: int) -> None:
    """Seeds what layers on this device draw from (`torch.manual_seed` takes 50 times as long)."""
    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        torch.cuda.manual_seed(seed)
    elif device == "mps":
        torch.mps.manual_seed(seed)


def prepare(deterministic: bool, on: str = "cpu") -> None:
    """Set the number of threads and torch's choice of algorithms for a training on device `on`.

    These are settings of the whole process: call it inside `preserve_torch_settings`.

    Raises:
        UsageError: deterministic training on CUDA without the environment that cuBLAS needs.
    """
    limit_threads()
    config = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if deterministic and on.startswith("cuda") and config not in CUBLAS_DETERMINISTIC:
        raise UsageError(
            "deterministic training on CUDA needs CUBLAS_WORKSPACE_CONFIG in the environment "
            f"(it is {config or 'not set'})",
            fix="set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts, as the command line "
            "does; or train without train.deterministic",
        )
    # Even switching it off imports torch's compiler, which takes seconds.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


class _TorchSettings:
    """Torch's process-wide settings as they were before the first of the calls that compute now.

    Calls may overlap in several threads without ending in the order in which they began, so that
    each restoring what it found would leave another one's settings behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._restore: list[Callable[[], None]] = []

    def enter(self) -> None:
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._restore = self._saved()

    def leave(self) -> None:
        with self._lock:
            self._calls -= 1
            if not self._calls:
                for restore in self._restore:
                    restore()

    @staticmethod
    def _saved() -> list[Callable[[], None]]:
        """Functions that set back what differs by then."""
        threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0

        def restore_threads() -> None:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)

        def restore_algorithms() -> None:
            torch.backends.cudnn.benchmark = benchmark
            if torch.are_deterministic_algorithms_enabled() != deterministic:
                torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)

        def restore_device() -> None:
            # Under torchrun the process is ours, and NCCL goes by its current device.
            if process.world_size() == 1 and torch.cuda.is_initialized():
                torch.cuda.set_device(current)

        return [restore_threads, restore_algorithms, restore_device]


_settings = _TorchSettings()


@contextlib.contextmanager
def preserve_torch_settings(on: str | None = None) -> Iterator[None]:
    """Compute inside with the threads of `num_threads`, and restore the caller's settings after.

    Restored are the number of threads, cuDNN's benchmark mode, deterministic algorithms and the
    current CUDA device. All of them belong to the process: other threads that compute meanwhile
    see them changed.

    Args:
        on: makes this CUDA device the current one inside.
    """
    _settings.enter()
    try:
        limit_threads()
        if on is not None and on.startswith("cuda:"):
            torch.cuda.set_device(on)
        yield
    finally:
        _settings.leave()


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the states of torch's global random generators: the CPU's, and of all GPUs.

    Training seeds them in every step, since that is what dropout draws from.
    """
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_initialized():  # meanwhile: with the seed that they would have had
            torch.cuda.manual_seed_all(torch.initial_seed())
        if mps is not None:
            torch.mps.set_rng_state(mps)


def num_threads() -> int:
    """Threads to compute with: torch's number, but at most the cores that this process may use.

    What the user set by OMP_NUM_THREADS stays. Processes of a machine share its cores evenly.
    """
    threads, cores = torch.get_num_threads(), max(1, usable_cores() // process.local_size())
    # torchrun itself sets one thread a process.
    adapt = threads > cores or process.local_size() > 1
    return cores if adapt and not process.threads_chosen() else threads


def limit_threads() -> None:
    """Set torch's number of threads, a setting of the whole process, to `num_threads`."""
    threads = num_threads()
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def usable_cores() -> int:
    """Cores by affinity and by the container's CPU quota, which `os.cpu_count` doesn't see."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = _read_text("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores or 1, max(1, int(quota) // int(period)))
    return cores or 1


def memory_budget(device: str) -> int:
    """Bytes of images that may live on the device: half of its free memory.

    `$CONVLENS_MEMORY` (e.g. `64MB`) overrides it; larger sets stream from the cache. The processes
    of a machine share its memory, or what was asked for, evenly.
    """
    among = process.local_size()
    asked = os.environ.get("CONVLENS_MEMORY", "").strip().upper()
    if asked:
        number, unit = asked[:-2].strip(), asked[-2:]
        if unit not in MEMORY_UNITS or not number.replace(".", "", 1).isdecimal():
            raise UsageError(f"CONVLENS_MEMORY={asked!r} is no size", fix="write e.g. 64MB or 2GB")
        return int(float(number) * MEMORY_UNITS[unit]) // among
    budget = available_memory() // 2 // among
    if device.startswith("cuda"):  # the images pass through main memory on their way
        return min(budget, int(torch.cuda.mem_get_info()[0]) // 2)
    return budget


def available_memory() -> int:
    """Bytes of main memory this process can still take, as system and container see it."""
    free = 4 * 2**30  # a laptop's worth, where the system doesn't tell
    for line in _read_text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable"):
            free = int(line.split()[1]) * 1024
    limit, used = (
        _read_text("/sys/fs/cgroup/memory.max"),
        _read_text("/sys/fs/cgroup/memory.current"),
    )
    if limit.strip().isdigit() and used.strip().isdigit():
        free = min(free, max(0, int(limit) - int(used)))
    return free


def max_open_files() -> int:
    """How many files a process may have open (`ulimit -n`)."""
    try:
        import resource
    except ImportError:  # Windows: the C library's own limit
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def describe_hardware(device: str) -> dict[str, Any]:
    """Hardware and versions, for results that say where they were measured."""
    lines = _read_text("/proc/cpuinfo").splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts: dict[str, Any] = {
        "device": device,
        "cpu": named[0] if named else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


# ---- later ----------------------------------------
# Copies between host and device that do not wait for the device.
#
# Reading a number off a GPU (`.item()`, `float`) waits for all work queued on the GPU, and leaves
# the GPU idle until the host has queued more. A copy into pinned memory, followed by an event, is
# complete as soon as the work queued before it is, whatever was queued after it.


class AsyncScalars:
    """Copy 0-d tensors to the host as float32 without waiting; read the values later.

    On devices other than CUDA they are read at once.
    """

    def __init__(self, *tensors: Tensor) -> None:
        with torch.no_grad():
            values = torch.stack([tensor.detach().float() for tensor in tensors])
        self._event: torch.cuda.Event | None = None
        if not values.is_cuda:
            self._host = values.cpu()
            return
        self._host = torch.empty(len(tensors), pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def ready(self) -> bool:
        """Whether `values` would return without waiting."""
        return self._event is None or bool(self._event.query())

    def values(self) -> list[float]:
        """The numbers. Waits for the work queued before the copy, and for nothing after it."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._host.tolist()  # host memory: no device call
        return values


def to_device_async(tensor: Tensor, device: str) -> Tensor:
    """Move a tensor to the device; through pinned memory for CUDA, so that nothing waits."""
    if not device.startswith("cuda") or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
