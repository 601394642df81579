"""Which image files a set has, kept with a run: so that what changed since can be named.

`images.csv.gz` has a line an image: id, class, split (empty: not used, or unreadable) and the first
16 digits of its file's SHA-256. It explains, warns and decides nothing: whether a set is the same
goes by its fingerprint.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape

from convlens.data import duplicates
from convlens.data.cache import ArrayRows, Conversion, as_index
from convlens.data.decode import UnreadableImage, probe_image
from convlens.data.duplicates import Duplicates
from convlens.data.sources import find_source
from convlens.data.splits import (
    IndexTensor,
    LoadedPart,
    Split,
    hold_out,
    load_part,
    make_splits,
    parts_of,
)
from convlens.data.types import DataSource, EncodedFiles, Part
from convlens.errors import DataError, UsageError
from convlens.utils.console import print_status
from convlens.utils.files import write_atomic

if TYPE_CHECKING:
    from convlens.recipe import DataConfig


IMAGES_FILE = "images.csv.gz"
IMAGES_COLUMNS = ("id", "class", "split", "sha256")
_MAX_SHOWN = 3

ImageRecord = tuple[str, str, str, str]


@dataclass(frozen=True)
class ImageList:
    """All image files of a set, and which split each is in."""

    classes: Sequence[str]
    parts: Sequence[LoadedPart]
    views: Mapping[str, tuple[LoadedPart, IndexTensor]]

    @classmethod
    def of(
        cls, classes: Sequence[str], views: Mapping[str, tuple[LoadedPart, IndexTensor]]
    ) -> ImageList:
        parts = {id(opened): opened for opened, _ in views.values()}
        return cls(classes, list(parts.values()), views)

    @property
    def of_files(self) -> bool:
        """Whether these are files; images of built-in sets have no names to tell."""
        return all(part.digests is not None for part in self.parts)

    def lines(self) -> Iterator[ImageRecord]:
        for opened in self.parts:
            assert opened.digests is not None
            splits = np.full(len(opened.part.labels), "", "U5")
            for name, (mine, index) in self.views.items():
                if mine is opened:
                    splits[opened.good[index]] = name
            labels = opened.part.labels.tolist()
            for number, (image, label) in enumerate(zip(opened.part.ids, labels, strict=True)):
                digest = opened.digests[number, :8].tobytes().hex()
                yield image, self.classes[label], str(splits[number]), digest

    def copies(self) -> Duplicates:
        """The used files that are equal byte for byte, as groups."""
        every = [(name, o, o.good[index]) for name, (o, index) in self.views.items()]
        heads = np.concatenate([_heads(o, numbers) for _, o, numbers in every])
        ordered = np.sort(heads)  # np.unique takes ten times as long
        again = np.isin(heads, ordered[1:][ordered[1:] == ordered[:-1]])
        ids, splits, labels, digests, start = list[str](), list[str](), list[str](), [], 0
        for name, opened, numbers in every:
            twins = numbers[again[start : start + len(numbers)]]
            start += len(numbers)
            assert opened.digests is not None
            digests.append(opened.digests[twins])
            for number in twins.tolist():
                ids.append(opened.part.ids[number])
                splits.append(name)
                labels.append(self.classes[opened.part.labels[number]])
        return Duplicates.of(
            duplicates.exact_duplicates(np.concatenate(digests)), ids, splits, labels
        )

    def write(self, folder: Path) -> None:
        """Into the folder of a run."""
        packed = io.BytesIO()
        with (
            gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0) as raw,
            io.TextIOWrapper(raw, "utf-8", newline="") as text,
        ):
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(IMAGES_COLUMNS)
            writer.writerows(self.lines())
        write_atomic(folder / IMAGES_FILE, packed.getvalue())

    def changed(self, folder: Path) -> str:
        """How these files differ from those that the run in `folder` began with, in words.

        Empty where that can't be told: an old run, a damaged list, or nothing but their order.
        """
        before = _read_image_list(folder / IMAGES_FILE)
        if before is None or not self.of_files:
            return ""
        now = {image: (label, digest) for image, label, _, digest in self.lines()}
        kept = before.keys() & now.keys()
        return "; ".join(
            [
                *_describe_changes("added", [i for i in now if i not in before]),
                *_describe_changes("removed", [i for i in before if i not in now]),
                *_describe_changes(
                    "with other content",
                    [i for i in now if i in kept and before[i][1] != now[i][1]],
                ),
                *_describe_changes(
                    "in another class", [i for i in now if i in kept and before[i][0] != now[i][0]]
                ),
            ]
        )


def _heads(opened: LoadedPart, numbers: IndexTensor) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of the digests of some files."""
    assert opened.digests is not None
    return np.ascontiguousarray(opened.digests[numbers, :8]).view(np.uint64)[:, 0]


