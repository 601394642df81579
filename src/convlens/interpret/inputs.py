"""What is looked at: a trained network, and the images it is shown."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor, nn

from convlens import evaluation, models, prediction, run
from convlens.data.dataset import Data, Split, load_external_data
from convlens.data.decode import EXTENSIONS, UnreadableImage, decode, fit_arrays
from convlens.device import Plan, derive_seed, memory_budget, preserve_torch_settings
from convlens.engine.inference import batch_logits, place_model, split_logits
from convlens.errors import ConvlensError, DataError, ModelFileError, UsageError, lookup
from convlens.evaluation import SPLIT_NAMES
from convlens.models import zoo
from convlens.recipe import ModelConfig
from convlens.run import LoadedModel, Preprocessing, RunDir
from convlens.run_plots import worst_mistake_images
from convlens.training import pretrained
from convlens.utils.console import print_status

LIBRARY_IMAGE_SIZE = 224  # of images for a network whose weights don't say
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_PLACE = re.compile(r"(train|val|test|worst|class):(.+)")


class Picture(NamedTuple):
    """One image as the network sees it before normalisation.

    `pixels` are uint8 `[C, S, S]`, `label` its class in the model's order where it is known,
    `name` what it was asked for by, e.g. `cat.png` or `test:17`, and `id` that of the image in its
    data set, if it comes from one.
    """

    name: str
    pixels: Tensor
    label: int | None
    id: str | None = None


@dataclass
class InspectedModel:
    """A network to be looked at, in eval mode on its device, float32.

    `run_dir` is the run it comes from; None for a network of torchvision or timm.
    """

    name: str
    loaded: LoadedModel
    plan: Plan
    run_dir: RunDir | None = None
    _splits: dict[tuple[str, str | None], Split] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def classes(self) -> tuple[str, ...]:
        return self.loaded.classes

    @cached_property
    def data(self) -> Data:
        """The data of its run.

        Raises:
            UsageError: it isn't a run; DataError: the images changed or have moved.
        """
        if self.run_dir is None:
            raise UsageError(
                f"{self.name} is no run of convlens: it has no images of its own",
                fix="name image files, or a data set with --data",
            )
        try:
            return evaluation.load_own_data(self.loaded, self.plan.device)
        except UsageError as error:
            raise DataError(
                f"the images of {self.name} can't be found: {error.what}",
                fix="put them back where they were in training, or name image files",
            ) from error

    def split(self, name: str, data: str | Path | None = None) -> Split:
        """A split of its own data or of another set, with labels in the model's order.

        The first time that its test split is opened is logged in its run as a look at it.
        """
        key = name, None if data is None else str(data)
        if key not in self._splits:
            own = self.data if data is None else None
            on = self.plan.device
            found = evaluation.load_eval_split(
                self.loaded, name, data=data, device=on, own_data=own
            )
            self._splits[key] = found.part
            if own is not None and name == "test":
                self._log(found)
        return self._splits[key]

    def _log(self, opened: evaluation.EvalSplit) -> None:
        assert self.run_dir is not None
        entry = self.run_dir.add_result(
            {
                "run": self.run_dir.name,
                "split": "test",
                "data": opened.name,
                "own": True,
                "n": len(opened.part),
                "by": "look",
                "data_fingerprint": opened.fingerprint,
                "model_sha256": self.loaded.model_metadata["sha256"],
            }
        )
        print_status(
            f"{escape(self.name)}: test set used {evaluation.times(entry['looks'])} (logged)"
        )

    def held_out(self, data: str | Path | None = None) -> str:
        """The split for what nobody named one: validation, so that a sealed test stays sealed.

        Training images where a run held none out. Of another set what is called `test`, or all.
        """
        if data is not None:
            return "test"
        return "val" if len(self.data.val) else "train"

    def prepared(self, pixels: Tensor) -> Tensor:
        """uint8 `[N, C, S, S]` normalised, float32 on the device: what the network takes."""
        return self.loaded.preprocessing.normalize(pixels.to(self.plan.device), self.plan)


def open_inspected_model(text: str, *, on: str | None = None) -> InspectedModel:
    """A run (by name, folder or model file), or a network `NAME[:WEIGHTS]` of torchvision or timm.

    WEIGHTS are as in `model.weights`: `default`, a member of torchvision's enum, a file, `none`
    (random). Without them a network has its default weights. A run's name wins.

    Raises:
        UsageError: neither a run nor a network, with near misses; as `weights.find`.
    """
    name, _, spec = text.partition(":")
    try:
        run_dir = run.find_run(text)
    except ConvlensError:
        if name not in zoo.zoo_names() and not name.startswith(zoo.TIMM):
            raise
        loaded = _of_library(ModelConfig(name=name, weights=spec or "default"))
        return InspectedModel(text, loaded, place_model(loaded.model, on))
    loaded = run.load_model(run_dir.model_path)
    return InspectedModel(run_dir.name, loaded, place_model(loaded.model, on), run_dir)


def share_data(subjects: Sequence[InspectedModel]) -> None:
    """Networks that were trained on the same images (by fingerprint) hold them only once.

    Raises:
        DataError: the images of one of them changed or have moved.
    """
    loaded: dict[str, Data] = {}
    for subject in subjects:
        if subject.run_dir is not None:
            mark = subject.loaded.model_metadata["data"]["fingerprint"]
            subject.data = loaded[mark] = loaded.get(mark) or subject.data


def _of_library(config: ModelConfig) -> LoadedModel:
    """A network as its library has it, for as many classes as its weights know."""
    models.model_options(config.name)
    options = {"stem": "imagenet"} if config.name.startswith("resnet") else {}
    options = options if config.name in models.MODELS else {}
    if config.weights == "none":
        count, mean, std, source = 1000, None, None, None
    else:
        pretrained.check_weights_config(config)
        source = pretrained.find_weights(config)
        mean, std = source.mean, source.std
        count = len(source.classes) if source.classes else _outputs(source.tensors)
    classes = source.classes if source and source.classes else tuple(map(str, range(count)))
    with torch.random.fork_rng(devices=[]):
        model = models.build_model(config.name, count, 3, LIBRARY_IMAGE_SIZE, options)
    if source is not None:
        pretrained.load_pretrained(source, model, classes)
    preprocessing = Preprocessing(
        LIBRARY_IMAGE_SIZE, 3, "crop", mean or IMAGENET[0], std or IMAGENET[1]
    )
    model_metadata = {"model": {"name": config.name, "options": options}}
    return LoadedModel(model.eval(), classes, preprocessing, model_metadata)


def _outputs(tensors: dict[str, Tensor]) -> int:
    """How many classes the last matrix (or 1x1 convolution) of a state dict is for."""
    return [value.shape[0] for value in tensors.values() if value.ndim >= 2][-1]


def is_split_position(text: str) -> bool:
    """Whether `text` means images of a split (`test:17`, `worst:5`, ...) and no file's name."""
    return _PLACE.fullmatch(text) is not None and not os.path.exists(text)


