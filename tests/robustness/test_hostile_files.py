"""Files made to do harm: no crash, no write outside, no memory without end, nothing run."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convlens.data import download
from convlens.data.decode import UnreadableImage, decode, probe_image
from convlens.data.sources import find_source
from convlens.errors import DataError
from helpers.commands import NET, command as convlens, environment, here, pictures, refused
from helpers.hostile import good, images, strange
from helpers.shards import BAD_MEMBERS, damaged, samples, tar

ROOM = 450 << 10  # KiB beyond what the same command takes on sound images


def world(*folders: Path) -> dict[str, int]:
    """Every file below, with its size: what a write outside would change."""
    return {
        str(path): path.lstat().st_size
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if "pycache" not in str(path)
    }


# Images


def test_there_are_enough() -> None:
    names = [name for name, _ in images()]
    assert len(names) == len(set(names)) >= 250


def outcome(read: Callable[[], Any]) -> Any:
    """What `read` gives, or the error that says what is wrong."""
    try:
        return read()
    except DataError as error:  # an unreadable image is one, too
        return error


def test_every_hostile_image_is_pixels_or_unreadable_with_a_reason() -> None:
    readable = 0
    for name, content in images():
        for size, channels, fit in ((16, 3, "crop"), (None, 1, "pad")):
            found = outcome(
                partial(decode, content, size=size, channels=channels, fit=fit, name=name)
            )
            if isinstance(found, np.ndarray):
                assert (found.dtype, found.ndim, len(found)) == (np.uint8, 3, channels)
                readable += 1
            else:
                assert isinstance(found, UnreadableImage)
                assert found.path == name
                assert found.reason
        facts = outcome(partial(probe_image, content, name))
        assert getattr(facts, "reason", "") or facts.width * facts.height <= 90e6
    assert readable > 20  # some flips do no harm


PEAK = """
import os, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "convlens", *sys.argv[1:]], capture_output=True)
sys.stdout.buffer.write(done.stdout)
sys.stderr.buffer.write(done.stderr)
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(done.returncode)
"""


def peak(*arguments: str | Path) -> tuple[int, str, str, int]:
    """Exit code, output, errors and peak memory (KiB) of `convlens ARGUMENTS`."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(),
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )
    said, _, number = done.stderr.rstrip().rpartition("peak ")
    return done.returncode, done.stdout, said, int(number)


def test_a_folder_of_hostile_files(tmp_path: Path) -> None:
    """The audit lists them, training refuses them, or leaves them out if asked to."""
    sound = pictures(Path("sound"), {"red": 9, "green": 9})
    _, _, _, usual = peak("audit", sound, "--json")
    root = pictures(Path("photos"), {"red": 9, "green": 9})
    for name, content in images():
        (root / "red" / name).write_bytes(content)
    strange(root / "green")
    before = world(tmp_path / "work" / "photos", tmp_path / "work" / "sound", Path("/tmp/evil"))
    code, out, said, most = peak("audit", root, "--json")
    assert code == 0, said
    assert "Traceback" not in said
    assert most < usual + ROOM, f"{most >> 10} MiB, {usual >> 10} MiB on sound images"
    found = json.loads(out)
    bad = {entry["id"]: entry["reason"] for entry in found["unreadable"]}
    assert len(bad) > 150
    assert all(bad.values())
    assert found["images"] + len(bad) > 280
    assert {"red/side65535.png", "red/script.png", "green/sparse.png"} <= set(bad)
    assert not any("zero.png" in name or "pipe.png" in name for name in bad)
    done = convlens("train", root, *NET, "data.image_size=8")
    refused(done, 3, f"{len(bad)} of ", "images can't be read", "data.on_bad=skip")
    skipping = ("data.image_size=8", "data.on_bad=skip", "data.max_bad=0.99")
    done = convlens("train", root, *NET, *skipping, "--json")
    assert done.code == 0, done.err
    strict = {"PYTHONIOENCODING": "utf-8:strict"}  # as where the locale is one of UTF-8
    for form in ("json", "table"):
        told = convlens("predict", done.json["run"], root, "--format", form, **strict)
        assert told.code == 3  # some could not be read, the others are done
        assert "Traceback" not in told.err
        assert "\\udcff" in told.out
    assert "hacked" not in {path.name for path in Path().rglob("*")}
    assert before == world(
        tmp_path / "work" / "photos", tmp_path / "work" / "sound", Path("/tmp/evil")
    )


