"""Exports with mistakes are found and not written, and interrupted exports keep older files."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import model_export, models
from convlens.errors import ModelFileError, ResourceError
from convlens.model_export import FORMATS, Export, ReferenceOutputs, RunModel
from convlens.run import LoadedModel, Preprocessing
from convlens.utils import files
from helpers.commands import DIGITS, here, pictures, refused
from helpers.killing import deaths

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on `digits`."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert here("train", *DIGITS, "--no-test", "--name", "small").code == 0
    return folder / "models" / "small"


@pytest.fixture
def small(made: Path) -> Path:
    return Path(shutil.copytree(made, Path("models") / "small"))


# Mistakes that an export could make


def network(classes: int = 3) -> LoadedModel:
    """Return a network for color images of 8 px with random weights and batch norm statistics."""
    torch.manual_seed(0)
    model = models.build_model("cnn", classes, 3, 8, {"widths": [6]})
    model.train()
    for _ in range(20):
        model(torch.randn(16, 3, 8, 8) * 2)
    nn.init.normal_(model.get_parameter("classifier.weight"), std=2.0)
    pre = Preprocessing(8, 3, "crop", [0.3, 0.5, 0.6], [0.2, 0.3, 0.25])
    model_metadata = {
        "sha256": "0" * 64,
        "run": "net",
        "data": {"fingerprint": "none"},
        "recipe": {},
    }
    return LoadedModel(model.eval(), tuple("abcdefgh"[:classes]), pre, model_metadata)


def reference_outputs(loaded: LoadedModel) -> ReferenceOutputs:
    images = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=torch.manual_seed(1))
    return ReferenceOutputs(loaded, images, "random images")


def export_as(mistaken: LoadedModel, right: LoadedModel, name: str) -> Export:
    """Export one network, but check it against another."""
    target = Path(f"net{FORMATS[name].suffix}")
    program = model_export.capture(mistaken)
    return model_export.write_checked(name, program, target, right, reference_outputs(right))


def changed(loaded: LoadedModel, **preprocessing: Any) -> LoadedModel:
    pre = Preprocessing(**{**vars(loaded.preprocessing), **preprocessing})
    return LoadedModel(loaded.model, loaded.classes, pre, loaded.model_metadata)


def without_normalization(loaded: LoadedModel) -> LoadedModel:
    return changed(loaded, mean=[0.0] * 3, std=[1.0] * 3)


def channels_reversed(loaded: LoadedModel) -> LoadedModel:
    pre = loaded.preprocessing
    return changed(loaded, mean=pre.mean[::-1], std=pre.std[::-1])


def scaled_twice(loaded: LoadedModel) -> LoadedModel:
    return changed(loaded, std=[value * 255 for value in loaded.preprocessing.std])


def classes_swapped(loaded: LoadedModel) -> LoadedModel:
    model = network().model
    head = model.get_submodule("classifier")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.copy_(head.weight[[1, 0, 2]])
    return LoadedModel(model, loaded.classes, loaded.preprocessing, loaded.model_metadata)


def with_batch_statistics(loaded: LoadedModel) -> LoadedModel:
    """Batch norm as in training mode, with statistics of the batch."""
    model = network().model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return LoadedModel(model, loaded.classes, loaded.preprocessing, loaded.model_metadata)


def with_another_class_count(loaded: LoadedModel) -> LoadedModel:
    return LoadedModel(
        network(4).model, loaded.classes, loaded.preprocessing, loaded.model_metadata
    )


def with_nan_outputs(loaded: LoadedModel) -> LoadedModel:
    model = network().model
    nn.init.constant_(model.get_parameter("classifier.bias"), float("nan"))
    return LoadedModel(model, loaded.classes, loaded.preprocessing, loaded.model_metadata)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (without_normalization, "Mismatched elements"),
        (channels_reversed, "Mismatched elements"),
        (scaled_twice, "Mismatched elements"),
        (classes_swapped, "Mismatched elements"),
        (with_batch_statistics, "Mismatched elements"),
        (with_another_class_count, "(shapes (68, 4), (68, 3) mismatch)"),
        (with_nan_outputs, "difference among violations: nan"),
    ],
)
def test_a_wrong_export_is_not_written(
    mistake: Callable[[LoadedModel], LoadedModel], message: str
) -> None:
    Path("net.pt2").write_text("an older export")
    right = network()
    with pytest.raises(ModelFileError, match="does not reproduce the outputs") as caught:
        export_as(mistake(right), right, "torch")
    assert message in caught.value.what
    assert [path.name for path in Path().iterdir()] == ["net.pt2"]
    assert Path("net.pt2").read_text() == "an older export"


@pytest.mark.parametrize("mistake", [without_normalization, classes_swapped])
def test_a_wrong_onnx_export_is_not_written(mistake: Callable[[LoadedModel], LoadedModel]) -> None:
    right = network()
    with pytest.raises(ModelFileError, match=r"no file was written: .* logits, Mismatched"):
        export_as(mistake(right), right, "onnx")
    assert list(Path().iterdir()) == []


def test_a_network_in_training_mode_is_exported_in_eval_mode() -> None:
    right, other = network(), network()
    other.model.train()
    export_as(other, right, "torch")
    assert other.model.training  # it stays in training mode
    assert [path.name for path in Path().iterdir()] == ["net.pt2"]


def test_probabilities_must_be_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(model_export.Exportable):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            logits = super().forward(images)["logits"]
            return {"logits": logits, "probabilities": logits.clone()}

    monkeypatch.setattr(model_export, "Exportable", Twice)
    right = network()
    with pytest.raises(ModelFileError, match=r"atol=1e-05, probabilities, Mismatched elements"):
        export_as(right, right, "torch")


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_program_with_a_fixed_batch_size_is_not_written(name: str) -> None:
    right = network()
    net = model_export.Exportable(right.model, right.preprocessing.mean, right.preprocessing.std)
    with torch.no_grad():
        fixed = torch.export.export(net, (torch.zeros(7, 3, 8, 8, dtype=torch.uint8),))
    target = Path(f"net{FORMATS[name].suffix}")
    with pytest.raises(ModelFileError):
        model_export.write_checked(name, fixed, target, right, reference_outputs(right))
    assert list(Path().iterdir()) == []


def test_the_numerical_check_agrees_with_a_computation_by_hand() -> None:
    """Logits are a tenth of the pixels, with a known error in the second class."""

    class Pixels(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, 0, 0]

    rows = torch.tensor([[2, 1], [50, 50], [70, 60], [0, 100]], dtype=torch.uint8)
    pre = Preprocessing(1, 1, "crop", [0.0], [10 / 255])
    loaded = LoadedModel(Pixels(), ("left", "right"), pre, {})
    reference = ReferenceOutputs(loaded, rows.view(4, 1, 1, 2), "rows")

    def off_by(change: float) -> RunModel:
        def run_model(images: Tensor) -> tuple[Tensor, Tensor]:
            logits = images[:, 0, 0] / 10 + torch.tensor([0, change])
            return logits, logits.softmax(1)

        return run_model

    # The largest logit is 10, so a difference of 1e-4 * 10 is allowed.
    check = reference.check(off_by(8e-4), "file")
    assert check.max_logit_difference == pytest.approx(8e-4, rel=1e-3)
    assert (check.largest_logit, check.tolerance) == (10, pytest.approx(1e-3))
    # The order of two equal logits changes in one of four images, in two of eight outputs.
    assert check.top1_agreement == 0.75
    assert "the same class for 75.00%; logits differ by at most 0.0008" in check.sentence()
    # Softmax of (5, 5) is 1/2 each; its derivative with respect to a logit there is 1/4.
    assert check.max_probability_difference == pytest.approx(2e-4, rel=1e-2)
    with pytest.raises(ModelFileError, match=r"atol=0\.001, logits, Mismatched elements: 8 / 16"):
        reference.check(off_by(11e-4), "file")


def test_a_refused_export_keeps_the_older_file(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in small.iterdir() if path.is_file()}
    wrong = torch.full((1, 1, 1, 1), 1 / 255), torch.zeros(1, 1, 1, 1)
    monkeypatch.setattr(model_export, "scale_and_shift", lambda *_: wrong)
    refused(here("export", "small", "--to", "torch,onnx"), 4, "does not reproduce the outputs")
    assert {path.name: path.read_bytes() for path in small.iterdir() if path.is_file()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_killed_export_leaves_the_old_file_or_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, target, old = network(), Path("net.pt2"), b"an older export"
    made = export_as(right, right, "torch")
    new = target.read_bytes()
    # Threads of torch do not survive a fork: the children only write precomputed bytes.
    form = FORMATS["torch"]._replace(serialize=lambda *_: new, load=lambda *_: None)
    reference = reference_outputs(right)
    monkeypatch.setitem(FORMATS, "torch", form)
    monkeypatch.setattr(reference, "check", lambda *_: made.proof)

    def prepare() -> None:
        for path in Path().iterdir():
            path.unlink()
        target.write_bytes(old)

    seen = set()
    for moment in deaths(
        lambda: model_export.write_checked("torch", None, target, right, reference), prepare
    ):
        assert target.read_bytes() in (old, new), moment
        seen.add(target.read_bytes())
    assert seen == {old, new}
    assert target.read_bytes() == new


def test_a_full_disk_keeps_the_older_export(monkeypatch: pytest.MonkeyPatch) -> None:
    right = network()
    export_as(right, right, "torch")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}

    def full(path: Path, *rest: Any) -> None:
        if path.name == "net.pt2":
            raise ResourceError("can't write: No space left on device")
        write(path, *rest)

    write = files.write_atomic
    monkeypatch.setattr(files, "write_atomic", full)
    with pytest.raises(ResourceError, match="No space left"):
        export_as(right, right, "torch")
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize("stage", ["export", "onnx"])
def test_out_of_memory_is_reported_as_such(
    stage: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes")

    if stage == "export":
        monkeypatch.setattr(torch.export, "export", none_left)
    else:
        monkeypatch.setattr(torch.onnx, "export", none_left)
    before = {path.name: path.read_bytes() for path in small.iterdir() if path.is_file()}
    refused(here("export", "small"), 5, "not enough memory", "can't allocate memory")
    assert {path.name: path.read_bytes() for path in small.iterdir() if path.is_file()} == before


def test_old_temporary_files_of_killed_exports_are_removed() -> None:
    right = network()
    for name, age in (("old_draf", 4000), ("youngest", 0)):
        path = Path(f".net.pt2.{name}.part")
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    export_as(right, right, "torch")
    assert [path.name for path in Path().glob(".*")] == [".net.pt2.youngest.part"]


def test_a_network_that_torch_cannot_capture_is_reported() -> None:
    class Strange(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))

    right = network()
    strange = LoadedModel(Strange(), right.classes, right.preprocessing, right.model_metadata)
    with pytest.raises(ModelFileError, match=r"torch.export of torch .* can't export this network"):
        model_export.capture(strange)


# Images for the check


def test_a_bare_model_file_is_checked_on_synthetic_images(small: Path) -> None:
    shutil.copy(small / "model.safetensors", "alone.safetensors")
    done = here("export", "alone.safetensors", "--to", "torch", "--json")
    assert "checked on synthetic images: a bare model file has no images" in done.err
    (only,) = done.json["exports"]
    assert (only["path"], only["proof"]["source"]) == ("alone.pt2", "synthetic images")
    assert only["proof"]["images"] == 500
    root = pictures(Path("set"), {"a": 9, "b": 9})
    done = here("export", "alone.safetensors", "--to", "torch", "--data", root, "--json")
    (only,) = done.json["exports"]
    assert (only["proof"]["source"], only["proof"]["images"]) == ("images of 'set'", 18)
    shutil.rmtree(root / "b")  # a single class is enough for the check
    done = here("export", "alone.safetensors", "--to", "torch", "--data", root, "--json")
    assert done.json["exports"][0]["proof"]["images"] == 9
    refused(here("export", "alone.safetensors", "--data", "nowhere/"), 3, "nowhere")


def test_a_run_whose_images_are_gone_is_checked_on_synthetic_images() -> None:
    root = pictures(Path("set"), {"a": 20, "b": 20})
    words = ("model.widths=[2]", "train.epochs=1", "augment=[]", "data.image_size=8")
    assert here("train", root, *words, "--no-test", "--name", "own").code == 0
    (only,) = here("export", "own", "--to", "torch", "--json").json["exports"]
    assert only["proof"]["source"] == "validation images of 'set'"
    shutil.rmtree(root)
    done = here("export", "own", "--to", "torch", "--json")
    assert "checked on synthetic images" in done.err
    assert done.json["exports"][0]["proof"]["source"] == "synthetic images"


def test_usage_errors_of_export(small: Path) -> None:
    refused(here("export", "small", "--to", "onxx"), 2, "did you mean onnx?")
    refused(here("export", "small", "--to", ""), 2, "choose from: onnx, torch")
    refused(here("export", "small", "--to", "onnx", "--to", "torch", "-o", "a.onnx"), 2, "one file")
    refused(here("export", "small", "-o", "a.pt2"), 2, "onnx files end in .onnx")
    refused(here("export", "smal"), 2, "did you mean small?")
    Path("folder.pt2").mkdir()
    refused(here("export", "small", "--to", "torch", "-o", "folder.pt2"), 5, "can't write")
    assert sorted(path.name for path in Path().iterdir()) == ["folder.pt2", "models"]
