"""Bad input gives a clear error of at most five lines and the right exit code; no file is lost."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from convlens import Run
from convlens.run import RunDir
from convlens.training import checkpoint
from helpers.commands import (
    DIGITS,
    NET,
    Done,
    environment,
    here,
    picture,
    pictures,
    refused,
    respect_file_permissions,
)

# Recipes, keys, values


def test_an_unknown_recipe_lists_similar_names() -> None:
    refused(here("train", "mnist-rge"), 2, "'mnist-rge' is neither", "mnist-reg")
    refused(here("recipes", "digit"), 2, "unknown recipe 'digit'", "digits")


def test_unknown_keys_and_bad_values_are_reported_together() -> None:
    done = here("train", "digits", "optim.learning_rate=1", "train.epoch=3", "train.batch_size=0")
    refused(done, 2, "optim.learning_rate", "train.epochs", "train.batch_size=0")
    done = here("train", "digits", "epochs=3", "data.fit=squeeze", "optim.lr=fast")
    refused(done, 2, "did you mean train.epochs", "data.fit='squeeze'", "optim.lr='fast'")


def test_unknown_names_inside_a_recipe_are_reported_together() -> None:
    done = here(
        "train",
        "digits",
        "optim.name=adamm",
        "optim.schedule=cosin",
        "model.widht=[3]",
        "augment=[RandomFlip]",
    )
    refused(done, 2, "adamm", "cosin", "model.widths", "RandomFlip", "RandomHorizontalFlip")


def test_an_argument_that_is_not_an_override_is_refused() -> None:
    refused(here("train", "digits", "fast"), 2, "'fast' is not an override", "key=value")


def test_a_recipe_that_is_not_yaml_is_refused() -> None:
    Path("bad.yaml").write_text("data: {name: digits\ntrain: [")
    refused(here("train", "bad.yaml"), 2, "bad.yaml", "YAML")
    refused(here("train", "lost.yaml"), 2, "lost.yaml")


def test_a_misspelled_command_or_option_is_refused() -> None:
    for arguments, message in [
        (["tran", "digits"], "train"),
        (["train"], "RECIPE"),
        (["train", "digits", "--sedes", "2"], "--seeds"),
    ]:
        done = here(*arguments)
        assert done.code == 2
        assert message in done.err
        assert "Traceback" not in done.err
    assert here("train", "digits", "--seeds", "0").code == 2


def test_a_missing_device_is_refused() -> None:
    refused(here("train", *DIGITS, "--device", "cuda:99"), 2, "device 'cuda:99'", "--device cpu")


# Folders of images


def test_empty_class_folders_are_listed() -> None:
    root = pictures(Path("photos"), {"cat": 3, "dog": 3})
    (root / "emu").mkdir()
    (root / "owl").mkdir()
    refused(here("train", root), 3, "without images: emu, owl", "data.without=[emu,owl]")


def test_a_single_class_is_refused() -> None:
    refused(here("train", pictures(Path("photos"), {"cat": 9})), 3, "only one class", "cat")


# In one process, which is cheaper than two.
TRAIN_AND_AUDIT = """
from convlens import cli
for command in ("train", "audit"):
    try:
        cli.main([command, "photos"])
    except SystemExit as error:
        print(error.code)
"""


def test_class_folders_without_read_permission_are_listed() -> None:
    root = pictures(Path("photos"), {"cat": 3, "dog": 3, "emu": 3, "emu/young": 3})
    closed = [root / "cat", root / "emu" / "young"]
    for folder in closed:
        folder.chmod(0)
    try:
        done = subprocess.run(
            [sys.executable, "-c", TRAIN_AND_AUDIT],
            capture_output=True,
            text=True,
            env=environment(),
            preexec_fn=respect_file_permissions,
        )
    finally:
        for folder in closed:
            folder.chmod(0o700)
    assert done.stdout == "3\n3\n", done.stderr
    _, *errors = done.stderr.split("error:")
    assert len(errors) == 2
    for error in errors:
        refused(
            Done(3, "", f"error:{error}"),
            3,
            "can't be read",
            "photos/cat (Permission denied)",
            "photos/emu/young (Permission denied)",
            "permissions",
        )


def test_classes_of_a_single_image_only_are_refused() -> None:
    root = pictures(Path("photos"), {"cat": 1, "dog": 1})
    refused(here("train", root), 3, "every class has a single image", "at least 3 images")


def test_a_folder_without_class_folders_is_refused() -> None:
    picture(Path("photos/a.png"), (1, 2, 3))
    refused(here("train", "photos"), 3, "no class folders", "photos")


def test_classes_missing_from_train_are_listed() -> None:
    root = Path("photos")
    for split, classes in [("train", "ab"), ("val", "abx"), ("test", "aBy")]:
        pictures(root / split, dict.fromkeys(classes, 3))
    refused(here("train", root), 3, "in val that train lacks: 'x'", "'B' (train has 'b')", "'y'")


def bomb(side: int) -> bytes:
    """A PNG that promises `side` x `side` pixels and holds almost none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(64))
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bad_folder() -> Path:
    root = pictures(Path("photos"), {"cat": 6, "dog": 6})
    whole = (root / "cat" / "000.png").read_bytes()
    (root / "cat" / "bomb.png").write_bytes(bomb(60_000))
    (root / "cat" / "half.png").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "nil.png").write_bytes(b"")
    (root / "dog" / "text.png").write_text("no image, just words")
    return root


