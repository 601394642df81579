"""Out of memory: training continues in micro-batches with the same bits, and reports it.

Only the size of the memory is simulated: torch's allocator fails because it must allocate more than
any machine has, or because the process has a limit (`RLIMIT_DATA`).
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

from convlens import optim
from convlens.data.loader import Normalize
from convlens.device import Plan
from convlens.engine import inference, loop, oom
from convlens.engine.inference import split_logits
from convlens.engine.loop import NonFiniteLoss, Step, TrainLoop, TrainState
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
from helpers.memory_limits import allocate_too_much, greedy
from helpers.nonfinite_runs import OPTIMIZERS, Run, batches
from helpers.support import PLAN, Memory, Split, begin, images_of, pictures, same, tiny

PLAIN = "model.batch_norm=false"


# Recognizing the error


def test_out_of_memory_errors_of_torch_and_python_are_recognized() -> None:
    for allocate in (allocate_too_much, lambda: bytearray(1 << 60), lambda: torch.ones(1 << 58)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_oom(caught.value)
        assert oom.out_of_memory_error(caught.value).exit_code == 5
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_oom(caught.value)
    assert not is_oom(OSError("Cannot allocate memory"))
    assert "1152921504606846976 bytes" in _failure().where


def _failure() -> ResourceError:
    with pytest.raises(RuntimeError) as caught:
        allocate_too_much()
    return oom.out_of_memory_error(caught.value)


def test_catch_oom_does_not_convert_other_errors() -> None:
    with pytest.raises(ZeroDivisionError), oom.catch_oom(3):
        raise ZeroDivisionError
    with pytest.raises(OutOfMemory) as caught, oom.catch_oom(3):
        allocate_too_much()
    assert caught.value.images == 3


# Training


def train_to_end(
    recipe: Recipe, name: str, part: int = 0, most: int = 0, back: bool = False
) -> Any:
    """Train with a plan of `part` images per micro-batch, or with memory for `most` images."""
    job, run_dir = begin(recipe, name)
    if part:
        job = build_training_job(
            recipe,
            images_of(recipe),
            RuntimeContext("cpu", quiet=True),
            plan=replace(job.plan, micro_batch_size=part),
        )
    job.context = RuntimeContext("cpu")  # not quiet: the message about memory is printed
    seen = greedy(job.inputs.model, most, back=back) if most else []
    rows, kept = train.fit(job, run_dir)
    run_dir.finish(epochs=len(rows), kept=kept, seconds=0.0)
    return run_dir, seen


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "options",
    [(PLAIN, *EVERYTHING), (PLAIN, *SGD), (), (*EVERYTHING, "train.batch_size=13")],
    ids=["everything", "sgd", "norms", "norms-everything"],
)
def test_a_run_that_runs_out_of_memory_equals_one_with_smaller_micro_batches(
    options: tuple[str, ...], back: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Including the statistics of batch norm: the update by the whole batch is undone."""
    recipe = tiny(*options)
    short, seen = train_to_end(recipe, "short", most=5, back=back)
    size = recipe.train.batch_size
    assert seen[:3] == [size, size // 2, size // 4]
    assert max(seen[3:]) <= 5
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "out of memory" in line]
    assert f"a batch of {size} is now computed {size // 4} images at a time" in line
    assert ("batch norm uses the statistics of a micro-batch" in line) == (PLAIN not in options)
    (event,) = short.metadata()["out_of_memory"]
    assert event == {"part": size // 4, "epoch": 1, "step": 1, "batch_norm": PLAIN not in options}
    equal(short, train_to_end(recipe, "parts", part=size // 4)[0])
    assert "out_of_memory" not in RunDir(Path("models/parts")).metadata()


@pytest.mark.parametrize("synchronous", [True, False], ids=["synchronous", "deferred"])
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_continues_in_micro_batches_from_the_step_that_failed(
    options: dict[str, Any], synchronous: bool
) -> None:
    short = Run(options, 8, synchronous)
    greedy(short.model, 5, first=12)  # the fifth step of the second epoch
    steps = [
        (record.epoch - 1) * 8 + record.step
        for record in short.fit(batches(8, None))
        if isinstance(record, Step)
    ]
    assert steps == list(range(1, 17))
    assert short.progress.micro_batch_size == 4

    resumed = Run(options, 8, synchronous)
    records = resumed.fit(batches(8, None))
    while (resumed.progress.epoch - 1) * 8 + resumed.progress.step < 12:
        next(records)
    records.close()
    resumed.progress.micro_batch_size = 4
    list(resumed.fit(batches(8, None)))
    same(short.state(), resumed.state())


def test_a_loss_that_was_not_finite_is_reported_if_memory_runs_out_before_it_is_read() -> None:
    run = Run(OPTIMIZERS["adam"], 8, synchronous=False)
    greedy(run.model, 5, first=5)
    with pytest.raises(NonFiniteLoss) as caught:
        list(run.fit(batches(8, 2)))
    assert (caught.value.epoch, caught.value.step) == (1, 3)


@pytest.mark.parametrize("resumed", [False, True])
def test_micro_batches_are_computed_without_cuda_graphs(
    resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph would overwrite the gradients of one micro-batch by those of the next."""
    modes = []

    def compile_model(model: nn.Module, plan: Plan) -> nn.Module:
        modes.append(plan.step_mode)
        return model

    monkeypatch.setattr(loop, "compile_model", compile_model)
    run = Run(OPTIMIZERS["adam"], 2, synchronous=True)
    training = TrainLoop(
        run.model,
        run.optimizer,
        nn.CrossEntropyLoss(),
        replace(PLAN, step_mode="reduce-overhead"),
    )
    state = TrainState(micro_batch_size=4 if resumed else 0)
    if not resumed:
        greedy(run.model, 5)
    schedule = optim.build_schedule(run.config)
    list(training.run(batches(2, None), schedule, epochs=1, seed=3, state=state))
    assert modes == ["reduce-overhead", "compiled"]
    assert training.plan == replace(PLAN, step_mode="compiled", micro_batch_size=4)


def test_a_resumed_run_keeps_its_micro_batch_size(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even if there is enough memory by then."""
    recipe = tiny(PLAIN, *EVERYTHING)
    whole, _ = train_to_end(recipe, "whole", most=5)
    job, run_dir = begin(recipe, "stopped")
    greedy(job.inputs.model, 5)

    class Killed(BaseException):
        pass

    real, calls = TrainLoop.train_step, []

    def step(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:  # three attempts of the first step, the second step, then the third
            raise Killed
        return real(*arguments, **more)

    monkeypatch.setattr(TrainLoop, "train_step", step)
    with pytest.raises(Killed):
        train.fit(job, run_dir)
    monkeypatch.setattr(TrainLoop, "train_step", real)
    job, run_dir = begin(recipe, "stopped")  # with enough memory
    rows, kept = train.fit(job, run_dir)
    run_dir.finish(epochs=len(rows), kept=kept, seconds=0.0)
    assert job.state.micro_batch_size == 4
    equal(run_dir, whole)


def test_batch_norm_is_never_trained_on_a_single_image() -> None:
    run = Run(OPTIMIZERS["sgd"], 4, True)
    seen = greedy(run.model, 3)
    list(run.fit(batches(4, None)))  # batches of 9 and 8
    assert seen[:3] == [9, 4, 2]
    assert set(seen[3:]) == {2, 3}  # a single remaining image joins the micro-batch before it
    for most, images in ((2, 3), (1, 2)):
        run = Run(OPTIMIZERS["sgd"], 4, True)
        greedy(run.model, most)
        with pytest.raises(ResourceError, match=f"train on {images} images .*can't train on one"):
            list(run.fit(batches(4, None)))


@pytest.mark.parametrize("synchronous", [True, False], ids=["synchronous", "deferred"])
def test_if_no_micro_batch_fits_nothing_is_changed(synchronous: bool) -> None:
    run = Run({**OPTIMIZERS["adamw"], "ema": 0.9}, 6, synchronous)
    before = {name: tensor.clone() for name, tensor in run.state().items()}
    greedy(run.model, 0)
    with pytest.raises(ResourceError) as caught:
        list(run.fit(batches(6, None)))
    assert caught.value.exit_code == 5
    assert "data.image_size" in caught.value.fix
    same(run.state(), before)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_one_of_several_processes_does_not_change_its_micro_batch_size() -> None:
    with pytest.raises(ResourceError, match="8 images of a batch that this process computes"):
        oom.next_micro_batch_size(nn.Linear(1, 1), OutOfMemory(8), 0, distributed=True)


SCRIPT = """
from convlens import cli, distributed
from convlens.training import setup, train
from helpers.memory_limits import greedy

def build_training_job(*arguments, **options):
    job = setup.build_training_job(*arguments, **options)
    if distributed.init_process_group().rank == 1:
        greedy(job.inputs.model, 3)
    return job

train.build_training_job = build_training_job
cli.main(["train", "tiny.yaml", "--no-test", "--device", "cpu"])
"""


@pytest.mark.slow
def test_all_processes_stop_if_one_runs_out_of_memory() -> None:
    Path("tiny.yaml").write_text(tiny(PLAIN).to_text())
    Path("script.py").write_text(SCRIPT)
    done = torchrun(2, "script.py")
    assert done.code != 0
    assert done.err.count("error:") == 1, done.err
    assert "not enough memory for the 8 images of a batch" in done.err
    assert "train.batch_size" in done.err


# Autotuner and inference


def test_a_plan_that_runs_out_of_memory_is_not_chosen() -> None:
    plans = [Plan("cpu", "fp32", "contiguous", micro_batch_size=part) for part in (0, 8)]

    def trial(plan: Plan) -> Callable[[], None]:
        def step() -> None:
            with oom.catch_oom(16):
                if not plan.micro_batch_size:
                    allocate_too_much()

        return step

    chosen, seconds = autotune.fastest(plans, trial)
    assert chosen is plans[1]
    assert seconds[0] == float("inf") > seconds[1]
    # If all plans run out of memory, the first one is chosen, and the training handles it.
    assert autotune.fastest(plans[:1] * 2, trial)[0] is plans[0]


def test_recorded_timings_are_finite() -> None:
    recipe = tiny(PLAIN, "train.batch_size=64", "train.epochs=300", "train.patience=1")
    seen: list[int] = []
    real = TrainLoop.train_step

    def step(loop: TrainLoop, images: Tensor, targets: Tensor) -> Any:
        with oom.catch_oom(len(images)):
            seen.append(loop.plan.micro_batch_size)
            if not loop.plan.micro_batch_size:
                allocate_too_much()
        return real(loop, images, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoop, "train_step", step)
        job = build_training_job(recipe, images_of(recipe), RuntimeContext("cpu", quiet=True))
    assert job.plan.micro_batch_size in (16, 32)
    assert set(seen) == {0, 16, 32}
    assert set(job.timings) == {"fp32 contiguous by 32", "fp32 contiguous by 16"}
    json.dumps(job.timings, allow_nan=False)


def test_inference_continues_with_half_as_many_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    split = Split(Memory(pictures(50)), torch.zeros(50, dtype=torch.int64))
    expected, _ = split_logits(model, split, Normalize([0.5], [0.25]), PLAN)
    seen: list[int] = []

    def fail(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append(len(output))
        if len(output) > 5:
            allocate_too_much()

    handle = model.register_forward_hook(fail)
    found, _ = split_logits(model, split, Normalize([0.5], [0.25]), PLAN)
    assert seen == [16, 8, *[4] * 12, 2]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    handle.remove()
    model.register_forward_hook(lambda *_: allocate_too_much())
    with pytest.raises(ResourceError, match="not enough memory"):
        split_logits(model, split, Normalize([0.5], [0.25]), PLAN)
    assert inference.FIRST_BATCH == 16


# Commands with a memory limit

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
    """Run a command that may allocate so many megabytes after its imports."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(megabytes), *arguments],
        capture_output=True,
        text=True,
        env=environment(MALLOC_ARENA_MAX="1"),
        check=False,
        timeout=240,
    )


def large(*overrides: str) -> Recipe:
    """One step that takes about 500 MB for a batch of 300 images, and less for fewer."""
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
def test_a_process_with_a_memory_limit_trains_in_micro_batches() -> None:
    recipe = large()
    Path("large.yaml").write_text(recipe.to_text())
    done = limited(200, "train", "large.yaml", "--no-test", "--device", "cpu", "--name", "short")
    assert done.returncode == 0, done.stderr
    (event,) = RunDir(Path("models/short")).metadata()["out_of_memory"]
    part = event["part"]
    assert 0 < part <= 150
    assert f"a batch of 300 is now computed {part} images at a time" in done.stderr
    train_to_end(recipe, "parts", part=part)
    same(weights(Path("models/short")), weights(Path("models/parts")))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux")
def test_a_process_with_far_too_little_memory_reports_it() -> None:
    """Weights, gradients and moments take 604 MB with any batch size."""
    recipe = large("model.widths=[2048, 2048]", "data.image_size=8", "train.batch_size=16")
    Path("large.yaml").write_text(recipe.to_text())
    done = limited(420, "train", "large.yaml", "--no-test", "--device", "cpu")
    assert done.returncode == 5, done.stderr
    assert "error: not enough memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr[done.stderr.index("error:") :].splitlines()) <= 5


@pytest.mark.gpu
def test_a_gpu_with_a_memory_limit_trains_in_micro_batches() -> None:
    recipe = large("train.compile=false", "train.precision=fp32")
    Path("large.yaml").write_text(recipe.to_text())
    torch.cuda.set_per_process_memory_fraction(
        300 * 2**20 / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        run_dir = train.train(recipe, name="short", test=False, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < run_dir.metadata()["out_of_memory"][-1]["part"] <= 150
