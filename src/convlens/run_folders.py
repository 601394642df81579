"""Where runs are on the disk: finds them by name without importing torch."""

from __future__ import annotations

import os
from pathlib import Path

MODELS_DIR = Path("models")
PLOTS_DIR = Path("plots")
RUN_FILES = ("model.safetensors", "run.json")


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder holds a run, also one whose training has just started."""
    return any(os.path.isfile(folder / name) for name in RUN_FILES)


def run_folders(models_folder: Path | None = None) -> list[Path]:
    """Return the folders of all runs in the models folder, ordered by name."""
    folder = models_folder or MODELS_DIR
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if (path / "run.json").is_file()]