def select_pictures(subject: InspectedModel, asked: Sequence[str]) -> list[Picture]:
    """The images asked for, in that order.

    Each is a file, folder or glob; `train:N`, `val:N`, `test:N` (the image number N of a split);
    `worst:N` (the N surest mistakes on the test split); `class:NAME:N` (the first N of a class
    in the test split).

    Raises:
        UsageError: a number or class that isn't there, with near misses; nothing asked for.
        DataError: files that can't be found or read.
    """
    found: list[Picture] = []
    for text in asked:
        run_dir = _PLACE.fullmatch(text) if is_split_position(text) else None
        found += (
            _from_split(subject, run_dir[1], run_dir[2]) if run_dir else _from_files(subject, text)
        )
    if not found:
        right = any(text.startswith("worst:") for text in asked)
        what = "no mistake on the test split, so no worst one" if right else "no images to look at"
        raise UsageError(what, fix="name files, test:17, worst:5 or class:cat:3")
    return found


def _from_files(subject: InspectedModel, text: str) -> list[Picture]:
    pre = subject.loaded.preprocessing
    found = []
    for path in prediction.expand_paths([text]):
        try:
            pixels = decode(path, size=pre.image_size, channels=pre.channels, fit=pre.fit)
        except UnreadableImage as error:
            raise DataError(
                f"can't be read as an image: {error.reason}", where=path, fix="name another file"
            ) from error
        found.append(Picture(Path(path).name, torch.from_numpy(np.ascontiguousarray(pixels)), None))
    return found


