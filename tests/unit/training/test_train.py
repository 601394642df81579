"""Training runs: the weights that are kept, early stopping, failures and finished runs."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convlens import device, evaluation, optim, serialization
from convlens.analysis.compare import compare
from convlens.cli import main
from convlens.data.dataset import load_data
from convlens.data.decode import Conversion
from convlens.device import Plan
from convlens.errors import Diverged, ResourceError, UsageError
from convlens.prediction import predict
from convlens.recipe import load_recipe
from convlens.run import VALIDATION_COLUMNS, RunDir, load_model
from convlens.runtime import RuntimeContext
from convlens.training import autotune, train as training_train
from convlens.training.checkpoint import BestEpoch
from convlens.training.setup import build_training_job
from convlens.utils.files import sha256
from helpers.commands import pictures as class_folders
from helpers.support import begin, images_of, same, tiny


def train(*overrides: str, **options: Any) -> RunDir:
    settings: dict[str, Any] = {
        "is_unmodified_recipe": True,
        "test": False,
        "device": "cpu",
        "quiet": True,
    }
    return training_train.train(tiny(*overrides), **{**settings, **options})


# Which weights are kept


class Scripted:
    """Validation that returns prescribed losses and remembers each epoch's weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        real = training_train._validate

        def validate(job: Any, record: Any, flag: Any, *, seconds: float) -> dict[str, float]:
            with optim.averaged_weights(job.averager):
                state = job.model.state_dict()
                self.weights[record.epoch] = {k: v.clone() for k, v in state.items()}
            row = real(job, record, flag, seconds=seconds)
            loss = losses[record.epoch - 1]
            higher_is_better = dict.fromkeys(VALIDATION_COLUMNS, 1 - loss)
            return {**row, **higher_is_better, "val_loss": loss}

        monkeypatch.setattr(training_train, "_validate", validate)


def finish(*overrides: str, epochs: int) -> RunDir:
    job, run_dir = begin(tiny(f"train.epochs={epochs}", *overrides), "x")
    rows, kept = training_train.fit(job, run_dir)
    run_dir.finish(epochs=len(rows), kept=kept, seconds=0.0)
    return run_dir


