"""Label errors in a data set, found by models that did not train on the images they judge.

K models of a recipe, each without one of K folds (`several.train_many`, so they are runs like any
other), give every image probabilities from a model that never saw its label. Confident learning
(`confident`) says which labels these speak against. Suspected is not proven: `reviewing` draws
the sheet and writes the CSV by which a person decides.

The weights of a fold's epoch are chosen by that fold (unless the recipe keeps the last ones): one
choice among some dozens of epochs, far too little to learn an image's label by.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convlens import evaluation, run
from convlens.data import audit, duplicates
from convlens.data.dataset import Data, Split, load_data
from convlens.data.decode import UnreadableImage, decode, fit_arrays
from convlens.data.image_folder import escape_csv_formula
from convlens.data.sources import find_source
from convlens.data.types import DataSource, EncodedFiles, FilePaths, Part
from convlens.device import memory_budget, preserve_torch_settings, select_device
from convlens.engine.inference import place_model, probabilities, split_logits
from convlens.errors import DataError, UsageError
from convlens.recipe import DataConfig, Recipe
from convlens.run import LoadedModel, RunDir
from convlens.training import resolve
from convlens.training.repeats import train_many
from convlens.utils import files
from convlens.utils.console import print_status, progress_bar, quiet_mode

DEFAULT_FOLDS = 5
MAX_SUSPECTS = 3  # classes named with their probabilities
MIN_TWIN_CORRELATION = 3  # copies listed for an image
_CHUNK = 1024


@preserve_torch_settings()
def find_label_errors(
    what: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    data: str | Path | None = None,
    folds: int = DEFAULT_FOLDS,
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
    texts = resolve.to_overrides(overrides) if isinstance(overrides, Mapping) else overrides
    asked = resolve.resolve_recipe_or_run(what, data=data, overrides=texts)
    if folds < 2:
        raise UsageError(
            f"{folds} folds: each image needs a model that didn't train on it",
            fix="at least --folds 2",
        )
    recipe = asked.recipe
    if not recipe.data.validates:  # the folds are its validation
        recipe = recipe.replace(**{"data.val_fraction": DataConfig().val_fraction})
        recipe = recipe.model_copy(update={"name": asked.recipe.name})
    asked = resolve.ResolvedRecipe(recipe, asked.is_unmodified)
    with quiet_mode(quiet):
        whole = _whole(recipe.data, folds, select_device(on))
        print_status(
            f"{folds} models of [bold]{name or recipe.name}[/], each without a fold of the images"
        )
        table = train_many(
            {None: asked}, folds=folds, name=name, fresh=fresh, test=False, device=on, quiet=quiet
        )
        run_dirs = [outcome.run_dir for outcome in table.outcomes]
        report = _report(table.name, recipe, run_dirs, folds, test, on)
        folder = _folder(table.name, asked, name)
        return write_review(report, recipe.data, whole, folder)


def _folder(run_name: str, asked: resolve.ResolvedRecipe, name: str | None) -> Path:
    """As for runs: a recipe that isn't as published gets six digits of its hash."""
    plain = asked.is_unmodified or name is not None
    digest = asked.recipe.digest()
    return run.PLOTS_DIR / (f"labels-{run_name}" if plain else f"labels-{run_name}-{digest[:6]}")


def _whole(config: DataConfig, folds: int, where: str) -> Data:
    """The data as the first fold has it, with every class large enough for the folds.

    Raises:
        DataError: a class has fewer images than there are folds.
    """
    first = config.model_copy(update={"folds": folds, "fold": 0, "per_class": None})
    with quiet_mode():
        data = load_data(first, memory_budget=memory_budget(where))
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


FoldModels = tuple[RunDir, LoadedModel]


@dataclass
class _JudgedImages:
    """Images with what models say of them that didn't train on them."""

    ids: list[str]
    split: str
    labels: npt.NDArray[np.int64]
    probs: npt.NDArray[np.float64]
    facts: audit.FileFacts


