"""What `auto` in a recipe means, once the images are known.

Each rule is one line with its reason; the values chosen are written into the run's recipe, which
then trains the same without any rule.
"""

from __future__ import annotations

from typing import Any

from convlens.recipe import Recipe

# Images to look at in a whole training: about 3 minutes of the `folder` network on two cores at
# 64 px; more epochs were not worth their time on sets of some thousand photographs (docs/log.md).
IMAGES_TO_SEE = 130_000
EPOCHS = (8, 60)


def resolve(recipe: Recipe, *, images: int, image_size: int, channels: int) -> Recipe:
    """The recipe with every `auto` about data, augmentation and length replaced.

    Args:
        images: training images.
        image_size, channels: what the loaded data has, pixels and 1 or 3.
    """
    changes: dict[str, Any] = {"data.image_size": image_size, "data.channels": channels}
    if recipe.augment == "auto":
        changes["augment"] = augmentation(image_size, channels)
    if recipe.train.epochs == "auto":
        changes["train.epochs"] = min(max(round(IMAGES_TO_SEE / images), EPOCHS[0]), EPOCHS[1])
    return recipe.replace(**changes)


def augmentation(image_size: int, channels: int) -> list[dict[str, dict[str, Any]]]:
    """Mild for grey images (often digits, scans: a mirror image may be another class)."""
    if channels == 1:
        return [{"RandomAffine": {"degrees": 10, "translate": [0.1, 0.1], "scale": [0.9, 1.1]}}]
    if image_size <= 32:  # objects fill the picture: shift, don't zoom
        return [
            {"RandomHorizontalFlip": {}},
            {"RandomCrop": {"padding": max(1, image_size // 8), "padding_mode": "reflect"}},
        ]
    return [
        {"RandomHorizontalFlip": {}},
        {"RandomResizedCrop": {"scale": [0.4, 1.0], "ratio": [0.75, 1.3333]}},
        {"ColorJitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}},
    ]
