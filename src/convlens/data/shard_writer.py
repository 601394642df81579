"""Writes a set as shards that WebDataset and `shards.read_shards` read: `convlens shard`.

The training images are shuffled once, so that a few neighbouring shards hold all classes.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from convlens.data.decode import FORMATS, UnreadableImage
from convlens.data.sources import find_source
from convlens.data.types import DataSource, EncodedFiles, Part
from convlens.errors import UsageError
from convlens.utils.console import progress_bar
from convlens.utils.files import cannot_write

if TYPE_CHECKING:
    from convlens.recipe import DataConfig

IMAGES_PER_SHARD = 1000  # images of 110 KB, as ImageNet's are, come to 110 MB
_SEED = 0


@dataclass(frozen=True)
class WrittenShards:
    """What was written: images by split, in how many shards, into which folder."""

    data: str
    folder: str
    shards: int
    images: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_shards(config: DataConfig, target: str | Path) -> WrittenShards:
    """Writes the images that `config` names as shards; splits are the source's own.

    Errors are those of `find` and `write_shards`.
    """
    size = None if config.image_size == "auto" else int(config.image_size)
    source = find_source(config.name, count=config.count, image_size=size, group=config.group)
    paths = write_shards(source, Path(target))
    images = {split: len(part.labels) for split, part in source.parts.items()}
    return WrittenShards(source.name, str(target), len(paths), images)


def write_shards(
    source: DataSource, target: Path, *, per_shard: int = IMAGES_PER_SHARD
) -> list[Path]:
    """Writes `target/{train,val,test}-000000.tar` and so on, with `classes.txt`; their paths.

    Image files are copied byte by byte, pixels become PNGs. The same source gives the same bytes.
    The folder appears when it is whole.

    Raises:
        UsageError: `target` is there already.
        UnreadableImage: the first image that is no image; what its pixels are isn't looked at.
        ResourceError: it can't be written.
    """
    if target.exists():
        raise UsageError(
            "shards are only written into a new folder", where=str(target), fix="name another one"
        )
    temporary = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
        names = "".join(f"{name}\n" for name in source.classes)
        Path(temporary, "classes.txt").write_text(names, "utf-8")
        written = [
            path
            for split, part in source.parts.items()
            for path in _write_part(part, split, Path(temporary), per_shard)
        ]
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        os.replace(temporary, target)
    except BaseException as error:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise cannot_write(target, error) from error
        raise
    return [target / path.name for path in written]


def _write_part(part: Part, split: str, folder: Path, per_shard: int) -> list[Path]:
    count = len(part.labels)
    order = np.random.default_rng(_SEED).permutation(count) if split == "train" else range(count)
    paths = []
    with progress_bar(f"writing {split}", count) as bar:
        for start in range(0, count, per_shard):
            path = folder / f"{split}-{start // per_shard:06}.tar"
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for position in range(start, min(start + per_shard, count)):
                    number = int(order[position])
                    kind, content = _encoded(part, number)
                    _add(tar, f"{position:08}.{kind}", content)
                    _add(tar, f"{position:08}.cls", f"{part.labels[number]}".encode())
                    bar.advance(1)
            paths.append(path)
    return paths


def _encoded(part: Part, number: int) -> tuple[str, bytes]:
    """One image's extension and bytes."""
    if not isinstance(part.images, EncodedFiles):
        pixels = part.images[np.array([number])][0]
        out = io.BytesIO()
        Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(
            out, "PNG"
        )
        return "png", out.getvalue()
    content = part.images.read(number)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            kind = (image.format or "").lower()
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise UnreadableImage(part.images.name(number), "it is no image") from error
    return {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}.get(kind, kind), content


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without times and owners: the same images, the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
