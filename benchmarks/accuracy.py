"""Accuracy of a recipe over several seeds, with times: one command per recipe.

    python benchmarks/accuracy.py RECIPE|DATA [key=value ...] [--variants all] [--seeds N]
                                  [--repeat-splits S] [--refit] [--no-test] [--as NAME]

Trains in `models/` (a run that is finished already is only evaluated), chooses by validation,
tests once (or not at all), and keeps the result in `benchmarks/results/accuracy-<name>.json`;
of variants, in a file each.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

from convlens.training import resolve
from convlens.training.repeats import VariantSummary, train_many


def figures_of(summary: VariantSummary) -> dict[str, Any]:
    """Return the results of a variant with the circumstances that are needed to interpret them."""
    outcomes = summary.outcomes
    last = [outcome.history[-1] for outcome in outcomes]
    metadata = outcomes[0].run_dir.metadata()
    return summary.to_dict() | {
        "split": outcomes[0].evaluation.split,
        "epochs": [outcome.epochs[1] for outcome in outcomes],
        "kept_epochs": [outcome.epochs[0] for outcome in outcomes],
        "plan": metadata["plan"],
        "hardware": metadata["hardware"],  # of the training, which may have run elsewhere
        "train_accuracy_last": [row["train_accuracy"] for row in last],
        "val_accuracy_last": [row["val_accuracy"] for row in last],
        "splits": metadata["data"]["splits"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--variants", help="all, or names with commas")
    parser.add_argument("--repeat-splits", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--no-test", action="store_true", help="accuracies are of validation")
    parser.add_argument("--as", dest="result_name", help="name of the result")
    parser.add_argument("--data")
    # Intermixed, so that overrides may also follow an option.
    arguments = parser.parse_intermixed_args()
    recipes = resolve.resolve_variants(
        arguments.what, arguments.variants, data=arguments.data, overrides=arguments.overrides
    )
    table = train_many(
        recipes,
        repeat_splits=arguments.repeat_splits,
        seeds=arguments.seeds,
        refit=arguments.refit,
        test=not arguments.no_test,
    )
    compared = zip(table.summaries, table.gains(), strict=True)
    for number, (summary, (gain, gain_sd)) in enumerate(compared):
        figures = figures_of(summary) | {
            "place": number,
            "over_first": gain,
            "over_first_sd": gain_sd,
            "recipe": arguments.what,
            "overrides": arguments.overrides,
            "refit": table.refit,
            "plot": str(table.plot),
        }
        variant = [summary.variant] if summary.variant else []
        name = "-".join([arguments.result_name or table.name, *variant])
        print(json.dumps(record(f"accuracy-{name}", figures)))


if __name__ == "__main__":
    main()
