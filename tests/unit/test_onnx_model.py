"""Wrong exports are not written, and ONNX files of others are not opened."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convlens
from convlens import model_export, models, onnx_model
from convlens.errors import ModelFileError, ResourceError
from convlens.model_export import FORMATS, Export, ReferenceOutputs, RunModel
from convlens.onnx_model import load_model_or_onnx
from convlens.run import LoadedModel, Preprocessing
from convlens.utils import files
from helpers.commands import DIGITS, here, picture, pictures, refused
from helpers.killing import deaths

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on `digits` with its ONNX file."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert here("train", *DIGITS, "--no-test", "--name", "small").code == 0
        done = here("export", "small")
        assert done.code == 0, done.err
    return folder / "models" / "small"


@pytest.fixture
def small(made: Path) -> Path:
    return Path(shutil.copytree(made, Path("models") / "small"))


# Mistakes that an export could make: all are found, and no file is written


def network(classes: int = 3) -> LoadedModel:
    """A network of random weights for colour images of 8 px, whose norms have seen images."""
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


def without_normalisation(loaded: LoadedModel) -> LoadedModel:
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


def norms_of_the_batch(loaded: LoadedModel) -> LoadedModel:
    """As batch norm in training mode: statistics of the images at hand."""
    model = network().model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return LoadedModel(model, loaded.classes, loaded.preprocessing, loaded.model_metadata)


def another_width(loaded: LoadedModel) -> LoadedModel:
    return LoadedModel(
        network(4).model, loaded.classes, loaded.preprocessing, loaded.model_metadata
    )


def no_numbers(loaded: LoadedModel) -> LoadedModel:
    model = network().model
    nn.init.constant_(model.get_parameter("classifier.bias"), float("nan"))
    return LoadedModel(model, loaded.classes, loaded.preprocessing, loaded.model_metadata)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (without_normalisation, "Mismatched elements"),
        (channels_reversed, "Mismatched elements"),
        (scaled_twice, "Mismatched elements"),
        (classes_swapped, "Mismatched elements"),
        (norms_of_the_batch, "Mismatched elements"),
        (another_width, "(shapes (68, 4), (68, 3) mismatch)"),
        (no_numbers, "difference among violations: nan"),
    ],
)
def test_a_wrong_export_is_not_written(
    mistake: Callable[[LoadedModel], LoadedModel], said: str
) -> None:
    Path("net.pt2").write_text("an older export")
    right = network()
    with pytest.raises(ModelFileError, match="does not reproduce the outputs") as caught:
        export_as(mistake(right), right, "torch")
    assert said in caught.value.what
    assert [path.name for path in Path().iterdir()] == ["net.pt2"]
    assert Path("net.pt2").read_text() == "an older export"


@pytest.mark.parametrize("mistake", [without_normalisation, classes_swapped])
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


def test_the_check_by_hand() -> None:
    """Logits are a tenth of the pixels, and those of the second class are off by a known amount."""

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
    found = reference.check(off_by(8e-4), "file")
    assert found.max_logit_difference == pytest.approx(8e-4, rel=1e-3)
    assert (found.largest_logit, found.tolerance) == (10, pytest.approx(1e-3))
    # Two equal logits change places in one of four images, which is run twice of eight times.
    assert found.top1_agreement == 0.75
    assert "the same class for 75.00%; logits differ by at most 0.0008" in found.sentence()
    # Softmax of (5, 5) is 1/2 each; its derivative with respect to a logit there is 1/4.
    assert found.max_probability_difference == pytest.approx(2e-4, rel=1e-2)
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
    # Torch's threads don't survive a fork: the copies only write what was computed before.
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
def test_out_of_memory_is_not_blamed_on_the_network(
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


# What onnxruntime 1.32 said with 50 MB left to take.
NONE_LEFT = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Cast node. "
    "Name:'node__to_copy' Status Message: /onnxruntime_src/onnxruntime/core/framework/"
    "bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::"
    "Stream*) Failed to allocate memory for requested buffer of size 134217728\n"
)


def test_an_onnx_file_runs_in_smaller_batches_when_memory_runs_out(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    real, most = onnx_model.OnnxNetwork.outputs, [3]

    class Session:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, names: list[str], given: dict[str, Any]) -> Any:
            if len(given["images"]) > most[0]:
                raise Fail(NONE_LEFT)
            return self.session.run(names, given)

    def outputs(net: onnx_model.OnnxNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(net.session, Session):
            net.session = Session(net.session)
        return real(net, images)

    asked = ("evaluate", small / "model.onnx", "--split", "val", "--json")
    whole = here(*asked)
    assert whole.code == 0, whole.err
    monkeypatch.setattr(onnx_model.OnnxNetwork, "outputs", outputs)
    parts = here(*asked)
    assert parts.code == 0, parts.err
    assert parts.json["confusion"] == whole.json["confusion"]
    most[0] = 0
    refused(here(*asked), 5, "not enough memory", "Failed to allocate memory for requested buffer")


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
    with pytest.raises(ModelFileError, match=r"torch.export of torch .* can't take this network"):
        model_export.capture(strange)


# Images to compare on


def test_a_model_file_alone_is_compared_on_drawn_images(small: Path) -> None:
    shutil.copy(small / "model.safetensors", "alone.safetensors")
    done = here("export", "alone.safetensors", "--to", "torch", "--json")
    assert "compared on drawn images, not on real ones: a model file on its own" in done.err
    (only,) = done.json["exports"]
    assert (only["path"], only["proof"]["source"]) == ("alone.pt2", "drawn images")
    assert only["proof"]["images"] == 500
    root = pictures(Path("set"), {"a": 9, "b": 9})
    done = here("export", "alone.safetensors", "--to", "torch", "--data", root, "--json")
    (only,) = done.json["exports"]
    assert (only["proof"]["source"], only["proof"]["images"]) == ("images of 'set'", 18)
    shutil.rmtree(root / "b")  # of one class alone answers can be compared, too
    done = here("export", "alone.safetensors", "--to", "torch", "--data", root, "--json")
    assert done.json["exports"][0]["proof"]["images"] == 9
    refused(here("export", "alone.safetensors", "--data", "nowhere/"), 3, "nowhere")


def test_a_run_whose_images_are_gone_is_compared_on_drawn_images() -> None:
    root = pictures(Path("set"), {"a": 20, "b": 20})
    words = ("model.widths=[2]", "train.epochs=1", "augment=[]", "data.image_size=8")
    assert here("train", root, *words, "--no-test", "--name", "own").code == 0
    (only,) = here("export", "own", "--to", "torch", "--json").json["exports"]
    assert only["proof"]["source"] == "validation images of 'set'"
    shutil.rmtree(root)
    done = here("export", "own", "--to", "torch", "--json")
    assert "compared on drawn images, not on real ones" in done.err
    assert done.json["exports"][0]["proof"]["source"] == "drawn images"


def test_usage_errors_of_export(small: Path) -> None:
    refused(here("export", "small", "--to", "onxx"), 2, "did you mean onnx?")
    refused(here("export", "small", "--to", ""), 2, "choose from: onnx, torch")
    refused(here("export", "small", "--to", "onnx", "--to", "torch", "-o", "a.onnx"), 2, "one file")
    refused(here("export", "small", "-o", "a.pt2"), 2, "onnx files end in .onnx")
    refused(here("export", "smal"), 2, "did you mean small?")
    Path("folder.pt2").mkdir()
    refused(here("export", "small", "--to", "torch", "-o", "folder.pt2"), 5, "can't write")
    assert sorted(path.name for path in Path().iterdir()) == ["folder.pt2", "models"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_reported(
    small: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    told = (f"{package} is not installed", "pip install onnx onnxruntime onnxscript")
    refused(here("export", "small"), 2, *told)
    if package != "onnxscript":
        refused(here("predict", small / "model.onnx", "-"), 2, *told)


# Files that others made, or damaged


Change = Callable[[Any, dict[str, str]], None]


def external(proto: Any, facts: dict[str, str], location: str = "../secret.bin") -> None:
    outside(proto.graph.initializer[0], location)


def outside(tensor: Any, location: str = "../secret.bin") -> None:
    for field in ("raw_data", "float_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def external_in_a_node(proto: Any, facts: dict[str, str]) -> None:
    node = proto.graph.node.add(op_type="Constant", output=["c"])
    held = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    held.t.dims.append(4)
    held.t.data_type = onnx.TensorProto.FLOAT
    outside(held.t)


def external_in_a_branch(proto: Any, facts: dict[str, str]) -> None:
    node = proto.graph.node.add(op_type="If", input=["x"], output=["y"])
    branch = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
    tensor = branch.g.initializer.add(name="z", data_type=onnx.TensorProto.FLOAT)
    outside(tensor, "/etc/passwd")


def external_sparse(proto: Any, facts: dict[str, str]) -> None:
    outside(proto.graph.sparse_initializer.add().values)


def external_without_mark(proto: Any, facts: dict[str, str]) -> None:
    proto.graph.initializer[0].external_data.add(key="location", value="a/../../secret.bin")


def shape_of(proto: Any) -> Any:
    return proto.graph.input[0].type.tensor_type.shape.dim


def wide(proto: Any, facts: dict[str, str]) -> None:
    shape_of(proto)[3].dim_value = 9


def fixed(proto: Any, facts: dict[str, str]) -> None:
    shape_of(proto)[0].dim_value = 2


def floats(proto: Any, facts: dict[str, str]) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def renamed(proto: Any, facts: dict[str, str]) -> None:
    proto.graph.input[0].name = "x"


def no_text(proto: Any, facts: dict[str, str]) -> None:
    proto.ParseFromString(proto.SerializeToString().replace(b"images", b"\xffmages"))


def cut_weights(proto: Any, facts: dict[str, str]) -> None:
    tensor = max(proto.graph.initializer, key=lambda each: len(each.raw_data))
    tensor.raw_data = tensor.raw_data[:-4]


def says(**texts: str) -> Change:
    return lambda proto, facts: facts.update(texts)


OURS = json.dumps({"image_size": 8, "channels": 1, "fit": "zoom", "mean": [0], "std": [1]})
HOSTILE: dict[str, tuple[Change, str]] = {
    "external": (external, "weights in another file (../secret.bin)"),
    "absolute": (lambda p, f: external(p, f, "/etc/passwd"), "weights in another file (/etc"),
    "in a node": (external_in_a_node, "weights in another file"),
    "in a branch": (external_in_a_branch, "weights in another file"),
    "sparse": (external_sparse, "weights in another file"),
    "unmarked": (external_without_mark, "weights in another file"),
    "operator": (
        lambda p, f: p.graph.node.add(op_type="Run", domain="com.evil"),
        "a custom operator (com.evil.Run)",
    ),
    "function": (lambda p, f: p.functions.add(name="f"), "functions or training steps"),
    "training": (lambda p, f: p.training_info.add(), "functions or training steps"),
    "wide": (wide, ""),
    "fixed": (fixed, ""),
    "floats": (floats, ""),
    "renamed": (renamed, ""),
    "no text": (no_text, "can't run it"),
    "cut weights": (cut_weights, "can't run it"),
    "new operators": (lambda p, f: setattr(p.opset_import[0], "version", 9999), "can't run it"),
    "empty graph": (lambda p, f: p.ClearField("graph"), ""),
    "two classes": (says(classes='["a", "b"]'), "2 classes"),
    "same classes": (says(classes=json.dumps(["a"] * 10)), "impossible classes"),
    "no list": (says(classes='{"a": 1}'), "can't be used"),
    "no json": (says(classes="["), "can't be used"),
    "deep json": (says(classes="[" * 100_000), "can't be used"),
    "fit": (says(preprocessing=OURS), "impossible classes or preprocessing"),
    "card": (says(model_metadata="[]"), "can't be used"),
    "no data": (says(model_metadata='{"recipe": {}, "data": 1}'), "can't be used"),
    "at once": (says(at_once="many"), "can't be used"),
    "newer": (says(**{onnx_model.MARK: "2"}), "newer convlens (format 2"),
}


def proto_of(path: Path) -> tuple[Any, dict[str, str]]:
    proto = onnx.load_model_from_string(path.read_bytes())
    return proto, {entry.key: entry.value for entry in proto.metadata_props}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    change, said = HOSTILE[case]
    Path("secret.bin").write_bytes(bytes(4096))  # beside the folder that the file is in
    picture(Path("a.png"), (9,))
    path = Path("in/model.onnx")
    path.parent.mkdir()
    proto, facts = proto_of(small / "model.onnx")
    del facts["sha256"]
    change(proto, facts)
    path.write_bytes(onnx_model.serialize(proto, facts))  # the hash is right
    if "another file" in said:  # no runtime may ever see it, whatever that would do

        def reached(*given: Any) -> None:
            raise AssertionError("a runtime was given the file")

        monkeypatch.setattr(onnx_model, "OnnxNetwork", reached)
    for words in (["predict", path, "a.png"], ["evaluate", path]):
        refused(here(*words), 4, said, "in/model.onnx")
    with pytest.raises(ModelFileError):
        convlens.predict(path, ["a.png"])


def test_damaged_files_are_refused(small: Path) -> None:
    data = (small / "model.onnx").read_bytes()
    chance = random.Random(0)
    damaged = [data[: len(data) * k // 16] for k in range(16)] + [data[:-1], data + b"\0"]
    for _ in range(300):
        at = chance.randrange(len(data))
        damaged.append(data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :])
    # A key or a value that is no UTF-8: protobuf gives bytes where texts are promised.
    for text in (b"sha256", b"classes", onnx_model.MARK.encode()):
        at = data.rfind(text)
        damaged.append(data[:at] + b"\xff" + data[at + 1 :])
    damaged.append(data[:-1] + b"\xff")
    damaged += [data[:-64] + bytes(64), data[::-1], b"GIF89a" + data, b"[]", b"PK\x03\x04" * 20]
    damaged.append((small / "model.safetensors").read_bytes())
    path = Path("model.onnx")
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ModelFileError):
            load_model_or_onnx(path)
    refused(here("predict", path, "-"), 4, "model.onnx")


def test_files_of_other_programs_are_refused(small: Path) -> None:
    proto, _ = proto_of(small / "model.onnx")
    del proto.metadata_props[:]
    Path("other.onnx").write_bytes(proto.SerializeToString())
    refused(here("predict", "other.onnx", "-"), 4, "not written by convlens", "export")
    proto.metadata_props.add(key=onnx_model.MARK, value="1")
    Path("other.onnx").write_bytes(proto.SerializeToString())
    refused(here("predict", "other.onnx", "-"), 4, "hash differs")


def test_a_file_beyond_all_limits_is_not_even_read() -> None:
    with Path("huge.onnx").open("wb") as file:
        os.truncate(file.fileno(), 1 << 32)
    refused(here("predict", "huge.onnx", "-"), 4, "larger than 2 GiB")


def test_class_names_are_only_text(small: Path) -> None:
    proto, facts = proto_of(small / "model.onnx")
    names = [f"[red]{i}[/] <img src=x onerror=alert(1)>" for i in range(10)]
    facts = {**facts, "classes": json.dumps(names)}
    del facts["sha256"]
    Path("named.onnx").write_bytes(onnx_model.serialize(proto, facts))
    picture(Path("a.png"), (9,))
    done = here("predict", "named.onnx", "a.png")
    assert done.code == 0
    assert "<img src=x onerror=alert(1)>" in done.out
    assert "[red]" in done.out
