"""Looking inside networks: `look`, whose options are many."""

from __future__ import annotations

from typing import Annotated

import typer

from convlens.cli.shared import Device, Figures, Json, app, listed, print_json

LAYERS = "Layers"
EVIDENCE = "Where the evidence is"
SETS = "Over a set of images"

What = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN... [IMAGE]...",
        help="Runs, or networks of torchvision or timm (NAME[:WEIGHTS]); then files, test:17, "
        "worst:5, class:NAME:3.",  # :cat: would become an emoji
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...", help="By default the stem and each block.", rich_help_panel=LAYERS
    ),
]
Order = Annotated[
    str,
    typer.Option(help="Channels: active (most active first) or index.", rich_help_panel=LAYERS),
]
Channels = Annotated[
    int | None, typer.Option(min=1, help="How many to show of a layer.", rich_help_panel=LAYERS)
]
Filters = Annotated[
    str | None,
    typer.Option(
        metavar="first|LAYER,...",
        help="Kernels of the first convolution, or of any.",
        rich_help_panel=LAYERS,
    ),
]
TopImages = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER,...", help="Images that excite its channels most.", rich_help_panel=LAYERS
    ),
]
Dream = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER[:CHANNEL,...]",
        help="Make inputs that excite its channels.",
        rich_help_panel=LAYERS,
    ),
]
Attribution = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD,...|all",
        help="What speaks for a class: grad-cam, grad-cam++, integrated-gradients, occlusion.",
        rich_help_panel=EVIDENCE,
    ),
]
Class = Annotated[
    str | None,
    typer.Option(
        "--class",
        metavar="NAME",
        help="Which class; by default the predicted one.",
        rich_help_panel=EVIDENCE,
    ),
]
CamLayer = Annotated[
    str | None,
    typer.Option(metavar="LAYER", help="Where Grad-CAM is done.", rich_help_panel=EVIDENCE),
]
Sanity = Annotated[
    bool,
    typer.Option(
        "--sanity",
        help="Check the maps: do they depend on the weights, do their places matter?",
        rich_help_panel=EVIDENCE,
    ),
]
Measure = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...|all",
        help="Measure every stage: probe, picture, rank, dead, similarity and others.",
        rich_help_panel=SETS,
    ),
]
Untrained = Annotated[
    bool,
    typer.Option("--untrained", help="Measure fresh weights beside.", rich_help_panel=SETS),
]
Embedding = Annotated[
    str | None,
    typer.Option(metavar="pca|tsne", help="A map of the last features.", rich_help_panel=SETS),
]
Nearest = Annotated[
    int,
    typer.Option(
        min=0, metavar="K", help="The training images nearest to each image.", rich_help_panel=SETS
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="test|val|train",
        help="By default val; test is logged as a look at it.",
        rich_help_panel=SETS,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Another set than the run's own.", rich_help_panel=SETS),
]


@app.command()
def look(
    what: What,
    layers: Layers = None,
    order: Order = "active",
    channels: Channels = None,
    filters: Filters = None,
    top_images: TopImages = None,
    dream: Dream = None,
    attribution: Attribution = None,
    class_: Class = None,
    cam_layer: CamLayer = None,
    sanity: Sanity = False,
    measure: Measure = None,
    untrained: Untrained = False,
    embedding: Embedding = None,
    nearest: Nearest = 0,
    split: Split = None,
    data: Data = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    device: Device = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """See inside one or several networks: activations, filters, evidence, measurements.

    [dim]convlens look RUN · convlens look RUN RUN cat.png worst:3 · convlens look RUN --filters
    first · convlens look RUN test:17 --attribution all · convlens look RUN RUN --measure all[/]
    """
    from convlens.inspection import choosing, looking
    from convlens.showing.looks import looked

    asked = looking.Options(
        layers=listed(layers), order=order, channels=channels, filters=listed(filters),
        top_images=listed(top_images), dream=dream or (), attribution=listed(attribution),
        target=class_, cam_layer=cam_layer, sanity=sanity, measure=listed(measure),
        untrained=untrained, embedding=listed(embedding), nearest=nearest, split=split, data=data,
        seed=seed,
    )  # fmt: skip
    asked.check()
    opened = choosing.open_all(what, on=device, examples=asked.needs_images)
    found = looking.look(opened, asked)
    if not as_json:
        looked(found)
    print_json(as_json, found.to_dict())
