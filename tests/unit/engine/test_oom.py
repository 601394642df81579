"""Memory that runs out: the same updates in smaller parts, bit for bit; and said aloud.

Nothing is simulated but the size of the memory: what fails is torch's allocator, asked for more
than any machine has, or a process that may not have more (`RLIMIT_DATA`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens.data.loader import Normalize
from convlens.device import Plan
from convlens.engine import inference, oom
from convlens.engine.inference import split_logits
from convlens.engine.loop import Step, TrainLoop
from convlens.engine.oom import OutOfMemory, is_oom
from convlens.errors import ResourceError
from convlens.recipe import Recipe
from convlens.run import RunDir
from convlens.runtime import RuntimeContext
from convlens.training import autotune, train
from convlens.training.setup import build_training_job
from helpers.commands import environment, weights
from helpers.interrupted_runs import EVERYTHING, SGD, equal
from helpers.launching import torchrun
from helpers.nonfinite_runs import OPTIMIZERS, Run, batches
from helpers.support import PLAN, Memory, Split, begin, images_of, pictures, same, tiny

PLAIN = "model.batch_norm=false"


def ask_for_too_much() -> None:
    """A failure of torch's allocator: no machine has 2^60 bytes."""
    torch.empty(1 << 60, dtype=torch.uint8)


