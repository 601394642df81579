"""Options of a command: context variables that override the environment."""

from __future__ import annotations

import os
from contextvars import copy_context

import pytest

from convlens.utils import options


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONVLENS_DEBUG", "CONVLENS_FIGURES"):
        monkeypatch.delenv(name, raising=False)


def test_environment_variables_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (options.debug(), options.figures()) == (False, None)
    monkeypatch.setenv("CONVLENS_DEBUG", "1")
    monkeypatch.setenv("CONVLENS_FIGURES", "svg")
    assert (options.debug(), options.figures()) == (True, "svg")


def test_options_of_the_command_line_override_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONVLENS_DEBUG", "1")
    monkeypatch.setenv("CONVLENS_FIGURES", "svg")
    before = dict(os.environ)
    token = options.update(debug=False, figures="none")
    assert (options.debug(), options.figures()) == (False, "none")
    options.reset(token)
    assert (options.debug(), options.figures()) == (True, "svg")
    assert dict(os.environ) == before


def test_options_apply_to_the_current_context_only() -> None:
    copy_context().run(options.update, figures="pdf")
    assert options.figures() is None
