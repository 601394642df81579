"""Exported ONNX files as models: hostile, damaged and foreign files are refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import convlens
from convlens import onnx_model
from convlens.errors import ModelFileError
from convlens.onnx_model import load_model_or_onnx
from helpers.commands import DIGITS, here, picture, refused

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


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_reported(
    small: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = (f"{package} is not installed", "pip install onnx onnxruntime onnxscript")
    refused(here("export", "small"), 2, *message)
    if package != "onnxscript":
        refused(here("predict", small / "model.onnx", "-"), 2, *message)


# Message of onnxruntime 1.32 with 50 MB of free memory.
OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Cast node. "
    "Name:'node__to_copy' Status Message: /onnxruntime_src/onnxruntime/core/framework/"
    "bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::"
    "Stream*) Failed to allocate memory for requested buffer of size 134217728\n"
)


def test_an_onnx_file_runs_in_smaller_batches_when_memory_runs_out(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    original, limit = onnx_model.OnnxNetwork.outputs, [3]

    class Session:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, names: list[str], given: dict[str, Any]) -> Any:
            if len(given["images"]) > limit[0]:
                raise Fail(OUT_OF_MEMORY)
            return self.session.run(names, given)

    def outputs(net: onnx_model.OnnxNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(net.session, Session):
            net.session = Session(net.session)
        return original(net, images)

    arguments = ("evaluate", small / "model.onnx", "--split", "val", "--json")
    expected = here(*arguments)
    assert expected.code == 0, expected.err
    monkeypatch.setattr(onnx_model.OnnxNetwork, "outputs", outputs)
    done = here(*arguments)
    assert done.code == 0, done.err
    assert done.json["confusion"] == expected.json["confusion"]
    limit[0] = 0
    refused(
        here(*arguments), 5, "not enough memory", "Failed to allocate memory for requested buffer"
    )


# Foreign and damaged files


Change = Callable[[Any, dict[str, str]], None]


def external(proto: Any, metadata: dict[str, str], location: str = "../secret.bin") -> None:
    outside(proto.graph.initializer[0], location)


def outside(tensor: Any, location: str = "../secret.bin") -> None:
    for field in ("raw_data", "float_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def external_in_a_node(proto: Any, metadata: dict[str, str]) -> None:
    node = proto.graph.node.add(op_type="Constant", output=["c"])
    value = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    value.t.dims.append(4)
    value.t.data_type = onnx.TensorProto.FLOAT
    outside(value.t)


def external_in_a_branch(proto: Any, metadata: dict[str, str]) -> None:
    node = proto.graph.node.add(op_type="If", input=["x"], output=["y"])
    branch = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
    tensor = branch.g.initializer.add(name="z", data_type=onnx.TensorProto.FLOAT)
    outside(tensor, "/etc/passwd")


def external_sparse(proto: Any, metadata: dict[str, str]) -> None:
    outside(proto.graph.sparse_initializer.add().values)


def external_without_mark(proto: Any, metadata: dict[str, str]) -> None:
    proto.graph.initializer[0].external_data.add(key="location", value="a/../../secret.bin")


def shape_of(proto: Any) -> Any:
    return proto.graph.input[0].type.tensor_type.shape.dim


def wide(proto: Any, metadata: dict[str, str]) -> None:
    shape_of(proto)[3].dim_value = 9


def fixed(proto: Any, metadata: dict[str, str]) -> None:
    shape_of(proto)[0].dim_value = 2


def floats(proto: Any, metadata: dict[str, str]) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def renamed(proto: Any, metadata: dict[str, str]) -> None:
    proto.graph.input[0].name = "x"


def invalid_utf8(proto: Any, metadata: dict[str, str]) -> None:
    proto.ParseFromString(proto.SerializeToString().replace(b"images", b"\xffmages"))


def cut_weights(proto: Any, metadata: dict[str, str]) -> None:
    tensor = max(proto.graph.initializer, key=lambda each: len(each.raw_data))
    tensor.raw_data = tensor.raw_data[:-4]


def with_metadata(**texts: str) -> Change:
    return lambda proto, metadata: metadata.update(texts)


PREPROCESSING = json.dumps({"image_size": 8, "channels": 1, "fit": "zoom", "mean": [0], "std": [1]})
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
    "no text": (invalid_utf8, "can't run it"),
    "cut weights": (cut_weights, "can't run it"),
    "new operators": (lambda p, f: setattr(p.opset_import[0], "version", 9999), "can't run it"),
    "empty graph": (lambda p, f: p.ClearField("graph"), ""),
    "two classes": (with_metadata(classes='["a", "b"]'), "2 classes"),
    "same classes": (with_metadata(classes=json.dumps(["a"] * 10)), "impossible classes"),
    "no list": (with_metadata(classes='{"a": 1}'), "can't be used"),
    "no json": (with_metadata(classes="["), "can't be used"),
    "deep json": (with_metadata(classes="[" * 100_000), "can't be used"),
    "fit": (with_metadata(preprocessing=PREPROCESSING), "impossible classes or preprocessing"),
    "card": (with_metadata(card="[]"), "can't be used"),
    "no data": (with_metadata(card='{"recipe": {}, "data": 1}'), "can't be used"),
    "at once": (with_metadata(at_once="many"), "can't be used"),
    "newer": (with_metadata(**{onnx_model.MARK: "2"}), "newer convlens (format 2"),
}


def proto_of(path: Path) -> tuple[Any, dict[str, str]]:
    proto = onnx.load_model_from_string(path.read_bytes())
    return proto, {entry.key: entry.value for entry in proto.metadata_props}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    change, message = HOSTILE[case]
    Path("secret.bin").write_bytes(bytes(4096))  # beside the folder that the file is in
    picture(Path("a.png"), (9,))
    path = Path("in/model.onnx")
    path.parent.mkdir()
    proto, metadata = proto_of(small / "model.onnx")
    del metadata["sha256"]
    change(proto, metadata)
    path.write_bytes(onnx_model.serialize(proto, metadata))  # with a correct hash
    if "another file" in message:  # no runtime may ever get it

        def fail(*arguments: Any) -> None:
            raise AssertionError("a runtime got the file")

        monkeypatch.setattr(onnx_model, "OnnxNetwork", fail)
    for words in (["predict", path, "a.png"], ["evaluate", path]):
        refused(here(*words), 4, message, "in/model.onnx")
    with pytest.raises(ModelFileError):
        convlens.predict(path, ["a.png"])


def test_damaged_files_are_refused(small: Path) -> None:
    data = (small / "model.onnx").read_bytes()
    rng = random.Random(0)
    damaged = [data[: len(data) * k // 16] for k in range(16)] + [data[:-1], data + b"\0"]
    for _ in range(300):
        at = rng.randrange(len(data))
        damaged.append(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
    # Keys and values that are not UTF-8: protobuf returns them as bytes.
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


def test_a_file_above_the_size_limit_is_not_read() -> None:
    with Path("huge.onnx").open("wb") as file:
        os.truncate(file.fileno(), 1 << 32)
    refused(here("predict", "huge.onnx", "-"), 4, "larger than 2 GiB")


def test_class_names_are_printed_as_plain_text(small: Path) -> None:
    proto, metadata = proto_of(small / "model.onnx")
    names = [f"[red]{i}[/] <img src=x onerror=alert(1)>" for i in range(10)]
    metadata = {**metadata, "classes": json.dumps(names)}
    del metadata["sha256"]
    Path("named.onnx").write_bytes(onnx_model.serialize(proto, metadata))
    picture(Path("a.png"), (9,))
    done = here("predict", "named.onnx", "a.png")
    assert done.code == 0
    assert "<img src=x onerror=alert(1)>" in done.out
    assert "[red]" in done.out
