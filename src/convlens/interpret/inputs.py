"""Networks and images to inspect.

Opens runs and networks of torchvision or timm as `InspectedModel`, turns arguments such as
`test:17`, `worst:5` or `cat.png` into `Picture`, and draws the seeded samples of images that
networks are measured on.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor, nn

from convlens import evaluation, models, run
from convlens.data.dataset import (
    Data,
    Split,
    data_name,
    find_external_source,
    load_external_data,
)
from convlens.data.decode import EXTENSIONS, UnreadableImage
from convlens.data.input_images import expand_paths
from convlens.data.layout import split_from_name
from convlens.device import Plan, derive_seed, memory_budget, preserve_torch_settings
from convlens.engine.inference import batch_logits, place_model, split_logits
from convlens.errors import (
    ConvlensError,
    DataError,
    ModelFileError,
    UsageError,
    close_matches,
    did_you_mean,
    lookup,
)
from convlens.models import zoo
from convlens.recipe import DataConfig, ModelConfig
from convlens.run import LoadedModel, Preprocessing, RunDir
from convlens.run_plots import worst_mistake_images
from convlens.training import pretrained
from convlens.utils.console import print_status

LIBRARY_IMAGE_SIZE = 224  # pixels: input size of a network of a library
LIBRARY_CLASSES = 1000  # outputs of a network of a library, unless its weights have others
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
EXAMPLE_CANDIDATES = 512  # images among which examples are chosen
EXAMPLES = 3  # classes of which a correctly classified example is chosen
# Correctly classified images for the checks of attribution maps, which give no interval for fewer
# than five.
EXAMPLES_FOR_CHECKS = 8
EXAMPLE_BATCH = 128
MAX_FOLDER_NAME = 120  # characters
HELD_OUT_INTERVAL = 5  # one image in five is held out if a data set has no separate split
_SPLIT_POSITION = re.compile(r"(\w+):(.+)")
POSITION_KINDS = ("train", "val", "test", "worst", "class")  # as in `test:17`


class Picture(NamedTuple):
    """One image as the network sees it, before normalization.

    Attributes:
        name: the argument that selected it, e.g. `cat.png` or `test:17`.
        pixels: uint8 `[C, S, S]`.
        label: its class in the model's order, if known.
        id: its id in the data set, if it comes from one.
    """

    name: str
    pixels: Tensor
    label: int | None
    id: str | None = None


# Networks


@dataclass
class InspectedModel:
    """A float32 network in eval mode on its device.

    Attributes:
        run_dir: the run it comes from; None for a network of torchvision or timm.
    """

    name: str
    loaded: LoadedModel
    plan: Plan
    run_dir: RunDir | None = None
    _splits: dict[tuple[str | None, str | None], Split] = field(default_factory=dict, repr=False)
    _recognized: dict[str, bool] = field(default_factory=dict, repr=False)
    _test_images: int = field(default=0, repr=False)  # of the own test split, if it was opened

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def classes(self) -> tuple[str, ...]:
        return self.loaded.classes

    @cached_property
    def data(self) -> Data:
        """The data set of the run.

        Raises:
            UsageError: the network is not a run.
            DataError: the images have changed or moved.
        """
        if self.run_dir is None:
            raise UsageError(
                f"{self.name} is not a convlens run and has no images of its own",
                fix="name image files, or a data set with --data",
            )
        return evaluation.load_own_data(self.loaded, self.plan.device)

    def recognizes(self, data: str | Path | DataConfig | None) -> bool:
        """Return whether `data` holds exactly the images of the run, which may have moved."""
        # The keys of a data section say how to read another set.
        if data is None or isinstance(data, DataConfig) or self.run_dir is None:
            return False
        if str(data) not in self._recognized:
            own = evaluation.recognize_own_data(self.loaded, str(data), self.plan.device)
            self._recognized[str(data)] = own is not None
            if own is not None:
                self.data = own
                print_status(
                    f"{escape(str(data))} holds the images of {escape(self.name)}: using its splits"
                )
        return self._recognized[str(data)]

    def split(self, name: str | None, data: str | Path | DataConfig | None = None) -> Split:
        """Return a split of the run's data or of another data set, labels in the model's order.

        `log_test_use` records that the run's test split was opened.

        Args:
            name: of the split; None means `test`, or all images of a data set without splits.
        """
        data = None if self.recognizes(data) else data
        name = name or "test" if data is None else name
        key = name, None if data is None else str(data)  # with all keys of a data section
        if key not in self._splits:
            own = self.data if data is None else None
            device = self.plan.device
            loaded = evaluation.load_eval_split(
                self.loaded, name, data=data, device=device, own_data=own
            )
            self._splits[key] = loaded.part
            if loaded.own and loaded.split == "test":
                self._test_images = len(loaded.part)
        return self._splits[key]

    def log_test_use(self, command: str) -> None:
        """Record that a command showed something of the run's test split, if it opened it."""
        if self.run_dir is None or not self._test_images:
            return
        uses = evaluation.log_test_use(self.run_dir, self.loaded, self._test_images, command)
        self._test_images = 0
        print_status(f"{escape(self.name)}: test set used {evaluation.times(uses)} (logged)")

    def default_split(self, data: str | Path | DataConfig | None = None) -> str | None:
        """Return the split to use if none is requested: validation, so that the test stays sealed.

        Training images if the run has no validation images. Of another data set None: its test
        split, or all of it if it has no splits.
        """
        if data is not None and not self.recognizes(data):
            return None
        return "val" if len(self.data.val) else "train"

    def reference_split(
        self, name: str | None = None, data: str | Path | DataConfig | None = None
    ) -> tuple[Split, str]:
        """Return the split to search for images, and what it is called in figures.

        Args:
            name: the requested split; by default that of `default_split`.
            data: another data set than the run's own.
        """
        split = self.split(name or self.default_split(data), data)
        if data is not None and not self.recognizes(data):
            return split, Path(data_name(data)).name
        return split, name or str(self.default_split())

    def prepared(self, pixels: Tensor) -> Tensor:
        """Return uint8 `[N, C, S, S]` as normalized float32 input on the model's device."""
        return self.loaded.preprocessing.normalize(pixels.to(self.plan.device), self.plan)


