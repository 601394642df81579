"""Generated files are up to date, and what tools/reference.py describes itself is complete."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

import reference
from convlens import cli
from helpers.commands import DIGITS, here
from helpers.paths import REPOSITORY


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_generated_file_is_up_to_date(name: str) -> None:
    text = reference.PAGES[name]()
    assert (REPOSITORY / name).read_text("utf-8") == text, "run `python tools/reference.py`"
    if name.endswith(".md"):
        assert max(map(len, text.splitlines())) <= 120


def test_every_command_and_option_is_on_the_page() -> None:
    page = reference.commands_page()
    for names in reference.PANELS.values():
        for name in names:
            section = page.split(f"\n### {name}\n")[1].split("\n### ")[0]
            shown = set(re.findall(r"(?<=[ \x60])--[a-z-]+", here(name, "-h").out)) - {"--help"}
            assert shown <= set(re.findall(r"--[a-z-]+", section)), name
            assert f"convlens {name}" in section


def test_every_variable_of_convlens_is_described() -> None:
    sources = Path(cli.__file__).parents[1].rglob("*.py")
    read = {name for path in sources for name in re.findall(r"CONVLENS_[A-Z_]+", path.read_text())}
    assert read == set(reference.VARIABLES)


def test_every_file_column_and_key_of_a_run_is_described() -> None:
    done = here("train", *DIGITS, "--name", "mine")
    assert done.code == 0, done.err
    run = Path("models/mine")
    described = names(reference.RUN_FILES)
    found = {f"{path.name}/" if path.is_dir() else path.name for path in run.iterdir()}
    assert found <= described
    optional = {
        "model.onnx",
        "model.pt2",
        "predict_onnx.py",
        "trainer.json",
        "images.csv.gz",
        "code/",
    }
    assert described - found <= optional
    with (run / "metrics.csv").open(newline="") as file:
        assert set(next(csv.reader(file))) == names(reference.METRICS)
    keys = set(json.loads((run / "run.json").read_text()))
    only_if_it_happened = {"out_of_memory", "diverged", "changed", "shortened"}
    assert keys == names(reference.RUN_JSON) - only_if_it_happened
    (entry,) = json.loads((run / "results.json").read_text())
    page = reference.run_folder_page()
    results = page.partition("## results.json")[2]
    assert {"when", "split", "looks"} <= set(entry)
    for name in ("when", "split", "data", "n", "accuracy", "interval95", "confusion", "ece"):
        assert name in entry
        assert f"`{name}`" in results


def names(texts: dict[str, str]) -> set[str]:
    """Return the names of a table, whose keys may name several."""
    return {name for key in texts for name in key.split(", ")}