def _from_split(subject: InspectedModel, kind: str, rest: str) -> list[Picture]:
    # All that can be wrong is told before a split is opened, for the test split's log.
    label, _, number = rest.rpartition(":") if kind == "class" else ("", "", rest)
    if kind == "class" and not (label and number.isdecimal()):
        raise UsageError(f"class:{rest}: how many of them?", fix=f"write class:{rest}:3")
    if not number.isdecimal():
        raise UsageError(
            f"{kind}:{rest}: {number!r} is no number", fix="write test:17, worst:5 or val:3"
        )
    numbers = {name: run_dir for run_dir, name in enumerate(subject.classes)}
    wanted_class = lookup(numbers, label, "class") if kind == "class" else -1
    count = int(number)
    split = subject.split(kind if kind in ("train", "val") else "test")
    if kind == "worst":
        wanted = worst_images(subject, split)[:count]
    elif kind == "class":
        wanted = (split.labels == wanted_class).nonzero()[:count, 0]
    elif count >= len(split):
        raise UsageError(
            f"{kind}:{count} isn't there", fix=f"the split has images 0 to {len(split) - 1:,}"
        )
    else:
        wanted = torch.tensor([count])
    pixels, labels = split.rows.gather(wanted), split.labels[wanted].tolist()
    shown = "test" if kind in ("worst", "class") else kind
    rows = zip(wanted.tolist(), pixels, labels, strict=True)
    return [Picture(f"{shown}:{i}", image, label, str(split.ids[i])) for i, image, label in rows]


def worst_images(subject: InspectedModel, split: Split) -> Tensor:
    """int64 positions of the wrong answers in a split, the one least likely to its truth first."""
    normalize = subject.loaded.preprocessing.normalize
    logits, labels = split_logits(subject.model, split, normalize, subject.plan)
    probs = logits.double().softmax(1).cpu().numpy()
    return torch.from_numpy(worst_mistake_images(probs, labels.cpu().numpy()))


# ---- choosing ----------------------------------------
# What a command is about: its arguments as networks and images, and where its files go.

SAMPLE = 512  # held-out images among which examples are looked for
EXAMPLES = 3  # classes that give one
MAX_FOLDER_NAME = 120  # characters of a folder's name


@dataclass(frozen=True)
class LookInputs:
    """Networks, the images they are shown, and the folder for what is made.

    `pictures` holds for each image one `Picture` a network, as its preprocessing has it; `slugs`
    and `names` are what files and figures call the networks and images.
    """

    subjects: list[InspectedModel]
    pictures: list[tuple[Picture, ...]]
    folder: Path
    names: list[str]
    slugs: list[str]


@preserve_torch_settings()
def open_look_inputs(
    arguments: Sequence[str], *, on: str | None = None, examples: bool = True
) -> LookInputs:
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
        subjects.append(open_inspected_model(text, on=on))
    return LookInputs(
        subjects,
        _pictures(subjects, asked, examples),
        figures_folder(subjects),
        unique_names([subject.name for subject in subjects]),
        unique_names([run.safe_name(subject.name) for subject in subjects]),
    )


