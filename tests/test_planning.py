"""How a run is computed: chosen by timing its own steps, remembered, and the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import engine, models, training
from convlens.device import Plan
from convlens.recipe import Recipe
from convlens.run import RunFolder
from convlens.starting import planning
from convlens.starting.preparing import prepare
from convlens.stepping import guarding
from support import PLAN, images_of, same, tiny

TIMED = ("train.epochs=100", "train.memory_format=auto")  # 500 steps: worth timing


def prepared(asked: Recipe) -> Any:
    return prepare(asked, images_of(asked), "cpu")


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The candidates of each timing; the last of them always wins."""
    asked: list[list[str]] = []

    def fastest(
        candidates: Sequence[Plan], trial: Callable[[Plan], Callable[[], None]]
    ) -> tuple[Plan, list[float]]:
        for plan in candidates:
            trial(plan)()  # each can be computed
        asked.append([str(plan) for plan in candidates])
        return candidates[-1], [0.002] * (len(candidates) - 1) + [0.001]

    monkeypatch.setattr(planning, "fastest", fastest)
    return asked


def test_what_was_timed_is_remembered_for_the_next_run_of_the_kind(
    timings: list[list[str]],
) -> None:
    first = prepared(tiny(*TIMED))
    assert timings == [["fp32 contiguous", "fp32 channels_last"]]
    assert first.plan.memory_format == "channels_last"
    assert first.timings == {"fp32 contiguous": 2.0, "fp32 channels_last": 1.0}
    again = prepared(tiny(*TIMED, "train.seed=3", "optim.lr=0.5"))
    assert (again.plan, again.timings) == (first.plan, first.timings)
    assert len(timings) == 1
    # A run too short for a timing of its own goes by it, too.
    assert prepared(tiny("train.memory_format=auto")).plan == first.plan
    assert len(timings) == 1


@pytest.mark.parametrize(
    "other",
    [
        "model.widths=[4, 9]", "train.batch_size=8", "optim.name=sgd", "model.trainable=head",
        "optim.clip_norm=1", "data.channels=3",
    ],
)  # fmt: skip
def test_another_kind_of_step_is_timed_anew(other: str, timings: list[list[str]]) -> None:
    prepared(tiny(*TIMED))
    prepared(tiny(*TIMED, other))
    assert len(timings) == 2


def test_short_and_deterministic_runs_time_nothing(timings: list[list[str]]) -> None:
    assert prepared(tiny("train.memory_format=auto")).plan.memory_format == "contiguous"
    exact = prepared(tiny(*TIMED, "train.deterministic=true"))
    assert (exact.plan, exact.timings) == (Plan("cpu", "fp32", "contiguous", True), {})
    assert timings == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"KEY": 3}', '{"KEY": {}}', '{"KEY": {"plan": {"x": 1}}}']
)
def test_a_damaged_memory_is_no_memory(
    content: str, timings: list[list[str]], tmp_path: Path
) -> None:
    prepared(tiny(*TIMED))
    memory = tmp_path / "cache" / "plans.json"
    (key,) = json.loads(memory.read_text())
    memory.write_text(content.replace("KEY", key))
    prepared(tiny(*TIMED))
    assert len(timings) == 2
    assert list(json.loads(memory.read_text())) == [key]


def test_the_memory_has_an_end(
    timings: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(planning, "REMEMBERED", 2)
    for width in (3, 4, 5):
        prepared(tiny(*TIMED, f"model.widths=[{width}]"))
    assert len(json.loads((tmp_path / "cache" / "plans.json").read_text())) == 2


def test_the_choice_and_its_timings_stand_in_the_run(timings: list[list[str]]) -> None:
    asked = tiny(*TIMED, "train.patience=1", "optim.lr=1e-9")
    place = training.train(asked, test=False, on="cpu", quiet=True)
    facts = RunFolder(place.path).facts()
    assert facts["plan"]["memory_format"] == "channels_last"
    assert facts["timings"] == {"fp32 contiguous": 2.0, "fp32 channels_last": 1.0}


def test_a_frozen_trunk_is_not_part_of_what_is_timed(
    timings: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    real = engine.step

    def step(model: nn.Module, images: Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(tuple(images.shape))
        return real(model, images, *rest, **more)

    monkeypatch.setattr(engine, "step", step)
    prepared(tiny(*TIMED, "model.trainable=head", "model.head=flatten"))
    assert set(seen) == {(16, 32)}  # 8 maps of 2 x 2, flattened, instead of 16 x 1 x 8 x 8


# A batch in parts


def test_parts_are_candidates_where_they_change_nothing(timings: list[list[str]]) -> None:
    options = (*TIMED, "train.batch_size=64", "train.epochs=300")
    prepared(tiny(*options, "model.batch_norm=false"))
    prepared(tiny(*options))
    whole = ["fp32 contiguous", "fp32 channels_last"]
    assert timings == [
        [plan + part for plan in whole for part in ("", " by 32", " by 16")],
        whole,
    ]


def test_parts_are_the_batch_in_order() -> None:
    images, labels = torch.arange(10.0), torch.arange(10)
    whole = list(PLAN.parts(images, labels))
    assert len(whole) == 1
    assert whole[0][0] is images
    parts = list(Plan("cpu", "fp32", "contiguous", part=4).parts(images, labels))
    assert [len(few) for few, _ in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([few for few, _ in parts]), images)
    assert torch.equal(torch.cat([few for _, few in parts]), labels)


@pytest.mark.parametrize("mixed", [False, True], ids=["classes", "probabilities"])
def test_a_step_in_parts_is_the_step_of_the_whole(mixed: bool) -> None:
    def stepped(part: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = models.build("cnn", 5, 1, 8, {"widths": [4], "batch_norm": False}).double()
        images = torch.randn(11, 1, 8, 8, dtype=torch.float64)
        labels = torch.arange(11) % 5
        answers = torch.rand(11, 5, dtype=torch.float64).softmax(1) if mixed else labels
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        plan = Plan("cpu", "fp32", "contiguous", part=part)
        objective = nn.CrossEntropyLoss(label_smoothing=0.1)
        clip = engine.clipper(model, None, 0.1)
        loss, right = engine.step(model, images, answers, objective, optimiser, plan, clip)
        assert loss is not None
        return loss, right, model.state_dict()

    loss, right, weights = stepped(0)
    for part in (1, 4, 10):
        its_loss, its_right, its_weights = stepped(part)
        assert torch.equal(its_right, right)
        torch.testing.assert_close(its_loss, loss, rtol=1e-6, atol=0)
        for name, weight in weights.items():
            torch.testing.assert_close(its_weights[name], weight, rtol=1e-6, atol=1e-9)
    same(weights, stepped(11)[2])


def test_a_bad_part_leaves_no_gradient_behind() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.ones(4, 1, 2, 2)
    images[3] = torch.nan
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plan = Plan("cpu", "fp32", "contiguous", part=2)
    loss, _ = engine.step(
        model, images, torch.zeros(4, dtype=torch.int64), nn.CrossEntropyLoss(), optimiser, plan,
        lets=guarding.Waiting(model).lets,
    )  # fmt: skip
    assert loss is None
    assert all(parameter.grad is None for parameter in model.parameters())
    same(model.state_dict(), before)
