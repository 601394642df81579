"""Hardware: choice of device, precision and memory format; seeds, threads and memory budget.

A `Plan` holds the choices of a run. Some of them are made by timing, so the plan is stored in the
run and used again when the run is resumed.
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

from convlens.errors import ResourceError, UsageError, wrong_type
from convlens.utils import process

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The two workspace configurations with which cuBLAS is deterministic, as documented by torch.
CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")
# Fields of `Plan` that are stored under another name.
STORED_KEYS = {"micro_batch_size": "part", "step_mode": "step"}
MEMORY_UNITS = {"KB": 2**10, "MB": 2**20, "GB": 2**30}
FALLBACK_FREE_BYTES = 4 * 2**30  # where the system does not report free memory
WINDOWS_OPEN_FILES = 512  # default limit of the C library


@dataclass(frozen=True)
class Plan:
    """Device and numerical settings of a run. `to_dict` is stored in the run.

    Attributes:
        precision: `fp32`, `bf16` or `fp16`.
        memory_format: a key of `MEMORY_FORMATS`.
        micro_batch_size: number of images of a batch that are computed at once; 0: all of them.
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
        """Move `model` to the device, in this plan's memory format, and return it."""
        # `Module.to(memory_format=...)` is missing from torch's type stubs for this overload.
        return model.to(device=self.device, memory_format=self.torch_memory_format)  # type: ignore[call-overload,no-any-return]

    @property
    def torch_memory_format(self) -> torch.memory_format:
        """The memory format as torch's constant."""
        return MEMORY_FORMATS[self.memory_format]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for the forward pass; it does nothing for `fp32`."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=HALF_DTYPES[self.precision])

    def micro_batches(self, images: Tensor, labels: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Split the batch `[B, ...]` and its labels into micro-batches.

        A single remaining image is added to the micro-batch before it, because batch norm cannot
        be trained on one image.
        """
        if not 0 < self.micro_batch_size < len(images):
            return ((images, labels),)
        full, remainder = divmod(len(images), self.micro_batch_size)
        sizes = [self.micro_batch_size] * full + [remainder] * (remainder > 1)
        sizes[-1] += remainder == 1
        return zip(images.split(sizes), labels.split(sizes), strict=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan with the keys under which runs store it."""
        stored = asdict(self)
        for name, key in STORED_KEYS.items():
            stored[key] = stored.pop(name)
        return stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Plan:
        """Return the plan from the result of `to_dict`, also of an earlier version."""
        fields = {name: stored[key] for name, key in STORED_KEYS.items() if key in stored}
        fields |= {k: value for k, value in stored.items() if k not in STORED_KEYS.values()}
        if fields.get("step_mode") == "graph":  # earlier versions recorded CUDA graphs themselves
            fields["step_mode"] = "reduce-overhead"
        return cls(**fields)

    def __str__(self) -> str:
        """Return a short description, e.g. `fp32 channels_last by 32`."""
        size = f" by {self.micro_batch_size}" * bool(self.micro_batch_size)
        mode = f" {self.step_mode}" * (self.step_mode != "eager")
        return f"{self.precision} {self.memory_format}{size}{mode}"


def select_device(device: str | torch.device | None = None) -> str:
    """Return the device to use: the requested one, or else CUDA, MPS or the CPU.

    With several processes on a machine, each uses the GPU of its local rank.

    Args:
        device: a device of torch; None or `auto`: the best available one.

    Raises:
        UsageError: the requested device is unavailable. There is no silent fall-back to the CPU.
        ResourceError: there is a GPU, but it cannot be used now.
    """
    if isinstance(device, torch.device):
        device = str(device)
    if device is not None and not isinstance(device, str):
        raise wrong_type("device", device, "give cpu, cuda, cuda:1 or mps")
    shares_machine = process.world_size() > 1 and torch.cuda.is_available()
    # `cuda` is the GPU of the local rank, too: trying it first would use memory of GPU 0.
    if device is None or device == "auto" or (device == "cuda" and shares_machine):
        # A driver that is too old makes torch warn and return False here.
        if not torch.cuda.is_available():
            # Apple's only GPU cannot be shared by several processes.
            use_mps = torch.backends.mps.is_available() and process.world_size() == 1
            return "mps" if use_mps else "cpu"
        try:
            gpu = _select_gpu("cuda")
            torch.empty(1, device=gpu)
        except RuntimeError as error:  # used exclusively by another process, or out of memory
            raise ResourceError(
                f"the GPU can't be used: {str(error).splitlines()[0]}"[:200],
                fix="wait until it is free (nvidia-smi lists its processes), or use --device cpu",
            ) from error
        return gpu
    try:
        torch.empty(1, device=device)
        torch.Generator(device)  # fails for `meta`, whose tensors have no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        # torch's own messages list twenty device types, or its build options.
        if reason.startswith("Expected one of"):
            reason = "unknown device; names are cpu, cuda, cuda:1 (NVIDIA) and mps (Apple)"
        elif isinstance(error, NotImplementedError):
            reason = "this build of PyTorch does not support it"
        raise UsageError(
            f"device {device!r} can't be used: {reason}",
            fix="leave out --device to use the best available one, or use --device cpu",
        ) from error
    return device if device == "cpu" else _select_gpu(device)


def _select_gpu(device: str) -> str:
    """Return the GPU of this process, after making it torch's current device.

    Events, streams and generators belong to the current device, wherever the tensors are.
    """
    if process.world_size() == 1:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
        return device
    count = torch.cuda.device_count()
    if device != "cuda" or process.local_size() > count:
        raise UsageError(
            f"device {device!r} cannot be used by {process.local_size()} processes on this "
            f"machine, which has {count} GPUs: each process needs its own",
            fix=f"leave out --device and start {count} processes; or use --device cpu",
        )
    torch.cuda.set_device(process.local_rank())
    return f"cuda:{process.local_rank()}"


def has_fast_bf16(device: str) -> bool:
    """Return whether the hardware computes in bf16. Emulation can be hundreds of times slower."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags()) and device == "cpu"


def has_tensor_cores(device: str) -> bool:
    """Return whether a GPU has half-precision matrix units (Volta, 2017, and later)."""
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (
        7,
        0,
    )


def half_precision(device: str) -> str | None:
    """Return the half precision of the hardware: bf16, or else fp16 on CUDA, or else None."""
    if has_fast_bf16(device):
        return "bf16"
    return "fp16" if device.startswith("cuda") else None


def cpu_flags() -> set[str]:
    """Return the CPU's feature flags; empty on systems other than Linux."""
    for line in _read_text("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def candidate_plans(
    device: str, precision: str, memory_format: str, deterministic: bool
) -> list[Plan]:
    """Return the plans that satisfy a recipe. The first one is used if nothing is timed.

    On a CPU the first is the safest one: fp32, contiguous. On a GPU with tensor cores it is the
    one that suits them: half precision, channels last.

    Args:
        precision, memory_format: of the recipe; may be `auto`.
        deterministic: use fp32 and contiguous for `auto`, so that nothing is timed.

    Raises:
        UsageError: the device does not support the precision.
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
            "train.precision=bf16: this CPU has no bf16 instructions, so it would be far slower",
            fix="use train.precision=auto or fp32",
        )
    if precision == "fp16" and not device.startswith("cuda"):
        raise UsageError(
            f"train.precision=fp16 is for NVIDIA GPUs; on {device} it would be slower than fp32",
            fix="use train.precision=auto, which chooses the best precision of this device",
        )


def synchronize(device: str) -> None:
    """Wait until all work queued on the device is done; does nothing on the CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def derive_seed(*parts: int) -> int:
    """Return a 63-bit seed that depends only on `parts`, e.g. `(seed, epoch, step)`.

    Uses the finalizer of SplitMix64 (Steele, Lea, Flood 2014), which maps neighboring values to
    unrelated seeds.
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
    """Seed the random generators of the CPU and of `device`, 50 times faster than torch does.

    (`torch.manual_seed` also seeds all other devices.)
    """
    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        torch.cuda.manual_seed(seed)
    elif device == "mps":
        torch.mps.manual_seed(seed)


def prepare(deterministic: bool, device: str = "cpu") -> None:
    """Set the number of threads and torch's choice of algorithms for a training on `device`.

    These are settings of the whole process: call this inside `preserve_torch_settings`.

    Raises:
        UsageError: deterministic training on CUDA without the environment that cuBLAS needs.
    """
    limit_threads()
    config = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if deterministic and device.startswith("cuda") and config not in CUBLAS_DETERMINISTIC:
        raise UsageError(
            "deterministic training on CUDA needs CUBLAS_WORKSPACE_CONFIG in the environment "
            f"(it is {config or 'not set'})",
            fix="set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts, as the command line "
            "does; or train without train.deterministic",
        )
    # Even switching deterministic algorithms off imports torch's compiler, which takes seconds.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


class _TorchSettings:
    """Restores torch's process-wide settings when the last of several overlapping calls ends.

    Calls in several threads need not end in the order in which they started. If each of them
    restored the settings from before its own start, the settings of another call could remain.
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
        """Return functions that restore the current settings where they have changed by then."""
        threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
        dtype = torch.get_default_dtype()

        def restore_threads() -> None:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)

        def restore_algorithms() -> None:
            torch.backends.cudnn.benchmark = benchmark
            if torch.are_deterministic_algorithms_enabled() != deterministic:
                torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)

        def restore_device() -> None:
            # Not under torchrun: the process belongs to convlens, and NCCL uses its current device.
            if process.world_size() == 1 and torch.cuda.is_initialized():
                torch.cuda.set_device(current)

        def restore_dtype() -> None:
            if torch.get_default_dtype() != dtype:
                torch.set_default_dtype(dtype)

        return [restore_threads, restore_algorithms, restore_device, restore_dtype]


