"""What is going on in a run: its curves, and a few cheap measurements on its own images.

The evidence is gathered here; what it means is for the rules in `symptoms.py`. The test split
stays sealed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convlens import device, run
from convlens.data import Split
from convlens.diagnosing.findings import CannotTell, Case, Finding, Shares
from convlens.diagnosing.symptoms import RULES
from convlens.errors import ConvlensError, UsageError
from convlens.evaluation import own_data
from convlens.formats import modelfile
from convlens.inference import batch_logits, placed
from convlens.inspection.layers import as_maps, recording, stages
from convlens.recipe import Recipe
from convlens.run import Loaded, RunFolder
from convlens.system.console import progress, quieted

LOOKED_AT = 512  # images of each split: enough for the thresholds, a second or two
BATCH = 64


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` returns: findings, rules that found nothing, and those that can't tell.

    `untold` says why for each of the latter.
    """

    run: str
    status: str
    epochs: int
    findings: Sequence[Finding]
    healthy: Sequence[str]
    untold: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@device.preserve_torch_settings()
def diagnose(place: RunFolder, *, on: str | None = None, quiet: bool = False) -> Diagnosis:
    """Puts every rule of `symptoms.RULES` to a run, finished or not.

    A run without weights is judged by its curves, a bare model file by its images, an empty run
    not at all; images that have changed or moved leave out what needs them.

    Raises:
        UsageError: no such device; ModelFileError: an unreadable `run.json`.
    """
    where = device.choose(on)
    with quieted(quiet):
        case = _case(place, where)
    findings, healthy, untold = [], [], {}
    for name, rule in RULES.items():
        try:
            found = rule(case)
        except CannotTell as reason:
            untold[name] = str(reason)
            continue
        if found is None:
            healthy.append(name)
        else:
            findings.append(found)
    return Diagnosis(place.name, _status(place, case), len(case.rows), findings, healthy, untold)


def _status(place: RunFolder, case: Case) -> str:
    if not place.facts():
        return "a model file without a past"
    if place.finished:
        return "finished"
    if case.diverged is not None:
        return "stopped by a loss that was not finite"
    return "not finished" if case.rows else "no epoch is finished yet"


def _case(place: RunFolder, where: str) -> Case:
    facts = place.facts()
    evidence: dict[str, Any] = {
        "rows": place.metrics(),
        "finished": place.finished or not facts,
        "diverged": facts.get("diverged"),
        "classes": len(facts.get("data", {}).get("classes", [])),
    }
    try:
        evidence["recipe"] = _recipe(place)
        evidence |= _measured(place, where)
    except ConvlensError as error:
        evidence["unmeasured"] = error.what
    return Case(**evidence)


def _recipe(place: RunFolder) -> Recipe:
    if (place.path / "recipe.yaml").is_file():
        return place.recipe()
    return modelfile.recipe_of(run.load_model(place.model_path).card)


def _measured(place: RunFolder, where: str) -> dict[str, Any]:
    """What the network makes of some training and validation images, and how these look."""
    loaded = run.load_model(place.model_path)
    data = own_data(loaded, where)
    counts = np.bincount(data.train.labels.numpy(), minlength=len(data.classes))
    found: dict[str, Any] = {
        "classes": len(data.classes),
        "counts": dict(zip(data.classes, counts.tolist(), strict=True)),
    }
    parts = {"trained": data.train, "validated": data.val}
    chosen = {name: _some(part) for name, part in parts.items() if len(part)}
    means, reached = {}, {}
    with progress("looking at images", sum(len(labels) for _, labels in chosen.values())) as bar:
        for name, (pixels, labels) in chosen.items():
            right, reached[name] = _answers(loaded, pixels, labels, where, bar.advance)
            found[name] = Shares(int(right.sum()), len(labels))
            means[name] = _features(pixels)
            if name == "validated":
                found["recalls"] = {
                    each: Shares(int(right[labels == i].sum()), int((labels == i).sum()))
                    for i, each in enumerate(data.classes)
                }
    found["dead"] = reached.get("validated", reached["trained"])
    if "validated" in means:
        found["looks"] = (means["trained"], means["validated"])
    names = ("grey",) if data.channels == 1 else ("red", "green", "blue")
    found["features"] = [f"{what} {name}" for what in ("mean", "deviation") for name in names]
    return found


def _some(part: Split) -> tuple[Tensor, Tensor]:
    """Images and labels drawn from a split, always the same."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    index = order[:LOOKED_AT].sort().values
    return part.rows.gather(index), part.labels[index]


def _answers(
    loaded: Loaded, pixels: Tensor, labels: Tensor, where: str, advance: Any
) -> tuple[Tensor, dict[str, tuple[int, int]] | None]:
    """Which images are right, and by stage the dead channels and all; None of no maps."""
    plan, names = placed(loaded.model, where), stages(loaded.model)
    right, low, high = [], dict[str, Tensor](), dict[str, Tensor]()
    normalise = loaded.preprocessing.normalise
    for images, truths in zip(pixels.split(BATCH), labels.split(BATCH), strict=True):
        with recording(loaded.model, names) as outputs:
            logits = batch_logits(loaded.model, images, normalise, plan)
        right.append(logits.argmax(1).cpu() == truths)
        try:
            maps = as_maps(outputs, names)
        except UsageError:  # a network whose stages give something else
            maps = {}
        for name, values in maps.items():
            least, most = values.amin((0, 2, 3)), values.amax((0, 2, 3))
            low[name] = torch.minimum(low.get(name, least), least)
            high[name] = torch.maximum(high.get(name, most), most)
        advance(len(images))
    dead = {name: dead_of(low[name], high[name]) for name in low}
    return torch.cat(right), dead or None


def dead_of(low: Tensor, high: Tensor) -> tuple[int, int]:
    """How many channels are dead, of how many, by their least and greatest values `[C]`.

    Dead is a channel whose values all lie within a millionth of the stage's greatest: behind a
    ReLU it is one that is always 0.
    """
    scale = float(torch.maximum(low.abs(), high.abs()).max())
    return int((high - low <= 1e-6 * scale).sum()), len(low)


def _features(pixels: Tensor) -> np.ndarray:
    """Mean and deviation of each channel of each image, `[N, 2 C]` in 0..1."""
    unit = pixels.flatten(2).double() / 255
    found: np.ndarray = torch.cat([unit.mean(2), unit.std(2, correction=0)], 1).numpy()
    return found
