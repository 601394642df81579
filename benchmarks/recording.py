"""Record a measurement with command, versions and hardware."""

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

# As on the command line. Must be imported before torch; child processes inherit the settings.
process.set_environment()

# $BENCHMARK_RESULTS keeps trial runs apart from measurements.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


def record(name: str, figures: dict[str, Any], *, command: str | None = None) -> dict[str, Any]:
    """Write `results/<name>.json` and return its content."""
    import torchvision

    from convlens import device
    from convlens.utils.files import write_atomic

    # Only the names of files, without the folders of this machine.
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