_settings = _TorchSettings()


@contextlib.contextmanager
def preserve_torch_settings(device: str | None = None) -> Iterator[None]:
    """Use `num_threads` threads within the block, and restore the caller's settings after it.

    Within the block, gradients are computed even if the caller has turned them off, and new tensors
    are float32 by default, which networks and optimizers rely on.
    Restores the number of threads, cuDNN's benchmark mode, deterministic algorithms, the default
    type and the current CUDA device. All of them belong to the process: other threads that compute
    meanwhile see the changes.

    Args:
        device: a CUDA device to make the current one within the block.
    """
    _settings.enter()
    try:
        limit_threads()
        if torch.get_default_dtype() != torch.float32:
            torch.set_default_dtype(torch.float32)
        if device is not None and device.startswith("cuda:"):
            torch.cuda.set_device(device)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        _settings.leave()


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the states of torch's global random generators, of the CPU and of all GPUs.

    Training seeds them in every step, because dropout uses them.
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
        elif torch.cuda.is_initialized():  # within the block: use the seed of an untouched process
            torch.cuda.manual_seed_all(torch.initial_seed())
        if mps is not None:
            torch.mps.set_rng_state(mps)


def num_threads() -> int:
    """Return the number of threads to compute with: torch's, but at most the usable cores.

    A value that the user set with OMP_NUM_THREADS is kept. Processes on the same machine share its
    cores evenly.
    """
    threads, cores = torch.get_num_threads(), max(1, usable_cores() // process.local_size())
    # torchrun sets one thread per process.
    adapt = threads > cores or process.local_size() > 1
    return cores if adapt and not process.threads_chosen() else threads


def limit_threads() -> None:
    """Set torch's number of threads, a setting of the whole process, to `num_threads`."""
    threads = num_threads()
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def usable_cores() -> int:
    """Return the number of cores by affinity and by the container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = _read_text("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores or 1, max(1, int(quota) // int(period)))
    return cores or 1


def memory_budget(device: str) -> int:
    """Return how many bytes of images may be kept on the device: half of its free memory.

    `$CONVLENS_MEMORY` (e.g. `64MB`) overrides it. Larger sets are streamed from the cache. The
    processes on a machine share the budget evenly.
    """
    processes = process.local_size()
    text = os.environ.get("CONVLENS_MEMORY", "").strip().upper()
    if text:
        number, unit = text[:-2].strip(), text[-2:]
        if unit not in MEMORY_UNITS or not number.replace(".", "", 1).isdecimal():
            raise UsageError(
                f"CONVLENS_MEMORY={text!r} is not a size", fix="write e.g. 64MB or 2GB"
            )
        return int(float(number) * MEMORY_UNITS[unit]) // processes
    budget = available_memory() // 2 // processes
    if device.startswith("cuda"):  # images also pass through main memory
        return min(budget, int(torch.cuda.mem_get_info()[0]) // 2)
    return budget


def available_memory() -> int:
    """Return the bytes of main memory that are free for this process in system and container."""
    free = FALLBACK_FREE_BYTES
    for line in _read_text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable"):
            free = int(line.split()[1]) * 1024
    limit = _read_text("/sys/fs/cgroup/memory.max")
    used = _read_text("/sys/fs/cgroup/memory.current")
    if limit.strip().isdigit() and used.strip().isdigit():
        free = min(free, max(0, int(limit) - int(used)))
    return free


def max_open_files() -> int:
    """Return how many files a process may have open (`ulimit -n`)."""
    try:
        import resource
    except ImportError:  # Windows
        return WINDOWS_OPEN_FILES
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def describe_hardware(device: str) -> dict[str, Any]:
    """Return hardware and versions, to be stored with measured results."""
    lines = _read_text("/proc/cpuinfo").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts: dict[str, Any] = {
        "device": device,
        "cpu": models[0] if models else platform.processor() or platform.machine(),
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


class AsyncScalars:
    """Asynchronous device-to-host copies of scalar tensors, as float32.

    Reading a number from a GPU (`.item()`, `float`) waits for all work queued on the GPU, and
    leaves the GPU idle until the host has queued more. A copy into pinned memory, followed by an
    event, is complete as soon as the work queued before it is. On devices other than CUDA the
    values are read at once.

    Args:
        tensors: 0-d tensors on the same device.
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
        """Return whether `values` would return without waiting."""
        return self._event is None or bool(self._event.query())

    def values(self) -> list[float]:
        """Return the numbers, after waiting for the work that was queued before the copy."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._host.tolist()  # host memory: no device call
        return values


def to_device_async(tensor: Tensor, device: str) -> Tensor:
    """Move a tensor to the device; for CUDA through pinned memory, without waiting."""
    if not device.startswith("cuda") or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
