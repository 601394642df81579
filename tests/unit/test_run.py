"""Run directories: their names, their files, loading models and finding runs."""

from __future__ import annotations

import csv
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from convlens import models, recipe, run
from convlens.data.decode import Conversion
from convlens.errors import ModelFileError, ResourceError, UsageError
from convlens.run import Preprocessing, RunDir
from helpers.launching import Forked, wait_until
from helpers.support import same, tiny

ONE, TWO = "1" * 64, "2" * 64


def create_run(run_dir: RunDir, digest: str) -> RunDir:
    run_dir.create(tiny(), {"digests": [digest]})
    return run_dir


def run_dir_name(name: str, digest: str, *, plain_name: bool = True, fresh: bool = False) -> str:
    return run.find_or_create_run_dir(name, digest, plain_name=plain_name, fresh=fresh).name


# Names


def test_the_same_recipe_finds_its_run_and_another_one_gets_a_new_folder() -> None:
    assert run_dir_name("mnist", ONE) == "mnist"
    create_run(run.find_or_create_run_dir("mnist", ONE, plain_name=True, fresh=False), ONE)
    assert run_dir_name("mnist", ONE) == "mnist"
    assert run_dir_name("mnist", TWO) == "mnist-222222"
    create_run(run.find_or_create_run_dir("mnist", TWO, plain_name=True, fresh=False), TWO)
    assert run_dir_name("mnist", TWO) == "mnist-222222"
    assert run_dir_name("mnist", ONE) == "mnist"


def test_a_recipe_with_overrides_has_its_hash_in_the_name() -> None:
    assert run_dir_name("mnist", ONE, plain_name=False) == "mnist-111111"
    create_run(run.find_or_create_run_dir("mnist", ONE, plain_name=False, fresh=False), ONE)
    assert run_dir_name("mnist", ONE, plain_name=False) == "mnist-111111"
    assert run_dir_name("mnist", TWO, plain_name=False) == "mnist-222222"
    clash = "1" * 6 + "9" * 58  # the same six digits, another recipe
    assert run_dir_name("mnist", clash, plain_name=False) == "mnist-111111-2"


def test_fresh_creates_a_new_folder_and_the_newest_is_found_again() -> None:
    names = []
    for _ in range(4):
        run_dir = run.find_or_create_run_dir("mnist", ONE, plain_name=True, fresh=True)
        assert not run_dir.path.exists()
        names.append(create_run(run_dir, ONE).name)
    assert names == ["mnist", "mnist-111111", "mnist-111111-2", "mnist-111111-3"]
    assert run_dir_name("mnist", ONE) == "mnist-111111-3"


def test_folders_and_files_of_the_user_are_never_used() -> None:
    Path("models/mine").mkdir(parents=True)
    Path("models/mine/notes.txt").write_text("mine")
    assert run_dir_name("mine", ONE) == "mine-111111"
    Path("models/file").write_text("mine")
    assert run_dir_name("file", ONE) == "file-111111"


def test_leftovers_of_a_run_that_never_started_do_not_reserve_the_name() -> None:
    run_dir = RunDir(Path("models/mnist"))
    with run_dir.lock():
        pass
    run_dir.write_split({"test": ["a"]})
    assert run_dir_name("mnist", ONE) == "mnist"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my run", "my-run"),
        ("a/b", "a-b"),
        ("../x", "x"),
        ("..", "run"),
        ("", "run"),
        (".hidden", "hidden"),
        ("a\\b:c*d", "a-b-c-d"),
        ("größe", "größe"),
        ("v1.2_x", "v1.2_x"),
        ("數字", "數字"),
        ("a\0b", "a-b"),
        ("x.", "x"),
    ],
)
def test_run_names_become_safe_folder_names(name: str, expected: str) -> None:
    assert run.safe_name(name) == expected


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=60))
def test_any_run_name_is_one_folder_below_models(name: str) -> None:
    path = run.find_or_create_run_dir(name, ONE, plain_name=True, fresh=False).path
    assert path.parent == Path("models")
    assert path.name not in ("", ".", "..")
    assert not path.name.startswith((".", "-"))
    assert all(unicodedata.category(c)[0] in "LNMP" for c in path.name)
    assert run.safe_name(path.name) == path.name


