"""Data sets ready for training.

`load_data` turns the data section of a recipe into the three splits of a `Data`, whose test split
stays sealed. `load_external_data` prepares another set for a trained model, and
`data_from_arrays` wraps arrays in memory.

A run keeps the list of its image files in `images.csv.gz` (`ImageList`): id, class, split (empty
if unused or unreadable) and the first 16 digits of the file's SHA-256. The list is informational
only, to name what has changed; the fingerprint decides whether two data sets are the same.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape

from convlens.data import duplicates
from convlens.data.cache import ArrayRows, DecodedRows, as_index
from convlens.data.class_names import match_class_names
from convlens.data.conversion import (
    ChooseSize,
    NativeImages,
    choose_conversion,
    conversion_with_keys,
    deep_image_notes,
)
from convlens.data.decode import Conversion
from convlens.data.duplicates import Duplicates
from convlens.data.folder_layout import LayoutOptions
from convlens.data.layout import list_examples
from convlens.data.sources import find_configured_source, find_source
from convlens.data.splits import (
    LoadedPart,
    Split,
    apply_duplicates,
    assumed_train_numbers,
    classes_of_one,
    describe_origins,
    describe_splits,
    hold_out,
    load_part,
    make_splits,
    parts_of,
    single_image_notes,
)
from convlens.data.summary import DatasetSummary
from convlens.data.types import DataSource, EncodedFiles, IndexArray, Part
from convlens.errors import ConvlensError, DataError, UsageError
from convlens.utils.console import is_first_time, print_once, print_status
from convlens.utils.files import write_atomic

if TYPE_CHECKING:
    from convlens.recipe import DataConfig


__all__ = ["Data", "Split", "channel_stats", "load_data", "load_external_data"]

MAX_SAMPLED_IMAGES = 100_000  # images that the channel statistics are computed from
IMAGES_FILE = "images.csv.gz"
IMAGES_COLUMNS = ("id", "class", "split", "sha256")
# Of decoded image files among which training looks for similar ones: 20,000 of 128 px, which take
# 12 s on one core.
MAX_PIXELS_COMPARED = 20_000 * 128 * 128
_THUMBS_PER_STEP = 1024
_MAX_LISTED_CHANGES = 3
_MAX_LISTED_ERRORS = 10
_ALLOWED_UNREADABLE = 1  # images of a split, or of a class of it, whatever `data.max_bad` is

ImageRecord = tuple[str, str, str, str]  # the columns of IMAGES_FILE


@dataclass(frozen=True)
class Data:
    """A data set ready for training. The test split stays sealed until `unseal_test`."""

    name: str
    classes: tuple[str, ...]
    conversion: Conversion
    native: NativeImages
    train: Split
    val: Split
    fingerprint: str  # SHA-256 over classes, conversion, and ids, labels, contents of all splits
    split_descriptions: dict[str, str]  # split -> where its images come from, in one sentence
    held_out: dict[str, list[str]]  # split -> ids held out of the source's training images
    skipped: dict[str, str]  # id of an unreadable image, left out by data.on_bad=skip -> reason
    summary: DatasetSummary
    notes: tuple[str, ...]  # about the source and its splits, for people
    listing: ImageList | None  # the image files; None for built-in sets
    _test: Callable[[], Split] = field(repr=False)
    val_groups: Sequence[str] | None = None  # the group of each validation image

    @property
    def image_size(self) -> int:
        return self.conversion.size

    @property
    def channels(self) -> int:
        return self.conversion.channels

    @property
    def fit(self) -> str:
        return self.conversion.fit

    def unseal_test(self) -> Split:
        """Return the test split. Only `evaluation` may call this."""
        return self._test()

    def print_notes(self) -> None:
        """Print the notes, once per command."""
        _print_notes(self.name, self.notes)

    def print_interpretation(self) -> None:
        """Print how the data set was interpreted and what is odd about it, once per command."""
        print_once(f"[bold]{escape(self.name)}[/]: {escape(str(self.summary))}")
        self.print_notes()

    def print_similar_images(self) -> None:
        """Print how many similar image files are in different splits, once per command.

        This reads the pixels of the test split as well, but no model sees them.
        """
        if self.listing is None or not is_first_time(f"similar images of {self.name}"):
            return
        if not self.listing.is_quick_to_compare:
            print_status(
                escape(
                    f"{self.name}: `convlens audit {self.name}` looks for similar images in "
                    f"different splits; for {self.listing.count:,} files that takes a while"
                )
            )
            return
        pairs = self.listing.similar_across_splits()
        if pairs.groups:
            unit = "pair" if pairs.groups == 1 else "pairs"
            example = pairs.listed[0]
            images = [
                f"{i} ({split})" for i, split in zip(example.ids, example.splits, strict=True)
            ]
            remedy = ""
            if self.held_out:
                remedy = "data.group=REGEX (of a CSV: COLUMN) keeps related images in one split; "
            print_status(
                escape(
                    f"{self.name}: {pairs.groups:,} {unit} of similar images in different splits, "
                    f"e.g. {' and '.join(images)}; the test accuracy may be too high "
                    f"({remedy}`convlens audit {self.name}` lists them)"
                )
            )


def load_data(
    config: DataConfig,
    *,
    memory_budget: int,
    conversion: Conversion | None = None,
    known_classes: Sequence[str] = (),
    choose_size: ChooseSize | None = None,
) -> Data:
    """Load the data of a recipe: find, decode and check the images, and split them.

    Validation and test splits that the source does not have are held out of its training images,
    stratified and seeded. The validation split is empty if `data.val_fraction` is 0.

    Args:
        config: The data section of a recipe.
        memory_budget: In bytes. Larger sets are read from disk when they are needed.
        conversion: That of the run whose images these are. By default, it is chosen for the images.
        known_classes: Classes of a model that was trained on the data. They settle how folders
            are read that could be classes or splits.
        choose_size: As for `choose_conversion`.

    Raises:
        DataError: Images can't be read (the error lists them, unless data.on_bad=skip), classes
            are too small to split, or the source is missing or malformed.
        UsageError: Unknown name, or keys that do not apply to this source.
    """
    source = find_configured_source(config, known_classes=known_classes)
    try:
        return _load_source(config, source, memory_budget, conversion, choose_size)
    except ConvlensError:
        _print_notes(source.name, source.notes)  # they may explain the error
        raise


def _load_source(
    config: DataConfig,
    source: DataSource,
    memory_budget: int,
    known: Conversion | None,
    choose_size: ChooseSize | None,
) -> Data:
    native = source.parts["train"].images
    needed = parts_of(config, source)
    assumed = partial(assumed_train_numbers, config, source, needed)
    choice = choose_conversion(config, native, assumed, known=known, choose_size=choose_size)
    parts = _load_parts(needed, choice.conversion, memory_budget)
    if config.on_bad == "stop":
        hint = f"`convlens audit {config.name}` lists all"
        _refuse_unreadable(parts, f"{hint}; replace them, or set data.on_bad=skip")
    skipped = _skip_unreadable(parts, source, config)
    parts, copy_notes = apply_duplicates(config, source, parts)
    plan = make_splits(config, source, parts)
    numbers = parts["train"].good[plan.train]
    if choice.sample and not np.array_equal(numbers, assumed()):
        # Unreadable images have changed the split, which is known only now. The conversion must
        # not depend on held-out images.
        choice = choose_conversion(config, native, lambda: numbers, choose_size=choose_size)
        parts, _ = apply_duplicates(
            config, source, _load_parts(needed, choice.conversion, memory_budget)
        )
    conversion = choice.conversion
    pool = parts["train"]
    views = {"train": (pool, plan.train)}
    for split in ("val", "test"):
        if split in plan.held_out:
            views[split] = (pool, plan.held_out[split])
        else:
            views[split] = (parts[split], parts[split].all())
    size = sum(len(index) for _, index in views.values()) * conversion.image_bytes
    keep_in_memory = size <= memory_budget
    listing = ImageList.of(source.classes, views)
    notes = [*source.notes, *choice.notes, *_skip_notes(skipped), *plan.notes, *copy_notes]
    if listing.of_files:
        notes += _copy_notes(listing, config)
    summary = DatasetSummary(
        classes=source.classes,
        counts=count_classes(views, len(source.classes)),
        splits={split: len(views[split][1]) for split in ("train", "val", "test")},
        origins=describe_origins(plan, config, pool),
        channels=conversion.channels,
        image_size=conversion.size,
        fit=conversion.fit,
        kept_area=choice.kept_area if isinstance(native, EncodedFiles) else None,
    )
    return Data(
        name=source.name,
        classes=source.classes,
        conversion=conversion,
        native=choice.native,
        train=pool.split(plan.train, keep_in_memory=keep_in_memory),
        val=views["val"][0].split(views["val"][1], keep_in_memory=keep_in_memory),
        fingerprint=_fingerprint(source.classes, conversion, views),
        split_descriptions=describe_splits(plan, config, source, parts),
        held_out={split: list(pool.ids_of(index)) for split, index in plan.held_out.items()},
        skipped=skipped,
        summary=summary,
        notes=tuple(notes),
        listing=listing if listing.of_files else None,
        _test=lambda: views["test"][0].split(views["test"][1], keep_in_memory=keep_in_memory),
        val_groups=views["val"][0].groups_of(views["val"][1]),
    )


def _load_parts(
    parts: Mapping[str, Part], conversion: Conversion, memory_budget: int
) -> dict[str, LoadedPart]:
    return {name: load_part(part, conversion, memory_budget) for name, part in parts.items()}


ALL_IMAGES = "all"  # what the images of a data set without splits are called


class ExternalData(NamedTuple):
    """Images of another data set than the one a model was trained on.

    Attributes:
        images: converted to the model's input.
        classes: of the data set.
        split: the chosen split of the data set, or `all` if it has no splits.
        trained_on: number of these images that the run was trained on, too (equal files).
        is_own_split: whether these are the images of the split `split` of the run itself.
    """

    images: Split
    classes: tuple[str, ...]
    name: str
    fingerprint: str
    split: str
    trained_on: int = 0
    is_own_split: bool = False


def data_name(data: str | Path | DataConfig) -> str:
    """Return the name or path of another data set, which may be given with keys to read it."""
    return str(data) if isinstance(data, str | os.PathLike) else data.name


def find_external_source(
    data: str | Path | DataConfig,
    *,
    conversion: Conversion,
    known_classes: Sequence[str] = (),
    tested: bool = False,
) -> DataSource:
    """Find a data set for a trained model.

    Args:
        data: Name or path of the set, or a data section with the keys that say how to read it.
        conversion: That of the model.
        known_classes: Classes of the model. They settle how folders are read that could be classes
            or splits.
        tested: As for `find_source`.

    Raises:
        DataError, UsageError: As `find_source`.
    """
    if isinstance(data, str | os.PathLike):
        layout = LayoutOptions(known_classes=tuple(known_classes))
        return find_source(str(data), image_size=conversion.size, layout=layout, tested=tested)
    keys = data.model_copy(update={"image_size": conversion.size})
    return find_configured_source(keys, tested=tested, known_classes=known_classes)


def load_external_data(
    data: str | Path | DataConfig,
    split: str | None = None,
    *,
    conversion: Conversion,
    memory_budget: int,
    tested: bool = False,
    run_images: RunImages | None = None,
    known_classes: Sequence[str] = (),
    match_classes: bool = False,
) -> ExternalData:
    """Load a data set for a trained model, converted to the model's input.

    Nothing is held out. Of a set without splits all images are used.

    Args:
        data, known_classes, tested: As for `find_external_source`.
        split: A split of the set; by default `test`. Of a set without splits it can only be a
            split of the run: then exactly the images of that split are used, if the set has all
            of them.
        conversion: That of the model. `data` may change the value range and the limit of pixels.
        memory_budget: In bytes.
        run_images: Images of the model's run. Messages say how many of the images it was trained
            on, and whether all images of its test split are there.
        match_classes: Match the classes of the set with `known_classes`, before any image is read,
            and return them under the names of these.

    Raises:
        DataError: The set has no such split, the model does not know a class, or images can't be
            read; otherwise as `load_data`.
        UsageError: A key would change what the model was trained on; otherwise as `load_data`.
    """
    name = data_name(data)
    if not isinstance(data, str | os.PathLike):
        conversion = conversion_with_keys(conversion, data)
    source = find_external_source(
        data, conversion=conversion, known_classes=known_classes, tested=tested
    )
    if match_classes:
        source = _match_classes(source, known_classes)
    _print_notes(source.name, source.notes)
    has_splits = list(source.parts) != ["train"]
    chosen = (split or "test") if has_splits else "train"
    if chosen not in source.parts:
        raise DataError(
            f"{source.name!r} has no {chosen} images",
            where=name,
            fix=f"it has: {', '.join(source.parts)} (--split chooses one of them)",
        )
    _print_notes(source.name, deep_image_notes(source.parts[chosen].images, conversion))
    loaded = load_part(source.parts[chosen], conversion, memory_budget)
    # `audit` needs a set with at least two classes.
    hint = f" (`convlens audit {name}` lists all)" if len(source.classes) > 1 else ""
    _refuse_unreadable({chosen: loaded}, f"replace them, or move them out of the set{hint}")
    index, label = loaded.all(), chosen if has_splits else ALL_IMAGES
    run_images = run_images or RunImages(None)
    own_index = _own_split_among(run_images, loaded, source, split, has_splits=has_splits)
    trained_on = 0
    if own_index is not None:
        index, label = own_index, split or "test"
    else:
        trained_on = training_copies(run_images, loaded)
        _describe_overlap(run_images, loaded, source, trained_on, has_splits=has_splits)
    fingerprint = _fingerprint(source.classes, conversion, {label: (loaded, index)})
    return ExternalData(
        loaded.split(index, keep_in_memory=len(index) * conversion.image_bytes <= memory_budget),
        source.classes,
        source.name,
        fingerprint,
        label,
        trained_on,
        own_index is not None,
    )


def _own_split_among(
    run_images: RunImages,
    loaded: LoadedPart,
    source: DataSource,
    split: str | None,
    *,
    has_splits: bool,
) -> IndexArray | None:
    """Return the indices of the images of a split of the run itself; None if all are to be used.

    These are the images of the requested split, in a data set without splits; or all images, if
    they are exactly those of the run's test split.

    Raises:
        DataError: a split is requested, but not all of its images are in the data set.
    """
    is_chosen = split is not None and not has_splits
    found, total = np.empty(0, np.int64), 0
    if is_chosen or split in (None, "test"):
        found, total = find_split_of_run(run_images, loaded, source, split or "test")
    is_complete = total > 0 and len(found) == total
    if is_complete and total == len(loaded.good):
        print_status(
            escape(f"{source.name}: these are exactly the {split or 'test'} images of this run")
        )
        return loaded.all()
    if not is_chosen:
        return None
    if is_complete:
        return found
    some = f", and {len(found):,} of the {total:,} {split} images of the run are in it" * bool(
        total
    )
    raise DataError(
        f"{source.name!r} has no splits, so --split {split} does not apply to it{some}",
        where=source.name,
        fix=f"leave out --split to use all {len(loaded.good):,} images",
    )


def _describe_overlap(
    run_images: RunImages,
    loaded: LoadedPart,
    source: DataSource,
    trained_on: int,
    *,
    has_splits: bool,
) -> None:
    """Print how many images the run was trained on, and whether its test images are among them."""
    if not trained_on:
        return
    print_status(
        escape(
            f"{source.name}: {trained_on:,} of {len(loaded.good):,} images were also used for "
            "training (the same files); this accuracy is optimistic"
        )
    )
    found, total = find_split_of_run(run_images, loaded, source, "test")
    if total and len(found) == total and not has_splits:
        print_status(
            escape(
                f"{source.name}: the {total:,} test images of this run are in it, too; "
                "--split test evaluates only these"
            )
        )


def _match_classes(source: DataSource, model_classes: Sequence[str]) -> DataSource:
    """Return the source with the model's names of its classes, and a note if they differ."""
    matches = match_class_names(source.classes, model_classes, source.name)
    changed = [f"{name} is {match}" for name, match in matches.items() if name != match]
    if not changed:
        return source
    note = f"classes matched with those of the model: {list_examples(changed)}"
    classes = tuple(matches[name] for name in source.classes)
    return replace(source, classes=classes, notes=(*source.notes, note))


