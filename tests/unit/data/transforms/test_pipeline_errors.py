"""Invalid augmentations in a recipe: all problems are described in one error."""

from __future__ import annotations

import math
from typing import Any

import pytest

from convlens.data.transforms.pipeline import AUGMENTS, MIXES, build_pipeline
from convlens.errors import UsageError


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("RandomHorizontalFlip", {"p": 1.2}, "p=1.2 should be a number from 0 to 1"),
        ("RandomHorizontalFlip", {"p": True}, "p=True should be"),
        ("RandomHorizontalFlip", {"p": "0.5"}, "p='0.5' should be"),
        ("RandomHorizontalFlip", {"p": math.nan}, "p=nan should be"),
        ("RandomHorizontalFlip", {"probability": 1}, "unknown argument 'probability'"),
        ("RandomCrop", {}, "padding is missing"),
        ("RandomCrop", {"padding": -1}, "padding=-1 should be a whole number"),
        ("RandomCrop", {"padding": 1.5}, "padding=1.5 should be a whole number"),
        ("RandomCrop", {"padding": [1, 2, 3]}, "should be a whole number"),
        ("RandomCrop", {"padding": 28}, "less than the image size 28"),
        ("RandomCrop", {"padding": 2, "padding_mode": "mirror"}, "constant or reflect or edge"),
        ("RandomCrop", {"padding": 2, "fill": 255}, "from 0 (black) to 1 (white)"),
        ("RandomAffine", {}, "degrees is missing"),
        ("RandomAffine", {"degrees": -5}, "degrees=-5 should be"),
        ("RandomAffine", {"degrees": [5, -5]}, "degrees=[5, -5] should be"),
        ("RandomAffine", {"degrees": 5, "translate": [0.1, 1.5]}, "two numbers [x, y] from 0 to 1"),
        ("RandomAffine", {"degrees": 5, "translate": 0.1}, "two numbers [x, y] from 0 to 1"),
        ("RandomAffine", {"degrees": 5, "scale": [1.2, 0.8]}, "scale=[1.2, 0.8] should be"),
        ("RandomAffine", {"degrees": 5, "scale": [0, 1]}, "above 0"),
        ("RandomAffine", {"degrees": 5, "shear": 90}, "from 0 to 89"),
        ("RandomAffine", {"degrees": 5, "interpolation": "cubic"}, "bilinear or nearest"),
        ("RandomErasing", {"scale": [0.5, 1.5]}, "scale=[0.5, 1.5] should be"),
        ("RandomErasing", {"ratio": [0, 1]}, "ratio=[0, 1] should be"),
        ("RandomErasing", {"value": "noise"}, "or random"),
        ("RandomErasing", {"value": [0, 0, 0]}, "one for each channel"),
        ("RandomResizedCrop", {"scale": [0.9, 0.1]}, "scale=[0.9, 0.1] should be"),
        ("ColorJitter", {"hue": 0.6}, "a number from 0 to 0.5"),
        ("ColorJitter", {"brightness": -1}, "a number >= 0"),
        ("ColorJitter", {"contrast": [2, 1]}, "two numbers [low, high] from 0"),
        ("RandomAdjustSharpness", {"sharpness_factor": -1}, "a number >= 0"),
        ("RandomAdjustSharpness", {}, "sharpness_factor is missing"),
        ("AlternatingFlip", {"p": 0.5}, "unknown argument 'p'"),
        ("Cutout", {}, "size is missing"),
        ("Cutout", {"size": 0}, "size=0 should be a whole number >= 1"),
        ("Cutout", {"size": 8.0}, "size=8.0 should be a whole number"),
        ("Cutout", {"size": 29}, "at most the image size 28"),
        ("Cutout", {"size": 8, "value": "random"}, "a number from 0 to 1"),
        ("TrivialAugmentWide", {"num_magnitude_bins": 1}, "a whole number from 2 to 1000"),
        ("TrivialAugmentWide", {"fill": -1}, "from 0 (black) to 1 (white)"),
        ("RandAugment", {"num_ops": 0}, "num_ops=0 should be a whole number from 1 to 100"),
        ("RandAugment", {"magnitude": 31}, "from 0, below num_magnitude_bins (31)"),
        ("RandAugment", {"magnitude": 4, "num_magnitude_bins": 4}, "num_magnitude_bins (4)"),
        ("RandAugment", {"magnitude": True}, "a whole number from 0"),
        ("RandAugment", {"num_magnitude_bins": "many"}, "a whole number from 2 to 1000"),
        ("MixUp", {"alpha": 0}, "alpha=0 should be a number above 0"),
        ("MixUp", {"alpha": math.inf}, "a number above 0"),
        ("MixUp", {"p": -0.1}, "p=-0.1 should be a number from 0 to 1"),
        ("CutMix", {"alpha": -1}, "alpha=-1 should be a number above 0"),
        ("CutMix", {"alhpa": 1}, "did you mean alpha?"),
    ],
)
def test_invalid_arguments_are_described(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_pipeline([(name, arguments)], image_size=28, channels=1)
    assert says in caught.value.what
    assert caught.value.what.startswith(name)
    takes = ", ".join({**AUGMENTS, **MIXES}[name].rules) or "no arguments"
    assert caught.value.fix == f"{name} takes {takes}"


def test_all_problems_are_reported_at_once() -> None:
    ops: list[tuple[str, dict[str, Any]]] = [
        ("RandomHorizontalFlop", {}),
        ("RandomCrop", {"padding": -1, "fil": 0}),
        ("RandomErasing", {"p": 2, "scale": [1, 0], "ratio": 3, "value": 7}),
    ]
    with pytest.raises(UsageError) as caught:
        build_pipeline(ops)
    text = str(caught.value)
    assert "did you mean RandomHorizontalFlip" in text
    assert "did you mean fill?" in text
    assert "padding=-1" in text
    assert "and 2 more" in text
    assert "RandomErasing takes p, scale, ratio, value" in text
    assert len(text.splitlines()) <= 5


@pytest.mark.parametrize("mix", list(MIXES))
def test_mixing_operations_must_come_last(mix: str) -> None:
    with pytest.raises(UsageError, match=f"{mix} mixes .* it must come last"):
        build_pipeline([(mix, {}), ("RandomHorizontalFlip", {})])
    both = build_pipeline([("RandomHorizontalFlip", {}), ("CutMix", {}), ("MixUp", {"alpha": 0.2})])
    assert [name for name, _ in both.steps] == ["RandomHorizontalFlip"]
    assert [name for name, _ in both.mixes] == ["CutMix", "MixUp"]
