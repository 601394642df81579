"""From arrays to matplotlib figures: the only package that imports matplotlib.

Every function returns a new `Figure`; `save` writes one as PNG. It knows nothing of models or
runs. A new plot is a function in `charts` (numbers), `several` (many runs) or `pictures`,
and a line in `PLOTS`.
"""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from convlens.plots.charts import (
    accuracy_bars,
    confusion,
    curves,
    learning_rate,
    reliability,
)
from convlens.plots.pictures import (
    augmented_batch,
    contact_sheet,
    label_review,
    worst_mistakes,
)
from convlens.plots.several import seed_curves, setting_curves
from convlens.plots.style import save

PLOTS: dict[str, Callable[..., Figure]] = {
    "curves": curves,
    "seed_curves": seed_curves,
    "setting_curves": setting_curves,
    "learning_rate": learning_rate,
    "confusion": confusion,
    "reliability": reliability,
    "accuracy_bars": accuracy_bars,
    "contact_sheet": contact_sheet,
    "augmented_batch": augmented_batch,
    "label_review": label_review,
    "worst_mistakes": worst_mistakes,
}

__all__ = [
    "PLOTS",
    "accuracy_bars",
    "augmented_batch",
    "confusion",
    "contact_sheet",
    "curves",
    "label_review",
    "learning_rate",
    "reliability",
    "save",
    "seed_curves",
    "setting_curves",
    "worst_mistakes",
]
