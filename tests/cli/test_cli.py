"""The command line as a whole: exit codes, streams, `--debug`, and unexpected errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convlens import cli
from convlens.errors import UsageError
from convlens.metrics import wilson_interval
from convlens.version import __version__
from helpers.commands import (
    DIGITS,
    command,
    constant_model,
    environment,
    here,
    picture,
    refused,
)
from helpers.support import BAD_DISK


def test_version_and_help() -> None:
    assert here("--version").out == f"convlens {__version__}\n"
    done = here("--help")
    assert done.code == 0
    for name in ("train", "evaluate", "predict", "audit", "recipes"):
        assert name in done.out
        assert here(name, "-h").code == 0


def test_train_evaluate_and_predict_in_separate_processes() -> None:
    done = command("train", *DIGITS, "--name", "mine", "--json")
    assert done.code == 0, done.err
    assert (done.json["run"], done.json["split"], done.json["looks"]) == ("mine", "test", 1)
    assert "epoch   2/2" in done.err
    evaluated = command("evaluate", "mine", "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json["correct"] == done.json["correct"]
    low, high = wilson_interval(evaluated.json["correct"], evaluated.json["n"])
    assert evaluated.json["interval95"] == [low, high]
    image = picture(Path("seven.png"), (90,))
    predicted = command("predict", "mine", image)
    assert predicted.code == 0, predicted.err
    assert predicted.out.startswith("seven.png  ")


def test_json_option_prints_one_object_on_stdout_and_nothing_else() -> None:
    assert set(here("train", *DIGITS, "--no-test", "--json").json) == {"run", "path"}
    for arguments in (["audit", "digits"], ["recipes"], ["recipes", "digits"]):
        done = here(*arguments, "--json")
        assert done.code == 0, done.err
        assert isinstance(done.json, dict)


@pytest.mark.parametrize("text", ["1", ""])
def test_debug_variable_keeps_tracebacks(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CONVLENS_DEBUG", text)
    if text:
        with pytest.raises(UsageError):
            here("train", "nothing-of-that-name")
    else:
        assert here("train", "nothing-of-that-name").code == 2


def test_debug_option_applies_to_one_command_and_does_not_change_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CONVLENS_DEBUG", raising=False)
    before = dict(os.environ)
    with pytest.raises(UsageError):
        here("--debug", "train", "nothing-of-that-name")
    assert dict(os.environ) == before
    refused(here("train", "nothing-of-that-name"), 2, "neither a recipe nor a data set")


def test_a_misspelled_folder_is_named() -> None:
    Path("flowers").mkdir()
    refused(here("train", "flowrs"), 2, "did you mean flowers?")


def test_unexpected_system_error_has_exit_code_5(monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError that no function handles is reported without a traceback."""
    monkeypatch.setenv("CONVLENS_DEBUG", "")
    constant_model(Path("models/m"), [0, 1], ["a", "b"])
    with BAD_DISK.open() as broken:
        done = here("predict", "m", "-", stdin=broken)
    refused(done, 5, "system error: Input/output error", "train.py, line ", "do:", "--debug")
    with BAD_DISK.open() as broken, pytest.raises(OSError, match="Input/output error"):
        here("--debug", "predict", "m", "-", stdin=broken)


def test_system_error_names_the_file() -> None:
    try:
        Path("gone").read_bytes()
    except OSError as error:
        reported = cli._to_convlens_error(error)
    assert reported is not None
    assert (reported.exit_code, reported.where) == (5, "gone")
    assert reported.what == "system error: No such file or directory"


def test_closed_pipe_is_not_reported_as_an_error() -> None:
    """As in `convlens recipes | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-u", "-m", "convlens", "recipes"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=environment(),
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
