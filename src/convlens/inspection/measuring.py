"""Measurements over a data set, stage by stage, for several networks at once: the whole job."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convlens import device
from convlens.errors import UsageError
from convlens.inspection.measures import MEASURES
from convlens.inspection.sampling import Sample, sample
from convlens.inspection.stagebatch import Value
from convlens.inspection.stagework import Alike, Measured, Work, together
from convlens.inspection.subjects import Subject, share_data
from convlens.names import pick
from convlens.system.console import quieted
from convlens.system.files import write_atomic

SIMILARITY = "similarity"
NAMES = (*MEASURES, SIMILARITY)


@dataclass(frozen=True)
class Measurements:
    """What `measure` found, and the files it wrote."""

    networks: tuple[Measured, ...]
    similarity: tuple[Alike, ...]
    measures: tuple[str, ...]
    seed: int
    files: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "measures": {
                name: {"title": MEASURES[name].title, "definition": MEASURES[name].about}
                for name in self.measures
            },
            "networks": [network.to_dict() for network in self.networks],
            "similarity": [alike.to_dict() for alike in self.similarity],
            "seed": self.seed,
            "files": [str(path) for path in self.files],
        }


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Checked names of measurements in the table's order; none given means all of them.

    Raises:
        UsageError: no such measurement, with near misses.
    """
    for name in names:
        pick(dict.fromkeys(NAMES), name, "measurement")
    return tuple(name for name in NAMES if not names or name in names)


@device.preserve_torch_settings()
def measure(
    subjects: Sequence[Subject],
    names: Sequence[str] = (),
    *,
    folder: Path,
    layers: Sequence[str] = (),
    split: str = "val",
    data: str | Path | None = None,
    images: int = 2000,
    learn_from: int = 4000,
    untrained: bool = False,
    seed: int = 0,
    quiet: bool = False,
) -> Measurements:
    """Measures every stage of the networks and draws one figure of all of them.

    Args:
        names: of `MEASURES`, or `similarity`; all by default.
        folder: where `measures.png`, `similarity.png` and `measures.json` go.
        layers: other layers than the stages, the same for all networks.
        split: which images are measured on: `val`, `test` (only if asked for) or `train`.
        data: another data set than each network's own.
        images, learn_from: at most so many held-out and training images, drawn by `seed`.
        untrained: each architecture with fresh weights, too; drawn dashed.

    Memory doesn't grow with the number of images, but for a few numbers an image and stage.

    Raises:
        UsageError: unknown names; DataError: images that changed, have moved or are too few;
            ModelFileError: all activations of a network are NaN.
    """
    if not subjects:
        raise UsageError("no networks to measure", fix="name one run or several")
    if min(images, learn_from) < 1:
        raise UsageError(f"can't measure on {min(images, learn_from)} images", fix="name more")
    wanted = chosen(names)
    singly = [name for name in wanted if name != SIMILARITY]
    learns = any(MEASURES[name].learns for name in singly)
    with quieted(quiet):
        if data is None:
            share_data(subjects)
        works = []
        for subject in subjects:
            held = sample(subject, split, data=data, most=images, seed=seed)
            own: Sample | None = None
            if learns:
                own = sample(subject, split, data=data, most=learn_from, seed=seed, learning=True)
            works.append(Work.of(subject, held, own, singly, layers))
        _tell_apart(works)
        if untrained:
            works += [work.fresh(seed) for work in {w.architecture: w for w in works}.values()]
            _tell_apart(works)
        for work in works:
            work.learn()
        groups: dict[tuple[str, ...], list[Work]] = {}
        for work in works:
            groups.setdefault(work.held.ids, []).append(work)
        asked = SIMILARITY in wanted
        alike = [together(group, similarity=asked) for group in groups.values()]
        networks = tuple(work.result(split) for work in works)
    found = tuple(each for each in alike if each is not None)
    files = _draw(networks, found, singly, folder)
    result = Measurements(networks, found, tuple(singly), seed, (*files, folder / "measures.json"))
    write_atomic(result.files[-1], json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
    return result


def _tell_apart(works: Sequence[Work]) -> None:
    """Numbers the networks that have the same name."""
    met: dict[str, int] = {}
    for work in works:
        name = work.subject.name
        met[name] = met.get(name, 0) + 1
        if met[name] > 1:
            work.subject = replace(work.subject, name=f"{name} ({met[name]})")


def _draw(
    networks: Sequence[Measured], similarity: Sequence[Alike], names: Sequence[str], folder: Path
) -> list[Path]:
    from convlens import plots

    files = []
    if names:
        files.append(folder / "measures.png")
        panels = {name: (MEASURES[name].title, MEASURES[name].scale) for name in names}
        lines = [
            plots.StageLine(
                network.name,
                list(network.stages),
                {name: [_ends(v[name]) for v in network.stages.values()] for name in names},
                network.baseline,
            )
            for network in networks
        ]
        plots.save(plots.stage_measures(lines, panels, note=_note(networks)), files[-1])
    for number, alike in enumerate(similarity):
        files.append(folder / f"similarity{f'-{number + 1}' if number else ''}.png")
        title = f"Linear CKA on {alike.n:,} {networks[0].split} images"
        plots.save(plots.similarity(alike.matrix, alike.stages, title), files[-1])
    return files


def _ends(value: Value) -> tuple[float, float, float]:
    low, high = value.interval95 or (math.nan, math.nan)
    return (math.nan if value.value is None else value.value), low, high


def _note(networks: Sequence[Measured]) -> str:
    """What was measured on, in a line."""
    held = sorted({(network.data, network.n) for network in networks})
    words = "; ".join(f"{n:,} {networks[0].split} images of {data}" for data, n in held)
    learned = sorted({f"{network.learned:,}" for network in networks if network.learned})
    more = f", learned from {' or '.join(learned)} training images" if learned else ""
    several = len({tuple(network.stages) for network in networks}) > 1
    spread = "; shallower networks' stages are spread evenly" if several else ""
    return f"{words}{more}; bars: 95% intervals{spread}"
