"""Writing data sets as shards: the same images come back, files byte by byte."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convlens.data.shard_writer import write_shards
from convlens.data.sources import find_source
from convlens.data.tar_index import TarMembers
from convlens.data.webdataset import read_shards
from convlens.errors import UsageError
from helpers.commands import here, refused
from helpers.shards import png


def test_written_shards_contain_the_same_images(tmp_path: Path) -> None:
    drawn = find_source("shapes", count=50, image_size=16)
    out = tmp_path / "out"
    paths = write_shards(drawn, out, per_shard=20)
    assert [p.name for p in paths] == [f"train-00000{n}.tar" for n in range(3)]
    source = find_source(str(out))
    assert source.classes == drawn.classes
    part, original = source.parts["train"], drawn.parts["train"]
    order = np.random.default_rng(0).permutation(50)
    assert part.labels.tolist() == original.labels[order].tolist()
    assert isinstance(part.images, TarMembers)
    for i in (0, 19, 20, 49):
        pixels = np.asarray(Image.open(io.BytesIO(part.images.read(i)))).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels, original.images[order[[i]]][0])  # type: ignore[index]
    write_shards(drawn, tmp_path / "again", per_shard=20)
    for path in paths:
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(UsageError, match="only written into a new folder"):
        write_shards(drawn, out)


def test_files_are_copied_into_shards_byte_by_byte(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 4)):
        for i in range(count):
            path = tmp_path / "set" / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(png(i))).save(path, "JPEG")
    out = tmp_path / "shards"
    done = here("shard", tmp_path / "set", out, "--json")
    assert done.json["images"] == {"train": 6, "val": 4}
    assert done.json["shards"] == 2
    source, original = find_source(str(out)), find_source(str(tmp_path / "set"))
    assert source.classes == ("a", "b")
    for split in ("train", "val"):
        images = source.parts[split].images
        assert isinstance(images, TarMembers)
        files = {Path(p).read_bytes() for p in original.parts[split].images}  # type: ignore[union-attr]
        assert {images.read(i) for i in range(len(images))} == files
    # Shards are a source of shards, too. A damaged image is reported, and no folder remains.
    write_shards(source, tmp_path / "twice")
    assert read_shards(tmp_path / "twice", "x").parts["val"].labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "set" / "val" / "a" / "0.jpg").write_text("no image")
    refused(here("shard", tmp_path / "set", tmp_path / "bad"), 3, "not an image", "0.jpg")
    assert sorted(p.name for p in tmp_path.iterdir() if "bad" in p.name) == []
