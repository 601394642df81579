"""Which way to compute a run is fastest on this machine: measured on its own steps, remembered.

Which memory format wins depends on network and machine (twice slower or twice faster was seen),
and so does whether a batch is better computed in parts, so nothing is assumed. What was measured
is kept per machine and network in the cache folder, for the next run of the kind.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from convlens import device, engine, feeding, files, optim, trunk
from convlens.data import cache
from convlens.data.batches import Batches
from convlens.device import Plan
from convlens.errors import ResourceError
from convlens.models.freezing import set_train_mode
from convlens.recipe import Recipe

# A timing costs some steps for each candidate; shorter runs can't earn it back.
STEPS_WORTH_TIMING = 400
REMEMBERED = 500  # networks, the latest ones
SMALLEST_PART = 16  # images; below that a CPU's kernels have too little to do


@dataclass(frozen=True)
class Choice:
    """A plan, and the milliseconds a step of each candidate that was timed; none: no need to."""

    plan: Plan
    milliseconds: dict[str, float]


def choose(
    recipe: Recipe,
    where: str,
    model: nn.Module,
    batches_for: Callable[[Plan], Batches],
    objective: engine.Objective,
) -> Choice:
    """The fastest plan that the recipe allows: as measured earlier, or by timing real steps.

    Short runs that nothing is known of go by the first candidate. Of several processes the first
    one chooses for all, while the others wait: by its rows of a batch, and never in parts.

    Args:
        where: device name.
        model: as it begins, frozen as the recipe says; it is copied.
    """
    options = recipe.train
    candidates = [
        plan
        for each in device.plans(
            where, options.precision, options.memory_format, options.deterministic
        )
        for plan in _in_parts(each, model, options.batch_size)
    ]
    batches = batches_for(candidates[0])
    world = batches.world
    if world.size > 1:
        # A mask of dropout is the rows of the whole batch's, not of a part's.
        candidates = [plan for plan in candidates if not plan.part]

    def found() -> list[dict[str, Any]]:
        choice = _chosen(recipe, model, batches, objective, candidates)
        return [choice.plan.to_dict(), choice.milliseconds]

    plan, milliseconds = world.told(found)
    return Choice(Plan(**{**plan, "device": where}), milliseconds)


def _chosen(
    recipe: Recipe,
    model: nn.Module,
    batches: Batches,
    objective: engine.Objective,
    candidates: Sequence[Plan],
) -> Choice:
    """The candidate that was fastest when it was measured, or is now."""
    if len(candidates) == 1:
        return Choice(candidates[0], {})
    key = _key(recipe, batches, model, candidates)
    if known := _remembered().get(key):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            plan = Plan(**known["plan"])
            if plan in candidates:
                return Choice(plan, dict(known["milliseconds"]))
    if len(batches) * int(recipe.train.epochs) < STEPS_WORTH_TIMING:
        return Choice(candidates[0], {})
    trial = _Trial(recipe, model, batches, objective)
    plan, seconds = device.fastest(candidates, trial.step)
    told = {str(each): round(1000 * s, 3) for each, s in zip(candidates, seconds, strict=True)}
    _remember(key, Choice(plan, told))
    return Choice(plan, told)


def _in_parts(plan: Plan, model: nn.Module, batch_size: int) -> list[Plan]:
    """The plan with the batch as a whole, in halves and in quarters, where that changes nothing.

    It changes the statistics of a batch norm that learns. A GPU only gains by larger parts.
    """
    set_train_mode(model)
    mixes = any(
        m.training and isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()
    )
    if plan.device != "cpu" or plan.deterministic or mixes:
        return [plan]
    sizes = [0, *(s for s in (batch_size // 2, batch_size // 4) if s >= SMALLEST_PART)]
    return [replace(plan, part=size) for size in sizes]


class _Trial:
    """Steps on copies of the network: on images, or on what its frozen trunk makes of them."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, batches: Batches, objective: engine.Objective
    ) -> None:
        self.recipe, self.model, self.objective = recipe, model, objective
        self.images, self.labels = next(batches.epoch(0))
        self.prefix = feeding.trunk_of(recipe, model)
        if self.prefix:
            plan = batches.plan
            twin = plan.place(copy.deepcopy(model))
            if trunk.fits_together(twin, self.prefix, self.images[:8]):
                found = trunk.compute(twin, self.prefix, [self.images], self.labels, plan)
                self.images = found.values
            else:
                self.prefix = []

    def step(self, plan: Plan) -> Callable[[], None]:
        """One training step by `plan`, ready to be timed."""
        options = self.recipe.optim
        twin = plan.place(copy.deepcopy(self.model))
        optimiser = optim.build(twin, options)
        part = trunk.tail(twin, self.prefix) if self.prefix else twin
        set_train_mode(part)
        clip = engine.clipper(part, options.clip_value, options.clip_norm)
        images = trunk.as_they_are(self.images, plan)

        def run() -> None:
            engine.step(part, images, self.labels, self.objective, optimiser, plan, clip)

        return run


def _key(recipe: Recipe, batches: Batches, model: nn.Module, candidates: Sequence[Plan]) -> str:
    """All that the time of a step depends on."""
    shapes = [(name, list(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    content = (
        device.describe(candidates[0].device), [str(plan) for plan in candidates],
        recipe.model.name, recipe.model.options, shapes, list(batches.rows.shape[1:]),
        recipe.train.batch_size, recipe.optim.name, recipe.optim.clip_norm, recipe.optim.clip_value,
        feeding.trunk_of(recipe, model), batches.world.size,
    )  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _remembered() -> dict[str, Any]:
    try:
        content = json.loads((cache.folder() / "plans.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(key: str, choice: Choice) -> None:
    """Two processes that do so at once lose one of both entries, which is measured again."""
    entry = {"plan": choice.plan.to_dict(), "milliseconds": choice.milliseconds}
    known = {**_remembered(), key: entry}
    latest = dict(list(known.items())[-REMEMBERED:])
    with contextlib.suppress(ResourceError):  # a cache that can't be written is no cache
        files.write_atomic(cache.folder() / "plans.json", json.dumps(latest, indent=1) + "\n")
