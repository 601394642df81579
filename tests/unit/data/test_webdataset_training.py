"""Trainings on shards: streamed rows, order of the shards, and the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convlens.data import dataset
from convlens.data.cache import DecodedRows, StoredRows
from convlens.data.loader import Batches, Normalize, ShardOrder, epoch_order
from convlens.errors import DataError
from convlens.recipe import DataConfig
from helpers.commands import here, refused, weights
from helpers.shards import png, samples, shards, tar
from helpers.support import PLAN

ENOUGH_MEMORY = 1 << 30
NET = (
    "model.widths=[4,8]",
    "train.epochs=2",
    "train.batch_size=16",
    "optim.ema=null",
    "data.image_size=8",
    "train.memory_format=contiguous",
    "train.precision=fp32",
    "augment=[RandomHorizontalFlip]",
)


def folder_and_shards(root: Path, count: int = 60, per: int = 7) -> tuple[Path, Path]:
    """Write the same images in the same order as class folders and as shards."""
    for i in range(count):
        path = root / "folder" / f"{i // (count // 2)}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    for start in range(0, count, per):
        numbers = range(start, min(start + per, count))
        labels = [i // (count // 2) for i in numbers]
        tar(root / "tars" / f"set-{start // per:06}.tar", samples(labels, start))
    return root / "folder", root / "tars"


def test_shards_train_to_the_weights_of_the_same_image_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shard_folder = folder_and_shards(tmp_path)
    results = {}
    for name, data, memory in (
        ("folder", folder, "1GB"),
        ("in_memory", shard_folder, "1GB"),
        ("streamed", shard_folder, "0.001MB"),
    ):
        monkeypatch.setenv("CONVLENS_MEMORY", memory)
        done = here("train", data, *NET, "--name", name, "--json")
        assert done.code == 0, done.err
        results[name] = done.json
    weights_of = {name: weights(Path("models") / name) for name in results}
    for name in ("in_memory", "streamed"):
        assert all(torch.equal(w, weights_of[name][k]) for k, w in weights_of["folder"].items())
        for key in ("correct", "loss", "confusion", "n"):
            assert results[name][key] == results["folder"][key]
    # The same images were held out, by their positions.
    tables = [
        Path("models", n, "split.csv").read_text().splitlines() for n in ("folder", "streamed")
    ]
    ends = [
        [(line.split(",")[0][-4:], line[-4:]) for line in lines[1:]]
        for lines in ([line.replace(".png", "") for line in tables[0]], tables[1])
    ]
    assert ends[0] == ends[1]
    suffixes = [path.suffix for path in (tmp_path / "cache").iterdir()]
    assert sorted(suffix for suffix in suffixes if suffix != ".lock") == [
        ".checked",
        ".index",
        ".pixels",
        ".pixels",
    ]


def test_rows_are_streamed_only_beyond_the_memory_budget(tmp_path: Path) -> None:
    root = shards(tmp_path / "x", {"train": 40, "val": 10, "test": 10})
    config = DataConfig(name=str(root), image_size=8)
    in_memory = dataset.load_data(config, memory_budget=ENOUGH_MEMORY)
    streamed = dataset.load_data(config, memory_budget=1000)
    assert in_memory.train.rows.in_memory_tensor() is not None
    assert isinstance(streamed.train.rows, DecodedRows)
    again = dataset.load_data(config, memory_budget=1000)  # from the cache
    index = torch.tensor([39, 0, 7, 7, 12])
    for data in (streamed, again):
        assert torch.equal(in_memory.train.rows.gather(index), data.train.rows.gather(index))
        assert data.fingerprint == in_memory.fingerprint
        assert data.train.shards is not None
        assert torch.equal(data.train.shards.shard_ids, torch.arange(40) // 10)
    # Although decoded images are in the cache from the larger budget.
    assert not isinstance(streamed.train.rows, StoredRows)


def test_an_epoch_of_shards_resumes_with_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convlens.data.loader.WINDOW_IMAGES", 16)
    root = shards(tmp_path / "x", {"train": 40, "val": 10, "test": 10}, per=5)
    train = dataset.load_data(DataConfig(name=str(root), image_size=8), memory_budget=1000).train

    def batches() -> Batches:
        return Batches(
            train,
            batch_size=6,
            normalize=Normalize([0.5] * 3, [0.5] * 3),
            plan=PLAN,
            seed=1,
            shards=train.shards,
        )

    full = list(batches().epoch(2))
    assert len(full) == 7
    for start in (0, 3, 6, 7):
        resumed = list(batches().epoch(2, start))
        assert len(resumed) == 7 - start
        for expected, batch in zip(full[start:], resumed, strict=True):
            assert all(map(torch.equal, expected, batch))
    # The first window consists of four of the eight shards, 20 images.
    order = epoch_order(40, 1, 2, train.shards)
    assert len(set((order[:20] // 5).tolist())) == 4
    assert not torch.equal(order, epoch_order(40, 1, 2))


def test_shards_are_prefetched_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convlens.data.loader.WINDOW_IMAGES", 16)
    root = shards(tmp_path / "x", {"train": 40, "val": 10, "test": 10}, per=5)
    train = dataset.load_data(DataConfig(name=str(root), image_size=8), memory_budget=1000).train
    assert train.shards is not None
    prefetched: list[int] = []
    spy = ShardOrder(train.shards.shard_ids, prefetched.extend)
    normalize = Normalize([0.5] * 3, [0.5] * 3)
    batches = Batches(train, batch_size=4, normalize=normalize, plan=PLAN, seed=1, shards=spy)
    order = epoch_order(40, 1, 1, spy)
    for step, _ in enumerate(batches.epoch(1)):
        # Including the shards of the next two batches (half a window).
        assert set(train.shards.shard_ids[order[: 4 * (step + 3)]].tolist()) <= set(prefetched)
    assert set(prefetched) == set(range(8))


def test_unreadable_images_in_shards_are_reported_or_skipped(tmp_path: Path) -> None:
    content = samples([i % 2 for i in range(40)])
    content[8], content[10] = ("0004.png", b"no image"), ("0005.png", b"")
    tar(tmp_path / "x" / "train-0.tar", content)
    for budget in (1000, ENOUGH_MEMORY):
        config = DataConfig(name=str(tmp_path / "x"), image_size=8)
        with pytest.raises(DataError, match="2 of 40 images can't be read") as caught:
            dataset.load_data(config, memory_budget=budget)
        assert "train-0.tar/0004: it is text" in str(caught.value.where)
        assert "train-0.tar/0005: it is empty" in str(caught.value.where)
        skipped = dataset.load_data(
            config.model_copy(update={"on_bad": "skip"}), memory_budget=budget
        )
        assert list(skipped.skipped) == ["train-0.tar/0004", "train-0.tar/0005"]


def test_commands_accept_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shards(tmp_path / "x", {"train": 60, "val": 10, "test": 10})
    audit = here("audit", root, "--json")
    assert audit.code == 0, audit.err
    assert audit.json["counts"]["0"] == {"train": 30, "val": 5, "test": 5}
    assert Path(audit.json["contact_sheet"]).exists()
    monkeypatch.setenv("CONVLENS_MEMORY", "0.001MB")
    done = here("train", root / "train-{0..5}.tar", *NET)
    assert done.code == 0, done.err
    (run,) = Path("models").iterdir()
    # The test shards of another set; then the shards of a single split by a pattern.
    test = here("evaluate", run.name, "--data", root, "--json")
    assert test.json["n"] == 10, test.err
    val = here("evaluate", run.name, "--data", root / "val-{0..0}.tar", "--json")
    assert val.json["n"] == 10
    refused(here("train", root / "nothing-{0..2}.tar"), 3, "3 of 3 shards do not exist")
    (root / "train-3.tar").write_bytes((root / "train-3.tar").read_bytes()[:1500])
    refused(here("train", root), 3, "cut short", "train-3.tar")
