"""The command line: one thin sub-command for each name of the API.

Nothing that needs torch is imported before a command needs it. Results go to stdout, everything
else to stderr, so that `--json` prints one object and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from convlens.console import console, say
from convlens.errors import ConvlensError
from convlens.version import __version__

app = typer.Typer(
    name="convlens",
    help="Train, test and look inside convolutional image classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best there is by default.")
]
Tta = Annotated[
    str | None,
    typer.Option(
        metavar="VIEWS",
        help="Test-time augmentation beside the plain answer: flip or flip+shifts (also moved by "
        "a pixel for each 32). Mirror images must not change the class.",
    ),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, folder or model file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. optim.lr=0.1")
]
DataSet = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Built-in name, folder, CSV, or a folder under data/."),
]


@app.command()
def train(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE|FILE.yaml|DATA", help="What to train, on what.")
    ],
    overrides: Overrides = None,
    data: DataSet = None,
    settings: Annotated[
        str | None, typer.Option(metavar="all|NAME,...", help="Train these settings of the recipe.")
    ] = None,
    splits: Annotated[int, typer.Option(min=1, help="Train on that many splits of the data.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Train with that many seeds.")] = 1,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Cross-validate in that many folds; no test.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Find the epochs, train anew on all images, test that.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train anew in a new folder.")] = False,
    no_test: Annotated[bool, typer.Option("--no-test", help="Keep the test split sealed.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Only operations that repeat bit for bit.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a recipe, or the default one on your own images, and test it once.

    [dim]convlens train mnist · convlens train photos/ data.image_size=96 · convlens train digits
    --seeds 5 · convlens train digits --folds 5[/]
    """
    from convlens import asking, several, training
    from convlens.showing.results import finished
    from convlens.showing.runs import run_table

    changes = [*(overrides or []), *(["train.deterministic=true"] if deterministic else [])]
    options: dict[str, Any] = {"name": name, "fresh": fresh, "test": not no_test, "on": device}
    if settings is not None or splits > 1 or seeds > 1 or folds is not None or refit:
        variants = asking.read_settings(what, settings, data=data, overrides=changes)
        options |= {"splits": splits, "seeds": seeds, "folds": folds, "refit": refit}
        table = several.train_many(variants, **options)
        if not as_json:
            run_table(table)
        _print_json(as_json, table.to_dict())
        return
    asked = asking.read(what, data=data, overrides=changes)
    place = training.train(asked.recipe, plain=asked.plain, **options)
    if not as_json:
        finished(place)
    last = {} if no_test else _last(place.results())
    _print_json(as_json, {"run": place.name, "path": str(place.path), **last})


@app.command()
def evaluate(
    run: RunName,
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    data: DataSet = None,
    tta: Tta = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure a trained model on one of its splits, or on another data set."""
    from convlens import evaluation
    from convlens import run as runs
    from convlens.showing.results import evaluated

    place = runs.find(run)
    result = evaluation.evaluate(place, split, data=data, tta=tta, on=device)
    if not as_json:
        evaluated(result, place)
    _print_json(as_json, result.to_dict())


@app.command()
def predict(
    run: RunName,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Files, folders, globs, - (stdin)."),
    ] = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Classes to name.")] = 1,
    output: Annotated[str, typer.Option("--format", "-f", help="table, csv or json.")] = "table",
    tta: Tta = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Classify image files: a table, CSV or JSON of filename, label and probability."""
    from convlens import prediction, views
    from convlens import run as runs
    from convlens.errors import DataError
    from convlens.names import pick
    from convlens.showing.results import WRITERS

    write = pick(WRITERS, "json" if as_json else output, "format")
    views.chosen(tta)  # a typo is told before anything is read or written
    loaded = runs.load_model(runs.find(run).model_path)
    asked = paths or ["-"]
    listed = [line.strip() for line in sys.stdin if line.strip()] if "-" in asked else []
    files = prediction.expand([*(path for path in asked if path != "-"), *listed])
    answers = prediction.predict(loaded, files, top_k=top, tta=tta, on=device)
    failed = write(answers, top, tta is not None)
    if failed:
        raise DataError(
            f"{failed} of {len(files)} files could not be read; the others are done",
            fix="the reasons stand beside their names",
        )


@app.command()
def look(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [IMAGE]...",
            help="Runs, or networks of torchvision or timm (NAME[:WEIGHTS]); then files, test:17, "
            "worst:5, class:cat:3.",
        ),
    ],
    layers: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Layers; the stem and each block.")
    ] = None,
    order: Annotated[str, typer.Option(help="Channels: active (most active first) or index.")] = (
        "active"
    ),
    channels: Annotated[
        int | None, typer.Option(min=1, help="How many to show of a layer.")
    ] = None,
    filters: Annotated[
        str | None,
        typer.Option(
            metavar="first|LAYER,...", help="Kernels of the first convolution, or of any."
        ),
    ] = None,
    top_images: Annotated[
        str | None, typer.Option(metavar="LAYER,...", help="Images that excite its channels most.")
    ] = None,
    dream: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER[:CHANNEL,...]", help="Make inputs that excite its channels."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of --top-images: test, val or train.")] = "test",
    data: DataSet = None,
    seed: Annotated[int, typer.Option(help="Of --dream.")] = 0,
    output: Annotated[str, typer.Option("--format", "-f", help="png, svg or pdf.")] = "png",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """See what the layers of one or several networks make of images.

    [dim]convlens look RUN · convlens look RUN RUN cat.png worst:3 · convlens look RUN --filters
    first --top-images layer3.1[/]
    """
    from convlens.inspection import choosing, looking
    from convlens.showing.looks import looked

    asked = looking.Options(
        layers=_listed(layers), order=order, channels=channels, filters=_listed(filters),
        top_images=_listed(top_images), dream=dream or (), split=split, data=data, format=output,
        seed=seed,
    )  # fmt: skip
    asked.check()
    opened = choosing.open_all(what, on=device, examples=bool(layers) or not asked.only)
    found = looking.look(opened, asked)
    if not as_json:
        looked(found)
    _print_json(as_json, found.to_dict())


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
    _print_json(as_json, page.to_dict())


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
    _print_json(as_json, result.to_dict())