# Files


def test_metadata_is_updated_and_kept() -> None:
    run_dir = RunDir(Path("models/x"))
    assert run_dir.metadata() == {}
    assert not run_dir.is_finished
    run_dir.create(tiny(), {"digests": [ONE], "n": 1})
    run_dir.update_metadata({"n": 2, "ö": "ü"})
    metadata = run_dir.metadata()
    assert (metadata["n"], metadata["ö"], metadata["status"]) == (2, "ü", "training")
    assert not run_dir.is_finished
    run_dir.finish(epochs=3, kept=2, seconds=1.23456)
    metadata = run_dir.metadata()
    assert (metadata["epochs"], metadata["kept_epoch"], metadata["training_seconds"]) == (
        3,
        2,
        1.235,
    )
    assert not run_dir.is_finished  # there is no model yet
    run_dir.model_path.write_bytes(b"x")
    assert run_dir.is_finished


def test_the_stored_recipe_equals_the_recipe() -> None:
    run_dir = create_run(RunDir(Path("models/x")), ONE)
    assert recipe.load_recipe(run_dir.path / "recipe.yaml") == tiny()


def row(epoch: int, **values: float) -> dict[str, float]:
    return {**dict.fromkeys(run.METRICS_COLUMNS, 0.5), "epoch": epoch, **values}


def test_metrics_are_read_back_with_eight_digits() -> None:
    run_dir = RunDir(Path("models/x"))
    assert run_dir.metrics() == []
    values = row(1, train_loss=1 / 3, val_loss=1e-9, lr=2.0, images_per_second=123456.789)
    run_dir.write_metrics([values, row(2, val_loss=float("nan"), train_loss=float("inf"))])
    first, second = run_dir.metrics()
    assert first == pytest.approx(values, rel=1e-7)
    assert second["val_loss"] != second["val_loss"]
    assert second["train_loss"] == float("inf")
    text = (run_dir.path / "metrics.csv").read_text().splitlines()
    assert text[0] == ",".join(run.METRICS_COLUMNS)
    assert text[1].startswith("1,0.33333333,0.5,1e-09,0.5,0.5,0.5,2,")


