"""Commands under limits on open files, processors, shared memory and file sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convlens import device
from convlens.data.shard_writer import write_shards
from convlens.data.sources import find_source
from helpers.commands import (
    COLORS,
    DIGITS,
    NET,
    brightness_model,
    environment,
    here,
    picture,
    pictures,
    refused,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")

# Run commands one after another under limits and print the resources they used.
LIMITED = """
import json, os, resource, sys
from pathlib import Path

limits = json.loads(sys.argv[1])
for name, value in limits.items():
    resource.setrlimit(getattr(resource, name), (value, value))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
opened = set()
sys.addaudithook(lambda event, about: opened.add(str(about[0])) if event == "open" else None)

from convlens import cli

codes = []
for line in json.loads(sys.argv[2]):
    try:
        cli.main(line)
    except SystemExit as end:
        codes.append(end.code)
import torch
mapped = Path("/proc/self/maps").read_text()
print(json.dumps({
    "codes": codes,
    "threads": torch.get_num_threads(),
    "shared": [name for name in opened if "/dev/shm" in name] + ["mapped"] * ("/dev/shm" in mapped),
    "left": sorted(set(os.listdir("/dev/shm")) - shared) if os.path.isdir("/dev/shm") else [],
    "open": len(os.listdir("/proc/self/fd")),
}), file=sys.__stdout__)
"""


def run_limited(
    limits: dict[str, int], *lines: list[str], **extra: str
) -> tuple[dict[str, Any], str]:
    """Return the resources that the commands used, and their stderr."""
    variables = environment(**extra)
    if "OMP_NUM_THREADS" not in extra:
        del variables["OMP_NUM_THREADS"]  # so that convlens chooses it
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(limits), json.dumps(lines)],
        capture_output=True,
        text=True,
        env=variables,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@linux
def test_commands_work_with_few_open_files_one_processor_and_no_shared_memory() -> None:
    """Images of 90 shards and of a folder are read repeatedly, since none fit into memory."""
    pictures(Path("photos"), dict.fromkeys(COLORS, 30))
    write_shards(find_source("photos"), Path("shards"), per_shard=1)
    assert len(list(Path("shards").glob("*.tar"))) == 90
    used, err = run_limited(
        {"RLIMIT_NOFILE": 64},
        ["train", "shards", *NET, "--no-test", "--name", "by-shards"],
        ["train", "photos", *NET, "--no-test", "--name", "by-files"],
        ["evaluate", "by-shards", "--split", "val"],
        ["predict", "by-files", "photos/red", "--format", "csv"],
        ["audit", "photos"],
        CONVLENS_MEMORY="1KB",
    )
    assert used["codes"] == [0] * 5, err
    assert used["threads"] == 1
    assert used["shared"] == used["left"] == []
    assert used["open"] < 64


@linux
def test_the_limit_on_open_files_is_read_from_the_system() -> None:
    import resource

    assert device.max_open_files() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.mark.parametrize("device_name", ["cuda", "cuda:7"])
@pytest.mark.parametrize(
    "line",
    [
        ["train", *DIGITS],
        ["train", *DIGITS, "--seeds", "2"],
        ["evaluate", "small"],
        ["predict", "small", "photo.png"],
        ["look", "small"],
        ["compare", "small", "other"],
        ["labels", "digits"],
    ],
    ids=lambda line: "-".join(word for word in line if "=" not in word),
)
def test_a_missing_gpu_is_an_error_instead_of_a_run_on_the_cpu(
    device_name: str, line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("small", "other"):
        brightness_model(Path("models") / name)
    picture(Path("photo.png"), (200, 0, 0))
    before = sorted(Path().rglob("*"))
    refused(
        here(*line, "--device", device_name),
        2,
        f"device '{device_name}' can't be used",
        "--device cpu",
    )
    assert sorted(Path().rglob("*")) == before  # no run was created


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no /dev/shm")
def test_no_module_uses_shared_memory() -> None:
    import convlens

    for path in Path(convlens.__file__).parent.rglob("*.py"):
        text = path.read_text("utf-8")
        for word in ("multiprocessing", "share_memory", "DataLoader", "/dev/shm"):
            assert word not in text, (path, word)
