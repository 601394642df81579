"""What a page is made of: everything that a run folder knows, and what it doesn't."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convlens import device, evaluation, metrics, run, serialization
from convlens.data.audit import Audit, audit as look_at
from convlens.data.dataset import Split
from convlens.errors import ConvlensError, ModelFileError, UsageError
from convlens.evaluation import CachedPredictions
from convlens.recipe import Recipe
from convlens.run import LoadedModel, RunDir
from convlens.utils.console import print_status

QUICK_AUDIT_IMAGES = 5000  # images: so many are audited without being asked to

MetricsRow = dict[str, float]


@dataclass
class ReportContents:
    """All that the sections of a page draw from; what isn't there is None or empty.

    `split` is the split that the page judges by: `test` if it was looked at before, else `val`;
    `summary` its numbers as in `metrics.summarise`, `answers` what was said to each image and
    `images` the images themselves. `missing` are sentences about what couldn't be had.
    """

    run_dir: RunDir
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[MetricsRow] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)
    loaded: LoadedModel | None = None
    recipe: Recipe | None = None
    split: str = "val"
    summary: dict[str, Any] | None = None
    answers: CachedPredictions | None = None
    images: Split | None = None
    audit: Audit | None = None
    device: str | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def classes(self) -> tuple[str, ...]:
        if self.loaded is not None:
            return self.loaded.classes
        return tuple(self.facts.get("data", {}).get("classes", ()))

    @property
    def model_metadata(self) -> Mapping[str, Any]:
        """What the model file says about itself."""
        return {} if self.loaded is None else self.loaded.model_metadata

    @property
    def finished(self) -> bool:
        return bool(self.facts.get("status", "finished") == "finished")

    @property
    def kept_epoch(self) -> int | None:
        """The epoch whose weights these are."""
        kept = self.facts.get("kept_epoch")
        return None if kept is None else int(kept)

    def trained_accuracy(self) -> tuple[float, str] | None:
        """Accuracy on the training images, and how it was measured."""
        sha = self.model_metadata.get("sha256")
        for look in reversed(self.looks):
            if look["split"] == "train" and look.get("own") and look["model_sha256"] == sha:
                return float(look["accuracy"]), "measured on all training images"
        kept = self.kept_epoch if self.kept_epoch is not None else len(self.rows)
        for row in self.rows:
            if row["epoch"] == kept and math.isfinite(row["train_accuracy"]):
                augmented = self.recipe is not None and self.recipe.augment
                on = "augmented images while it learned" if augmented else "images as it learned"
                return row["train_accuracy"], f"measured on {on}"
        return None


def gather_contents(
    name: str, *, audit: bool | None, on: str | None, alone: bool = True
) -> ReportContents:
    """Everything about a run that its page shows.

    The test split is touched only if it was looked at before with these very weights; then the
    model is tested once more if its answers to the single images were not kept, which is logged
    like each look. A run whose test split is sealed is judged by its validation split.

    Args:
        audit: whether to look at every image of the data set; by default if there are few.
        alone: whether single images are shown, and the audit; not beside other runs.

    Raises:
        UsageError, ModelFileError: no such run, or files of it that can't be trusted.
    """
    device.select_device(on)  # a device that isn't there is an error, not a gap in the page
    run_dir = run.find_run(name)
    found = ReportContents(
        run_dir, run_dir.metadata(), run_dir.metrics(), run_dir.evaluations(), device=on
    )
    if not run_dir.model_path.exists():
        found.missing.append("The run has no weights yet: they are written with its first epoch.")
        found.recipe = _recipe_file(run_dir)
        return found
    found.loaded = run.load_model(run_dir.model_path)
    found.recipe = serialization.recipe_from_metadata(found.model_metadata)
    if not found.finished:
        found.missing.append(
            "The training has not finished: these are its curves so far, and nothing was judged."
        )
        return found
    _evaluate_val(found, on)
    if alone:
        _open_data(found, on, audit)
    return found


def _recipe_file(run_dir: RunDir) -> Recipe | None:
    path = run_dir.path / "recipe.yaml"
    try:
        return run_dir.recipe() if path.exists() else None
    except (UsageError, ModelFileError):  # the model file has it, too
        return None


def _evaluate_val(found: ReportContents, on: str | None) -> None:
    """The numbers of the split, from the answers that were kept or from testing once more."""
    sha = found.model_metadata["sha256"]
    own = [look for look in found.looks if look.get("own") and look["model_sha256"] == sha]
    found.split = "test" if any(look["split"] == "test" for look in own) else "val"
    look = next((look for look in reversed(own) if look["split"] == found.split), None)
    fingerprint = found.model_metadata["data"]["fingerprint"]
    said = evaluation.load_predictions(found.run_dir, found.split, fingerprint, sha)
    if said is None:
        try:
            evaluation.evaluate(found.run_dir, found.split, device=on, quiet=False)
            said = evaluation.load_predictions(found.run_dir, found.split, fingerprint, sha)
            found.looks = found.run_dir.evaluations()
        except ConvlensError as error:
            found.missing.append(_error_sentence(error))
    if said is not None:
        found.answers = said
        found.summary = metrics.summarize(said.logits, said.labels, list(found.classes))
    elif look is not None:
        found.summary = {key: look.get(key) for key in SUMMARY_KEYS}
        found.missing.append(
            f"The numbers are of the last look at the {found.split} split; what was said to "
            "single images was not kept."
        )


SUMMARY_KEYS = (
    "n",
    "correct",
    "accuracy",
    "interval95",
    "loss",
    "top5",
    "ece",
    "per_class",
    "confusion",
)


def _open_data(found: ReportContents, on: str | None, audit: bool | None) -> None:
    """The images of the split, and the audit of the data set."""
    assert found.loaded is not None
    assert found.recipe is not None
    where = device.select_device(on)
    try:
        if found.answers is not None:
            found.images = evaluation.load_eval_split(found.loaded, found.split, device=where)[0]
        if audit is None:
            data = evaluation.load_own_data(found.loaded, where)
            judged = 0 if found.summary is None else int(found.summary["n"])
            audit = len(data.train) + len(data.val) + judged <= QUICK_AUDIT_IMAGES
        if audit:
            found.audit = look_at(found.recipe.data)
    except ConvlensError as error:
        found.missing.append(_error_sentence(error))
        print_status("[yellow]the images can't be had: the page is made without them[/]")
    found.missing = list(dict.fromkeys(found.missing))


def _error_sentence(error: ConvlensError) -> str:
    """What an error says, without the path of the machine that it says it on."""
    return f"{error.what[:1].upper()}{error.what[1:]}."
