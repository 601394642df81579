"""The sections of a page that look inside the network: activations, evidence, what stages know."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from convlens.device import Plan
from convlens.inference import placed
from convlens.inspection import activity, attribution, drawing, measuring
from convlens.inspection.choosing import telling
from convlens.inspection.subjects import Picture, Subject
from convlens.reporting.contents import Contents
from convlens.reporting.page import Figure

RIGHT = 2  # images that are classified correctly, of different classes; beside the worst mistake
METHODS = ("grad-cam", "integrated-gradients")
# So many images are measured, and learned from: some seconds for a ResNet-18 at 32 px.
MEASURED, LEARNED = 500, 1000
MEASURES = ("probe", "picture", "rank", "dead")
CHANNELS = 32  # shown of each layer
FOLDER = "report"  # not `look`, whose finer measurements and maps of other images are to stay


def activations(found: Contents) -> Sequence[Figure]:
    """What the stem and each block give for some images."""
    subject = _subject(found)
    if subject is None:
        return ()
    (names,) = activity.check_layers([subject], ())
    made = []
    for picture in _pictures(found):
        seen = activity.see(subject, picture, names)
        title = f"{found.name}, {picture.name}"
        figure = drawing.activation_figure(seen, title, channels=CHANNELS)
        said = f"{picture.name}: {drawing.said(seen)}"
        blank = ", ".join(f"{n.layer} {n.blank} of {n.channels}" for n in seen.numbers())
        made.append(Figure(figure, f"Activations for {said}", f"{said}. Blank channels: {blank}."))
    return made


def attributions(found: Contents) -> Sequence[Figure]:
    """Which pixels speak for what the network says."""
    subject, pictures = _subject(found), _pictures(found)
    if subject is None or not pictures:
        return ()
    folder = found.place.plots / FOLDER
    maps = attribution.attribute([subject], [pictures], METHODS, folder=folder, quiet=True)
    layer = maps.models[0].layer
    words = f"Grad-CAM at {layer}, and integrated gradients, for the class that was predicted."
    names = ", ".join(picture.name for picture in pictures)
    return [Figure(maps.figure.read_bytes(), f"Attribution maps for {names}", words)]


def stages(found: Contents) -> Sequence[Figure]:
    """What can be read off each stage: the class, the picture, how many directions it uses."""
    subject = _subject(found)
    if subject is None:
        return ()
    if not len(subject.data.val):
        found.missing.append("The stages were not measured: the run held no validation images out.")
        return ()
    result = measuring.measure(
        [subject], MEASURES, folder=found.place.plots / FOLDER, images=MEASURED,
        learn_from=LEARNED, quiet=True,
    )  # fmt: skip
    words = (
        f"On {MEASURED:,} validation images at most; probes and decoders learned on {LEARNED:,} "
        "training images. `convlens look RUN --measure all` measures more, on more."
    )
    return [
        Figure(path.read_bytes(), f"Measurements of the stages of {found.name}", words)
        for path in result.files
        if path.name == "measures.png"
    ]


def _subject(found: Contents) -> Subject | None:
    """The run as something to look into; None without its weights or images."""
    if found.loaded is None or found.images is None or found.answers is None:
        return None
    plan: Plan = placed(found.loaded.model, found.device)
    return Subject(found.name, found.loaded, plan, found.place)


def _pictures(found: Contents) -> list[Picture]:
    """Images of the judged split: right ones of the first classes, then the surest mistake."""
    if found.answers is None or found.images is None:
        return []
    labels = found.answers.labels
    places = telling(found.answers.chances, labels, RIGHT)
    pixels = found.images.rows.gather(torch.tensor(places, dtype=torch.int64))
    return [
        Picture(f"{found.split}:{place}", image, int(labels[place]))
        for place, image in zip(places, pixels, strict=True)
    ]