@app.command()
def doctor(run: RunName, device: Device = None, as_json: Json = False) -> None:
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
    _print_json(as_json, result.to_dict())


@app.command()
def data(
    name: Annotated[str, typer.Argument(metavar="NAME_OR_FOLDER", help="What to look at.")],
    overrides: Overrides = None,
    augment: Annotated[
        str | None,
        typer.Option(metavar="RECIPE|FILE.yaml", help="Only draw a batch as that recipe augments."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at a data set before training: counts, sizes, bad files, duplicates, a contact sheet."""
    from convlens import asking, picturing
    from convlens.data.audit import audit
    from convlens.showing.results import audited, drawn

    if augment is not None:
        asked = asking.read_on(augment, name, overrides or [])
        batch = picturing.augmented_sheet(asked)
        if not as_json:
            drawn(batch)
        found = {"data": name, "recipe": asked.name, "augmented_batch": str(batch)}
        _print_json(as_json, found)
        return
    report = audit(asking.read_data(name, overrides or []))
    sheet = picturing.data_sheet(report)
    if not as_json:
        audited(report, sheet)
    _print_json(as_json, {**report.to_dict(), "contact_sheet": str(sheet)})


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
    _print_json(as_json, report.to_dict())


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One recipe.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one as a file that trains as it stands."""
    from convlens import recipe as store
    from convlens.showing.results import recipe_table

    if name is not None:
        text = store.text(name)
        if as_json:
            _print_json(True, store.load(name).model_dump(mode="json") | store.variants(name))
        else:
            sys.stdout.write(text)
        return
    every = {each: store.load(each) for each in store.names()}
    if as_json:
        _print_json(True, {each: recipe.about for each, recipe in every.items()})
    else:
        recipe_table(every, {each: store.settings(each) for each in every})


def _listed(text: str | None) -> list[str]:
    return [each.strip() for each in (text or "").split(",") if each.strip()]


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"convlens {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Train, test and look inside convolutional image classifiers."""
    if debug:
        os.environ["CONVLENS_DEBUG"] = "1"


def _print_json(wanted: bool, content: Any) -> None:
    if wanted:
        sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")


def _last(results: list[dict[str, Any]]) -> dict[str, Any]:
    return results[-1] if results else {}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and ends the process with the documented exit code.

    typer itself ends with 2 for a wrong option and with 130 for Ctrl-C.
    """
    try:
        app(args=arguments)
    except ConvlensError as error:
        if os.environ.get("CONVLENS_DEBUG"):
            raise
        _show(error)
        sys.exit(error.exit_code)
    sys.exit(0)


def _show(error: ConvlensError) -> None:
    label = "stopped" if error.exit_code == 75 else "error"
    say(f"[bold red]{label}:[/] {escape(error.what)}")
    if error.where:
        say(f"  where: {escape(error.where)}")
    if error.fix:
        say(f"  do:    {escape(error.fix)}")
    console().file.flush()


if __name__ == "__main__":
    main()
