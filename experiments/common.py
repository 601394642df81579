"""What the report's scripts share: train once, and do inference ever after."""

from __future__ import annotations

import sys

import convlens


def arguments() -> tuple[list[str], list[str]]:
    """The command line as overrides (`train.epochs=3`) and image files."""
    changes = [argument for argument in sys.argv[1:] if "=" in argument]
    return changes, [argument for argument in sys.argv[1:] if "=" not in argument]


def experiment(recipe: str, reported: str) -> convlens.Run:
    """Trains the recipe, or finds the trained model; then tests it and classifies images.

    The model lands in `models/`, downloads in `data/`, plots in `plots/`.

    Args:
        reported: what the report says came out.
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
