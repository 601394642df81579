"""Label errors in a data set, found by models that did not train on the images they judge.

K models of a recipe, each without one of K folds (`several.train_many`, so they are runs like any
other), give every image probabilities from a model that never saw its label. Confident learning
(`confident`) says which labels these speak against. Suspected is not proven: `reviewing` draws
the sheet and writes the CSV by which a person decides.

The weights of a fold's epoch are chosen by that fold (unless the recipe keeps the last ones): one
choice among some dozens of epochs, far too little to learn an image's label by.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convlens import answers, device, evaluation, run
from convlens.data import Data, Split, load, looking, similar
from convlens.errors import DataError, UsageError
from convlens.inference import placed, probabilities, split_logits
from convlens.labelling import confident, reviewing
from convlens.labelling.suspects import LabelReport, Pair, Suspect, Twin
from convlens.recipe import Recipe
from convlens.run import Loaded, RunFolder
from convlens.schema import DataConfig
from convlens.several import runs as several
from convlens.starting import asking
from convlens.system.console import print_status, progress, quieted

FOLDS = 5
TOP = 3  # classes named with their probabilities
TWINS = 3  # copies listed for an image
_CHUNK = 1024


@device.preserve_torch_settings()
def find_label_errors(
    what: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    data: str | Path | None = None,
    folds: int = FOLDS,
    test: bool = False,
    name: str | None = None,
    fresh: bool = False,
    on: str | None = None,
    quiet: bool = False,
) -> LabelReport:
    """Names the images whose labels are probably wrong, the surest first.

    Args:
        what, overrides, data, name, fresh, on, quiet: as in `several.train_many`; `what` may be
            a run, whose recipe is then taken.
        folds: how many models; each image is judged by the one that didn't train on it.
        test: judge the images of the test split as well, by the mean of all models (none trained
            on them); each of these looks is logged in its run.

    Raises:
        DataError: a class of fewer images than folds; what training refuses.
        UsageError: neither a recipe, a data set nor a run.
    """
    texts = asking.as_overrides(overrides) if isinstance(overrides, Mapping) else overrides
    asked = asking.read_or_run(what, data=data, overrides=texts)
    if folds < 2:
        raise UsageError(f"{folds} folds: each image needs a model that didn't train on it",
                         fix="at least --folds 2")  # fmt: skip
    recipe = asked.recipe
    if not recipe.data.validates:  # the folds are its validation
        recipe = recipe.replace(**{"data.val_fraction": DataConfig().val_fraction})
        recipe = recipe.model_copy(update={"name": asked.recipe.name})
    asked = asking.Asked(recipe, asked.plain)
    with quieted(quiet):
        whole = _whole(recipe.data, folds, device.choose(on))
        print_status(
            f"{folds} models of [bold]{name or recipe.name}[/], each without a fold of the images"
        )
        table = several.train_many(
            {None: asked}, folds=folds, name=name, fresh=fresh, test=False, on=on, quiet=quiet
        )
        places = [outcome.place for outcome in table.outcomes]
        report = _report(table.name, recipe, places, folds, test, on)
        folder = _folder(table.name, asked, name)
        return reviewing.written(report, recipe.data, whole, folder)


def _folder(called: str, asked: asking.Asked, name: str | None) -> Path:
    """As for runs: a recipe that isn't as published gets six digits of its hash."""
    plain = asked.plain or name is not None
    digest = asked.recipe.digest()
    return run.PLOTS / (f"labels-{called}" if plain else f"labels-{called}-{digest[:6]}")


def _whole(config: DataConfig, folds: int, where: str) -> Data:
    """The data as the first fold has it, with every class large enough for the folds.

    Raises:
        DataError: a class has fewer images than there are folds.
    """
    first = config.model_copy(update={"folds": folds, "fold": 0, "per_class": None})
    with quieted():
        data = load(first, memory_budget=device.memory_budget(where))
    every = np.concatenate([part.labels.numpy() for part in (data.train, data.val)])
    counts = np.bincount(every, minlength=len(data.classes))
    small = [(name, int(n)) for name, n in zip(data.classes, counts, strict=True) if n < folds]
    if small:
        listed = ", ".join(f"{name} ({n})" for name, n in small[:5])
        least = min(n for _, n in small)
        smaller = f"--folds {least}, or " if least > 1 else ""
        raise DataError(
            f"{len(small)} of {len(data.classes)} classes have fewer images outside the test split "
            f"than the {folds} folds: {listed}{' ...' if len(small) > 5 else ''}",
            where=data.name,
            fix=f"{smaller}add images to these classes or leave them out",
        )
    return data


Trained = tuple[RunFolder, Loaded]


@dataclass
class _Judged:
    """Images with what models say of them that didn't train on them."""

    ids: list[str]
    split: str
    labels: npt.NDArray[np.int64]
    chances: npt.NDArray[np.float64]
    facts: looking.Facts


