"""Shared by the scripts of the report: train once, afterwards only do inference."""

from __future__ import annotations

import os
import sys

import convlens
from convlens.cli import exit_on_errors
from convlens.data.input_images import expand_paths
from convlens.errors import DataError, UsageError


def arguments() -> tuple[list[str], list[str]]:
    """Return the overrides (`train.epochs=3`) and the other arguments of the command line.

    Raises:
        UsageError: an option, which the scripts do not have.
    """
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    if options:
        raise UsageError(
            f"no such option: {options[0]}",
            fix=f"usage: python {sys.argv[0]} [KEY=VALUE ...] [IMAGE ...]",
        )
    changes = [argument for argument in sys.argv[1:] if "=" in argument]
    return changes, [argument for argument in sys.argv[1:] if "=" not in argument]


@exit_on_errors()
def experiment(recipe: str, reported: str) -> None:
    """Train the recipe, or find the trained model; then test it and classify images.

    The model is saved in `models/`, downloads in `data/`, plots in `plots/`.

    Args:
        recipe: name of the recipe.
        reported: the accuracies in the report.
    """
    changes, images = arguments()
    # A typo is reported before the training, which may take hours.
    missing = [path for path in expand_paths(images) if not os.path.isfile(path)]
    if missing:
        raise DataError(f"no such file: {', '.join(missing)}", fix="check the names of the images")
    run = convlens.train(recipe, changes)
    last, test = run.metrics[-1], run.results[-1]
    print(
        f"train accuracy {last['train_accuracy']:.2%}, loss {last['train_loss']:.4f} (last epoch)"
    )
    if last.get("val_accuracy") is not None:
        print(f"validation accuracy {last['val_accuracy']:.2%}, loss {last['val_loss']:.4f}")
    print(f"test accuracy {test['accuracy']:.2%}; the report: {reported}")
    answers = run.predict(images) if images else []
    for answer in answers:
        result = answer.error or f"{answer.label} {answer.prob:.1%}"
        print(f"{answer.filename}: {result}")
    unreadable = sum(answer.error is not None for answer in answers)
    if unreadable:
        raise DataError(f"{unreadable} of {len(answers)} files could not be read")
