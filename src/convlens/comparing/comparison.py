"""Comparing runs: one table, curves overlaid, and whether they differ by more than chance.

Runs are compared on the very same images. Which these are is known before anything is measured,
so that a comparison that is refused costs no look at a test split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import nn

from convlens import device, inference, metrics, picturing, run
from convlens.answers import identity
from convlens.comparing.verdicts import Candidate, Group, Verdict, grouped, judged, seedless
from convlens.errors import ConvlensError, DataError, ModelFileError, UsageError
from convlens.evaluation import SPLITS, Judged, judged_by, look
from convlens.formats import modelfile
from convlens.names import pick
from convlens.run import Loaded, RunFolder
from convlens.system.console import print_status, quieted

NAMED = 3  # runs in the name of the folder of plots


@dataclass(frozen=True)
class Comparison:
    """Runs side by side: what `compare` returns.

    Attributes:
        groups: one a recipe, in the order of the runs; the first is what others are set against.
        verdicts: one for each group but the first, each with its `sentence`.
        notes: what a reader must know to trust them.
        plots: the pictures.
    """

    split: str
    data: str
    groups: Sequence[Group]
    verdicts: Sequence[Verdict]
    notes: Sequence[str]
    plots: Sequence[Path]

    def to_dict(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "data": self.data,
            "groups": [group.to_dict() for group in self.groups],
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "notes": list(self.notes),
            "plots": [str(path) for path in self.plots],
        }


@dataclass(frozen=True)
class _Entrant:
    """A run, and the images it is to be judged by."""

    place: RunFolder
    known: Loaded  # without its network: many of them would fill the memory
    judged: Judged
    images: str = ""

    @property
    def seedless(self) -> str:
        return seedless(modelfile.recipe_of(self.known.card))


@device.preserve_torch_settings()
def compare(
    names: Sequence[str | Path | RunFolder],
    split: str = "test",
    *,
    data: str | Path | None = None,
    force: bool = False,
    on: str | None = None,
    quiet: bool = False,
) -> Comparison:
    """Measures runs on the same images and says which can be told apart, against the first one.

    Args:
        names: at least two runs: names, folders or model files.
        split: `test`, `val` or `train`; each run's look at it is logged as by `evaluate`.
        data: judge all of them by another data set.
        force: go on where images or classes differ; then nothing is tested.
        on: device.

    Raises:
        UsageError: fewer than two runs, unknown names; ModelFileError: a run without weights;
        DataError: different images or classes, or a run whose images changed or have moved.
    """
    pick(dict.fromkeys(SPLITS), split, "split")
    places = _found(names)
    where = device.choose(on)
    with quieted(quiet):
        entrants = _entrants(places, split, data, where)
        differing = _differing(entrants)
        if differing and not force:
            raise DataError(
                differing, where=", ".join(place.name for place in places)[:200],
                fix="judge all of them by one set with --data, or --force: then nothing is tested",
            )  # fmt: skip
        measured = [_measured(entrant, split, where) for entrant in entrants]
    groups = grouped(measured)
    verdicts = judged(groups, same_images=not differing)
    notes = [*_limits(entrants, differing, split), *_readings(measured, groups, verdicts)]
    data_name = " and ".join(dict.fromkeys(entrant.judged.name for entrant in entrants))
    drawn = _plots(data_name, groups, verdicts)
    return Comparison(split, data_name, groups, verdicts, notes, drawn)


def _found(names: Sequence[str | Path | RunFolder]) -> list[RunFolder]:
    """The runs; everything that is wrong with their names at once."""
    places: dict[Path, RunFolder] = {}
    wrong: list[ConvlensError] = []
    for name in names:
        try:
            place = name if isinstance(name, RunFolder) else run.find(name)
            if not place.model_path.is_file():
                raise ModelFileError(
                    f"run {place.name!r} has no weights yet", where=str(place.path),
                    fix="train it further with the same command, or leave it out",
                )  # fmt: skip
            places.setdefault(place.model_path.resolve(), place)
        except ConvlensError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        fixes = dict.fromkeys(error.fix for error in wrong if error.fix)
        raise UsageError("; ".join(error.what for error in wrong), fix="; ".join(fixes)[:300])
    if len(places) < 2:
        given = [place.name for place in places.values()]
        known = [other.name for other in run.runs() if other.name not in given]
        there = f"; others here: {', '.join(known[:6])}" if known else ""
        raise UsageError(
            f"comparing needs at least two different runs, got {len(places)}",
            fix=f"name another one{there}; `convlens evaluate RUN` measures one",
        )
    return list(places.values())


def _entrants(
    places: Sequence[RunFolder], split: str, data: str | Path | None, where: str
) -> list[_Entrant]:
    """Each run with its images, which are opened once where several runs share them."""
    opened: dict[str, Judged] = {}
    found = []
    for place in places:
        loaded = run.load_model(place.model_path)
        card = loaded.card
        config = modelfile.recipe_of(card).data.model_dump(mode="json")
        key = json.dumps([config, card["data"], card["classes"], card["preprocessing"]])
        if key not in opened:
            opened[key] = judged_by(loaded, split, data=data, on=where)
        found.append(_Entrant(place, replace(loaded, model=nn.Identity()), opened[key]))
    pixels = len(_sizes(found)) == 1
    prints: dict[int, str] = {}
    for entrant in found:
        if id(entrant.judged) not in prints:
            prints[id(entrant.judged)] = _fingerprint(entrant, pixels)
    return [replace(entrant, images=prints[id(entrant.judged)]) for entrant in found]


def _sizes(entrants: Sequence[_Entrant]) -> set[str]:
    """How the models see images, e.g. `32 px, 3 channels, crop`."""
    seen = [entrant.known.preprocessing for entrant in entrants]
    return {f"{pre.image_size} px, {pre.channels} channels, {pre.fit}" for pre in seen}


def _fingerprint(entrant: _Entrant, pixels: bool) -> str:
    """SHA-256 over the images' ids and class names and, if all models see them alike, pixels."""
    part = entrant.judged.part
    digest = hashlib.sha256(identity(part, entrant.known.classes).encode())
    if pixels:
        for index in torch.arange(len(part)).split(1024):
            digest.update(part.rows.gather(index).contiguous().numpy().data)
    return digest.hexdigest()


