"""Accuracy of a recipe over several seeds, with times: one command per recipe.

    python benchmarks/accuracy.py RECIPE|DATA [key=value ...] [--seeds N] [--as NAME]

Trains in `models/` (a run that is finished already is only evaluated), chooses by validation,
tests once, and keeps the result in `benchmarks/results/accuracy-<name>.json`.
"""

from __future__ import annotations

import argparse
import json

from convlens import asking, seeds
from recording import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--as", dest="called", help="name of the result")
    parser.add_argument("--data")
    arguments = parser.parse_args()
    asked = asking.read(arguments.what, data=arguments.data, overrides=arguments.overrides)
    table = seeds.train_seeds(asked, arguments.seeds)
    figures = table.to_dict()
    first = table.runs[0]
    result = [entry for entry in first.results() if entry["split"] == "test"][-1]
    figures |= {
        "recipe": arguments.what,
        "overrides": arguments.overrides,
        "epochs": [place.facts()["epochs"] for place in table.runs],
        "kept_epochs": [place.facts()["kept_epoch"] for place in table.runs],
        "parameters": first.facts()["parameters"],
        "plan": first.facts()["plan"],
        "n": result["n"],
        "train_accuracy_last": [place.metrics()[-1]["train_accuracy"] for place in table.runs],
        "val_accuracy_last": [place.metrics()[-1]["val_accuracy"] for place in table.runs],
        "splits": first.facts()["data"]["splits"],
    }
    name = arguments.called or table.name
    print(json.dumps(record(f"accuracy-{name}", figures)))


if __name__ == "__main__":
    main()
