"""Options of a whole command that are read far below it: `--debug`, `--figures` and
`--trust-code`.

They are kept in a `ContextVar`. Writing them to `os.environ` would change them for the whole
process and for every process that it starts. The variables CONVLENS_DEBUG and CONVLENS_FIGURES
belong to the user: they are read here and never written.
"""

from __future__ import annotations

import os
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Options:
    """Options of the current command; None where the command line does not set one."""

    debug: bool | None = None
    figures: str | None = None
    trust_code: bool = False


DEFAULTS = Options()
_current: ContextVar[Options] = ContextVar("convlens_options", default=DEFAULTS)


def update(**changes: Any) -> Token[Options]:
    """Change options of the current context; `reset` with the returned token undoes it."""
    return _current.set(replace(_current.get(), **changes))


def reset(token: Token[Options]) -> None:
    """Restore the options from before the `update` that returned `token`."""
    _current.reset(token)


def debug() -> bool:
    """Return whether errors keep their traceback."""
    option = _current.get().debug
    return bool(os.environ.get("CONVLENS_DEBUG")) if option is None else option


def figures() -> str | None:
    """Return the second format of every figure (`svg`, `pdf`), `none`, or None by default."""
    return _current.get().figures or os.environ.get("CONVLENS_FIGURES") or None


def trust_code() -> bool:
    """Return whether the command was given `--trust-code`."""
    return _current.get().trust_code