def data_from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    val_fraction: float,
    seed: int,
    fit: str = "crop",
) -> Data:
    """Make a data set of arrays in memory. Validation images are held out, stratified.

    There is no test split.

    Args:
        images: uint8 `[N, C, S, S]`.
        labels: Indices into `classes`, int64 `[N]`.
        classes: Class names.
        val_fraction: Share of the validation images.
        seed: Seed of the random choice.
        fit: How the images were made square; images to predict are made square in the same way.
    """
    kept, held = hold_out(labels, val_fraction, seed)
    pixels = torch.from_numpy(images)

    def split(index: np.ndarray) -> Split:
        ids = [f"array/{i}" for i in index.tolist()]
        return Split(ArrayRows(pixels[as_index(index)]), as_index(labels[index]), ids)

    def refuse_test() -> Split:
        raise UsageError("an estimator fitted on arrays has no test split", fix="call score(X, y)")

    digest = hashlib.sha256(repr((tuple(classes), images.shape)).encode())
    digest.update(images.data)
    digest.update(labels.tobytes())
    total = len(labels)
    summary = DatasetSummary(
        classes=classes,
        counts=np.bincount(labels, minlength=len(classes)),
        splits={"train": len(kept), "val": len(held)},
        origins={"val": "held out, stratified"} if len(held) else {},
        channels=images.shape[1],
        image_size=images.shape[2],
        fit=fit,
    )
    return Data(
        name="arrays",
        classes=tuple(classes),
        conversion=Conversion(images.shape[2], images.shape[1], fit),
        native=NativeImages(images.shape[2], images.shape[1]),
        train=split(kept),
        val=split(held),
        fingerprint=digest.hexdigest(),
        split_descriptions={
            "train": f"{len(kept):,} of {total:,} images given to fit",
            "val": f"{len(held):,} of {total:,} images held out (stratified, seed {seed})",
        },
        held_out={"val": [f"array/{i}" for i in held.tolist()]},
        skipped={},
        summary=summary,
        notes=single_image_notes(classes, classes_of_one(labels)) if len(held) else (),
        listing=None,
        _test=refuse_test,
    )


