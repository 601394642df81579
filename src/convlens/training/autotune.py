"""Autotuning: choose the fastest way to compute a run by timing its own training steps.

Which memory format is faster depends on network and machine (factors of two were measured in both
directions), and so does whether micro-batches are faster than the whole batch. Results are kept
per machine and network in the cache folder, for later runs of the same kind.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from convlens import optim
from convlens.data import cache
from convlens.data.loader import Batches
from convlens.device import Plan, candidate_plans, describe_hardware, seed_generators, synchronize
from convlens.engine.loop import Criterion, TrainLoop
from convlens.engine.numerics import make_grad_scaler
from convlens.engine.oom import OutOfMemory, uses_batch_statistics
from convlens.errors import ResourceError, UsageError
from convlens.models.stages import set_train_mode
from convlens.recipe import Recipe
from convlens.runtime import RuntimeContext
from convlens.training import feature_cache
from convlens.utils import files
from convlens.utils.console import print_status

# Timing costs some steps of each candidate; shorter runs do not gain them back.
MIN_STEPS_TO_TUNE = 400
MAX_REMEMBERED = 500  # the latest networks
MAX_SLOWDOWN = 1.6  # candidates slower than this many times the fastest are dropped
SMALLEST_MICRO_BATCH = 16  # images; below that a CPU's kernels have too little to do
# Whether compiling can pay at all, before it is tried: an upper bound on the share of a step that
# it saves, against a lower bound on its cost.
COMPILE_SAVES, COMPILE_SECONDS = 0.35, 30.0
REDUCE_OVERHEAD_SAVES = 0.5
WARMUP_STEPS, TIMED_PAIRS = 5, 8

MakeStep = Callable[[Plan], Callable[[], Tensor]]


@dataclass(frozen=True)
class TunedPlan:
    """A plan, and milliseconds per step of each candidate that was timed (empty if none was)."""

    plan: Plan
    milliseconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.to_dict(), "milliseconds": self.milliseconds}

    @property
    def step_seconds(self) -> float | None:
        """Seconds per step of the plan; None if it was not timed, e.g. because it is compiled."""
        milliseconds = self.milliseconds.get(str(self.plan))
        return None if milliseconds is None else milliseconds / 1000

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> TunedPlan:
        return cls(Plan.from_dict(stored["plan"]), dict(stored["milliseconds"]))


def check_device_options(recipe: Recipe, device: str) -> None:
    """Refuse precision and compilation that the device does not support, before images are read.

    Raises:
        UsageError: what is refused.
    """
    options = recipe.train
    candidate_plans(device, options.precision, options.memory_format, options.deterministic)
    if options.compile == "graph":
        raise UsageError(
            "train.compile=graph: CUDA graphs are now a part of torch.compile",
            fix="use train.compile=auto or true",
        )


class Autotuner:
    """Choose the fastest plan that a recipe allows.

    Precision, memory format and micro-batches are chosen among `candidates`; on CUDA also whether
    the model is compiled. Short runs of an unknown kind use the first candidate.

    Args:
        model: as it starts, frozen as the recipe says. It is copied.
        make_batches: returns the training batches for a plan.
        criterion: `(logits, targets) -> loss`.
        context: the device, and the processes of the training. Rank 0 chooses for all of them.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        make_batches: Callable[[Plan], Batches],
        criterion: Criterion,
        context: RuntimeContext,
    ) -> None:
        self.recipe, self.context = recipe, context
        self._model, self._make_batches, self._criterion = model, make_batches, criterion
        self._trial: _Trial | None = None

    def best(self) -> TunedPlan:
        """Return the plan to train with, timed now or in an earlier run of the same kind.

        Raises:
            UsageError: the recipe requests something that the device does not support.
        """
        check_device_options(self.recipe, self.context.device)
        tuned = TunedPlan.from_dict(self.context.broadcast(lambda: self._best().to_dict()))
        return replace(tuned, plan=replace(tuned.plan, device=self.context.device))

    def _best(self) -> TunedPlan:
        tuned = self._best_candidate()
        compile_option = self.recipe.train.compile
        if compile_option != "auto":
            mode = "compiled" if compile_option else "eager"
            return replace(tuned, plan=replace(tuned.plan, step_mode=mode))
        if self.context.process_group.size > 1:
            return tuned
        batches = self._make_batches(tuned.plan)
        steps, shapes = len(batches) * int(self.recipe.train.epochs), len(set(batches.sizes))
        if steps < MIN_STEPS_TO_TUNE or not tuned.plan.device.startswith("cuda"):
            return tuned
        return replace(
            tuned, plan=choose_step_mode(tuned.plan, self.make_step, steps, shapes=shapes)
        )

    def candidates(self) -> list[Plan]:
        """Return the plans that compute the same training; without timing the first is used."""
        options = self.recipe.train
        plans = candidate_plans(
            self.context.device, options.precision, options.memory_format, options.deterministic
        )
        return [plan for each in plans for plan in self._with_micro_batches(each)]

    def _with_micro_batches(self, plan: Plan) -> list[Plan]:
        """Return the plan with whole, halved and quartered batches, if that changes no result.

        Micro-batches change the statistics of batch norm, and several processes share a batch
        already. A GPU only gains by larger batches.
        """
        set_train_mode(self._model)
        changes_results = plan.deterministic or uses_batch_statistics(self._model)
        if plan.device != "cpu" or changes_results or self.context.process_group.size > 1:
            return [plan]
        batch_size = self.recipe.train.batch_size
        sizes = [s for s in (batch_size // 2, batch_size // 4) if s >= SMALLEST_MICRO_BATCH]
        return [replace(plan, micro_batch_size=size) for size in (0, *sizes)]

    def _best_candidate(self) -> TunedPlan:
        candidates = self.candidates()
        if len(candidates) == 1:
            return TunedPlan(candidates[0], {})
        batches = self._make_batches(candidates[0])
        key = self._key(batches, candidates)
        if known := _load_timings().get(key):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                tuned = TunedPlan.from_dict(known)
                if tuned.plan in candidates:
                    return tuned
        if len(batches) * int(self.recipe.train.epochs) < MIN_STEPS_TO_TUNE:
            return TunedPlan(candidates[0], {})
        plan, seconds = fastest(candidates, self.make_step)
        timed = zip(candidates, seconds, strict=True)
        milliseconds = {str(each): round(1000 * s, 3) for each, s in timed if math.isfinite(s)}
        tuned = TunedPlan(plan, milliseconds)
        _store_timings(key, tuned)
        return tuned

    def make_step(self, plan: Plan) -> Callable[[], Tensor]:
        """Return a function that trains a copy of the model for one step and returns the loss."""
        if self._trial is None:
            batches = self._make_batches(plan)
            self._trial = _Trial(self.recipe, self._model, batches, self._criterion)
        return self._trial.make_step(plan)

    def _key(self, batches: Batches, candidates: Sequence[Plan]) -> str:
        """Return a hash of everything that the time of a step depends on."""
        recipe, model = self.recipe, self._model
        shapes = [(name, list(p.shape), p.requires_grad) for name, p in model.named_parameters()]
        content = (
            describe_hardware(self.context.device),
            [str(plan) for plan in candidates],
            recipe.model.name,
            recipe.model.options,
            shapes,
            list(batches.rows.shape[1:]),
            recipe.train.batch_size,
            recipe.optim.name,
            recipe.optim.clip_norm,
            recipe.optim.clip_value,
            feature_cache.cacheable_backbone(recipe, model),
            batches.process_group.size,
            *([recipe.code] if recipe.code else []),
        )
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


class _Trial:
    """Time steps on one batch of images, or of outputs of the frozen backbone."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, batches: Batches, criterion: Criterion
    ) -> None:
        self.recipe, self.model, self.criterion = recipe, model, criterion
        self.images, self.labels = next(batches.epoch(0))
        self.prefix = feature_cache.cacheable_backbone(recipe, model)
        if self.prefix:
            plan = batches.plan
            model_copy = plan.prepare_model(copy.deepcopy(model))
            if feature_cache.is_sequential_split(model_copy, self.prefix, self.images[:8]):
                features = feature_cache.compute_features(
                    model_copy, self.prefix, [self.images], self.labels, plan
                )
                self.images = features.values
            else:
                self.prefix = []

    def make_step(self, plan: Plan) -> Callable[[], Tensor]:
        options = self.recipe.optim
        model = plan.prepare_model(copy.deepcopy(self.model))
        optimizer = optim.build_optimizer(model, options)
        trained = feature_cache.trainable_head(model, self.prefix) if self.prefix else model
        set_train_mode(trained)
        images = feature_cache.identity(self.images, plan)
        loop = TrainLoop(
            trained,
            optimizer,
            self.criterion,
            plan,
            clip_value=options.clip_value,
            clip_norm=options.clip_norm,
            scaler=make_grad_scaler(plan.device) if plan.precision == "fp16" else None,
        )
        return lambda: loop.train_step(images, self.labels).loss


def fastest(
    candidates: Sequence[Plan], make_step: Callable[[Plan], Callable[[], object]], rounds: int = 5
) -> tuple[Plan, list[float]]:
    """Return the candidate with the fastest step, and the seconds per step of each.

    The seconds are medians of interleaved rounds. A candidate that is far behind after two rounds
    is dropped from the others. A later candidate must win by 5%, so that noise does not choose
    lower precision. Candidates that run out of memory count as infinitely slow.

    Args:
        make_step: prepares a plan and returns a function that does one training step.
    """
    steps = [make_step(plan) for plan in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    for round_number in range(rounds + 1):
        quickest = min((min(spent) for spent in times if spent), default=math.inf)
        for step, spent in zip(steps, times, strict=True):
            if len(spent) > 1 and min(spent) > MAX_SLOWDOWN * quickest:
                continue
            start = time.perf_counter()
            end = math.inf
            with contextlib.suppress(OutOfMemory):
                step()
                synchronize(candidates[0].device)
                end = time.perf_counter()
            if round_number:  # the first round warms up
                spent.append(end - start)
    best = 0
    medians = [statistics.median(spent) for spent in times]
    for index, median in enumerate(medians):
        if median < 0.95 * medians[best]:
            best = index
    return candidates[best], medians


# Eager or compiled (CUDA)


@dataclass(frozen=True)
class StepTiming:
    """Seconds per step, once before the first step (`setup`), and of the host in a step."""

    step: float
    setup: float
    host: float
    losses: tuple[float, ...]


def choose_step_mode(
    plan: Plan,
    make_step: MakeStep,
    steps: int,
    *,
    shapes: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Return `plan` with the step mode that finishes `steps` steps first, compilation included.

    Nothing is tried outside of CUDA, for deterministic plans, and where the run is too short to
    earn back a compilation.

    Args:
        make_step: prepares a plan and returns a function that does one step, always on the same
            batch, and returns the loss.
        steps: of the whole run.
        shapes: number of different batch sizes; each is compiled.
    """
    if not plan.device.startswith("cuda") or plan.deterministic:
        return plan
    try:
        eager = time_steps(plan, make_step, clock)
    except OutOfMemory:  # the training will choose a micro-batch size
        return plan
    best, best_total = plan, eager.step * steps
    for mode in modes_worth_trying(eager, steps):
        candidate = replace(plan, step_mode=mode)
        try:
            timing = time_steps(candidate, make_step, clock)
        except Exception as error:  # a compiler has many ways to fail; eager steps work
            reason = (str(error).splitlines() or ["?"])[0][:200]
            print_status(f"the model cannot be compiled here ({mode}): {reason}")
            continue
        if not losses_agree(eager.losses, timing.losses):
            print_status(f"the compiled model ({mode}) computes different losses and is not used")
            continue
        total = timing.setup * shapes + timing.step * steps
        if total < 0.95 * best_total:
            best, best_total = candidate, total
    return best


def modes_worth_trying(eager: StepTiming, steps: int) -> list[str]:
    """Return the compiled modes that could earn back their cost, judged by the time of eager steps.

    CUDA graphs (`reduce-overhead`) save the time to launch kernels one by one, which counts only
    where the host takes about as long as the device.
    """
    modes = []
    total = eager.step * steps
    if eager.host > 0.7 * eager.step and REDUCE_OVERHEAD_SAVES * total > 2 * COMPILE_SECONDS:
        modes.append("reduce-overhead")
    if COMPILE_SAVES * total > 2 * COMPILE_SECONDS:
        modes.append("compiled")
    return modes


def time_steps(plan: Plan, make_step: MakeStep, clock: Callable[[], float]) -> StepTiming:
    """Time steps after `WARMUP_STEPS`, in which models are compiled and graphs captured."""
    step = make_step(plan)
    seed_generators(plan.device, 0)  # the same dropout for all, so that losses compare
    start = clock()
    losses = [step() for _ in range(WARMUP_STEPS)]
    synchronize(plan.device)
    first = clock() - start
    total, host = [], []
    for _ in range(TIMED_PAIRS):
        start = clock()
        losses += [step(), step()]
        host.append((clock() - start) / 2)
        synchronize(plan.device)
        total.append((clock() - start) / 2)
    seconds = statistics.median(total)
    setup = max(0.0, first - WARMUP_STEPS * seconds)
    values = tuple(float(loss) for loss in losses)
    return StepTiming(seconds, setup, statistics.median(host), values)


def losses_agree(eager: tuple[float, ...], compiled: tuple[float, ...]) -> bool:
    """Return whether the losses of the first steps are within a tenth of each other.

    Half precision and other kernels round differently, so that later losses diverge. A mode that
    computes something else, or does not update the weights, differs at once.
    """
    first = slice(0, WARMUP_STEPS + 1)
    pairs = zip(eager[first], compiled[first], strict=True)
    # Nothing can be compared where eager steps, always on the same batch, become non-finite.
    return all(abs(a - b) <= 0.1 * max(abs(a), 0.1) for a, b in pairs if math.isfinite(a))


# Timings of earlier runs


def _load_timings() -> dict[str, Any]:
    """Read the timings of this machine; empty if the file is missing or damaged."""
    try:
        content = json.loads((cache.cache_folder() / "plans.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: entry for key, entry in content.items() if isinstance(entry, dict)}


def _store_timings(key: str, tuned: TunedPlan) -> None:
    """Add an entry. Of two processes that write at once, one entry is lost and timed again."""
    known = {**_load_timings(), key: tuned.to_dict()}
    latest = dict(list(known.items())[-MAX_REMEMBERED:])
    with contextlib.suppress(ResourceError):  # an unwritable cache folder is not an error
        text = json.dumps(latest, indent=1) + "\n"
        files.remove_stale_temp_files(cache.cache_folder(), ["plans.json"], alone=False)
        files.write_atomic(cache.cache_folder() / "plans.json", text)
