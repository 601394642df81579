"""Exported files reproduce the outputs of convlens, and wrong exports are not written."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import convlens
from convlens import model_export, models
from convlens.data.dataset import load_data, load_external_data
from convlens.data.decode import decode
from convlens.errors import UsageError
from convlens.model_export import FORMATS, MAX_IMAGES, ReferenceOutputs
from convlens.recipe import load_recipe
from convlens.run import LoadedModel, Preprocessing, RunDir, load_model
from convlens.uncertainty.calibration import ModelCalibration, OutlierDetector, ReservedOutputs
from helpers.commands import (
    DIGITS,
    command,
    environment,
    here,
    refused,
)
from helpers.paths import TESTS

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Export a run on `digits` to all formats; return its folder, the JSON and the messages."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert here("train", *DIGITS, "--no-test", "--name", "small").code == 0
        done = here("export", "small", "--to", "onnx,torch", "--json")
        assert done.code == 0, done.err
        return folder / "models" / "small", done.json, done.err


@pytest.fixture
def small(made: tuple[Path, dict[str, Any], str]) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(made[0], Path("models") / "small"))


def validation(run: Path) -> Tensor:
    """Return the run's validation images, uint8."""
    recipe = load_recipe(load_model(run / "model.safetensors").model_metadata["recipe"])
    split = load_data(recipe.data, memory_budget=1 << 30).val
    return split.rows.gather(torch.arange(len(split)))


def by_hand(run: Path, images: Tensor) -> np.ndarray:
    """Return logits of a run's network, computed in double precision."""
    loaded = load_model(run / "model.safetensors")
    pre = loaded.preprocessing
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (pre.mean, pre.std)
    )
    with torch.no_grad():
        return loaded.model.double()((images.double() / 255 - mean) / std).numpy()


