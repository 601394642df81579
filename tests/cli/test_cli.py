"""The command line as people use it: train, train again, own images, recipes, what is printed."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from convlens import Run, cli, device, recipe
from convlens.cli.common import PANELS
from convlens.errors import UsageError
from convlens.metrics import wilson_interval
from convlens.version import __version__
from helpers.commands import (
    COLORS,
    DIGITS,
    NET,
    Done,
    command,
    constant_model,
    environment,
    here,
    picture,
    pictures,
    refused,
    weights,
)
from helpers.support import BAD_DISK

pytestmark = pytest.mark.figures


def facts(run: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path("models") / run / "run.json").read_text())
    return found


def trained(*arguments: str | Path) -> Any:
    done = here("train", *arguments, "--json")
    assert done.code == 0, done.err
    return done.json


def test_version_and_help() -> None:
    assert here("--version").out == f"convlens {__version__}\n"
    done = here("--help")
    assert done.code == 0
    for name in ("train", "evaluate", "predict", "audit", "recipes"):
        assert name in done.out
        assert here(name, "-h").code == 0


def test_help_lists_the_commands_in_panels_in_this_order() -> None:
    lines = here("--help").out.splitlines()
    found: list[str] = []
    for line in lines:
        if line.startswith("╭─"):
            found.append(line.strip("╭╮─ "))
        elif match := re.match(r"│ (\w+) ", line):
            found.append(match[1])
    assert " ".join(found).startswith(
        "Everyday train predict evaluate report Understand look compare diagnose "
        "Data audit labels augment shard Hand over export Other recipes info"
    )


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", [name for names in PANELS.values() for name in names])
def test_help_has_examples_one_a_line_and_no_type_tags(
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


def test_info_says_what_a_training_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLENS_MEMORY", "64MB")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    cache = Path(os.environ["CONVLENS_CACHE"])
    (cache / "a").mkdir(parents=True)
    (cache / "a" / "store").write_bytes(b"x" * 700)
    (cache / "other").write_bytes(b"x" * 50)
    found = here("info", "--json").json
    assert found["versions"]["convlens"] == __version__
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["device"]["device"] == device.select_device()
    assert found["device"]["cores"] == device.usable_cores()
    assert found["device"]["half_precision"] == device.half_precision(device.select_device())
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["threads"]["GOMP_SPINCOUNT"] == "1000"
    assert found["memory"]["budget"] == 64_000_000 or found["memory"]["budget"] == 64 * 2**20
    assert found["folders"]["cache_size"] == 750
    assert found["folders"]["models"] == str(Path("models").absolute())
    assert found["folders"]["data"] == [os.environ["CONVLENS_DATA"], str(Path("data").absolute())]
    assert set(found["optional packages"]) == {"timm", "onnx", "onnxruntime", "onnxscript"}
    text = here("info").out
    assert re.search(r"GOMP_SPINCOUNT +1000\n", text)
    for name, version in found["optional packages"].items():
        assert re.search(rf"  {name} +{version or 'not installed'}\n", text)


def test_train_evaluate_predict_in_processes_of_their_own() -> None:
    done = command("train", *DIGITS, "--name", "mine", "--json")
    assert done.code == 0, done.err
    assert (done.json["run"], done.json["split"], done.json["looks"]) == ("mine", "test", 1)
    assert "epoch   2/2" in done.err
    looked = command("evaluate", "mine", "--json")
    assert looked.code == 0, looked.err
    assert looked.json["correct"] == done.json["correct"]
    low, high = wilson_interval(looked.json["correct"], looked.json["n"])
    assert looked.json["interval95"] == [low, high]
    image = picture(Path("seven.png"), (90,))
    answer = command("predict", "mine", image)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("seven.png  ")


def test_json_is_all_there_is_on_stdout() -> None:
    assert set(trained(*DIGITS, "--no-test")) == {"run", "path"}
    for arguments in (["audit", "digits"], ["recipes"], ["recipes", "digits"]):
        done = here(*arguments, "--json")
        assert done.code == 0, done.err
        assert isinstance(done.json, dict)


def test_results_go_to_stdout_and_the_rest_to_stderr() -> None:
    done = here("train", *DIGITS, "--name", "mine")
    assert "test accuracy" in done.out
    assert "95% interval" in done.out
    assert "n = 270" in done.out
    assert "models/mine/model.safetensors" in done.out
    assert "plots/mine" in done.out
    assert "epoch" not in done.out.replace("weights of epoch", "")
    assert "convlens predict mine IMAGE" in done.err


def test_the_test_set_is_said_to_be_used_once_or_several_times() -> None:
    assert "; test set used once\n" in here("train", *DIGITS, "--name", "mine").out
    assert "; test set used 2 times\n" in here("train", *DIGITS, "--name", "mine").out
    assert "; test set used 3 times\n" in here("evaluate", "mine").out
    assert "test set used" not in here("evaluate", "mine", "--split", "val").out
    pictures(Path("own"), {"3": 2, "7": 3})
    assert "test set used" not in here("evaluate", "mine", "--data", "own").out


def test_no_line_is_printed_twice() -> None:
    """On a terminal stdout and stderr are one text."""
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


# Training again


def test_the_same_command_again_does_not_train_but_tests() -> None:
    first = trained(*DIGITS)
    model = Path(first["path"]) / "model.safetensors"
    before, written = facts(first["run"]), model.stat().st_mtime_ns
    again = here("train", *DIGITS, "--json")
    assert "is trained already" in again.err
    assert "epoch" not in again.err
    second = again.json
    same = ("run", "path", "n", "correct", "loss", "model_sha256", "data_fingerprint")
    assert {k: second[k] for k in same} == {k: first[k] for k in same}
    assert second["looks"] == 2
    assert (facts(first["run"]), model.stat().st_mtime_ns) == (before, written)
    assert [p.name for p in Path("models").iterdir()] == [first["run"]]


def test_a_changed_recipe_is_a_new_run() -> None:
    one, two = trained(*DIGITS), trained(*DIGITS, "train.seed=1")
    assert one["run"] != two["run"]
    assert one["run"].startswith("digits-")
    assert two["run"].startswith("digits-")


def test_fresh_trains_the_same_anew_in_a_new_folder() -> None:
    first = trained(*DIGITS)
    fresh = trained(*DIGITS, "--fresh")
    assert fresh["run"] == f"{first['run']}-2"
    old, new = weights(Path(first["path"])), weights(Path(fresh["path"]))
    assert all(bool((old[name] == new[name]).all()) for name in old)
    # From now on the command means the newer one.
    assert trained(*DIGITS)["run"] == fresh["run"]


def test_a_name_is_the_runs_name() -> None:
    assert trained(*DIGITS, "--name", "My run/1")["run"] == "My-run-1"
    assert trained(*DIGITS, "--name", "My run/1")["looks"] == 2
    # Another recipe under that name never overwrites it.
    other = trained(*DIGITS, "train.seed=1", "--name", "My run/1")["run"]
    assert other != "My-run-1"
    assert other.startswith("My-run-1-")


def test_no_test_leaves_the_test_split_sealed() -> None:
    done = here("train", *DIGITS, "--no-test", "--name", "sealed")
    assert done.code == 0
    assert "test accuracy" not in done.out + done.err
    assert not Path("models/sealed/results.json").exists()
    assert not list(Path("plots/sealed").glob("*test*"))
    assert trained(*DIGITS, "--name", "sealed")["looks"] == 1


def test_deterministic_is_part_of_the_recipe() -> None:
    got = trained(*DIGITS, "--deterministic", "--name", "steady")
    assert recipe.load_recipe(Path(got["path"]) / "recipe.yaml").train.deterministic
    trained(*DIGITS, "--name", "loose")  # and is switched off again


# Recipes


def test_every_recipe_is_listed_and_printed() -> None:
    table = here("recipes").out
    for name in recipe.recipe_names():
        assert name in table
        assert here("recipes", name).out == recipe.recipe_text(name)
    assert here("recipes", "digits", "--json").json == recipe.load_recipe("digits").model_dump(
        mode="json"
    )


def test_a_printed_recipe_trains_as_it_stands() -> None:
    Path("mine.yaml").write_text(here("recipes", "digits").out)
    short = ["train.epochs=1", "data.per_class=8", "model.widths=[4]"]
    mine, built_in = trained("mine.yaml", *short), trained("digits", *short)
    assert mine["run"].startswith("mine-")
    one, two = weights(Path(mine["path"])), weights(Path(built_in["path"]))
    assert all(bool((one[name] == two[name]).all()) for name in one)


def test_a_runs_own_recipe_finds_the_run_and_trains_the_same() -> None:
    first = trained(*DIGITS)
    written = Path(first["path"]) / "recipe.yaml"
    assert "auto" not in {
        recipe.load_recipe(written).train.epochs,
        recipe.load_recipe(written).data.image_size,
    }
    again = trained(written)
    assert (again["run"], again["looks"]) == (first["run"], 2)
    anew = trained(written, "--fresh")
    assert anew["run"] not in {first["run"]}
    one, two = weights(Path(first["path"])), weights(Path(anew["path"]))
    assert all(bool((one[name] == two[name]).all()) for name in one)


def test_a_file_may_be_based_on_a_recipe() -> None:
    Path("quick.yaml").write_text("base: digits\ntrain: {epochs: 1}\nmodel: {widths: [4]}\n")
    got = trained("quick.yaml", "data.per_class=4")
    assert recipe.load_recipe(Path(got["path"]) / "recipe.yaml").model.options["widths"] == [4]


def test_a_recipe_on_other_data() -> None:
    got = trained(
        "mnist-reg",
        "--data",
        "digits",
        "train.epochs=1",
        "model.widths=[4]",
        "data.val_fraction=0.2",
        "data.per_class=5",
        "model.hidden=0",
    )
    assert got["run"].startswith("mnist-reg-digits-")
    assert got["data"] == "digits"


# Own images


def own(done: Done) -> Run:
    assert done.code == 0, done.err
    return Run.load(done.json["run"])


def test_a_folder_of_class_folders_from_end_to_end() -> None:
    root = pictures(Path("photos"), {"red": 30, "green": 30, "blue": 30}, size=16)
    asked = [
        "train",
        root,
        "model.widths=[8]",
        "train.epochs=12",
        "augment=[]",
        "train.batch_size=8",
    ]
    run = own(here(*asked, "--json"))
    assert run.name.startswith("photos-")
    assert run.classes == ("blue", "green", "red")
    assert (run.recipe.data.image_size, run.recipe.data.channels) == (16, 3)
    assert run.results[-1]["accuracy"] == 1.0
    how = facts(run.name)["data"]["splits"]
    assert "held out" in how["test"]
    held = list(csv.DictReader((run.path / "split.csv").open()))
    assert {row["split"] for row in held} == {"val", "test"}
    for name, color in COLORS.items():
        image = picture(Path(f"new-{name}.bmp"), color, size=16, seed=7)
        answer = here("predict", run.name, image, "--json").json["predictions"][0]
        assert answer["label"] == name


def test_folders_of_splits_in_their_usual_spellings() -> None:
    root = Path("photos")
    pictures(root / "Training", {"red": 6, "green": 6})
    pictures(root / "valid", {"red": 3, "green": 2}, first=100)
    pictures(root / "test", {"red": 1, "green": 4}, first=200)
    run = own(here("train", root, *NET, "--json"))
    counts = {name: score["n"] for name, score in run.results[-1]["per_class"].items()}
    assert counts == {"green": 4, "red": 1}
    assert run.evaluate("val").n == 5
    assert run.evaluate("train").n == 12
    assert (run.path / "split.csv").read_text() == "id,split\n"


def test_a_csv_with_split_and_group() -> None:
    pictures(Path("all"), {"red": 12, "green": 12})
    with Path("list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "owner"])
        for path in sorted(Path("all").rglob("*.png")):
            n = int(path.stem)
            split = "test" if n >= 10 else "train"
            writer.writerow([path, path.parent.name, split, f"{split}{n // 2}"])
    run = own(here("train", "list.csv", "data.group=owner", *NET, "--json"))
    assert run.name.startswith("list-")
    assert run.results[-1]["n"] == 4
    held = [row["id"] for row in csv.DictReader((run.path / "split.csv").open())]
    assert held
    for other in ("all/red/{:03}.png", "all/green/{:03}.png"):
        owners = {int(Path(i).stem) // 2 for i in held if i.startswith(other[:8])}
        assert all({other.format(2 * o), other.format(2 * o + 1)} <= {*held} for o in owners)


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    root = pictures(Path("[red]set"), {"[b]x": 6, "[i]y": 6})
    (root / "[i]note.txt").write_text("")
    (root / "[i]y" / "notes.txt").write_text("")
    done = here("train", root, *NET, "--name", "odd")
    assert done.code == 0, done.err
    assert "[red]set: 1 files that are not images were ignored" in done.err
    table = here("evaluate", "odd").out
    assert "[b]x" in table
    assert "[i]y" in table
    assert "[b]x" in here("audit", root).out


def test_the_audit_of_a_folder() -> None:
    root = pictures(Path("photos"), {"red": 12, "green": 14})
    (root / "green" / "copy.png").write_bytes((root / "red" / "000.png").read_bytes())
    done = here("audit", root)
    assert done.code == 0
    assert "under two labels" in done.out
    assert "contact sheet  plots/data-photos.png" in done.out
    assert Path("plots/data-photos.png").is_file()
    got = here("audit", root, "val_fraction=0.2", "--json").json
    assert sum(got["counts"]["green"].values()) == 15
    assert got["duplicates"]["two_labels"] == 1
    assert os.path.isfile(got["contact_sheet"])


def test_a_batch_as_a_recipe_augments_it() -> None:
    root = pictures(Path("photos"), {"red": 12, "green": 14})
    Path("mine.yaml").write_text(
        "base: folder\naugment: [TrivialAugmentWide, AlternatingFlip, MixUp, CutMix]\n"
    )
    for asked, name in (("digits", "digits"), ("folder", "folder"), ("mine.yaml", "mine")):
        done = here("augment", asked, root)
        assert done.code == 0, done.err
        path = f"plots/augmented-photos-{name}.png"
        assert done.out == f"augmented batch  {path}\n"
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
    done = here("augment", "digits", "digits", "per_class=5", "--json")
    assert done.json == {
        "data": "digits",
        "recipe": "digits",
        "augmented_batch": "plots/augmented-digits-digits.png",
    }
    refused(here("augment", "digts", "digits"), 2, "unknown recipe 'digts'", "digits?")
    refused(here("augment", "digits", "digist"), 2, "'digist' is neither", "mean digits")
    refused(here("augment", "mnist", "digits"), 2, "'mnist' augments nothing")
    Path("bad.yaml").write_text("base: folder\naugment: [{Cutout: {size: 0}}]\n")
    refused(here("augment", "bad.yaml", "digits"), 2, "size=0 should be", "Cutout takes")
    Path("big.yaml").write_text("base: folder\naugment: [{Cutout: {size: 9}}]\n")
    refused(here("augment", "big.yaml", "digits"), 2, "at most the image size 8")


@pytest.mark.parametrize("text", ["1", ""])
def test_debug_shows_tracebacks(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CONVLENS_DEBUG", text)
    if text:
        with pytest.raises(UsageError):
            here("train", "nothing-of-that-name")
    else:
        assert here("train", "nothing-of-that-name").code == 2


def test_debug_holds_for_one_command_and_leaves_the_environment_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CONVLENS_DEBUG", raising=False)
    before = dict(os.environ)
    with pytest.raises(UsageError):
        here("--debug", "train", "nothing-of-that-name")
    assert dict(os.environ) == before
    refused(here("train", "nothing-of-that-name"), 2, "neither a recipe nor a data set")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("train digits --epochs 3", ["no such option: --epochs", "train.epochs=VALUE;"]),
        ("train digits --batch-size=8", ["train.batch_size=VALUE;"]),
        ("train digits --seed 3", ["data.seed=VALUE or train.seed=VALUE;"]),
        ("train digits --nmae x", ["no such option: --nmae (did you mean --name?)", "train -h"]),
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
def test_what_was_typed_wrongly_is_told_as_every_error_is(typed: str, told: list[str]) -> None:
    done = here(*typed.split())
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    said = " ".join(done.err.split()) + "\n"
    for part in told:
        assert " ".join(part.split()) in said, done.err
    assert len(done.err.splitlines()) <= 5


def test_what_the_system_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody foresees every disk that fails: no traceback, wherever it is."""
    monkeypatch.setenv("CONVLENS_DEBUG", "")
    constant_model(Path("models/m"), [0, 1], ["a", "b"])
    with BAD_DISK.open() as broken:
        done = here("predict", "m", "-", stdin=broken)
    refused(done, 5, "the system refused: Input/output error", "basics.py, line ", "do:", "--debug")
    with BAD_DISK.open() as broken, pytest.raises(OSError, match="Input/output error"):
        here("--debug", "predict", "m", "-", stdin=broken)


def test_what_the_system_refuses_is_named() -> None:
    try:
        Path("gone").read_bytes()
    except OSError as error:
        told = cli._explained(error)
    assert told is not None
    assert (told.exit_code, told.where) == (5, "gone")
    assert told.what == "the system refused: No such file or directory"


def test_nobody_who_reads_is_no_error_to_tell() -> None:
    """`convlens recipes | head -1`"""
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
