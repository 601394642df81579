"""How steps are taken is chosen, with made-up times; and on a GPU graphs are the same steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import engine, optim, recipe
from convlens.device import Plan
from convlens.errors import UsageError
from convlens.models.cnn import CNN
from convlens.optim.timetable import put_rate
from convlens.schema import OptimConfig
from convlens.starting.planning import _stated
from convlens.stepping import graphs
from convlens.stepping.graphs import Timing, agree, worth_trying
from convlens.stepping.scaling import LossScale
from support import begin, same, tiny
from test_engine import Listed, everything

CUDA = Plan("cuda", "bf16", "channels_last")


class Machine:
    """Steps that take made-up seconds: `told` of them the host's, the first ones more.

    The host is told of a step, which the device does meanwhile; whoever synchronises waits.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **ways: tuple[float, float, float]) -> None:
        self.now, self.busy_until, self.ways, self.tried = 0.0, 0.0, ways, list[str]()
        monkeypatch.setattr(graphs, "synchronise", lambda device: self.wait())
        monkeypatch.setattr(graphs, "seed_generators", lambda device, seed: None)

    def wait(self) -> None:
        self.now = max(self.now, self.busy_until)

    def trial(self, plan: Plan) -> Callable[[], Tensor]:
        self.tried.append(plan.step)
        once, told, computed = self.ways[plan.step]
        taken = 0

        def step() -> Tensor:
            nonlocal taken
            self.now += told + (once if taken == 0 else 0)
            self.busy_until = max(self.now, self.busy_until) + computed
            taken += 1
            return torch.tensor(1 / taken)

        return step

    def choose(self, steps: int, plan: Plan = CUDA, shapes: int = 1) -> str:
        return graphs.choose(plan, self.trial, steps, shapes=shapes, clock=lambda: self.now).step


def test_where_launches_are_the_time_a_long_run_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = {"eager": (0, 2e-3, 1e-4), "graph": (0.5, 1e-4, 1e-3)}
    assert Machine(monkeypatch, **ways).choose(10_000) == "graph"
    assert Machine(monkeypatch, **ways).choose(700) == "graph"
    # It would save 1 ms a step, and costs 0.5 s once: not worth it below some 500 steps.
    machine = Machine(monkeypatch, **ways)
    assert machine.choose(450) == "eager"
    assert machine.tried == ["eager"]


def test_where_the_device_is_busy_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, eager=(0, 1e-3, 8e-3), graph=(0.5, 1e-4, 8e-3))
    assert machine.choose(5_000) == "eager"
    assert machine.tried == ["eager"]


def test_long_runs_try_the_compiler_and_take_it_where_it_pays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for computed, expected in ((7e-3, "compiled"), (9.9e-3, "eager")):
        machine = Machine(monkeypatch, eager=(0, 1e-3, 10e-3), compiled=(40.0, 1e-3, computed))
        assert machine.choose(40_000) == expected
        assert machine.tried == ["eager", "compiled"]
    machine = Machine(monkeypatch, eager=(0, 1e-3, 10e-3), compiled=(200.0, 1e-3, 7e-3))
    assert machine.choose(40_000) == "eager"
    # 120 s are saved, and a smaller last batch is compiled once more.
    machine = Machine(monkeypatch, eager=(0, 1e-3, 10e-3), compiled=(70.0, 1e-3, 7e-3))
    assert machine.choose(40_000) == "compiled"
    assert machine.choose(40_000, shapes=2) == "eager"


def test_what_fails_or_computes_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch, eager=(0, 2e-3, 1e-4), graph=(0.1, 1e-4, 1e-4))
    plain = machine.trial

    def stale(plan: Plan) -> Callable[[], Tensor]:
        step = plain(plan)
        return (lambda: step() * 0 + 1) if plan.step == "graph" else step

    def broken(plan: Plan) -> Callable[[], Tensor]:
        if plan.step == "graph":
            raise RuntimeError("no compiler here\nand more lines")
        return plain(plan)

    for trial in (stale, broken):
        machine.trial = trial  # type: ignore[method-assign]
        assert machine.choose(10_000) == "eager"
    machine.trial = plain  # type: ignore[method-assign]
    assert machine.choose(10_000) == "graph"


def test_nothing_is_tried_off_cuda_or_where_all_must_be_determined() -> None:
    def trial(plan: Plan) -> Callable[[], Tensor]:
        raise AssertionError("tried")

    for plan in (replace(CUDA, device="cpu"), replace(CUDA, deterministic=True)):
        assert graphs.choose(plan, trial, 10**9) == plan


def test_losses_agree_within_rounding() -> None:
    assert agree((2.3, 2.2, 2.1, 2.0, 1.9, 1.8), (2.31, 2.19, 2.1, 2.02, 1.9, 1.75))
    assert not agree((2.3, 2.2, 2.1, 2.0, 1.5, 1.0), (2.3, 2.2, 2.1, 2.0, 2.0, 2.0))
    assert not agree((2.3,), (float("nan"),))
    assert agree((2.3, float("nan")), (2.3, 5.0))
    assert worth_trying(Timing(1e-3, 0, 1e-3, ()), 100) == []