def channel_stats(split: Split) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation of each channel over all pixels, in units of 0..1.

    Exact up to 100,000 images; larger sets are sampled at even spacing. A deviation is at least
    1/255, so that images of a single color can be divided by it.
    """
    n, channels, height, width = split.rows.shape
    n_sampled = min(n, MAX_SAMPLED_IMAGES)
    chosen = np.unique(np.linspace(0, n - 1, n_sampled).round().astype(np.int64))
    sums, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    step = max(1, (1 << 22) // (height * width * channels))
    for start in range(0, len(chosen), step):
        images = split.rows.gather(as_index(chosen[start : start + step])).numpy()
        sums += images.sum((0, 2, 3), dtype=np.int64)
        # The square of a byte fits 16 bits: exact integers, without a float copy of the images.
        squares += np.square(images, dtype=np.uint16).sum((0, 2, 3), dtype=np.int64)
    pixels = len(chosen) * height * width
    mean = [int(s) / pixels / 255 for s in sums]
    # Python integers don't overflow: n * sum(x^2) - sum(x)^2 without cancellation.
    scaled_variance = [int(q) * pixels - int(s) ** 2 for s, q in zip(sums, squares, strict=True)]
    return mean, [max(math.sqrt(v) / pixels, 1.0) / 255 for v in scaled_variance]


def _copy_notes(listing: ImageList, config: DataConfig) -> list[str]:
    """Return how many groups of equal files are in several splits or under several labels."""
    copies = listing.copies()
    counts = {"in more than one split": copies.across_splits, "under two labels": copies.two_labels}
    problems = ", ".join(f"{count:,} {where}" for where, count in counts.items() if count)
    if not problems:
        return []
    remedy = "data.duplicates=drop leaves copies out"
    if copies.across_splits and config.duplicates != "group":
        remedy += ", data.duplicates=group keeps them in one split"
    return [
        f"images that occur more than once: {problems} "
        f"(`convlens audit {config.name}` lists them; {remedy})"
    ]


def _unreadable(parts: dict[str, LoadedPart]) -> dict[str, str]:
    """Return the reason for each unreadable image, by its id."""
    return {p.part.ids[i]: reason for p in parts.values() for i, reason in p.bad.items()}


def _refuse_unreadable(parts: dict[str, LoadedPart], fix: str) -> None:
    bad = [f"{image}: {reason}" for image, reason in _unreadable(parts).items()]
    if not bad:
        return
    total = sum(len(part.part.labels) for part in parts.values())
    hidden = len(bad) - _MAX_LISTED_ERRORS
    raise DataError(
        f"{len(bad)} of {total} images can't be read",
        where="; ".join(bad[:_MAX_LISTED_ERRORS]) + (f"; and {hidden} more" if hidden > 0 else ""),
        fix=fix,
    )


def _skip_unreadable(
    parts: dict[str, LoadedPart], source: DataSource, config: DataConfig
) -> dict[str, str]:
    """Return the unreadable images that are left out, with their reasons.

    Raises:
        DataError: A class has no readable training image, or more than `max_bad` of a split, or of
            a class of it, can't be read (one image always may).
    """
    n_readable = np.bincount(parts["train"].labels, minlength=len(source.classes))
    empty = [source.classes[c] for c in np.flatnonzero(n_readable == 0)]
    if empty:
        raise DataError(f"no readable training image in: {', '.join(empty[:5])}", where=source.name)
    exceeded = []
    for split, part in parts.items():
        labels = part.part.labels
        total = np.bincount(labels, minlength=len(source.classes))
        bad = np.bincount(labels[list(part.bad)], minlength=len(source.classes))
        names = (f"all of {split}", *source.classes)
        for name, n, count in zip(names, [bad.sum(), *bad], [total.sum(), *total], strict=True):
            if n > max(_ALLOWED_UNREADABLE, config.max_bad * count):
                exceeded.append(f"{name} ({n:,} of {count:,})")
    if exceeded:
        more = f" and {len(exceeded) - 5} more" if len(exceeded) > 5 else ""
        raise DataError(
            f"more than {config.max_bad:.0%} can't be read of {', '.join(exceeded[:5])}{more}",
            where=source.name,
            fix=f"`convlens audit {config.name}` lists the reasons; replace the files, or raise "
            "data.max_bad",
        )
    return _unreadable(parts)


def _skip_notes(skipped: Mapping[str, str]) -> list[str]:
    return [f"{len(skipped)} unreadable images are skipped"] if skipped else []


def _print_notes(name: str, notes: Sequence[str]) -> None:
    for note in notes:
        print_once(escape(note if note.startswith("warning:") else f"{name}: {note}"))


def count_classes(views: Mapping[str, tuple[LoadedPart, IndexArray]], n_classes: int) -> IndexArray:
    """Return the number of images of each class over all splits, `[K]`."""
    counts = [np.bincount(part.labels[i], minlength=n_classes) for part, i in views.values()]
    total: IndexArray = np.sum(counts, axis=0)
    return total


def _fingerprint(
    classes: Sequence[str], conversion: Conversion, views: dict[str, tuple[LoadedPart, IndexArray]]
) -> str:
    digest = hashlib.sha256(repr((tuple(classes), conversion)).encode())
    for split, (part, index) in views.items():
        digest.update(f"\0{split}\0{part.content}\0".encode())
        ids = part.ids_of(index)
        # In chunks: the joined text of millions of ids would take much memory.
        for start in range(0, len(ids), 1 << 16):
            digest.update(("\0" * (start > 0) + "\0".join(ids[start : start + (1 << 16)])).encode())
        digest.update(part.labels[index].tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ImageList:
    """All image files of a data set, with the split of each.

    Args:
        classes: Class names.
        parts: The loaded parts of the set.
        views: Split -> the part that its images are in, and their indices.
    """

    classes: Sequence[str]
    parts: Sequence[LoadedPart]
    views: Mapping[str, tuple[LoadedPart, IndexArray]]

    @classmethod
    def of(
        cls, classes: Sequence[str], views: Mapping[str, tuple[LoadedPart, IndexArray]]
    ) -> ImageList:
        parts = {id(part): part for part, _ in views.values()}
        return cls(classes, list(parts.values()), views)

    @property
    def of_files(self) -> bool:
        """Whether all images are files. Images of built-in sets are not."""
        return all(part.digests is not None for part in self.parts)

    def records(self) -> Iterator[ImageRecord]:
        for part in self.parts:
            assert part.digests is not None
            splits = np.full(len(part.part.labels), "", "U5")
            for name, (view_part, index) in self.views.items():
                if view_part is part:
                    splits[part.good[index]] = name
            labels = part.part.labels.tolist()
            for number, (image, label) in enumerate(zip(part.part.ids, labels, strict=True)):
                digest = part.digests[number, :8].tobytes().hex()
                yield image, self.classes[label], str(splits[number]), digest

    def copies(self) -> Duplicates:
        """Return the groups of used files that are equal byte for byte."""
        used = [(name, part, part.good[index]) for name, (part, index) in self.views.items()]
        prefixes = np.concatenate([_digest_prefixes(part, numbers) for _, part, numbers in used])
        ordered = np.sort(prefixes)  # np.unique takes ten times as long
        is_repeated = np.isin(prefixes, ordered[1:][ordered[1:] == ordered[:-1]])
        ids, splits, labels, digests, start = list[str](), list[str](), list[str](), [], 0
        for name, part, numbers in used:
            repeated = numbers[is_repeated[start : start + len(numbers)]]
            start += len(numbers)
            assert part.digests is not None
            digests.append(part.digests[repeated])
            for number in repeated.tolist():
                ids.append(part.part.ids[number])
                splits.append(name)
                labels.append(self.classes[part.part.labels[number]])
        groups = duplicates.exact_duplicates(np.concatenate(digests))
        return Duplicates.of(groups, ids, splits, labels)

    @property
    def count(self) -> int:
        """Number of images that are used."""
        return sum(len(index) for _, index in self.views.values())

    @property
    def is_quick_to_compare(self) -> bool:
        """Whether `similar_across_splits` takes seconds: few pixels, decoded already."""
        decodes_again = any(isinstance(part.rows, DecodedRows) for part in self.parts)
        height, width = self.parts[0].rows.shape[2:]
        return self.count * height * width <= MAX_PIXELS_COMPARED and not decodes_again

    def similar_across_splits(self) -> Duplicates:
        """Return the pairs of images in different splits that look the same but are not equal.

        The images are compared as they are given to the network.
        """
        thumbs, digests = [], []
        ids, splits, labels = list[str](), list[str](), list[str]()
        for name, (part, index) in self.views.items():
            assert part.digests is not None
            numbers = part.good[index]
            for start in range(0, len(numbers), _THUMBS_PER_STEP):
                images = part.rows.gather(as_index(numbers[start : start + _THUMBS_PER_STEP]))
                thumbs.append(duplicates.grey_thumbnails(images.numpy()))
            digests.append(part.digests[numbers])
            ids += part.ids_of(index)
            splits += [name] * len(index)
            labels += [self.classes[label] for label in part.labels[index]]
        pairs, complete = duplicates.near_duplicates(
            np.concatenate(thumbs), np.concatenate(digests)
        )
        in_split = np.array(splits)
        across = pairs[in_split[pairs[:, 0]] != in_split[pairs[:, 1]]]
        return Duplicates.of(across.tolist(), ids, splits, labels, complete=complete)

    def write(self, folder: Path) -> None:
        """Write the list into the run directory `folder`."""
        packed = io.BytesIO()
        with (
            gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0) as raw,
            io.TextIOWrapper(raw, "utf-8", newline="") as text,
        ):
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(IMAGES_COLUMNS)
            writer.writerows(self.records())
        write_atomic(folder / IMAGES_FILE, packed.getvalue())

    def changed(self, folder: Path) -> str:
        """Describe how these files differ from those at the start of the run in `folder`.

        Returns:
            Empty if only the order differs or the difference is unknown: an old run, or a damaged
            list.
        """
        records = _read_image_list(folder / IMAGES_FILE)
        if records is None or not self.of_files:
            return ""
        before = {image: (label, digest) for image, label, _, digest in records}
        now = {image: (label, digest) for image, label, _, digest in self.records()}
        common = [image for image in now if image in before]
        changes = {
            "added": [image for image in now if image not in before],
            "removed": [image for image in before if image not in now],
            "with other content": [i for i in common if before[i][1] != now[i][1]],
            "in another class": [i for i in common if before[i][0] != now[i][0]],
        }
        descriptions = []
        for change, images in changes.items():
            if images:
                more = " ..." if len(images) > _MAX_LISTED_CHANGES else ""
                listed = ", ".join(images[:_MAX_LISTED_CHANGES])
                descriptions.append(f"{len(images):,} {change}: {listed}{more}")
        return "; ".join(descriptions)


def _digest_prefixes(part: LoadedPart, numbers: IndexArray) -> npt.NDArray[np.uint64]:
    """Return the first 8 bytes of the digests of the files `numbers`."""
    assert part.digests is not None
    return np.ascontiguousarray(part.digests[numbers, :8]).view(np.uint64)[:, 0]


class RunImages:
    """The list of the image files of a run, which is read once, when it is first needed.

    Args:
        folder: The run directory; None if there is none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @cached_property
    def records(self) -> list[ImageRecord] | None:
        """The list; None if it is unknown: an old run, a damaged list, or no run."""
        return None if self._folder is None else _read_image_list(self._folder / IMAGES_FILE)


