"""Weights files of other programs: supported formats, refused contents, no code is run."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from convlens import serialization
from convlens.errors import ModelFileError
from helpers.support import same

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.tensor(7)}
PATH = Path("x.pth")


def test_a_safetensors_file_is_read() -> None:
    save_file(TENSORS, "x.safetensors", {"format": "pt"})
    weights = serialization.read_foreign_weights(Path("x.safetensors"))
    same(weights.tensors, TENSORS)
    assert weights.sha256 == hashlib.sha256(Path("x.safetensors").read_bytes()).hexdigest()
    assert weights.model_metadata == {}


def test_a_model_file_is_read_with_its_metadata_and_its_hash_is_checked() -> None:
    path = Path("model.safetensors")
    digest = serialization.write_model_file(path, TENSORS, {"classes": ["x", "y"]})
    weights = serialization.read_foreign_weights(path)
    same(weights.tensors, TENSORS)
    assert weights.sha256 == digest
    assert weights.model_metadata["classes"] == ["x", "y"]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ModelFileError, match="hash differs"):
        serialization.read_foreign_weights(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_state_dict_saved_with_torch_is_read(zipped: bool, suffix: str) -> None:
    torch.save(TENSORS, f"x{suffix}", _use_new_zipfile_serialization=zipped)
    weights = serialization.read_foreign_weights(Path(f"x{suffix}"))
    same(weights.tensors, TENSORS)
    assert weights.sha256 == hashlib.sha256(Path(f"x{suffix}").read_bytes()).hexdigest()


@pytest.mark.parametrize("key", serialization.STATE_DICT_KEYS)
def test_a_state_dict_inside_a_checkpoint_is_found(key: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, "loss": torch.tensor(0.5), key: TENSORS, "optimizer": optimizer}, PATH)
    same(serialization.read_foreign_weights(PATH).tensors, TENSORS)
    torch.save({"checkpoint": 1, "model": {key: OrderedDict(TENSORS)}}, PATH)
    same(serialization.read_foreign_weights(PATH).tensors, TENSORS)


def test_parameters_become_tensors_and_other_values_are_ignored() -> None:
    torch.save({"w": nn.Parameter(torch.ones(2)), "version": 3, "_extra_state": None}, PATH)
    weights = serialization.read_foreign_weights(PATH).tensors
    assert list(weights) == ["w"]
    assert type(weights["w"]) is Tensor
    assert not weights["w"].requires_grad


# Files that contain code


class Evil:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


def saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


EVIL: dict[str, Callable[[], bytes]] = {
    "zip": lambda: saved({"state_dict": TENSORS, "more": Evil()}),
    "legacy": lambda: saved([Evil()], _use_new_zipfile_serialization=False),
    "pickle": lambda: pickle.dumps(Evil(), 4),
    "oldest": lambda: pickle.dumps(Evil(), 0),
}


@pytest.mark.parametrize("name", list(EVIL))
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_code_in_a_file_is_refused_and_not_run(name: str, suffix: str) -> None:
    path = Path(f"evil{suffix}")
    path.write_bytes(EVIL[name]())
    with pytest.raises(ModelFileError) as caught:
        serialization.read_foreign_weights(path)
    assert not Path("executed").exists()
    assert caught.value.where == str(path)
    assert "weights_only" not in str(caught.value)  # advice of torch to run the code anyway
    assert "safe_globals" not in str(caught.value)
    if name in ("zip", "legacy"):
        assert "system, not only tensors" in caught.value.what
        assert "torch.save(model.state_dict()" in caught.value.fix
    # The same bytes do run their code if they are unpickled, so the test can fail.
    if name == "pickle":
        pickle.loads(path.read_bytes())
        assert Path("executed").exists()


def test_a_pickled_network_is_refused() -> None:
    torch.save(nn.Linear(2, 2), PATH)
    with pytest.raises(ModelFileError, match=r"nn.modules.linear.Linear, not only tensors"):
        serialization.read_foreign_weights(PATH)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_program_is_refused() -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(PATH))
    with pytest.raises(ModelFileError, match="TorchScript program, not only tensors"):
        serialization.read_foreign_weights(PATH)


# Files without usable weights


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        (3, "a int"),
        ({}, "a dict"),
        ({"epoch": 3, "optimizer": {"x": torch.ones(2)}}, "'epoch': int, 'optimizer': dict"),
        ({0: torch.ones(2)}, "0: Tensor"),
        ({"model": {"state_dict": {"epoch": 1}}}, "'epoch': int"),
    ],
)
def test_files_without_named_tensors_are_refused(content: Any, message: str) -> None:
    torch.save(content, PATH)
    with pytest.raises(ModelFileError, match="no named tensors") as caught:
        serialization.read_foreign_weights(PATH)
    assert message in caught.value.what


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(2, dtype=torch.complex64),
    ],
    ids=["sparse", "meta", "complex"],
)
def test_sparse_meta_and_complex_tensors_are_refused(tensor: Tensor) -> None:
    torch.save({"fine": torch.ones(2), "odd": tensor}, PATH)
    with pytest.raises(ModelFileError, match="odd is not a dense tensor"):
        serialization.read_foreign_weights(PATH)


def test_a_missing_or_empty_file_is_refused() -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        serialization.read_foreign_weights(Path("lost.pth"))
    PATH.write_bytes(b"")
    with pytest.raises(ModelFileError, match="damaged"):
        serialization.read_foreign_weights(PATH)


@pytest.mark.parametrize(
    ("kind", "count", "message"),
    [
        ("F4", 16, "dtype 'F4' is unknown"),
        ("F6_E2M3", 8, "no readable|is unknown|neither a safetensors"),
        ("F8_E8M0", 8, "dtype 'F8_E8M0' is unknown|is not supported"),
        ("F8_E4M3", 8, "the dtype of w is not supported (float8_e4m3fn)"),
        ("C64", 1, "the dtype of w is not supported (complex64)"),
        ("F99", 8, "neither a safetensors nor"),
    ],
)
def test_safetensors_with_unsupported_dtypes_are_refused(
    kind: str, count: int, message: str
) -> None:
    """Dtypes that torch does not know, or in which CNNs are not trained."""
    header = json.dumps({"w": {"dtype": kind, "shape": [count], "data_offsets": [0, 8]}}).encode()
    Path("x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelFileError) as caught:
        serialization.read_foreign_weights(Path("x.safetensors"))
    assert any(words in caught.value.what for words in message.split("|")), caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("length", [2**27, 2**40, 2**64 - 1])
def test_a_safetensors_header_longer_than_the_file_is_refused(length: int) -> None:
    Path("x.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"w": ' + bytes(1000))
    with pytest.raises(ModelFileError, match="neither a safetensors nor") as caught:
        serialization.read_foreign_weights(Path("x.safetensors"))
    assert caught.value.fix


def test_a_zip_in_a_zip_is_not_opened() -> None:
    """The outer file has no `data.pkl`, and the inner one is never unpacked."""
    Path("inner.zip").write_bytes(EVIL["zip"]())
    with zipfile.ZipFile("outer.pth", "w") as packed:
        packed.write("inner.zip", "archive/inner.zip")
    with pytest.raises(ModelFileError, match="damaged, or contains more than tensors"):
        serialization.read_foreign_weights(Path("outer.pth"))
    large = io.BytesIO()
    with zipfile.ZipFile(large, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zeros", bytes(50_000_000))
    Path("bomb.pth").write_bytes(saved(TENSORS))
    with zipfile.ZipFile("bomb.pth", "a") as packed:
        packed.writestr("x/bomb.zip", large.getvalue())
    with contextlib.suppress(ModelFileError):  # torch reads only the names it expects
        same(serialization.read_foreign_weights(Path("bomb.pth")).tensors, TENSORS)
    assert not Path("executed").exists()


GOOD = {"zip": saved(TENSORS), "legacy": saved(TENSORS, _use_new_zipfile_serialization=False)}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(GOOD)), st.data())
def test_a_damaged_file_raises_only_model_file_errors(name: str, data: st.DataObject) -> None:
    content = bytearray(GOOD[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = Path("damaged.pth")
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    with contextlib.suppress(ModelFileError):
        serialization.read_foreign_weights(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked() -> None:
    large = zipfile.ZipFile(io.BytesIO(saved({"w": torch.zeros(2_000_000)})))
    with zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for each in large.infolist():
            packed.writestr(each.filename, large.read(each))
    assert Path("bomb.pth").stat().st_size < 100_000
    with pytest.raises(ModelFileError, match="unpacks to far more than its size"):
        serialization.read_foreign_weights(Path("bomb.pth"))


def test_duplicate_names_in_a_zip_are_refused() -> None:
    """Programs differ in which of two `data.pkl` they read."""
    Path("twice.pth").write_bytes(saved(TENSORS))
    with zipfile.ZipFile("twice.pth", "a") as packed:
        (name,) = [each for each in packed.namelist() if each.endswith("data.pkl")]
        with pytest.warns(UserWarning, match="Duplicate name"):
            packed.writestr(name, b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(ModelFileError, match="has duplicate names"):
        serialization.read_foreign_weights(Path("twice.pth"))
    assert not Path("hacked").exists()


def test_an_expanded_tensor_is_refused() -> None:
    torch.save({"w": torch.zeros(1).expand(1_000_000, 1_000_000)}, "wide.pth")
    assert Path("wide.pth").stat().st_size < 10_000
    with pytest.raises(ModelFileError, match="w claims 1,000,000,000,000 elements"):
        serialization.read_foreign_weights(Path("wide.pth"))


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_length_that_looks_like_a_pickle_is_read(length: int) -> None:
    """A safetensors file starts with the header length; 640 is 0x80 0x02, the start of a pickle."""
    path = Path("model.safetensors")
    serialization.write_model_file(path, TENSORS, {"about": ""})
    header = int.from_bytes(path.read_bytes()[:8], "little")
    serialization.write_model_file(path, TENSORS, {"about": "x" * (length - header)})
    assert path.read_bytes().startswith(serialization.PICKLE_PREFIXES)
    same(serialization.read_model_file(path)[0], TENSORS)
    same(serialization.read_foreign_weights(path).tensors, TENSORS)
    assert json.loads(path.read_bytes()[8 : 8 + length])["a.weight"]["dtype"] == "F32"
