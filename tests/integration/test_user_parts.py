"""Parts of users in every command: refused without consent, otherwise as those of convlens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import convlens
from convlens import serialization, user_code
from convlens.errors import UsageError
from convlens.explore.jobs import started_jobs
from convlens.explore.workspace import Workspace
from convlens.run import RunDir
from convlens.training import resolve
from convlens.user_code import UntrustedCode
from helpers.commands import here, refused
from helpers.support import same, working_in
from helpers.user_parts import PARTS, TRACE, forget_imports, write_parts

TINY = ("data.per_class=8", "train.epochs=2", "train.memory_format=contiguous")
NET = "./parts.py:Net"
ALL = (
    f"model.name={NET}",
    "model.width=4",
    "optim.loss=./parts.py:scaled_cross_entropy",
    "optim.loss_options={scale: 0.5}",
    "optim.name=./parts.py:SignDescent",
    "optim.options={beta: 0.5}",
    "optim.lr=0.003",
    "augment=[{./parts.py:darken: {most: 0.2}}, ./parts.py:swap_halves]",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the file of the parts and a run that was trained with all of them."""
    root = tmp_path_factory.mktemp("user_parts")
    with working_in(root):
        write_parts()
        done = here("train", "digits", *TINY, *ALL, "--name", "own")
        assert done.code == 0, done.err
        done = here("train", "digits", *TINY, "model.widths=[4]", "--name", "plain")
        assert done.code == 0, done.err
        yield root


@pytest.fixture
def in_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    forget_imports()
    return trained


# Consent

COMMANDS: dict[str, tuple[str, ...]] = {
    "evaluate": ("evaluate", "own", "--split", "val"),
    "predict": ("predict", "own", "image.png"),
    "look": ("look", "own", "val:1"),
    "compare": ("compare", "own", "plain", "--split", "val"),
    "report": ("report", "own"),
    "diagnose": ("diagnose", "own"),
    "export": ("export", "own", "--to", "torch"),
    "labels": ("labels", "own", "--folds", "2"),
    "serve": ("serve", "own", "--port", "0"),
    "model file": ("evaluate", "models/own/model.safetensors", "--split", "val"),
    "recipe file": ("train", "models/own/recipe.yaml", "--name", "again"),
    "augment": ("augment", "models/own/recipe.yaml", "digits"),
    "changed recipe file": ("train", "models/own/recipe.yaml", "train.epochs=3"),
}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_no_command_imports_user_code_by_itself(name: str, in_folder: Path) -> None:
    done = here(*COMMANDS[name])
    refused(done, 4, "needs user code, ./parts.py:", "--trust-code")
    assert not TRACE.exists()
    assert not Path("models/again").exists()


@pytest.mark.parametrize("name", ["evaluate", "look", "compare", "diagnose"])
def test_commands_accept_user_code_that_is_trusted(name: str, in_folder: Path) -> None:
    done = here(*COMMANDS[name], "--trust-code")
    assert done.code == 0, done.err
    assert TRACE.exists()
    assert user_code.trusted() is False  # the consent ended with the command


def test_functions_of_the_python_api_need_consent(in_folder: Path) -> None:
    images = torch.zeros(1, 8, 8, dtype=torch.uint8)
    for call in (
        lambda: convlens.predict("own", images),
        lambda: convlens.evaluate("own", "val"),
        lambda: convlens.Run.load("own").module,
        lambda: convlens.Run.load("own").open(),
        lambda: convlens.compare("own", "plain", split="val"),
        lambda: convlens.train("models/own/recipe.yaml", name="again", quiet=True),
    ):
        with pytest.raises(UntrustedCode):
            call()
    assert not TRACE.exists()
    assert len(convlens.predict("own", images, trust_code=True)) == 1
    run = convlens.Run.load("own", trust_code=True)
    assert run.evaluate("val").n == 270
    assert convlens.evaluate(run, "val").n == 270
    assert convlens.evaluate(run=run, split="val").n == 270
    assert run.predict(images)[0].label in run.classes
    assert type(run.module).__name__ == "Net"
    with pytest.raises(UntrustedCode):
        convlens.predict("own", images)