def training_copies(run_images: RunImages, part: LoadedPart) -> int:
    """Count the files of `part` that equal, byte for byte, a training image of a run.

    Returns:
        0 if it is unknown, or if the images are not files.
    """
    records = run_images.records if part.digests is not None else None
    if records is None:
        return 0
    digests = [digest for _, _, split, digest in records if split == "train"]
    try:
        train_prefixes = np.array([int(digest, 16) for digest in digests], np.uint64)
    except (ValueError, OverflowError):
        return 0
    prefixes = _digest_prefixes(part, part.good).view(">u8")  # the byte order of hex digits
    return int(np.isin(prefixes, train_prefixes).sum())


def find_split_of_run(
    run_images: RunImages, part: LoadedPart, source: DataSource, split: str
) -> tuple[IndexArray, int]:
    """Find the images of a split of a run among other files, by content and class.

    Args:
        run_images: The images of the run.
        part: The files, of `source`.

    Returns:
        The indices of those that were found, in the order of the run's list, and the number of
        images of the split; no images if it is unknown.
    """
    records = run_images.records if part.digests is not None else None
    wanted = [(label, digest) for _, label, of, digest in records or () if of == split]
    if not wanted or part.digests is None:
        return np.empty(0, np.int64), 0
    available: dict[tuple[str, str], list[int]] = {}
    for index in reversed(part.all().tolist()):
        digest = part.digests[part.good[index], :8].tobytes().hex()
        label = source.classes[part.labels[index]]
        available.setdefault((label, digest), []).append(index)
    found = [available[key].pop() for key in wanted if available.get(key)]
    return np.array(found, np.int64), len(wanted)


def may_hold_images_of_run(run_images: RunImages, source: DataSource) -> bool:
    """Return whether a source has exactly the images of a run, by their ids; True if unknown."""
    records = run_images.records
    if records is None:
        return True
    ids = itertools.chain.from_iterable(part.ids for part in source.parts.values())
    return sorted(ids) == sorted(image for image, _, _, _ in records)


def _read_image_list(path: Path) -> list[ImageRecord] | None:
    """Read an image list; None if it is missing or damaged."""
    try:
        # gzip verifies a checksum.
        text = gzip.decompress(path.read_bytes()).decode()
        rows = list(csv.reader(io.StringIO(text), strict=True))
        return [(image, label, split, digest) for image, label, split, digest in rows[1:]]
    except (OSError, EOFError, ValueError, zlib.error, csv.Error):
        return None