def test_unreadable_images_are_listed_with_their_reasons() -> None:
    done = here("train", bad_folder(), *NET)
    refused(
        done,
        3,
        "4 of 16 images can't be read",
        "cat/bomb.png: more than 89 million pixels",
        "cat/half.png: the file is cut short",
        "dog/nil.png: the file is empty",
        "dog/text.png: it is text",
        "data.on_bad=skip",
    )
    assert not Path("models").exists()


def test_unreadable_images_are_skipped_if_requested() -> None:
    root = bad_folder()
    refused(
        here("train", root, *NET, "data.on_bad=skip"),
        3,
        "more than 10% can't be read of all of train (4 of 16), cat (2 of 8), dog (2 of 8)",
        "raise data.max_bad",
    )
    assert not Path("models").exists()
    done = here("train", root, *NET, "data.on_bad=skip", "data.max_bad=0.25", "--json")
    assert done.code == 0, done.err
    assert "4 unreadable images are skipped" in done.err
    metadata = Run.load(done.json["run"]).run_dir.metadata()
    assert metadata["data"]["skipped"] == {
        "cat/bomb.png": "more than 89 million pixels are refused (60000 x 60000); "
        "to raise the limit, set data.max_pixels, or --max-pixels of predict, look and serve",
        "cat/half.png": "the file is cut short",
        "dog/nil.png": "the file is empty (0 bytes)",
        "dog/text.png": "it is text, not an image",
    }


def test_the_audit_lists_the_images_that_training_refuses() -> None:
    done = here("audit", bad_folder(), "--json")
    assert done.code == 0
    assert {image["id"] for image in done.json["unreadable"]} == {
        "cat/bomb.png",
        "cat/half.png",
        "dog/nil.png",
        "dog/text.png",
    }


def leaky_folder() -> Path:
    """A folder with an image in two splits, one under two labels, and one harmless copy."""
    root = Path("photos")
    for first, split in enumerate(("train", "val", "test")):
        pictures(root / split, {"red": 4, "green": 4}, first=10 * first)
    shutil.copy(root / "train" / "red" / "000.png", root / "test" / "red" / "same.png")
    shutil.copy(root / "train" / "red" / "001.png", root / "train" / "green" / "same.png")
    shutil.copy(root / "train" / "red" / "002.png", root / "train" / "red" / "same.png")
    return root


def test_harmful_copies_are_reported_when_training_starts() -> None:
    root = leaky_folder()
    message = "images that occur more than once"
    done = here("train", root, *NET)
    assert done.code == 0, done.err
    assert (
        f"photos: {message}: 1 in more than one split, 1 under two labels "
        "(`convlens audit photos` lists them; data.duplicates=drop leaves copies out, "
        "data.duplicates=group keeps them in one split)\n"
    ) in done.err
    (root / "test" / "red" / "same.png").unlink()
    (root / "train" / "green" / "same.png").unlink()
    done = here("train", root, *NET, "--fresh")
    assert done.code == 0, done.err
    assert message not in done.err


def test_a_strict_audit_fails_on_harmful_copies_and_unreadable_files() -> None:
    root = leaky_folder()
    (root / "val" / "red" / "bad.png").write_bytes(b"")
    assert here("audit", root).code == 0
    done = here("audit", root, "--strict", "--json")
    refused(done, 3, "1 unreadable files, 1 copies across splits, 1 copies under two labels")
    assert done.json["duplicates"]["groups"] == 3
    for name in ("test/red/same.png", "train/green/same.png", "val/red/bad.png"):
        (root / name).unlink()
    done = here("audit", root, "--strict")
    assert done.code == 0, done.err


