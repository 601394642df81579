"""Every name and option of a recipe tried before any image is read."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from convlens import models, optim
from convlens.data import augment, opening
from convlens.errors import UsageError
from convlens.models import freezing
from convlens.recipe import Recipe
from convlens.starting import weights


def check(recipe: Recipe) -> None:
    """Tries every name and option of a recipe before any image is read.

    Raises:
        UsageError: all that is wrong at once.
    """
    size = recipe.data.image_size if recipe.data.image_size != "auto" else 224
    channels = recipe.data.channels if recipe.data.channels != "auto" else 3
    net = recipe.model

    built: list[nn.Module] = []

    def try_model() -> None:
        model = models.try_out(net.name, channels, size, net.options, recipe.train.batch_size)
        freezing.freeze(model, net.trainable)
        built.append(model)

    def check_optimiser() -> None:
        if built:
            optim.check(built[0], recipe.optim)
        else:  # what doesn't depend on the network can still be told
            rest = {"groups": [], "layer_decay": 1.0, "head_first": 0.0}
            optim.check(nn.Linear(1, 1), recipe.optim.model_copy(update=rest))

    tries: list[Callable[[], object]] = [
        lambda: opening.check(recipe.data),
        lambda: _check_choice(recipe),
        try_model,
        lambda: weights.check(net),
        lambda: augment.build(recipe.operations),
        check_optimiser,
        lambda: optim.schedule(recipe.optim),
        lambda: optim.averager(nn.Module(), recipe.optim, steps=1),
    ]
    found: list[UsageError] = []
    for attempt in tries:
        try:
            attempt()
        except UsageError as error:
            found.append(error)
    if found:
        fix = "; ".join(error.fix for error in found if error.fix)
        raise UsageError("; ".join(error.what for error in found), where=recipe.name, fix=fix)


def _check_choice(recipe: Recipe) -> None:
    """Without a validation split there is nothing to choose an epoch by."""
    wrong = [f"train.keep={recipe.train.keep}"] if recipe.train.keep != "last" else []
    if recipe.train.patience is not None:
        wrong.append(f"train.patience={recipe.train.patience}")
    if wrong and not recipe.data.validates:
        raise UsageError(
            f"data.val_fraction=0 leaves no validation split, but {' and '.join(wrong)} needs one",
            fix="set train.keep=last train.patience=null, or let --refit find the epochs first",
        )