def test_the_recipe_can_state_it() -> None:
    asked = {c: recipe.load("digits", [f"train.compile={c}"]).train.compile for c in ("true", "no")}
    assert asked == {"true": True, "no": False}
    assert recipe.load("digits").train.compile == "auto"
    assert recipe.load("digits", ["train.compile=graph"]).train.compile == "graph"
    told = [_stated(CUDA, stated).step for stated in (True, "graph", False)]
    assert told == ["compiled", "graph", "eager"]
    with pytest.raises(UsageError, match="NVIDIA"):
        begin(tiny("train.compile=graph"), "graph")
    with pytest.raises(UsageError, match=r"train\.compile"):
        recipe.load("digits", ["train.compile=sometimes"])


def test_rates_that_are_tensors_stay_the_same_tensors() -> None:
    group: dict[str, Any] = {"lr": torch.tensor(0.1)}
    rate = group["lr"]
    put_rate(group, 0.25)
    assert group["lr"] is rate
    assert float(rate) == 0.25


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_optimisers_do_the_same_by_rates_that_are_tensors(name: str) -> None:
    ends = []
    for as_tensor in (False, True):
        torch.manual_seed(0)
        model = CNN(3, 1, 8, widths=[4, 6])
        config = OptimConfig(name=name, lr=0.05, weight_decay=0.01, schedule="linear")
        optimiser = optim.build(model, config)
        if as_tensor:
            for group in optimiser.param_groups:
                group["lr"] = torch.tensor(group["lr"])
        images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        listed = Listed([(images, torch.arange(8) % 3)] * 6)
        fit(model, optimiser, config, listed, Plan("cpu", "fp32", "contiguous"))
        ends.append(everything(model, optimiser))
    assert ends[0].keys() == ends[1].keys()
    for key in ends[0]:
        assert torch.allclose(ends[0][key], ends[1][key], rtol=1e-3, atol=1e-5), key


def fit(
    model: nn.Module, optimiser: Any, config: OptimConfig, listed: Listed, plan: Plan, **more: Any
) -> list[float]:
    records = engine.fit(
        model, listed, optimiser, optim.schedule(config), epochs=2,
        objective=nn.CrossEntropyLoss(), plan=plan, seed=3, clip_norm=1.0, **more,
    )  # fmt: skip
    return [float(record.loss) for record in records]


def on_gpu(name: str, step: str, precision: str = "fp32", **options: Any) -> dict[str, Tensor]:
    """A training with dropout, a window, an average and a smaller last batch, on a GPU."""
    torch.manual_seed(0)
    plan = Plan("cuda", precision, "channels_last", step=step)
    model = plan.place(CNN(3, 1, 8, widths=[4, 6], dropout=0.5))
    groups = [{"params": "classifier.bias", "end": 0.55}]
    config = OptimConfig(name=name, lr=0.02, schedule="linear", ema=0.9, groups=groups, **options)
    optimiser = optim.build(model, config)
    average = optim.averager(model, config, 20)
    scale = LossScale(optimiser, "cuda") if precision == "fp16" else None
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(size, 1, 8, 8, generator=generator).cuda(), torch.arange(size).cuda() % 3)
        for size in (8,) * 9 + (5,)
    ]
    losses = fit(model, optimiser, config, Listed(batches), plan, averager=average, scale=scale)
    assert average is not None
    found = everything(model, optimiser) | {"losses": torch.tensor(losses)}
    return found | {f"ema.{i}": t for i, t in enumerate(average.state()["average"])}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_replayed_steps_are_the_steps(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dropout draws the same masks, rates move, the graph is recorded anew at the window's end."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    plain, graph = on_gpu(name, "eager", precision), on_gpu(name, "graph", precision)
    assert "can't be recorded" not in capsys.readouterr().err
    assert plain.keys() == graph.keys()
    for key in plain:
        assert torch.allclose(plain[key].float(), graph[key].float(), rtol=1e-2, atol=2e-3), key


@pytest.mark.gpu
def test_replayed_steps_repeat_themselves_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    same(on_gpu("sgd", "graph"), on_gpu("sgd", "graph"))


@pytest.mark.gpu
def test_a_step_that_asks_the_device_is_said_not_to_be_recorded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    weight = nn.Parameter(torch.ones(3, device="cuda"))
    optimiser = torch.optim.SGD([weight], lr=0.1, fused=True)
    taken = []

    def take(images: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor]:
        taken.append(float((images * weight).sum()))  # waits: impossible while recording
        return images.sum(), labels.sum()

    captured = graphs.Captured(take, optimiser)
    ones = torch.ones(3, device="cuda")
    for _ in range(graphs.WARM + 3):
        loss, _ = captured(ones, ones)
        assert float(loss) == 3
    assert len(taken) == graphs.WARM + 3
    assert "can't be recorded as a CUDA graph" in capsys.readouterr().err
    assert torch.rand(3, device="cuda").shape == (3,)  # the generator is usable
    torch.cuda.manual_seed(0)