def session(path: Path) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def metadata_of(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


# The command


def test_command_reports_the_numerical_check(made: tuple[Path, dict[str, Any], str]) -> None:
    run, result, messages = made
    assert [each["format"] for each in result["exports"]] == ["onnx", "torch"]
    model_sha256 = load_model(run / "model.safetensors").model_metadata["sha256"]
    count = len(validation(run))
    for each in result["exports"]:
        path = run / Path(each["path"]).name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == each["sha256"]
        assert path.stat().st_size == each["bytes"]
        assert each["source_sha256"] == model_sha256
        assert each["classes"] == list("0123456789")
        proof = each["proof"]
        assert proof["source"] == "validation images of 'digits'"
        assert proof["images"] == min(count, MAX_IMAGES)
        assert proof["batch_sizes"] == [1, 64]
        assert proof["top1_agreement"] == 1.0
        assert proof["max_logit_difference"] <= 1e-4
        assert proof["max_probability_difference"] <= 1e-5
        assert each["versions"]["torch"] == torch.__version__
    assert messages.count("written and checked") == 2
    assert sorted(path.name for path in run.glob("*model.*")) == [
        "model.onnx",
        "model.pt2",
        "model.safetensors",
    ]


def test_onnxruntime_computes_the_outputs_of_the_network(
    made: tuple[Path, dict[str, Any], str],
) -> None:
    run, result, _ = made
    images = validation(run)
    expected = by_hand(run, images)
    logits, probs = session(run / "model.onnx").run(None, {"images": images.numpy()})
    # The reported largest difference is about that from exact arithmetic.
    assert np.abs(logits - expected).max() < 1e-4
    assert (logits.argmax(1) == expected.argmax(1)).all()
    share = np.exp(expected - expected.max(1, keepdims=True))
    np.testing.assert_allclose(probs, share / share.sum(1, keepdims=True), atol=1e-5)
    assert result["exports"][0]["outputs"].startswith("logits and probabilities")


def test_exported_files_run_without_convlens(made: tuple[Path, dict[str, Any], str]) -> None:
    run = made[0]
    code = """
import json, sys, torch, onnxruntime
extra = {"convlens.json": ""}
program = torch.export.load(sys.argv[1] + "/model.pt2", extra_files=extra).module()
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
images = torch.arange(3 * 64).remainder(256).to(torch.uint8).view(3, 1, 8, 8)
ours = program(images)["logits"]
theirs = session.run(["logits"], {"images": images.numpy()})[0]
facts = session.get_modelmeta().custom_metadata_map
print(json.dumps([
    float((ours - torch.from_numpy(theirs)).abs().max()), json.loads(extra["convlens.json"]),
    facts, [name for name in sys.modules if name.startswith("convlens")],
]))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(run)],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    apart, of_torch, of_onnx, ours = json.loads(done.stdout)
    assert apart < 1e-5
    assert ours == []
    for facts in (of_torch, {key: _plain(value) for key, value in of_onnx.items()}):
        assert facts["classes"] == list("0123456789")
        assert facts["run"] == "small"
        assert facts["convlens"] == convlens.__version__
        assert facts["preprocessing"]["image_size"] == 8
        assert facts["preprocessing"]["channels"] == 1
        assert facts["input"].startswith("images: uint8 [N, 1, 8, 8], 0 to 255, any N. Each image:")
        assert facts["proof"]["source"] == "validation images of 'digits'"
        assert facts["proof"]["tolerance"] < 1e-2


def test_the_conversion_of_images_is_described(small: Path) -> None:
    loaded = load_model(small / "model.safetensors")
    sensor = replace(loaded.preprocessing, value_range=(100.0, 4095.0), background="alpha")
    text = model_export._describe_decoding(sensor)
    assert "values of more than 8 bits from 100 to 4095 scaled to 0 to 255" in text
    assert "the alpha channel" in text
    assert "transparent parts white" in model_export._describe_decoding(loaded.preprocessing)


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def test_exported_files_contain_no_paths_of_this_machine(
    made: tuple[Path, dict[str, Any], str],
) -> None:
    run = made[0]
    package = str(Path(convlens.__file__).parent)
    for name in ("model.onnx", "model.pt2"):
        data = (run / name).read_bytes()
        for path in (package, str(Path(torch.__file__).parent), str(run.parent)):
            assert path.encode() not in data, name


def test_onnx_takes_any_batch_size_and_one_image_size(
    made: tuple[Path, dict[str, Any], str],
) -> None:
    net = session(made[0] / "model.onnx")
    assert net.get_inputs()[0].shape == ["N", 1, 8, 8]
    images = np.random.default_rng(0).integers(0, 256, (33, 1, 8, 8)).astype(np.uint8)
    expected = net.run(["logits"], {"images": images})[0]
    for size in (1, 2, 7):
        part = net.run(["logits"], {"images": images[:size]})[0]
        np.testing.assert_allclose(part, expected[:size], atol=1e-5)
    for wrong in (images[:, :, :7], images.repeat(3, 1), images.astype(np.float32)):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            net.run(["logits"], {"images": wrong})


@pytest.mark.slow
def test_command_prints_one_line_per_format(made: tuple[Path, dict[str, Any], str]) -> None:
    done = command("export", made[0], "--to", "onnx,torch", "-o", "a.onnx")
    refused(done, 2, "one file for several formats")
    for name in FORMATS:
        done = command("export", made[0], "--to", name, "--json")
        assert done.code == 0
        assert [each["format"] for each in done.json["exports"]] == [name]
        (line,) = done.err.splitlines()  # torch, onnxscript and onnxruntime print nothing
        assert line.startswith(f"{name}: on ")


def test_export_from_python(small: Path) -> None:
    (exported,) = convlens.export(small, to="onnx", output="out/mine.onnx")
    assert exported.path == "out/mine.onnx"
    assert exported.proof.max_logit_difference <= exported.proof.tolerance
    assert sorted(path.name for path in Path("out").iterdir()) == ["mine.onnx", "predict_onnx.py"]
    script = Path("out/predict_onnx.py")
    script.write_text("print()")  # of the user
    with pytest.raises(UsageError, match="not written"):
        convlens.export(small, to="onnx", output="out/other.onnx")
    assert script.read_text() == "print()"


# Predicting and evaluating with the file


def photographs() -> list[Path]:
    """Write image files of many kinds: turned by EXIF, not square, with alpha, gray, 16 bits."""
    random = np.random.default_rng(1)
    digits = random.integers(0, 256, (40, 9, 13)).astype(np.uint8)
    paths = []
    for i, pixels in enumerate(digits):
        paths.append(Path(f"in/{i:02}.png"))
        paths[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(paths[-1])
    turned = Image.fromarray(random.integers(0, 256, (20, 30, 3)).astype(np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save("in/turned.jpg", exif=exif)
    turned.convert("RGBA").save("in/alpha.png")
    Image.fromarray(random.integers(0, 65536, (9, 9)).astype(np.uint16)).save("in/deep.png")
    return [*paths, Path("in/turned.jpg"), Path("in/alpha.png"), Path("in/deep.png")]


def close(first: Any, second: Any) -> None:
    """Assert equality, of floats within 1e-5."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            close(value, second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            close(one, other)
    elif isinstance(first, float):
        assert first == pytest.approx(second, abs=1e-5)
    else:
        assert first == second


def _without_unlike(predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if not key.startswith("unlike")}
        for entry in predictions
    ]


