"""convlens: train, test and look inside convolutional image classifiers.

The public names are imported when they are first used, so that `import convlens` and
`convlens --help` do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from convlens.version import __version__

if TYPE_CHECKING:
    from convlens.analysis.compare import compare as compare
    from convlens.analysis.diagnosis import diagnose as diagnose
    from convlens.analysis.label_errors import find_label_errors as find_label_errors
    from convlens.api import (
        Run as Run,
        RunTable as RunTable,
        look as look,
        measure as measure,
        recipes as recipes,
        train as train,
        train_many as train_many,
    )
    from convlens.errors import ConvlensError as ConvlensError
    from convlens.estimator import ImageClassifier as ImageClassifier
    from convlens.evaluation import evaluate as evaluate
    from convlens.model_export import export as export
    from convlens.prediction import predict as predict
    from convlens.reports.build import report as report

_MODULES = {
    "Run": "api",
    "RunTable": "api",
    "train": "api",
    "train_many": "api",
    "look": "api",
    "measure": "api",
    "recipes": "api",
    "evaluate": "evaluation",
    "predict": "prediction",
    "export": "model_export",
    "compare": "analysis.compare",
    "diagnose": "analysis.diagnosis",
    "find_label_errors": "analysis.label_errors",
    "report": "reports.build",
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
    if name not in _MODULES:
        raise AttributeError(f"module 'convlens' has no attribute {name!r}")
    return getattr(import_module(f"convlens.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
