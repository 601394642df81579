"""JSON objects and bytes that carry a hash of what they say, so that damage is seen.

A hash in the file guards against disks and half copies, not against a hand that writes a new
hash; nor does it hold up a person who wants to change a file: the error says what to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

FORMAT = 1
_KEYS = ("format", "sha256")
_DIGEST = 32  # bytes


class Changed(ValueError):  # noqa: N818 - caught and told in the words of the file it is
    """What is read isn't what was written."""


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` behind its format and its SHA-256."""
    # Through JSON and back first: tuples become lists, and keys text, as they will be read.
    plain = json.loads(json.dumps({k: v for k, v in content.items() if k not in _KEYS}))
    return {"format": FORMAT, "sha256": _digest(plain), **plain}


def unseal(content: Any) -> dict[str, Any]:
    """The content that `seal` was given.

    An object with neither of the two keys was written before there was a seal, and is taken as it
    is. (Damage to one byte leaves one of them.)

    Raises:
        Changed: it is another one now; or a newer version wrote it.
    """
    if not isinstance(content, dict):
        raise Changed("it is no object")
    found = [key for key in _KEYS if key in content]
    if not found:
        return content
    plain = {k: v for k, v in content.items() if k not in _KEYS}
    if len(found) < len(_KEYS) or content["sha256"] != _digest(plain, content["format"]):
        raise Changed("it was changed or damaged after it was written (its hash differs)")
    if content["format"] != FORMAT:
        raise Changed(f"a newer convlens wrote it (format {content['format']!r})")
    return plain


def seal_bytes(content: bytes) -> bytes:
    """`content` with its SHA-256 behind it."""
    return content + hashlib.sha256(content).digest()


def unseal_bytes(content: bytes) -> bytes:
    """The bytes that `seal_bytes` was given.

    Raises:
        Changed: other ones, or none.
    """
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        raise Changed("it was changed or damaged after it was written (its hash differs)")
    return body


def _digest(plain: Mapping[str, Any], form: Any = FORMAT) -> str:
    # ASCII: half characters in file names have no UTF-8.
    text = json.dumps([form, plain], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
