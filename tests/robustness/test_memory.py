"""Peak memory: a set ten times the budget trains within it, and comes to the same weights."""

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
# Beyond the budget: three batches as bytes on their way (one in use, one read ahead, one that
# the allocator has not yet given back), and what is kept of each image: path, id, digest, label.
ROOM = 3 * BATCH * IMAGE
EACH = 1024
# What an allocator keeps of freed buffers differs from one process to the next, by 10 MiB and on a
# busy machine by 20: so the sets differ by far more than that.
NOISE = 24 << 20

# Trains and tests with the arguments given; prints the most memory it ever had, in bytes. Not
# `ru_maxrss`: that begins at what the parent process had.
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
    """One epoch over the folder in a process of its own: `peak` bytes and the test's results."""
    arguments = [
        "train",
        str(data),
        "model.widths=[4,8]",
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
        # One arena: else each thread that decodes keeps what it freed.
        env=environment(CONVLENS_MEMORY=memory, MALLOC_ARENA_MAX="1"),
    )
    assert done.returncode == 0, done.stderr
    result, peak = done.stdout.splitlines()
    return {**json.loads(result), **json.loads(peak)}


def folder(root: Path, count: int) -> Path:
    """Two classes of noise, dark and light, `count` images in all, as quickly read as can be."""
    random = np.random.default_rng(0)
    for n in range(count):
        low = 100 * (n % 2)
        path = root / ("dark", "light")[n % 2] / f"{n:05}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(low, low + 150, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts as Linux counts")


@linux
def test_a_set_ten_times_the_budget_trains_within_it_to_the_same_weights() -> None:
    # 42 and 94 MiB of pixels. Both validate on several full batches of 256: with the second one
    # the buffers of two are alive, whatever the number of images.
    few, many = 3600, 8000
    assert many * IMAGE > 10 * BUDGET
    # Both are beyond the budget, so both stream, with the same batches: what the larger one
    # needs more is what grows with the number of images.
    small = measured(folder(Path("small"), few), "small", "4MB")
    large = measured(folder(Path("large"), many), "large", "4MB")
    assert large["n"] == 1200
    growth = large["peak"] - small["peak"]
    assert growth < BUDGET + ROOM + NOISE + EACH * (many - few), f"{growth / 2**20:.1f} MiB more"
    # With room for all of it, the images are in memory, and that can be seen.
    shutil.move("models/large", "streamed")
    whole = measured(Path("large"), "large", "4GB")
    assert whole["peak"] - large["peak"] > 0.5 * many * IMAGE
    one, two = weights(Path("streamed")), weights(Path("models/large"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    same = ("loss", "correct", "confusion", "data_fingerprint")
    assert {key: large[key] for key in same} == {key: whole[key] for key in same}


@linux
@pytest.mark.slow
def test_shards_stream_within_the_budget() -> None:
    # Nothing decoded is kept: each batch is read from the tars and decoded when it is needed.
    few, many = 3600, 8000
    peaks = {}
    for count in (few, many):
        write_shards(
            find_source(str(folder(Path(f"folder-{count}"), count))), Path(f"tars-{count}")
        )
        peaks[count] = measured(Path(f"tars-{count}"), f"of-{count}", "4MB")["peak"]
    assert many * IMAGE > 10 * BUDGET
    growth = peaks[many] - peaks[few]
    assert growth < BUDGET + ROOM + NOISE + EACH * (many - few), f"{growth / 2**20:.1f} MiB more"
    assert not list(Path(os.environ["CONVLENS_CACHE"]).glob("*.pixels"))
