"""The built-in digits without scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from convlens.data import sources


def test_digits_are_the_same_without_the_file_of_scikit_learn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = sources.find_source("digits").parts["train"].images
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    fallback = sources.find_source("digits").parts["train"]
    index = np.arange(1797)
    assert not isinstance(images, list)
    assert not isinstance(fallback.images, list)
    np.testing.assert_array_equal(images[index], fallback.images[index])