def model_metadata(key: str, value: str) -> bytes:
    return f"{key:<8}= {value:>20}".encode().ljust(80)


def model_metadatas(*lines: bytes) -> bytes:
    """One header of a FITS file."""
    content = b"".join([*lines, b"END".ljust(80)])
    return content.ljust(-(-len(content) // 2880) * 2880)


def fits(side: int) -> bytes:
    axes = [
        model_metadata("NAXIS", "2"),
        model_metadata("NAXIS1", str(side)),
        model_metadata("NAXIS2", str(side)),
    ]
    start = [model_metadata("SIMPLE", "T"), model_metadata("BITPIX", "8")]
    return model_metadatas(*start, *axes) + bytes(side * side)


def fits_bomb(side: int) -> bytes:
    """A compressed image of FITS: a few KB that become `side` x `side` pixels."""
    axes = [
        model_metadata("NAXIS", "2"),
        model_metadata("NAXIS1", "1"),
        model_metadata("NAXIS2", "1"),
    ]
    real = [
        model_metadata("ZNAXIS", "2"),
        model_metadata("ZNAXIS1", str(side)),
        model_metadata("ZNAXIS2", str(side)),
    ]
    kind = [
        model_metadata("ZIMAGE", "T"),
        model_metadata("ZBITPIX", "8"),
        b"ZCMPTYPE= 'GZIP_1  '".ljust(80),
    ]
    first = model_metadatas(
        model_metadata("SIMPLE", "T"), model_metadata("BITPIX", "8"), model_metadata("NAXIS", "0")
    )
    table = model_metadatas(
        b"XTENSION= 'BINTABLE'".ljust(80), model_metadata("BITPIX", "8"), *axes, *real, *kind
    )
    return first + table + bytes(1) + gzip.compress(bytes(4 * side * side)) + bytes(80)


def test_fits_files_are_no_images_whatever_they_are_called(tmp_path: Path) -> None:
    for number, content in enumerate((fits(30), fits_bomb(30), fits_bomb(4000))):
        with Image.open(io.BytesIO(content)) as image:  # to Pillow they are images
            assert image.format == "FITS"
            assert image.size == ((4000, 4000) if number == 2 else (30, 30))
            if number < 2:
                image.load()
        assert len(content) < 80_000
        path = tmp_path / f"{number}.png"
        path.write_bytes(content)
        for read in (
            partial(probe_image, path),
            partial(decode, path, size=8, channels=3, fit="crop"),
        ):
            with pytest.raises(UnreadableImage, match="not an image"):  # or "it is text, ..."
                read()


@pytest.mark.slow
def test_flips_in_images_of_every_kind() -> None:
    chance = random.Random(5)
    for kind in ("jpg", "png", "bmp", "gif", "webp", "tif", "ppm", "jp2", "avif"):
        whole = good(kind)
        for _ in range(500 if whole else 0):
            bad = bytearray(whole)
            for _ in range(chance.randrange(1, 5)):
                bad[chance.randrange(len(bad))] = chance.randrange(256)
            found = outcome(partial(decode, bytes(bad), size=16, channels=3, fit="crop"))
            assert isinstance(found, np.ndarray) or found.reason


def many(count: int) -> Path:
    """`count` small images in ten classes, four of which can't be read."""
    root = Path("many")
    for number in range(10):
        (root / f"class{number}").mkdir(parents=True)
    stream = io.BytesIO()
    for number in range(count):
        stream.seek(0)
        stream.truncate()
        Image.new("L", (32, 32), number % 256).save(stream, "PNG", compress_level=1)
        path = root / f"class{number % 10}" / f"{number:06}.png"
        path.write_bytes(stream.getvalue())
    whole = good("jpg")
    (root / "class3" / "000003.png").write_bytes(b"")
    (root / "class7" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "class8" / "words.png").write_text("not an image")
    path = root / "class9" / f"{count - 1:06}.png"
    path.write_bytes(path.read_bytes()[:-20])
    return root


def listed_at_once(root: Path, count: int) -> float:
    """All four of them, by the command that would train; returns the seconds it took."""
    start = time.perf_counter()
    done = convlens("train", root, *NET)
    seconds = time.perf_counter() - start
    refused(
        done,
        3,
        f"4 of {count + 2} images can't be read",
        "class3/000003.png: the file is empty",
        "class7/half.jpg: the file is cut short",
        "class8/words.png: it is text",
        f"class9/{count - 1:06}.png",
    )
    assert not Path("models").exists()
    return seconds


def test_bad_files_among_many_are_all_listed() -> None:
    listed_at_once(many(1000), 1000)


@pytest.mark.slow
def test_bad_files_among_fifty_thousand_are_all_listed(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = listed_at_once(many(50_000), 50_000)
    with capsys.disabled():
        print(f"\n4 bad files among 50,000 images of 32 px: listed after {seconds:.1f} s")


# Tars


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def pax(fields: dict[str, str]) -> bytes:
    member = tarfile.TarInfo("x.png")
    member.size = 4
    member.pax_headers = fields
    return member.tobuf(tarfile.PAX_FORMAT) + b"data".ljust(512, b"\0")


END = bytes(1024)
TARS: dict[str, bytes] = {
    "size beyond the end": header("0.png", 1 << 40) + END,
    "size of exabytes": header("0.png", (1 << 62) + 5) + END,
    "long name of gigabytes": header("././@LongLink", 1 << 34, tarfile.GNUTYPE_LONGNAME) + END,
    "long link of gigabytes": header("././@LongLink", 1 << 34, tarfile.GNUTYPE_LONGLINK) + END,
    "pax of gigabytes": header("p", 1 << 34, tarfile.XHDTYPE) + END,
    "global pax of gigabytes": header("p", 1 << 34, tarfile.XGLTYPE) + END,
    "pax path leads out": pax({"path": "../../x.png"}) + END,
    "pax path absolute": pax({"path": "/tmp/evil/x.png"}) + END,
    "pax size lies": pax({"size": str(1 << 50)}) + END,
    "pax size negative": pax({"size": "-512"}) + END,
    "pax size no number": pax({"size": "x"}) + END,
    "sparse": header("0.png", 1 << 20, tarfile.GNUTYPE_SPARSE) + END,
    "only an end": END,
    "only zeros": bytes(1 << 20),
    "checksum": header("0.png", 4)[:-300] + b"\1" + header("0.png", 4)[-299:] + END,
    "unknown kind": header("0.png", 4, b"Z") + b"data".ljust(512, b"\0") + END,
    "name of zeros": bytes(100) + header("0.png", 0)[100:] + END,
    "twenty thousand empty members": header("x", 0) * 20_000 + END,
}


@pytest.mark.parametrize("case", TARS)
def test_hostile_tars(tmp_path: Path, case: str) -> None:
    whole = tar(tmp_path / "good.tar", samples([0, 1, 0, 1])).read_bytes()
    Path("set").mkdir()
    Path("set/train-0.tar").write_bytes(whole)
    Path("set/train-1.tar").write_bytes(TARS[case])
    before = world(tmp_path / "work")
    found = outcome(partial(find_source, "set"))
    if isinstance(found, DataError):
        assert found.what
        assert "set" in found.where
    else:  # nothing in it that counts
        assert len(found.parts["train"].labels) == 4
    assert world(tmp_path / "work") == before
    assert not Path("/tmp/evil").exists()


def test_there_are_enough_tars() -> None:
    assert len(TARS) + len(BAD_MEMBERS) + len(damaged(b"")) > 50


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_tar_with_any_byte_changed(tmp_path: Path, count: int) -> None:
    whole = tar(tmp_path / "good.tar", samples([0, 1, 0, 1])).read_bytes()[:8192] + END
    chance = random.Random(3)
    Path("set").mkdir()
    path = Path("set/a.tar")
    for _ in range(count):
        bad = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        path.write_bytes(bad)
        found = outcome(partial(find_source, "set"))
        if isinstance(found, DataError):
            assert found.what
            continue
        part = found.parts["train"]
        for number in range(len(part.labels)):
            content = outcome(partial(part.images.read, number))
            assert isinstance(content, DataError) or len(content) < len(bad)


# Archives of downloads

HEAD = "cifar-10-batches-bin/"
FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    return found


ODD: dict[str, tarfile.TarInfo] = {
    "symlink": member(HEAD + FILES[0], tarfile.SYMTYPE, "/etc/passwd"),
    "symlink out": member(HEAD + FILES[0], tarfile.SYMTYPE, "../../escaped"),
    "hard link": member(HEAD + FILES[0], tarfile.LNKTYPE, "/etc/passwd"),
    "device": member(HEAD + FILES[0], tarfile.CHRTYPE),
    "pipe": member(HEAD + FILES[0], tarfile.FIFOTYPE),
    "folder": member(HEAD + FILES[0], tarfile.DIRTYPE),
    "absolute": member("/" + HEAD + FILES[0]),
    "parent": member("../" + HEAD + FILES[0]),
    "dotted": member(HEAD + "../" + HEAD + FILES[0]),
    "backslash": member(HEAD[:-1] + "\\" + FILES[0]),
    "linked folder": member(HEAD[:-1], tarfile.SYMTYPE, "/tmp"),
}


@dataclass(frozen=True)
class Offer:
    """A data folder into which somebody puts archives, their checksums made to be right."""

    root: Path
    patch: pytest.MonkeyPatch

    def put(self, name: str, content: bytes) -> None:
        its = download.DOWNLOADS[name]
        digest = hashlib.md5(content).hexdigest()
        archives = tuple(replace(archive, md5=digest) for archive in its.archives)
        self.patch.setitem(download.DOWNLOADS, name, replace(its, archives=archives))
        (self.root / archives[0].file).write_bytes(content)


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Offer:
    root = tmp_path / "no-data"
    root.mkdir()
    return Offer(root, monkeypatch)


def packed(first: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as made:
        made.addfile(first, io.BytesIO(bytes(first.size)))
        for name in FILES[1:]:
            info = tarfile.TarInfo(HEAD + name)
            info.size = 3073
            made.addfile(info, io.BytesIO(bytes(3073)))
    return stream.getvalue()


@pytest.mark.parametrize("case", ODD)
def test_archives_give_regular_files_of_the_expected_names_only(offer: Offer, case: str) -> None:
    offer.put("cifar10", packed(ODD[case]))
    with pytest.raises(DataError, match=r"lacks data_batch_1\.bin"):
        find_source("cifar10")
    there = {str(path.relative_to(offer.root)) for path in offer.root.rglob("*")}
    expected = {HEAD[:-1], *(HEAD + name for name in FILES[1:]), "cifar-10-binary.tar.gz"}
    assert there == expected
    assert not Path("/tmp/data_batch_1.bin").exists()


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("../escaped.bin", b"x")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 100,
        gzip.compress(b"x" * 5000),
        packed(member("a"))[:400],
        packed(member("a"))[:-300],
        _zip(),
        gzip.compress(packed(member("a"))),
    ],
    ids=["empty", "text", "gzip of text", "cut", "cut late", "zip", "gzip of a gzip"],
)
def test_files_that_are_no_whole_archive(offer: Offer, content: bytes) -> None:
    offer.put("cifar10", content)
    with pytest.raises(DataError):
        find_source("cifar10")
    assert not (offer.root.parent / "escaped.bin").exists()


def test_members_that_unpack_to_more_than_any_set(
    offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_MEMBER_BYTES", 1 << 20)
    bomb = member(HEAD + FILES[0])
    bomb.size = (1 << 20) + 1
    offer.put("cifar10", packed(bomb))
    with pytest.raises(DataError, match="lacks data_batch_1"):
        find_source("cifar10")
    monkeypatch.setattr(download, "MAX_MEMBERS", 3 << 20)
    unwanted = member("anything")
    unwanted.size = 4 << 20
    offer.put("cifar10", packed(unwanted))
    with pytest.raises(DataError, match="unpacks to more than 3 MiB"):
        find_source("cifar10")
    offer.put("mnist", gzip.compress(bytes((1 << 20) + 1)))
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        find_source("mnist")


@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz", "set.tgz", "set.xz", "set.rar"])
def test_archives_as_data_are_not_unpacked(name: str) -> None:
    Path(name).write_bytes(_zip())
    refused(here("train", name), 3, "this file is no CSV")
    assert sorted(os.listdir()) == [name]