def training_copies(folder: Path, opened: LoadedPart) -> int:
    """How many of these files are, byte for byte, among those that the run in `folder` trained on.

    0 where that can't be told: an old run, a damaged list, or images that are no files.
    """
    rows = _image_rows(folder / IMAGES_FILE) if opened.digests is not None else None
    if rows is None:
        return 0
    known = [digest for _, _, split, digest in rows if split == "train"]
    try:
        heads = np.array([int(digest, 16) for digest in known], np.uint64)
    except (ValueError, OverflowError):
        return 0
    mine = _heads(opened, opened.good).view(">u8")  # as the digits are read
    return int(np.isin(mine, heads).sum())


def _describe_changes(what: str, images: Sequence[str]) -> list[str]:
    if not images:
        return []
    rest = " ..." if len(images) > _MAX_SHOWN else ""
    return [f"{len(images):,} {what}: {', '.join(images[:_MAX_SHOWN])}{rest}"]


def _read_image_list(path: Path) -> dict[str, tuple[str, str]] | None:
    """Class and digest by id; None where there is no whole list."""
    rows = _image_rows(path)
    if rows is None:
        return None
    return {image: (label, digest) for image, label, _, digest in rows}


def _image_rows(path: Path) -> list[ImageRecord] | None:
    try:
        # gzip has a sum of its own.
        text = gzip.decompress(path.read_bytes()).decode()
        rows = list(csv.reader(io.StringIO(text), strict=True))
        return [(image, label, split, digest) for image, label, split, digest in rows[1:]]
    except (OSError, EOFError, ValueError, zlib.error, csv.Error):
        return None


# ---- arrays ----------------------------------------
# Images that are arrays already (the scikit-learn estimator's way in).


def data_from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    val_fraction: float,
    seed: int,
    fit: str = "crop",
) -> Data:
    """A set in memory: validation held out, stratified; there is no test split in it.

    Args:
        images: uint8 `[N, C, S, S]`.
        labels: positions in `classes`, int64 `[N]`.
        fit: how `images` became square; what is predicted later is made so in the same way.
    """
    keep, held = hold_out(labels, val_fraction, seed, names=classes)
    pixels = torch.from_numpy(images)

    def part(index: np.ndarray) -> Split:
        ids = [f"array/{i}" for i in index.tolist()]
        return Split(ArrayRows(pixels[as_index(index)]), as_index(labels[index]), ids)

    def no_test() -> Split:
        raise UsageError("an estimator fitted on arrays has no test split", fix="call score(X, y)")

    digest = hashlib.sha256(repr((tuple(classes), images.shape)).encode())
    digest.update(images.data)
    digest.update(labels.tobytes())
    total = len(labels)
    return Data(
        name="arrays",
        classes=tuple(classes),
        image_size=images.shape[2],
        channels=images.shape[1],
        fit=fit,
        train=part(keep),
        val=part(held),
        fingerprint=digest.hexdigest(),
        how={
            "train": f"{len(keep):,} of {total:,} images given to fit",
            "val": f"{len(held):,} of {total:,} images held out (stratified, seed {seed})",
        },
        held_out={"val": [f"array/{i}" for i in held.tolist()]},
        skipped={},
        notes=(),
        listing=None,
        _test=no_test,
    )


# ----   init   ----------------------------------------
# Data: from a name to three sealed splits of uint8 images. `load` is the one way in.

__all__ = ["Data", "Split", "channel_stats", "load_data", "load_external_data"]

STANDARD_SIZES = (16, 28, 32, 48, 64, 96, 128)  # what the automatic image size snaps down to
MAX_PROBED = 200


@dataclass(frozen=True)
class Data:
    """A set ready for training. The test split stays sealed until `unseal_test`."""

    name: str
    classes: tuple[str, ...]
    image_size: int
    channels: int
    fit: str
    train: Split
    val: Split
    fingerprint: str  # SHA-256 over classes, ids, labels, contents and conversion of all splits
    how: dict[str, str]  # one sentence a split: where it came from
    held_out: dict[str, list[str]]  # ids of what we took out of the source's train split
    skipped: dict[str, str]  # unreadable images, left out because of data.on_bad=skip: id -> why
    notes: tuple[str, ...]  # what else a reader should know about the source
    listing: ImageList | None  # of its image files; built-in sets have none
    _test: Callable[[], Split] = field(repr=False)

    def unseal_test(self) -> Split:
        """The test split. Only `evaluation` may ask for it."""
        return self._test()