@pytest.mark.parametrize("average", ["optim.ema=0.8", "optim.ema=null"])
@pytest.mark.parametrize("monitor", VALIDATION_COLUMNS)
def test_the_weights_of_the_best_epoch_are_kept(
    monitor: str, average: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted(monkeypatch, [0.9, 0.5, 0.3, 0.3, 0.6])
    run_dir = finish(f"train.monitor={monitor}", average, epochs=5)
    tensors, model_metadata = serialization.read_model_file(run_dir.model_path)
    same(tensors, scripted.weights[3])  # equal values don't replace an earlier epoch
    assert not all(torch.equal(tensors[k], scripted.weights[5][k]) for k in tensors)
    assert model_metadata["chosen"] == {
        "epoch": 3,
        "validated": True,
        "rule": f"best {monitor}",
        "val_loss": 0.3,
        "val_accuracy": 0.7,
        "val_macro_f1": 0.7,
        "val_balanced_accuracy": 0.7,
    }
    assert run_dir.metadata()["kept_epoch"] == 3


def test_keep_last_keeps_the_last_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted(monkeypatch, [0.1, 0.5, 0.9])
    run_dir = finish("train.keep=last", epochs=3)
    tensors, model_metadata = serialization.read_model_file(run_dir.model_path)
    same(tensors, scripted.weights[3])
    assert (model_metadata["chosen"]["epoch"], model_metadata["chosen"]["rule"]) == (
        3,
        "last epoch",
    )
    assert run_dir.metadata()["kept_epoch"] == 3


@pytest.mark.parametrize(
    ("losses", "patience", "epochs", "kept"),
    [
        ([0.5, 0.4, 0.6, 0.6, 0.1], 2, 4, 2),
        ([0.5, 0.4, 0.6, 0.3, 0.4, 0.4, 0.1], 2, 6, 4),
        ([0.5, 0.5, 0.1], 1, 2, 1),
        ([0.5, 0.4, 0.3], 1, 3, 3),
    ],
)
def test_early_stopping_counts_epochs_without_improvement(
    losses: list[float], patience: int, epochs: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted(monkeypatch, losses)
    run_dir = finish(f"train.patience={patience}", epochs=len(losses))
    assert len(run_dir.metrics()) == run_dir.metadata()["epochs"] == epochs
    assert run_dir.metadata()["kept_epoch"] == kept
    same(serialization.read_model_file(run_dir.model_path)[0], scripted.weights[kept])


def best_of(*values: float, monitor: str = "val_loss") -> tuple[int, int]:
    best = BestEpoch(monitor)
    for epoch, value in enumerate(values, 1):
        best.update({"epoch": epoch, "val_loss": 1.0, monitor: value})
    return best.epoch, best.stale


def test_equal_accuracies_are_ordered_by_loss() -> None:
    best = BestEpoch("val_accuracy")
    rows = [(0.5, 1.0), (0.5, 0.9), (0.5, 0.95), (0.4, 0.1), (0.5, math.nan)]
    improved = [
        best.update({"epoch": epoch, "val_accuracy": accuracy, "val_loss": loss})
        for epoch, (accuracy, loss) in enumerate(rows, 1)
    ]
    assert improved == [True, True, False, False, False]
    assert (best.epoch, best.value, best.stale) == (2, 0.5, 3)


def test_a_non_finite_value_is_best_only_in_the_first_epoch() -> None:
    nan, inf = float("nan"), float("inf")
    assert best_of(nan) == (1, 0)
    assert best_of(nan, 5.0, nan) == (2, 1)
    assert best_of(nan, nan, nan) == (1, 2)
    assert best_of(inf, 5.0) == (2, 0)
    assert best_of(nan, 0.5, 0.4, monitor="val_accuracy") == (2, 1)


@pytest.mark.parametrize("average", ["optim.ema=0.8", "optim.ema=null"])
def test_the_metrics_of_the_kept_epoch_match_the_model_file(average: str) -> None:
    run_dir = train(average, "train.epochs=4", "optim.lr=0.05")
    rows = run_dir.metrics()
    best = min(rows, key=lambda row: row["val_loss"])
    assert run_dir.metadata()["kept_epoch"] == best["epoch"]
    result = evaluation.evaluate(run_dir, "val", device="cpu", quiet=True)
    assert result.loss == pytest.approx(best["val_loss"], rel=1e-5)
    assert result.accuracy == pytest.approx(best["val_accuracy"], rel=1e-6)
    assert result.macro_f1 == pytest.approx(best["val_macro_f1"], rel=1e-6)
    assert result.balanced_accuracy == pytest.approx(best["val_balanced_accuracy"], rel=1e-6)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


# Runs that fail


def test_a_non_finite_loss_keeps_the_last_finite_weights() -> None:
    with pytest.raises(Diverged, match="NaN or infinite") as caught:
        train("optim.lr=1e9", "optim.name=sgd", "train.batch_size=8", "model.batch_norm=false")
    assert caught.value.exit_code == 6
    assert "models/tiny" in caught.value.where
    run_dir = RunDir(Path("models/tiny"))
    assert run_dir.metadata()["status"] == "training"
    if run_dir.model_path.exists():
        tensors, model_metadata = serialization.read_model_file(run_dir.model_path)
        assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
        assert model_metadata["chosen"]["validated"] is False


def test_weights_that_overflow_in_the_last_step_of_an_epoch_are_not_saved() -> None:
    """The loss was finite, the update was not: no further step would notice."""
    with pytest.raises(Diverged, match="NaN or infinite, so they were not saved"):
        train("optim.lr=1e38", "optim.weight_decay=1e6", "optim.name=sgd", "train.batch_size=80")
    run_dir = RunDir(Path("models/tiny"))
    assert not run_dir.is_finished
    assert not run_dir.model_path.exists()


def test_a_run_that_fails_to_start_does_not_reserve_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise UsageError("the network can't be built")

    with monkeypatch.context() as patch:
        patch.setattr(training_train, "build_training_job", broken)
        with pytest.raises(UsageError):
            train()
    assert train("train.epochs=1").name == "tiny"


# Finished runs


def test_a_finished_run_is_not_trained_again() -> None:
    run_dir = train("train.epochs=1")
    before = {
        path.name: (path.stat().st_mtime_ns, path.stat().st_ino, sha256(path))
        for path in run_dir.path.iterdir()
        if path.is_file()
    }
    assert {"model.safetensors", "recipe.yaml", "run.json", "split.csv", "metrics.csv"} <= set(
        before
    )
    repeated = train("train.epochs=1", test=True)
    assert repeated.path == run_dir.path
    for name, stat in before.items():
        path = run_dir.path / name
        assert (path.stat().st_mtime_ns, path.stat().st_ino, sha256(path)) == stat, name
    assert [entry["split"] for entry in repeated.evaluations()] == ["test"]
    fresh = train("train.epochs=1", fresh=True)
    assert fresh.path != run_dir.path
    same(
        serialization.read_model_file(fresh.model_path)[0],
        serialization.read_model_file(run_dir.model_path)[0],
    )
    resolved = load_recipe(run_dir.path / "recipe.yaml")
    by_resolved_recipe = training_train.train(
        resolved, is_unmodified_recipe=True, test=False, device="cpu", quiet=True
    )
    assert by_resolved_recipe.path in (run_dir.path, fresh.path)


def test_a_run_finished_by_another_process_meanwhile_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes start the same run; the slower one must not overwrite it."""
    real = training_train.load_data

    def slow(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(training_train, "load_data", real)
        first.append(sha256(train("train.epochs=1").path / "run.json"))
        return real(*arguments, **options)

    first: list[str] = []
    monkeypatch.setattr(training_train, "load_data", slow)
    run_dir = train("train.epochs=1")
    assert [sha256(run_dir.path / "run.json")] == first


def test_a_name_used_by_another_recipe_meanwhile_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = training_train.load_data

    def slow(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(training_train, "load_data", real)
        train("train.epochs=1", "train.seed=5")
        return real(*arguments, **options)

    monkeypatch.setattr(training_train, "load_data", slow)
    with pytest.raises(ResourceError, match="another recipe"):
        train("train.epochs=1")
    assert train("train.epochs=1").name.startswith("tiny-")


def test_a_run_in_use_by_another_process_is_a_resource_error() -> None:
    code = """
import sys
from pathlib import Path
from convlens.utils.files import lock
with lock(Path("models/tiny/.lock"), what="x"):
    print("held", flush=True)
    sys.stdin.readline()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    Path("tiny.yaml").write_text(tiny("train.epochs=1").to_text())
    try:
        with pytest.raises(SystemExit) as caught:
            main(["train", "tiny.yaml", "--no-test", "--device", "cpu"])
        assert caught.value.code == 5
        assert not (Path("models/tiny") / "run.json").exists()
    finally:
        holder.communicate("\n")
    assert train("train.epochs=1").name == "tiny"


def test_training_does_not_open_the_test_split() -> None:
    unsealed = []
    data = images_of(tiny())
    object.__setattr__(data, "_test", lambda inner=data._test: unsealed.append(1) or inner())
    job = build_training_job(tiny("train.epochs=1"), data, RuntimeContext("cpu", quiet=True))
    run_dir = RunDir(Path("models/x"))
    run_dir.create(job.recipe, {"digests": []})
    training_train.fit(job, run_dir)
    assert unsealed == []
    assert run_dir.evaluations() == []


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not() -> None:
    options = ('augment=["RandomErasing"]', "model.dropout=0.2", "train.epochs=2")
    first, second = train(*options, name="a"), train(*options, name="b")
    other = train(*options, "train.seed=1", name="c")
    same(
        serialization.read_model_file(first.model_path)[0],
        serialization.read_model_file(second.model_path)[0],
    )
    weights = [
        serialization.read_model_file(run_dir.model_path)[0]["classifier.weight"]
        for run_dir in (first, other)
    ]
    assert not torch.equal(*weights)


def test_images_larger_than_the_memory_budget_train_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = train("train.epochs=2", name="a")
    monkeypatch.setenv("CONVLENS_MEMORY", "1KB")
    second = train("train.epochs=2", name="b")
    same(
        serialization.read_model_file(first.model_path)[0],
        serialization.read_model_file(second.model_path)[0],
    )


def sensor_images(root: Path) -> Path:
    """Write two classes of 12-bit images that 8 of 16 bits do not tell apart."""
    random = np.random.default_rng(0)
    for name, value in (("cold", 2000), ("warm", 2040)):
        (root / name).mkdir(parents=True)
        for number in range(20):
            values = value + random.normal(0, 4, (16, 16)).round()
            Image.fromarray(values.astype(np.uint16)).save(root / name / f"{number}.png")
    return root


def test_the_value_range_is_found_recorded_and_used_to_predict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = sensor_images(Path("set"))
    overrides = (f"data={{name: {folder}}}", "train.epochs=20", "train.batch_size=8")
    run_dir = train(*overrides, quiet=False)
    low, high = run_dir.recipe().data.range
    assert 1980 < low < 1994
    assert 2046 < high < 2060
    loaded = load_model(run_dir.model_path)
    assert loaded.preprocessing.value_range == (low, high)
    messages = capsys.readouterr().err
    assert "set: values of more than 8 bits" in messages
    assert "warning:" not in messages
    assert evaluation.evaluate(run_dir, "test", device="cpu").accuracy == 1
    predicted = predict(run_dir, [folder / "cold" / "1.png", folder / "warm" / "1.png"])
    assert [each.label for each in predicted] == ["cold", "warm"]


def test_runs_whose_ranges_were_found_are_seeds_of_one_recipe() -> None:
    source = f"data={{name: {sensor_images(Path('set'))}}}"

    def with_seeds(name: str, *overrides: str) -> list[RunDir]:
        return [
            train(source, "train.epochs=1", *overrides, f"data.seed={seed}", name=f"{name}{seed}")
            for seed in (0, 1)
        ]

    runs = [*with_seeds("slow"), *with_seeds("fast", "optim.lr=0.1")]
    given = train(source, "train.epochs=1", "data.range=[1900, 2100]", name="given")
    ranges = {load_model(run_dir.model_path).preprocessing.value_range for run_dir in runs}
    assert len(ranges) == 2  # one for each split
    assert [len(group.members) for group in compare(*runs, device="cpu").groups] == [2, 2]
    assert len(compare(runs[0], given, device="cpu").groups) == 2


def test_an_interrupted_run_of_an_earlier_version_keeps_its_conversion() -> None:
    """Its recipe.yaml has no range: 65,535 became 255, and every image was cropped."""
    folder = sensor_images(Path("set"))
    requested = tiny(f"data={{name: {folder}}}", "train.epochs=1")
    old = Conversion(16, 1, "crop")
    data = load_data(requested.data, memory_budget=1 << 30, conversion=old)
    job = build_training_job(requested, data, RuntimeContext("cpu", quiet=True))
    run_dir = RunDir(Path("models/tiny"))
    run_dir.create(
        job.recipe,
        {"digests": [requested.digest()], "data": {"name": "x", "fingerprint": data.fingerprint}},
    )
    path = run_dir.path / "recipe.yaml"
    kept = [
        line
        for line in path.read_text().splitlines()
        if line.strip().split(":")[0] not in ("range", "background", "max_pixels")
    ]
    path.write_text("\n".join(kept) + "\n")
    digest = load_recipe(path).earlier_digest()
    run_dir.update_metadata({"digests": [requested.digest(), digest]})
    assert train(f"data={{name: {folder}}}", "train.epochs=1").path == run_dir.path
    assert load_model(run_dir.model_path).preprocessing.conversion == old


def test_constant_images_get_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    folder = sensor_images(Path("set"))
    train(f"data={{name: {folder}, range: [0, 65535]}}", "train.epochs=1", quiet=False)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("warning: 28 of 28 training images are") for line in lines)


def test_a_resumed_run_uses_its_plan_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was chosen by timing, and another plan could give different bits."""
    from convlens.utils.process import StopSignal

    overrides = ("train.memory_format=auto", "train.epochs=2")
    monkeypatch.setattr(
        autotune, "candidate_plans", lambda *_: [device.Plan("cpu", "fp32", "channels_last")]
    )
    with monkeypatch.context() as patch:
        patch.setattr(training_train, "_stop", _interrupt)
        patch.setattr(
            training_train, "catch_stop_signals", lambda: nullcontext(StopSignal(is_set=True))
        )
        with pytest.raises(KeyboardInterrupt):
            train(*overrides)
    monkeypatch.setattr(
        autotune, "candidate_plans", lambda *_: [device.Plan("cpu", "fp32", "contiguous")]
    )
    plans = []
    real = training_train.build_training_job

    def record_plan(*arguments: Any, **options: Any) -> Any:
        job = real(*arguments, **options)
        plans.append(job.plan)
        return job

    monkeypatch.setattr(training_train, "build_training_job", record_plan)
    train(*overrides)
    assert [plan.memory_format for plan in plans] == ["channels_last"]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# Validation


def test_all_mistakes_in_a_recipe_are_reported_before_data_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("images were read")

    monkeypatch.setattr(training_train, "load_data", never)
    with pytest.raises(UsageError) as caught:
        train("model.widht=3", "optim.schedule=cosin", "optim.name=adan", "augment=[RandomCropp]")
    for word in ("model.widht", "'cosin'", "'adan'", "RandomCropp"):
        assert word in caught.value.what
    assert not Path("models").exists()


def test_what_auto_chose_and_how_long_it_takes() -> None:
    class_folders(Path("photos"), {"red": 30, "green": 30}, size=64)
    from_scratch = ["model.name=cnn", "model.weights=none"]
    requested = load_recipe("folder", [*from_scratch, "data.name=photos", "train.batch_size=10"])
    job = build_training_job(requested, images_of(requested), RuntimeContext("cpu", quiet=True))
    assert len(job.data.train) == 42
    assert not job.start_reason
    chosen = "auto: 64 px, 60 epochs, augment flip + crop + jitter"
    job.timings, job.step_seconds = {}, None
    assert training_train.describe_choices(requested, job) == f"{chosen}, batch 10"
    # 60 epochs of 5 steps and 9 validation images, which cost a third of 0.9 steps.
    job.timings, job.step_seconds = {"bf16 channels_last": 1.0}, 1.0
    job.plan = Plan("cpu", "bf16", "channels_last")
    assert job.expected_seconds == pytest.approx(60 * (5 + 0.3))
    timed = f"{chosen}, bf16 channels_last, batch 10"
    assert (
        training_train.describe_choices(requested, job) == f"{timed}; about 5 min on this machine"
    )
    # Nothing is said about the time where a step is not what was timed.
    job.inputs = replace(job.inputs, cached_bytes=100)
    assert training_train.describe_choices(requested, job) == timed
    fixed = job.recipe
    job.timings = {}
    assert training_train.describe_choices(fixed, job) == ""
