"""Damaged or untrusted model files are refused; interrupted trainings resume."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as safetensors_save, save_file

from convlens import serialization
from convlens.run import RunDir, load_model
from helpers.commands import (
    DIGITS,
    brightness_model,
    here,
    picture,
    pictures,
    refused,
    start,
)
from helpers.interrupted_runs import EVERYTHING, equal
from helpers.launching import wait_until
from helpers.support import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert here("train", *DIGITS, "--no-test", "--name", "good").code == 0
    return folder / "models" / "good"


# Model files


def flip_bit(data: bytes, fraction: float) -> bytes:
    at = int(len(data) * fraction)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-200], "changed or damaged"),
        (lambda data: data[: len(data) // 8], "truncated"),  # inside the header
        (lambda data: b"", "not a model file"),
        (lambda data: flip_bit(data, 0.99), "changed or damaged"),
        (lambda data: flip_bit(data, 0.4), "damaged"),
        (lambda data: data + b"\0", "changed or damaged"),
        (lambda data: b"GIF89a" + data, "not a readable model file"),
    ],
    ids=["short", "header-cut", "empty", "tensor", "header", "longer", "foreign"],
)
def test_a_damaged_model_file_is_refused(
    trained: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    run = Path(shutil.copytree(trained, Path("models/good")))
    path = run / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    picture(Path("a.png"), (1, 2, 3))
    for arguments in (["evaluate", "good"], ["predict", "good", "a.png"], ["predict", path, "-"]):
        refused(here(*arguments), 4, message, "model.safetensors")


def fill_tensor(path: Path, name: str, value: float) -> None:
    """Fill a tensor of a model file with `value` and update the hash, as another program could."""
    tensors, model_metadata = serialization.read_model_file(path)
    tensors[name] = torch.full_like(tensors[name], value)
    text = json.dumps({**model_metadata, "sha256": serialization.NO_HASH})
    content = safetensors_save(tensors, {serialization.METADATA_KEY: text})
    digest = hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content.replace(serialization.NO_HASH.encode(), digest, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(trained: Path, value: float) -> None:
    run = Path(shutil.copytree(trained, Path("models/good")))
    fill_tensor(run / "model.safetensors", "classifier.weight", value)
    picture(Path("a.png"), (1, 2, 3))
    for arguments in (["evaluate"], ["predict", "a.png"], ["predict", "a.png", "--json"]):
        done = here(arguments[0], "good", *arguments[1:])
        refused(done, 4, "NaN or infinite", "classifier.weight", "model.safetensors", "--fresh")
        assert done.out == ""
    assert not (run / "results.json").exists()


def test_finite_weights_with_infinite_outputs_are_refused() -> None:
    run = brightness_model(Path("models/bright"))
    fill_tensor(run.model_path, "stage1.0.weight", 3e38)  # three channels of it overflow
    root = pictures(Path("set"), {"dark": 1, "light": 1})
    for arguments in (["evaluate", "bright", "--data", root], ["predict", "bright", root]):
        for tta in ([], ["--tta", "flip"]):
            done = here(*arguments, *tta)
            refused(done, 4, "outputs are not finite for 2 of 2 images")
            assert done.out == ""


class Trap:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("unpickled"),)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.safetensors"])
def test_a_pickle_is_refused_and_never_unpickled(name: str) -> None:
    picture(Path("a.png"), (1, 2, 3))
    for number, write in enumerate(
        [
            lambda p: p.write_bytes(pickle.dumps(Trap())),
            lambda p: p.write_bytes(pickle.dumps(Trap(), protocol=0)),
            lambda p: torch.save({"weights": Trap()}, p),
            lambda p: torch.save(Trap(), p, _use_new_zipfile_serialization=False),
        ]
    ):
        path = Path(f"files{number}") / name
        path.parent.mkdir()
        write(path)
        for command_name in ("evaluate", "predict"):
            refused(here(command_name, path, *["a.png"] * (command_name == "predict")), 4, name)
    assert not Path("unpickled").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert Path("unpickled").exists()  # the trap itself works


def test_safetensors_of_other_programs_are_refused() -> None:
    save_file({"weight": torch.zeros(3)}, "other.safetensors")
    refused(here("evaluate", "other.safetensors"), 4, "convlens did not write")


def test_a_run_without_a_model_file_is_an_error(trained: Path) -> None:
    run = Path(shutil.copytree(trained, Path("models/good")))
    (run / "model.safetensors").unlink()
    refused(here("evaluate", "good"), 4, "no such model file", "train it first")
    (run / "run.json").write_text("{ torn")
    refused(here("train", *DIGITS, "--name", "good"), 4, "unreadable", "run.json")


# While training


def test_a_diverging_loss_stops_training_before_the_update() -> None:
    arguments = ("train", *DIGITS, "optim.lr=1e12", "optim.schedule=constant", "--name", "hot")
    done = here(*arguments, "model.batch_norm=false")
    refused(done, 6, "NaN or infinite", "lower optim.lr", "models/hot")
    loaded = load_model(Path("models/hot/model.safetensors"))
    assert all(bool(t.isfinite().all()) for t in loaded.model.state_dict().values())
    assert RunDir(Path("models/hot")).metadata()["status"] == "training"
    refused(here(*arguments, "model.batch_norm=false"), 6, "NaN or infinite")


def test_ctrl_c_saves_and_the_same_command_resumes_to_the_same_bits() -> None:
    Path("long.yaml").write_text(tiny(*EVERYTHING, "train.epochs=30").to_text())
    arguments = ("train", "long.yaml", "--no-test", "--device", "cpu", "--name")
    run_dir = RunDir(Path("models/stopped"))
    process = start(*arguments, "stopped")
    wait_until(lambda: len(run_dir.metrics()) > 0, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command resumes the training" in err
    assert run_dir.metadata()["status"] == "training"
    assert 1 <= len(run_dir.metrics()) < 30
    load_model(run_dir.model_path)
    resumed = here(*arguments, "stopped")
    assert resumed.code == 0, resumed.err
    assert "resuming" in resumed.err
    assert here(*arguments, "uninterrupted").code == 0
    equal(run_dir, RunDir(Path("models/uninterrupted")))
