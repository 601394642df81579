"""The choice of a plan by timing training steps, the plan cache, micro-batches and step modes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import models
from convlens.device import Plan
from convlens.engine.loop import TrainLoop
from convlens.errors import UsageError
from convlens.recipe import Recipe, load_recipe
from convlens.run import RunDir
from convlens.runtime import RuntimeContext
from convlens.training import autotune, train
from convlens.training.autotune import StepTiming, losses_agree, modes_worth_trying
from convlens.training.setup import build_training_job
from helpers.support import PLAN, begin, images_of, same, tiny

TIMED = ("train.epochs=100", "train.memory_format=auto")  # 500 steps: worth timing


def build_job(recipe: Recipe) -> Any:
    return build_training_job(recipe, images_of(recipe), RuntimeContext("cpu", quiet=True))


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The candidate plans of each timing, of which the last is always the fastest."""
    timed: list[list[str]] = []

    def fastest(
        candidates: Sequence[Plan], trial: Callable[[Plan], Callable[[], None]]
    ) -> tuple[Plan, list[float]]:
        for plan in candidates:
            trial(plan)()  # each plan must work
        timed.append([str(plan) for plan in candidates])
        return candidates[-1], [0.002] * (len(candidates) - 1) + [0.001]

    monkeypatch.setattr(autotune, "fastest", fastest)
    return timed


def test_timings_are_cached_for_runs_with_the_same_steps(
    timings: list[list[str]],
) -> None:
    first = build_job(tiny(*TIMED))
    assert timings == [["fp32 contiguous", "fp32 channels_last"]]
    assert first.plan.memory_format == "channels_last"
    assert first.timings == {"fp32 contiguous": 2.0, "fp32 channels_last": 1.0}
    assert first.step_seconds == 0.001
    second = build_job(tiny(*TIMED, "train.seed=3", "optim.lr=0.5"))
    assert (second.plan, second.timings) == (first.plan, first.timings)
    assert len(timings) == 1
    # A run too short to be timed uses the cached plan as well.
    assert build_job(tiny("train.memory_format=auto")).plan == first.plan
    assert len(timings) == 1


@pytest.mark.parametrize(
    "override",
    [
        "model.widths=[4, 9]",
        "train.batch_size=8",
        "optim.name=sgd",
        "model.trainable=head",
        "optim.clip_norm=1",
        "data.channels=3",
    ],
)
def test_a_different_training_step_is_timed_again(override: str, timings: list[list[str]]) -> None:
    build_job(tiny(*TIMED))
    build_job(tiny(*TIMED, override))
    assert len(timings) == 2


def test_short_and_deterministic_runs_are_not_timed(timings: list[list[str]]) -> None:
    assert build_job(tiny("train.memory_format=auto")).plan.memory_format == "contiguous"
    deterministic = build_job(tiny(*TIMED, "train.deterministic=true"))
    assert (deterministic.plan, deterministic.timings) == (
        Plan("cpu", "fp32", "contiguous", True),
        {},
    )
    assert timings == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"KEY": 3}', '{"KEY": {}}', '{"KEY": {"plan": {"x": 1}}}']
)
def test_a_damaged_plan_cache_is_replaced(
    content: str, timings: list[list[str]], tmp_path: Path
) -> None:
    build_job(tiny(*TIMED))
    cache_file = tmp_path / "cache" / "plans.json"
    (key,) = json.loads(cache_file.read_text())
    cache_file.write_text(content.replace("KEY", key))
    build_job(tiny(*TIMED))
    assert len(timings) == 2
    assert list(json.loads(cache_file.read_text())) == [key]