@preserve_torch_settings()
def open_inspected_model(text: str, *, device: str | None = None) -> InspectedModel:
    """Open a run (name, folder or model file) or a network `NAME[:WEIGHTS]` of torchvision or timm.

    A run takes precedence over a network of the same name.

    Args:
        text: WEIGHTS are those of `model.weights` in a recipe: `default` (also if omitted), a
            member of torchvision's enum, a file, or `none` for random weights.
        device: where to put the network; by default the best device.

    Raises:
        UsageError: neither a run nor a network, with close matches; unknown weights.
    """
    name, _, weights = text.partition(":")
    try:
        run_dir = run.find_run(text)
    except ConvlensError:
        if name not in zoo.zoo_names() and zoo.timm_name(name) is None:
            raise
        loaded = _load_library_model(ModelConfig(name=name, weights=weights or "default"))
        return InspectedModel(text, loaded, place_model(loaded.model, device))
    loaded = run.load_model(run_dir.model_path)
    return InspectedModel(run_dir.name, loaded, place_model(loaded.model, device), run_dir)


def _load_library_model(config: ModelConfig) -> LoadedModel:
    """Build a network of a library, with as many outputs as its weights have classes."""
    models.model_options(config.name)
    options = {"stem": "imagenet"} if config.name.startswith("resnet") else {}
    options = options if config.name in models.MODELS else {}

    def build(outputs: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return models.build_model(config.name, outputs, 3, LIBRARY_IMAGE_SIZE, options)

    model, mean, std, classes = build(LIBRARY_CLASSES), None, None, None
    if config.weights != "none":
        pretrained.check_weights_config(config)
        source = pretrained.find_weights(config)
        mean, std, classes = source.mean, source.std, source.classes
        outputs = _count_outputs(source.tensors, models.model_parts(model).head)
        if outputs not in (None, LIBRARY_CLASSES):
            model = build(outputs)
        classes = classes or tuple(map(str, range(outputs or LIBRARY_CLASSES)))
        pretrained.load_pretrained(source, model, classes)
    preprocessing = Preprocessing(
        LIBRARY_IMAGE_SIZE, 3, "crop", mean or IMAGENET_MEAN, std or IMAGENET_STD
    )
    model_metadata = {"model": {"name": config.name, "options": options}}
    classes = classes or tuple(map(str, range(LIBRARY_CLASSES)))
    return LoadedModel(model.eval(), classes, preprocessing, model_metadata)


def _count_outputs(tensors: dict[str, Tensor], head: str) -> int | None:
    """Return the number of outputs of the layer `head` in a state dict; None if it has none.

    Wrappers put a prefix in front of the name.
    """
    end = f".{head}.weight"
    weights = [tensor for name, tensor in tensors.items() if f".{name}".endswith(end)]
    return weights[-1].shape[0] if weights else None


def share_data(subjects: Sequence[InspectedModel]) -> None:
    """Load the data set of networks trained on the same images (by fingerprint) only once.

    Raises:
        DataError: images that have changed or moved.
    """
    by_fingerprint: dict[str, Data] = {}
    for subject in subjects:
        if subject.run_dir is not None:
            fingerprint = subject.loaded.model_metadata["data"]["fingerprint"]
            subject.data = by_fingerprint.get(fingerprint) or subject.data
            by_fingerprint[fingerprint] = subject.data


# Images of one network


def is_split_position(text: str) -> bool:
    """Return whether `text` means images of a split (`test:17`, `worst:5`, ...), not a file."""
    match = _SPLIT_POSITION.fullmatch(text)
    return match is not None and _position_kind(match[1]) != "" and not os.path.exists(text)


def _position_kind(word: str) -> str:
    """Return the entry of `POSITION_KINDS` that a word means (`validation` is `val`), or ""."""
    return word if word in POSITION_KINDS else split_from_name(word) or ""


def select_pictures(
    subject: InspectedModel,
    arguments: Sequence[str],
    data: str | Path | DataConfig | None = None,
    max_pixels: int | None = None,
) -> list[Picture]:
    """Return the images that the arguments name, in their order.

    Each argument is a file, folder or glob; `train:N`, `val:N` or `test:N` (image number N of the
    split); `worst:N` (the N worst mistakes on the test split); or `class:NAME:N` (the first N
    images of a class in the test split).

    Args:
        data: another data set than the run's own; `worst` and `class` mean all of its images if
            it has no splits.
        max_pixels: larger files are refused; by default the limit of the training.

    Raises:
        UsageError: an unknown number or class, with close matches; no images at all.
        DataError: files that do not exist or can't be read.
    """
    positions = [_parse_position(subject, text) for text in arguments]
    pictures: list[Picture] = []
    for text, position in zip(arguments, positions, strict=True):
        if position is not None:
            pictures += _pictures_from_split(subject, position, data)
        else:
            pictures += _pictures_from_files(subject, text, max_pixels)
    if not pictures:
        no_mistakes = any(text.startswith("worst:") for text in arguments)
        raise UsageError(
            "no mistakes on the test split" if no_mistakes else "no images given",
            fix="name files, test:17, worst:5 or class:cat:3",
        )
    return pictures


def _pictures_from_files(
    subject: InspectedModel, text: str, max_pixels: int | None
) -> list[Picture]:
    return [
        read_picture(subject, path, Path(path).name, max_pixels) for path in expand_paths([text])
    ]


def read_picture(
    subject: InspectedModel, source: str | bytes, name: str, max_pixels: int | None = None
) -> Picture:
    """Read an image as the network sees it.

    Args:
        source: the path or the content of a file.
        name: of the picture.
        max_pixels: as for `select_pictures`.

    Raises:
        DataError: it can't be read.
    """
    conversion = subject.loaded.preprocessing.conversion
    conversion = replace(conversion, max_pixels=max_pixels or conversion.max_pixels)
    try:
        pixels = conversion.file(source, name)
    except UnreadableImage as error:
        where = source if isinstance(source, str) else name
        raise DataError(
            f"can't be read as an image: {error.reason}", where=where, fix="name another file"
        ) from error
    return Picture(name, torch.from_numpy(np.ascontiguousarray(pixels)), None)


class _SplitPosition(NamedTuple):
    """The parts of `test:17`, `worst:5` or `class:cat:3`; `target` is the class of the last."""

    text: str
    kind: str
    number: int
    target: int = -1


def _parse_position(subject: InspectedModel, text: str) -> _SplitPosition | None:
    """Return the parts of a position in a split; None for a file.

    Raises:
        UsageError: an invalid number or an unknown class. No images are needed to find this out.
    """
    match = _SPLIT_POSITION.fullmatch(text)
    if match is None or not is_split_position(text):
        return None
    kind, value = _position_kind(match[1]), match[2]
    label, _, number = value.rpartition(":") if kind == "class" else ("", "", value)
    if kind == "class" and not (label and number.isdecimal()):
        raise UsageError(
            f"class:{value}: the number of images is missing", fix=f"write class:{value}:3"
        )
    if not number.isdecimal():
        raise UsageError(
            f"{kind}:{value}: {number!r} is not a number", fix="write test:17, worst:5 or val:3"
        )
    class_index = {name: index for index, name in enumerate(subject.classes)}
    target = lookup(class_index, label, "class") if kind == "class" else -1
    return _SplitPosition(text, kind, int(number), target)


def _pictures_from_split(
    subject: InspectedModel, position: _SplitPosition, data: str | Path | DataConfig | None
) -> list[Picture]:
    _, kind, number, target = position
    split_name = None if kind in ("worst", "class") else kind
    split = subject.split(split_name, data)
    if kind == "worst":
        indices = worst_images(subject, split)[:number]
    elif kind == "class":
        indices = (split.labels == target).nonzero()[:number, 0]
    elif number >= len(split):
        raise UsageError(
            f"{position.text} does not exist",
            fix=f"the split has images 0 to {len(split) - 1:,}",
        )
    else:
        indices = torch.tensor([number])
    is_own = data is None or subject.recognizes(data)
    of = split_name or ("test" if data is None or is_own else Path(data_name(data)).name)
    return pictures_at(split, indices, of)


def pictures_at(split: Split, indices: Tensor, name: str) -> list[Picture]:
    """Return the images of a split with these numbers, int64 `[N]`.

    Args:
        name: of the split, which is part of the names of the pictures.
    """
    pixels, labels = split.rows.gather(indices), split.labels[indices].tolist()
    return [
        Picture(f"{name}:{i}", image, label, str(split.ids[i]))
        for i, image, label in zip(indices.tolist(), pixels, labels, strict=True)
    ]


def worst_images(subject: InspectedModel, split: Split) -> Tensor:
    """Return the indices of misclassified images, int64, by rising probability of their class."""
    normalize = subject.loaded.preprocessing.normalize
    logits, labels = split_logits(subject.model, split, normalize, subject.plan)
    probs = (logits.double() / subject.loaded.calibration.temperature).softmax(1).cpu().numpy()
    return torch.from_numpy(worst_mistake_images(probs, labels.cpu().numpy()))


def example_pictures(
    subject: InspectedModel,
    data: str | Path | DataConfig | None = None,
    *,
    count: int = EXAMPLES,
) -> list[Picture]:
    """Return images that represent a network: `count` correct ones and a mistake.

    Among 512 images spread evenly over the validation split (training images if there is none) or
    another data set: for each of the first `count` classes that have one, the first correctly
    classified image; and the mistake with the lowest probability of its class. For the checks of
    maps, further images of the classes follow if there are fewer than `count` classes.
    """
    split, split_name = subject.reference_split(data=data)
    candidates = min(EXAMPLE_CANDIDATES, len(split))
    index = torch.linspace(0, len(split) - 1, candidates).round().long()
    pixels, labels = split.rows.gather(index), split.labels[index]
    normalize = subject.loaded.preprocessing.normalize
    logits = torch.cat(
        [
            batch_logits(subject.model, batch, normalize, subject.plan)
            for batch in pixels.split(EXAMPLE_BATCH)
        ]
    ).cpu()
    scaled = logits.double() / subject.loaded.calibration.temperature
    probs = scaled.softmax(1).nan_to_num(0).numpy()
    is_for_checks = count > EXAMPLES
    examples = pick_examples(probs, labels.numpy(), count, repeat_classes=is_for_checks)
    shown = f"up to {count}" if is_for_checks else "one"
    classes = "" if is_for_checks else f" for each of {count} classes"
    print_status(
        f"no images given: of {len(index):,} {split_name} images, showing {shown} that "
        f"{subject.name} classifies correctly{classes}, and its worst mistake"
    )
    return [Picture(f"{split_name}:{int(index[i])}", pixels[i], int(labels[i])) for i in examples]


def pick_examples(
    probs: np.ndarray, targets: np.ndarray, count: int, *, repeat_classes: bool = False
) -> list[int]:
    """Return the first correct image of each of the first `count` classes, then the worst mistake.

    Args:
        probs: `[N, K]`.
        targets: int64 `[N]`.
        count: number of classes; classes without a correct image are skipped.
        repeat_classes: if there are fewer classes, add the second correct image of each, and so on.

    Returns:
        Indices into `probs`.
    """
    correct = np.flatnonzero(probs.argmax(1) == targets)
    _, first = np.unique(targets[correct], return_index=True)  # sorted by class
    chosen = correct[first]
    while repeat_classes and len(chosen) < min(count, len(correct)):
        rest = np.setdiff1d(correct, chosen)
        _, first = np.unique(targets[rest], return_index=True)
        chosen = np.concatenate([chosen, rest[first]])
    return [*chosen[:count].tolist(), *worst_mistake_images(probs, targets)[:1].tolist()]


# Arguments of `convlens look`


@dataclass(frozen=True)
class LookInputs:
    """Networks, the images they are shown, and the folder of the output.

    Attributes:
        pictures: for each image one `Picture` for each network, in its preprocessing.
        names: of the networks in figures.
        slugs: of the networks in file names.
    """

    subjects: list[InspectedModel]
    pictures: list[tuple[Picture, ...]]
    folder: Path
    names: list[str]
    slugs: list[str]


@preserve_torch_settings()
def open_look_inputs(
    arguments: Sequence[str],
    *,
    device: str | None = None,
    examples: int = EXAMPLES,
    data: str | Path | DataConfig | None = None,
    max_pixels: int | None = None,
) -> LookInputs:
    """Open the networks among the arguments and the images that the other arguments name.

    An argument that can be opened as a run or as a network of a library is a network. Images of a
    split come from the first run; the other networks see the same pixels.

    Args:
        arguments: networks and images, in any order.
        device: where to put the networks; by default the best device.
        examples: number of correctly classified images of `example_pictures` that are used if no
            image is named; 0 for none.
        data: the data set of `test:17`, `worst:5` and so on, if it is not the run's own.
        max_pixels: larger files are refused; by default the limit of the training.

    Raises:
        UsageError, ModelFileError, DataError: arguments that can't be opened or found.
    """
    model_arguments = [text for text in arguments if not is_image_argument(text)]
    image_arguments = [text for text in arguments if is_image_argument(text)]
    if not model_arguments:
        images = ", ".join(image_arguments[:3])
        raise UsageError(
            f"no run given, only images: {images}" if images else "no run given",
            fix="name a run first: convlens look RUN IMAGE...",
        )
    subjects = []
    for text in model_arguments:
        _check_position_kind(text)
        check_has_weights(text)
        subjects.append(open_inspected_model(text, device=device))
    return LookInputs(
        subjects,
        _pictures_for_all(subjects, image_arguments, examples, data, max_pixels),
        figures_folder(subjects),
        unique_names([subject.name for subject in subjects]),
        unique_names([run.safe_name(subject.name) for subject in subjects]),
    )


def figures_folder(subjects: Sequence[InspectedModel]) -> Path:
    """Return `plots/<run>/look` for one network, `plots/look-<run>-<run>` for several."""
    if len(subjects) == 1:
        (subject,) = subjects
        plots = run.PLOTS_DIR / run.safe_name(subject.name)
        return (subject.run_dir.plots if subject.run_dir else plots) / "look"
    name = "-".join(["look", *(run.safe_name(subject.name) for subject in subjects)])
    if len(name) > MAX_FOLDER_NAME:
        name = f"{name[:MAX_FOLDER_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return run.PLOTS_DIR / name


def file_names(pictures: Sequence[tuple[Picture, ...]]) -> list[str]:
    """Return a unique file name, without suffix, for each image."""
    return unique_names([run.safe_name(Path(row[0].name).stem) for row in pictures])


def unique_names(names: Sequence[str]) -> list[str]:
    """Return the names, with -2, -3, ... appended to repeated ones."""
    unique: list[str] = []
    for name in names:
        number, candidate = 2, name
        while candidate in unique:
            number, candidate = number + 1, f"{name}-{number}"
        unique.append(candidate)
    return unique


def is_image_argument(text: str) -> bool:
    """Return whether an argument names images rather than a run's folder or a model file."""
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


def _check_position_kind(text: str) -> None:
    """Refuse a misspelled position in a split, such as `wors:5`, with what it may mean."""
    match = _SPLIT_POSITION.fullmatch(text)
    if match is None or not match[2].rpartition(":")[2].isdecimal():
        return
    if match[1] in zoo.zoo_names() or _is_run(run.MODELS_DIR / text):
        return
    close = close_matches(match[1], POSITION_KINDS)
    if close:
        raise UsageError(
            f"{text!r} is neither a run nor an image of a split",
            fix=did_you_mean([f"{kind}:{match[2]}" for kind in close]),
        )


def check_has_weights(text: str) -> None:
    """Refuse a run whose training has not written its weights yet."""
    for folder in (run.MODELS_DIR / text, Path(text)):
        if _is_run(folder) and not (folder / "model.safetensors").is_file():
            raise ModelFileError(
                "this run has no weights yet",
                where=str(folder),
                fix="run its training command again to resume it",
            )


def _pictures_for_all(
    subjects: Sequence[InspectedModel],
    arguments: Sequence[str],
    examples: int,
    data: str | Path | DataConfig | None,
    max_pixels: int | None,
) -> list[tuple[Picture, ...]]:
    """Return the images that the arguments name, as each network takes them."""
    # Images of a split come from the first network that has its own data.
    source = next((subject for subject in subjects if subject.run_dir), subjects[0])
    pictures: list[tuple[Picture, ...]] = []
    for text in arguments:  # a mistake in the last one is found before a split is loaded
        _parse_position(source, text)
    for text in arguments:
        if is_split_position(text):
            selected = select_pictures(source, [text], data)
            pictures += [
                tuple(convert_picture(each, source, s) for s in subjects) for each in selected
            ]
        else:
            of_each = (select_pictures(s, [text], max_pixels=max_pixels) for s in subjects)
            pictures += zip(*of_each, strict=True)
    # `worst:3` may include the image that `test:6` named before.
    ids = [row[0].id for row in pictures]
    pictures = [row for i, row in enumerate(pictures) if ids[i] is None or ids[i] not in ids[:i]]
    if not arguments and examples:
        selected = example_pictures(source, data, count=examples)
        pictures += [tuple(convert_picture(each, source, s) for s in subjects) for each in selected]
    return pictures


def convert_picture(picture: Picture, source: InspectedModel, subject: InspectedModel) -> Picture:
    """Return a picture of `source` in the size, channels and class order of `subject`."""
    old, new = source.loaded.preprocessing, subject.loaded.preprocessing
    name = None if picture.label is None else source.classes[picture.label]
    label = subject.classes.index(name) if name in subject.classes else None
    pixels = picture.pixels
    if (new.image_size, new.channels) != (old.image_size, old.channels):
        pixels = torch.from_numpy(new.conversion.array(pixels[None].numpy()))[0]
    return Picture(picture.name, pixels, label, picture.id)


# Samples


@dataclass(frozen=True)
class Sample:
    """Some images of a split.

    Attributes:
        split: the split.
        index: int64 `[N]`, the images' numbers in the split.
        classes: names of the labels.
        data: name of the data set.
    """

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
        """Ids of the images, the same for every network."""
        return tuple(self.split.ids[i] for i in self.index.tolist())

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 images `[B, C, S, S]` and labels `[B]`, on the CPU."""
        for index in self.index.split(size):
            yield self.split.rows.gather(index), self.split.labels[index]


def draw_sample(
    subject: InspectedModel,
    split: str,
    *,
    data: str | Path | DataConfig | None = None,
    max_images: int,
    seed: int = 0,
    training: bool = False,
) -> Sample:
    """Draw images of a split of the run's data or of another data set.

    Labels of another data set are in its own order: its classes need not be the network's.

    Args:
        subject: the network whose data and preprocessing are used.
        split: the split to evaluate on.
        data: another data set than the run's own.
        max_images: at most so many images.
        seed: of the random selection.
        training: draw training images instead, disjoint from those drawn without `training`.
            Where the split is not separate from the training images (`train`, and splits that
            another data set does not have), it is a fifth of them, and the other four fifths
            remain for training.

    Raises:
        UsageError: an unknown split; neither a run nor `data`.
        DataError: no images in the split, or images that have changed or moved.
    """
    split = evaluation.check_split(split)
    source = "train" if training else split
    if data is None or subject.recognizes(data):
        is_separate = split != "train"
        images, classes, name = subject.split(source), subject.classes, subject.data.name
    else:
        splits = _splits_of(subject, data)
        is_separate = split in splits and split != "train" and "train" in splits
        part = source if is_separate else "train" if "train" in splits else None
        images, classes, name = _external_split(subject, data, part)
    generator = torch.Generator().manual_seed(derive_seed(seed, len(images)))
    order = torch.randperm(len(images), generator=generator)
    if not is_separate:
        held_out = len(images) // HELD_OUT_INTERVAL
        order = order[held_out:] if training else order[:held_out]
    if not len(order):
        raise DataError(f"{name} has too few images to measure on", where=source)
    # Sorted, so that neighboring images are read from disk together.
    return Sample(images, order[:max_images].sort().values, classes, name)


def check_external_split(
    subject: InspectedModel, split: str, data: str | Path | DataConfig
) -> None:
    """Check that another data set has the requested split.

    Raises:
        DataError: it does not.
    """
    splits = () if subject.recognizes(data) else _splits_of(subject, data)
    if subject.recognizes(data) or split in splits:
        return
    has = f"it has: {', '.join(splits)}" if splits else "leave out --split to use all of its images"
    raise DataError(f"--split {split} does not apply to {data_name(data)!r}", fix=has)


def _splits_of(subject: InspectedModel, data: str | Path | DataConfig) -> tuple[str, ...]:
    """Return the splits of another data set; none if it is not split."""
    source = find_external_source(
        data,
        conversion=subject.loaded.preprocessing.conversion,
        known_classes=subject.classes,
    )
    parts = tuple(source.parts)
    return () if parts == ("train",) else parts


def _external_split(
    subject: InspectedModel, data: str | Path | DataConfig, name: str | None
) -> tuple[Split, tuple[str, ...], str]:
    """Return a split of another data set, its classes and the data set's name."""
    external = load_external_data(
        data,
        name,
        conversion=subject.loaded.preprocessing.conversion,
        memory_budget=memory_budget(subject.plan.device),
        known_classes=subject.classes,
    )
    return external.images, external.classes, external.name
