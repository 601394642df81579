from __future__ import annotations

import pytest

from convlens import explore
from convlens.errors import UsageError


def test_packages_of_the_extra_are_installed_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    explore.check_installed("explore")
    monkeypatch.setattr(explore, "REQUIRED_PACKAGES", ("no_such_package", "starlette"))
    with pytest.raises(
        UsageError, match="serve needs packages that are not installed: no_such_package"
    ):
        explore.check_installed("serve")
