"""Help pages, usage errors and helpers that all commands share."""

from __future__ import annotations

import math
import re

import pytest
import typer
from hypothesis import given, strategies as st
from typer.main import get_command

from convlens.cli.common import (
    OTHER_NAMES,
    PANELS,
    _edit_distance,
    _option_names,
    app,
    is_typo,
    print_json,
    split_commas,
    translate_usage_errors,
)
from convlens.errors import UsageError
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


def test_help_explains_every_option_and_argument_and_lists_rare_ones_last() -> None:
    for name in (name for names in PANELS.values() for name in names):
        command = get_command(app).commands[name]  # type: ignore[attr-defined]
        for each in command.params:
            assert each.hidden or each.help.endswith((".", "...")), f"{name} {each.name}"
        titles = [line for line in here(name, "-h").out.splitlines() if line.startswith("╭─")]
        assert titles[-1].startswith("╭─ Options ─")


def test_options_of_train_are_grouped_by_question() -> None:
    out = here("train", "-h").out
    titles = ["This run", "Earlier runs", "Several runs", "Options"]
    positions = [out.index(f"╭─ {title} ─") for title in titles]
    assert positions == sorted(positions)
    assert out.index("│ --fresh") < out.index("│ --seeds") < out.index("│ --figures")
    assert "--json" not in here("predict", "-h").out, "--format json does the same"


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
        ("train", ["missing argument 'DATA|RECIPE|FILE.yaml'\n"]),
        ("trian digits", ["no such command 'trian' (did you mean train?)", "-h` lists the comm"]),
        ("data digits", ["no such command 'data' (did you mean audit or augment or shard?)"]),
        ("doctor mine", ["no such command 'doctor' (did you mean diagnose?)"]),
        ("train x --settings all", ["no such option: --settings (did you mean --variants?)"]),
        ("train x --splits 3", ["no such option: --splits (did you mean --repeat-splits?)"]),
        ("evaluate x --splits 3", ["no such option: --splits (did you mean --split?)"]),
        ("train x --test", ["no such option: --test; it is an option of labels\n"]),
        ("train x --no-figures", ["no such option: --no-figures\n"]),
        ("train x --no-fresh", ["no such option: --no-fresh\n"]),
        ("export x --top 3", ["no such option: --top; it is an option of predict, serve\n"]),
        ("predict x --fresh", ["no such option: --fresh; it is an option of train, labels\n"]),
        ("train x --determinstic", ["(did you mean --deterministic?)"]),
        ("train x --repeat 3", ["(did you mean --repeat-splits?)"]),
        ("train x --frozen", ["no such option: --frozen\n"]),
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


def test_options_of_other_commands_are_never_replaced_by_similar_ones() -> None:
    group = get_command(app)  # made once: `here` would make it for each pair
    root = typer.Context(group, info_name="convlens")
    commands = group.commands  # type: ignore[attr-defined]
    options = {name: _option_names(command) for name, command in commands.items()}
    listed = {option for own in options.values() for option in own}
    for name, command in commands.items():
        own = {option for each in command.params for option in each.opts}  # hidden ones, too
        for other in listed - own:
            with pytest.raises(UsageError) as raised, translate_usage_errors():
                command.make_context(name, ["x", "y", other], parent=root)
            assert other in raised.value.what
            assert "did you mean" not in f"{raised.value.what} {raised.value.fix}"


@given(st.text("abcdefgh", min_size=4, max_size=12), st.integers(0, 11))
def test_a_slip_of_one_letter_is_a_typo_and_the_opposite_is_not(name: str, index: int) -> None:
    index %= len(name)
    assert is_typo(f"--{name}", f"--{name}")
    assert is_typo(f"--{name}x", f"--{name}")
    assert is_typo(f"--{name[:index]}x{name[index + 1 :]}", f"--{name}")
    assert is_typo(f"--{name[:3]}", f"--{name}"), "a beginning"
    assert not is_typo(f"--no-{name}", f"--{name}")
    assert not is_typo(f"--{name}", f"--no-{name}")
    assert not is_typo("--yyyyyyyy", f"--{name}")


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "ab", 2), ("name", "nmae", 1), ("fold", "folds", 1), ("seed", "feet", 2), ("a", "a", 0)],
)
def test_edit_distance_counts_slips(first: str, second: str, distance: int) -> None:
    assert _edit_distance(first, second) == _edit_distance(second, first) == distance


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
