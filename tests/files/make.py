"""Makes a folder of files as the installed version writes them: `python tests/files/make.py v2`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import convlens

RECIPE = {
    "name": "run",
    "data": {"name": "digits", "per_class": 20},
    "augment": [{"RandomAffine": {"degrees": 5}}],
    "model": {"name": "cnn", "widths": [4, 8], "depth": 1, "head": "flatten"},
    "optim": {"name": "adamw", "lr": 0.02},
    "train": {"epochs": 8, "batch_size": 20, "memory_format": "contiguous", "precision": "fp32"},
}


def main(target: Path) -> None:
    target = target.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["CONVLENS_CACHE"] = str(Path(folder) / "cache")
        run = convlens.train(RECIPE, name="run", device="cpu")
        shutil.copytree(
            run.path, target / "run", ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=False
        )


if __name__ == "__main__":
    main(Path(__file__).parent / sys.argv[1])
