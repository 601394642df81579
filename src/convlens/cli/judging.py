"""Commands that judge runs: `compare diagnose labels report`."""

from __future__ import annotations

from typing import Annotated

import typer

from convlens.cli.shared import (
    Command,
    DataSet,
    Device,
    Figures,
    Json,
    Overrides,
    RunName,
    Split,
    app,
    print_json,
)


@app.command(cls=Command)
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN...", help="Names or folders of runs, or model files."),
    ],
    split: Split = "test",
    data: DataSet = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Compare even if images or classes differ (no significance test).",
        ),
    ] = False,
    device: Device = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Compare runs with the first one: a table, and a significance test for each.

    Runs that differ only in their seeds form one group. A comparison on the test set is logged as a
    use of it.

    Examples:
        convlens compare resnet18 resnet18-noaug
        convlens compare resnet18 resnet18-noaug --split val
    """
    from convlens.comparing import comparison
    from convlens.showing.comparison import compared

    result = comparison.compare(runs, split, data=data, force=force, on=device)
    if not as_json:
        compared(result)
    print_json(as_json, result.to_dict())


@app.command(cls=Command)
def diagnose(run: RunName, device: Device = None, as_json: Json = False) -> None:
    """Diagnose a run: overfitting, learning rate, dead layers, slow loading and more.

    Reads the learning curves and evaluates some training and validation images. The test set is not
    used.

    Examples:
        convlens diagnose mnist
    """
    from convlens import run as runs
    from convlens.diagnosing import diagnosis
    from convlens.showing.diagnosis import diagnosed

    result = diagnosis.diagnose(runs.find(run), on=device)
    if not as_json:
        diagnosed(result)
    print_json(as_json, result.to_dict())


@app.command(cls=Command)
def labels(
    what: Annotated[
        str,
        typer.Argument(
            metavar="DATA|RUN|RECIPE", help="Data set, or a run or recipe that uses it."
        ),
    ],
    overrides: Overrides = None,
    data: DataSet = None,
    folds: Annotated[
        int, typer.Option(min=2, metavar="K", help="Number of models; each one judges one fold.")
    ] = 5,
    test: Annotated[
        bool, typer.Option("--test", help="Also check the labels of the test set (this uses it).")
    ] = False,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the runs.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train the models again.")] = False,
    device: Device = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Find labels that are probably wrong: a sheet of images and a CSV file to correct.

    Trains one model for each fold; it judges the images that it was not trained on.

    Examples:
        convlens labels photos/
        convlens labels photos/ train.epochs=10 --folds 3
    """
    from convlens.labelling import finding as labelling
    from convlens.showing.labels import suspected

    report = labelling.find_label_errors(
        what, overrides or [], data=data, folds=folds, test=test, name=name, fresh=fresh, on=device
    )
    if not as_json:
        suspected(report)
    print_json(as_json, report.to_dict())


@app.command(cls=Command)
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Names or folders of runs, or model files."),
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Output file.")
    ] = None,
    audit: Annotated[
        bool | None,
        typer.Option(
            "--audit/--no-audit",
            help="Include an audit of all images; by default for small data sets.",
        ),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write an HTML page about a run, or one that compares several runs.

    The page is a single file. It shows the test set only if the run has used it before.

    Examples:
        convlens report resnet18
        convlens report resnet18 resnet18-noaug -o comparison.html
    """
    from convlens.reporting import building
    from convlens.showing.results import reported

    page = building.report(runs, output=output, audit=audit, on=device)
    if not as_json:
        reported(page)
    print_json(as_json, page.to_dict())
