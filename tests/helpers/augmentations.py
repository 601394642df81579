"""Shared by the tests of pipeline and others."""

from __future__ import annotations

from typing import Any

# A strong setting of every operation; each name of the table must be here.
STRONG: dict[str, dict[str, Any]] = {
    "RandomHorizontalFlip": {"p": 0.5},
    "RandomVerticalFlip": {"p": 0.5},
    "RandomCrop": {"padding": 4, "padding_mode": "reflect"},
    "RandomResizedCrop": {"scale": [0.2, 1.0]},
    "RandomAffine": {"degrees": 40, "translate": [0.2, 0.1], "scale": [0.7, 1.3], "shear": 20},
    "RandomRotation": {"degrees": 45},
    "RandomErasing": {"p": 0.8, "value": 0.5},
    "ColorJitter": {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2},
    "RandomAdjustSharpness": {"sharpness_factor": 3.0},
    "RandomGrayscale": {"p": 0.5},
    "AlternatingFlip": {},
    "Cutout": {"size": 6, "p": 0.8, "value": [0.2, 0.4, 0.6]},
    "TrivialAugmentWide": {},
    "RandAugment": {"num_ops": 3, "magnitude": 20, "interpolation": "bilinear"},
}
