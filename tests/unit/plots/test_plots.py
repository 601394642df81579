"""Every plot can be saved, reproducibly and whatever the names it shows."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convlens import plots
from convlens.plots import style
from convlens.plots.attributions import AttributionColumn, AttributionPanel
from helpers.figures import (
    HOSTILE_NAMES,
    make_history,
    make_images,
    make_maps,
    make_panel,
    save_and_read,
)


def make_attribution_panel() -> AttributionPanel:
    maps = np.linspace(-1, 1, 16).reshape(1, 4, 4)
    columns = [
        AttributionColumn("Grad-CAM", "layer", maps.clip(0), False),
        AttributionColumn("IG", "", maps, True),
    ]
    return AttributionPanel("model", make_images(1), columns, [("cat", 0.9)])


def every_plot() -> dict[str, Callable[[], Figure]]:
    """Return a function for every entry of `PLOTS` that draws it."""
    share = np.array([0.9, 0.5])
    figures = {
        "curves": lambda: plots.curves(make_history(3), 2, "run"),
        "seed_curves": lambda: plots.seed_curves([make_history(3), make_history(2)], "run"),
        "variant_curves": lambda: plots.variant_curves(
            {"a": [make_history(3)], "b": [make_history(2)] * 2}, "run"
        ),
        "differences": lambda: plots.differences({"b": (-0.01, (-0.02, 0.0), True)}, "a"),
        "learning_rate": lambda: plots.learning_rate([1, 2], [0.1, 0.01]),
        "confusion": lambda: plots.confusion([[3, 1], [0, 2]], ["cat", "dog"], "test"),
        "reliability": lambda: plots.reliability([math.nan, 0.8], [math.nan, 0.7], [0, 10], 0.1),
        "risk_coverage": lambda: plots.risk_coverage([0.5, 1], [0, 0.2], "run"),
        "accuracy_bars": lambda: plots.accuracy_bars(["a", "b"], share, [(0.8, 0.95), (0.4, 0.6)]),
        "contact_sheet": lambda: plots.contact_sheet(make_images(3), ["a", "b", "c"], "sheet"),
        "augmented_batch": lambda: plots.augmented_batch(make_images(3), make_images(3, seed=1)),
        "label_review": lambda: plots.label_review(
            make_images(2), ["cat", "a"], ["dog", "b"], [0.9, 0.6]
        ),
        "worst_mistakes": lambda: plots.worst_mistakes(make_images(1), ["cat"], ["dog"], [0.9]),
        "activations": lambda: plots.activations(
            make_images(1)[0], [make_panel()], "run", "cat", "max: 1"
        ),
        "activations_side_by_side": lambda: plots.activations_side_by_side(
            make_images(1)[0],
            [plots.Column("a", "cat", [make_panel()]), plots.Column("b", "dog", [])],
        ),
        "colour_filters": lambda: plots.color_filters(
            make_maps(5, 3), list("abcde"), 1.0, "conv1", "note"
        ),
        "kernels": lambda: plots.kernels(make_maps(5, 8), list("abcde"), 1.0, "conv2", "note"),
        "top_images": lambda: plots.top_images(
            [make_images(3)], [[None] * 3], [("#1", "3/3 cat")], "layer"
        ),
        "made_inputs": lambda: plots.made_inputs(
            make_images(2), [("#1", "peak 3")] * 2, "layer", "note"
        ),
        "neighbours": lambda: plots.neighbors_sheet(
            make_images(4), [["a"], ["b", "c"], ["d"], []], 2, "near"
        ),
        "stage_measures": lambda: plots.stage_measures(
            [plots.StageLine("run", ["a", "b"], {"rank": [(3, 2, 4), (5, 4, 6)]})],
            {"rank": ("effective rank", "log")},
        ),
        "similarity": lambda: plots.similarity(
            [[1, None], [None, 1]], [("x", "a"), ("y", "a")], "CKA"
        ),
        "embedding": lambda: plots.embedding(
            [[0, 1], [1, 0]], [0, 1], [0, 0], ["cat", "dog"], "map"
        ),
        "attribution_grid": lambda: plots.attribution_grid(
            [("a", "cat")], [make_attribution_panel()]
        ),
        "attribution_sanity": lambda: plots.attribution_sanity(
            ["head"],
            {key: {"A": [(0.5, (0.4, 0.6))]} for key in ("spearman", "ssim")},
            {key: {"A": share, "random order": share} for key in ("deletion", "insertion")},
        ),
    }
    assert set(figures) == set(plots.PLOTS)
    return figures


def test_every_plot_is_saved_with_its_size_and_reproducible_bytes(tmp_path: Path) -> None:
    for name, draw in every_plot().items():
        figure = draw()
        inches = figure.get_size_inches()
        pixels = save_and_read(figure, tmp_path / "made" / "here", f"{name}.png")
        assert pixels.shape == (*(int(side * 150) for side in inches[::-1]), 3)
        assert 0 < (pixels < 128).mean() < 0.9, "something is drawn, on a white page"
        plots.save_figure(draw(), tmp_path / "again.png")
        first = (tmp_path / "made" / "here" / f"{name}.png").read_bytes()
        assert first == (tmp_path / "again.png").read_bytes()
        assert b"matplotlib" not in first
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        figure = plots.learning_rate([1, 2], [0.1, 0.01])
        plots.save_figure(figure, tmp_path / "custom.png")
    expected = (tmp_path / "made" / "here" / "learning_rate.png").read_bytes()
    assert (tmp_path / "custom.png").read_bytes() == expected, "the user's style changes nothing"


def test_separate_layout_gives_the_bytes_of_savefig_and_leaves_the_figure_as_it_was() -> None:
    """matplotlib itself draws the whole figure once more to lay it out."""
    for name in ("curves", "confusion", "activations"):
        draw, buffer = every_plot()[name], io.BytesIO()
        figure, reference = draw(), draw()
        layout = figure.get_layout_engine()
        encoded = plots.encode_png(figure)
        with style._style_context(), matplotlib.rc_context(style.VECTOR_STYLE):
            FigureCanvasAgg(reference)
            options = {"metadata": plots.FORMATS["png"], "pil_kwargs": {"compress_level": 4}}
            reference.savefig(buffer, format="png", dpi=150, **options)
        assert encoded == buffer.getvalue(), name
        assert figure.get_layout_engine() is layout


def test_pyplot_is_not_imported() -> None:
    code = (
        "import sys; from convlens import plots; plots.learning_rate([1], [1]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.filterwarnings("error")
def test_hostile_names_are_drawn_as_plain_text(tmp_path: Path) -> None:
    n = len(HOSTILE_NAMES)
    table = np.eye(n, dtype=np.int64)
    many = HOSTILE_NAMES * 2
    for figure in (
        plots.contact_sheet(make_images(n), HOSTILE_NAMES, HOSTILE_NAMES[0]),
        plots.worst_mistakes(
            make_images(n), HOSTILE_NAMES, HOSTILE_NAMES[::-1], [0.5] * n, HOSTILE_NAMES[1]
        ),
        plots.confusion(table, HOSTILE_NAMES, HOSTILE_NAMES[1]),
        plots.confusion(np.ones((2 * n, 2 * n)), many, HOSTILE_NAMES[3]),
        plots.accuracy_bars(HOSTILE_NAMES, [0.5] * n, [(0.4, 0.6)] * n, HOSTILE_NAMES[1]),
        plots.curves(make_history(3), 2, HOSTILE_NAMES[1]),
        plots.seed_curves([make_history(3)] * 2, HOSTILE_NAMES[1]),
        plots.variant_curves({name: [make_history(3)] for name in HOSTILE_NAMES}, HOSTILE_NAMES[1]),
    ):
        save_and_read(figure, tmp_path)
