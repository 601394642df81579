"""The command `explore`, which serves a local page about runs."""

from __future__ import annotations

from typing import Annotated

import typer

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
            help="Names or folders of runs, or model files; by default all runs here.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA", help="Data set to show beside those of the runs; may be repeated."
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            metavar="N",
            help="Port; by default a free one.",
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
            help="Let other machines use the page, without encryption: needs --host and --token.",
        ),
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Secret in the URL; by default a random one."),
    ] = None,
    device: DeviceOption = None,
    trust_code: TrustCode = False,
) -> None:
    """Open a page in the browser that shows what models make of images.

    The page is served on this machine only. Its URL is printed; Ctrl-C ends it.

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
