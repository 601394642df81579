"""The Python API: the commands as functions, and `Run` as what they work on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convlens import asking, evaluation, prediction, several, training
from convlens import recipe as recipe_module
from convlens import run as run_module
from convlens.comparing import comparison
from convlens.comparing.comparison import Comparison
from convlens.console import quieted
from convlens.diagnosing import diagnosis
from convlens.diagnosing.diagnosis import Diagnosis
from convlens.errors import UsageError
from convlens.evaluation import Evaluation
from convlens.labelling import finding as labelling
from convlens.labelling.suspects import LabelReport
from convlens.prediction import Prediction
from convlens.recipe import Recipe
from convlens.recipe import load as load_recipe
from convlens.reporting import building
from convlens.reporting.building import Report
from convlens.tabling import Summary, Table

if TYPE_CHECKING:
    from convlens.inspection.looking import Look
    from convlens.inspection.measuring import Measurements


class Run:
    """A trained (or half-trained) model with its history: what `train` returns.

    Example:
        >>> run = convlens.train("digits")
        >>> run.evaluate("test").accuracy
        >>> run.predict(["seven.png"])[0].label
    """

    def __init__(self, folder: run_module.RunFolder) -> None:
        self._folder = folder

    @classmethod
    def load(cls, name: str | Path) -> Run:
        """The run of that name under `models/`, in that folder, or of that model file."""
        return cls(run_module.find(name))

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self._folder.facts().get('status', 'a model file')})"

    @property
    def name(self) -> str:
        return self._folder.name

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self._folder.path

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe, which trains the same again."""
        return load_recipe(run_module.load_model(self._folder.model_path).card["recipe"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the model's outputs."""
        return run_module.load_model(self._folder.model_path).classes

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One row an epoch: losses, accuracies, learning rate, seconds."""
        return self._folder.metrics()

    @property
    def results(self) -> list[dict[str, Any]]:
        """Every look at a split so far, oldest first."""
        return self._folder.results()

    def evaluate(
        self,
        split: str = "test",
        *,
        data: str | Path | None = None,
        tta: str | None = None,
        device: str | None = None,
        quiet: bool = True,
    ) -> Evaluation:
        """Accuracy with its interval, and everything else, on a split or another data set.

        With `tta` (`flip`, `flip+shifts`) `Evaluation.tta` has the numbers of test-time
        augmentation; the others stay plain.
        """
        return evaluation.evaluate(self._folder, split, data=data, tta=tta, on=device, quiet=quiet)

    def predict(
        self,
        inputs: str | Path | Iterable[str | Path] | np.ndarray,
        *,
        top_k: int = 1,
        tta: str | None = None,
        device: str | None = None,
        quiet: bool = True,
    ) -> list[Prediction]:
        """A `Prediction` for each image: files, folders and globs, or an array of images.

        With `tta` (`flip`, `flip+shifts`) each has `tta_label` and `tta_prob` beside the plain.
        """
        loaded = run_module.load_model(self._folder.model_path)
        if isinstance(inputs, str | Path):
            inputs = [inputs]
        images = inputs if isinstance(inputs, np.ndarray) else prediction.expand(inputs)
        answers = prediction.predict(loaded, images, top_k=top_k, tta=tta, on=device, quiet=quiet)
        return list(answers)


def train(
    what: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    data: str | Path | None = None,
    name: str | None = None,
    fresh: bool = False,
    test: bool = True,
    device: str | None = None,
    quiet: bool = False,
) -> Run:
    """Trains a recipe, or the default recipe on a data set, and tests it once at the end.

    Args:
        what: a recipe's name, a YAML file, a `Recipe` or mapping, or a data set: a built-in
            name, a folder of class folders, a CSV.
        overrides: dotted keys, `{"optim.lr": 0.1}` or `["optim.lr=0.1"]`.
        data: trains the recipe on this data set instead of its own.
        name, fresh, test, device, quiet: as on the command line.

    Raises:
        ConvlensError: with what, where and what to do.
    """
    asked = asking.read(what, data=data, overrides=_texts(overrides))
    place = training.train(
        asked.recipe,
        name=name,
        plain=asked.plain,
        fresh=fresh,
        test=test,
        on=device,
        quiet=quiet,
    )
    return Run(place)


class RunTable:
    """Several runs side by side: what `train_many` returns.

    Example:
        >>> table = convlens.train_many("digits", seeds=5)
        >>> table.summaries[0].mean, table.summaries[0].sd
    """

    def __init__(self, table: Table) -> None:
        self._table = table

    def __repr__(self) -> str:
        return f"RunTable({self._table.name!r}, {len(self._table.outcomes)} runs)"

    @property
    def runs(self) -> list[Run]:
        """Every run that was measured, in the order of settings, splits, seeds and folds."""
        return [Run(outcome.place) for outcome in self._table.outcomes]

    @property
    def summaries(self) -> list[Summary]:
        """What each setting reached: `setting`, `accuracies`, `mean`, `sd`, `interval95`, ..."""
        return self._table.summaries

    @property
    def plot(self) -> Path:
        """The picture of their curves."""
        return self._table.plot

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `convlens train --json` prints."""
        return self._table.to_dict()


def train_many(
    what: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    settings: str | Sequence[str] | None = None,
    splits: int = 1,
    seeds: int = 1,
    folds: int | None = None,
    refit: bool = False,
    data: str | Path | None = None,
    name: str | None = None,
    fresh: bool = False,
    test: bool = True,
    device: str | None = None,
    quiet: bool = False,
) -> RunTable:
    """Trains a recipe several times and puts the runs side by side.

    Args:
        what, overrides, data, name, fresh, test, device, quiet: as in `train`.
        settings: `"all"` of the recipe's settings, or some by name; overrides lie over each.
        splits: so many splits of the data, from `data.seed` on.
        seeds: so many seeds of everything else, from `train.seed` on.
        folds: K-fold cross-validation; the test split stays sealed.
        refit: finds the number of epochs by validation, then trains on training and validation
            images together for that many, and tests that run.

    Raises:
        ConvlensError: with what, where and what to do.
    """
    asked = asking.read_settings(what, settings, data=data, overrides=_texts(overrides))
    table = several.train_many(
        asked,
        splits=splits,
        seeds=seeds,
        folds=folds,
        refit=refit,
        name=name,
        fresh=fresh,
        test=test,
        on=device,
        quiet=quiet,
    )
    return RunTable(table)


def _texts(overrides: Mapping[str, Any] | Sequence[str]) -> Sequence[str]:
    return asking.as_overrides(overrides) if isinstance(overrides, Mapping) else overrides


def evaluate(run: str | Path | Run, split: str = "test", **options: Any) -> Evaluation:
    """`Run.evaluate` of a run given by name, folder or model file."""
    return (run if isinstance(run, Run) else Run.load(run)).evaluate(split, **options)


def compare(
    *runs: str | Path | Run,
    split: str = "test",
    data: str | Path | None = None,
    force: bool = False,
    device: str | None = None,
    quiet: bool = True,
) -> Comparison:
    """Puts runs side by side, and says which can be told apart from the first.

    Example:
        >>> result = convlens.compare("resnet18", "resnet18-noaug")
        >>> result.verdicts[0].sentence

    Args:
        runs: at least two; those that differ only in their seeds are taken together.
        split, data, force, device: as on the command line.
    """
    names = [run._folder if isinstance(run, Run) else run for run in runs]
    return comparison.compare(names, split, data=data, force=force, on=device, quiet=quiet)


def doctor(run: str | Path | Run, *, device: str | None = None, quiet: bool = True) -> Diagnosis:
    """Says what is going on in a run, with the evidence and what to do about it.

    Example:
        >>> [(finding.rule, finding.overrides) for finding in convlens.doctor("mnist").findings]
    """
    folder = run._folder if isinstance(run, Run) else run_module.find(run)
    return diagnosis.diagnose(folder, on=device, quiet=quiet)


def predict(
    run: str | Path | Run, inputs: str | Path | Iterable[str | Path] | np.ndarray, **options: Any
) -> list[Prediction]:
    """`Run.predict` of a run given by name, folder or model file."""
    return (run if isinstance(run, Run) else Run.load(run)).predict(inputs, **options)


def look(
    runs: str | Path | Run | Sequence[str | Path | Run],
    images: str | Path | Sequence[str | Path] = (),
    *,
    device: str | None = None,
    quiet: bool = True,
    **options: Any,
) -> Look:
    """Draws what the layers of networks make of images, all networks side by side.

    Args:
        runs: one or several: runs (name, folder, model file or `Run`), or networks of torchvision
            or timm (`NAME[:WEIGHTS]`).
        images: files, folders, globs, `test:17`, `worst:5`, `class:cat:3`; without any, a few
            test images, unless only filters and the like are asked for.
        options: as in `inspection.looking.Options`, and on the command line: `layers`, `order`,
            `channels`, `filters`, `top_images`, `dream`, `split`, `data`, `format`, `seed`.

    Raises:
        ConvlensError: with what, where and what to do.

    Example:
        >>> seen = convlens.look(["resnet18", "resnet18-tiny"], ["cat.png", "worst:3"])
        >>> seen.files, seen.seen[0][1].maps["layer1.0"].shape
    """
    from convlens.inspection import choosing, looking

    listed = ("layers", "filters", "top_images", "dream")
    options |= {k: _several(options[k]) for k in listed if k in options}
    try:
        asked = looking.Options(**options)
    except TypeError as error:
        known = ", ".join(looking.Options.__dataclass_fields__)
        raise UsageError(f"look: {error}", fix=f"its options are {known}") from error
    asked.check()
    texts = [str(each.path if isinstance(each, Run) else each) for each in _several(runs)]
    with quieted(quiet):
        opened = choosing.open_all(
            [*texts, *map(str, _several(images))],
            on=device,
            examples=bool(asked.layers) or not asked.only,
        )
        return looking.look(opened, asked)


def _several(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | Path | Run) else list(value)


def report(
    *runs: str | Path | Run,
    output: str | Path | None = None,
    audit: bool | None = None,
    device: str | None = None,
    quiet: bool = True,
) -> Report:
    """Writes one HTML page about a run, or one that compares several; `Report.path` is where.

    Args:
        output: the file; by default below `plots/`.
        audit: whether to look at every image of the data set; by default where they are few.
    """
    names = [str(run.path if isinstance(run, Run) else run) for run in runs]
    return building.report(names, output=output, audit=audit, on=device, quiet=quiet)


def measure(
    runs: str | Path | Run | Sequence[str | Path | Run],
    measures: str | Sequence[str] = (),
    *,
    folder: str | Path | None = None,
    device: str | None = None,
    quiet: bool = True,
    **options: Any,
) -> Measurements:
    """Measures every stage of one or several networks over images, and draws one figure.

    Args:
        runs: a run or several, by name, folder or model file; or networks of torchvision or timm.
        measures: some of `convlens.inspection.measuring.NAMES`; all by default.
        folder: of the figures; `plots/RUN/look`, of several `plots/look-RUN-RUN`, by default.
        options: `split`, `data`, `layers`, `images`, `learn_from`, `untrained`, `seed`, as in
            `convlens.inspection.measuring.measure`.

    Example:
        >>> found = convlens.measure(["resnet18", "resnet18-noaug"], ["probe", "picture"])
        >>> found.networks[0].stages["layer4.1"]["probe"].value
    """
    from convlens.inspection.measuring import measure as measured
    from convlens.inspection.subjects import open_subject

    asked = [runs] if isinstance(runs, str | Path | Run) else runs
    names = [measures] if isinstance(measures, str) else measures
    texts = [str(each.path) if isinstance(each, Run) else str(each) for each in asked]
    subjects = [open_subject(text, on=device) for text in texts]
    named = [run_module.safe(subject.name) for subject in subjects]
    usual = run_module.PLOTS / (
        Path(named[0], "look") if len(named) == 1 else "-".join(["look", *named])
    )
    place = usual if folder is None else Path(folder)
    return measured(subjects, names, folder=place, quiet=quiet, **options)


def find_label_errors(
    what: str | Path | Mapping[str, Any] | Recipe | Run,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    data: str | Path | None = None,
    folds: int = labelling.FOLDS,
    test: bool = False,
    name: str | None = None,
    fresh: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> LabelReport:
    """Names images whose labels are probably wrong, by models that didn't train on them.

    Args:
        what, overrides, data, name, fresh, device, quiet: as in `train`; `what` may be a run,
            whose recipe is then taken.
        folds: so many models are trained, each judges the images of its fold.
        test: judges the test split as well, by all models; their runs log that look.

    Returns:
        Suspects with suggestions, the surest first, probabilities and scores of all images, and
        the paths of a sheet of pictures and of a CSV to correct.

    Raises:
        ConvlensError: with what, where and what to do.
    """
    if isinstance(what, Run):
        alone = what._folder.model_path
        what = alone if alone.is_file() else what.path
    return labelling.find_label_errors(
        what,
        overrides,
        data=data,
        folds=folds,
        test=test,
        name=name,
        fresh=fresh,
        on=device,
        quiet=quiet,
    )


def recipes() -> dict[str, Recipe]:
    """The recipes that come with convlens, by name."""
    return {name: load_recipe(name) for name in recipe_module.names()}