class Asking(torch.autograd.Function):
    """Values as they are; the way back asks for too much."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(context: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        ask_for_too_much()
        return gradient


def greedy(model: nn.Module, most: int, *, back: bool = False, first: int = 0) -> list[int]:
    """Makes a network need too much memory to train on more than `most` images at once.

    Its norms have seen the images by then. Returns how many there were, call by call.

    Args:
        back: on the way back instead.
        first: so many calls are let through, whatever their size.
    """
    seen: list[int] = []

    def ask(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if not module.training:
            return output
        seen.append(len(output))
        if len(output) <= most or len(seen) <= first:
            return output
        if back:
            return Asking.apply(output)
        ask_for_too_much()
        return output

    model.register_forward_hook(ask)
    return seen


# What torch says


def test_what_torch_says_is_understood() -> None:
    for fails in (ask_for_too_much, lambda: bytearray(1 << 60), lambda: torch.ones(1 << 58)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            fails()
        assert is_oom(caught.value)
        assert oom.out_of_memory_error(caught.value).exit_code == 5
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_oom(caught.value)
    assert not is_oom(OSError("Cannot allocate memory"))
    assert "1152921504606846976 bytes" in _failure().where


def _failure() -> ResourceError:
    with pytest.raises(RuntimeError) as caught:
        ask_for_too_much()
    return oom.out_of_memory_error(caught.value)


def test_trying_leaves_other_errors_alone() -> None:
    with pytest.raises(ZeroDivisionError), oom.catch_oom(3):
        raise ZeroDivisionError
    with pytest.raises(OutOfMemory) as caught, oom.catch_oom(3):
        ask_for_too_much()
    assert caught.value.images == 3


# A training


def finished(asked: Recipe, name: str, part: int = 0, most: int = 0, back: bool = False) -> Any:
    """A run to its end: by a plan with that part, or with memory for `most` images."""
    job, place = begin(asked, name)
    if part:
        job = build_training_job(
            asked,
            images_of(asked),
            RuntimeContext("cpu", quiet=True),
            plan=replace(job.plan, micro_batch_size=part),
        )
    seen = greedy(job.inputs.model, most, back=back) if most else []
    rows, kept = train.fit(job, place)
    place.finish(epochs=len(rows), kept=kept, seconds=0.0)
    return place, seen


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "options",
    [(PLAIN, *EVERYTHING), (PLAIN, *SGD), (), (*EVERYTHING, "train.batch_size=13")],
    ids=["everything", "sgd", "norms", "norms-everything"],
)
def test_where_memory_runs_out_the_run_is_that_of_the_smaller_parts(
    options: tuple[str, ...], back: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even batch norm's statistics: what they saw of the whole batch is undone."""
    asked = tiny(*options)
    short, seen = finished(asked, "short", most=5, back=back)
    size = asked.train.batch_size
    tries = [size, size // 2, size // 4]
    assert seen[:3] == tries
    assert max(seen[3:]) <= 5
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "out of memory" in line]
    assert f"a batch of {size} is now computed {size // 4} images at a time" in line
    assert ("batch norm uses the statistics of a micro-batch" in line) == (PLAIN not in options)
    (noted,) = short.metadata()["out_of_memory"]
    assert noted == {"part": size // 4, "epoch": 1, "step": 1, "batch_norm": PLAIN not in options}
    equal(short, finished(asked, "parts", part=size // 4)[0])
    assert "out_of_memory" not in RunDir(Path("models/parts")).metadata()


@pytest.mark.parametrize("synchronous", [True, False], ids=["synchronous", "deferred"])
@pytest.mark.parametrize("asked", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_continues_in_micro_batches_from_the_step_that_failed(
    asked: dict[str, Any], synchronous: bool
) -> None:
    short = Run(asked, 8, synchronous)
    greedy(short.model, 5, first=12)  # the fifth step of the second epoch
    steps = [
        (record.epoch - 1) * 8 + record.step
        for record in short.fit(batches(8, None))
        if isinstance(record, Step)
    ]
    assert steps == list(range(1, 17))
    assert short.progress.micro_batch_size == 4

    other = Run(asked, 8, synchronous)
    records = other.fit(batches(8, None))
    while (other.progress.epoch - 1) * 8 + other.progress.step < 12:
        next(records)
    records.close()
    other.progress.micro_batch_size = 4
    list(other.fit(batches(8, None)))
    same(short.state(), other.state())


def test_a_run_that_is_taken_up_has_the_same_parts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where there is memory enough by then."""
    asked = tiny(PLAIN, *EVERYTHING)
    whole, _ = finished(asked, "whole", most=5)
    job, place = begin(asked, "stopped")
    greedy(job.inputs.model, 5)

    class Killed(BaseException):
        pass

    real, calls = TrainLoop.train_step, []

    def step(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:  # three tries of the first step, the second one, and in the third
            raise Killed
        return real(*arguments, **more)

    monkeypatch.setattr(TrainLoop, "train_step", step)
    with pytest.raises(Killed):
        train.fit(job, place)
    monkeypatch.setattr(TrainLoop, "train_step", real)
    job, place = begin(asked, "stopped")  # nobody is greedy now
    rows, kept = train.fit(job, place)
    place.finish(epochs=len(rows), kept=kept, seconds=0.0)
    assert job.state.micro_batch_size == 4
    equal(place, whole)


def test_a_batch_norm_never_sees_one_image() -> None:
    run = Run(OPTIMIZERS["sgd"], 4, True)
    seen = greedy(run.model, 3)
    list(run.fit(batches(4, None)))  # batches of 9 and 8
    assert seen[:3] == [9, 4, 2]
    assert set(seen[3:]) == {2, 3}  # a single one left over joins the part before it
    for most, images in ((2, 3), (1, 2)):
        run = Run(OPTIMIZERS["sgd"], 4, True)
        greedy(run.model, most)
        with pytest.raises(ResourceError, match=f"train on {images} images .*can't train on one"):
            list(run.fit(batches(4, None)))


@pytest.mark.parametrize("synchronous", [True, False], ids=["synchronous", "deferred"])
def test_where_nothing_fits_nothing_is_changed(synchronous: bool) -> None:
    run = Run({**OPTIMIZERS["adamw"], "ema": 0.9}, 6, synchronous)
    before = {name: tensor.clone() for name, tensor in run.state().items()}
    greedy(run.model, 0)
    with pytest.raises(ResourceError) as caught:
        list(run.fit(batches(6, None)))
    assert caught.value.exit_code == 5
    assert "data.image_size" in caught.value.fix
    same(run.state(), before)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_one_of_several_processes_does_not_go_on_otherwise() -> None:
    with pytest.raises(ResourceError, match="8 images of a batch that are this process's"):
        oom.next_micro_batch_size(nn.Linear(1, 1), OutOfMemory(8), 0, distributed=True)


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from convlens import cli, distributed
from convlens.training import setup, train
from test_oom import greedy

def build_training_job(*arguments, **options):
    job = setup.build_training_job(*arguments, **options)
    if distributed.init_process_group().rank == 1:
        greedy(job.inputs.model, 3)
    return job

train.build_training_job = build_training_job
cli.main(["train", "tiny.yaml", "--no-test", "--device", "cpu"])
"""


@pytest.mark.slow
def test_all_processes_end_where_one_has_no_memory() -> None:
    Path("tiny.yaml").write_text(tiny(PLAIN).to_text())
    Path("script.py").write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    done = torchrun(2, "script.py")
    assert done.code != 0
    assert done.err.count("error:") == 1, done.err
    assert "not enough memory for the 8 images of a batch" in done.err
    assert "train.batch_size" in done.err


# Other places


def test_a_candidate_without_memory_is_no_candidate() -> None:
    plans = [Plan("cpu", "fp32", "contiguous", micro_batch_size=part) for part in (0, 8)]

    def trial(plan: Plan) -> Callable[[], None]:
        def step() -> None:
            with oom.catch_oom(16):
                if not plan.micro_batch_size:
                    ask_for_too_much()

        return step

    chosen, seconds = autotune.fastest(plans, trial)
    assert chosen is plans[1]
    assert seconds[0] == float("inf") > seconds[1]
    # If there is none for any, the first one is taken, and the training finds out.
    assert autotune.fastest(plans[:1] * 2, trial)[0] is plans[0]


def test_timings_of_a_run_hold_no_infinity() -> None:
    asked = tiny(PLAIN, "train.batch_size=64", "train.epochs=300", "train.patience=1")
    seen: list[int] = []
    real = TrainLoop.train_step

    def step(loop: TrainLoop, images: Tensor, targets: Tensor) -> Any:
        with oom.catch_oom(len(images)):
            seen.append(loop.plan.micro_batch_size)
            if not loop.plan.micro_batch_size:
                ask_for_too_much()
        return real(loop, images, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoop, "train_step", step)
        job = build_training_job(asked, images_of(asked), RuntimeContext("cpu", quiet=True))
    assert job.plan.micro_batch_size in (16, 32)
    assert set(seen) == {0, 16, 32}
    assert set(job.timings) == {"fp32 contiguous by 32", "fp32 contiguous by 16"}
    json.dumps(job.timings, allow_nan=False)


def test_inference_goes_on_with_half_as_many_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    split = Split(Memory(pictures(50)), torch.zeros(50, dtype=torch.int64))
    expected, _ = split_logits(model, split, Normalize([0.5], [0.25]), PLAN)
    seen: list[int] = []

    def ask(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append(len(output))
        if len(output) > 5:
            ask_for_too_much()

    handle = model.register_forward_hook(ask)
    found, _ = split_logits(model, split, Normalize([0.5], [0.25]), PLAN)
    assert seen == [16, 8, *[4] * 12, 2]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    handle.remove()
    model.register_forward_hook(lambda *_: ask_for_too_much())
    with pytest.raises(ResourceError, match="not enough memory"):
        split_logits(model, split, Normalize([0.5], [0.25]), PLAN)
    assert inference.FIRST_BATCH == 16


# A command that may not have more

LIMITED = """
import re, resource, sys
from pathlib import Path
from convlens import cli
import convlens.training.train, convlens.run_plots, convlens.plots.charts

def data():
    return int(re.search(r"VmData:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

limit = data() + (int(sys.argv[1]) << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
cli.main(sys.argv[2:])
"""


def limited(megabytes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that may take so many megabytes more than its program itself."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(megabytes), *arguments],
        capture_output=True,
        text=True,
        env=environment(MALLOC_ARENA_MAX="1"),
        check=False,
        timeout=240,
    )


def large(*overrides: str) -> Recipe:
    """One step: some 500 MB for its batch of 300 images, and as much less for fewer."""
    return tiny(
        PLAIN,
        "data.per_class=30",
        "data.image_size=64",
        "model.widths=[32]",
        "train.epochs=1",
        "train.batch_size=300",
        "optim.lr=0.001",
        "train.keep=last",
        *overrides,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux")
def test_a_process_without_memory_trains_in_parts() -> None:
    asked = large()
    Path("large.yaml").write_text(asked.to_text())
    done = limited(200, "train", "large.yaml", "--no-test", "--device", "cpu", "--name", "short")
    assert done.returncode == 0, done.stderr
    (noted,) = RunDir(Path("models/short")).metadata()["out_of_memory"]
    part = noted["part"]
    assert 0 < part <= 150
    assert f"a batch of 300 is now computed {part} images at a time" in done.stderr
    finished(asked, "parts", part=part)
    same(weights(Path("models/short")), weights(Path("models/parts")))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux")
def test_a_process_with_far_too_little_says_so() -> None:
    """Weights, gradients and moments are 604 MB, whatever the batch."""
    asked = large("model.widths=[2048, 2048]", "data.image_size=8", "train.batch_size=16")
    Path("large.yaml").write_text(asked.to_text())
    done = limited(420, "train", "large.yaml", "--no-test", "--device", "cpu")
    assert done.returncode == 5, done.stderr
    assert "error: not enough memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr[done.stderr.index("error:") :].splitlines()) <= 5


@pytest.mark.gpu
def test_a_gpu_without_memory_trains_in_parts() -> None:
    asked = large("train.compile=false", "train.precision=fp32")
    Path("large.yaml").write_text(asked.to_text())
    torch.cuda.set_per_process_memory_fraction(
        300 * 2**20 / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        place = train.train(asked, name="short", test=False, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < place.metadata()["out_of_memory"][-1]["part"] <= 150
