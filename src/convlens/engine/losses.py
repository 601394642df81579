"""Registry of losses, and `build_loss`, which builds one from a recipe's `optim` section.

To add a loss, write a function and add one line to `LOSSES`. The function takes a `LossInputs` and
the options of the loss as keyword-only arguments, which are read from `optim.loss_options`.
`tests/integration/test_contracts.py` tests every entry. Other names are losses of the user
(`FILE.py:NAME`).

Unlike in `torch.nn.CrossEntropyLoss(weight=...)`, the mean is over the rows and not over their
weights, so that the losses of micro-batches and of several processes, weighted by their rows, add
up to the loss of the whole batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor, nn

from convlens import user_code
from convlens.errors import UsageError, close_matches, did_you_mean_suffix, lookup
from convlens.recipe import OptimConfig
from convlens.utils.console import print_once


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
        losses = self.class_losses(logits)
        if targets.ndim == 2:
            weighted = targets if self.weights is None else targets * self.weights
            return (weighted * losses).sum(1).mean()
        rows = losses.gather(1, targets.unsqueeze(1)).squeeze(1)
        return (rows if self.weights is None else rows * self.weights[targets]).mean()

    def class_losses(self, logits: Tensor) -> Tensor:
        """Return the loss of each row for each class, if it were the label: `[B, K]`."""
        log_probs = logits.log_softmax(1)
        losses = -log_probs
        if self.gamma:
            losses = losses * _power_of_complement(log_probs, self.gamma)
        if self.label_smoothing:
            evenly = losses.mean(1, keepdim=True)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * evenly
        return losses


class LogitAdjustedLoss(ClassificationLoss):
    """Cross-entropy of `logits + tau * log(prior)`.

    The network learns logits without the prior, so that its predictions count all classes equally.
    The logits are adjusted in the loss only, so evaluation and prediction need no change.

    Menon, Jayasumana, Rawat, Jain, Veit, Kumar 2021, Long-Tail Learning via Logit Adjustment,
    equation 10.

    Args:
        priors: share of each class in what is trained on, `[K]`, all above 0.
        tau: 1 is consistent for the balanced error.
        weights, label_smoothing: as for `ClassificationLoss`.
    """

    def __init__(
        self,
        priors: Sequence[float],
        *,
        tau: float = 1.0,
        weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing=label_smoothing)
        self.adjustment: Tensor
        self.register_buffer("adjustment", torch.tensor([tau * math.log(p) for p in priors]))

    def class_losses(self, logits: Tensor) -> Tensor:
        return super().class_losses(logits + self.adjustment)


class AsymmetricLoss(ClassificationLoss):
    """Cross-entropy with smoothed labels whose terms have one exponent for the label, one for rest.

    The term of the label is multiplied by `(1 - p)^gamma_pos`, and those of the other classes,
    which have the share `label_smoothing / K` each, by `p^gamma_neg`: classes that already have a
    small probability are not raised any more.

    Ridnik, Ben-Baruch, Zamir, Noy, Friedman, Protter, Zelnik-Manor 2021, Asymmetric Loss for
    Multi-Label Classification; this is `ASLSingleLabel` of the authors' program (Alibaba-MIIL/ASL).

    Args:
        gamma_pos: exponent for the label.
        gamma_neg: exponent for the other classes.
        weights: as for `ClassificationLoss`.
        label_smoothing: share of each label that is distributed evenly over all classes. With 0 the
            other classes have no terms.
    """

    def __init__(
        self,
        weights: Sequence[float] | None = None,
        *,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__(weights, label_smoothing=label_smoothing)
        self.gamma_pos, self.gamma_neg = gamma_pos, gamma_neg

    def class_losses(self, logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(1)
        as_label = as_other = -log_probs
        if self.gamma_pos:
            as_label = as_label * _power_of_complement(log_probs, self.gamma_pos)
        if self.gamma_neg:
            as_other = as_other * (self.gamma_neg * log_probs).exp()
        share = self.label_smoothing / logits.shape[1]
        others = as_other.sum(1, keepdim=True) - as_other
        return (1 - self.label_smoothing + share) * as_label + share * others


def _power_of_complement(log_probs: Tensor, exponent: float) -> Tensor:
    """Return `(1 - p)^exponent`, without cancellation."""
    # The power has no finite derivative at 0 for exponents below 1.
    complement = -torch.expm1(log_probs)
    return complement.clamp_min(torch.finfo(complement.dtype).tiny) ** exponent


@dataclass(frozen=True)
class LossInputs:
    """What a loss may depend on, besides its own options.

    Attributes:
        config: the recipe's section `optim`.
        counts: images of each class in an epoch; fractions if the sampling is random.
        class_weights: the factors requested by `optim.class_weights`, with a mean of 1 over the
            images of an epoch; None if there are none.
    """

    config: OptimConfig
    counts: Sequence[float]
    class_weights: Sequence[float] | None = None


def _cross_entropy(inputs: LossInputs) -> nn.Module:
    smoothing = inputs.config.label_smoothing
    if inputs.class_weights is None:
        return nn.CrossEntropyLoss(label_smoothing=smoothing)
    return ClassificationLoss(inputs.class_weights, label_smoothing=smoothing)


def _focal(inputs: LossInputs) -> nn.Module:
    config = inputs.config
    return ClassificationLoss(
        inputs.class_weights, gamma=config.focal_gamma, label_smoothing=config.label_smoothing
    )


def _class_balanced(
    inputs: LossInputs, *, beta: float = 0.999, gamma: float = 0.0
) -> ClassificationLoss:
    _check_option("beta", beta, at_least=0, below=1)
    _check_option("gamma", gamma, at_least=0)
    if inputs.class_weights is not None:
        raise UsageError(
            "optim.loss=class_balanced has class weights of its own: optim.class_weights is set",
            fix="leave out optim.class_weights, or set optim.loss=cross_entropy",
        )
    weights = class_balanced_weights(inputs.counts, beta)
    return ClassificationLoss(weights, gamma=gamma, label_smoothing=inputs.config.label_smoothing)


def _logit_adjusted(inputs: LossInputs, *, tau: float = 1.0) -> LogitAdjustedLoss:
    _check_option("tau", tau, at_least=0)
    counts = [max(count, 1.0) for count in inputs.counts]  # of a class without images, too
    return LogitAdjustedLoss(
        [count / sum(counts) for count in counts],
        tau=tau,
        weights=inputs.class_weights,
        label_smoothing=inputs.config.label_smoothing,
    )


def _asymmetric(
    inputs: LossInputs, *, gamma_pos: float = 0.0, gamma_neg: float = 4.0
) -> AsymmetricLoss:
    _check_option("gamma_pos", gamma_pos, at_least=0)
    _check_option("gamma_neg", gamma_neg, at_least=0)
    if not inputs.config.label_smoothing:
        raise UsageError(
            "optim.loss=asymmetric without optim.label_smoothing has no terms for gamma_neg",
            fix="set optim.label_smoothing=0.1, as its authors do",
        )
    return AsymmetricLoss(
        inputs.class_weights,
        gamma_pos=gamma_pos,
        gamma_neg=gamma_neg,
        label_smoothing=inputs.config.label_smoothing,
    )


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "asymmetric": _asymmetric,
    "class_balanced": _class_balanced,
    "cross_entropy": _cross_entropy,
    "focal": _focal,
    "logit_adjusted": _logit_adjusted,
}


def build_loss(inputs: LossInputs) -> nn.Module:
    """Build the loss that a recipe describes.

    It maps logits `[B, K]` and targets, int64 `[B]` or float32 `[B, K]`, to the mean over the rows.

    Raises:
        UsageError: unknown loss or options, with near misses, or an unsuitable value.
    """
    config = inputs.config
    if is_user_loss(config.loss):
        return _build_user_loss(inputs)
    make = lookup(LOSSES, config.loss, "loss")
    _check_options(config)
    return make(inputs, **config.loss_options)


def is_user_loss(name: str) -> bool:
    """Return whether a name means a loss that a user wrote."""
    return name not in LOSSES and user_code.is_user_code("losses", name)


class FunctionLoss(nn.Module):
    """A loss that is a function `(logits, targets, **options) -> mean over the rows`."""

    def __init__(self, function: Callable[..., Tensor], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, dict(options)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.function(logits, targets, **self.options)


def _build_user_loss(inputs: LossInputs) -> nn.Module:
    """Build the loss of a user: an `nn.Module` class, or a function of logits and targets.

    A class is called with those of the keywords `num_classes`, `class_counts`, `class_weights` and
    `label_smoothing` that its signature names, and with the options; a function gets the options
    with each call.
    """
    config, name = inputs.config, inputs.config.loss
    part = user_code.load_object("losses", name)
    keywords, takes_any = user_code.accepted_keywords(part)
    if not isinstance(part, type):
        own = dict(list(keywords.items())[2:])  # after logits and targets
        if not takes_any:
            user_code.check_options(f"loss {name}", own, config.loss_options)
        return FunctionLoss(part, config.loss_options)
    standard = {
        "num_classes": len(inputs.counts),
        "class_counts": list(inputs.counts),
        "class_weights": inputs.class_weights,
        "label_smoothing": config.label_smoothing,
    }
    own = {key: value for key, value in keywords.items() if key not in standard}
    if not takes_any:
        user_code.check_options(f"loss {name}", own, config.loss_options)
    given = user_code.select_keywords(part, standard)
    try:
        loss = part(**given, **config.loss_options)
    except Exception as error:
        raise user_code.part_error("losses", name, error) from error
    if not isinstance(loss, nn.Module):
        raise UsageError(
            f"loss {name}: an object of type {type(loss).__name__!r} is not a torch.nn.Module",
            fix="name an nn.Module class, or a function of logits and targets",
        )
    return loss


def check_user_loss(name: str, loss: nn.Module, classes: int, *, soft: bool = False) -> bool:
    """Compute the loss of a user for a few rows.

    Args:
        soft: with class probabilities as targets, as MixUp and CutMix make them.

    Returns:
        Whether it is a mean over the rows, so that micro-batches and processes add up to a batch.

    Raises:
        UsageError: an exception in its code, or a result that is not one finite number.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, classes, generator=generator).requires_grad_()
    targets = torch.arange(6) % classes
    if soft:
        targets = nn.functional.one_hot(targets, classes).float()
        targets = targets.lerp(targets.flip(0), 0.25)
    try:
        whole = loss(logits, targets)
        parts = [loss(logits[rows], targets[rows]) for rows in (slice(0, 4), slice(4, 6))]
    except Exception as error:
        reason = "does not accept class probabilities [N, K], which MixUp and CutMix make: "
        fix = "leave out MixUp and CutMix, or accept float targets [N, K]"
        raise user_code.part_error(
            "losses", name, error, reason=reason * soft, fix=fix * soft
        ) from error
    if not isinstance(whole, Tensor) or whole.shape != ():
        shape = list(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
        raise UsageError(
            f"loss {name}: returned {shape}, not one number", fix="return the mean over the rows"
        )
    if not whole.requires_grad or not bool(torch.isfinite(whole)):
        reason = "a result without a gradient" if not whole.requires_grad else f"{whole.item()}"
        raise UsageError(f"loss {name}: returned {reason}", fix="compute it from the logits")
    added = (4 * parts[0] + 2 * parts[1]) / 6
    return bool(torch.isclose(added, whole, rtol=1e-4, atol=1e-6))


def loss_options(name: str) -> dict[str, Any]:
    """Return the options of a loss of the table with their default values.

    Raises:
        UsageError: unknown loss, with near misses.
    """
    parameters = inspect.signature(lookup(LOSSES, name, "loss")).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_loss(config: OptimConfig, *, mixes: bool = False) -> None:
    """Check the name of the loss and its options without images.

    Args:
        mixes: whether the targets are class probabilities.

    Raises:
        UsageError: lists options that the loss does not have, with near misses, and unsuitable
            values.
    """
    weights = None if config.class_weights == "none" else [1.0, 1.0]
    loss = build_loss(LossInputs(config, counts=[1.0, 1.0], class_weights=weights))
    if not is_user_loss(config.loss):
        return
    if mixes:
        check_user_loss(config.loss, loss, 2, soft=True)
    if not check_user_loss(config.loss, loss, 2):
        print_once(
            f"loss {escape(config.loss)} is not a mean over the rows: memory limits and several "
            "processes, which split batches, change it"
        )


def _check_options(config: OptimConfig) -> None:
    """Refuse options that the loss does not have."""
    known = loss_options(config.loss)
    unknown = [key for key in config.loss_options if key not in known]
    if unknown:
        names = [f"{key!r}{did_you_mean_suffix(close_matches(key, known))}" for key in unknown]
        raise UsageError(
            f"optim.loss_options: the loss {config.loss} has no option {', '.join(names)}",
            fix=f"options of {config.loss}: {', '.join(known) or 'none'}",
        )
    default = type(config).model_fields["focal_gamma"].default
    if config.loss != "focal" and config.focal_gamma != default:
        raise UsageError(
            f"optim.focal_gamma={config.focal_gamma:g} has no effect with optim.loss={config.loss}",
            fix="set optim.loss=focal, or leave out optim.focal_gamma",
        )


def _check_option(name: str, value: Any, *, at_least: float, below: float = math.inf) -> None:
    """Refuse a value of `optim.loss_options` that is not a number in a range."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not at_least <= value < below:
        limit = f", below {below:g}" if below < math.inf else ""
        raise UsageError(
            f"optim.loss_options: {name}={value!r} is not a number of at least {at_least:g}{limit}"
        )


def loss_of_guessing(config: OptimConfig, classes: int) -> float:
    """Return the loss of equal logits for all classes, if all have equally many images."""
    loss = build_loss(LossInputs(config, counts=[1.0] * classes)).double()
    logits = torch.zeros(1, classes, dtype=torch.float64)
    return float(loss(logits, torch.zeros(1, dtype=torch.int64)))


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


def class_balanced_weights(counts: Sequence[float], beta: float) -> list[float]:
    """Return class weights by the effective number of images; their mean over rows is 1.

    Further images of a class add less and less: n images count as `(1 - beta^n) / (1 - beta)`,
    at most `1 / (1 - beta)`. The weight of a class is the inverse of that; 0 for a class without
    images.

    Cui, Jia, Lin, Song, Belongie 2019, Class-Balanced Loss Based on Effective Number of Samples,
    equation 10. They scale the weights to a sum of K.

    Args:
        counts: images of each class in an epoch.
        beta: from 0 (equal weights) to almost 1 (inverse frequencies).
    """
    weights = [(1 - beta) / (1 - beta**count) if count > 0 else 0.0 for count in counts]
    return normalized_weights(weights, counts)
