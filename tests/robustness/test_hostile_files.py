"""Hostile files: no crash, no write outside the folder, bounded memory, nothing executed."""

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

from convlens import cli
from convlens.data import download
from convlens.data.decode import UnreadableImage, decode, probe_image
from convlens.data.sources import find_source
from convlens.errors import DataError
from helpers.commands import NET, command, environment, here, pictures, refused
from helpers.hostile import hostile_images, make_special_files, valid_image
from helpers.shards import BAD_MEMBERS, damaged, samples, tar

# Peak memory beyond that of the same command on valid images. A single image of the largest size
# that is decoded (89 megapixels) takes 268 MB in RGB; the bombs would take gigabytes.
MAX_EXTRA_KIB = 450 << 10


def file_sizes(*folders: Path) -> dict[str, int]:
    """Return the size of every file below some folders, to detect unexpected writes."""
    return {
        str(path): path.lstat().st_size
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if "pycache" not in str(path)
    }


def test_there_are_at_least_250_hostile_images() -> None:
    names = [name for name, _ in hostile_images()]
    assert len(names) == len(set(names)) >= 250


def result_or_error(read: Callable[[], Any]) -> Any:
    """Return the result of `read`, or the `DataError` it raises."""
    try:
        return read()
    except DataError as error:  # `UnreadableImage` is a subclass
        return error


def test_every_hostile_image_is_decoded_or_reported_with_a_reason() -> None:
    readable = 0
    for name, content in hostile_images():
        for size, channels, fit in ((16, 3, "crop"), (None, 1, "pad")):
            result = result_or_error(
                partial(decode, content, size=size, channels=channels, fit=fit, name=name)
            )
            if isinstance(result, np.ndarray):
                assert (result.dtype, result.ndim, len(result)) == (np.uint8, 3, channels)
                readable += 1
            else:
                assert isinstance(result, UnreadableImage)
                assert result.path == name
                assert result.reason
        facts = result_or_error(partial(probe_image, content, name))
        # A JPEG may be decoded at 1/8 of its size.
        limit = 90e6 * (64 if content[:2] == b"\xff\xd8" else 1)
        assert getattr(facts, "reason", "") or facts.width * facts.height <= limit
    assert readable > 20  # some flipped bits are harmless


# Runs `convlens ARGUMENTS` and prints its peak memory.
MEASURED = """
import os, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "convlens", *sys.argv[1:]], capture_output=True)
sys.stdout.buffer.write(done.stdout)
sys.stderr.buffer.write(done.stderr)
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(done.returncode)
"""


def run_measured(*arguments: str | Path) -> tuple[int, str, str, int]:
    """Return exit code, stdout, stderr and peak memory (KiB) of `convlens ARGUMENTS`."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(),
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )
    err, _, peak_kib = done.stderr.rstrip().rpartition("peak ")
    return done.returncode, done.stdout, err, int(peak_kib)


def test_a_folder_of_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`audit` and `predict` report them; training refuses them, or skips them on request."""
    valid = pictures(Path("valid"), {"red": 9, "green": 9})
    _, _, _, usual_kib = run_measured("audit", valid, "--json")
    root = pictures(Path("photos"), {"red": 9, "green": 9})
    for name, content in hostile_images():
        (root / "red" / name).write_bytes(content)
    make_special_files(root / "green")
    watched = (tmp_path / "work" / "photos", tmp_path / "work" / "valid", Path("/tmp/evil"))
    before = file_sizes(*watched)

    code, out, err, peak_kib = run_measured("audit", root, "--json")
    assert code == 0, err
    assert "Traceback" not in err
    assert peak_kib < usual_kib + MAX_EXTRA_KIB
    audit = json.loads(out)
    bad = {entry["id"]: entry["reason"] for entry in audit["unreadable"]}
    assert len(bad) > 150
    assert all(bad.values())
    assert audit["images"] + len(bad) > 280
    assert {"red/side65535.png", "red/script.png", "green/sparse.png"} <= set(bad)
    assert not any("zero.png" in name or "pipe.png" in name for name in bad)

    done = here("train", root, *NET, "data.image_size=8")
    refused(done, 3, f"{len(bad)} of ", "images can't be read", "data.on_bad=skip")
    skip = ("data.image_size=8", "data.on_bad=skip", "data.max_bad=0.99")
    done = here("train", root, *NET, *skip, "--json")
    assert done.code == 0, done.err
    run = done.json["run"]
    # A process of its own, whose terminal is a strict UTF-8 one, and such a stream in this process.
    done = command("predict", run, root, "--json", PYTHONIOENCODING="utf-8:strict")
    assert done.code == 3  # some could not be read, all others are classified
    assert "Traceback" not in done.err
    assert "\\udcff" in done.out
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        with pytest.raises(SystemExit, match="3"):
            cli.main(["predict", run, str(root)])
    terminal.flush()
    assert b"\\udcff" in terminal.buffer.getvalue()  # type: ignore[attr-defined]
    assert "hacked" not in {path.name for path in Path().rglob("*")}
    assert file_sizes(*watched) == before