def test_grey_and_color_images_can_be_mixed() -> None:
    root = pictures(Path("photos"), {"red": 6, "green": 6})
    for n in range(4):
        picture(root / "red" / f"grey{n}.png", (120,), seed=n)
        picture(root / "green" / f"grey{n}.png", (60,), seed=n)
    done = here("train", root, *NET, "--json")
    assert done.code == 0, done.err
    assert Run.load(done.json["run"]).recipe.data.channels == 3


def test_wrong_lines_of_a_csv_are_listed_together() -> None:
    pictures(Path("photos"), {"cat": 2, "dog": 2})
    lines = [
        "path,label,split",
        "photos/cat/000.png,cat,trian",
        "photos/cat/lost.png,cat,train",
        "photos/dog/000.png,,train",
    ]
    Path("list.csv").write_text("\n".join(lines))
    refused(here("train", "list.csv"), 3, "trian", "lost.png", "line 4", "list.csv")


def test_more_images_per_class_than_available_are_refused() -> None:
    """The error lists every class with too few images and the largest number that works."""
    for split, counts in {"train": (7, 4, 5), "val": (2, 2, 2), "test": (2, 2, 2)}.items():
        first = {"train": 0, "val": 50, "test": 80}[split]
        pictures(Path("photos") / split, dict(zip("abc", counts, strict=True)), first=first)
    done = here("train", "photos", *NET, "data.per_class=6")
    refused(
        done,
        3,
        "data.per_class=6, but 2 of 3 classes have fewer training images: b (4), c (5)",
        "at most data.per_class=4",
    )
    assert not Path("models").exists()
    done = here("train", "photos", *NET, "data.per_class=4", "--json")
    assert done.code == 0, done.err
    assert Run.load(done.json["run"]).evaluate("train").n == 12
    refused(here("train", "digits", "data.per_class=500"), 3, "10 of 10", "and 5 more", "at most")


def test_images_per_class_must_be_a_positive_integer() -> None:
    for value in ("0", "-3", "many", "2.5"):
        refused(here("train", "digits", f"data.per_class={value}"), 2, "data.per_class=", value)


# Output


def test_an_output_folder_that_cannot_be_written_is_an_error() -> None:
    Path("models").write_text("a file where a folder belongs")
    refused(here("train", *DIGITS), 5, "can't write", "models")


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_a_plot_folder_that_cannot_be_written_loses_no_training() -> None:
    Path("plots").write_text("a file where a folder belongs")
    refused(here("train", *DIGITS), 5, "can't write", "plots")
    Path("plots").unlink()
    again = here("train", *DIGITS)
    assert again.code == 0
    assert "epoch   " not in again.err  # the finished run is not trained again
    assert list(Path("plots").rglob("curves.png"))


def test_a_full_disk_damages_no_existing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert here("train", *DIGITS, "--name", "kept").code == 0
    before = {p: p.read_bytes() for p in Path("models/kept").iterdir() if p.is_file()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(here("evaluate", "kept"), 5, "No space left on device", "free disk space")
        refused(here("train", *DIGITS, "--name", "other", "--fresh"), 5, "No space left on device")
    assert {p: p.read_bytes() for p in Path("models/kept").iterdir() if p.is_file()} == before
    done = here("train", *DIGITS, "--name", "other", "--json")
    assert done.code == 0, done.err
    assert done.json["run"] == "other"


def test_a_training_stopped_by_a_quota_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel limits files to 16 KiB; the model file is larger."""
    arguments = ["train", "digits", "data.per_class=8", "model.widths=[32,32]", "train.epochs=2"]
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "RETRY_PAUSES_S", (0, 0))
        patch.setattr(sys, "dont_write_bytecode", True)  # bytecode files would be cut off, too
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
        try:
            limited = here(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    refused(limited, 5, "can't write: File too large")
    (run,) = Path("models").iterdir()
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith(".lock")) == [
        "metrics.csv",
        "recipe.yaml",
        "run.json",
        "split.csv",
    ]
    done = here(*arguments, "--json")
    assert done.code == 0, done.err
    assert done.json["run"] == run.name


HOLD_LOCK = """
import sys
from pathlib import Path
from convlens.utils.files import lock
with lock(Path(sys.argv[1]), what="it"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_run_in_use_by_another_process_is_refused() -> None:
    assert here("train", *DIGITS, "--json").json["run"]
    (run,) = Path("models").iterdir()
    RunDir(run).update_metadata({"status": "training"})
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(run / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        done = here("train", *DIGITS)
        refused(done, 5, "another process is using run", run.name, "--name")
    finally:
        other.kill()
        other.communicate()
    assert here("train", *DIGITS).code == 0  # a killed process leaves no lock behind