def figures_folder(subjects: Sequence[InspectedModel]) -> Path:
    """`plots/<run>/look` for one network, `plots/look-<run>-<run>` for several."""
    if len(subjects) == 1:
        (one,) = subjects
        return (
            one.run_dir.plots if one.run_dir else run.PLOTS_DIR / run.safe_name(one.name)
        ) / "look"
    name = "-".join(["look", *(run.safe_name(subject.name) for subject in subjects)])
    if len(name) > MAX_FOLDER_NAME:
        name = f"{name[:MAX_FOLDER_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return run.PLOTS_DIR / name


def file_names(pictures: Sequence[tuple[Picture, ...]]) -> list[str]:
    """A name for the files of each image, no two alike."""
    return unique_names([run.safe_name(Path(each[0].name).stem) for each in pictures])


def unique_names(names: Sequence[str]) -> list[str]:
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
    if is_split_position(text):
        return True
    if os.path.isfile(path):
        return path.suffix not in (".safetensors", ".onnx", ".pt", ".pt2", ".pth")
    if _is_run(run.MODELS_DIR / text) or _is_run(path):
        return False
    return os.path.isdir(path) or path.suffix.lower() in EXTENSIONS or glob.has_magic(text)


def _is_run(folder: Path) -> bool:
    names = ("model.safetensors", "run.json", "state")
    return os.path.isdir(folder) and (
        folder.parent == run.MODELS_DIR or any((folder / name).exists() for name in names)
    )


def _refuse_empty(text: str) -> None:
    for folder in (run.MODELS_DIR / text, Path(text)):
        if _is_run(folder) and not (folder / "model.safetensors").is_file():
            raise ModelFileError(
                "this run has no weights yet",
                where=str(folder),
                fix="run its training command again: it goes on where it stopped",
            )


def _pictures(
    subjects: Sequence[InspectedModel], asked: Sequence[str], examples: bool
) -> list[tuple[Picture, ...]]:
    # Images of a split come from the first network that has data of its own.
    home = next((subject for subject in subjects if subject.run_dir), subjects[0])
    found: list[tuple[Picture, ...]] = []
    for text in asked:
        if is_split_position(text):
            chosen = select_pictures(home, [text])
            found += [tuple(_picture_for(s, each, home) for s in subjects) for each in chosen]
        else:
            found += zip(*(select_pictures(s, [text]) for s in subjects), strict=True)
    # `worst:3` may name what `test:6` named before.
    ids = [each[0].id for each in found]
    found = [each for i, each in enumerate(found) if ids[i] is None or ids[i] not in ids[:i]]
    if not asked and examples:
        chosen = example_pictures(home)
        found += [tuple(_picture_for(s, each, home) for s in subjects) for each in chosen]
    return found


def example_pictures(subject: InspectedModel) -> list[Picture]:
    """Images that need no choosing: three right ones of different classes, a wrong one.

    Among 512 images spread evenly over the validation split (training images, where there is
    none): of the first three classes that have one the first that is classified correctly; and
    the mistake that is least likely to its truth.
    """
    held = subject.held_out()
    split = subject.split(held)
    index = torch.linspace(0, len(split) - 1, min(SAMPLE, len(split))).round().long()
    pixels, labels = split.rows.gather(index), split.labels[index]
    normalize = subject.loaded.preprocessing.normalize
    logits = torch.cat(
        [batch_logits(subject.model, part, normalize, subject.plan) for part in pixels.split(128)]
    ).cpu()
    run_dirs = pick_examples(
        logits.double().softmax(1).nan_to_num(0).numpy(), labels.numpy(), EXAMPLES
    )
    print_status(
        f"no images named: of {len(index):,} {held} images one that {subject.name} gets right of "
        f"each of {EXAMPLES} classes, and its surest mistake"
    )
    return [Picture(f"{held}:{int(index[i])}", pixels[i], int(labels[i])) for i in run_dirs]