def test_the_split_file_supports_any_image_name() -> None:
    run_dir = RunDir(Path("models/x"))
    run_dir.write_split({"val": ['a,"b".png', "ö\n.png"], "test": ["t/1"]})
    with (run_dir.path / "split.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["id", "split"], ['a,"b".png', "val"], ["ö\n.png", "val"], ["t/1", "test"]]


def test_every_evaluation_of_a_split_is_counted() -> None:
    run_dir = RunDir(Path("models/x"))
    splits = ("test", "val", "test", "test")
    counts = [run_dir.add_result({"split": split})["looks"] for split in splits]
    assert counts == [1, 1, 2, 3]
    assert [entry["split"] for entry in run_dir.evaluation_log()] == ["test", "val", "test", "test"]
    assert all(entry["when"] for entry in run_dir.evaluations())


@pytest.mark.parametrize("file", ["run.json", "results.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_damaged_records_are_model_file_errors(file: str, content: bytes) -> None:
    run_dir = create_run(RunDir(Path("models/x")), ONE)
    (run_dir.path / file).write_bytes(content)
    with pytest.raises(ModelFileError, match="unreadable"):
        run_dir.metadata() if file == "run.json" else run_dir.evaluations()


def test_leftovers_of_killed_processes_are_removed_with_the_lock() -> None:
    run_dir = RunDir(Path("models/x"))
    run_dir.create(tiny(), {"digests": []})
    run_dir.add_result({"split": "val", "accuracy": 1})
    names = [*run.LOCKED_FILES, "results.json", "model.onnx", "mine.csv"]
    parts = {name: run_dir.path / f".{name}.abcdefgh.part" for name in names}
    for path in parts.values():
        path.touch()
    with run_dir.lock():
        remaining = {name for name, path in parts.items() if path.exists()}
    assert remaining == {"results.json", "model.onnx", "mine.csv"}
    run_dir.add_result({"split": "val", "accuracy": 1})
    remaining = {name for name, path in parts.items() if path.exists()}
    assert remaining == {"model.onnx", "mine.csv"}


def test_a_run_is_locked_by_one_process() -> None:
    run_dir = RunDir(Path("models/x"))
    with run_dir.lock(), pytest.raises(ResourceError, match="another process is using run 'x'"):  # noqa: SIM117
        with run_dir.lock():
            pass


# Models


def model_metadata(**changes: Any) -> dict[str, Any]:
    return {
        "convlens": "9.9",
        "model": {"name": "cnn", "options": {"widths": [4]}},
        "classes": ["a", "b", "ö"],
        "preprocessing": {
            "image_size": 8,
            "channels": 1,
            "fit": "crop",
            "mean": [0.1],
            "std": [0.2],
        },
        **changes,
    }


def saved(name: str = "x", **changes: Any) -> tuple[RunDir, torch.nn.Module]:
    torch.manual_seed(0)
    model = models.build_model("cnn", 3, 1, 8, {"widths": [4]})
    run_dir = RunDir(Path("models") / name)
    run_dir.save_model(model.state_dict(), model_metadata(**changes))
    return run_dir, model


def test_a_saved_model_is_loaded_with_its_classes_and_preprocessing() -> None:
    run_dir, model = saved()
    loaded = run.load_model(run_dir.model_path)
    same(dict(loaded.model.state_dict()), dict(model.state_dict()))
    assert not loaded.model.training
    assert loaded.classes == ("a", "b", "ö")
    assert loaded.preprocessing.normalize.mean == [0.1]
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.model(images), model.eval()(images))


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["a", "b"]},
        {"classes": None},
        {"model": {"name": "resnet999", "options": {}}},
        {"model": {"name": "cnn", "options": {"widths": [5]}}},
        {"model": {"name": "cnn", "options": {"width": [4]}}},
        {"model": {"name": "cnn", "options": {"widths": [4, 4]}}},
        {"model": {"name": "cnn", "options": [1]}},
        {"model": {"name": "cnn"}},
        {"model": []},
        {"preprocessing": {"image_size": 8}},
        {"preprocessing": []},
        {"preprocessing": {**model_metadata()["preprocessing"], "extra": 1}},
        {"preprocessing": {**model_metadata()["preprocessing"], "channels": "x"}},
        {"preprocessing": {**model_metadata()["preprocessing"], "image_size": None}},
        {"preprocessing": {**model_metadata()["preprocessing"], "fit": "squash"}},
        {"preprocessing": {**model_metadata()["preprocessing"], "value_range": [5]}},
        {"preprocessing": {**model_metadata()["preprocessing"], "value_range": [5, 5]}},
        {"preprocessing": {**model_metadata()["preprocessing"], "value_range": ["a", "b"]}},
        {"preprocessing": {**model_metadata()["preprocessing"], "background": "no color"}},
        {"preprocessing": {**model_metadata()["preprocessing"], "max_pixels": None}},
    ],
)
def test_weights_that_do_not_fit_their_metadata_are_refused(changes: dict[str, Any]) -> None:
    run_dir, _ = saved(**changes)
    with pytest.raises(ModelFileError, match="cannot be used by this version") as caught:
        run.load_model(run_dir.model_path)
    assert "9.9" in caught.value.fix


def test_the_conversion_of_images_is_part_of_the_model_file() -> None:
    conversion = Conversion(8, 1, "pad", (29_490.0, 29_750.5), "alpha", 10**9)
    preprocessing = Preprocessing.of(conversion, [0.1], [0.2])
    run_dir, _ = saved(preprocessing=preprocessing.to_dict())
    assert run.load_model(run_dir.model_path).preprocessing == preprocessing
    assert preprocessing.conversion == conversion
    # Model files of 8-bit sets are those of earlier versions.
    ordinary = Preprocessing.of(Conversion(8, 1, "crop"), [0.1], [0.2])
    assert ordinary.to_dict() == model_metadata()["preprocessing"]


