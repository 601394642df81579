"""The Python API: the commands as functions, and `Run` as what they work on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convlens import asking, evaluation, prediction, training
from convlens import recipe as recipe_module
from convlens import run as run_module
from convlens.evaluation import Evaluation
from convlens.prediction import Prediction
from convlens.recipe import Recipe
from convlens.recipe import load as load_recipe


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
    texts = asking.as_overrides(overrides) if isinstance(overrides, Mapping) else overrides
    asked = asking.read(what, data=data, overrides=texts)
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


def evaluate(run: str | Path | Run, split: str = "test", **options: Any) -> Evaluation:
    """`Run.evaluate` of a run given by name, folder or model file."""
    return (run if isinstance(run, Run) else Run.load(run)).evaluate(split, **options)


def predict(
    run: str | Path | Run, inputs: str | Path | Iterable[str | Path] | np.ndarray, **options: Any
) -> list[Prediction]:
    """`Run.predict` of a run given by name, folder or model file."""
    return (run if isinstance(run, Run) else Run.load(run)).predict(inputs, **options)


def recipes() -> dict[str, Recipe]:
    """The recipes that come with convlens, by name."""
    return {name: load_recipe(name) for name in recipe_module.names()}
