"""Killed trainings end with the same bits: one here, fifty in `make chaos`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from commands import command
from convlens import chaos, files, modelfile
from convlens.run import RunFolder
from support import begin, tiny
from test_resume import finish


def test_a_killed_training_ends_with_the_same_bits() -> None:
    done = command("selftest", "--chaos", "1", "--json")
    assert done.code == 0, done.err
    assert done.json["same"] == done.json["kills"] == 1
    assert "1/1 ended with the same bits" in done.err


@pytest.mark.slow
def test_of_two_processes_one_is_killed() -> None:
    score = chaos.chaos(1, processes=2)
    assert score.same == len(score.kills) == 1, score.to_dict()


def test_differences_are_found() -> None:
    """A comparison that sees nothing would find all equal."""
    one, other = finish(tiny(), "one"), finish(tiny(), "other")
    assert chaos.differences(one, other) == []
    for name, change, said in (
        ("model.safetensors", _nudged, "the model: 1 of"),
        (f"state/{_state(other)}", _nudged, "the state: 1 of"),
        ("metrics.csv", _other_metrics, "metrics.csv"),
        ("run.json", lambda path: RunFolder(path.parent).note({"kept_epoch": 9}),
         "run.json: kept_epoch"),
        ("recipe.yaml", lambda path: path.write_text(path.read_text() + "\n"), "recipe.yaml"),
    ):  # fmt: skip
        copy = RunFolder(Path("copy") / "other")
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree(other.path, copy.path)
        change(copy.path / name)
        (found,) = chaos.differences(one, copy)
        assert found.startswith(said)


def _state(place: RunFolder) -> str:
    return next((place.path / "state").glob("*.safetensors")).name


def _other_metrics(path: Path) -> None:
    """Another loss in one row, with the hash that a finished run keeps of the file."""
    place = RunFolder(path.parent)
    rows = place.metrics()
    place.write_metrics([{**rows[0], "val_loss": 9.0}, *rows[1:]])
    place.note({"metrics_sha256": files.sha256(path)})


def _nudged(path: Path) -> None:
    """The file with the last bit of one weight changed, and a right hash over it."""
    tensors, card = modelfile.read(path)
    name = next(n for n, t in tensors.items() if t.ndim > 1 and t.is_floating_point())
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(9.0))
    place = {k: v for k, v in card.items() if k not in ("sha256", "format")}
    digest = modelfile.write(path, tensors, place)
    manifest = path.parent / "manifest.json"
    if manifest.exists():
        content = json.loads(manifest.read_text())
        content["generations"][0]["sha256"] = digest
        manifest.write_text(json.dumps(content))


def test_the_recipe_has_everything_on() -> None:
    setup, _ = begin(chaos.load(chaos.RECIPE), "x")
    assert setup.averager is not None
    assert setup.recipe.train.patience
    assert any(isinstance(m, torch.nn.Dropout) for m in setup.trained.modules())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in setup.trained.modules())
    assert any(name == "MixUp" for name, _ in setup.recipe.operations)
