"""Print attribution maps as tables on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from convlens.showing.results import stdout, table_of

if TYPE_CHECKING:
    from convlens.inspection.attribution import Attributions, ModelMaps


def attributed(found: Attributions) -> None:
    """Print the class and probability of each image, the sanity checks and the files."""
    out = stdout()
    for model in found.models:
        _pictures(model)
        if model.sanity is not None:
            _sanity(model)
    out.print(escape(f"maps    {found.figure}\narrays  {found.arrays}"))
    for path in found.sanity_figures:
        out.print(escape(f"checks  {path}"))


def _pictures(model: ModelMaps) -> None:
    where = f"; Grad-CAM in {model.layer}, {model.side}x{model.side}" if model.layer else ""
    table = table_of("image", "truth", "predicted", "maps of", title=escape(model.name + where))
    for each in model.to_dict()["images"]:
        said = f"{each['predicted']} {each['predicted_probability']:.1%}"
        shown = f"{each['class']} {each['probability']:.1%}"
        table.add_row(*map(escape, (each["image"], each["truth"] or "", said, shown)))
    stdout().print(table)


def _sanity(model: ModelMaps) -> None:
    found = model.sanity
    assert found is not None
    table = table_of("method", "correlation with random weights", "deletion", "insertion")
    for each in found.methods.values():
        left = list(each.spearman.values())[-1]
        areas = (str(each.areas[order]) for order in ("deletion", "insertion"))
        table.add_row(escape(each.title), str(left), *areas)
    areas = (str(found.random_areas[order]) for order in ("deletion", "insertion"))
    table.add_row("random order", "", *areas)
    out = stdout()
    out.print(table)
    out.print(
        "rank correlation of the maps (0: the map depends on the weights) · area under the "
        "probability curve (good: low for deletion, high for insertion) · 95% intervals over images"
    )
    for each in found.methods.values():
        for sentence in each.sentences():
            out.print(escape(sentence))
