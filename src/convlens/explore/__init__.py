"""`convlens explore`: a local page to try, inspect and correct models.

Each part of the page is a module with its routes, a template, and an ES module in `static/`; a line
in `server.PARTS` adds it. No module of this package imports torch when it is imported, so that the
page is shown before torch is loaded.
"""

from __future__ import annotations

from importlib.util import find_spec

from convlens.errors import UsageError

REQUIRED_PACKAGES = ("starlette", "uvicorn", "python_multipart")


def check_installed(command: str) -> None:
    """Check that the packages of the extra `explore` are installed.

    Raises:
        UsageError: they are not; the message has the command that installs them.
    """
    missing = [name for name in REQUIRED_PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{command} needs packages that are not installed: {', '.join(missing)}",
            fix="pip install 'convlens[explore]'",
        )