def test_the_page_opens_user_networks_only_if_it_was_started_with_consent(
    in_folder: Path,
) -> None:
    for is_trusted in (False, True):
        with user_code.trust(is_trusted), started_jobs() as jobs:
            workspace = Workspace(["own"], jobs, "cpu")
            opening = jobs.quick.submit(lambda job, w=workspace: w.open("own")).future
            if is_trusted:
                assert opening.result(60).subject.name == "own"
            else:
                with pytest.raises(UntrustedCode):
                    opening.result(60)


def test_what_is_named_in_the_call_is_trusted() -> None:
    Path("parts.py").write_text(PARTS)
    Path("mine.yaml").write_text(f"model: {{name: {NET}}}")
    recipe = resolve.resolve_recipe("mine.yaml").recipe
    assert list(recipe.code) == [NET]
    assert resolve.named_code([recipe], ["model.width=3", "train.epochs=2"]) == frozenset()
    assert resolve.named_code([recipe], [f"model.name={NET}"]) == {NET}
    assert resolve.named_code([recipe], [f'model.name="{NET}"']) == {NET}
    assert resolve.named_code([recipe], [{"model": {"name": NET}}]) == {NET}
    assert resolve.named_code([recipe], [f"model.name=x{NET}"]) == frozenset()
    assert resolve.named_code([recipe], [f"model.name={NET}2"]) == frozenset()
    assert resolve.named_code([recipe], [recipe]) == frozenset()  # as read from the file


# Training


def test_a_run_records_its_sources(in_folder: Path) -> None:
    sha256 = hashlib.sha256(Path("parts.py").read_bytes()).hexdigest()
    (copy,) = Path("models/own/code").iterdir()
    assert copy.read_bytes() == Path("parts.py").read_bytes()
    assert copy.name == f"{sha256[:12]}-parts.py"
    recipe = RunDir(Path("models/own")).recipe()
    assert set(recipe.code.values()) == {sha256}
    names = ("Net", "scaled_cross_entropy", "SignDescent", "darken", "swap_halves")
    assert sorted(recipe.code) == sorted(f"./parts.py:{name}" for name in names)
    metadata = serialization.read_model_file(Path("models/own/model.safetensors"))[1]
    assert metadata["recipe"]["code"] == recipe.code


