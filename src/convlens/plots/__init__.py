"""From arrays to matplotlib figures: the only package that imports matplotlib.

Every function returns a new `Figure`; `save` writes one as PNG. It knows nothing of models or
runs. A new plot is a function in `charts` (numbers), `several` (many runs) or `pictures`,
and a line in `PLOTS`.
"""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from convlens.plots.attributions import attribution_grid, attribution_sanity
from convlens.plots.charts import (
    accuracy_bars,
    confusion,
    curves,
    learning_rate,
    reliability,
)
from convlens.plots.pictures import augmented_batch, contact_sheet, worst_mistakes
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
    "worst_mistakes": worst_mistakes,
    "attribution_grid": attribution_grid,
    "attribution_sanity": attribution_sanity,
}

__all__ = [
    "PLOTS",
    "accuracy_bars",
    "attribution_grid",
    "attribution_sanity",
    "augmented_batch",
    "confusion",
    "contact_sheet",
    "curves",
    "learning_rate",
    "reliability",
    "save",
    "seed_curves",
    "setting_curves",
    "worst_mistakes",
]