def test_the_plan_cache_is_limited_in_size(
    timings: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(autotune, "MAX_REMEMBERED", 2)
    for width in (3, 4, 5):
        build_job(tiny(*TIMED, f"model.widths=[{width}]"))
    assert len(json.loads((tmp_path / "cache" / "plans.json").read_text())) == 2


def test_the_plan_and_its_timings_are_stored_in_the_run(timings: list[list[str]]) -> None:
    recipe = tiny(*TIMED, "train.patience=1", "optim.lr=1e-9")
    run_dir = train.train(recipe, test=False, device="cpu", quiet=True)
    metadata = RunDir(run_dir.path).metadata()
    assert metadata["plan"]["memory_format"] == "channels_last"
    assert metadata["timings"] == {"fp32 contiguous": 2.0, "fp32 channels_last": 1.0}


def test_a_frozen_backbone_is_not_timed(
    timings: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    real = TrainLoop.train_step

    def step(loop: TrainLoop, images: Tensor, targets: Tensor) -> Any:
        seen.append(tuple(images.shape))
        return real(loop, images, targets)

    monkeypatch.setattr(TrainLoop, "train_step", step)
    build_job(tiny(*TIMED, "model.trainable=head", "model.head=flatten"))
    assert set(seen) == {(16, 32)}  # 8 maps of 2 x 2, flattened, instead of 16 x 1 x 8 x 8


# Micro-batches


def test_micro_batches_are_candidates_only_without_batch_norm(timings: list[list[str]]) -> None:
    options = (*TIMED, "train.batch_size=64", "train.epochs=300")
    build_job(tiny(*options, "model.batch_norm=false"))
    build_job(tiny(*options))
    plans = ["fp32 contiguous", "fp32 channels_last"]
    assert timings == [
        [plan + part for plan in plans for part in ("", " by 32", " by 16")],
        plans,
    ]


def test_micro_batches_are_slices_of_the_batch_in_order() -> None:
    images, labels = torch.arange(10.0), torch.arange(10)
    full_batch = list(PLAN.micro_batches(images, labels))
    assert len(full_batch) == 1
    assert full_batch[0][0] is images
    plan = Plan("cpu", "fp32", "contiguous", micro_batch_size=4)
    parts = list(plan.micro_batches(images, labels))
    assert [len(part) for part, _ in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part for part, _ in parts]), images)
    assert torch.equal(torch.cat([part for _, part in parts]), labels)


