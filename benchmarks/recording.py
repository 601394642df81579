"""Keeps a measurement with all that is needed to read it later: command, versions, hardware."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from convlens.utils import process
from convlens.version import __version__

# As on the command line. To be imported before torch; effective in child processes in any case.
process.set_environment()

# $BENCHMARK_RESULTS: for trials that are not to be kept beside measurements.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


def record(name: str, figures: dict[str, Any], *, command: str | None = None) -> dict[str, Any]:
    """Writes `results/<name>.json` and returns what it holds."""
    import torchvision

    from convlens import device
    from convlens.utils.files import write_atomic

    # Files by their names alone: where they lie on this machine is nobody's business.
    script, *arguments = (Path(a).name if os.sep in a else a for a in sys.argv)
    content = {
        "name": name,
        "command": command or f"python benchmarks/{script} {shlex.join(arguments)}".strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "convlens": __version__,
        "torchvision": torchvision.__version__,
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "hardware": device.describe_hardware("cuda" if device.select_device() == "cuda" else "cpu"),
        **figures,
    }
    write_atomic(RESULTS / f"{name}.json", json.dumps(content, indent=1) + "\n")
    return content