def _report(
    run_name: str, recipe: Recipe, run_dirs: list[RunDir], folds: int, test: bool, on: str | None
) -> LabelReport:
    models = [(run_dir, run.load_model(run_dir.model_path)) for run_dir in run_dirs]
    classes = models[0][1].classes
    found = [_out_of_fold(models, on)]
    if test:
        for run_dir in run_dirs:  # this logs the look in each run
            evaluation.evaluate(run_dir, "test", on=on, quiet=True)
        print_status("test set used (logged in the run of each fold)")
        found.append(_predict_by_all(models, on))
    verdicts = [find_issues(each.labels, each.probs) for each in found]
    ids = [identity for each in found for identity in each.ids]
    labels, probs = (
        np.concatenate([getattr(each, key) for each in found]) for key in ("labels", "probs")
    )
    suspected, scores = (
        np.concatenate([getattr(verdict, key) for verdict in verdicts])
        for key in ("suspected", "scores")
    )
    order = np.lexsort((scores, ~suspected))
    splits = [each.split for each in found for _ in each.ids]
    named = order[: int(suspected.sum())].tolist()
    twins, disputed = _find_twins(np.concatenate([each.facts for each in found]), labels, suspected)
    joint = np.sum([verdict.joint for verdict in verdicts], axis=0)
    return LabelReport(
        name=run_name,
        data=recipe.data.name,
        classes=classes,
        folds=folds,
        runs=[run_dir.name for run_dir in run_dirs],
        rule=FILTER_METHOD,
        accuracy=float((probs.argmax(1) == labels).mean()),
        noise=float(1 - np.trace(joint) / joint.sum()),
        suspects=[
            Suspect(
                ids[i],
                splits[i],
                classes[labels[i]],
                classes[probs[i].argmax()],
                float(scores[i]),
                [(classes[c], float(probs[i, c])) for c in (-probs[i]).argsort()[:MAX_SUSPECTS]],
                [
                    Twin(ids[j], classes[labels[j]], exact)
                    for j, exact in twins.get(i, [])[:MIN_TWIN_CORRELATION]
                ],
            )
            for i in named
        ],
        pairs=_confused_label_pairs(joint, classes),
        disputed=disputed,
        tested=test,
        ids=ids,
        splits=splits,
        labels=labels,
        probs=probs,
        scores=scores,
        order=order,
    )


def _out_of_fold(models: Sequence[FoldModels], on: str | None) -> _JudgedImages:
    """Every image outside the test split by the model whose fold it is in."""
    parts = []
    for run_dir, model in models:
        part = evaluation.load_eval_split(model, "val", on=select_device(on)).part
        parts.append(_predict_images(part, "val", [(run_dir, model)], on))
    return _JudgedImages(
        [identity for part in parts for identity in part.ids],
        "train",
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.probs for part in parts]),
        np.concatenate([part.facts for part in parts]),
    )


def _predict_by_all(models: Sequence[FoldModels], on: str | None) -> _JudgedImages:
    """The test split by the mean over all models' probabilities."""
    part = evaluation.load_eval_split(models[0][1], "test", on=select_device(on)).part
    return _predict_images(part, "test", models, on)


def _predict_images(
    part: Split, split: str, models: Sequence[FoldModels], on: str | None
) -> _JudgedImages:
    probs = [probabilities(_logits(part, split, *each, on)) for each in models]
    facts = np.zeros(len(part), audit.FILE_FACTS)
    with progress_bar("looking for copies", len(part)) as bar:
        for index in torch.arange(len(part)).split(_CHUNK):
            facts[index.numpy()] = audit.facts_of(part.rows.gather(index).numpy())
            bar.advance(len(index))
    mean = np.mean(probs, axis=0)
    return _JudgedImages(list(part.ids), split, part.labels.numpy(), mean, facts)


def _logits(
    part: Split, split: str, run_dir: RunDir, model: LoadedModel, on: str | None
) -> torch.Tensor:
    """What the model says to the split: as it was kept when the split was evaluated, or anew."""
    model_metadata = model.model_metadata
    said = evaluation.load_predictions(
        run_dir, split, model_metadata["data"]["fingerprint"], model_metadata["sha256"]
    )
    if said is not None:
        return torch.from_numpy(said.logits)
    plan = place_model(model.model, on)
    normalize = model.preprocessing.normalize
    return split_logits(
        model.model, part, normalize, plan, choose_memory_format=model.can_choose_memory_format
    )[0]


