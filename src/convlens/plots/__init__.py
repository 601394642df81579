"""matplotlib figures from arrays; the only package that imports matplotlib.

Every function returns a new `Figure`, and `save_figure` writes one as PNG, SVG or PDF. The package
is independent of models and runs. A new plot is a function in `charts` (numbers), `images` or
`attributions`, and an entry of `PLOTS`.
"""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from convlens.plots.attributions import attribution_grid, attribution_sanity
from convlens.plots.charts import (
    StageLine,
    accuracy_bars,
    confusion,
    curves,
    differences,
    embedding,
    learning_rate,
    reliability,
    risk_coverage,
    seed_curves,
    similarity,
    stage_measures,
    variant_curves,
)
from convlens.plots.images import (
    Column,
    Panel,
    activations,
    activations_side_by_side,
    augmented_batch,
    color_filters,
    contact_sheet,
    kernels,
    label_review,
    made_inputs,
    neighbors_sheet,
    top_images,
    worst_mistakes,
)
from convlens.plots.style import FORMATS, encode_png, save_figure

PLOTS: dict[str, Callable[..., Figure]] = {
    "curves": curves,
    "seed_curves": seed_curves,
    "variant_curves": variant_curves,
    "differences": differences,
    "learning_rate": learning_rate,
    "confusion": confusion,
    "reliability": reliability,
    "risk_coverage": risk_coverage,
    "accuracy_bars": accuracy_bars,
    "contact_sheet": contact_sheet,
    "augmented_batch": augmented_batch,
    "label_review": label_review,
    "worst_mistakes": worst_mistakes,
    "activations": activations,
    "activations_side_by_side": activations_side_by_side,
    "colour_filters": color_filters,
    "kernels": kernels,
    "top_images": top_images,
    "made_inputs": made_inputs,
    "neighbours": neighbors_sheet,
    "stage_measures": stage_measures,
    "similarity": similarity,
    "embedding": embedding,
    "attribution_grid": attribution_grid,
    "attribution_sanity": attribution_sanity,
}

__all__ = [
    "FORMATS",
    "PLOTS",
    "Column",
    "Panel",
    "StageLine",
    "accuracy_bars",
    "activations",
    "activations_side_by_side",
    "attribution_grid",
    "attribution_sanity",
    "augmented_batch",
    "color_filters",
    "confusion",
    "contact_sheet",
    "curves",
    "differences",
    "embedding",
    "encode_png",
    "kernels",
    "label_review",
    "learning_rate",
    "made_inputs",
    "neighbors_sheet",
    "reliability",
    "risk_coverage",
    "save_figure",
    "seed_curves",
    "similarity",
    "stage_measures",
    "top_images",
    "variant_curves",
    "worst_mistakes",
]
