"""`convlens predict RUN -`: an image, or names of images, on standard input of a real process."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from convlens import cli
from convlens.run import RunDir
from helpers.commands import (
    Done,
    brightness_model,
    constant_model,
    environment,
    here,
    picture,
    refused,
)
from helpers.hostile import valid_image

LIGHT = (200, 210, 190)


@pytest.fixture
def model(tmp_path: Path) -> RunDir:
    return brightness_model(tmp_path / "models" / "bright")


def piped(content: bytes, *arguments: str | Path, **extra: str) -> Done:
    """Run `convlens predict ARGUMENTS` in a new process with `content` on standard input."""
    done = subprocess.run(
        [sys.executable, "-m", "convlens", "predict", *map(str, arguments)],
        input=content,
        capture_output=True,
        check=False,
        env=environment(**extra),
        timeout=240,
    )
    assert b"Traceback" not in done.stderr
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def fed(content: bytes, *arguments: str | Path) -> Done:
    """Run `convlens predict ARGUMENTS` in this process with `content` on standard input."""
    return here("predict", *arguments, stdin=io.TextIOWrapper(io.BytesIO(content)))


def test_an_image_on_stdin_is_classified_like_its_file(model: RunDir) -> None:
    path = picture(Path("a.png"), LIGHT)
    done = piped(path.read_bytes(), model.path, "-", path, "--json")
    assert done.code == 0
    by_file, by_stdin = json.loads(done.out)["predictions"]
    assert (by_file["filename"], by_stdin["filename"]) == ("a.png", "-")
    assert by_stdin["label"] == "light"
    assert by_stdin["top"] == by_file["top"]


def test_other_content_is_refused(model: RunDir) -> None:
    for done, message in (
        (piped(os.urandom(5000), model.path, "-"), "neither an image nor a list of file names"),
        (fed(valid_image("jpg") * 2, model.path, "-"), "several images in one stream"),
        (fed(valid_image("png") + valid_image("webp"), model.path, "-"), "several images"),
    ):
        refused(done, 3, message, "standard input", "pipe one image, or names of files")
        assert done.out == ""
        assert done.err.replace("\n", "").isprintable()


def test_a_damaged_image_on_stdin_is_reported(model: RunDir) -> None:
    done = fed(valid_image("png")[:-100], model.path)
    refused(done, 3, "1 of 1 files could not be read")
    assert done.out == "-  unreadable: the file is cut short\n"


def test_names_with_a_byte_order_mark_and_windows_line_ends_are_read(model: RunDir) -> None:
    picture(Path("ü.png"), LIGHT)
    done = fed("\ufeffü.png\r\n".encode(), model.path, "-")
    assert (done.code, done.out.split()[:2]) == (0, ["ü.png", "light"])


def test_a_null_byte_separates_names(model: RunDir) -> None:
    refused(fed(b"a\0/b*.png\n", model.path, "-"), 3, "not found: /b*.png")


def test_without_files_on_a_terminal_the_error_shows_an_example(model: RunDir) -> None:
    controller, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "convlens", "predict", str(model.path)],
            stdin=terminal,
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
            timeout=240,
        )
    finally:
        os.close(controller)
        os.close(terminal)
    result = Done(done.returncode, done.stdout, done.stderr)
    refused(result, 2, "no image was named", "convlens predict digits a.png")


def test_redirected_csv_and_json_are_utf8_whatever_the_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = constant_model(tmp_path / "models" / "cats", [1.0, 0.0], ["猫 😀", "été"])
    path = picture(Path("a.png"), LIGHT)
    arguments = (run_dir.path, path, "-k", "2", "-f")
    done = piped(b"", *arguments, "csv", PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert done.code == 0
    (row,) = csv.DictReader(io.StringIO(done.out))
    assert (row["label"], row["label2"]) == ("猫 😀", "été")
    redirected = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", redirected)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["predict", *map(str, arguments), "json"])
    redirected.flush()
    (entry,) = json.loads(redirected.buffer.getvalue())["predictions"]  # type: ignore[attr-defined]
    assert [each["label"] for each in entry["top"]] == ["猫 😀", "été"]
