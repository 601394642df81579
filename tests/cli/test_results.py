"""Results that commands print as text, and the recipes table."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convlens.cli.results import _print_duplicates, stdout_console
from convlens.data.duplicates import DuplicateGroup, Duplicates
from helpers.commands import DIGITS, NET, here, pictures


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_results_go_to_stdout_and_status_messages_to_stderr() -> None:
    done = here("train", *DIGITS, "--name", "mine")
    assert "test accuracy" in done.out
    assert "95% interval" in done.out
    assert "n = 270" in done.out
    assert "models/mine/model.safetensors" in done.out
    assert "plots/mine" in done.out
    assert "epoch" not in done.out.replace("weights of epoch", "")
    assert ": confidence " in done.out
    following = [line.split("convlens ")[1] for line in done.err.splitlines()[-3:]]
    assert [line.split()[:2] for line in following] == [
        ["report", "mine"],
        ["look", "mine"],
        ["predict", "mine"],
    ]


def test_after_a_training_without_test_the_evaluation_is_proposed_first() -> None:
    done = here("train", *DIGITS, "--name", "mine", "--no-test")
    assert "next: convlens evaluate mine " in done.err
    assert "convlens report mine " in done.err


def test_number_of_uses_of_the_test_set_is_printed() -> None:
    assert "; test set used once\n" in here("train", *DIGITS, "--name", "mine").out
    assert "; test set used 2 times\n" in here("train", *DIGITS, "--name", "mine").out
    assert "; test set used 3 times\n" in here("evaluate", "mine").out
    assert "test set used" not in here("evaluate", "mine", "--split", "val").out
    pictures(Path("own"), {"3": 2, "7": 3})
    assert "test set used" not in here("evaluate", "mine", "--data", "own").out


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_no_line_is_printed_twice() -> None:
    """On a terminal, stdout and stderr are mixed."""
    common = [*DIGITS[:-1], "train.epochs=1"]
    for arguments in (
        ["train", *common, "--name", "one"],
        ["train", *common, "--name", "one"],
        ["train", *common, "--name", "two", "--seeds", "2"],
        ["evaluate", "one"],
        ["compare", "one", "two"],
        ["labels", *common, "--folds", "2"],
        ["diagnose", "one"],
        ["report", "one"],
        ["look", "one", "test:3"],
        ["recipes"],
    ):
        done = here(*arguments)
        assert done.code == 0, done.err
        lines = [line.strip() for line in (done.out + done.err).splitlines()]
        sentences = [
            line for line in lines if len(line.split()) > 3 and any(map(str.isalpha, line))
        ]
        assert len(sentences) == len(set(sentences)), arguments
        accuracies = [line for line in lines if line.startswith("test accuracy")]
        assert len(accuracies) == len({line[:40] for line in accuracies}), arguments


def test_no_line_names_all_of_many_equal_images(capsys: pytest.CaptureFixture[str]) -> None:
    """Complaints were about a line of 57,000 characters."""
    ids = tuple(f"a/{i:04}.png" for i in range(2000))
    group = DuplicateGroup(ids, ("train",) * 2000, ("a",) * 2000)
    _print_duplicates(stdout_console(), "identical images", Duplicates(1, 0, 0, (group,)))
    assert capsys.readouterr().out.splitlines()[1].strip() == (
        "a/0000.png (train, a) = a/0001.png (train, a) = a/0002.png (train, a) = "
        "a/0003.png (train, a) and 1,996 more"
    )


def leaky_set() -> Path:
    """A set with an image in two splits, in which two images look alike across splits."""
    root = Path("photos")
    for first, split in enumerate(("train", "test")):
        pictures(root / split, {"red": 6, "green": 6}, first=10 * first)
    shutil.copy(root / "train" / "red" / "000.png", root / "test" / "red" / "same.png")
    return root


def test_notes_on_the_data_are_printed_once_by_each_command() -> None:
    root = leaky_set()
    copies = "photos: images that occur more than once: 1 in more than one split"
    summary = "photos: 2 classes: green 12, red 13 · train "
    runs: list[list[str | Path]] = [
        ["train", root, *NET, "--seeds", "2", "--name", "one"],
        ["train", root, *NET, "--folds", "2", "--name", "two"],
        ["labels", root, *NET, "--folds", "3"],
    ]
    for arguments in runs:
        done = here(*arguments)
        assert done.code == 0, done.err
        assert done.err.count(copies) == 1, arguments
        assert done.err.count(summary) == 1, arguments
    done = here("report", "one-seed1")
    assert done.code == 0, done.err
    assert done.err.count(copies) == 1
    audited = here("audit", root).out.splitlines()
    assert audited[0].startswith(summary)


def test_names_that_contain_markup_are_printed_verbatim() -> None:
    root = pictures(Path("[red]set"), {"[b]x": 6, "[i]y": 6})
    (root / "[i]note.txt").write_text("")
    (root / "[i]y" / "notes.txt").write_text("")
    done = here("train", root, *NET, "--name", "odd")
    assert done.code == 0, done.err
    assert "[red]set: ignored 1 file that is not an image: 1 .txt" in done.err
    table = here("evaluate", "odd").out
    assert "[b]x" in table
    assert "[i]y" in table
    assert "[b]x" in here("audit", root).out


def test_audit_warns_about_images_that_decoding_makes_constant() -> None:
    for number in range(8):
        for name, value in (("a", 2000), ("b", 2080)):
            path = Path("set") / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            stripes = np.where(np.arange(8) % 2, 2040 + number, value).astype(np.uint16)
            Image.fromarray(np.tile(stripes, (8, 1))).save(path)
    done = here("audit", "set")
    assert "values of more than 8 bits: 2000 to 2080 become 0 to 255" in done.out
    assert "warning: " not in done.out.partition("warning    ")[0]
    done = here("audit", "set", "data.range=[0, 65535]")
    lines = done.out.splitlines()
    assert any(line.startswith("warning: 12 of 12 training images are (nearly)") for line in lines)
