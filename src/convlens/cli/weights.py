"""The command `weights`: pretrained weights to start a training with, and their download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from convlens.cli.common import Command, JsonOption, app, print_json
from convlens.errors import UsageError

if TYPE_CHECKING:
    from convlens.training.weights_catalogue import WeightsEntry

TITLES = {
    "package": "pip packages",
    "torchvision": "torchvision",
    "timm": "timm (some of its networks; any other: model.name=timm/NAME model.weights=default)",
    "file": "files in the folders of weights",
    "run": "your finished runs",
}


@app.command(cls=Command)
def weights(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[get NAME]", help="Download weights by their name."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List all networks of torchvision.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List pretrained weights to start with: size, licence, accuracy, and whether they are here.

    Weights that are not here are listed with the command that downloads them and, for machines
    without internet, with the path where their file is expected. Only `get` downloads anything.

    Examples:
        convlens weights
        convlens weights --all --json
        convlens weights get resnet18
        convlens train flowers model.name=tf_efficientnet_lite0 model.weights=lite0
    """
    from convlens.training import weights_catalogue

    if words:
        if len(words) != 2 or words[0] != "get":
            raise UsageError(
                f"unknown arguments of `convlens weights`: {' '.join(words)}",
                fix="`convlens weights` lists them, `convlens weights get NAME` downloads one",
            )
        _print_download(words[1], as_json)
        return
    entries = weights_catalogue.list_weights(everything=everything)
    if as_json:
        print_json(True, {"weights": [entry.to_dict() for entry in entries]})
    else:
        _print_entries(entries)


def _print_download(name: str, as_json: bool) -> None:
    from convlens.cli.results import stdout_console
    from convlens.training import weights_catalogue

    path = weights_catalogue.get_weights(name)
    if as_json:
        print_json(True, {"name": name, "path": None if path is None else str(path.absolute())})
    else:
        where = "in the cache of timm" if path is None else path.absolute()
        stdout_console().print(escape(f"{name}  {where}"), soft_wrap=True)


def _print_entries(entries: list[WeightsEntry]) -> None:
    """Print the entries by kind, each with the keys to use it and where it is."""
    from convlens.cli.results import stdout_console

    out = stdout_console()
    for kind, title in TITLES.items():
        of_kind = [entry for entry in entries if entry.kind == kind]
        if of_kind:
            out.print(f"[bold]{escape(title)}[/]")
        for entry in of_kind:
            state = "[green]here[/]" if entry.is_here else "[yellow]not here[/]"
            out.print(f"  [bold]{escape(entry.name)}[/]  {state}  {escape(_facts(entry))}")
            for line in _lines(entry):
                out.print(escape(f"      {line}"), soft_wrap=True)


def _facts(entry: WeightsEntry) -> str:
    facts = []
    if entry.bytes is not None:
        facts.append(f"{entry.bytes / 1e6:,.1f} MB")
    if entry.parameters is not None:
        facts.append(f"{entry.parameters / 1e6:,.1f} M parameters")
    if entry.top1 is not None:
        facts.append(f"ImageNet top-1 {entry.top1:.1f}%")
    facts.append(f"licence: {entry.licence or 'not stated'}")
    return " · ".join(facts)


def _lines(entry: WeightsEntry) -> list[str]:
    name = f"model.name={entry.model_name} " if entry.model_name else ""
    lines = [f"use   {name}model.weights={entry.weights}"]
    if entry.is_here:
        lines.append(f"file  {entry.path}")
        return lines
    lines.append(f"get   {entry.command}")
    if entry.url is not None:
        lines.append(f"or    put {entry.url}")
        lines.append(f"      at  {entry.path}")
    return lines
