"""YAML as recipes use it: safe, without duplicate keys, and with `1e-3` as a number."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from convlens.errors import UsageError


def parse(content: str, *, where: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        UsageError: no valid YAML, or a key that stands twice.
    """
    try:
        return yaml.load(content, Loader=_Loader)  # a SafeLoader
    except UsageError:
        raise
    # Values that look like dates or numbers and are none, and nesting without end, too.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"no valid YAML: {' '.join(str(error).split())}", where=where) from error


def dump(tree: Any) -> str:
    """YAML that `parse` reads back as an equal value; keys stay in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys: PyYAML silently keeps the last one.

    `1e-3` is a number, as in YAML 1.2; PyYAML goes by 1.1, where it is text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise UsageError(f"{key!r} can't be a key")
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UsageError(f"key {key!r} stands twice", where=f"line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: text that looks like `1e-3` is quoted."""


_FLOAT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