def test_the_same_command_finds_the_run_and_a_changed_source_is_another_one(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_parts()
    arguments = ("train", "digits", *TINY, f"model.name={NET}", "--no-test")
    first = here(*arguments).err
    assert "has changed" not in first
    assert "is already trained" in here(*arguments).err
    (old,) = Path("models").iterdir()
    write_parts(text=f"{PARTS}\n# another line\n")
    changed = here(*arguments).err
    assert f"./parts.py:Net has changed since run {old.name} " in changed
    assert "is already trained" not in changed
    assert len(list(Path("models").iterdir())) == 2
    # The old run still has its network.
    done = here("evaluate", old, "--split", "val", "--trust-code")
    assert done.code == 0, done.err
    assert "its copy" in done.err


def test_a_stopped_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the state of a user's optimizer is part of a checkpoint."""
    write_parts()
    results = {}
    for name, epochs in (("whole", [4]), ("parts", [2, 4])):
        for count in epochs:
            values = [*TINY, *ALL, f"train.epochs={count}", "train.keep=last"]
            values += ["optim.schedule=constant", "optim.ema=null"]
            options = {"name": f"{name}{count}", "test": False, "quiet": True}
            run = convlens.train("digits", values, extend=count != epochs[0], **options)
        results[name] = run.module.state_dict()
    same(dict(results["whole"]), dict(results["parts"]))


def test_the_first_stages_of_a_user_network_can_be_frozen() -> None:
    write_parts()
    states = []
    for count in (1, 3):
        values = [*TINY, f"model.name={NET}", "model.trainable=conv2+", f"train.epochs={count}"]
        run = convlens.train("digits", values, name=f"frozen{count}", test=False, quiet=True)
        states.append(run.module.state_dict())
    equal = {name for name in states[0] if torch.equal(states[0][name], states[1][name])}
    assert equal == {name for name in states[0] if name.startswith(("conv1.", "norm."))}


def test_the_scikit_learn_estimator_takes_a_user_network() -> None:
    write_parts()
    images = torch.randint(0, 256, (24, 8, 8), dtype=torch.uint8).numpy()
    labels = [index % 2 for index in range(24)]
    classifier = convlens.ImageClassifier(
        "digits", epochs=1, overrides={"model.name": NET, "train.batch_size": 8}
    )
    assert len(classifier.fit(images, labels).predict(images)) == 24


# Bad parts


@pytest.mark.parametrize(
    ("values", "text", "message"),
    [
        ([f"model.name={NET}"], "1 / 0", "cannot be imported: ZeroDivisionError"),
        (["model.name=./none.py:Net"], "", "cannot be read"),
        (["optim.loss=./parts.py:loss"], "def loss(a, b):\n    return a", "not one number"),
        (
            ["optim.loss=./parts.py:loss"],
            "def loss(a, b):\n    return a.sum() / 0",
            "returned (inf|-inf|nan)",
        ),
        (["optim.loss=./parts.py:loss"], "def loss(a):\n    return a.sum()", "TypeError"),
        (
            ["optim.loss=./parts.py:loss", "augment=[{MixUp: {}}]"],
            "def loss(a, b):\n    return -a.log_softmax(1).gather(1, b[:, None]).mean()",
            "does not accept class probabilities",
        ),
        (
            ["optim.name=./parts.py:Nothing"],
            "import torch\nclass Nothing(torch.optim.Optimizer):\n"
            "    def __init__(self, params, lr):\n        super().__init__(params, {'lr': lr})\n"
            "    def step(self):\n        pass",
            "leave the weights as they are",
        ),
        (
            ["optim.name=./parts.py:Counting"],
            "import torch\nclass Counting(torch.optim.SGD):\n"
            "    def step(self, closure=None):\n"
            "        super().step()\n"
            "        for group in self.param_groups:\n"
            "            for p in group['params']:\n"
            "                self.state[p]['steps'] = 1",
            "its state 'steps' is of the type 'int'",
        ),
        (["optim.name=adam", "optim.options={beta: 1}"], "", "only to optimizers of your own"),
        (
            ["augment=[./parts.py:op]"],
            "def op(images, generator):\n    return images * 3",
            "values from",
        ),
        (
            ["augment=[./parts.py:op]"],
            "def op(images, generator):\n    return images[:1]",
            r"returned torch.float32 \[1,",
        ),
        (
            ["augment=[{./parts.py:op: {size: 2}}]"],
            "def op(images, generator):\n    return images",
            "unknown argument 'size'",
        ),
    ],
)
def test_bad_parts_are_refused_before_images_are_read(
    values: list[str], text: str, message: str
) -> None:
    Path("parts.py").write_text(text)
    recipe = resolve.resolve_recipe("digits", overrides=[]).recipe
    assert recipe.code == {}
    with user_code.trust(True), pytest.raises(UsageError, match=message):
        resolve.validate_recipe(resolve.resolve_recipe("digits", overrides=values).recipe)


def test_a_loss_that_is_no_mean_over_rows_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("parts.py").write_text("def loss(a, b):\n    return a.log_softmax(1).pow(2).sum()")
    recipe: Any = resolve.resolve_recipe("digits", overrides=["optim.loss=./parts.py:loss"]).recipe
    with user_code.trust(True):
        resolve.validate_recipe(recipe)
    assert "is not a mean over the rows" in capsys.readouterr().err
