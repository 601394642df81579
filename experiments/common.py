"""Shared by the scripts of the report: train once, afterwards only do inference."""

from __future__ import annotations

import sys

import convlens


def arguments() -> tuple[list[str], list[str]]:
    """Return the overrides (`train.epochs=3`) and the image files of the command line."""
    changes = [argument for argument in sys.argv[1:] if "=" in argument]
    return changes, [argument for argument in sys.argv[1:] if "=" not in argument]


def experiment(recipe: str, reported: str) -> convlens.Run:
    """Train the recipe, or find the trained model; then test it and classify images.

    The model is saved in `models/`, downloads in `data/`, plots in `plots/`.

    Args:
        recipe: name of the recipe.
        reported: the accuracies in the report.
    """
    changes, images = arguments()
    run = convlens.train(recipe, changes)
    last, test = run.metrics[-1], run.results[-1]
    print(
        f"train accuracy {last['train_accuracy']:.2%}, loss {last['train_loss']:.4f} (last epoch)"
    )
    print(f"validation accuracy {last['val_accuracy']:.2%}, loss {last['val_loss']:.4f}")
    print(f"test accuracy {test['accuracy']:.2%}; the report: {reported}")
    for answer in run.predict(images) if images else ():
        print(f"{answer.filename}: {answer.label} {answer.prob:.1%}")
    return run
