"""Where pretrained weights come from: torchvision, timm, files, other runs.

`model.weights` says it in one word. `check` knows wrong words before any image is read, `find`
opens or downloads (nothing else touches the network), `start` fits what came into the network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convlens import run, serialization
from convlens.data.download import DownloadError, fetch
from convlens.data.sources import data_roots
from convlens.errors import ModelFileError, UsageError, close_matches, did_you_mean
from convlens.models.adapt import FittedWeights, fit_weights
from convlens.recipe import ModelConfig
from convlens.utils.files import cannot_write, interprocess_lock, sha256

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# `IMAGENET1K_V1`, `DEFAULT` or, with its table, `ResNet18_Weights.IMAGENET1K_V1`.
_MEMBER = re.compile(r"(?:(\w+_Weights)\.)?(IMAGENET\w*|DEFAULT)|(\w+_Weights)\.(\w+)")

# Their weights come from TensorFlow and take pixels as (x - 0.5) / 0.5. torchvision normalises as
# for ImageNet and undoes it inside (`transform_input`), where we build them without.
FROM_TENSORFLOW = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class WeightsSource:
    """Tensors by name and what is known of them.

    `mean` and `std` (one number a channel, images in 0..1) are those the weights were trained
    with, `classes` the names of their head's outputs; None where nobody said.
    """

    tensors: dict[str, Tensor]
    origin: str
    where: str
    sha256: str
    mean: list[float] | None = None
    std: list[float] | None = None
    classes: tuple[str, ...] | None = None


def check_weights_config(config: ModelConfig) -> None:
    """Refuses a word that can't be right for this network, without opening any file.

    Raises:
        UsageError: with near misses.
    """
    spec = config.weights
    if _is_timm(spec, config.name):
        if importlib.util.find_spec("timm") is None:
            raise UsageError(
                f"model.weights={spec} of {config.name} needs timm, which is not installed",
                fix="pip install timm",
            )
    elif spec == "default" or _MEMBER.fullmatch(spec):
        _member(spec, config.name)


def check_weights_available(config: ModelConfig) -> None:
    """Looks whether a file or run is there: before images are read, which may take minutes.

    Raises:
        UsageError, ModelFileError: it isn't.
    """
    spec = config.weights
    timm = _is_timm(spec, config.name)
    if not (timm or spec in ("none", "default") or _MEMBER.fullmatch(spec)):
        _locate(spec, config.name)


def find_weights(config: ModelConfig) -> WeightsSource:
    """The weights that a recipe asks for (not `none`), downloaded if they are torchvision's or
    timm's and not here yet.

    Raises:
        UsageError: no such weights; ModelFileError: a file that can't be read, trusted or had.
    """
    spec = config.weights
    if _is_timm(spec, config.name):
        return _timm(spec, config.name)
    if spec == "default" or _MEMBER.fullmatch(spec):
        member = _member(spec, config.name)
        path = _downloaded(member.url)
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
        )
    path, origin = _locate(spec, config.name)
    contents = serialization.read_foreign_weights(path)
    preprocessing = contents.model_metadata.get("preprocessing", {})
    classes = contents.model_metadata.get("classes")
    return WeightsSource(
        tensors=contents.tensors,
        origin=origin,
        where=str(path),
        sha256=contents.sha256,
        mean=preprocessing.get("mean"),
        std=preprocessing.get("std"),
        classes=tuple(classes) if classes else None,
    )


def load_pretrained(
    source: WeightsSource, model: nn.Module, classes: tuple[str, ...]
) -> FittedWeights:
    """Fits the weights into `model`; a head is taken over if its classes are ours, or unknown."""
    keep = source.classes is None or source.classes == classes
    return fit_weights(model, source.tensors, keep_head=keep, where=source.where)


def weights_record(source: WeightsSource, fitted: FittedWeights) -> dict[str, Any]:
    """What a run and its model file say about where their weights began."""
    return {
        "origin": source.origin,
        "sha256": source.sha256,
        "mean": source.mean,
        "std": source.std,
        "matched": len(fitted.matched),
        "adapted": fitted.adapted,
        "left": fitted.left,
        "new": fitted.new,
        "head": fitted.head,
    }


def pretrained_normalization(
    told: Mapping[str, Any], channels: int
) -> tuple[list[float], list[float]] | None:
    """Mean and deviation that the weights of a `record` expect, for that many channels."""
    mean, std = told["mean"], told["std"]
    if mean is None or std is None:
        return None
    return _spread(mean, channels), _spread(std, channels)


def _spread(values: list[float], channels: int) -> list[float]:
    """As they are; of colour for grey the average, of grey for colour the same three times."""
    if len(values) == channels:
        return [float(value) for value in values]
    return [float(sum(values) / len(values))] * channels


# Files and runs


def _locate(spec: str, name: str) -> tuple[Path, str]:
    """The file that a path or a run's name means, and what to call it."""
    path = Path(spec)
    if os.path.isfile(path):  # (of `Path`, a name too long is an error)
        return path, f"file {spec}"
    if path.suffix in SUFFIXES and not os.path.isdir(path):
        raise ModelFileError("no such file of weights", where=spec, fix="check model.weights")
    try:
        found = run.find_run(spec)
    except (UsageError, ModelFileError) as error:
        if os.path.isdir(path):
            split = os.path.isfile(path / ".metadata")
            raise ModelFileError(
                "this is a folder, not a file of weights"
                + " (torch.distributed.checkpoint's: its index is a pickle)" * split,
                where=spec,
                fix="where it comes from, save them in one file: torch.save(model.state_dict(), "
                "...)"
                if split
                else "give the file in it, or the name of a run",
            ) from error
        if isinstance(error, ModelFileError):
            raise
        words = ["none", "default", *(r.name for r in run.list_runs())]
        members = _table(name).__members__ if _table(name) else {}
        close = close_matches(spec, words) + close_matches(spec.upper(), members)
        raise UsageError(
            f"model.weights={spec!r} is no run, file or weights of {name}",
            fix=did_you_mean(close) or error.fix,
        ) from error
    if not found.model_path.is_file():
        raise ModelFileError(
            f"run {found.name!r} has no weights yet", where=str(found.path), fix="train it first"
        )
    return found.model_path, f"run {found.name}"


