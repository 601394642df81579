"""The command `look`, which shows the inside of networks."""

from __future__ import annotations

from typing import Annotated

import typer

from convlens.cli.shared import Command, Device, Figures, Json, app, listed, print_json

LAYERS = "Layers"
EVIDENCE = "Attribution"
SETS = "Over a set of images"

What = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN... [IMAGE]...",
        help="Runs, or networks of torchvision or timm (NAME[:WEIGHTS]); then images: files, "
        "test:17, worst:5, class:NAME:3.",  # :cat: would become an emoji
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="Layers to show; by default the stem and each block.",
        rich_help_panel=LAYERS,
    ),
]
Order = Annotated[
    str,
    typer.Option(
        metavar="active|index",
        help="Order of channels: the most active first, or by index.",
        rich_help_panel=LAYERS,
    ),
]
Channels = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Number of channels to show per layer.", rich_help_panel=LAYERS
    ),
]
Filters = Annotated[
    str | None,
    typer.Option(
        metavar="first|LAYER,...",
        help="Show the kernels of the first or any other convolution.",
        rich_help_panel=LAYERS,
    ),
]
TopImages = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER,...",
        help="Show the images that activate each channel most.",
        rich_help_panel=LAYERS,
    ),
]
Dream = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER[:CHANNEL,...]",
        help="Optimize inputs that activate the channels (activation maximization).",
        rich_help_panel=LAYERS,
    ),
]
Attribution = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD,...|all",
        help="Attribution maps: grad-cam, grad-cam++, integrated-gradients, occlusion.",
        rich_help_panel=EVIDENCE,
    ),
]
Class = Annotated[
    str | None,
    typer.Option(
        "--class",
        metavar="NAME",
        help="Class to explain; by default the predicted one.",
        rich_help_panel=EVIDENCE,
    ),
]
CamLayer = Annotated[
    str | None,
    typer.Option(metavar="LAYER", help="Layer for Grad-CAM.", rich_help_panel=EVIDENCE),
]
Sanity = Annotated[
    bool,
    typer.Option(
        "--sanity",
        help="Check the maps: randomize the weights; delete and insert the marked pixels.",
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
    typer.Option("--untrained", help="Also measure an untrained network.", rich_help_panel=SETS),
]
Embedding = Annotated[
    str | None,
    typer.Option(metavar="pca|tsne", help="Map of the penultimate features.", rich_help_panel=SETS),
]
Nearest = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="K",
        help="Show the K nearest training images of each image.",
        rich_help_panel=SETS,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="test|val|train",
        help="Split to read images from; by default val. A use of test is logged.",
        rich_help_panel=SETS,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA", help="Another data set instead of the run's own.", rich_help_panel=SETS
    ),
]


@app.command(cls=Command)
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
    seed: Annotated[int, typer.Option(metavar="N", help="Seed for random choices.")] = 0,
    device: Device = None,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Look inside networks: activations, filters, attribution maps, measurements of stages.

    Examples:
        convlens look RUN
        convlens look RUN OTHER cat.png worst:3
        convlens look resnet18:default cat.png
        convlens look RUN --filters first
        convlens look RUN test:17 --attribution all
        convlens look RUN OTHER --measure all
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
