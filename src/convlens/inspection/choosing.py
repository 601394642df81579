"""What a command is about: its arguments as networks and images, and where its files go."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from convlens import device, run
from convlens.data.decode import EXTENSIONS, fit_images
from convlens.errors import ModelFileError, UsageError
from convlens.inference import batch_logits
from convlens.inspection.subjects import Picture, Subject, choose_pictures, is_place, open_subject
from convlens.picturing import worst_of
from convlens.system.console import print_status

SAMPLE = 512  # held-out images among which examples are looked for
EXAMPLES = 3  # classes that give one
LONGEST = 120  # characters of a folder's name


@dataclass(frozen=True)
class Opened:
    """Networks, the images they are shown, and the folder for what is made.

    `pictures` holds for each image one `Picture` a network, as its preprocessing has it; `slugs`
    and `names` are what files and figures call the networks and images.
    """

    subjects: list[Subject]
    pictures: list[tuple[Picture, ...]]
    folder: Path
    names: list[str]
    slugs: list[str]


@device.preserve_torch_settings()
def open_all(arguments: Sequence[str], *, on: str | None = None, examples: bool = True) -> Opened:
    """Opens the networks among the arguments and chooses the images that the others name.

    All that opens as a run or as a network of a library is one. Images out of a split are chosen
    by the first run, and the others see the same pixels.

    Args:
        examples: without any image, take some of the validation split: one that is classified
            correctly of each of three classes, and the surest mistake.

    Raises:
        UsageError, ModelFileError, DataError: what can't be opened or found.
    """
    runs = [text for text in arguments if not _is_image(text)]
    asked = [text for text in arguments if _is_image(text)]
    if not runs:
        raise UsageError(
            f"no run to look into, only images: {', '.join(asked[:3])}" if asked else "no run",
            fix="name a run first: convlens look RUN IMAGE...",
        )
    subjects = []
    for text in runs:
        _refuse_empty(text)
        subjects.append(open_subject(text, on=on))
    return Opened(
        subjects,
        _pictures(subjects, asked, examples),
        folder_of(subjects),
        different([subject.name for subject in subjects]),
        different([run.safe(subject.name) for subject in subjects]),
    )


def folder_of(subjects: Sequence[Subject]) -> Path:
    """`plots/<run>/look` for one network, `plots/look-<run>-<run>` for several."""
    if len(subjects) == 1:
        (one,) = subjects
        return (one.place.plots if one.place else run.PLOTS / run.safe(one.name)) / "look"
    name = "-".join(["look", *(run.safe(subject.name) for subject in subjects)])
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return run.PLOTS / name


def file_names(pictures: Sequence[tuple[Picture, ...]]) -> list[str]:
    """A name for the files of each image, no two alike."""
    return different([run.safe(Path(each[0].name).stem) for each in pictures])


def different(names: Sequence[str]) -> list[str]:
    """The same names, numbered from 2 where one was there before."""
    found: list[str] = []
    for name in names:
        number, free = 2, name
        while free in found:
            number, free = number + 1, f"{name}-{number}"
        found.append(free)
    return found


def _is_image(text: str) -> bool:
    """Whether an argument means images; a run's folder and a model file don't."""
    path = Path(text)
    if is_place(text):
        return True
    if os.path.isfile(path):
        return path.suffix not in (".safetensors", ".onnx", ".pt", ".pt2", ".pth")
    if _is_run(run.MODELS / text) or _is_run(path):
        return False
    return os.path.isdir(path) or path.suffix.lower() in EXTENSIONS or glob.has_magic(text)


def _is_run(folder: Path) -> bool:
    names = ("model.safetensors", "run.json", "state")
    return os.path.isdir(folder) and (
        folder.parent == run.MODELS or any((folder / name).exists() for name in names)
    )


def _refuse_empty(text: str) -> None:
    for folder in (run.MODELS / text, Path(text)):
        if _is_run(folder) and not (folder / "model.safetensors").is_file():
            raise ModelFileError(
                "this run has no weights yet",
                where=str(folder),
                fix="run its training command again: it goes on where it stopped",
            )


def _pictures(
    subjects: Sequence[Subject], asked: Sequence[str], examples: bool
) -> list[tuple[Picture, ...]]:
    # Images of a split come from the first network that has data of its own.
    home = next((subject for subject in subjects if subject.place), subjects[0])
    found: list[tuple[Picture, ...]] = []
    for text in asked:
        if is_place(text):
            chosen = choose_pictures(home, [text])
            found += [tuple(_seen_by(s, each, home) for s in subjects) for each in chosen]
        else:
            found += zip(*(choose_pictures(s, [text]) for s in subjects), strict=True)
    # `worst:3` may name what `test:6` named before.
    ids = [each[0].id for each in found]
    found = [each for i, each in enumerate(found) if ids[i] is None or ids[i] not in ids[:i]]
    if not asked and examples:
        chosen = example_pictures(home)
        found += [tuple(_seen_by(s, each, home) for s in subjects) for each in chosen]
    return found


def example_pictures(subject: Subject) -> list[Picture]:
    """Images that need no choosing: three right ones of different classes, a wrong one.

    Among 512 images spread evenly over the validation split (training images, where there is
    none): of the first three classes that have one the first that is classified correctly; and
    the mistake that is least likely to its truth.
    """
    held = subject.held_out()
    split = subject.split(held)
    index = torch.linspace(0, len(split) - 1, min(SAMPLE, len(split))).round().long()
    pixels, labels = split.rows.gather(index), split.labels[index]
    normalise = subject.loaded.preprocessing.normalise
    logits = torch.cat(
        [batch_logits(subject.model, part, normalise, subject.plan) for part in pixels.split(128)]
    ).cpu()
    places = telling(logits.double().softmax(1).nan_to_num(0).numpy(), labels.numpy(), EXAMPLES)
    print_status(
        f"no images named: of {len(index):,} {held} images one that {subject.name} gets right of "
        f"each of {EXAMPLES} classes, and its surest mistake"
    )
    return [Picture(f"{held}:{int(index[i])}", pixels[i], int(labels[i])) for i in places]


def telling(chances: np.ndarray, truths: np.ndarray, count: int) -> list[int]:
    """Places of the first right answer of each of the first `count` classes that have one, then
    of the surest mistake, by probabilities `[N, K]` and labels `[N]`.
    """
    right = np.flatnonzero(chances.argmax(1) == truths)
    _, first = np.unique(truths[right], return_index=True)  # by class, in their order
    return [*right[first][:count].tolist(), *worst_of(chances, truths)[:1].tolist()]


def _seen_by(subject: Subject, picture: Picture, home: Subject) -> Picture:
    """The picture as another network takes it: its size and channels, its number of the class."""
    mine, theirs = subject.loaded.preprocessing, home.loaded.preprocessing
    name = None if picture.label is None else home.classes[picture.label]
    label = subject.classes.index(name) if name in subject.classes else None
    pixels = picture.pixels
    if (mine.image_size, mine.channels) != (theirs.image_size, theirs.channels):
        array = fit_images(
            pixels[None].numpy(), size=mine.image_size, channels=mine.channels, fit=mine.fit
        )
        pixels = torch.from_numpy(array)[0]
    return Picture(picture.name, pixels, label, picture.id)