def test_predict_with_the_onnx_file_equals_predict_with_the_run(small: Path) -> None:
    photographs()
    Path("in/broken.png").write_bytes(b"GIF89a, cut short")
    arguments = ["in", "--top", "3", "--tta", "flip+shifts", "--json"]
    ours, theirs = (here("predict", what, *arguments) for what in (small, small / "model.onnx"))
    assert ours.code == theirs.code == 3  # one file can't be read
    assert len(ours.json["predictions"]) == 44
    # Only the run has features: the scores of unknown images differ.
    for entry in (*ours.json["predictions"], *theirs.json["predictions"]):
        assert ("error" in entry) != ("unlike" in entry)
    close(*(_without_unlike(done.json["predictions"]) for done in (ours, theirs)))
    for style in ("csv", "table"):
        lines = [
            here("predict", what, "in/00.png", "in/broken.png", "--format", style).out.splitlines()
            for what in (small, small / "model.onnx")
        ]
        assert [line[:16] for line in lines[0]] == [line[:16] for line in lines[1]]
    images = np.random.default_rng(2).integers(0, 256, (300, 8, 8)).astype(np.uint8)
    one, other = (convlens.predict(what, images) for what in (small, small / "model.onnx"))
    assert [each.label for each in one] == [each.label for each in other]
    assert convlens.Run.load(small / "model.onnx").classes == tuple("0123456789")


def test_the_onnx_file_takes_pixels_as_decoded(small: Path) -> None:
    # As a program without convlens would do it.
    paths = photographs()
    pre = load_model(small / "model.safetensors").preprocessing
    images = np.stack([decode(path, size=8, channels=1, fit=pre.fit) for path in paths])
    probs = session(small / "model.onnx").run(["probabilities"], {"images": images})[0]
    for path, row in zip(convlens.predict(small, paths, top_k=10), probs, strict=True):
        top = dict(path.top)
        np.testing.assert_allclose([top[str(digit)] for digit in range(10)], row, atol=1e-5)


def test_evaluate_with_the_onnx_file_equals_evaluate_with_the_run(small: Path) -> None:
    ours = here("evaluate", small, "--json").json
    cached = {path: path.read_bytes() for path in (small / "answers").iterdir()}
    theirs = here("evaluate", small / "model.onnx", "--json").json
    # Features are not exported: the energy decides which images are unlike the training images.
    own = {"model_sha256", "images_per_second", "looks", "unlike"}
    close(
        {k: v for k, v in ours.items() if k not in own},
        {k: v for k, v in theirs.items() if k not in own},
    )
    # It counts as another evaluation of the run's test images.
    assert (ours["looks"], theirs["looks"]) == (1, 2)
    assert theirs["model_sha256"] == metadata_of(small / "model.onnx")["sha256"]
    assert {path: path.read_bytes() for path in (small / "answers").iterdir()} == cached


