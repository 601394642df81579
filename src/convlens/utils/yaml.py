"""Read and write recipes as YAML 1.2 with ruamel.yaml; safe types only.

As in YAML 1.1, `yes`, `no`, `on` and `off` are booleans, too: people write them, and recipes of
earlier versions contain them.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convlens.errors import UsageError

if TYPE_CHECKING:
    from ruamel.yaml import YAML

MAX_CHARS = 1 << 17  # of a recipe; the built-in ones have a few thousand
_BOOL = "tag:yaml.org,2002:bool"
_BOOL_WORDS = re.compile(r"(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$")


def read_yaml(path: Path) -> str:
    """Return the text of a recipe file.

    Raises:
        UsageError: it is not a regular file of UTF-8 text, or it is too large or unreadable.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device might never end
            raise UsageError("a recipe is a regular file", where=str(path))
        if status.st_size > MAX_CHARS:
            raise UsageError(f"{status.st_size:,} bytes are too many for a recipe", where=str(path))
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(
            "can't read the recipe: it is not UTF-8 text",
            where=f"{path}, line {line}",
            fix="save it as UTF-8",
        ) from error
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that contains a null byte
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"can't read the recipe: {reason}", where=str(path)) from error


def parse_yaml(content: str, *, where: str) -> Any:
    """Return the value of a YAML text.

    Args:
        where: name of the text for error messages.

    Raises:
        UsageError: it is not valid YAML, or it has a duplicate key. Names the line.
    """
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(content) > MAX_CHARS:
        raise UsageError(f"{len(content):,} characters are too many for a recipe", where=where)
    try:
        value = _yaml().load(content)
        # Refuses circular aliases (`a: &x [*x]`): code that walks a recipe would not terminate.
        json.dumps(value, default=str, skipkeys=True)
    except MarkedYAMLError as error:
        what = error.problem or error.context
        if isinstance(error, DuplicateKeyError):
            what = what.removeprefix("found ").partition(" with value ")[0]
        else:
            what = f"not valid YAML: {what}"
        mark = error.problem_mark or error.context_mark
        at = f"{where}, line {mark.line + 1}" if mark else where
        raise UsageError(_one_line(what), where=at) from error
    except RecursionError as error:
        raise UsageError("not valid YAML: nested too deeply", where=where) from error
    # ValueError: invalid dates and numbers, and circular aliases.
    except (YAMLError, ValueError) as error:
        raise UsageError(f"not valid YAML: {_one_line(str(error))}", where=where) from error
    return value


def key_lines(content: str) -> dict[str, int]:
    """Return the line, counted from 1, of each key and of each key one level below it.

    Returns:
        `{"train": 3, "train.epochs": 4, ...}`; empty if the text is not valid YAML.
    """
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.nodes import MappingNode

    lines: dict[str, int] = {}
    try:
        tree = _yaml().compose(content)
    except (YAMLError, ValueError, RecursionError):
        return lines
    pending = [("", tree)]
    for prefix, node in pending:
        for key, value in node.value if isinstance(node, MappingNode) else ():
            lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            if not prefix:
                pending.append((f"{key.value}.", value))
    return lines


def dump_yaml(tree: Any) -> str:
    """Return YAML text that `parse_yaml` reads back as an equal value, with keys in order."""
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        """Write the line breaks of Unicode as escapes: in single quotes they would be lost."""

        def represent_str(self, data: str) -> Any:
            style = '"' if any(letter in data for letter in "\x85\u2028\u2029") else None
            return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    # On a class of its own: ruamel registers representers for the whole process.
    Representer.add_representer(str, Representer.represent_str)
    yaml = _yaml()
    yaml.Representer = Representer
    yaml.default_flow_style = False
    text = io.StringIO()
    yaml.dump(tree, text)
    return text.getvalue()


def find_invalid(value: Any, key: str = "") -> Iterator[str]:
    """Describe each value that a recipe cannot contain, because YAML would not preserve it."""
    if isinstance(value, Mapping):
        for inner, item in value.items():
            if not isinstance(inner, str):
                yield f"{key}: {shorten(inner)} is not a key; keys are words"
            else:
                yield from find_invalid(inner, f"{key}: a key")
                yield from find_invalid(item, f"{key}.{inner}" if key else inner)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from find_invalid(item, key)
    elif isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            yield f"{key}={shorten(value)}: not valid Unicode text"
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield f"{key}={value}: not a finite number"
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            yield f"{key}: an integer of {value.bit_length()} bits is too large"
    elif value is not None:
        yield f"{key}={shorten(value)}: a recipe cannot contain a {type(value).__name__}"


def shorten(value: Any) -> str:
    """Return a short representation of a value for an error message."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to convert integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _yaml() -> YAML:
    """Return a reader and writer of plain Python values that refuses duplicate keys."""
    from ruamel.yaml import YAML  # takes about 0.1 s, which `convlens --help` does not need

    yaml = YAML(typ="safe", pure=True)  # the C reader supports YAML 1.1 only
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.composer.warn_double_anchors = False
    # The resolver fills its table of a version on first use; entries that were added before that
    # would replace the table.
    resolver = yaml.resolver
    _ = resolver.versioned_resolver
    resolver.add_version_implicit_resolver((1, 2), _BOOL, _BOOL_WORDS, list("yYnNoO"))
    return yaml


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
