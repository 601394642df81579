"""The decode cache: its key, its locks, damaged and missing stores; and rows of images."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convlens.data import cache, types
from convlens.data.cache import (
    ArrayRows,
    DecodedRows,
    FixedSizeRecords,
    IndexedRows,
    Reader,
    StoredRows,
    decode_images,
    in_memory,
)
from convlens.data.decode import Conversion, UnreadableImage
from convlens.data.types import FilePaths
from convlens.errors import DataError, ResourceError
from helpers.launching import FORK_SERVER
from helpers.support import BAD_DISK

GREY8 = Conversion(8, 1, "crop")
PLENTY = 1 << 30


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path, count: int) -> FilePaths:
    """PNGs 8 x 8; every pixel of file i is i."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("L", (8, 8), i % 256).save(folder / f"{i:05d}.png")
    return FilePaths([str(folder / f"{i:05d}.png") for i in range(count)])


def index(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the names of all decoded files are appended."""
    seen: list[str] = []
    real = types.read_bytes

    def counted(path: str) -> bytes:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(types, "read_bytes", counted)
    return seen


def test_second_start_decodes_nothing(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, seen = files(tmp_path / "a", 100), decodes(monkeypatch)
    first = decode_images(paths, GREY8, memory_budget=PLENTY)
    assert sorted(seen) == list(paths)
    second = decode_images(paths, GREY8, memory_budget=PLENTY)
    assert len(seen) == 100
    assert first.content == second.content
    for found in (first, second):
        assert isinstance(found.rows, StoredRows)
        assert found.rows.shape == (100, 1, 8, 8)
        got = found.rows.gather(index(99, 3, 4, 5, 5, 0))
        assert got.dtype == torch.uint8
        np.testing.assert_array_equal(got[:, 0, 7, 7], [99, 3, 4, 5, 5, 0])
        assert found.rows.gather(index()).shape == (0, 1, 8, 8)
    assert [p.suffix for p in sorted(store.iterdir())] == [".lock", ".pixels"]


def test_cache_key_changes_with_every_input(tmp_path: Path, store: Path) -> None:
    paths = files(tmp_path / "a", 3)
    keys = {cache._key(paths, GREY8)}
    keys.add(cache._key(FilePaths(paths[:2]), GREY8))
    keys.add(cache._key(FilePaths(paths[::-1]), GREY8))
    keys.add(cache._key(paths, Conversion(9, 1, "crop")))
    keys.add(cache._key(paths, Conversion(8, 3, "crop")))
    keys.add(cache._key(paths, Conversion(8, 1, "pad")))
    keys.add(cache._key(paths, Conversion(8, 1, "crop", value_range=(0, 9))))
    keys.add(cache._key(paths, Conversion(8, 1, "crop", background="alpha")))
    # Same size and, by force, the same modification time: the change time differs.
    before = os.stat(paths[0])
    time.sleep(0.02)
    content = bytearray(Path(paths[0]).read_bytes())
    Path(paths[0]).write_bytes(bytes(content))
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    keys.add(cache._key(paths, GREY8))
    assert len(keys) == 9
    # Stores of 8-bit sets keep the names that earlier versions gave them.
    of_earlier_versions = (
        f"(2, Conversion(size=8, channels=1, fit='crop'), {paths.stat_digest()!r})"
    )
    assert cache._key(paths, GREY8) == sha256(of_earlier_versions.encode()).hexdigest()[:40]


def test_images_that_earlier_versions_refused_for_nan_are_decoded_again(
    tmp_path: Path, store: Path
) -> None:
    paths = files(tmp_path / "a", 3)
    for reason, kept in (
        ("damaged (it holds values that are not finite (NaN or infinity))", {}),
        ("the file is cut short", {1: "the file is cut short"}),
    ):
        with pytest.MonkeyPatch.context() as patch:
            decode = Conversion.file

            def refuse(
                conversion: Conversion,
                source: bytes,
                name: str,
                reason: str = reason,
                decode: Any = decode,
            ) -> Any:
                if name == paths[1]:
                    raise UnreadableImage(name, reason)
                return decode(conversion, source, name)

            patch.setattr(Conversion, "file", refuse)
            patch.setattr(cache, "NAN_REFUSED", "of an earlier version")
            assert decode_images(paths, GREY8, memory_budget=PLENTY).bad == {1: reason}
        assert decode_images(paths, GREY8, memory_budget=PLENTY).bad == kept
        for path in store.iterdir():
            path.unlink()


def test_content_hash_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    one = decode_images(files(tmp_path / "a", 5), GREY8, memory_budget=PLENTY)
    two = decode_images(files(tmp_path / "b", 5), GREY8, memory_budget=PLENTY)
    three = decode_images(files(tmp_path / "c", 6), GREY8, memory_budget=PLENTY)
    assert one.content == two.content != three.content


def test_unreadable_files_are_black_and_listed(tmp_path: Path) -> None:
    paths = files(tmp_path / "a", 70)
    Path(paths[40]).write_bytes(b"")
    Path(paths[3]).write_text("no image at all")
    os.unlink(paths[69])
    for _ in range(2):
        found = decode_images(paths, GREY8, memory_budget=PLENTY)
        assert list(found.bad) == [3, 40, 69]
        assert "text" in found.bad[3]
        assert "empty" in found.bad[40]
        assert "no such file" in found.bad[69]
        np.testing.assert_array_equal(
            found.rows.gather(index(2, 3, 4, 41))[:, 0, 0, 0], [2, 0, 4, 41]
        )


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_store_is_built_again(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    paths = files(tmp_path / "a", 10)
    decode_images(paths, GREY8, memory_budget=PLENTY)
    (pixels,) = store.glob("*.pixels")
    intact = pixels.read_bytes()
    pixels.write_bytes({"cut": intact[:-20], "garbage": b"x" * 50, "empty": b""}[damage])
    seen = decodes(monkeypatch)
    found = decode_images(paths, GREY8, memory_budget=PLENTY)
    assert len(seen) == 10
    assert found.rows.gather(index(9))[0, 0, 0, 0] == 9
    assert pixels.read_bytes() == intact


def test_interrupted_decoding_leaves_no_file(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(types, "read_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        decode_images(files(tmp_path / "a", 10), GREY8, memory_budget=PLENTY)
    assert [p.suffix for p in store.iterdir()] == [".lock"]


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    monkeypatch.setenv("CONVLENS_CACHE", str(tmp_path / "file" / "cache"))


@pytest.mark.usefixtures("no_cache")
def test_without_a_cache_small_sets_stay_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = decode_images(files(tmp_path / "a", 40), GREY8, memory_budget=40 * 64)
    assert isinstance(found.rows, ArrayRows)
    assert found.rows.gather(index(39, 1))[:, 0, 0, 0].tolist() == [39, 1]
    message = capsys.readouterr().err
    assert "kept in memory" in message
    assert "CONVLENS_CACHE" in message


@pytest.mark.usefixtures("no_cache")
def test_without_a_cache_large_sets_are_decoded_again(tmp_path: Path) -> None:
    paths = files(tmp_path / "a", 40)
    found = decode_images(paths, GREY8, memory_budget=100)
    assert isinstance(found.rows, DecodedRows)
    assert found.rows.shape == (40, 1, 8, 8)
    assert found.rows.gather(index(39, 1, 39))[:, 0, 0, 0].tolist() == [39, 1, 39]
    taken = found.rows.subset(index(10, 20, 30))
    assert taken.gather(index(2, 0))[:, 0, 0, 0].tolist() == [30, 10]
    Image.new("L", (8, 8), 77).save(paths[5])
    os.unlink(paths[6])
    with pytest.raises(DataError, match="changed since the start"):
        found.rows.gather(index(4, 5))
    with pytest.raises(DataError, match="can't be read any more: there is no such file"):
        found.rows.gather(index(6))
    assert found.rows.gather(index(7))[0, 0, 0, 0] == 7


def test_full_disk_keeps_images_in_memory(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)
    found = decode_images(files(tmp_path / "a", 4), GREY8, memory_budget=PLENTY)
    assert isinstance(found.rows, ArrayRows)
    assert "not enough disk space" in capsys.readouterr().err
    assert not list(store.glob("*.pixels"))


def failing(monkeypatch: pytest.MonkeyPatch, number: int, name: str = ".png") -> None:
    """Make `os.open` fail for files whose path ends with `name`."""
    real = os.open

    def refused(path: object, *args: int) -> int:
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number))
        return real(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refused)


@pytest.mark.parametrize(
    "number",
    [
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EAGAIN,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
    ],
)
def test_transient_errors_are_raised_and_not_cached(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    paths = files(tmp_path / "a", 3)
    with monkeypatch.context() as patch:
        failing(patch, number, "00001.png")
        with pytest.raises(ResourceError, match=os.strerror(number)) as caught:
            decode_images(paths, GREY8, memory_budget=PLENTY)
    assert caught.value.where == paths[1]
    assert caught.value.fix
    assert [path.suffix for path in store.iterdir()] == [".lock"]
    assert decode_images(paths, GREY8, memory_budget=PLENTY).bad == {}


def test_permanent_errors_are_cached_as_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = list(files(tmp_path / "a", 6))
    os.unlink(paths[0])
    os.unlink(paths[1])
    os.symlink(paths[1], paths[1])
    os.unlink(paths[2])
    os.mkdir(paths[2])
    paths[3] = str(tmp_path / ("x" * 300 + ".png"))
    paths[4] = f"{paths[5]}/0.png"
    with monkeypatch.context() as patch:
        failing(patch, errno.EACCES, "00005.png")
        found = decode_images(FilePaths(paths), GREY8, memory_budget=PLENTY)
    reasons = [
        "no such file",
        "symbolic links",
        "folder",
        "name too long",
        "Not a dir",
        "permission",
    ]
    assert [text in found.bad[i] for i, text in enumerate(reasons)] == [True] * 6, found.bad
    seen = decodes(monkeypatch)
    assert decode_images(FilePaths(paths), GREY8, memory_budget=PLENTY).bad == found.bad
    assert seen == []


def test_next_decoding_removes_files_of_a_killed_one(tmp_path: Path, store: Path) -> None:
    paths = files(tmp_path / "a", 3)
    store.mkdir()
    key = cache._key(paths, GREY8)
    other_temp = f".{'0' * 40}.pixels.abcdefgh.part"
    for name in (f".{key}.pixels.abcdefgh.part", other_temp):
        (store / name).write_bytes(b"half")
    decode_images(paths, GREY8, memory_budget=PLENTY)
    names = {path.name for path in store.iterdir()}
    assert names == {other_temp, f"{key}.lock", f"{key}.pixels"}


def test_disk_errors_while_reading_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = memoryview(bytearray(4))
    with pytest.raises(ResourceError, match="Input/output error") as caught:
        Reader(BAD_DISK).fill(buffer, 0)
    assert caught.value.where == str(BAD_DISK)
    paths = files(tmp_path / "a", 4)
    stored = decode_images(paths, GREY8, memory_budget=PLENTY).rows
    assert isinstance(stored, StoredRows)

    def bad_sector(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", bad_sector)
        with pytest.raises(ResourceError, match="Input/output error") as caught:
            stored.gather(index(1, 2))
    assert caught.value.where.endswith(".pixels")
    assert "check the file" in caught.value.fix
    with monkeypatch.context() as patch:
        failing(patch, errno.ESTALE)
        with pytest.raises(ResourceError, match="Stale") as caught:
            stored._source.gather(index(1))
    assert caught.value.where == paths[1]


def _start(store: Path, paths: FilePaths, gate: object, results: object) -> None:
    os.environ["CONVLENS_CACHE"] = str(store)
    seen = []
    real = types.read_bytes

    def slow(path: str) -> bytes:
        seen.append(path)
        time.sleep(0.005)
        return real(path)

    types.read_bytes = slow  # type: ignore[assignment]
    gate.wait()  # type: ignore[attr-defined]
    found = decode_images(paths, GREY8, memory_budget=PLENTY)
    results.put((len(seen), found.rows.gather(index(59)).sum().item()))  # type: ignore[attr-defined]


def test_two_processes_decode_once(tmp_path: Path, store: Path) -> None:
    paths = files(tmp_path / "a", 60)
    gate, results = FORK_SERVER.Barrier(2), FORK_SERVER.Queue()
    arguments = (store, paths, gate, results)
    both = [FORK_SERVER.Process(target=_start, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    got = [results.get(timeout=120) for _ in both]
    for process in both:
        process.join()
    assert sorted(seen for seen, _ in got) == [0, 60]
    assert {total for _, total in got} == {59 * 64}


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVLENS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_folder() == Path("/x/convlens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cache.sys, "platform", "linux")
    assert cache.cache_folder() == Path.home() / ".cache" / "convlens"


def test_subsets_of_rows(tmp_path: Path) -> None:
    stored = decode_images(files(tmp_path / "a", 20), GREY8, memory_budget=PLENTY).rows
    loaded = in_memory(stored, chunk=7)
    assert loaded.in_memory_tensor() is loaded.images
    assert stored.in_memory_tensor() is None
    for rows in (stored, loaded):
        once = rows.subset(index(19, 5, 7, 0))
        twice = once.subset(index(3, 1))
        assert once.shape == (4, 1, 8, 8)
        assert twice.gather(index(0, 1, 1))[:, 0, 0, 0].tolist() == [0, 5, 5]
    assert isinstance(stored.subset(index(1)).subset(index(0)), IndexedRows)


def test_rows_out_of_range_are_an_error(tmp_path: Path) -> None:
    rows = decode_images(files(tmp_path / "a", 4), GREY8, memory_budget=PLENTY).rows
    for wrong in (4, -1):
        with pytest.raises(IndexError):
            rows.gather(index(0, wrong))


def test_store_cut_short_while_in_use_is_an_error(tmp_path: Path, store: Path) -> None:
    rows = decode_images(files(tmp_path / "a", 50), GREY8, memory_budget=PLENTY).rows
    os.truncate(next(store.glob("*.pixels")), 64 * 10)
    assert rows.gather(index(9))[0, 0, 0, 0] == 9
    with pytest.raises(DataError, match="cut short while in use"):
        rows.gather(index(8, 9, 10))


def test_reading_a_store_does_not_load_it_into_memory(tmp_path: Path) -> None:
    size, count = 64 * 64 * 3, 6_400  # 79 MB
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(size * count)
    code = (
        "import resource, torch, zlib; import numpy as np; from pathlib import Path\n"
        "from convlens.data.cache import StoredRows\n"
        f"sums = np.full({count}, zlib.crc32(bytes({size})), np.uint32)\n"
        f"rows = StoredRows(Path({str(path)!r}), ({count}, 3, 64, 64), sums, None)\n"
        "rows.gather(torch.arange(128))\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"for i in range(0, {count}, 128): rows.gather(torch.arange(i, i + 128))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)\n"
    )
    grown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(grown) < 20_000  # KiB


def test_records_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    path = tmp_path / "r"
    path.write_bytes(b"head" + bytes(range(30)))
    records = FixedSizeRecords(path, 3, 10, header=4)
    assert records.read([9, 0, 1, 2]).tolist() == [[27, 28, 29], [0, 1, 2], [3, 4, 5], [6, 7, 8]]
