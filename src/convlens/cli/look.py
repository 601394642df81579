"""The command `look`, which shows activations and measurements of networks, and its output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from convlens.cli import completion
from convlens.cli.common import (
    Command,
    DeviceOption,
    Figures,
    JsonOption,
    MaxPixelsOption,
    TrustCode,
    app,
    parse_data,
    print_json,
    split_commas,
    split_data_keys,
)
from convlens.cli.results import make_table, stdout_console
from convlens.utils.console import print_status

if TYPE_CHECKING:
    from convlens.interpret.attribution import Attributions, ModelAttributions
    from convlens.interpret.attribution_sanity import SanityReport
    from convlens.interpret.embedding import Embedding, NeighborReport
    from convlens.interpret.look import Look
    from convlens.interpret.measure import CKAResult, Measurements
    from convlens.interpret.stage_metrics import MetricValue


# Titles of the panels of options.
QUESTIONS = "Ready-made views"
LAYERS = "Fine control: layers"
ATTRIBUTION = "Fine control: heat maps"
IMAGE_SETS = "Fine control: many images"

METHODS = ("grad-cam", "grad-cam++", "integrated-gradients", "occlusion")
FILES_LISTED = 8  # figures that are listed by name
MEASURE_HEADINGS = {
    "probe": "probe %",
    "separability": "nearest mean %",
    "picture": "picture R² %",
    "rank": "rank",
    "sparsity": "sparsity %",
    "blank": "blank %",
    "dead": "dead+nearly/channels",
    "fineness": "fineness",
}

NetworksArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN... [IMAGE]... [KEY=VALUE]...",
        help="Trained models, or networks of torchvision or timm (NAME[:WEIGHTS]); then images: "
        "files, val:17, worst:5 (the most confident mistakes on test images), class:NAME:3; then "
        "how to read DATA. Default: a few validation images.",
        autocompletion=completion.complete_run_or_image,
    ),
]
WhyOption = Annotated[
    bool,
    typer.Option(
        "--why",
        help="Why this class? Heat maps by all methods, and tests whether they can be trusted.",
        rich_help_panel=QUESTIONS,
    ),
]
InsideOption = Annotated[
    bool,
    typer.Option(
        "--inside",
        help="What happens inside? Activations of every block, and the filters of the first layer.",
        rich_help_panel=QUESTIONS,
    ),
]
KnowsOption = Annotated[
    bool,
    typer.Option(
        "--knows",
        help="What does each block know? All measurements over many images (--measure all).",
        rich_help_panel=QUESTIONS,
    ),
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="Layers to show. Default: the stem and each block.",
        rich_help_panel=LAYERS,
    ),
]
OrderOption = Annotated[
    str,
    typer.Option(
        metavar="active|index",
        help="Order of channels: most active first, or by index.",
        autocompletion=lambda incomplete: completion.one_of(incomplete, "active", "index"),
        rich_help_panel=LAYERS,
    ),
]
ChannelsOption = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Number of channels to show of each layer.", rich_help_panel=LAYERS
    ),
]
FiltersOption = Annotated[
    str | None,
    typer.Option(
        metavar="first|LAYER,...",
        help="Draw the kernels of the first or another convolution.",
        rich_help_panel=LAYERS,
    ),
]
TopImagesOption = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER,...",
        help="Images of a split that activate each channel most.",
        rich_help_panel=LAYERS,
    ),
]
DreamOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER[:CHANNEL,...]",
        help="Synthesize inputs that activate the channels (feature visualization).",
        rich_help_panel=LAYERS,
    ),
]
AttributionOption = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD,...|all",
        help="Heat maps of the pixels that support a class: grad-cam, grad-cam++, "
        "integrated-gradients, occlusion.",
        autocompletion=lambda incomplete: completion.list_of(incomplete, "all", *METHODS),
        rich_help_panel=ATTRIBUTION,
    ),
]
ClassOption = Annotated[
    str | None,
    typer.Option(
        "--class",
        metavar="NAME",
        help="Class to explain. Default: the predicted one.",
        autocompletion=completion.complete_class,
        rich_help_panel=ATTRIBUTION,
    ),
]
CamLayerOption = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER",
        help="Layer of Grad-CAM. Default: the deepest with maps of 3x3 pixels or more.",
        rich_help_panel=ATTRIBUTION,
    ),
]
SanityOption = Annotated[
    bool,
    typer.Option(
        "--sanity",
        help="Test whether the maps can be trusted: with random weights, and by deleting and "
        "inserting the marked pixels.",
        rich_help_panel=ATTRIBUTION,
    ),
]
MeasureOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...|all",
        help="Measure each block: probe (linear probe of the class), separability, picture "
        "(reconstruction), rank, sparsity, blank, dead (channels), fineness, similarity (CKA).",
        autocompletion=lambda incomplete: completion.list_of(
            incomplete, "all", *MEASURE_HEADINGS, "similarity"
        ),
        rich_help_panel=IMAGE_SETS,
    ),
]
UntrainedOption = Annotated[
    bool,
    typer.Option(
        "--untrained",
        help="Also measure the same network with random weights.",
        rich_help_panel=IMAGE_SETS,
    ),
]
EmbeddingOption = Annotated[
    str | None,
    typer.Option(
        metavar="pca|tsne",
        help="Map of the features before the head, in two dimensions.",
        autocompletion=lambda incomplete: completion.one_of(incomplete, "pca", "tsne"),
        rich_help_panel=IMAGE_SETS,
    ),
]
NearestOption = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="K",
        help="The K training images that are most similar to each image.",
        rich_help_panel=IMAGE_SETS,
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        metavar="test|val|train",
        help="Images to read. Default: val. What is shown of test images is logged as a use of "
        "them.",
        autocompletion=lambda incomplete: completion.one_of(incomplete, "test", "val", "train"),
        rich_help_panel=IMAGE_SETS,
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Other images than those of the run, or their new folder if they have moved.",
        autocompletion=completion.complete_data,
        rich_help_panel=IMAGE_SETS,
    ),
]


@app.command(cls=Command)
def look(
    names: NetworksArgument,
    why: WhyOption = False,
    inside: InsideOption = False,
    knows: KnowsOption = False,
    layers: LayersOption = None,
    order: OrderOption = "active",
    channels: ChannelsOption = None,
    filters: FiltersOption = None,
    top_images: TopImagesOption = None,
    dream: DreamOption = None,
    attribution: AttributionOption = None,
    class_: ClassOption = None,
    cam_layer: CamLayerOption = None,
    sanity: SanityOption = False,
    measure: MeasureOption = None,
    untrained: UntrainedOption = False,
    embedding: EmbeddingOption = None,
    nearest: NearestOption = 0,
    split: SplitOption = None,
    data: DataOption = None,
    max_pixels: MaxPixelsOption = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed.")] = 0,
    device: DeviceOption = None,
    trust_code: TrustCode = False,
    figures: Figures = None,
    as_json: JsonOption = False,
) -> None:
    """See what a network sees: activations of every block, filters, heat maps, measurements.

    Without options it draws the activations. Several models are drawn side by side.

    Examples:
        convlens look RUN
        convlens look RUN cat.png --why
        convlens look RUN OTHER --knows
        convlens look resnet18:default cat.png --inside
        convlens look RUN val:17 --attribution grad-cam --class dog
        convlens look RUN --top-images layer4 --split val
        convlens look RUN worst:3 --data new.csv data.images=photos
    """
    from convlens.interpret import inputs, look as interpret_look

    names, keys = split_data_keys(names)
    dataset = parse_data(data, keys)
    options = interpret_look.LookOptions(
        layers=split_commas(layers),
        order=order,
        channels=channels,
        filters=split_commas(filters),
        top_images=split_commas(top_images),
        dream=dream or (),
        attribution=split_commas(attribution),
        target=class_,
        cam_layer=cam_layer,
        sanity=sanity,
        measure=split_commas(measure),
        untrained=untrained,
        embedding=split_commas(embedding),
        nearest=nearest,
        split=split,
        data=dataset,
        max_pixels=max_pixels,
        seed=seed,
    )
    chosen = {"why": why, "inside": inside, "knows": knows}
    options = options.with_views([view for view, is_chosen in chosen.items() if is_chosen])
    options.check(names)
    opened = inputs.open_look_inputs(
        names,
        device=device,
        examples=options.num_examples,
        data=dataset,
        max_pixels=max_pixels,
    )
    result = interpret_look.look(opened, options)
    if not as_json:
        print_look(result)
    print_json(as_json, result.to_dict())


def print_look(result: Look) -> None:
    """Print the predictions for each image, the activity of each layer and the files."""
    from convlens.interpret.activations import describe_prediction, describe_truth

    out = stdout_console()
    names = result.opened.names
    if result.seen:
        table = make_table("image", "truth", *map(escape, names))
        for networks in result.seen:
            truth = escape(describe_truth(networks) or "?")
            predictions = [escape(describe_prediction(each)) for each in networks]
            table.add_row(escape(networks[0].picture.name), truth, *predictions)
        out.print(table)
        for index, name in enumerate(names):
            _print_layers(result, index, name)
    for top in result.top_images:
        channels = f"{top.silent:,} of {len(top.selectivity):,} channels"
        same = f"have the same value for all {len(top.labels):,} images"
        out.print(f"{escape(top.run)} {escape(top.layer)}: {channels} {same}")
    for made in result.made:
        for index, channel in enumerate(made.channels):
            best = f", best image {made.best[index]:.4g}" if made.best else ""
            out.print(
                f"{escape(made.run)} {escape(made.layer)} channel {channel}: made input "
                f"{made.peaks[index]:.4g}{best}"
            )
    printed: list[Path] = []
    if result.attribution is not None:
        print_attributions(result.attribution)
        printed += [result.attribution.figure, *result.attribution.sanity_figures]
    if result.measures is not None:
        print_measurements(result.measures)
        printed += result.measures.files
    for embedding in result.embeddings:
        print_embeddings(embedding)
        printed.append(embedding.file)
    for neighbors in result.neighbors:
        print_neighbors(neighbors)
        printed.append(neighbors.file)
    figures = [path for path in result.files if path.suffix == ".png" and path not in printed]
    for path in figures[:FILES_LISTED]:
        out.print(escape(f"plot   {path}"))
    count = len(result.files)
    files = f"all {count} files" if count > 1 else "1 file"
    out.print(escape(f"{files} in  {result.opened.folder}"))


def _print_layers(result: Look, index: int, name: str) -> None:
    """Print blank channels and activity of each layer of one network, as means over the images."""
    seen = [networks[index] for networks in result.seen]
    count = len(seen)
    suffix = "" if count == 1 else f", mean of {count} images"
    table = make_table("layer", "channels", "map", "blank", "mean", "active", title=name + suffix)
    broken = 0
    for rows in zip(*(each.numbers() for each in seen), strict=True):
        first = rows[0]
        broken += sum(row.broken for row in rows)
        means = [row.mean for row in rows if row.mean is not None]
        shares = [row.active for row in rows if row.active is not None]
        table.add_row(
            escape(first.layer),
            f"{first.channels:,}",
            f"{first.height}×{first.width}",
            f"{sum(row.blank for row in rows) / count:,.4g}",
            f"{sum(means) / len(means):.4g}" if means else "NaN",
            f"{sum(shares) / len(shares):.1%}" if shares else "NaN",
        )
    stdout_console().print(table)
    if broken:
        print_status(
            f"[yellow]warning[/]  {escape(name)}: channels with NaN or infinite values are "
            "marked in the figures and excluded from means and scales"
        )


def print_measurements(result: Measurements) -> None:
    """Print a table for each network, with a row for each stage; definitions go to stderr."""
    out = stdout_console()
    names = result.measures
    for network in result.networks:
        fitted = f", fitted on {network.learned:,}" if network.learned else ""
        images = f"{network.n:,} {network.split} images of {network.data}{fitted}"
        if names:
            table = make_table("stage", *(MEASURE_HEADINGS.get(name, name) for name in names))
            for stage, values in network.stages.items():
                broken = stage in network.broken
                cells = ["NaN" if broken else _measure_cell(name, values[name]) for name in names]
                table.add_row(escape(stage), *cells)
            out.print(f"[bold]{escape(network.name)}[/]: {escape(images)}")
            out.print(table)
    for cka in result.similarity:
        _print_similarity(cka)
    for name, texts in result.to_dict()["measures"].items():
        heading = MEASURE_HEADINGS.get(name, name)
        definition = f"{heading}: {texts['title']}; {texts['definition']}"
        print_status(f"[dim]{escape(definition)}[/]")
    for network in result.networks:
        if network.broken:
            warning = f"{network.name}: NaN or infinite activations in {', '.join(network.broken)}"
            print_status(f"[yellow]{escape(warning)}[/]")
    for file in result.files:
        out.print(escape(f"written  {file}"))


def _print_similarity(cka: CKAResult) -> None:
    """Print linear CKA of each stage with the stage of the same name in the first network."""
    index_of = {key: index for index, key in enumerate(cka.stages)}
    first, *others = dict.fromkeys(network for network, _ in cka.stages)
    stages = [stage for network, stage in cka.stages if network == first]
    shared = [name for name in others if any((name, stage) in index_of for stage in stages)]
    if not shared:
        return
    table = make_table("stage", *map(escape, shared))
    for stage in stages:
        row = cka.matrix[index_of[first, stage]]
        values = [
            row[index_of[name, stage]] if (name, stage) in index_of else None for name in shared
        ]
        table.add_row(escape(stage), *("-" if v is None else f"{v:.2f}" for v in values))
    out = stdout_console()
    out.print(f"linear CKA with the same stage of [bold]{escape(first)}[/], n = {cka.n:,}")
    out.print(table)


def _measure_cell(name: str, value: MetricValue) -> str:
    """Format the value of a measure with its interval."""
    if value.value is None:
        return "-"
    if name == "dead":
        counts = value.details
        return f"{counts['dead']}+{counts['nearly_dead']}/{counts['channels']}"
    scale, digits = (1, 1) if name == "rank" else (1, 3) if name == "fineness" else (100, 1)
    text = f"{scale * value.value:.{digits}f}"
    if value.interval95 is not None:
        low, high = value.interval95
        text += f" ({scale * low:.{digits}f}-{scale * high:.{digits}f})"
    return text


def print_embeddings(result: Embedding) -> None:
    """Print the method of an embedding and the paths of its files."""
    wrong = int((result.labels != result.preds).sum())
    out = stdout_console()
    out.print(
        f"[bold]{escape(result.run)}[/]: {len(result.ids):,} {result.split} images of "
        f"{escape(result.data)}, {wrong:,} mistakes; {escape(result.words)}"
    )
    for file in result.to_dict()["files"]:
        out.print(escape(f"written  {file}"))


def print_neighbors(result: NeighborReport) -> None:
    """Print the nearest training images of each image; identical ones are marked."""
    out = stdout_console()
    for image in result.found:
        label = f", labeled {image.label}" if image.label is not None else ""
        out.print(escape(f"{image.image}: predicted {image.prediction}{label}"))
        table = make_table("training image", "class", "cosine distance", "")
        for near in image.neighbors:
            table.add_row(escape(near.id), escape(near.label), f"{near.distance:.4f}", near.same)
        out.print(table)
    out.print(escape(f"written  {result.file}"))


def print_attributions(result: Attributions) -> None:
    """Print the class and probability of each image, the sanity checks and the files."""
    out = stdout_console()
    for model in result.models:
        _print_attributed_images(model)
        if model.sanity is not None:
            _print_sanity(model.sanity)
    out.print(escape(f"maps    {result.figure}\narrays  {result.arrays}"))
    for path in result.sanity_figures:
        out.print(escape(f"checks  {path}"))


def _print_attributed_images(model: ModelAttributions) -> None:
    layer = f"; Grad-CAM in {model.layer}, {model.side}x{model.side}" if model.layer else ""
    table = make_table("image", "truth", "predicted", "maps of", title=escape(model.name + layer))
    for each in model.to_dict()["images"]:
        predicted = f"{each['predicted']} {each['predicted_probability']:.1%}"
        explained = f"{each['class']} {each['probability']:.1%}"
        table.add_row(*map(escape, (each["image"], each["truth"] or "", predicted, explained)))
    stdout_console().print(table)


def _print_sanity(sanity: SanityReport) -> None:
    """Print a row for each method, and one for a random order of cells."""
    table = make_table("method", "correlation with random weights", "deletion", "insertion")
    for each in sanity.methods.values():
        fully_random = list(each.spearman.values())[-1]
        areas = (str(each.areas[order]) for order in ("deletion", "insertion"))
        table.add_row(escape(each.title), str(fully_random), *areas)
    areas = (str(sanity.random_areas[order]) for order in ("deletion", "insertion"))
    table.add_row("random order", "", *areas)
    out = stdout_console()
    out.print(table)
    out.print(
        "rank correlation of the maps (0: the map depends on the weights) · area under the "
        "probability curve (good: low for deletion, high for insertion) · 95% intervals over images"
    )
    for each in sanity.methods.values():
        for sentence in each.sentences():
            out.print(escape(sentence))