def fits_card(key: str, value: str) -> bytes:
    return f"{key:<8}= {value:>20}".encode().ljust(80)


def fits_header(*cards: bytes) -> bytes:
    """Return a header of a FITS file."""
    content = b"".join([*cards, b"END".ljust(80)])
    return content.ljust(-(-len(content) // 2880) * 2880)


def fits(side: int) -> bytes:
    axes = [
        fits_card("NAXIS", "2"),
        fits_card("NAXIS1", str(side)),
        fits_card("NAXIS2", str(side)),
    ]
    start = [fits_card("SIMPLE", "T"), fits_card("BITPIX", "8")]
    return fits_header(*start, *axes) + bytes(side * side)


def fits_bomb(side: int) -> bytes:
    """Return a compressed FITS image: a few KB that become `side` x `side` pixels."""
    axes = [
        fits_card("NAXIS", "2"),
        fits_card("NAXIS1", "1"),
        fits_card("NAXIS2", "1"),
    ]
    real = [
        fits_card("ZNAXIS", "2"),
        fits_card("ZNAXIS1", str(side)),
        fits_card("ZNAXIS2", str(side)),
    ]
    kind = [
        fits_card("ZIMAGE", "T"),
        fits_card("ZBITPIX", "8"),
        b"ZCMPTYPE= 'GZIP_1  '".ljust(80),
    ]
    first = fits_header(fits_card("SIMPLE", "T"), fits_card("BITPIX", "8"), fits_card("NAXIS", "0"))
    table = fits_header(
        b"XTENSION= 'BINTABLE'".ljust(80), fits_card("BITPIX", "8"), *axes, *real, *kind
    )
    return first + table + bytes(1) + gzip.compress(bytes(4 * side * side)) + bytes(80)


def test_fits_files_are_not_images_even_with_an_image_extension(tmp_path: Path) -> None:
    for number, content in enumerate((fits(30), fits_bomb(30), fits_bomb(4000))):
        with Image.open(io.BytesIO(content)) as image:  # Pillow supports them
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
def test_images_with_random_bytes_are_decoded_or_reported() -> None:
    rng = random.Random(5)
    for kind in ("jpg", "png", "bmp", "gif", "webp", "tif", "ppm", "jp2", "avif"):
        valid = valid_image(kind)
        for _ in range(500 if valid else 0):
            bad = bytearray(valid)
            for _ in range(rng.randrange(1, 5)):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            result = result_or_error(partial(decode, bytes(bad), size=16, channels=3, fit="crop"))
            assert isinstance(result, np.ndarray) or result.reason


def write_many_images(count: int) -> Path:
    """Write `count` small images in ten classes, and replace or add four unreadable ones."""
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
    valid = valid_image("jpg")
    (root / "class3" / "000003.png").write_bytes(b"")
    (root / "class7" / "half.jpg").write_bytes(valid[: len(valid) // 2])
    (root / "class8" / "words.png").write_text("not an image")
    path = root / "class9" / f"{count - 1:06}.png"
    path.write_bytes(path.read_bytes()[:-20])
    return root


def check_all_are_listed(root: Path, count: int) -> float:
    """Check that `train` lists all four unreadable images; returns the seconds it took."""
    start = time.perf_counter()
    done = here("train", root, *NET)
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
    check_all_are_listed(write_many_images(1000), 1000)


@pytest.mark.slow
def test_bad_files_among_fifty_thousand_are_all_listed(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = check_all_are_listed(write_many_images(50_000), 50_000)
    with capsys.disabled():
        print(f"\n4 bad files among 50,000 images of 32 px: listed after {seconds:.1f} s")


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def pax_member(fields: dict[str, str]) -> bytes:
    member = tarfile.TarInfo("x.png")
    member.size = 4
    member.pax_headers = fields
    return member.tobuf(tarfile.PAX_FORMAT) + b"data".ljust(512, b"\0")


TAR_END = bytes(1024)
TARS: dict[str, bytes] = {
    "size beyond the end": tar_header("0.png", 1 << 40) + TAR_END,
    "size of exabytes": tar_header("0.png", (1 << 62) + 5) + TAR_END,
    "long name of gigabytes": tar_header("././@LongLink", 1 << 34, tarfile.GNUTYPE_LONGNAME)
    + TAR_END,
    "long link of gigabytes": tar_header("././@LongLink", 1 << 34, tarfile.GNUTYPE_LONGLINK)
    + TAR_END,
    "pax of gigabytes": tar_header("p", 1 << 34, tarfile.XHDTYPE) + TAR_END,
    "global pax of gigabytes": tar_header("p", 1 << 34, tarfile.XGLTYPE) + TAR_END,
    "pax path outside the tar": pax_member({"path": "../../x.png"}) + TAR_END,
    "pax path absolute": pax_member({"path": "/tmp/evil/x.png"}) + TAR_END,
    "pax size lies": pax_member({"size": str(1 << 50)}) + TAR_END,
    "pax size negative": pax_member({"size": "-512"}) + TAR_END,
    "pax size is not a number": pax_member({"size": "x"}) + TAR_END,
    "sparse": tar_header("0.png", 1 << 20, tarfile.GNUTYPE_SPARSE) + TAR_END,
    "only an end": TAR_END,
    "only zeros": bytes(1 << 20),
    "checksum": tar_header("0.png", 4)[:-300] + b"\1" + tar_header("0.png", 4)[-299:] + TAR_END,
    "unknown kind": tar_header("0.png", 4, b"Z") + b"data".ljust(512, b"\0") + TAR_END,
    "name of zeros": bytes(100) + tar_header("0.png", 0)[100:] + TAR_END,
    "twenty thousand empty members": tar_header("x", 0) * 20_000 + TAR_END,
}


@pytest.mark.parametrize("case", TARS)
def test_a_hostile_tar_is_reported_or_contributes_nothing(tmp_path: Path, case: str) -> None:
    valid = tar(tmp_path / "good.tar", samples([0, 1, 0, 1])).read_bytes()
    Path("set").mkdir()
    Path("set/train-0.tar").write_bytes(valid)
    Path("set/train-1.tar").write_bytes(TARS[case])
    before = file_sizes(tmp_path / "work")
    result = result_or_error(partial(find_source, "set"))
    if isinstance(result, DataError):
        assert result.what
        assert "set" in result.where
    else:  # it has no samples
        assert len(result.parts["train"].labels) == 4
    assert file_sizes(tmp_path / "work") == before
    assert not Path("/tmp/evil").exists()


def test_there_are_more_than_50_hostile_tars() -> None:
    assert len(TARS) + len(BAD_MEMBERS) + len(damaged(b"")) > 50


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_tar_with_random_bytes_is_read_or_reported(tmp_path: Path, count: int) -> None:
    valid = tar(tmp_path / "good.tar", samples([0, 1, 0, 1])).read_bytes()[:8192] + TAR_END
    rng = random.Random(3)
    Path("set").mkdir()
    path = Path("set/a.tar")
    for _ in range(count):
        bad = bytearray(valid)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad)
        result = result_or_error(partial(find_source, "set"))
        if isinstance(result, DataError):
            assert result.what
            continue
        part = result.parts["train"]
        for number in range(len(part.labels)):
            content = result_or_error(partial(part.images.read, number))
            assert isinstance(content, DataError) or len(content) < len(bad)


CIFAR_FOLDER = "cifar-10-batches-bin/"
FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


# Members that stand for the first file of CIFAR-10 but are not a regular file of that name.
WRONG_MEMBERS: dict[str, tarfile.TarInfo] = {
    "symlink": member(CIFAR_FOLDER + FILES[0], tarfile.SYMTYPE, "/etc/passwd"),
    "symlink out": member(CIFAR_FOLDER + FILES[0], tarfile.SYMTYPE, "../../escaped"),
    "hard link": member(CIFAR_FOLDER + FILES[0], tarfile.LNKTYPE, "/etc/passwd"),
    "device": member(CIFAR_FOLDER + FILES[0], tarfile.CHRTYPE),
    "pipe": member(CIFAR_FOLDER + FILES[0], tarfile.FIFOTYPE),
    "folder": member(CIFAR_FOLDER + FILES[0], tarfile.DIRTYPE),
    "absolute": member("/" + CIFAR_FOLDER + FILES[0]),
    "parent": member("../" + CIFAR_FOLDER + FILES[0]),
    "dotted": member(CIFAR_FOLDER + "../" + CIFAR_FOLDER + FILES[0]),
    "backslash": member(CIFAR_FOLDER[:-1] + "\\" + FILES[0]),
    "linked folder": member(CIFAR_FOLDER[:-1], tarfile.SYMTYPE, "/tmp"),
}


@dataclass(frozen=True)
class DataRoot:
    """A data root for archives that pass the check of their checksum."""

    path: Path
    patch: pytest.MonkeyPatch

    def put(self, name: str, content: bytes) -> None:
        dataset = download.DOWNLOADS[name]
        digest = hashlib.md5(content).hexdigest()
        archives = tuple(replace(archive, md5=digest) for archive in dataset.archives)
        self.patch.setitem(download.DOWNLOADS, name, replace(dataset, archives=archives))
        (self.path / archives[0].file).write_bytes(content)


@pytest.fixture
def data_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DataRoot:
    root = tmp_path / "no-data"
    root.mkdir()
    return DataRoot(root, monkeypatch)


def cifar10_archive(first: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.addfile(first, io.BytesIO(bytes(first.size)))
        for name in FILES[1:]:
            info = tarfile.TarInfo(CIFAR_FOLDER + name)
            info.size = 3073
            archive.addfile(info, io.BytesIO(bytes(3073)))
    return stream.getvalue()


@pytest.mark.parametrize("case", WRONG_MEMBERS)
def test_only_regular_files_of_the_expected_names_are_unpacked(
    data_root: DataRoot, case: str
) -> None:
    data_root.put("cifar10", cifar10_archive(WRONG_MEMBERS[case]))
    with pytest.raises(DataError, match=r"lacks data_batch_1\.bin"):
        find_source("cifar10")
    names = {str(path.relative_to(data_root.path)) for path in data_root.path.rglob("*")}
    expected = {
        CIFAR_FOLDER[:-1],
        *(CIFAR_FOLDER + name for name in FILES[1:]),
        "cifar-10-binary.tar.gz",
    }
    assert names == expected
    assert not Path("/tmp/data_batch_1.bin").exists()


def escaping_zip() -> bytes:
    """Return a zip with a member outside of its folder."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("../escaped.bin", b"x")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 100,
        gzip.compress(b"x" * 5000),
        cifar10_archive(member("a"))[:400],
        cifar10_archive(member("a"))[:-300],
        escaping_zip(),
        gzip.compress(cifar10_archive(member("a"))),
    ],
    ids=["empty", "text", "gzip of text", "cut", "cut late", "zip", "gzip of a gzip"],
)
def test_damaged_archives_are_reported(data_root: DataRoot, content: bytes) -> None:
    data_root.put("cifar10", content)
    with pytest.raises(DataError):
        find_source("cifar10")
    assert not (data_root.path.parent / "escaped.bin").exists()


def test_archives_that_unpack_to_too_much_are_refused(
    data_root: DataRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_MEMBER_BYTES", 1 << 20)
    bomb = member(CIFAR_FOLDER + FILES[0])
    bomb.size = (1 << 20) + 1
    data_root.put("cifar10", cifar10_archive(bomb))
    with pytest.raises(DataError, match="lacks data_batch_1"):
        find_source("cifar10")
    monkeypatch.setattr(download, "MAX_ARCHIVE_BYTES", 3 << 20)
    unwanted = member("anything")
    unwanted.size = 4 << 20
    data_root.put("cifar10", cifar10_archive(unwanted))
    with pytest.raises(DataError, match="unpacks to more than 3 MiB"):
        find_source("cifar10")
    data_root.put("mnist", gzip.compress(bytes((1 << 20) + 1)))
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        find_source("mnist")


@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz", "set.tgz", "set.xz", "set.rar"])
def test_archives_named_as_data_are_not_unpacked(name: str) -> None:
    Path(name).write_bytes(escaping_zip())
    refused(here("train", name), 3, "this file is not a CSV")
    assert sorted(os.listdir()) == [name]
