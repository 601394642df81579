"""YAML of recipes: values, errors with their line, and limits."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytest

from convlens.errors import UsageError
from convlens.utils import yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2E5", -200000.0),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x1f", 31),
        ("010", 10),
        ("yes", True),
        ("On", True),
        ("no", False),
        ("OFF", False),
        ("y", "y"),
        ("n", "n"),
        ("'no'", "no"),
        ("12:30", "12:30"),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("1e-3x", "1e-3x"),
        ("C:\\x", "C:\\x"),
    ],
)
def test_values_are_read_and_written_back_equal(text: str, value: Any) -> None:
    """YAML 1.2, and the booleans of YAML 1.1."""
    parsed = yaml.parse_yaml(text, where="")
    assert parsed == value
    assert type(parsed) is type(value)
    again = yaml.parse_yaml(yaml.dump_yaml({"a": value}), where="")
    assert again == {"a": value}
    assert yaml.parse_yaml(yaml.dump_yaml([text]), where="") == [text]


@pytest.mark.parametrize(
    ("text", "message", "where"),
    [
        ("a: 1\nb: [1\nc: {}\n", "not valid YAML: expected ',' or ']'", "x, line 3"),
        ("a: 1\nb: 2\na: 3\n", 'duplicate key "a"', "x, line 3"),
        ("a: &x [*x]\n", "not valid YAML", "x"),
        ("a: 2024-99-99\n", "not valid YAML", "x"),
        ("[" * 1000, "not valid YAML", "x"),
        ("a" * (yaml.MAX_CHARS + 1), "characters are too many for a recipe", "x"),
    ],
)
def test_invalid_yaml_is_a_usage_error_with_its_line(text: str, message: str, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        yaml.parse_yaml(text, where="x")
    assert message in caught.value.what
    assert caught.value.where.startswith(where)


def test_unreadable_files_are_usage_errors() -> None:
    Path("binary.yaml").write_bytes(b"a: 1\n\xff\xfe\x00")
    Path("large.yaml").write_bytes(b"#" * (yaml.MAX_CHARS + 1))
    with pytest.raises(UsageError, match="not UTF-8 text") as caught:
        yaml.read_yaml(Path("binary.yaml"))
    assert caught.value.where == "binary.yaml, line 2"
    with pytest.raises(UsageError, match="bytes are too many"):
        yaml.read_yaml(Path("large.yaml"))
    with pytest.raises(UsageError, match="a recipe is a regular file"):
        yaml.read_yaml(Path())
    for path in ("absent.yaml", "null\0byte.yaml"):
        with pytest.raises(UsageError, match="can't read the recipe"):
            yaml.read_yaml(Path(path))


def test_lines_of_keys_are_counted_from_one() -> None:
    text = "about: x\ntrain:\n  epochs: 1\n\n  seed: 2\n"
    assert yaml.key_lines(text) == {"about": 1, "train": 2, "train.epochs": 3, "train.seed": 5}
    assert yaml.key_lines("a: [") == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "a=nan: not a finite number"),
        ("\ud800", "not valid Unicode text"),
        (2**63, "an integer of 64 bits"),
        ({1: 2}, "1 is not a key"),
        ([datetime.date(2026, 11, 27)], "a recipe cannot contain a date"),
    ],
)
def test_values_that_yaml_would_not_preserve_are_found(value: Any, message: str) -> None:
    (found,) = yaml.find_invalid({"a": value})
    assert message in found
    assert list(yaml.find_invalid({"a": [1, 2.5, None, True, "text", {"b": []}]})) == []


def test_long_values_are_shortened_in_messages() -> None:
    assert yaml.shorten("short") == "'short'"
    assert yaml.shorten("x" * 200) == "'" + "x" * 79 + "..."
    assert yaml.shorten(10**10_000) == "a number of thousands of digits"


@pytest.mark.parametrize(
    "text", ["\x85", "a\x85b", "\u2028", "a \u2029", "\ufeff", "a\n\nb", "x: y"]
)
def test_line_breaks_of_unicode_survive(text: str) -> None:
    dumped = yaml.dump_yaml({"about": text})
    assert yaml.parse_yaml(dumped, where="") == {"about": text}
