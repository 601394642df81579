"""convlens: train, test and look inside convolutional image classifiers.

The names below are loaded when they are first used, so that importing the package (and
`convlens --help`) doesn't import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from convlens.version import __version__

if TYPE_CHECKING:
    from convlens.api import (
        Run as Run,
        RunTable as RunTable,
        compare as compare,
        diagnose as diagnose,
        evaluate as evaluate,
        export as export,
        find_label_errors as find_label_errors,
        look as look,
        measure as measure,
        predict as predict,
        recipes as recipes,
        report as report,
        train as train,
        train_many as train_many,
    )
    from convlens.errors import ConvlensError as ConvlensError
    from convlens.estimator import ImageClassifier as ImageClassifier

_HOMES = {
    "Run": "api",
    "RunTable": "api",
    "train": "api",
    "train_many": "api",
    "compare": "api",
    "diagnose": "api",
    "evaluate": "api",
    "export": "api",
    "look": "api",
    "measure": "api",
    "find_label_errors": "api",
    "predict": "api",
    "recipes": "api",
    "report": "api",
    "ImageClassifier": "estimator",
    "ConvlensError": "errors",
}

__all__ = [
    "ConvlensError",
    "ImageClassifier",
    "Run",
    "RunTable",
    "__version__",
    "compare",
    "diagnose",
    "evaluate",
    "export",
    "find_label_errors",
    "look",
    "measure",
    "predict",
    "recipes",
    "report",
    "train",
    "train_many",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convlens' has no attribute {name!r}")
    return getattr(import_module(f"convlens.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
