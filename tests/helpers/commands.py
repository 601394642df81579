"""Run commands in this process or in a new one, with images and models to use them on."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
import torch
from PIL import Image

from convlens import cli, device, serialization
from convlens.run import RunDir
from helpers.paths import TESTS

# Trains in a fraction of a second: 80 digits, two epochs.
DIGITS = ("digits", "data.per_class=8", "model.widths=[4,8]", "model.depth=1", "train.epochs=2")
NET = ("model.widths=[4,8]", "train.epochs=1", "augment=[]", "optim.ema=null")
COLORS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


@dataclass(frozen=True)
class Done:
    """The result of a command: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as one JSON object; fails if it contains anything else."""
        return json.loads(self.out)


def here(*arguments: str | Path, stdin: str | TextIO = "") -> Done:
    """Run `convlens ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main([str(argument) for argument in arguments])
            except SystemExit as end:
                code = end.code
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())


def environment(**extra: str) -> dict[str, str]:
    """Return the environment for a new process."""
    # PYTHONUNBUFFERED would hide output that is left in a buffer at exit.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    # Scripts of the helpers import the package `helpers`.
    search_path = [str(TESTS), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(search_path), **extra}
    if env.pop("PYTHONDONTWRITEBYTECODE", ""):
        # Otherwise each process would compile all of torch; cache the result outside the package.
        cache = Path(tempfile.gettempdir()) / "convlens-tests-pycache"
        env.setdefault("PYTHONPYCACHEPREFIX", str(cache))
    return env


def start(
    *arguments: str | Path, before: Callable[[], None] | None = None, **extra: str
) -> subprocess.Popen[str]:
    """Start `convlens ARGUMENTS` in a new process, in which `before` is called first."""
    return subprocess.Popen(
        [sys.executable, "-m", "convlens", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**extra),
        preexec_fn=before,
    )


def respect_file_permissions() -> None:
    """Make this process respect file permissions from now on, even if it runs as root."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: capabilities(7)
        libc.prctl(
            24, capability, 0, 0, 0
        )  # PR_CAPBSET_DROP, for the program that is executed next


def command(*arguments: str | Path, before: Callable[[], None] | None = None, **extra: str) -> Done:
    """Run `convlens ARGUMENTS` in a new process, in which `before` is called first."""
    process = start(*arguments, before=before, **extra)
    out, err = process.communicate(timeout=240)
    return Done(process.returncode, out, err)


def refused(done: Done, code: int, *parts: str) -> None:
    """Assert a clear error: exit code, at most five lines, no traceback, all of `parts`."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    lines = done.err.splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith(("error:", "stopped:"))]
    assert len(starts) == 1, done.err
    assert len(lines) - starts[0] <= 5, done.err
    for text in parts:
        assert text in done.err, done.err


def picture(path: Path, color: Sequence[int], *, size: int = 12, seed: int = 0) -> Path:
    """Write a noisy image of a color; gray if `color` has one number."""
    noise = np.random.default_rng(seed).integers(-30, 30, (size, size, len(color)))
    pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if len(color) == 1 else pixels).save(path)
    return path


def pictures(
    root: Path,
    counts: Mapping[str, int],
    *,
    colors: Mapping[str, Sequence[int]] = COLORS,
    first: int = 0,
    size: int = 12,
) -> Path:
    """Create class folders of images, with one color for each class."""
    for n, (name, count) in enumerate(counts.items()):
        color = colors.get(name, (60 * n % 256, 90 * n % 256, 30))
        for i in range(count):
            seed = 1000 * n + first + i
            picture(root / name / f"{first + i:03}.png", color, size=size, seed=seed)
    return root


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's model file."""
    return serialization.read_model_file(run / "model.safetensors")[0]


def constant_model(
    folder: Path, bias: Sequence[float], classes: Sequence[str], size: int = 8
) -> RunDir:
    """Write a model file whose logits are always `bias`: all other weights are zero."""
    from convlens import models

    options = {"widths": [2], "batch_norm": False}
    net = models.build_model("cnn", len(classes), 3, size, options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.get_parameter("classifier.bias").copy_(torch.tensor(bias))
    return _saved(folder, net, options, classes, size)


def brightness_model(
    folder: Path, classes: Sequence[str] = ("dark", "light"), size: int = 8
) -> RunDir:
    """Write a model file that separates dark RGB images from light ones (mean below or above 0.5).

    A 1x1 kernel computes the mean of the channels (in 0..1), the head the mean of the pixels. The
    logits are `(0, 8 * (mean - 0.5))`.
    """
    from convlens import models

    options = {"widths": [1], "kernel": 1, "batch_norm": False, "pool": "none"}
    net = models.build_model("cnn", 2, 3, size, options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.get_parameter("stage1.0.weight").fill_(1 / 3)
        net.get_parameter("classifier.weight")[1] = 8.0
        net.get_parameter("classifier.bias")[1] = -4.0
    return _saved(folder, net, options, classes, size)


def sided_model(folder: Path, size: int = 8) -> RunDir:
    """Write a model file that classifies images by their brighter half; mirroring swaps classes.

    The logits of the classes `left` and `right` are `(8 * left, 9 * right)`, computed from the mean
    brightness of the halves.
    """
    from convlens import models

    options = {"widths": [1], "kernel": 1, "batch_norm": False, "pool": "none", "head": "flatten"}
    net = models.build_model("cnn", 2, 3, size, options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.get_parameter("stage1.0.weight").fill_(1 / 3)
        halves = net.get_parameter("classifier.weight").view(2, size, size)
        halves[0, :, : size // 2] = 8 / (size * size / 2)
        halves[1, :, size // 2 :] = 9 / (size * size / 2)
    return _saved(folder, net, options, ("left", "right"), size)


def _saved(
    folder: Path,
    net: torch.nn.Module,
    options: dict[str, Any],
    classes: Sequence[str],
    size: int,
) -> RunDir:
    from convlens import recipe

    run_dir = RunDir(folder)
    loaded = recipe.load_recipe(
        {"name": folder.name, "data": {"name": "shapes"}, "model": {"name": "cnn", **options}}
    )
    model_metadata = {
        "convlens": "test",
        "run": folder.name,
        "model": {"name": "cnn", "options": options},
        "classes": list(classes),
        "preprocessing": {
            "image_size": size,
            "channels": 3,
            "fit": "stretch",
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
        },
        "data": {"name": "shapes", "fingerprint": "none"},
        "chosen": {},
        "recipe": loaded.model_dump(mode="json"),
    }
    device.Plan("cpu", "fp32", "contiguous").prepare_model(net)
    run_dir.save_model(net.state_dict(), model_metadata)
    return run_dir
