"""The Python API: training and using models, and `Run` as what it is all about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convlens import (
    evaluation,
    exported,
    prediction,
    recipe as recipe_module,
    run as run_module,
    training,
)
from convlens.evaluation import Evaluation
from convlens.exporting import making
from convlens.exporting.making import Export
from convlens.formats import modelfile
from convlens.prediction import Prediction
from convlens.recipe import Recipe, load as load_recipe
from convlens.several import runs as several
from convlens.several.tabling import Summary, Table
from convlens.starting import asking
from convlens.system.console import print_status


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
        """The run of that name under `models/`, in that folder, or of that model or ONNX file."""
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
        return modelfile.recipe_of(exported.open_model(self._folder.model_path).card)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the model's outputs."""
        return exported.open_model(self._folder.model_path).classes

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
        result = evaluation.evaluate(
            self._folder, split, data=data, tta=tta, on=device, quiet=quiet
        )
        if not quiet:
            print_status(evaluation.sentence({**result.to_dict(), "own": data is None}))
            if tta is not None:
                print_status(result.tta_sentence())
        return result

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
        loaded = exported.open_model(self._folder.model_path)
        if isinstance(inputs, str | Path):
            inputs = [inputs]
        images = inputs if isinstance(inputs, np.ndarray) else prediction.expand(inputs)
        answers = prediction.predict(loaded, images, top_k=top_k, tta=tta, on=device, quiet=quiet)
        return list(answers)

    def export(
        self,
        to: str | Sequence[str] = "onnx",
        *,
        output: str | Path | None = None,
        data: str | Path | None = None,
        quiet: bool = True,
    ) -> list[Export]:
        """The model as files for other programs, one for each format: `onnx`, `torch`.

        Each is run on the run's validation images (or those of `data`) and written only if it
        reproduces the outputs of convlens; `Export.proof` holds the largest differences.
        """
        names = [to] if isinstance(to, str) else to
        return making.export(self._folder, names, output=output, data=data, quiet=quiet)


def train(
    what: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    data: str | Path | None = None,
    name: str | None = None,
    fresh: bool = False,
    extend: bool = False,
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
        extend: begin where a finished run of this recipe with fewer epochs ended.
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
        extend=extend,
        test=test,
        on=device,
        quiet=quiet,
    )
    if test and not quiet:
        print_status(evaluation.sentence(place.results()[-1]))
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
        """Every run that was measured, in the order of variants, splits, seeds and folds."""
        return [Run(outcome.place) for outcome in self._table.outcomes]

    @property
    def summaries(self) -> list[Summary]:
        """What each variant reached: `variant`, `accuracies`, `mean`, `sd`, `interval95`, ..."""
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
    variants: str | Sequence[str] | None = None,
    repeat_splits: int = 1,
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
        variants: `"all"` variants of the recipe, or some by name; overrides apply to each.
        repeat_splits: number of random splits of the data (`data.seed`, `data.seed` + 1, ...).
        seeds: number of seeds of everything else (`train.seed`, `train.seed` + 1, ...).
        folds: K-fold cross-validation; the test split stays sealed.
        refit: finds the number of epochs by validation, then trains on training and validation
            images together for that many, and tests that run.

    Raises:
        ConvlensError: with what, where and what to do.
    """
    asked = asking.read_variants(what, variants, data=data, overrides=_texts(overrides))
    table = several.train_many(
        asked,
        repeat_splits=repeat_splits,
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


def predict(
    run: str | Path | Run, inputs: str | Path | Iterable[str | Path] | np.ndarray, **options: Any
) -> list[Prediction]:
    """`Run.predict` of a run given by name, folder or model file."""
    return (run if isinstance(run, Run) else Run.load(run)).predict(inputs, **options)


def export(run: str | Path | Run, to: str | Sequence[str] = "onnx", **options: Any) -> list[Export]:
    """`Run.export` of a run given by name, folder or model file."""
    return (run if isinstance(run, Run) else Run.load(run)).export(to, **options)


def recipes() -> dict[str, Recipe]:
    """The recipes that come with convlens, by name."""
    return {name: load_recipe(name) for name in recipe_module.names()}
