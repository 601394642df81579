"""Write a data set as WebDataset shards, which `webdataset.read_shards` reads: `convlens shard`.

The training images are shuffled once, so that a few consecutive shards contain all classes.
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
from convlens.data.sources import find_configured_source
from convlens.data.types import DataSource, EncodedFiles, Part
from convlens.errors import UsageError
from convlens.utils.console import progress_bar
from convlens.utils.files import cannot_write

if TYPE_CHECKING:
    from convlens.recipe import DataConfig

IMAGES_PER_SHARD = 1000  # ImageNet's images of 110 KB give shards of 110 MB
SHUFFLE_SEED = 0
# File extensions by Pillow's format, if they differ from its name.
_EXTENSIONS = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}


@dataclass(frozen=True)
class WrittenShards:
    """Summary of an export: the source, the folder, the number of shards, and images by split."""

    data: str
    folder: str
    shards: int
    images: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_shards(config: DataConfig, target: str | Path) -> WrittenShards:
    """Write the data set that `config` names as shards; the splits are those of the source.

    Raises the errors of `find_source` and `write_shards`.
    """
    source = find_configured_source(config)
    paths = write_shards(source, Path(target))
    images = {split: len(part.labels) for split, part in source.parts.items()}
    return WrittenShards(source.name, str(target), len(paths), images)


def write_shards(
    source: DataSource, target: Path, *, per_shard: int = IMAGES_PER_SHARD
) -> list[Path]:
    """Write `target/{train,val,test}-000000.tar` and so on, and `classes.txt`.

    Image files are copied without changes, pixels are written as PNG. The same source gives the
    same bytes. The folder appears when it is complete.

    Args:
        source: the data set.
        target: a new folder.
        per_shard: images per shard.

    Returns:
        The paths of the shards.

    Raises:
        UsageError: `target` exists.
        UnreadableImage: a file is not an image. Its pixels are not decoded.
        ResourceError: the folder is not writable.
    """
    if target.exists():
        raise UsageError(
            "shards are only written into a new folder",
            where=str(target),
            fix="choose another folder",
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
    is_shuffled = split == "train"
    order = np.random.default_rng(SHUFFLE_SEED).permutation(count) if is_shuffled else range(count)
    paths = []
    with progress_bar(f"writing {split}", count) as bar:
        for start in range(0, count, per_shard):
            path = folder / f"{split}-{start // per_shard:06}.tar"
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for position in range(start, min(start + per_shard, count)):
                    number = int(order[position])
                    extension, content = _encode(part, number)
                    _add_file(tar, f"{position:08}.{extension}", content)
                    _add_file(tar, f"{position:08}.cls", f"{part.labels[number]}".encode())
                    bar.advance(1)
            paths.append(path)
    return paths


def _encode(part: Part, number: int) -> tuple[str, bytes]:
    """Return extension and bytes of one image."""
    if not isinstance(part.images, EncodedFiles):
        pixels = part.images[np.array([number])][0]
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return "png", stream.getvalue()
    content = part.images.read(number)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            kind = (opened.format or "").lower()
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise UnreadableImage(part.images.name(number), "it is not an image") from error
    return _EXTENSIONS.get(kind, kind), content


def _add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no times and owners: the same images give the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
