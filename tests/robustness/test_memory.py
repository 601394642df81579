"""Peak memory: the memory of a training does not grow with a set beyond the budget."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convlens.data.shard_writer import write_shards
from convlens.data.sources import find_source
from helpers.commands import environment, weights

BUDGET = 4 << 20
SIZE = 64
IMAGE = 3 * SIZE * SIZE
BATCH = 64
# Both sets exceed the budget, so both are streamed, in the same batches. Both validate on several
# full batches of 256: with the second one two buffers are alive, whatever the number of images.
# What the larger set needs more grows with the number of images: path, id, digest and label take
# less than 1 KiB each, 8 MiB in total. If the images were kept in memory, it would be 98 MiB more.
# The memory of freed buffers that an allocator keeps differs between processes, on a busy machine
# by 20 MiB. The limit is half of the 98 MiB, which leaves 40 MiB for that.
FEW, MANY = 3600, 12_000
MAX_GROWTH = (MANY - FEW) * IMAGE // 2

# Trains and tests with the arguments given; prints the peak memory in bytes. It does not use
# `ru_maxrss`, which begins at the peak of the parent process.
MEASURE = """
import json, re, sys
from pathlib import Path
from convlens import cli
try:
    cli.main([*sys.argv[1:], "--json"])
except SystemExit as end:
    assert end.code == 0, end.code
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps({"peak": int(peak[1]) * 1024}))
"""


def measured(data: Path, name: str, memory: str) -> dict[str, Any]:
    """Train for one epoch in a child process; return `peak` (bytes) and the test results."""
    arguments = [
        "train",
        str(data),
        "model.widths=[2,4]",
        "augment=[]",
        "train.epochs=1",
        "optim.ema=null",
        f"train.batch_size={BATCH}",
        "train.memory_format=contiguous",
        "train.precision=fp32",
        f"data.image_size={SIZE}",
        "--name",
        name,
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        capture_output=True,
        text=True,
        # A single arena: otherwise each decoding thread keeps its freed memory.
        env=environment(CONVLENS_MEMORY=memory, MALLOC_ARENA_MAX="1"),
    )
    assert done.returncode == 0, done.stderr
    result, peak = done.stdout.splitlines()
    return {**json.loads(result), **json.loads(peak)}


def folder(root: Path, count: int) -> Path:
    """Write `count` images of noise, dark and light; BMP is the fastest format to read."""
    random = np.random.default_rng(0)
    for n in range(count):
        low = 100 * (n % 2)
        path = root / ("dark", "light")[n % 2] / f"{n:05}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(low, low + 150, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_set_beyond_the_budget_is_streamed_and_trains_to_the_same_weights() -> None:
    assert FEW * IMAGE > 10 * BUDGET
    small = measured(folder(Path("small"), FEW), "small", "4MB")
    large = measured(folder(Path("large"), MANY), "large", "4MB")
    assert large["n"] == MANY * 15 // 100
    growth = large["peak"] - small["peak"]
    assert growth < MAX_GROWTH, f"{growth / 2**20:.1f} MiB more"
    # With a larger budget the images are in memory, and the measured peak shows it.
    shutil.move("models/large", "streamed")
    in_memory = measured(Path("large"), "large", "4GB")
    assert in_memory["peak"] - large["peak"] > 0.5 * MANY * IMAGE
    one, two = weights(Path("streamed")), weights(Path("models/large"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    same = ("loss", "correct", "confusion", "data_fingerprint")
    assert {key: large[key] for key in same} == {key: in_memory[key] for key in same}


@linux
@pytest.mark.slow
def test_shards_stream_within_the_budget() -> None:
    # No decoded image is kept: each batch is read from the tar files and decoded when needed.
    peaks = {}
    for count in (FEW, MANY):
        write_shards(
            find_source(str(folder(Path(f"folder-{count}"), count))), Path(f"tars-{count}")
        )
        peaks[count] = measured(Path(f"tars-{count}"), f"of-{count}", "4MB")["peak"]
    growth = peaks[MANY] - peaks[FEW]
    assert growth < MAX_GROWTH, f"{growth / 2**20:.1f} MiB more"
    assert not list(Path(os.environ["CONVLENS_CACHE"]).glob("*.pixels"))
