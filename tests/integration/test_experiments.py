"""The scripts in experiments/ train once and only do inference when they are run again."""

from __future__ import annotations

import contextlib
import io
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convlens.data.download import DownloadError
from helpers.commands import Done, environment, picture, refused
from helpers.paths import REPOSITORY
from helpers.support import TINY

pytestmark = [pytest.mark.figures, pytest.mark.usefixtures("figures_of_one_pixel")]

SCRIPTS = REPOSITORY / "experiments"
SMALL = (
    "data.name=digits",
    "data.per_class=4",
    "data.image_size=16",
    "data.val_fraction=0.05",
    "data.test_fraction=0.03",
    "train.epochs=1",
    "train.batch_size=20",
    "train.precision=fp32",
    "train.memory_format=contiguous",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run `resnet_tiny.py` in a new process; return its folder and its output."""
    folder = tmp_path_factory.mktemp("trained")
    variables = environment(CONVLENS_CACHE=str(folder / "cache"))
    variables.pop("CONVLENS_FIGURES", None)
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "resnet_tiny.py"), *SMALL],
        cwd=folder,
        capture_output=True,
        text=True,
        env=variables,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def run(script: str, *arguments: str | Path) -> str:
    """Run a script in this process, which has imported torch already; return its output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        run_quietly(script, *arguments)
    return output.getvalue()


def run_quietly(script: str, *arguments: str | Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        patch.delitem(sys.modules, "common", raising=False)
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def failed(script: str, *arguments: str | Path) -> Done:
    """Run a script that fails in this process."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        run_quietly(script, *arguments)
    assert isinstance(end.value.code, int)
    return Done(end.value.code, "", errors.getvalue())


@pytest.mark.parametrize(
    "script", ["mnist.py", "mnist_reg.py", "resnet_18.py", "resnet_18_pre.py", "resnet_tiny.py"]
)
def test_mistakes_are_reported_as_by_the_command_line(script: str) -> None:
    refused(failed(script, "train.epoch=3"), 2, "did you mean train.epochs")
    refused(failed(script, "--epochs", "3"), 2, "no such option: --epochs", "[KEY=VALUE ...]")
    code, what = (2, "is not an override") if "pre" in script else (3, "no such file: gone.png")
    refused(failed(script, *SMALL, "gone.png"), code, what)
    assert not Path("models").exists()


def test_failed_download_of_weights_leaves_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(url: str, *_: object, **__: object) -> None:
        raise DownloadError("no network")

    monkeypatch.setattr("convlens.training.pretrained.fetch", fetch)
    refused(failed("resnet_18_pre.py", *SMALL), 4, "weights cannot be downloaded", "no network")
    assert not Path("models").exists()


def test_unreadable_image_has_the_exit_code_of_predict(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(trained[0] / "models", "models")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    good = picture(tmp_path / "good.png", (200,))
    done = failed("resnet_tiny.py", *SMALL, tmp_path / "broken.png", good)
    refused(done, 3, "1 of 2 files could not be read")


def test_the_demo_reports_errors_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("models").write_text("a file where the folder should be")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "examples" / "demo.py"), run_name="__main__")
    assert end.value.code == 5


def test_a_script_trains_once_and_then_only_does_inference(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    assert "the report: 45 to 50%" in trained[1]
    shutil.copytree(trained[0] / "models", "models")
    shutil.copytree(trained[0] / "plots", "plots")
    (folder,) = Path("models").iterdir()
    assert folder.name.startswith("resnet18-tiny-")
    assert (Path("plots") / folder.name / "curves.png").exists()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    again = run("resnet_tiny.py", *SMALL, picture(tmp_path / "one.png", (200,)))
    assert "already trained" in again
    assert "one.png: " in again
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_one_script_trains_the_four_variants() -> None:
    from convlens import train

    train("pretrain", [*SMALL, "model.stem=imagenet"], name="backbone", test=False, quiet=True)
    output = run("resnet_18_pre.py", *SMALL, "model.weights=backbone")
    for variant, reported in (("last4-adam", "78.29%"), ("last5-sgd-cosine", "81.6%")):
        assert any(line.startswith(variant) and reported in line for line in output.splitlines())
    assert len(list(Path("models").iterdir())) == 5


def test_the_visualization_script_shows_three_models_side_by_side() -> None:
    from convlens import train

    train(TINY, name="resnet18-tiny-0a1b2c", test=False, quiet=True)
    models = Path("models")
    shutil.copytree(models / "resnet18-tiny-0a1b2c", models / "resnet18-pretrained-last5-adam")

    done = failed("visualize_resnet.py", "resnet18-nope")
    refused(done, 2, "not trained yet: the raw (resnet_18.py)", "resnet18-nope: not a run")
    shutil.copytree(models / "resnet18-tiny-0a1b2c", models / "resnet18")
    output = run("visualize_resnet.py", "test:3")
    assert "the augmented: resnet18-tiny-0a1b2c" in output
    assert "stage2     " in output
    (folder,) = Path("plots").glob("look-*")
    assert (folder / "test-3-activations.png").exists()


@pytest.mark.parametrize("script", ["mnist.py", "mnist_reg.py", "resnet_18.py"])
def test_every_script_names_a_recipe_that_exists(script: str) -> None:
    from convlens import recipe

    text = (SCRIPTS / script).read_text("utf-8")
    assert any(f'experiment("{name}"' in text for name in recipe.recipe_names())