def load_data(config: DataConfig, *, memory_budget: int) -> Data:
    """The data of a recipe: found, decoded, checked, and split in three.

    What the source lacks (val, test) is held out of its train split, stratified and seeded.
    The validation split is empty where `data.val_fraction` is 0.
    Sets of at most `memory_budget` bytes are in memory, larger ones are read when asked for.

    Raises:
        DataError: images that can't be read (all of them at once, unless data.on_bad=skip),
            classes too small to split, a source that is missing or malformed.
        UsageError: no such name, or keys that do not apply to this source.
    """
    asked_size = None if config.image_size == "auto" else int(config.image_size)
    source = find_source(config.name, count=config.count, image_size=asked_size, group=config.group)
    for note in source.notes:
        print_status(escape(f"{source.name}: {note}"))
    conversion = _conversion(config, source.parts["train"])
    parts = parts_of(config, source)
    opened = {s: load_part(part, conversion, memory_budget) for s, part in parts.items()}
    if config.on_bad == "stop":
        lists = f"`convlens audit {config.name}` lists all"
        _refuse_unreadable(opened, f"{lists}; replace them, or set data.on_bad=skip")
    skipped = _skipped(opened, source, config)
    pool = opened["train"]
    keep, out, how = make_splits(config, source, opened)
    views = {"train": (pool, keep)}
    for split in ("val", "test"):
        views[split] = (pool, out[split]) if split in out else (opened[split], opened[split].all())
    size = sum(len(index) for _, index in views.values()) * conversion.image_bytes
    resident = size <= memory_budget
    listing = ImageList.of(source.classes, views)
    if listing.of_files:
        _report_copies(listing, config.name, source.name)
    return Data(
        name=source.name,
        classes=source.classes,
        image_size=conversion.size,
        channels=conversion.channels,
        fit=conversion.fit,
        train=pool.split(keep, resident=resident),
        val=views["val"][0].split(views["val"][1], resident=resident),
        fingerprint=_fingerprint(source.classes, conversion, views),
        how=how,
        held_out={split: list(pool.ids_of(index)) for split, index in out.items()},
        skipped=skipped,
        notes=source.notes,
        listing=listing if listing.of_files else None,
        _test=lambda: views["test"][0].split(views["test"][1], resident=resident),
    )


def load_external_data(
    name: str,
    split: str,
    *,
    image_size: int,
    channels: int,
    fit: str,
    memory_budget: int,
    tested: bool = False,
    run: Path | None = None,
) -> tuple[Split, tuple[str, ...], str, str]:
    """Another set as a trained model sees images: `(split, its classes, its name, fingerprint)`.

    The part called `split` of a set that has several, else all of it; nothing is held out.

    Args:
        tested: as for `sources.find`.
        run: the folder of the model's run; it is said how many of the images it trained on.

    Raises:
        DataError: no such part; images that can't be read; as `load`.
    """
    source = find_source(name, image_size=image_size, tested=tested)
    for note in source.notes:
        print_status(escape(f"{source.name}: {note}"))
    alone = len(source.parts) == 1
    part = next(iter(source.parts.values())) if alone else source.parts.get(split)
    if part is None:
        fix = f"it has: {', '.join(source.parts)}"
        raise DataError(f"{source.name!r} has no {split} images", where=name, fix=fix)
    conversion = Conversion(image_size, channels, fit)
    opened = load_part(part, conversion, memory_budget)
    # The audit is for sets that can be trained on, too.
    lists = f" (`convlens audit {name}` lists all)" if len(source.classes) > 1 else ""
    _refuse_unreadable({split: opened}, f"replace them, or move them out of the set{lists}")
    known = training_copies(run, opened) if run is not None else 0
    if known:
        print_status(
            escape(f"{source.name}: {known:,} of {len(opened.good):,} images are among those ")
            + "that the model was trained on (the same files): they test what it remembers"
        )
    fingerprint = _fingerprint(source.classes, conversion, {split: (opened, opened.all())})
    resident = opened.rows.shape[0] * conversion.image_bytes <= memory_budget
    return opened.split(opened.all(), resident=resident), source.classes, source.name, fingerprint


def channel_stats(split: Split) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, in units of 0..1.

    Exact up to 100,000 images, from that many evenly spaced ones beyond. A deviation is at
    least 1/255, so that images of one colour can still be divided by it.
    """
    n, channels, height, width = split.rows.shape
    chosen = np.unique(np.linspace(0, n - 1, min(n, 100_000)).round().astype(np.int64))
    sums, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    step = max(1, (1 << 22) // (height * width * channels))
    for start in range(0, len(chosen), step):
        images = split.rows.gather(as_index(chosen[start : start + step])).numpy()
        sums += images.sum((0, 2, 3), dtype=np.int64)
        # A byte's square fits 16 bits: exact whole numbers, without a float copy of the images.
        squares += np.square(images, dtype=np.uint16).sum((0, 2, 3), dtype=np.int64)
    pixels = len(chosen) * height * width
    mean = [int(s) / pixels / 255 for s in sums]
    # Python's whole numbers don't overflow: n * sum(x^2) - sum(x)^2 without cancellation.
    spread = [int(q) * pixels - int(s) ** 2 for s, q in zip(sums, squares, strict=True)]
    return mean, [max(math.sqrt(v) / pixels, 1.0) / 255 for v in spread]


def _conversion(config: DataConfig, train: Part) -> Conversion:
    """The recipe's size and channels, with `auto` replaced by what the images suggest."""
    if not isinstance(train.images, EncodedFiles):
        native_channels, native_size = int(train.images.shape[1]), int(train.images.shape[2])
    else:
        native_channels, native_size = _suggest_image_size(train.images)
    size = native_size if config.image_size == "auto" else int(config.image_size)
    channels = native_channels if config.channels == "auto" else int(config.channels)
    return Conversion(size, channels, config.fit)


