"""Commands that judge runs: `compare diagnose labels report`."""

from __future__ import annotations

from typing import Annotated

import typer

from convlens.cli.shared import (
    DataSet,
    Device,
    Figures,
    Json,
    Overrides,
    RunName,
    app,
    print_json,
)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN RUN...", help="Runs, folders or model files.")
    ],
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    data: DataSet = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on with different images or classes, untested.")
    ] = False,
    device: Device = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Put runs side by side and say which can be told apart from the first.

    [dim]Runs that differ only in their seeds are taken together. Each look at the test split is
    logged, as by evaluate.[/]
    """
    from convlens.comparing import comparison
    from convlens.showing.comparison import compared

    result = comparison.compare(runs, split, data=data, force=force, on=device)
    if not as_json:
        compared(result)
    print_json(as_json, result.to_dict())


@app.command()
def diagnose(run: RunName, device: Device = None, as_json: Json = False) -> None:
    """Say what is going on in a run: over- or underfitting, learning rate, dead layers, data, ...

    [dim]Reads the curves and looks at some training and validation images; the test split stays
    sealed.[/]
    """
    from convlens import run as runs
    from convlens.diagnosing import diagnosis
    from convlens.showing.diagnosis import diagnosed

    result = diagnosis.diagnose(runs.find(run), on=device)
    if not as_json:
        diagnosed(result)
    print_json(as_json, result.to_dict())


@app.command()
def labels(
    what: Annotated[
        str, typer.Argument(metavar="DATA|RUN|RECIPE", help="The images, or what trained on them.")
    ],
    overrides: Overrides = None,
    data: DataSet = None,
    folds: Annotated[int, typer.Option(min=2, help="How many models; each judges a fold.")] = 5,
    test: Annotated[
        bool, typer.Option("--test", help="Judge the test split's labels, too: opens it.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the runs.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train the models anew.")] = False,
    device: Device = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Find labels that are probably wrong: a ranked sheet of pictures and a CSV to correct.

    Trains as many models as folds, each judges the images it didn't train on.

    [dim]convlens labels photos/ · convlens labels photos/ train.epochs=10 --folds 3[/]
    """
    from convlens.labelling import finding as labelling
    from convlens.showing.labels import suspected

    report = labelling.find_label_errors(
        what, overrides or [], data=data, folds=folds, test=test, name=name, fresh=fresh, on=device
    )
    if not as_json:
        suspected(report)
    print_json(as_json, report.to_dict())


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Names, folders or model files of runs.")
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write the page.")
    ] = None,
    audit: Annotated[
        bool | None,
        typer.Option("--audit/--no-audit", help="Look at every image of the data set, too."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about a run, or one that compares several.

    [dim]The test split is shown only if it was looked at before; the audit is made by default
    where there are few images.[/]
    """
    from convlens.reporting import building
    from convlens.showing.results import reported

    page = building.report(runs, output=output, audit=audit, on=device)
    if not as_json:
        reported(page)
    print_json(as_json, page.to_dict())
