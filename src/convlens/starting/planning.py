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
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from convlens import device, engine, optim
from convlens.data import cache
from convlens.data.batches import Batches
from convlens.device import Plan
from convlens.distributed.processes import ALONE, World
from convlens.errors import ResourceError, UsageError
from convlens.models.freezing import set_train_mode
from convlens.recipe import Recipe
from convlens.starting import feeding, trunk
from convlens.stepping import graphs
from convlens.stepping.memory import OutOfMemory, uses_batch_statistics
from convlens.system import files, sealing

# A timing costs some steps for each candidate; shorter runs can't earn it back.
STEPS_WORTH_TIMING = 400
REMEMBERED = 500  # networks, the latest ones
TOO_SLOW = 1.6  # times the fastest
SMALLEST_PART = 16  # images; below that a CPU's kernels have too little to do


@dataclass(frozen=True)
class Choice:
    """A plan, and the milliseconds a step of each candidate that was timed; none: no need to."""

    plan: Plan
    milliseconds: dict[str, float]


def check(recipe: Recipe, where: str, processes: int = 1) -> None:
    """Refuses what is asked for and this device hasn't; before images are read.

    Raises:
        UsageError: precision or compilation that can't be had.
    """
    options = recipe.train
    plans = device.plans(where, options.precision, options.memory_format, options.deterministic)
    if options.compile == "graph" and processes > 1:
        raise UsageError(
            "train.compile=graph: a recorded step can't hear what other processes say",
            fix="use train.compile=auto or true, or one process",
        )
    if options.compile != "auto":
        _stated(plans[0], options.compile)


def choose(
    recipe: Recipe,
    where: str,
    model: nn.Module,
    batches_for: Callable[[Plan], Batches],
    objective: engine.Objective,
    world: World = ALONE,
) -> Choice:
    """The fastest plan that the recipe allows: as measured earlier, or by timing real steps.

    Short runs that nothing is known of go by the first candidate. Of several processes the first
    one chooses, while the others wait.

    Args:
        where: device name.
        model: as it begins, frozen as the recipe says; it is copied.

    Raises:
        UsageError: something is asked for that this device hasn't.
    """
    found = world.told(lambda: asdict(_chosen(recipe, where, model, batches_for, objective, world)))
    return Choice(Plan(**{**found["plan"], "device": where}), found["milliseconds"])


def _chosen(
    recipe: Recipe,
    where: str,
    model: nn.Module,
    batches_for: Callable[[Plan], Batches],
    objective: engine.Objective,
    world: World,
) -> Choice:
    asked = recipe.train.compile
    check(recipe, where, world.size)
    choice = _format(recipe, where, model, batches_for, objective, several=world.size > 1)
    if asked != "auto":
        return replace(choice, plan=_stated(choice.plan, asked))
    if world.size > 1:
        return choice
    batches = batches_for(choice.plan)
    steps = len(batches) * int(recipe.train.epochs)
    if steps < STEPS_WORTH_TIMING or not graphs.possible(choice.plan):
        return choice
    trial = _Trial(recipe, model, batches, objective)
    shapes = len(set(batches.sizes))
    return replace(choice, plan=graphs.choose(choice.plan, trial.step, steps, shapes=shapes))


def _stated(plan: Plan, asked: bool | str) -> Plan:
    """The plan with steps taken as `train.compile` states."""
    if asked == "graph" and not graphs.possible(plan):
        raise UsageError(
            f"train.compile=graph: CUDA graphs need an NVIDIA GPU, and the device is {plan.device}",
            fix="use train.compile=auto or true",
        )
    return replace(plan, step="graph" if asked == "graph" else "compiled" if asked else "eager")


