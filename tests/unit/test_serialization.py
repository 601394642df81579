"""Model files: changed bytes are detected, nothing is unpickled, other errors are not raised."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save as safetensors_save, save_file

from convlens import serialization
from convlens.errors import ModelFileError, ResourceError, UsageError
from convlens.version import __version__
from helpers.support import same, tiny

PATH = Path("model.safetensors")
TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "last": torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)),
}
METADATA: dict[str, Any] = {"classes": ["ä", "0" * 64, 'quo"te', "\\"], "n": 0.1, "none": None}


def refused(content: bytes) -> str:
    PATH.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        serialization.read_model_file(PATH)
    assert caught.value.where == str(PATH)
    return caught.value.what


def good() -> bytes:
    serialization.write_model_file(PATH, TENSORS, METADATA)
    return PATH.read_bytes()


def test_tensors_and_metadata_survive_a_round_trip() -> None:
    digest = serialization.write_model_file(PATH, TENSORS, METADATA)
    tensors, metadata = serialization.read_model_file(PATH)
    same(tensors, TENSORS)
    assert [t.dtype for t in tensors.values()] == [TENSORS[name].dtype for name in tensors]
    assert metadata == {"format": 1, "sha256": digest, **METADATA}
    assert list(metadata) == ["format", "sha256", *METADATA]


def test_the_hash_is_computed_with_zeros_in_its_place() -> None:
    digest = serialization.write_model_file(PATH, TENSORS, METADATA)
    zeroed = PATH.read_bytes().replace(digest.encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == digest
    assert serialization.write_model_file(Path("again"), TENSORS, METADATA) == digest


def test_safetensors_can_read_a_model_file() -> None:
    from safetensors.torch import load_file

    good()
    same(load_file(PATH), TENSORS)


def test_tensors_in_any_memory_layout_are_written_correctly() -> None:
    odd = {
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5).t(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    serialization.write_model_file(PATH, odd, {})
    same(serialization.read_model_file(PATH)[0], {k: v.detach() for k, v in odd.items()})


def test_one_flipped_bit_anywhere_is_detected() -> None:
    content = good()
    assert 500 < len(content) < 4000
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        refused(bytes(changed))


def test_one_changed_byte_anywhere_is_detected() -> None:
    content = good()
    for position in range(len(content)):
        for value in (0x22, 0xFF):  # a quote, invalid UTF-8
            if content[position] != value:
                refused(content[:position] + bytes([value]) + content[position + 1 :])


def test_a_truncated_or_longer_file_is_detected() -> None:
    content = good()
    for part in range(64):
        refused(content[: len(content) * part // 64])
    refused(content[:-1])
    refused(content + b"\0")
    refused(content + content)
    refused(b"")


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_refused_and_not_run(legacy: bool) -> None:
    torch.save(Attack(), PATH, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelFileError, match="pickle"):
        serialization.read_model_file(PATH)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        PATH.write_bytes(pickle.dumps(Attack(), protocol=protocol))
        with pytest.raises(ModelFileError):
            serialization.read_model_file(PATH)
    assert not Path("hacked").exists()
    pickle.loads(PATH.read_bytes())  # the attack itself works
    assert Path("hacked").exists()


@pytest.mark.parametrize("length", [9, 10**6, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(length: int) -> None:
    message = refused(length.to_bytes(8, "little") + b"{}")
    assert f"claims {length} bytes" in message


def test_a_file_of_another_program_is_refused() -> None:
    save_file(TENSORS, PATH)
    assert "convlens did not write" in refused(PATH.read_bytes())
    save_file(TENSORS, PATH, {"format": "pt"})
    assert "convlens did not write" in refused(PATH.read_bytes())


def signed(metadata: Any, tensors: bytes | None = None) -> bytes:
    """Return a file with a valid hash over arbitrary metadata, as an attacker could write it."""
    text = json.dumps(metadata)
    content = tensors or safetensors_save(TENSORS, {"convlens": text})
    digest = hashlib.sha256(content).hexdigest()
    return content.replace(serialization.NO_HASH.encode(), digest.encode(), 1)


def test_a_newer_format_is_reported() -> None:
    zeros = serialization.NO_HASH
    assert "newer convlens (format 2" in refused(signed({"format": 2, "sha256": zeros}))
    for invalid in (None, "x", [1], 0, -1, {"a": 1}):
        assert "format" in refused(signed({"sha256": zeros, "format": invalid}))
    PATH.write_bytes(signed({"format": 1, "sha256": zeros}))
    same(serialization.read_model_file(PATH)[0], TENSORS)


@pytest.mark.parametrize(
    "table",
    [
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 999]}},
        {"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"w": 5},
        {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}},
    ],
)
def test_a_valid_hash_over_an_invalid_header_is_refused(table: dict[str, Any]) -> None:
    metadata = {"convlens": json.dumps({"format": 1, "sha256": serialization.NO_HASH})}
    header = json.dumps({"__metadata__": metadata, **table}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    assert "readable" in refused(signed(None, content))


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "C64", "U16"])
def test_unsupported_dtypes_are_refused(kind: str) -> None:
    metadata = {"convlens": json.dumps({"format": 1, "sha256": serialization.NO_HASH})}
    size = {"C64": 1, "U16": 4}.get(kind, 8)
    table = {"w": {"dtype": kind, "shape": [size], "data_offsets": [0, 8]}}
    header = json.dumps({"__metadata__": metadata, **table}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    assert refused(signed(None, content)).startswith("the dtype of w is not supported (")


# Newer versions


@pytest.mark.parametrize(
    ("version", "newer"),
    [
        ("99.0", True),
        ("0.1.99", True),
        ("1.0.0rc1", True),
        (__version__, False),
        ("0.0.9", False),
        ("test", False),
        (None, False),
        ("", False),
        ({}, False),
    ],
)
def test_newer_versions_are_recognized_by_their_number(version: Any, newer: bool) -> None:
    assert serialization.is_newer_version(version) == newer


def test_unknown_keys_of_a_newer_version_name_that_version() -> None:
    recipe = tiny().model_dump(mode="json")
    assert serialization.recipe_from_metadata({"recipe": recipe}) == tiny()
    later = {**recipe, "train": {**recipe["train"], "teleport": True}}
    with pytest.raises(serialization.NewerFormatError, match=r"convlens 99\.1, which") as caught:
        serialization.recipe_from_metadata({"convlens": "99.1", "recipe": later})
    assert "unknown key 'train.teleport'" in caught.value.what
    assert (caught.value.fix, caught.value.exit_code) == ("update convlens", 4)
    for version in ("0.0.1", None):  # not a newer version, so a mistake in the recipe
        with pytest.raises(UsageError, match=r"unknown key 'train\.teleport'"):
            serialization.recipe_from_metadata({"convlens": version, "recipe": later})
    for broken in ({}, {"recipe": None}, {"recipe": [1]}):
        with pytest.raises(ModelFileError, match="does not contain the recipe"):
            serialization.recipe_from_metadata(broken)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_not_saved(bad: float) -> None:
    good()
    before = PATH.read_bytes()
    broken = {**TENSORS, "last": torch.tensor([1.0, bad])}
    with pytest.raises(serialization.NotFiniteError, match="last") as caught:
        serialization.write_model_file(PATH, broken, METADATA)
    assert caught.value.exit_code == 6
    assert PATH.read_bytes() == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_non_finite_weights_are_not_loaded(bad: float, dtype: torch.dtype) -> None:
    model_metadata = {"convlens": json.dumps({"format": 1, "sha256": serialization.NO_HASH})}
    broken = {**TENSORS, "last": torch.tensor([1.0, bad], dtype=dtype)}
    message = refused(signed(None, safetensors_save(broken, model_metadata)))
    assert message == "weights are NaN or infinite in 1 of 5 tensors: last"


def test_missing_files_and_folders_are_refused() -> None:
    with pytest.raises(ModelFileError, match="no such model file"):
        serialization.read_model_file(Path("absent"))
    Path("folder").mkdir()
    with pytest.raises(ResourceError, match="can't read") as caught:
        serialization.read_model_file(Path("folder"))
    assert caught.value.where == "folder"
    assert caught.value.fix


# Fuzzing


def only_refused(content: bytes) -> None:
    path = Path("fuzz")
    path.write_bytes(content)
    try:
        serialization.read_model_file(path)
    except ModelFileError:
        return
    raise AssertionError("accepted")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused(content: bytes, measured: bool) -> None:
    only_refused(len(content).to_bytes(8, "little") + content if measured else content)


KEYS = st.sampled_from(["__metadata__", "convlens", "sha256", "format", "w"]) | st.text(max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("0" * 64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(JSON, st.booleans())
def test_random_headers_are_refused(header: Any, inside: bool) -> None:
    if inside:
        header = {"__metadata__": {"convlens": json.dumps(header)}}
    content = json.dumps(header).encode()
    only_refused(len(content).to_bytes(8, "little") + content)


def test_headers_made_to_break_parsers_are_refused() -> None:
    for text in (
        "[" * 100_000,
        "1" * 10_000,
        '{"__metadata__": {"convlens": 5}}',
        "\ufeff{}",
        '{"__metadata__": {"convlens": "{\\"sha256\\": \\"' + "\\\\ud800" * 64 + '\\"}"}}',
        '{"__metadata__": []}',
        '{"__metadata__": {"convlens": "[]"}}',
    ):
        content = text.encode()
        only_refused(len(content).to_bytes(8, "little") + content)
