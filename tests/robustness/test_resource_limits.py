"""Commands on a machine that gives little: open files, processors, shared memory, file sizes."""

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
from convlens.run import RunDir
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

# Runs commands, one after the other, with few files and one processor, and tells what they used.
POOR = """
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


def poor(limits: dict[str, int], *lines: list[str], **extra: str) -> tuple[dict[str, Any], str]:
    """What those commands used, and what they said."""
    variables = environment(**extra)
    if "OMP_NUM_THREADS" not in extra:
        del variables["OMP_NUM_THREADS"]  # chosen by convlens
    done = subprocess.run(
        [sys.executable, "-c", POOR, json.dumps(limits), json.dumps(lines)],
        capture_output=True,
        text=True,
        env=variables,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@linux
def test_few_open_files_one_processor_and_no_shared_memory() -> None:
    """Images of 90 shards and of a folder, read again and again since nothing fits into memory."""
    pictures(Path("photos"), dict.fromkeys(COLORS, 60))
    write_shards(find_source("photos"), Path("shards"), per_shard=2)
    assert len(list(Path("shards").glob("*.tar"))) == 90
    shown, said = poor(
        {"RLIMIT_NOFILE": 64},
        ["train", "shards", *NET, "--no-test", "--name", "by-shards"],
        ["train", "photos", *NET, "--no-test", "--name", "by-files"],
        ["evaluate", "by-shards", "--split", "val"],
        ["predict", "by-files", "photos/red", "--format", "csv"],
        ["audit", "photos"],
        CONVLENS_MEMORY="1KB",
    )
    assert shown["codes"] == [0] * 5, said
    assert shown["threads"] == 1
    assert shown["shared"] == shown["left"] == []
    assert shown["open"] < 64


@linux
def test_a_limit_on_the_size_of_files() -> None:
    """The model file would be larger than what may be written: an error, and none is begun."""
    shown, said = poor(
        {"RLIMIT_FSIZE": 4096},
        ["train", "digits", "model.widths=[16,32]", "train.epochs=1", "--no-test", "--name", "it"],
    )
    assert shown["codes"] == [5], said
    assert "can't write: File too large" in said
    assert "Traceback" not in said
    assert not RunDir(Path("models/it")).is_finished
    assert not [path for path in Path("models/it").iterdir() if "model" in path.name]


@linux
def test_the_limit_on_open_files_is_known() -> None:
    import resource

    assert device.max_open_files() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.mark.parametrize("asked", ["cuda", "cuda:7"])
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
def test_a_gpu_that_is_not_there_is_never_a_silent_run_on_the_cpu(
    asked: str, line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("small", "other"):
        brightness_model(Path("models") / name)
    picture(Path("photo.png"), (200, 0, 0))
    before = sorted(Path().rglob("*"))
    refused(here(*line, "--device", asked), 2, f"device '{asked}' can't be used", "--device cpu")
    assert sorted(Path().rglob("*")) == before  # nothing was begun


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no /dev/shm")
def test_no_code_of_ours_asks_for_shared_memory() -> None:
    import convlens

    for path in Path(convlens.__file__).parent.rglob("*.py"):
        text = path.read_text("utf-8")
        for word in ("multiprocessing", "share_memory", "DataLoader", "/dev/shm"):
            assert word not in text, (path, word)