def _format(
    recipe: Recipe,
    where: str,
    model: nn.Module,
    batches_for: Callable[[Plan], Batches],
    objective: engine.Objective,
    *,
    several: bool,
) -> Choice:
    """The choice among precisions, memory formats and parts of a batch."""
    options = recipe.train
    candidates = [
        plan
        for each in device.plans(
            where, options.precision, options.memory_format, options.deterministic
        )
        for plan in _in_parts(each, model, options.batch_size, several)
    ]
    batches = batches_for(candidates[0])
    if len(candidates) == 1:
        return Choice(candidates[0], {})
    key = _key(recipe, batches, model, candidates)
    if known := _remembered().get(key):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            plan = Plan(**known["plan"])
            if plan in candidates:
                return Choice(plan, dict(known["milliseconds"]))
    if len(batches) * int(options.epochs) < STEPS_WORTH_TIMING:
        return Choice(candidates[0], {})
    trial = _Trial(recipe, model, batches, objective)
    plan, seconds = fastest(candidates, trial.step)
    timed = zip(candidates, seconds, strict=True)
    told = {str(each): round(1000 * s, 3) for each, s in timed if math.isfinite(s)}
    _remember(key, Choice(plan, told))
    return Choice(plan, told)


def _in_parts(plan: Plan, model: nn.Module, batch_size: int, several: bool) -> list[Plan]:
    """The plan with the batch as a whole, in halves and in quarters, where that changes nothing.

    It changes the statistics of a batch norm that learns; several processes share a batch
    already. A GPU only gains by larger parts.
    """
    set_train_mode(model)
    if plan.device != "cpu" or plan.deterministic or uses_batch_statistics(model) or several:
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

    def step(self, plan: Plan) -> Callable[[], Tensor]:
        """One training step by `plan`, ready to be timed; it returns the loss."""
        options = self.recipe.optim
        twin = plan.place(copy.deepcopy(self.model))
        optimiser = optim.build(twin, options)
        part = trunk.tail(twin, self.prefix) if self.prefix else twin
        set_train_mode(part)
        clip = engine.clipper(part, options.clip_value, options.clip_norm)
        images = trunk.as_they_are(self.images, plan)
        take: engine.Take = partial(
            engine.step, graphs.compiled(part, plan.device) if plan.step == "compiled" else part,
            objective=self.objective, optimiser=optimiser, plan=plan, clip=clip,
        )  # fmt: skip
        take = graphs.Captured(take, optimiser) if plan.step == "graph" else take

        def run() -> Tensor:
            loss, _ = take(images, self.labels)
            assert loss is not None
            return loss

        return run


def fastest(
    candidates: Sequence[Plan], trial: Callable[[Plan], Callable[[], object]], rounds: int = 5
) -> tuple[Plan, list[float]]:
    """The candidate whose step is fastest, and each one's seconds a step.

    `trial(plan)` prepares and returns a function that does one training step. Medians of
    interleaved rounds; who is far behind after two takes no part in the others. A later
    candidate must win by 5%: noise must not choose lower precision. What there is no memory for
    takes for ever.
    """
    steps = [trial(plan) for plan in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    for turn in range(rounds + 1):
        quickest = min((min(spent) for spent in times if spent), default=math.inf)
        for step, spent in zip(steps, times, strict=True):
            if len(spent) > 1 and min(spent) > TOO_SLOW * quickest:
                continue
            start = time.perf_counter()
            end = math.inf
            with contextlib.suppress(OutOfMemory):
                step()
                device.synchronise(candidates[0].device)
                end = time.perf_counter()
            if turn:  # the first round warms up
                spent.append(end - start)
    best = 0
    medians = [statistics.median(spent) for spent in times]
    for index, median in enumerate(medians):
        if median < 0.95 * medians[best]:
            best = index
    return candidates[best], medians


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
    """What was timed on this machine; nothing where it is damaged, and is then timed again."""
    try:
        content = sealing.unseal(json.loads((cache.folder() / "plans.json").read_text("utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}
    return content


def _remember(key: str, choice: Choice) -> None:
    """Two processes that do so at once lose one of both entries, which is measured again."""
    entry = {"plan": choice.plan.to_dict(), "milliseconds": choice.milliseconds}
    known = {**_remembered(), key: entry}
    latest = dict(list(known.items())[-REMEMBERED:])
    with contextlib.suppress(ResourceError):  # a cache that can't be written is no cache
        text = json.dumps(sealing.seal(latest), indent=1) + "\n"
        files.sweep(cache.folder(), ["plans.json"], alone=False)
        files.write_atomic(cache.folder() / "plans.json", text)