def test_an_onnx_file_of_an_earlier_version_still_loads() -> None:
    """`files/v1-model.onnx` is the run in `files/v1`, exported by the version that trained it."""
    old = TESTS / "files"
    run = shutil.copytree(old / "v1" / "run", Path("models") / "run")
    file = shutil.copy(old / "v1-model.onnx", run / "model.onnx")
    ours, theirs = (here("evaluate", what, "--split", "val", "--json") for what in (run, file))
    assert ours.code == theirs.code == 0, theirs.err
    assert ours.json["n"] == 270
    for key in ("n", "correct", "confusion", "classes"):
        assert ours.json.get(key) == theirs.json.get(key)
    images = np.random.default_rng(2).integers(0, 256, (30, 8, 8)).astype(np.uint8)
    first, second = (convlens.predict(what, images, top_k=10) for what in (run, file))
    for one, other in zip(first, second, strict=True):
        assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-5)


def test_commands_that_need_layers_refuse_exported_files(small: Path) -> None:
    file = small / "model.onnx"
    refused(here("predict", file, "-", "--device", "cuda"), 2, "run on the CPU")
    for words in (["look", file], ["export", file], ["compare", small, file]):
        refused(here(*words), 4, "exported ONNX file can only predict", "predict or evaluate")
    refused(here("predict", small / "model.pt2", "-"), 4, "refused", "model.pt2")
    refused(here("predict", "models/none.onnx", "-"), 4, "no such run or model file")


@pytest.mark.data
@pytest.mark.slow
def test_ten_thousand_images_get_the_same_classes() -> None:
    """All test images of MNIST, by the run, the exported file, Python, and onnxruntime alone."""
    done = here("train", "mnist-fast", "train.epochs=1", "--no-test", "--name", "m")
    assert done.code == 0, done.err
    run = Path("models/m")
    done = here("export", "m", "--to", "onnx,torch", "--json")
    assert done.code == 0, done.err
    ours, theirs = (
        here("evaluate", what, "--split", "test", "--json").json
        for what in (run, run / "model.onnx")
    )
    assert (ours["n"], theirs["n"]) == (10_000, 10_000)
    assert (ours["correct"], ours["confusion"]) == (theirs["correct"], theirs["confusion"])
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    pre = load_model(run / "model.safetensors").preprocessing
    split, *_ = load_external_data(
        "mnist",
        "test",
        conversion=pre.conversion,
        memory_budget=1 << 30,
    )
    images = split.rows.gather(torch.arange(10_000))
    expected = by_hand(run, images)
    logits = session(run / "model.onnx").run(["logits"], {"images": images.numpy()})[0]
    apart = np.abs(logits - expected).max()
    assert apart < 1e-4
    first, second = np.sort(expected)[:, -1], np.sort(expected)[:, -2]
    clear = first - second > apart  # the rest are near-ties
    assert clear.sum() >= 9_990
    for labels in (
        logits.argmax(1),
        [int(each.label or -1) for each in convlens.predict(run, images.numpy())],
        [int(each.label or -1) for each in convlens.predict(run / "model.onnx", images.numpy())],
    ):
        assert (np.asarray(labels) == expected.argmax(1))[clear].all()


# Every network


SIZES = {"mnasnet0_5": 32, "mobilenet_v3_small": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32}
HEAVY = ("resnet34", "resnet50", "wrn", *SIZES)
OPTIONS: dict[str, dict[str, Any]] = {
    "wrn": {"width": 1},
    "cnn": {"widths": [4, 8], "head": "max", "dropout": 0.5, "stage_dropout": 0.2, "hidden": 8},
    "fastnet": {"widths": [4, 8, 8], "depth": 3},
}


def loaded_network(name: str, channels: int = 3, fit: str = "pad") -> LoadedModel:
    """Return a network with trained batch norm statistics, as if it came from a file."""
    torch.manual_seed(0)
    size = SIZES.get(name, 16)
    model = models.build_model(name, 5, channels, size, OPTIONS.get(name, {}))
    model.train()(torch.randn(8, channels, size, size))
    pre = Preprocessing(size, channels, fit, [0.4, 0.5, 0.3][:channels], [0.2, 0.3, 0.1][:channels])
    model_metadata = {
        "sha256": "0" * 64,
        "run": "net",
        "data": {"fingerprint": "none"},
        "recipe": {},
    }
    return LoadedModel(model.eval(), tuple("abcde"), pre, model_metadata)