def pick_examples(probs: np.ndarray, targets: np.ndarray, count: int) -> list[int]:
    """Places of the first right answer of each of the first `count` classes that have one, then
    of the surest mistake, by probabilities `[N, K]` and labels `[N]`.
    """
    right = np.flatnonzero(probs.argmax(1) == targets)
    _, first = np.unique(targets[right], return_index=True)  # by class, in their order
    return [*right[first][:count].tolist(), *worst_mistake_images(probs, targets)[:1].tolist()]


def _picture_for(subject: InspectedModel, picture: Picture, home: InspectedModel) -> Picture:
    """The picture as another network takes it: its size and channels, its number of the class."""
    mine, theirs = subject.loaded.preprocessing, home.loaded.preprocessing
    name = None if picture.label is None else home.classes[picture.label]
    label = subject.classes.index(name) if name in subject.classes else None
    pixels = picture.pixels
    if (mine.image_size, mine.channels) != (theirs.image_size, theirs.channels):
        array = fit_arrays(
            pixels[None].numpy(), size=mine.image_size, channels=mine.channels, fit=mine.fit
        )
        pixels = torch.from_numpy(array)[0]
    return Picture(picture.name, pixels, label, picture.id)


# ---- sampling ----------------------------------------
# Which images a network is measured on: a seeded sample of a split, and of training images.

CHUNK_IMAGES = 5  # one image of so many is held out where a split has none of its own


@dataclass(frozen=True)
class Sample:
    """Some images of a split: their numbers int64 `[N]`, and what its labels mean."""

    split: Split
    index: Tensor
    classes: tuple[str, ...]
    data: str

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> Tensor:
        return self.split.labels[self.index]

    @property
    def ids(self) -> tuple[str, ...]:
        """Which images they are, whatever network they are shown to."""
        return tuple(self.split.ids[i] for i in self.index.tolist())

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images `[B, C, H, W]` and labels `[B]`, on the CPU."""
        for some in self.index.split(size):
            yield self.split.rows.gather(some), self.split.labels[some]


def draw_sample(
    subject: InspectedModel,
    split: str,
    *,
    data: str | Path | None = None,
    most: int,
    seed: int = 0,
    learning: bool = False,
) -> Sample:
    """Up to `most` images, drawn by `seed`, of a split of its own data or of another set.

    Args:
        learning: training images to learn from that are none of those which the split itself
            gives. `train`, and the splits that another set doesn't have apart (`val` always),
            are a fifth of the training images, the others being left to learn from.

    Labels of another set are in that set's own order: its classes need not be the network's.

    Raises:
        UsageError: no such split, or no run and no `data`; DataError: no images in it, or as
            `evaluation.judged_by`.
    """
    lookup(dict.fromkeys(SPLIT_NAMES), split, "split")
    asked = "train" if learning else split
    if data is None:
        apart = split != "train"
        found, classes, name = subject.split(asked), subject.classes, subject.data.name
    else:
        found, classes, name = _from_part(subject, data, "train")
        apart = split == "test" and not _same(tested := _from_part(subject, data, split)[0], found)
        found = tested if apart and not learning else found
    generator = torch.Generator().manual_seed(derive_seed(seed, len(found)))
    order = torch.randperm(len(found), generator=generator)
    if not apart:
        held = len(found) // CHUNK_IMAGES
        order = order[held:] if learning else order[:held]
    if not len(order):
        raise DataError(f"{name} has too few images: none to measure on", where=asked)
    # In order: neighbours are read from the disk in one go.
    return Sample(found, order[:most].sort().values, classes, name)


def _from_part(
    subject: InspectedModel, data: str | Path, part: str
) -> tuple[Split, tuple[str, ...], str]:
    pre = subject.loaded.preprocessing
    found, classes, name, _ = load_external_data(
        str(data),
        part,
        image_size=pre.image_size,
        channels=pre.channels,
        fit=pre.fit,
        memory_budget=memory_budget(subject.plan.device),
    )
    return found, classes, name


def _same(one: Split, other: Split) -> bool:
    return len(one) == len(other) and one.ids[0] == other.ids[0]