def _suggest_image_size(files: EncodedFiles) -> tuple[int, int]:
    """Channels and size for image files, from the headers of up to 200 of them."""
    facts = []
    for i in np.unique(np.linspace(0, len(files) - 1, MAX_PROBED).round().astype(int)).tolist():
        try:
            facts.append(probe_image(files.read(i), files.name(i)))
        except UnreadableImage:
            continue  # decoding lists all unreadable files, with their reasons
    if not facts:
        return 3, 32
    short = statistics.median(min(f.width, f.height) for f in facts)
    size = max((s for s in STANDARD_SIZES if s <= short), default=STANDARD_SIZES[0])
    return (1 if all(f.grey for f in facts) else 3), size


def _report_copies(listing: ImageList, asked: str, name: str) -> None:
    """Says of equal files what makes them do harm."""
    copies = listing.copies()
    harm = {"in more than one split": copies.across_splits, "under two labels": copies.two_labels}
    told = ", ".join(f"{count:,} {what}" for what, count in harm.items() if count)
    if told:
        print_status(
            escape(
                f"{name}: images that are there more than once: {told} "
                f"(`convlens audit {asked}` lists them)"
            )
        )


def _refuse_unreadable(opened: dict[str, LoadedPart], fix: str) -> None:
    bad = [(o.part.ids[i], reason) for o in opened.values() for i, reason in o.bad.items()]
    if not bad:
        return
    total = sum(len(o.part.labels) for o in opened.values())
    listed = "; ".join(f"{path}: {reason}" for path, reason in bad[:10])
    more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
    raise DataError(
        f"{len(bad)} of {total} images can't be read",
        where=listed + more,
        fix=fix,
    )


def _skipped(
    opened: dict[str, LoadedPart], source: DataSource, config: DataConfig
) -> dict[str, str]:
    """Why each unreadable image, by its id, is left out; of each class some must stay.

    Raises:
        DataError: a split, or a class of it, loses more than `max_bad` of its images (one may go).
    """
    have = np.bincount(opened["train"].labels, minlength=len(source.classes))
    lost = [source.classes[c] for c in np.flatnonzero(have == 0)]
    if lost:
        raise DataError(f"no readable training image in: {', '.join(lost[:5])}", where=source.name)
    beyond = []
    for split, its in opened.items():
        labels = its.part.labels
        of = np.bincount(labels, minlength=len(source.classes))
        bad = np.bincount(labels[list(its.bad)], minlength=len(source.classes))
        names = (f"all of {split}", *source.classes)
        for name, n, count in zip(names, [bad.sum(), *bad], [of.sum(), *of], strict=True):
            if n > max(1, config.max_bad * count):
                beyond.append(f"{name} ({n:,} of {count:,})")
    if beyond:
        more = f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
        raise DataError(
            f"more than {config.max_bad:.0%} can't be read of {', '.join(beyond[:5])}{more}",
            where=source.name,
            fix=f"`convlens audit {config.name}` says why; replace them, or raise data.max_bad",
        )
    skipped = {o.part.ids[i]: reason for o in opened.values() for i, reason in o.bad.items()}
    if skipped:
        print_status(escape(f"{source.name}: {len(skipped)} unreadable images are skipped"))
    return skipped


def _fingerprint(
    classes: Sequence[str], conversion: Conversion, views: dict[str, tuple[LoadedPart, IndexTensor]]
) -> str:
    digest = hashlib.sha256(repr((tuple(classes), conversion)).encode())
    for split, (opened, index) in views.items():
        digest.update(f"\0{split}\0{opened.content}\0".encode())
        ids = opened.ids_of(index)
        for start in range(0, len(ids), 1 << 16):  # a joined text of millions would be in memory
            digest.update(("\0" * (start > 0) + "\0".join(ids[start : start + (1 << 16)])).encode())
        digest.update(opened.labels[index].tobytes())
    return digest.hexdigest()
