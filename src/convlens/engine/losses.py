"""The loss of a training: cross-entropy or focal loss, with class weights.

Unlike in `torch.nn.CrossEntropyLoss(weight=...)`, the mean is over the rows and not over their
weights, so that the losses of micro-batches and of several processes, weighted by their rows, add
up to the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassificationLoss(nn.Module):
    """Weighted sum of the losses of the rows, divided by the number of rows.

    The loss of a row with class `c` is `weight[c]` times its focal loss, which is cross-entropy
    for `gamma` 0. Label smoothing is applied within a class, so that it does not raise the
    probabilities of classes with large weights. For class probabilities (MixUp, CutMix) the loss
    of a row is the mean of the losses for each class, weighted by them.

    Lin, Goyal, Girshick, He, Dollár 2017, Focal Loss for Dense Object Detection, equation 4, with
    the softmax in place of the sigmoid.

    Args:
        weights: of the classes, `[K]`; None for equal weights.
        gamma: exponent of the focal loss; a class predicted with probability p has the loss
            `-(1 - p)^gamma * log(p)`.
        label_smoothing: share of each label that is distributed evenly over all classes.
    """

    def __init__(
        self,
        weights: Sequence[float] | None = None,
        *,
        gamma: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.weights: Tensor | None
        self.register_buffer("weights", None if weights is None else torch.tensor(weights))
        self.gamma, self.label_smoothing = gamma, label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch, 0-d.

        Args:
            logits: float32 `[B, K]`.
            targets: int64 `[B]`, or float32 `[B, K]` probabilities.
        """
        log_probs = logits.log_softmax(1)
        losses = -log_probs  # [B, K]: of each class, if it were the label
        if self.gamma:
            # 1 - p without cancellation. Its power has no finite derivative at 0 for gamma < 1.
            complement = -torch.expm1(log_probs)
            losses = losses * complement.clamp_min(torch.finfo(losses.dtype).tiny) ** self.gamma
        if self.label_smoothing:
            evenly = losses.mean(1, keepdim=True)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * evenly
        if targets.ndim == 2:
            weighted = targets if self.weights is None else targets * self.weights
            return (weighted * losses).sum(1).mean()
        rows = losses.gather(1, targets.unsqueeze(1)).squeeze(1)
        return (rows if self.weights is None else rows * self.weights[targets]).mean()


def balanced_weights(frequencies: Sequence[float]) -> list[float]:
    """Return class weights with which all classes count equally; their mean over rows is 1.

    The weight of a class is `n / (K * n_c)`, as by scikit-learn's `class_weight="balanced"`, where
    K counts the classes that occur. A class that does not occur gets 0.

    Args:
        frequencies: images of each class, or shares of them.
    """
    total, present = sum(frequencies), sum(f > 0 for f in frequencies)
    return [total / (present * f) if f > 0 else 0.0 for f in frequencies]


def normalized_weights(weights: Sequence[float], frequencies: Sequence[float]) -> list[float]:
    """Return class weights scaled to a mean of 1 over rows with these class frequencies."""
    mean = sum(w * f for w, f in zip(weights, frequencies, strict=True)) / sum(frequencies)
    return [w / mean for w in weights]
