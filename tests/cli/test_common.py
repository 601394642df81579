"""Help pages, usage errors and helpers that all commands share."""

from __future__ import annotations

import math
import re

import pytest

from convlens.cli.common import OTHER_NAMES, PANELS, print_json, split_commas
from helpers.commands import here, refused


def test_help_lists_the_commands_in_panels_in_this_order() -> None:
    lines = here("--help").out.splitlines()
    listed: list[str] = []
    for line in lines:
        if line.startswith("╭─"):
            listed.append(line.strip("╭╮─ "))
        elif match := re.match(r"│ (\w+) ", line):
            listed.append(match[1])
    assert " ".join(listed).startswith(
        "Everyday train predict evaluate report Understand explore look compare diagnose "
        "Data audit labels augment shard Hand over export serve Other check recipes weights info"
    )


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", [name for names in PANELS.values() for name in names])
def test_help_has_one_example_per_line_and_no_type_tags(
    monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = here(name, "--help")
    assert done.code == 0
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert max(map(len, lines)) <= width
    examples = [line for line in lines if line.startswith("   convlens ")]
    assert examples
    assert all(line.count("convlens ") == 1 for line in examples)
    assert any(line.startswith(f"   convlens {name}") for line in examples)
    assert not re.search(r"<(str|int|bool|list|float)|\b(TEXT|INTEGER|BOOLEAN)\b", done.out)
    assert "[dim]" not in done.out


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("train digits --epochs 3", ["no such option: --epochs", "train.epochs=VALUE;"]),
        ("train digits --batch-size=8", ["train.batch_size=VALUE;"]),
        ("train digits --seed 3", ["data.seed=VALUE or train.seed=VALUE;"]),
        ("train digits --nmae x", ["no such option: --nmae (did you mean --name?)", "train -h"]),
        ("train digits --model resnet18", ["this is a recipe key", "model.name=VALUE;"]),
        ("train digits --arch resnet18", ["model.name=VALUE;"]),
        ("train digits --img-size 32", ["data.image_size=VALUE;"]),
        ("train digits --optimizer sgd", ["optim.name=VALUE;"]),
        ("train digits --dataset mnist", ["no such option: --dataset (did you mean --data?)"]),
        ("train digits --gpu 0", ["no such option: --gpu (did you mean --device?)"]),
        ("evaluate x --epochs 3", ["no such option: --epochs\n", "evaluate -h` lists the opt"]),
        ("train digits --seeds many", ["invalid value for '--seeds': ", "train -h"]),
        ("train digits --name", ["'--name' requires an argument", "COMMAND -h"]),
        ("train", ["missing argument 'RECIPE|FILE.yaml|DATA'\n"]),
        ("trian digits", ["no such command 'trian' (did you mean train?)", "-h` lists the comm"]),
        ("data digits", ["no such command 'data' (did you mean audit or augment or shard?)"]),
        ("doctor mine", ["no such command 'doctor' (did you mean diagnose?)"]),
        ("train x --settings all", ["no such option: --settings (did you mean --variants?)"]),
        ("train x --splits 3", ["no such option: --splits (did you mean --repeat-splits?)"]),
        ("evaluate x --splits 3", ["no such option: --splits (did you mean --split?)"]),
        ("predcit x", ["no such command 'predcit' (did you mean predict?)"]),
        ("--versoin", ["no such option: --versoin (did you mean --version?)"]),
    ],
)
def test_usage_errors_have_the_form_of_all_errors(typed: str, parts: list[str]) -> None:
    done = here(*typed.split())
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    message = " ".join(done.err.split()) + "\n"
    for part in parts:
        assert " ".join(part.split()) in message, done.err
    assert len(done.err.splitlines()) <= 5


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        ("train", "fit finetune"),
        ("evaluate", "test val validate eval Test"),
        ("predict", "infer inference classify"),
        ("audit or diagnose", "inspect"),
        ("look", "visualize explain"),
        ("export", "convert"),
    ],
)
def test_verbs_of_other_tools_are_explained(command: str, typed: str) -> None:
    for verb in typed.split():
        refused(here(verb, "mine"), 2, f"no such command {verb!r} (did you mean {command}?)")


def test_suggested_commands_exist() -> None:
    names = {name for panel in PANELS.values() for name in panel}
    for old, suggested in OTHER_NAMES.items():
        if not old.startswith("-"):
            assert set(suggested) <= names
            assert old not in names


def test_json_replaces_nan_and_infinity_by_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(True, {"loss": math.nan, "rows": [(math.inf, 1.5)], "name": "ä"})
    print_json(False, {"not": "printed"})
    assert capsys.readouterr().out == '{"loss": null, "rows": [[null, 1.5]], "name": "ä"}\n'


def test_lists_are_split_at_commas() -> None:
    assert split_commas("a, b,,c ") == ["a", "b", "c"]
    assert split_commas(None) == split_commas("") == []