def _report(
    called: str, recipe: Recipe, places: list[RunFolder], folds: int, test: bool, on: str | None
) -> LabelReport:
    models = [(place, run.load_model(place.model_path)) for place in places]
    classes = models[0][1].classes
    found = [_out_of_fold(models, on)]
    if test:
        for place in places:  # this logs the look in each run
            evaluation.evaluate(place, "test", on=on, quiet=True)
        print_status("test set used (logged in the run of each fold)")
        found.append(_by_all(models, on))
    verdicts = [confident.judge(each.labels, each.chances) for each in found]
    ids = [identity for each in found for identity in each.ids]
    labels, chances = (
        np.concatenate([getattr(each, key) for each in found]) for key in ("labels", "chances")
    )
    suspected, scores = (
        np.concatenate([getattr(verdict, key) for verdict in verdicts])
        for key in ("suspected", "scores")
    )
    order = np.lexsort((scores, ~suspected))
    splits = [each.split for each in found for _ in each.ids]
    named = order[: int(suspected.sum())].tolist()
    twins, disputed = _twins(np.concatenate([each.facts for each in found]), labels, suspected)
    joint = np.sum([verdict.joint for verdict in verdicts], axis=0)
    return LabelReport(
        name=called,
        data=recipe.data.name,
        classes=classes,
        folds=folds,
        runs=[place.name for place in places],
        rule=confident.FILTER,
        accuracy=float((chances.argmax(1) == labels).mean()),
        noise=float(1 - np.trace(joint) / joint.sum()),
        suspects=[
            Suspect(
                ids[i], splits[i], classes[labels[i]], classes[chances[i].argmax()],
                float(scores[i]),
                [(classes[c], float(chances[i, c])) for c in (-chances[i]).argsort()[:TOP]],
                [Twin(ids[j], classes[labels[j]], exact) for j, exact in twins.get(i, [])[:TWINS]],
            )
            for i in named
        ],
        pairs=_pairs(joint, classes),
        disputed=disputed,
        tested=test,
        ids=ids,
        splits=splits,
        labels=labels,
        chances=chances,
        scores=scores,
        order=order,
    )  # fmt: skip


def _out_of_fold(models: Sequence[Trained], on: str | None) -> _Judged:
    """Every image outside the test split by the model whose fold it is in."""
    parts = []
    for place, model in models:
        part = evaluation.judged_by(model, "val", on=device.choose(on)).part
        parts.append(_judged(part, "val", [(place, model)], on))
    return _Judged(
        [identity for part in parts for identity in part.ids],
        "train",
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.chances for part in parts]),
        np.concatenate([part.facts for part in parts]),
    )


def _by_all(models: Sequence[Trained], on: str | None) -> _Judged:
    """The test split by the mean over all models' probabilities."""
    part = evaluation.judged_by(models[0][1], "test", on=device.choose(on)).part
    return _judged(part, "test", models, on)


def _judged(part: Split, split: str, models: Sequence[Trained], on: str | None) -> _Judged:
    chances = [probabilities(_logits(part, split, *each, on)) for each in models]
    facts = np.zeros(len(part), looking.FACTS)
    with progress("looking for copies", len(part)) as bar:
        for index in torch.arange(len(part)).split(_CHUNK):
            facts[index.numpy()] = looking.facts_of(part.rows.gather(index).numpy())
            bar.advance(len(index))
    mean = np.mean(chances, axis=0)
    return _Judged(list(part.ids), split, part.labels.numpy(), mean, facts)


def _logits(
    part: Split, split: str, place: RunFolder, model: Loaded, on: str | None
) -> torch.Tensor:
    """What the model says to the split: as it was kept when the split was evaluated, or anew."""
    card = model.card
    said = answers.kept(place, split, card["data"]["fingerprint"], card["sha256"])
    if said is not None:
        return torch.from_numpy(said.logits)
    plan = placed(model.model, on)
    normalise = model.preprocessing.normalise
    return split_logits(model.model, part, normalise, plan, free=model.free)[0]


def _twins(
    facts: looking.Facts, labels: npt.NDArray[np.int64], suspected: npt.NDArray[np.bool_]
) -> tuple[dict[int, list[tuple[int, bool]]], int]:
    """Copies under another label of each suspect, exact ones first, and what nobody suspects.

    Copies are told by the pixels that the network sees: files of other sizes or formats count.
    """
    twins: dict[int, list[tuple[int, bool]]] = {}
    disputed = 0
    for group in similar.repeated(facts["digest"]):
        torn = len(set(labels[group].tolist())) > 1
        disputed += torn and not suspected[group].any()
        for i in group if torn else ():
            if suspected[i]:
                others = (j for j in group if labels[j] != labels[i])
                twins[i] = [(j, True) for j in itertools.islice(others, TWINS)]
    for pair in similar.near_duplicates(facts["thumb"], facts["digest"])[0].tolist():
        if labels[pair[0]] == labels[pair[1]]:
            continue
        disputed += not suspected[pair].any()
        for i, j in (pair, reversed(pair)):
            if suspected[i]:
                twins.setdefault(i, []).append((j, False))
    return twins, disputed


def _pairs(joint: npt.NDArray[np.float64], classes: Sequence[str]) -> list[Pair]:
    """Off the diagonal, what rounds to at least one image, the largest first."""
    counts = joint.round().astype(int)
    np.fill_diagonal(counts, 0)
    where = sorted(np.argwhere(counts > 0).tolist(), key=lambda at: -counts[tuple(at)])
    return [Pair(classes[a], classes[b], int(counts[a, b])) for a, b in where]
