"""Completion in a shell."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convlens import recipe
from convlens.cli import completion
from convlens.cli.common import app
from convlens.cli.look import METHODS as METHODS_LISTED
from convlens.data import download
from convlens.data.sources import SOURCES
from convlens.interpret.attribution_methods import METHODS
from convlens.interpret.measure import NAMES
from helpers.commands import environment


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a run, data sets and files."""
    for name in ("models/alpha", "models/beta", "photos", "roots/flowers", ".hidden"):
        Path(name).mkdir(parents=True)
    Path("models/alpha/run.json").write_text(
        json.dumps({"data": {"classes": ["cat", "dog", "$(rm x)", "T-shirt/top"]}})
    )
    Path("models/beta/run.json").write_text("not json")
    for name in ("mine.yaml", "photos/a.JPG", "list.csv", "notes.md", "evil';x.csv"):
        Path(name).write_text("")
    monkeypatch.setenv("CONVLENS_DATA", "roots")


def completed(line: str) -> list[str]:
    """Return what is suggested for the last word of a line, by the protocol of fish."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("_CONVLENS_COMPLETE", "complete_fish")
        patch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        patch.setenv("_TYPER_COMPLETE_ARGS", f"convlens {line}")
        with contextlib.suppress(SystemExit):
            app(args=[], prog_name="convlens")
    return [row.partition("\t")[0] for row in out.getvalue().splitlines() if row]


@pytest.mark.parametrize(
    ("line", "suggestions"),
    [
        ("tr", ["train"]),
        ("typo x", []),
        ("evaluate al", ["alpha"]),
        ("evaluate ", ["alpha", "beta", "models/", "photos/", "roots/"]),
        ("evaluate models/a", ["models/alpha/"]),
        ("compare alpha be", ["beta"]),
        ("train mnist-", ["mnist-best", "mnist-fast", "mnist-reg"]),
        ("train mi", ["mine.yaml"]),
        ("train fl", ["flowers"]),
        ("train digits --data sv", ["svhn"]),
        ("audit l", ["list.csv"]),
        ("audit e", []),
        ("predict alpha photos/", ["photos/a.JPG"]),
        ("predict alpha --format c", ["csv"]),
        ("labels al", ["alpha"]),
        ("recipes tiny", ["tiny-best", "tiny-cpu"]),
        ("train mnist optim.na", ["optim.name="]),
        ("train mnist optim.name=s", ["optim.name=sgd"]),
        ("train mnist train.epochs=", ["train.epochs=auto"]),
        ("train mnist data.seed=", []),
        ("audit photos fi", ["fit="]),
        ("audit photos fit=p", ["fit=pad"]),
        ("evaluate alpha --data photos data.ran", ["data.range="]),
        ("look alpha w", ["worst:"]),
        ("look alpha class:", ["class:cat:", "class:dog:", "class:T-shirt/top:"]),
        ("look alpha --class ", ["cat", "dog", "T-shirt/top"]),
        ("look beta --class ", []),
        ("look alpha --attribution occlusion,gr", ["occlusion,grad-cam", "occlusion,grad-cam++"]),
        ("look alpha --measure de", ["dead"]),
        ("train x --figures n", ["none"]),
        ("--figures s", ["svg"]),
        ("train x --fol", ["--folds"]),
    ],
)
def test_suggestions_for_the_last_word(line: str, suggestions: list[str]) -> None:
    assert completed(line) == suggestions


def test_every_recipe_set_key_method_and_measurement_is_suggested() -> None:
    assert set(recipe.recipe_names()) | set(SOURCES) <= set(completed("train "))
    assert {*completion.BUILT_IN_SETS, *download.DOWNLOADS} == set(SOURCES)
    fields = {f"{s}.{name}=" for s, kind in recipe.SECTIONS.items() for name in kind.model_fields}
    assert set(completed("train mnist ")) >= fields | {"augment="}
    assert set(METHODS_LISTED) == set(METHODS)
    assert set(completed("look alpha --measure ")) == {"all", *NAMES}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_quickly_without_torch() -> None:
    """The real script in bash, which splits words at `=`."""
    program = Path("convlens")
    start = "import sys; sys.argv[0] = 'convlens'; from convlens.cli import run; run()"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -X importtime -c "{start}" "$@"\n')
    program.chmod(0o755)
    script = """
        PATH=$PWD:$PATH
        eval "$(convlens --show-completion bash 2>/dev/null)"
        COMP_WORDS=(convlens train mnist optim.name = s) COMP_CWORD=5
        _convlens_completion convlens 2>imports.txt
        echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        env=environment(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=""),
        check=True,
    )
    assert done.stdout.split() == ["sgd"]
    lines = Path("imports.txt").read_text().splitlines()
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "convlens" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "PIL", "matplotlib"})
