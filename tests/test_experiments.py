"""The report's scripts as a user runs them: trained once, inference when run again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from commands import environment, picture

SCRIPTS = Path(__file__).parent.parent / "experiments"
FEW = (
    "data.name=digits", "data.per_class=4", "data.image_size=16", "data.val_fraction=0.1",
    "train.epochs=1", "train.batch_size=20",
)  # fmt: skip


def run(script: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *FEW, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_script_trains_once_and_then_does_inference(tmp_path: Path) -> None:
    first = run("resnet_tiny.py")
    assert "the report: 45 to 50%" in first
    (folder,) = Path("models").iterdir()
    assert folder.name.startswith("resnet18-tiny-")
    assert (Path("plots") / folder.name / "curves.png").exists()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    again = run("resnet_tiny.py", picture(tmp_path / "one.png", (200,)))
    assert "trained already" in again
    assert "one.png: " in again
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_the_four_settings_are_one_script() -> None:
    from convlens import train

    train("pretrain", [*FEW, "model.stem=imagenet"], name="backbone", test=False, quiet=True)
    said = run("resnet_18_pre.py", "model.weights=backbone")
    for setting, reported in (("last4-adam", "78.29%"), ("last5-sgd-cosine", "81.6%")):
        assert any(line.startswith(setting) and reported in line for line in said.splitlines())
    assert len(list(Path("models").iterdir())) == 5


def test_the_sixth_script_shows_three_models_side_by_side() -> None:
    from convlens import train

    wanted = {
        "resnet18-pretrained-last5-adam": "resnet18",
        "resnet18-tiny-0a1b2c": "resnet18-tiny",
    }
    for name, recipe in wanted.items():
        train(recipe, FEW, name=name, test=False, quiet=True)
    script = [sys.executable, str(SCRIPTS / "visualize_resnet.py")]
    how = {"capture_output": True, "text": True, "env": environment(), "timeout": 240}
    early = subprocess.run(script, **how)
    assert early.returncode == 1
    assert early.stderr.splitlines() == [
        "not trained yet: the raw (resnet_18.py); or name runs that are"
    ]
    train("resnet18", FEW, name="resnet18", test=False, quiet=True)
    done = subprocess.run([*script, "test:3"], **how)
    assert done.returncode == 0, done.stderr
    assert "the augmented: resnet18-tiny-0a1b2c" in done.stdout
    assert "layer4.1   " in done.stdout
    (folder,) = Path("plots").glob("look-*")
    assert (folder / "test-3-activations.png").exists()
    named = subprocess.run([*script, "resnet18", "test:9999"], **how)
    assert named.returncode == 1
    assert "test:9999 isn't there" in named.stderr


@pytest.mark.parametrize("script", ["mnist.py", "mnist_reg.py", "resnet_18.py"])
def test_every_script_names_a_recipe_that_exists(script: str) -> None:
    from convlens import recipe

    text = (SCRIPTS / script).read_text("utf-8")
    assert any(f'experiment("{name}"' in text for name in recipe.names())
