"""Print the results of `convlens look`: predictions, layers, files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from convlens.showing.attribution import attributed
from convlens.showing.measures import embedded, measured, neighboured
from convlens.showing.results import stdout, table_of
from convlens.system.console import print_status

if TYPE_CHECKING:
    from convlens.inspection.looking import Look

LISTED = 8  # figures by name; of many images the folder alone


def looked(found: Look) -> None:
    """Print the predictions for each image, the activity of each layer and the files."""
    from convlens.inspection.drawing import said, truth

    out = stdout()
    names = found.opened.names
    if found.seen:
        table = table_of("image", "truth", *map(escape, names))
        for each in found.seen:
            answers = [escape(said(one)) for one in each]
            table.add_row(escape(each[0].picture.name), escape(truth(each) or "?"), *answers)
        out.print(table)
        for number, name in enumerate(names):
            _layers(found, number, name)
    for each_ in found.top_images:
        of = f"{each_.silent:,} of {len(each_.selectivity):,} channels"
        same = f"have the same value for all {len(each_.labels):,} images"
        out.print(f"{escape(each_.run)} {escape(each_.layer)}: {of} {same}")
    for made in found.made:
        for place, channel in enumerate(made.channels):
            best = f", the best image {made.best[place]:.4g}" if made.best else ""
            out.print(
                f"{escape(made.run)} {escape(made.layer)} channel {channel}: made input "
                f"{made.peaks[place]:.4g}{best}"
            )
    if found.attribution is not None:
        attributed(found.attribution)
    if found.measures is not None:
        measured(found.measures)
    for points in found.embeddings:
        embedded(points)
    for near in found.neighbours:
        neighboured(near)
    figures = [path for path in found.files if path.suffix == ".png"]
    for path in figures[:LISTED]:
        out.print(escape(f"plot   {path}"))
    count = len(found.files)
    out.print(escape(f"{count} file{'s' * (count != 1)}  {found.opened.folder}"))


def _layers(found: Look, number: int, name: str) -> None:
    """Print means over the images: the number of blank channels and the activity of a layer."""
    seen = [each[number] for each in found.seen]
    count = len(seen)
    told = "" if count == 1 else f", mean of {count} images"
    table = table_of("layer", "channels", "map", "blank", "mean", "active", title=name + told)
    broken = 0
    for rows in zip(*(each.numbers() for each in seen), strict=True):
        first = rows[0]
        broken += sum(row.broken for row in rows)
        means = [row.mean for row in rows if row.mean is not None]
        shares = [row.active for row in rows if row.active is not None]
        table.add_row(
            escape(first.layer),
            f"{first.channels:,}",
            f"{first.height}×{first.width}",
            f"{sum(row.blank for row in rows) / count:,.4g}",
            f"{sum(means) / len(means):.4g}" if means else "NaN",
            f"{sum(shares) / len(shares):.1%}" if shares else "NaN",
        )
    stdout().print(table)
    if broken:
        print_status(f"[yellow]warning[/]  {escape(name)}: channels with NaN or infinite values are "
            "marked in the figures and excluded from means and scales")  # fmt: skip