# torchvision


def _table(name: str) -> Any:
    """torchvision's weights enum of a network, None if it has none."""
    from torchvision import models

    known = name in models.list_models(module=models)
    return models.get_model_weights(name) if known else None


def _member(spec: str, name: str) -> Any:
    table = _table(name)
    if not table:
        raise UsageError(
            f"model.weights={spec}: {name} has no pretrained weights in torchvision",
            fix="a run, or a file (.safetensors, .pt, .pth, .bin) can be given",
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


def _downloaded(url: str) -> Path:
    """The file of one of torchvision's addresses: found, or downloaded into `weights/`.

    Its name carries the first digits of its SHA-256, which are checked in either case.
    """
    file = url.rpartition("/")[2]
    digits = re.search(r"-([0-9a-f]{8,})\.", file)
    wanted = digits[1] if digits else ""
    folders = [root / "weights" for root in data_roots()]
    for folder in (*folders, Path(torch.hub.get_dir()) / "checkpoints"):
        path = folder / file
        if path.is_file():
            if not sha256(path).startswith(wanted):
                raise ModelFileError(
                    f"not the file of that name: its SHA-256 doesn't begin with {wanted}",
                    where=str(path.absolute()),
                    fix="it is half a file or another one: delete it",
                )
            return path
    target = folders[0] / file
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with interprocess_lock(target.parent / ".download.lock", f"downloading {file}"):
            if not target.is_file():  # another process may just have done it
                temporary = fetch(url, file, target.parent, known_hash=f"sha256:{wanted}")
                os.chmod(temporary, 0o644)
                os.replace(temporary, target)
    except DownloadError as error:
        raise ModelFileError(
            f"pretrained weights can't be downloaded: {url}: {error}",
            where=str(target.absolute()),
            fix=f"put that file there by hand: {target.absolute()}",
        ) from error
    except OSError as error:
        raise cannot_write(target, error) from error
    return target


# timm


def _is_timm(spec: str, name: str) -> bool:
    return spec.startswith(("hf-hub:", "local-dir:", "timm/")) or (
        spec == "default" and name.startswith("timm/")
    )


def _timm(spec: str, name: str) -> WeightsSource:
    """Through timm, which knows the names of its files, converts old ones and keeps a cache."""
    import timm

    asked = (name if spec == "default" else spec).removeprefix("timm/")
    try:
        network = timm.create_model(asked, pretrained=True)
    # The hub, the network and timm itself each raise their own kinds.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelFileError(
            f"timm can't get the weights {asked!r}: {reason}",
            where=spec,
            fix="give a file of them: model.weights=PATH.safetensors",
        ) from error
    tensors = dict(network.state_dict())
    config = network.pretrained_cfg
    return WeightsSource(
        tensors=tensors,
        origin=f"timm {asked}",
        where=f"timm {asked}",
        sha256=_file_digest(tensors),
        mean=list(config["mean"]) if config.get("mean") else None,
        std=list(config["std"]) if config.get("std") else None,
    )


def _file_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes: timm doesn't say which file it read."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