def _find_twins(
    facts: audit.FileFacts, labels: npt.NDArray[np.int64], suspected: npt.NDArray[np.bool_]
) -> tuple[dict[int, list[tuple[int, bool]]], int]:
    """Copies under another label of each suspect, exact ones first, and what nobody suspects.

    Copies are told by the pixels that the network sees: files of other sizes or formats count.
    """
    twins: dict[int, list[tuple[int, bool]]] = {}
    disputed = 0
    for group in duplicates.exact_duplicates(facts["digest"]):
        torn = len(set(labels[group].tolist())) > 1
        disputed += torn and not suspected[group].any()
        for i in group if torn else ():
            if suspected[i]:
                others = (j for j in group if labels[j] != labels[i])
                twins[i] = [(j, True) for j in itertools.islice(others, MIN_TWIN_CORRELATION)]
    for pair in duplicates.near_duplicates(facts["thumb"], facts["digest"])[0].tolist():
        if labels[pair[0]] == labels[pair[1]]:
            continue
        disputed += not suspected[pair].any()
        for i, j in (pair, reversed(pair)):
            if suspected[i]:
                twins.setdefault(i, []).append((j, False))
    return twins, disputed


def _confused_label_pairs(joint: npt.NDArray[np.float64], classes: Sequence[str]) -> list[Pair]:
    """Off the diagonal, what rounds to at least one image, the largest first."""
    counts = joint.round().astype(int)
    np.fill_diagonal(counts, 0)
    where = sorted(np.argwhere(counts > 0).tolist(), key=lambda at: -counts[tuple(at)])
    return [Pair(classes[a], classes[b], int(counts[a, b])) for a, b in where]


# ---- suspects ----------------------------------------
# Suspected label errors: what `find_label_errors` returns.


@dataclass(frozen=True)
class Twin:
    """A copy of an image under another label; not `exact` means that it looks the same."""

    id: str
    label: str
    exact: bool


@dataclass(frozen=True)
class Suspect:
    """An image whose label is probably wrong.

    `score` is the probability of the given label, `top` are the likeliest classes with theirs.
    `split` is the one that the image is in.
    """

    id: str
    split: str
    label: str
    suggested: str
    score: float
    top: list[tuple[str, float]]
    twins: list[Twin]


@dataclass(frozen=True)
class Pair:
    """An estimated number of images labelled `label` that belong to `likely`."""

    label: str
    likely: str
    images: int


