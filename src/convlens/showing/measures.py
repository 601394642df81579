"""Print measurements, embeddings and nearest neighbours as tables on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from convlens.showing.results import stdout, table_of
from convlens.system.console import print_status

if TYPE_CHECKING:
    from convlens.inspection.embedding import Embedded
    from convlens.inspection.measuring import Measurements
    from convlens.inspection.neighbours import Neighbours
    from convlens.inspection.stagebatch import Value
    from convlens.inspection.stagework import Alike

HEADS = {
    "probe": "probe %",
    "separability": "nearest mean %",
    "picture": "picture R² %",
    "rank": "rank",
    "sparsity": "sparsity %",
    "blank": "blank %",
    "dead": "dead+nearly/channels",
    "fineness": "fineness",
}


def measured(result: Measurements) -> None:
    """Print a table for each network with a row for each stage; definitions go to stderr."""
    out = stdout()
    names = result.measures
    for network in result.networks:
        learned = f", fitted on {network.learned:,}" if network.learned else ""
        about = f"{network.n:,} {network.split} images of {network.data}{learned}"
        if names:
            table = table_of("stage", *(HEADS.get(name, name) for name in names))
            for stage, values in network.stages.items():
                broken = stage in network.broken
                cells = ["NaN" if broken else _cell(name, values[name]) for name in names]
                table.add_row(escape(stage), *cells)
            out.print(f"[bold]{escape(network.name)}[/]: {escape(about)}")
            out.print(table)
    for alike in result.similarity:
        _similar(alike)
    for name, words in result.to_dict()["measures"].items():
        meaning = f"{HEADS.get(name, name)}: {words['title']}; {words['definition']}"
        print_status(f"[dim]{escape(meaning)}[/]")
    for network in result.networks:
        if network.broken:
            bad = f"{network.name}: NaN or infinite activations in {', '.join(network.broken)}"
            print_status(f"[yellow]{escape(bad)}[/]")
    for file in result.files:
        out.print(escape(f"written  {file}"))


def _similar(alike: Alike) -> None:
    """Print linear CKA of each stage with the stage of the same name in the first network."""
    place = {both: number for number, both in enumerate(alike.stages)}
    first, *others = dict.fromkeys(network for network, _ in alike.stages)
    stages = [stage for network, stage in alike.stages if network == first]
    shared = [name for name in others if any((name, stage) in place for stage in stages)]
    if not shared:
        return
    table = table_of("stage", *map(escape, shared))
    for stage in stages:
        row = alike.matrix[place[first, stage]]
        values = [row[place[name, stage]] if (name, stage) in place else None for name in shared]
        table.add_row(escape(stage), *("-" if v is None else f"{v:.2f}" for v in values))
    out = stdout()
    out.print(f"linear CKA with the same stage of [bold]{escape(first)}[/], n = {alike.n:,}")
    out.print(table)


def _cell(name: str, value: Value) -> str:
    """Format a number with its interval."""
    if value.value is None:
        return "-"
    if name == "dead":
        its = value.details
        return f"{its['dead']}+{its['nearly_dead']}/{its['channels']}"
    scale, digits = (1, 1) if name == "rank" else (1, 3) if name == "fineness" else (100, 1)
    shown = f"{scale * value.value:.{digits}f}"
    if value.interval95 is not None:
        low, high = value.interval95
        shown += f" ({scale * low:.{digits}f}-{scale * high:.{digits}f})"
    return shown


def embedded(result: Embedded) -> None:
    """Print how the embedding was made and where it is."""
    wrong = int((result.labels != result.guesses).sum())
    out = stdout()
    out.print(
        f"[bold]{escape(result.run)}[/]: {len(result.ids):,} {result.split} images of "
        f"{escape(result.data)}, {wrong:,} mistakes; {escape(result.words)}"
    )
    for file in result.to_dict()["files"]:
        out.print(escape(f"written  {file}"))


def neighboured(result: Neighbours) -> None:
    """Print the nearest training images of each image; identical ones are marked."""
    out = stdout()
    for one in result.found:
        known = f", labeled {one.label}" if one.label is not None else ""
        out.print(escape(f"{one.image}: predicted {one.prediction}{known}"))
        table = table_of("training image", "class", "cosine distance", "")
        for near in one.neighbours:
            table.add_row(escape(near.id), escape(near.label), f"{near.distance:.4f}", near.same)
        out.print(table)
    out.print(escape(f"written  {result.file}"))