def test_runs_that_crop_are_found_by_the_digest_of_earlier_versions() -> None:
    """The default of `data.fit` was `crop`, and defaults are left out of digests."""
    for fit, is_found in (("crop", True), ("pad", False)):
        run_dir = RunDir(Path("models") / fit)
        run_dir.create(tiny(f"data.fit={fit}"), {"digests": [ONE]})
        assert run_dir.has_digest(TWO, ONE) is is_found
        assert run_dir.has_digest(ONE)
        assert not run_dir.has_digest(TWO)
    recipe_file = Path("models/crop/recipe.yaml")
    found = run.find_or_create_run_dir(
        "crop",
        TWO,
        plain_name=True,
        fresh=False,
        is_run_of=lambda each: each.has_digest(TWO, ONE),
    )
    assert found.name == "crop"
    recipe_file.write_text("data: {fit: crop}\nunknown: 1\n")
    assert not RunDir(Path("models/crop")).has_digest(TWO, ONE)


def test_the_recipe_of_a_run_of_an_earlier_version_is_accepted() -> None:
    run_dir = RunDir(Path("models/old"))
    run_dir.create(tiny("data.fit=crop"), {"digests": [tiny().digest()]})
    assert run_dir.recipe().data.fit == "crop"
    run_dir.create(tiny("data.fit=pad"), {"digests": [tiny().digest()]})
    with pytest.raises(ModelFileError, match="was changed"):
        run_dir.recipe()


# Finding runs


def test_a_run_is_found_by_name_folder_or_file() -> None:
    run_dir, _ = saved("first")
    create_run(RunDir(Path("models/second")), ONE)  # no model yet
    for name in (
        "first",
        "models/first",
        run_dir.path,
        run_dir.model_path,
        run_dir.path.absolute(),
    ):
        found_run = run.find_run(name)
        assert found_run.model_path.samefile(run_dir.model_path)
        assert found_run.name == "first"
    assert run.find_run("second").name == "second"
    Path("elsewhere").mkdir()
    lone = Path("elsewhere/copy.safetensors")
    lone.write_bytes(run_dir.model_path.read_bytes())
    found_run = run.find_run(lone)
    assert (found_run.name, found_run.model_path) == ("copy", lone)
    assert run.load_model(found_run.model_path).classes == ("a", "b", "ö")


def test_runs_are_listed_by_name() -> None:
    assert run.list_runs() == []
    for name in ("b", "a", "c"):
        create_run(RunDir(Path("models") / name), ONE)
    Path("models/not-a-run").mkdir()
    Path("models/file").write_text("")
    assert [found_run.name for found_run in run.list_runs()] == ["a", "b", "c"]


def test_a_missing_name_is_a_usage_error_and_a_missing_path_a_model_file_error() -> None:
    create_run(RunDir(Path("models/flowers")), ONE)
    with pytest.raises(UsageError, match="no run called 'flower'") as caught:
        run.find_run("flower")
    assert caught.value.fix == "did you mean flowers?"
    with pytest.raises(UsageError, match="runs here: flowers"):
        run.find_run("zzz")
    for path in ("models/zzz", "zzz.safetensors", "zzz.pt", "a\\b"):
        with pytest.raises(ModelFileError, match="no such run or model file"):
            run.find_run(path)


def test_results_are_plain_json() -> None:
    run_dir = RunDir(Path("models/x"))
    run_dir.add_result({"split": "test", "accuracy": 0.5, "name": "ö"})
    assert "ö" in (run_dir.path / "results.json").read_text("utf-8")
    assert json.loads((run_dir.path / "results.json").read_text("utf-8"))[0]["accuracy"] == 0.5


def test_concurrent_evaluations_are_all_counted() -> None:
    """Each process rewrites the log, so that without a lock entries would be lost."""
    code = """
import sys, time
from pathlib import Path
from convlens.run import RunDir
print("ready", flush=True)
while not Path("go").exists():
    time.sleep(0.001)
run_dir = RunDir(Path("models/busy"))
for _ in range(15):
    run_dir.add_result({"split": "test", "data_fingerprint": "f", "by": sys.argv[1]})
"""
    writers = [Forked(code, str(n)) for n in range(3)]
    for writer in writers:
        wait_until(lambda writer=writer: "ready" in writer.log.read_text(), writer)
    Path("go").touch()
    for writer in writers:
        printed, _ = writer.communicate()
        assert writer.returncode == 0, printed
    log = RunDir(Path("models/busy")).evaluation_log()
    assert [entry["looks"] for entry in log] == list(range(1, 46))
    assert {entry["by"] for entry in log} == {"0", "1", "2"}