def reference_outputs(loaded: LoadedModel, count: int = 40) -> ReferenceOutputs:
    pre = loaded.preprocessing
    shape = (count, pre.channels, pre.image_size, pre.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.manual_seed(3))
    return ReferenceOutputs(loaded, images, "random images")


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else [])
        for name in [*models.MODELS, *SIZES]
    ],
)
def test_every_network_can_be_exported(network: str) -> None:
    loaded = loaded_network(network, channels=1 if network == "cnn" else 3)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    reference, program = reference_outputs(loaded), model_export.capture(loaded)
    for name, form in FORMATS.items():
        target = Path(f"net{form.suffix}")
        done = model_export.write_checked(name, program, target, loaded, reference)
        assert done.proof.max_logit_difference <= done.proof.tolerance
        assert target.stat().st_size == done.bytes
    # Capturing changed nothing in the network itself.
    after = loaded.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(module.training for module in loaded.model.modules())
    assert any(parameter.requires_grad for parameter in loaded.model.parameters())
    for node in onnx.load("net.onnx").graph.node:
        assert node.op_type not in ("Dropout",)
        assert not [a for a in node.attribute if a.name == "training_mode" and a.i]


def test_the_graph_is_calibrated_and_its_file_keeps_the_promises(small: Path) -> None:
    run_dir, temperature = RunDir(small), 3.0
    native = load_model(run_dir.model_path).calibration
    uncalibrated = by_hand(small, validation(small))
    confidences = np.linspace(0.5, 1, 80)
    reserved = ReservedOutputs(confidences, confidences, confidences > 0.6, candidates=1)
    detector = OutlierDetector(-2.0, 0.5, 1, np.ones((2, 32), np.float16))
    run_dir.add_calibration(ModelCalibration(temperature, 80, reserved, detector))
    done = here("export", "small", "--to", "onnx,torch", "--json")
    assert done.code == 0, done.err
    assert "divided by the temperature 3" in done.json["exports"][0]["outputs"]
    images = validation(small)
    logits, probs = session(small / "model.onnx").run(None, {"images": images.numpy()})
    np.testing.assert_allclose(logits, uncalibrated / temperature, atol=1e-4)
    program = torch.export.load(small / "model.pt2").module()
    np.testing.assert_allclose(program(images)["logits"].numpy(), logits, atol=1e-4)
    assert (logits.argmax(1) == uncalibrated.argmax(1)).all()
    ours, theirs = (
        convlens.predict(path, images.numpy(), top_k=10, min_accuracy=0.9, prediction_set=0.9)
        for path in (small, small / "model.onnx")
    )
    names = list("0123456789")
    for prediction, other, row in zip(ours, theirs, probs, strict=True):
        assert (prediction.label, prediction.unsure) == (other.label, other.unsure)
        assert prediction.prediction_set == other.prediction_set
        expected = dict(prediction.top)
        assert [dict(other.top)[name] for name in names] == pytest.approx(row, abs=1e-5)
        assert [expected[name] for name in names] == pytest.approx(row, abs=1e-5)
    # Without features the energy decides: of the logits divided by the temperature.
    energies = -np.log(np.exp(uncalibrated / temperature).sum(1))
    assert [each.unlike_score for each in theirs] == pytest.approx(energies + 2, abs=1e-4)
    first, second = (
        here("evaluate", path, "--split", "val", "--json").json
        for path in (small, small / "model.onnx")
    )
    for key in ("loss", "ece", "ece_uncalibrated", "temperature"):
        assert first[key] == pytest.approx(second[key], abs=1e-5), key
    assert native.reserved is not None


def test_a_model_without_a_temperature_has_the_graph_of_earlier_versions(small: Path) -> None:
    RunDir(small).add_calibration(ModelCalibration())
    assert here("export", "small", "--to", "onnx").code == 0
    operators = [node.op_type for node in onnx.load(small / "model.onnx").graph.node]
    assert operators[-2:] == ["Gemm", "Softmax"]