@pytest.mark.parametrize("mixed", [False, True], ids=["classes", "probabilities"])
def test_a_step_in_micro_batches_equals_a_step_on_the_full_batch(mixed: bool) -> None:
    def stepped(part: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = models.build_model("cnn", 5, 1, 8, {"widths": [4], "batch_norm": False}).double()
        images = torch.randn(11, 1, 8, 8, dtype=torch.float64)
        labels = torch.arange(11) % 5
        targets = torch.rand(11, 5, dtype=torch.float64).softmax(1) if mixed else labels
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        plan = Plan("cpu", "fp32", "contiguous", micro_batch_size=part)
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        loop = TrainLoop(model, optimizer, criterion, plan, clip_norm=0.1)
        result = loop.train_step(images, targets)
        return result.loss, result.num_correct, model.state_dict()

    loss, num_correct, weights = stepped(0)
    for part in (1, 4, 10):
        part_loss, part_correct, part_weights = stepped(part)
        assert torch.equal(part_correct, num_correct)
        torch.testing.assert_close(part_loss, loss, rtol=1e-6, atol=0)
        for name, weight in weights.items():
            torch.testing.assert_close(part_weights[name], weight, rtol=1e-6, atol=1e-9)
    same(weights, stepped(11)[2])


def test_a_non_finite_micro_batch_leaves_no_gradients() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.ones(4, 1, 2, 2)
    images[3] = torch.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plan = Plan("cpu", "fp32", "contiguous", micro_batch_size=2)
    loop = TrainLoop(model, optimizer, nn.CrossEntropyLoss(), plan)
    result = loop.train_step(images, torch.zeros(4, dtype=torch.int64))
    assert not result.is_finite
    assert all(parameter.grad is None for parameter in model.parameters())
    same(model.state_dict(), before)


# Step modes: eager or compiled

CUDA = Plan("cuda", "bf16", "channels_last")


class Machine:
    """A simulated clock for training steps.

    Each step mode has three durations in seconds: once (compilation), then of the host and of the
    device in each step. The device computes while the host continues; synchronizing waits for it.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, **modes: tuple[float, float, float]
    ) -> None:
        self.now, self.busy_until, self.tried = 0.0, 0.0, list[str]()
        self.modes = {name.replace("_", "-"): seconds for name, seconds in modes.items()}
        monkeypatch.setattr(autotune, "synchronize", lambda device: self.wait())
        monkeypatch.setattr(autotune, "seed_generators", lambda device, seed: None)

    def wait(self) -> None:
        self.now = max(self.now, self.busy_until)

    def make_step(self, plan: Plan) -> Callable[[], Tensor]:
        self.tried.append(plan.step_mode)
        once, host, computed = self.modes[plan.step_mode]
        count = 0

        def step() -> Tensor:
            nonlocal count
            self.now += host + (once if count == 0 else 0)
            self.busy_until = max(self.now, self.busy_until) + computed
            count += 1
            return torch.tensor(1 / count)

        return step

    def choose(self, steps: int, plan: Plan = CUDA, shapes: int = 1) -> str:
        return autotune.choose_step_mode(
            plan, self.make_step, steps, shapes=shapes, clock=lambda: self.now
        ).step_mode


def test_long_runs_bound_by_the_host_use_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = {"eager": (0, 2e-3, 1e-4), "compiled": (40, 1.5e-3, 1e-4)}
    modes |= {"reduce_overhead": (40, 1e-4, 1e-3)}
    machine = Machine(monkeypatch, **modes)
    assert machine.choose(100_000) == "reduce-overhead"
    assert machine.tried == ["eager", "reduce-overhead", "compiled"]
    # It saves 1 ms per step and costs 40 s once, so that it pays from some 60,000 steps.
    machine = Machine(monkeypatch, **modes)
    assert machine.choose(50_000) == "eager"
    assert machine.tried == ["eager"]


def test_long_runs_bound_by_the_device_are_compiled_if_it_saves_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for computed, expected in ((7e-3, "compiled"), (9.9e-3, "eager")):
        machine = Machine(monkeypatch, eager=(0, 1e-3, 10e-3), compiled=(40.0, 1e-3, computed))
        assert machine.choose(40_000) == expected
        assert machine.tried == ["eager", "compiled"]
    machine = Machine(monkeypatch, eager=(0, 1e-3, 10e-3), compiled=(200.0, 1e-3, 7e-3))
    assert machine.choose(40_000) == "eager"
    # It saves 120 s; a smaller last batch needs a second compilation.
    machine = Machine(monkeypatch, eager=(0, 1e-3, 10e-3), compiled=(70.0, 1e-3, 7e-3))
    assert machine.choose(40_000) == "compiled"
    assert machine.choose(40_000, shapes=2) == "eager"


def test_a_step_mode_that_fails_or_computes_other_losses_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch, eager=(0, 1e-3, 10e-3), compiled=(40.0, 1e-3, 7e-3))
    make_step = machine.make_step

    def stale(plan: Plan) -> Callable[[], Tensor]:
        step = make_step(plan)
        return (lambda: step() * 0 + 1) if plan.step_mode == "compiled" else step

    def broken(plan: Plan) -> Callable[[], Tensor]:
        if plan.step_mode == "compiled":
            raise RuntimeError("no compiler here\nand more lines")
        return make_step(plan)

    for wrong in (stale, broken):
        machine.make_step = wrong  # type: ignore[method-assign]
        assert machine.choose(40_000) == "eager"
    machine.make_step = make_step  # type: ignore[method-assign]
    assert machine.choose(40_000) == "compiled"


def test_nothing_is_compiled_off_cuda_or_in_deterministic_plans() -> None:
    def make_step(plan: Plan) -> Callable[[], Tensor]:
        raise AssertionError("tried")

    for plan in (replace(CUDA, device="cpu"), replace(CUDA, deterministic=True)):
        assert autotune.choose_step_mode(plan, make_step, 10**9) == plan


def test_losses_agree_within_rounding() -> None:
    assert losses_agree((2.3, 2.2, 2.1, 2.0, 1.9, 1.8), (2.31, 2.19, 2.1, 2.02, 1.9, 1.75))
    assert not losses_agree((2.3, 2.2, 2.1, 2.0, 1.5, 1.0), (2.3, 2.2, 2.1, 2.0, 2.0, 2.0))
    assert not losses_agree((2.3,), (float("nan"),))
    assert losses_agree((2.3, float("nan")), (2.3, 5.0))
    assert modes_worth_trying(StepTiming(1e-3, 0, 1e-3, ()), 100) == []


def test_the_recipe_can_state_whether_to_compile() -> None:
    loaded = {c: load_recipe("digits", [f"train.compile={c}"]) for c in ("true", "no", "auto")}
    assert [each.train.compile for each in loaded.values()] == [True, False, "auto"]
    modes = [begin(tiny(f"train.compile={c}"), c)[0].plan.step_mode for c in loaded]
    assert modes == ["compiled", "eager", "eager"]
    with pytest.raises(UsageError, match=r"train\.compile"):
        load_recipe("digits", ["train.compile=sometimes"])


def test_recipes_with_cuda_graphs_can_be_read_but_not_trained() -> None:
    """Recipes of finished runs may contain `train.compile=graph`."""
    recipe = tiny("train.compile=graph")
    assert recipe.train.compile == "graph"
    with pytest.raises(UsageError, match=r"now a part of torch\.compile") as caught:
        begin(recipe, "graph")
    assert "train.compile=auto or true" in caught.value.fix


def test_a_plan_is_stored_in_the_keys_of_earlier_versions() -> None:
    plan = Plan("cuda:1", "fp16", "channels_last", True, 8, "compiled")
    assert plan.to_dict() == {
        "device": "cuda:1",
        "precision": "fp16",
        "memory_format": "channels_last",
        "deterministic": True,
        "part": 8,
        "step": "compiled",
    }
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict({**plan.to_dict(), "step": "graph"}).step_mode == "reduce-overhead"
    early = {"device": "cpu", "precision": "fp32", "memory_format": "contiguous"}
    assert Plan.from_dict(early) == PLAN
    with pytest.raises(TypeError):
        Plan.from_dict({**early, "unknown": 1})


def test_compiled_steps_equal_eager_steps() -> None:
    final_weights = []
    for mode in ("eager", "compiled"):
        torch.manual_seed(0)
        model = models.build_model("cnn", 3, 1, 8, {"widths": [4]})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        plan = Plan("cpu", "fp32", "contiguous", step_mode=mode)
        loop = TrainLoop(model, optimizer, nn.CrossEntropyLoss(), plan)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            loop.train_step(torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 3)
        final_weights.append(model.state_dict())
    for name, tensor in final_weights[0].items():
        torch.testing.assert_close(final_weights[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_reduce_overhead_steps_equal_eager_steps_on_a_gpu(precision: str) -> None:
    """With batches of two sizes and a parameter group that is frozen halfway."""
    from convlens import optim
    from convlens.engine.numerics import make_grad_scaler
    from convlens.recipe import OptimConfig
    from helpers.train_loops import Listed

    losses = []
    for mode in ("eager", "reduce-overhead"):
        torch.manual_seed(0)
        plan = Plan("cuda", precision, "channels_last", step_mode=mode)
        model = plan.prepare_model(models.build_model("cnn", 3, 1, 8, {"widths": [4]}))
        groups = [{"params": "classifier.bias", "end": 0.55}]
        config = OptimConfig(name="sgd", lr=0.02, groups=groups)
        scaler = make_grad_scaler("cuda") if precision == "fp16" else None
        loop = TrainLoop(
            model, optim.build_optimizer(model, config), nn.CrossEntropyLoss(), plan, scaler=scaler
        )
        generator = torch.Generator().manual_seed(1)
        listed = [
            (torch.randn(n, 1, 8, 8, generator=generator).cuda(), torch.arange(n).cuda() % 3)
            for n in (8,) * 9 + (5,)
        ]
        records = loop.run(Listed(listed), optim.build_schedule(config), epochs=2, seed=3)
        losses.append(torch.tensor([float(record.loss) for record in records]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=2e-3)