@dataclass(frozen=True)
class LabelReport:
    """What `find_label_errors` returns; `to_dict` is what `--json` prints.

    Of all N images that were judged: `ids`, `splits`, `labels` int64 `[N]`, `probs` float64
    `[N, K]` and `scores` `[N]`; `order` ranks them, all suspects first. `accuracy` is how often
    the models agree with the given labels, `noise` the estimated share of wrong ones, `disputed`
    the number of pairs of copies under two labels of which neither is suspected.
    """

    name: str
    data: str
    classes: tuple[str, ...]
    folds: int
    runs: list[str]
    rule: str
    accuracy: float
    noise: float
    suspects: list[Suspect]
    pairs: list[Pair]
    disputed: int
    tested: bool
    ids: list[str] = field(repr=False)
    splits: list[str] = field(repr=False)
    labels: npt.NDArray[np.int64] = field(repr=False)
    probs: npt.NDArray[np.float64] = field(repr=False)
    scores: npt.NDArray[np.float64] = field(repr=False)
    order: npt.NDArray[np.int64] = field(repr=False)
    sheets: list[Path] = field(default_factory=list)
    table: Path | None = None
    trainable: bool = False  # whether `table` can be trained on: the images are files

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the images that are not suspected, their number."""
        arrays = ("ids", "splits", "labels", "probs", "scores", "order")
        content = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in arrays}
        content |= {
            "classes": list(self.classes),
            "images": len(self.ids),
            "suspects": [asdict(suspect) for suspect in self.suspects],
            "pairs": [asdict(pair) for pair in self.pairs],
            "sheets": [str(path) for path in self.sheets],
            "table": None if self.table is None else str(self.table),
        }
        return content


# ---- confident ----------------------------------------
# Confident learning: which labels out-of-sample probabilities speak against. Arrays in and out.
#
# Northcutt, Jiang & Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels"
# (JAIR 70, arXiv:1911.00068), as cleanlab computes it. cleanlab takes seconds to import, so it is
# imported by the functions that use it.

LabelArray = npt.NDArray[np.int64]  # [N]
Probs = npt.NDArray[np.float64]  # [N, K], rows add up to 1

# cleanlab's default. Over planted errors on digits and MNIST (`benchmarks/labels.py`) its mean F1
# is the highest, 0.90; `both` and `prune_by_class` reach 0.89, `confident_learning` 0.86 (it names
# fewer, nearly all of them wrong), every disagreement 0.81.
FILTER_METHOD = "prune_by_noise_rate"


@dataclass(frozen=True)
class LabelIssues:
    """What the probabilities say of N labels.

    `suspected` says which are probably wrong. `scores` rank all, the lowest first: the probability
    of the given label, which ranks planted errors as well as its margin over the best other class
    where models are good, and better where they aren't. `joint[a, b]` estimates how many images
    are labelled a and belong to b; rows add up to the number of images labelled so.
    """

    suspected: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64]
    suggested: LabelArray
    joint: npt.NDArray[np.float64]


def find_issues(labels: LabelArray, probs: Probs, *, rule: str = FILTER_METHOD) -> LabelIssues:
    """Weighs given labels against probabilities of models that did not train on these images.

    Args:
        labels: the given ones, int64 `[N]`.
        probs: `[N, K]`, rows adding up to 1.
        rule: cleanlab's `filter_by`.
    """
    from cleanlab.count import compute_confident_joint
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_self_confidence_for_each_label

    joint = np.asarray(compute_confident_joint(labels, probs, calibrate=True), np.float64)
    with warnings.catch_warnings():
        # A class without images (a test split may lack one) has no labels to be judged, either.
        warnings.filterwarnings("ignore", "May not flag all label issues in class")
        # One process: by default every core gets one, and so a copy of everything.
        suspected = find_label_issues(labels, probs, filter_by=rule, n_jobs=1)
    suggested = probs.argmax(1).astype(np.int64)
    return LabelIssues(
        # Rules that go by counts can name an image whose own class is the likeliest.
        suspected=np.asarray(suspected, np.bool_) & (suggested != labels),
        scores=np.asarray(get_self_confidence_for_each_label(labels, probs), np.float64),
        suggested=suggested,
        joint=joint,
    )


# ---- reviewing ----------------------------------------
# What a person reviews suspected labels by: a ranked sheet of pictures, and a CSV to correct.
#
# The CSV lists all images of the set with `path`, `label` and `split`, the suspected ones first:
# correct `label`, and `convlens train` takes the file as it is. Images that were held out for testing
# stay so by their `split`.

IMAGES_PER_SHEET = 48  # pictures on a page of the sheet
MAX_SHEETS = 10  # at most; the CSV has all
THUMBNAIL_SIDE = 120


def write_review(report: LabelReport, config: DataConfig, data: Data, folder: Path) -> LabelReport:
    """Writes sheet and CSV into `folder`; the report with their paths.

    An older CSV in the folder, which somebody may have corrected, stays: the new one is then
    called `labels-2.csv`, and so on.

    Args:
        config: where the images come from.
        data: the set with what was held out for testing, and what can't be read.
    """
    size = None if config.image_size == "auto" else int(config.image_size)
    source = find_source(config.name, count=config.count, image_size=size, group=config.group)
    trainable = isinstance(source.parts["train"].images, FilePaths)
    text = _table(report, source, config.group, data)
    path = _unused(folder, text)
    files.write_atomic(path, text)
    sheets = _sheets(report, source, data.channels, folder)
    return replace(report, sheets=sheets, table=path, trainable=trainable)


# The CSV


def _table(report: LabelReport, source: DataSource, group: str | None, data: Data) -> str:
    """The suspected images in their order, then the others in the source's."""
    run_dirs = {identity: n for n, identity in enumerate(report.ids)}
    rank = {suspect.id: n for n, suspect in enumerate(report.suspects, 1)}
    held, skipped = set(data.held_out.get("test", ())), set(data.skipped)
    rows, lost = [], 0
    for split, part in source.parts.items():
        for number, identity in enumerate(part.ids):
            if identity in skipped:
                continue
            path = part.images[number] if isinstance(part.images, FilePaths) else None
            if path is not None and not _is_text(path):
                lost += 1
                continue
            row: dict[str, Any] = {"id": identity} if path is None else {"path": path}
            row["label"] = source.classes[part.labels[number]]
            row["split"] = "test" if split == "train" and identity in held else split
            run_dir = run_dirs.get(identity)
            row |= _opinion(report, run_dir, rank.get(identity))
            if group is not None and part.groups is not None:
                row.setdefault(group, part.groups[number])
            rows.append(row)
    if lost:
        print_status(
            f"{lost} files have names that are no text: the CSV lacks them until they are renamed"
        )
    rows.sort(key=lambda row: row["suspect"] or math.inf)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: escape_csv_formula(v) if isinstance(v, str) else v for k, v in row.items()}
        )
    return text.getvalue()


