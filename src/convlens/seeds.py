"""One recipe with several seeds: mean and deviation instead of one lucky number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from convlens import evaluation, metrics, picturing, run, training
from convlens.asking import Asked
from convlens.run import PLOTS, RunFolder


@dataclass(frozen=True)
class SeedTable:
    """What several seeds of one recipe reached; `sd` is the sample deviation (n - 1)."""

    name: str
    split: str
    runs: list[RunFolder]
    seeds: list[int]
    accuracies: list[float]
    losses: list[float]
    seconds: list[float]

    @property
    def mean(self) -> float:
        return metrics.mean_sd(self.accuracies)[0]

    @property
    def sd(self) -> float | None:
        return metrics.mean_sd(self.accuracies)[1]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "split": self.split,
            "runs": [place.name for place in self.runs],
            "seeds": self.seeds,
            "accuracies": self.accuracies,
            "mean": self.mean,
            "sd": self.sd,
            "losses": self.losses,
            "training_seconds": self.seconds,
            "plot": str(PLOTS / f"{self.runs[0].name}-seeds" / "curves.png"),
        }


def train_seeds(
    asked: Asked,
    count: int,
    *,
    name: str | None = None,
    fresh: bool = False,
    test: bool = True,
    on: str | None = None,
    quiet: bool = False,
) -> SeedTable:
    """Trains the recipe with `count` seeds, its own one first, and puts them side by side.

    The split of the data stays the same (`data.seed`); what varies is `train.seed`: initial
    weights, order, augmentation and dropout. With `test` false the table is about validation.
    """
    called = name or asked.recipe.name
    first = asked.recipe.train.seed
    split = "test" if test else "val"
    places, results = [], []
    for seed in range(first, first + count):
        recipe = asked.recipe.replace(**{"train.seed": seed})
        its_name = called if seed == first else f"{called}-seed{seed}"
        place = training.train(
            recipe.model_copy(update={"name": its_name}),
            plain=asked.plain or name is not None,
            fresh=fresh,
            test=False,
            on=on,
            quiet=quiet,
        )
        results.append(evaluation.evaluate(place, split, on=on, quiet=quiet))
        places.append(place)
    picturing.seed_plot(PLOTS / f"{places[0].name}-seeds", [p.metrics() for p in places], called)
    return SeedTable(
        name=run.safe(called),
        split=split,
        runs=places,
        seeds=list(range(first, first + count)),
        accuracies=[result.accuracy for result in results],
        losses=[result.loss for result in results],
        seconds=[float(place.facts()["training_seconds"]) for place in places],
    )
