"""The scripts in experiments/ train once and only do inference when they are run again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import environment, picture
from helpers.paths import REPOSITORY
from helpers.support import TINY

pytestmark = pytest.mark.figures

SCRIPTS = REPOSITORY / "experiments"
SMALL = (
    "data.name=digits",
    "data.per_class=4",
    "data.image_size=16",
    "data.val_fraction=0.05",
    "data.test_fraction=0.03",
    "train.epochs=1",
    "train.batch_size=20",
)


def run(script: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *SMALL, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_script_trains_once_and_then_only_does_inference(tmp_path: Path) -> None:
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


def test_one_script_trains_the_four_variants() -> None:
    from convlens import train

    train("pretrain", [*SMALL, "model.stem=imagenet"], name="backbone", test=False, quiet=True)
    output = run("resnet_18_pre.py", "model.weights=backbone")
    for variant, reported in (("last4-adam", "78.29%"), ("last5-sgd-cosine", "81.6%")):
        assert any(line.startswith(variant) and reported in line for line in output.splitlines())
    assert len(list(Path("models").iterdir())) == 5


def test_the_visualization_script_shows_three_models_side_by_side() -> None:
    from convlens import train

    train(TINY, name="resnet18-tiny-0a1b2c", test=False, quiet=True)
    models = Path("models")
    shutil.copytree(models / "resnet18-tiny-0a1b2c", models / "resnet18-pretrained-last5-adam")

    def look(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(SCRIPTS / "visualize_resnet.py"), *arguments]
        return subprocess.run(script, capture_output=True, text=True, env=environment())

    early = look()
    assert early.returncode == 1
    assert early.stderr == "not trained yet: the raw (resnet_18.py); or name runs that are\n"
    shutil.copytree(models / "resnet18-tiny-0a1b2c", models / "resnet18")
    done = look("test:3")
    assert done.returncode == 0, done.stderr
    assert "the augmented: resnet18-tiny-0a1b2c" in done.stdout
    assert "stage2     " in done.stdout
    (folder,) = Path("plots").glob("look-*")
    assert (folder / "test-3-activations.png").exists()


@pytest.mark.parametrize("script", ["mnist.py", "mnist_reg.py", "resnet_18.py"])
def test_every_script_names_a_recipe_that_exists(script: str) -> None:
    from convlens import recipe

    text = (SCRIPTS / script).read_text("utf-8")
    assert any(f'experiment("{name}"' in text for name in recipe.recipe_names())
