"""A finished run is found without checking its recipe again."""

from __future__ import annotations

import pytest

from convlens import recipe
from convlens.training import train as training_train
from helpers.support import tiny


def test_finished_run_is_found_before_its_recipe_is_validated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requested = tiny("train.epochs=1")
    run_dir = training_train.train(requested, is_unmodified_recipe=True, test=False, quiet=True)

    def check(checked: recipe.Recipe) -> None:
        raise AssertionError("validated again")

    monkeypatch.setattr(training_train, "validate_recipe", check)
    assert (
        training_train.train(requested, is_unmodified_recipe=True, test=False, quiet=True).path
        == run_dir.path
    )
    with pytest.raises(AssertionError, match="validated again"):
        training_train.train(
            tiny("train.epochs=2"), is_unmodified_recipe=True, test=False, quiet=True
        )
