"""Whether it can be relied on: `selftest`."""

from __future__ import annotations

from typing import Annotated

import typer

from convlens.cli.shared import Json, app, print_json


@app.command()
def selftest(
    chaos: Annotated[int, typer.Option(min=1, metavar="N", help="Trainings to kill.")] = 5,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes of each (torchrun); one of them is killed.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    as_json: Json = False,
) -> None:
    """Kill trainings at random moments, continue them, and compare every bit of the ends.

    [dim]Small trainings in a temporary folder, with augmentation, dropout, averaged weights, mixed
    images and early stopping. Each takes some ten seconds.[/]
    """
    from convlens.errors import ModelFileError
    from convlens.resuming import chaos as killing
    from convlens.system.console import print_status

    score = killing.chaos(chaos, processes=processes, seed=seed)
    print_json(as_json, score.to_dict())
    print_status(f"[bold]{score.same}/{chaos}[/] ended with the same bits")
    if score.same < chaos:
        raise ModelFileError(
            f"{chaos - score.same} of {chaos} trainings ended otherwise after they were killed",
            fix="please report it, with what was said above",
        )