def _opinion(report: LabelReport, run_dir: int | None, rank: int | None) -> dict[str, Any]:
    """The columns beside path, label and split; empty for images that nobody judged."""
    empty = dict.fromkeys(("suspect", "suggested", "score", "p_suggested", "copies"), "")
    if run_dir is None:
        return empty
    probs = report.probs[run_dir]
    best = int(probs.argmax())
    twins = report.suspects[rank - 1].twins if rank else []
    return {
        "suspect": rank or "",
        "suggested": report.classes[best],
        "score": f"{report.scores[run_dir]:.4f}",
        "p_suggested": f"{probs[best]:.4f}",
        "copies": "; ".join(f"{twin.label}: {twin.id}" for twin in twins),
    }


def _is_text(path: str) -> bool:
    """Whether a file name can stand in a UTF-8 file."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unused(folder: Path, text: str) -> Path:
    """`labels.csv`, or the first of its kind that isn't there with other content."""
    number, path = 1, folder / "labels.csv"
    while path.exists() and path.read_bytes() != text.encode():
        number += 1
        path = folder / f"labels-{number}.csv"
    return path


# The sheet


def _sheets(report: LabelReport, source: DataSource, channels: int, folder: Path) -> list[Path]:
    """`review.png`, `review-2.png`, ...: `PAGE` pictures each."""
    from convlens import plots

    for old in folder.glob("review*.png"):
        old.unlink()
    shown = report.suspects[: IMAGES_PER_SHEET * MAX_SHEETS]
    pages = [
        shown[start : start + IMAGES_PER_SHEET] for start in range(0, len(shown), IMAGES_PER_SHEET)
    ]
    paths = []
    for number, page in enumerate(pages, 1):
        title = f"{report.name}: suspected labels, the surest first"
        if len(pages) > 1:
            title += f", page {number} of {len(pages)}"
        title += " (above: given label, below: suggested)"
        figure = plots.label_review(
            _pictures(page, source, channels),
            [suspect.label for suspect in page],
            [suspect.suggested for suspect in page],
            [suspect.top[0][1] for suspect in page],
            title,
            first=(number - 1) * IMAGES_PER_SHEET + 1,
            copied=[bool(suspect.twins) for suspect in page],
        )
        paths.append(folder / ("review.png" if number == 1 else f"review-{number}.png"))
        plots.save_figure(figure, paths[-1])
    return paths


def _pictures(suspects: Sequence[Suspect], source: DataSource, channels: int) -> np.ndarray:
    """uint8 `[n, C, S, S]` from the source itself: a network's small view is hard to judge."""
    wanted = {suspect.id for suspect in suspects}
    at = {
        identity: (part, number)
        for part in source.parts.values()
        for number, identity in enumerate(part.ids)
        if identity in wanted
    }
    return np.stack([_picture(*at[suspect.id], channels) for suspect in suspects])


def _picture(part: Part, number: int, channels: int) -> np.ndarray:
    if isinstance(part.images, EncodedFiles):
        try:
            content, name = part.images.read(number), part.images.name(number)
            return decode(content, size=THUMBNAIL_SIDE, channels=channels, fit="pad", name=name)
        except UnreadableImage:  # gone since it was judged
            return np.full((channels, THUMBNAIL_SIDE, THUMBNAIL_SIDE), 255, np.uint8)
    pixels = part.images[np.array([number])]
    size = min(THUMBNAIL_SIDE, max(pixels.shape[2:]))
    shown: np.ndarray = fit_arrays(pixels, size=size, channels=channels, fit="pad")[0]
    return shown
