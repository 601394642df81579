"""YAML as recipes use it: safe, without duplicate keys, and with `1e-3` as a number.

What is small as text must be small in memory: aliases of aliases are refused where they stand for
more than any recipe says.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Hashable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from convlens.errors import UsageError

MOST = 1 << 17  # characters of a text; ours have a few thousand
_VALUES = 50_000  # that a text stands for, aliases written out
_DEEPEST = 40


def read(path: Path) -> str:
    """The text of a recipe's file."""
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):  # a pipe would block, a device never end
            raise UsageError("a recipe is a regular file", where=str(path))
        if facts.st_size > MOST:
            raise UsageError(f"{facts.st_size:,} bytes are too many for a recipe", where=str(path))
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(
            "can't read the recipe: it is no UTF-8 text",
            where=f"{path}, line {line}",
            fix="save it as UTF-8",
        ) from error
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # the latter: a path with a zero byte in it
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"can't read the recipe: {reason}", where=str(path)) from error


def parse(content: str, *, where: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        UsageError: no valid YAML, a key that stands twice, or too much of it.
    """
    if len(content) > MOST:
        raise UsageError(f"{len(content):,} characters are too many for a recipe", where=where)
    try:
        loader = _Loader(content)  # a SafeLoader
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except UsageError as error:
        error.where = f"{where}, {error.where}" if error.where else where
        raise
    # Values that look like dates or numbers and are none, and nesting without end, too.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"no valid YAML: {' '.join(str(error).split())}", where=where) from error


def lines(content: str) -> dict[str, int]:
    """The line of each key and of each key below it (`train.epochs`), counted from 1."""
    found: dict[str, int] = {}
    try:
        tree = yaml.compose(content, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return found
    waiting = [("", tree)]
    for prefix, node in waiting:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            found[f"{prefix}{key.value}"] = key.start_mark.line + 1
            if not prefix:
                waiting.append((f"{key.value}.", value))
    return found


def _count(node: yaml.Node, known: dict[int, int], depth: int = 0) -> int:
    """How many values a node stands for, once its aliases are written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise UsageError("an alias stands inside of what it stands for")
        return known[id(node)]
    if depth > _DEEPEST:
        raise UsageError(f"more than {_DEEPEST} lists or sections inside each other")
    known[id(node)], total = 0, 1
    inside = node.value if isinstance(node, yaml.CollectionNode) else ()
    for child in chain.from_iterable(inside) if isinstance(node, yaml.MappingNode) else inside:
        total += _count(child, known, depth + 1)
    if total > _VALUES:
        raise UsageError(f"its aliases stand for more than {_VALUES:,} values")
    known[id(node)] = total
    return total


def dump(tree: Any) -> str:
    """YAML that `parse` reads back as an equal value; keys stay in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def odd(value: Any, key: str = "") -> Iterator[str]:
    """What no recipe can hold, wherever it stands: it could not be written and read again."""
    if isinstance(value, Mapping):
        for inner, item in value.items():
            if not isinstance(inner, str):
                yield f"{key}: {short(inner)} is no key; keys are words"
            else:
                yield from odd(inner, f"{key}: a key")
                yield from odd(item, f"{key}.{inner}" if key else inner)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from odd(item, key)
    elif isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            yield f"{key}={short(value)}: no text that can be written"
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield f"{key}={value}: no finite number"
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            yield f"{key}: a whole number of {value.bit_length()} bits"
    elif value is not None:
        yield f"{key}={short(value)}: a {type(value).__name__} is no value of a recipe"


def short(value: Any) -> str:
    """A value as an error shows it."""
    try:
        text = repr(value)
    except ValueError:  # Python doesn't write a number of thousands of digits
        return "a number without end"
    return text if len(text) <= 80 else f"{text[:80]}..."


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys: PyYAML silently keeps the last one.

    `1e-3` is a number, as in YAML 1.2; PyYAML goes by 1.1, where it is text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise UsageError(f"{short(key)} can't be a key")
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UsageError(f"key {short(key)} stands twice", where=f"line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: text that looks like `1e-3` is quoted."""


_FLOAT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