def _differing(entrants: Sequence[_Entrant]) -> str:
    """What keeps the runs from being compared; empty if nothing does.

    Runs with several splits of the data (`data.seed`) are judged by as many sets of test images:
    it is enough that each recipe was judged by the same ones.
    """
    first, *others = entrants
    for other in others:
        unlike = {*first.known.classes} ^ {*other.known.classes}
        if unlike:
            return (
                f"{first.place.name} and {other.place.name} don't know the same classes: "
                f"{', '.join(sorted(unlike)[:6])}{' ...' * (len(unlike) > 6)}"
            )
    sets: dict[str, set[str]] = {}
    for entrant in entrants:
        sets.setdefault(entrant.seedless, set()).add(entrant.images)
    one = len(sets) == 1 and len(sets[first.seedless]) > 1
    if one or len({frozenset(images) for images in sets.values()}) > 1:
        told = dict.fromkeys(
            f"{e.judged.name} ({len(e.judged.part):,} images, {e.images[:8]})" for e in entrants
        )
        return f"the runs are not judged by the same images: {' and '.join([*told][:3])}"
    return ""


def _measured(entrant: _Entrant, split: str, where: str) -> Candidate:
    place = entrant.place
    loaded = run.load_model(place.model_path)
    print_status(f"evaluating [bold]{escape(place.name)}[/]")
    result = look(place, loaded, entrant.judged, split, where, draw=False)
    pre = loaded.preprocessing
    shape = (pre.channels, pre.image_size, pre.image_size)
    return Candidate(
        name=place.name,
        recipe=modelfile.recipe_of(loaded.card),
        evaluation=result.evaluation,
        images=entrant.images,
        right=result.scores.argmax(1) == result.labels,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        flops=inference.flops(loaded.model, shape, where),
        file_bytes=place.model_path.stat().st_size,
        facts=place.facts(),
        epochs=place.metrics(),
    )


def _limits(entrants: Sequence[_Entrant], differing: str, split: str) -> list[str]:
    """What is wrong with comparing these runs by these images."""
    notes = []
    if differing:
        notes.append(f"{differing}; so nothing is tested")
    elif len(_sizes(entrants)) > 1:
        notes.append(
            f"the models see the images differently ({'; '.join(sorted(_sizes(entrants)))}): that "
            "they are the same goes by their names and labels"
        )
    facts = {entrant.place.name: entrant.place.facts() for entrant in entrants}
    half = [name for name, its in facts.items() if its and its.get("status") != "finished"]
    if half:
        notes.append(f"not trained to the end: {', '.join(half)}")
    if split != "test":
        why = "chose the epoch" if split == "val" else "were learned from"
        notes.append(f"the {split} images {why}: the accuracies are flattering")
    return notes


def _readings(
    measured: Sequence[Candidate], groups: Sequence[Group], verdicts: Sequence[Verdict]
) -> list[str]:
    """What the verdicts mean and what they don't."""
    notes = []
    seeds = {candidate.seeds for candidate in measured}
    one = len({seedless(candidate.recipe) for candidate in measured}) == 1
    if one and len(seeds) == len(measured):
        mean, sd = metrics.mean_sd([candidate.evaluation.accuracy for candidate in measured])
        assert sd is not None
        notes.append(
            f"one recipe with {len(seeds)} seeds: accuracy {100 * mean:.2f} ± {100 * sd:.2f} % "
            "(mean ± sd)"
        )
    elif any(verdict.test == "images" for verdict in verdicts):
        notes.append(
            "McNemar's test compares two trained models; another seed may turn a small difference "
            "round: compare several seeds (train --seeds 5) to compare recipes"
        )
    if len(verdicts) > 1:
        notes.append("each interval is 95% by itself; p values are corrected for their number")
    return notes


def _plots(title: str, groups: Sequence[Group], verdicts: Sequence[Verdict]) -> list[Path]:
    names = [member.name for group in groups for member in group.members]
    folder = f"compare-{'-'.join(names[:NAMED])}"
    if len(names) > NAMED:  # a name of its own for each set of runs, of bounded length
        others = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:6]
        folder = f"compare-{names[0]}-and-{len(names) - 1}-others-{others}"
    return picturing.comparison_plots(
        run.PLOTS / run.safe(folder),
        title,
        {group.name: [m.epochs for m in group.members if m.epochs] for group in groups},
        {v.name: (v.difference, v.interval95, bool(v.differs)) for v in verdicts},
        groups[0].name,
    )
