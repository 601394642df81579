"""The command `explore`, which serves a local page about runs."""

from __future__ import annotations

from typing import Annotated

import typer

from convlens.cli import completion
from convlens.cli.common import (
    Command,
    DeviceOption,
    HostOption,
    TrustCode,
    app,
)


@app.command(cls=Command)
def explore(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Trained models. Default: all runs in this folder.",
            autocompletion=completion.complete_run,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA",
            help="Images to browse, besides those of the runs; may be repeated.",
            autocompletion=completion.complete_data,
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            metavar="N",
            help="Port. Default: a free one.",
            show_default=False,
        ),
    ] = 0,
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Do not open the page in a browser.")
    ] = False,
    host: HostOption = "127.0.0.1",
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote",
            help="Let other machines open the page, without encryption; needs --host and --token.",
        ),
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Secret in the address. Default: a random one."),
    ] = None,
    device: DeviceOption = None,
    trust_code: TrustCode = False,
) -> None:
    """Try models in the browser: drop, draw or photograph an image, and see why they decide.

    Also shows trainings while they run, browses data sets and corrects labels. The page is served
    on this machine only. Ctrl-C ends it.

    Examples:
        convlens explore digits
        convlens explore resnet18 resnet18-noaug --port 8000 --no-open
        convlens explore digits --data photos/
    """
    from convlens import explore as package

    package.check_installed("explore")
    from convlens.explore import server

    server.explore(
        runs or [],
        data=data or [],
        port=port,
        host=host,
        allow_remote=allow_remote,
        token=token,
        open_browser=not no_open,
        device=device,
    )
