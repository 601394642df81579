"""Checkpoints: write them during a training, and resume or extend a run from them.

A checkpoint is written once a minute and when the training stops, not after every epoch: an epoch
may take a tenth of a second, and flushing files to the disk would take longer. The work that a
killed process loses is repeated, with the same bits.

Data order, augmentation and dropout are functions of (seed, epoch, step, rank), so a checkpoint
holds weights, optimizer state, averages and the training state, but no generator state.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from convlens import models, optim, run, serialization
from convlens.engine import oom
from convlens.engine.loop import TrainState
from convlens.errors import ConvlensError, ModelFileError, ResourceError, UsageError
from convlens.recipe import Recipe
from convlens.run import VALIDATION_COLUMNS, RunDir, check_same_checkpoint
from convlens.training.resolve import is_run_of
from convlens.training.setup import InitialState, TrainingJob
from convlens.utils import files
from convlens.utils.console import print_status
from convlens.version import __version__

SAVE_INTERVAL_S = 60.0  # the most work that a killed process loses; $CONVLENS_SAVE_SECONDS
METRICS_INTERVAL_S = 1.0  # the most that `metrics.csv` is behind
# Pauses before a failed save is retried: network file systems often recover within seconds.
RETRY_PAUSES_S = (0.5, 4.0)
# Fields of `TrainState` that are stored by another name.
STORED_KEYS = {"micro_batch_size": "part", "num_correct": "correct"}
# Keys of `run.json` that describe the end of a run; an extended run has not reached it.
END_KEYS = (
    "created",
    "status",
    "epochs",
    "kept_epoch",
    "training_seconds",
    "cpu_seconds",
    "metrics_sha256",
    "changed",
)

ModelSnapshot = tuple[dict[str, Tensor], dict[str, Any]]  # state dict, model metadata


class CheckpointManager:
    """Keep the metrics of all epochs, select the best epoch, and decide what to save when.

    Creating it restores the newest checkpoint of the run, if there is one.

    Attributes:
        rows: the rows of `metrics.csv`, including those from before an interruption.
        best: the best epoch by `train.monitor` on the validation split.
    """

    def __init__(self, job: TrainingJob, run_dir: RunDir) -> None:
        self._job, self._run_dir = job, run_dir
        self.best = BestEpoch(job.recipe.train.monitor)
        self.rows = restore_checkpoint(run_dir, job, self.best)
        self._pending: ModelSnapshot | None = None  # selected weights that are not written yet
        self._last_save, self._last_metrics = time.perf_counter(), -math.inf
        self._interval = save_interval_s()
        self._micro_batch_size = job.state.micro_batch_size  # as recorded in `run.json`
        self._saved_epoch: int | None = None  # epoch of the model file, if this process wrote it

    def on_epoch_end(self, row: dict[str, float]) -> None:
        """Add the row of an epoch; take a snapshot of its weights if they are selected."""
        recipe = self._job.recipe
        self.rows.append(row)
        improved = recipe.data.validates and self.best.update(row)
        if improved or recipe.train.keep == "last":
            self._pending = model_snapshot(self._job, self._run_dir.name, row)
        if time.perf_counter() - self._last_metrics >= METRICS_INTERVAL_S:
            self._write_metrics()

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done or patience is exhausted."""
        patience = self._job.recipe.train.patience
        return self._job.state.epoch > self._job.epochs or self.best.patience_exhausted(patience)

    @property
    def should_save(self) -> bool:
        """Whether a checkpoint is due: by time, or because the micro-batch size has changed."""
        changed = self._job.state.micro_batch_size != self._micro_batch_size
        return changed or time.perf_counter() - self._last_save >= self._interval

    def save(self) -> None:
        """Write everything needed to resume. Call it between steps only.

        Raises:
            ResourceError: three attempts failed; the files written before are intact.
        """
        for pause in RETRY_PAUSES_S:
            try:
                self._write()
                break
            except ResourceError as error:
                print_status(
                    f"not saved: {escape(error.what)} ({escape(error.where)}); trying again soon"
                )
                time.sleep(pause)
        else:
            self._write()
        self._last_save = time.perf_counter()
        if self._job.state.micro_batch_size != self._micro_batch_size:
            self._record_micro_batch_size()

    def _write(self) -> None:
        """Write the checkpoint last: where the other files are ahead of it, they are rewritten."""
        self.save_model_file()
        self._write_metrics()
        save_checkpoint(self._run_dir, self._job, self.best, self.rows)

    def save_model_file(self) -> None:
        """Write the selected weights to the model file, if it does not hold them yet."""
        if self._pending is not None:
            self._run_dir.save_model(*self._pending)
            self._saved_epoch = int(self._pending[1]["chosen"]["epoch"])
            self._pending = None

    def write_missing_files(self) -> None:
        """Write the files of a run that was interrupted after its last step, from its checkpoint.

        With `train.keep=last` the checkpoint has the weights of the model file; the best weights
        are never lost, because the model file is written before the checkpoint.
        """
        if not self._run_dir.model_path.exists():
            self._pending = model_snapshot(self._job, self._run_dir.name, self.rows[-1])
        self.save_model_file()
        self._write_metrics()

    def kept_epoch(self) -> int:
        """Return the epoch of the weights in the model file: the best one.

        A run that was killed after writing the model file and before writing the checkpoint holds
        the weights of a later epoch, which is trained again. If that repetition does not have the
        same bits (another machine), the file may hold weights that are no longer the best.
        """
        if self._saved_epoch is None:
            self._saved_epoch = run.model_epoch(self._run_dir.model_path)
        if self._saved_epoch != self.best.epoch:
            print_status(
                f"the weights of epoch {self._saved_epoch} are kept; those of epoch "
                f"{self.best.epoch}, the best one, were replaced before the run was killed"
            )
        return self._saved_epoch

    def _record_micro_batch_size(self) -> None:
        """Print and record that memory ran out. The checkpoint already has the new size."""
        state, model = self._job.state, self._job.inputs.model
        self._micro_batch_size = size = state.micro_batch_size
        print_status(oom.micro_batching_message(model, self._job.recipe.train.batch_size, size))
        entry = {
            "part": size,
            "epoch": state.epoch,
            "step": state.step,  # the first one with this size
            "batch_norm": oom.uses_batch_statistics(model),
        }
        earlier = self._run_dir.metadata().get("out_of_memory", [])
        self._run_dir.update_metadata({"out_of_memory": [*earlier, entry]})

    def _write_metrics(self) -> None:
        self._run_dir.write_metrics(self.rows)
        self._last_metrics = time.perf_counter()


def save_interval_s() -> float:
    """Return the seconds between two checkpoints: `SAVE_INTERVAL_S` or `$CONVLENS_SAVE_SECONDS`."""
    text = os.environ.get("CONVLENS_SAVE_SECONDS", "")
    try:
        return max(0.0, float(text)) if text else SAVE_INTERVAL_S
    except ValueError as error:
        raise UsageError(
            f"CONVLENS_SAVE_SECONDS={text!r} is not a number", fix="use e.g. 30"
        ) from error


def model_snapshot(job: TrainingJob, run_name: str, row: dict[str, float] | None) -> ModelSnapshot:
    """Return a copy of the current (or averaged) weights and the metadata of their model file.

    Args:
        row: the row of the epoch that the weights are from; None in the middle of an epoch.
    """
    recipe, data = job.recipe, job.data
    validated = row is not None and recipe.data.validates
    chosen: dict[str, Any] = {"epoch": job.state.epoch - 1, "validated": validated}
    if row is not None:
        keep = recipe.train.keep
        chosen["rule"] = "last epoch" if keep == "last" else f"best {recipe.train.monitor}"
        if validated:
            chosen |= {key: row[key] for key in VALIDATION_COLUMNS}
    model_metadata = {
        "convlens": __version__,
        "run": run_name,
        "model": {"name": recipe.model.name, "options": recipe.model.options},
        "classes": list(data.classes),
        "preprocessing": job.preprocessing.to_dict(),
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            **({"range": "auto"} if job.found_range else {}),
        },
        "chosen": chosen,
        "recipe": recipe.model_dump(mode="json"),
        "weights": job.initial_weights,
    }
    with optim.averaged_weights(job.averager):
        weights = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    return weights, model_metadata


class EpochClock:
    """Measure the wall and CPU seconds of an epoch, including those before an interruption.

    On a shared machine wall time includes that of other programs. CPU time (user and system, all
    threads of this process) does not.
    """

    def __init__(self, state: TrainState) -> None:
        self.restart()
        self._wall -= state.seconds
        self._cpu -= state.cpu_seconds

    def restart(self) -> None:
        """Start a new epoch at 0 seconds."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Return wall and CPU seconds."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


@dataclass
class BestEpoch:
    """The epoch whose weights are kept, selected by one metric on the validation split.

    Of equal values the earliest epoch is kept. With few images equal accuracies are common, so
    that the lower validation loss decides between them.

    Attributes:
        monitor: `val_loss` (lower is better), or another validation metric (higher is better).
        stale: epochs since the best one.
    """

    monitor: str
    epoch: int = 0
    value: float = math.nan
    loss: float = math.nan
    stale: int = 0

    def patience_exhausted(self, patience: int | None) -> bool:
        """Return whether there were `patience` epochs without an improvement."""
        return patience is not None and self.stale >= patience

    def update(self, row: dict[str, float]) -> bool:
        """Add the row of an epoch; return whether it is the best so far."""
        value = row[self.monitor]
        lower_is_better = self.monitor == "val_loss"
        is_first = self.epoch == 0
        # Every comparison with NaN is false, so a first value of NaN would never be beaten.
        is_first = is_first or (math.isnan(self.value) and not math.isnan(value))
        is_better = value < self.value if lower_is_better else value > self.value
        wins_tie = not lower_is_better and value == self.value and row["val_loss"] < self.loss
        if is_first or is_better or wins_tie:
            self.epoch, self.value, self.loss = int(row["epoch"]), value, row["val_loss"]
            self.stale = 0
            return True
        self.stale += 1
        return False


def save_checkpoint(
    run_dir: RunDir, job: TrainingJob, best: BestEpoch, rows: list[dict[str, float]]
) -> None:
    """Write everything that `restore_checkpoint` needs. Call it between steps only."""
    # (`dataclasses.asdict` would deep-copy tensors on the device.)
    position = {
        STORED_KEYS.get(each.name, each.name): float(getattr(job.state, each.name))
        for each in fields(job.state)
    }
    if not math.isfinite(position["loss_sum"]):
        return  # on CUDA the training loop raises `NonFiniteLoss` some steps later
    tensors: dict[str, Tensor] = {
        f"model.{name}": tensor for name, tensor in job.model.state_dict().items()
    }
    for index, values in job.optimizer.state_dict()["state"].items():
        tensors |= {f"optim.{index}.{k}": v for k, v in values.items() if v is not None}
    counters: dict[str, Any] = {
        "position": position,
        "best": asdict(best),
        "rows": rows,
        "model_epoch": best.epoch if job.recipe.train.keep == "best" else 0,
    }
    if job.averager is not None:
        average = job.averager.state()
        counters["ema_steps"] = average["steps"]
        tensors |= {f"ema.{i}": tensor for i, tensor in enumerate(average["average"])}
    if job.scaler is not None:
        counters["scaler"] = job.scaler.state_dict()
    run_dir.save_state(tensors, counters)


def load_initial_state(run_dir: RunDir) -> InitialState | None:
    """Return the network of an interrupted run that started with pretrained weights.

    None if the run did not, or was interrupted before its first checkpoint.
    """
    weights_record = run_dir.metadata().get("weights")
    checkpoint = run_dir.state() if weights_record else None
    if not weights_record or checkpoint is None:
        return None
    return InitialState(_with_prefix("model", checkpoint[0]), weights_record)


def restore_checkpoint(
    run_dir: RunDir, job: TrainingJob, best: BestEpoch
) -> list[dict[str, float]]:
    """Restore `job` and `best` from the newest intact checkpoint; return the rows of the epochs.

    Raises:
        ResourceError: the ranks found different checkpoints.
    """
    checkpoint = run_dir.state()
    position = checkpoint[1]["position"] if checkpoint else {"epoch": 1, "step": 0}
    epoch, step = int(position["epoch"]), int(position["step"])
    if run_dir.corrupt_checkpoints:
        _report_corrupt(run_dir, epoch, step)
    if checkpoint is None:
        check_same_checkpoint(job.process_group, [1, 0], run_dir)
        return []
    tensors, counters = checkpoint
    models.load_weights(job.model, _with_prefix("model", tensors))
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in job.optimizer.param_groups for p in group["params"]]
    for name, tensor in _with_prefix("optim", tensors).items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            # Fused kernels read weights and moments in parallel, so both need the same strides:
            # stored tensors are contiguous, weights may be channels_last.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        optimizer_state.setdefault(int(index), {})[key] = tensor
    groups = job.optimizer.state_dict()["param_groups"]
    job.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    if job.averager is not None:
        stored = _with_prefix("ema", tensors)
        average = [stored[str(i)] for i in range(len(stored))]
        job.averager.load({"steps": counters["ema_steps"], "average": average})
    if job.scaler is not None and "scaler" in counters:  # earlier versions stored it differently
        job.scaler.load_state_dict(counters["scaler"])
    state = job.state
    state.epoch, state.step, state.images = epoch, step, int(position["images"])
    state.seconds, state.cpu_seconds = position["seconds"], position.get("cpu_seconds", 0.0)
    state.data_seconds = position.get("data_seconds", 0.0)
    state.micro_batch_size = int(position.get(STORED_KEYS["micro_batch_size"], 0))
    # Of the same type as before: a division of Python numbers would round differently.
    state.loss_sum = position["loss_sum"]
    state.num_correct = int(position[STORED_KEYS["num_correct"]])
    if job.plan.device != "cpu":
        device = job.plan.device
        state.loss_sum = torch.tensor(state.loss_sum, dtype=torch.float32, device=device)
        state.num_correct = torch.tensor(state.num_correct, device=device)
    for key, value in counters["best"].items():
        setattr(best, key, value)
    check_same_checkpoint(job.process_group, [epoch, step], run_dir)
    # Earlier versions did not measure these.
    new_columns = ("cpu_seconds", "data_seconds", *VALIDATION_COLUMNS)
    return [
        {**row, **{key: row.get(key, math.nan) for key in new_columns}} for row in counters["rows"]
    ]


def _report_corrupt(run_dir: RunDir, epoch: int, step: int) -> None:
    """Print which checkpoints cannot be used. Their steps are repeated, with the same bits."""
    for reason in run_dir.corrupt_checkpoints:
        print_status(f"[bold]cannot be used[/]: {escape(reason)}")
    start = f"epoch {epoch}, step {step}" if (epoch, step) != (1, 0) else "the beginning"
    print_status(f"resuming from {start}; later steps are trained again")


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix` and a dot, without that prefix."""
    return {
        name[len(prefix) + 1 :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}.")
    }


def extend_run(run_dir: RunDir, requested: Recipe) -> None:
    """Create `run_dir` as an unfinished run of `requested` that continues a finished, shorter run.

    The new run is the longer recipe from the last step of the finished run on. If nothing in the
    recipe depends on the length of the training (a constant rate, no windows) and patience did not
    end it, the new run ends with the bits of the longer recipe trained from scratch. Otherwise it
    does not: a schedule continues at its position in the longer training (cosine after 30 of 60
    epochs is at half the initial rate, although it had reached 0), and patience is reset.

    Does nothing if the run exists already. The finished run is not changed; the uses of its test
    split so far count for the new run, too.

    Raises:
        UsageError: there is no finished run of this recipe with fewer epochs.
        ModelFileError: the checkpoint of its end, or its model file, is missing or damaged.
    """
    with run_dir.lock():
        if run_dir.metadata():
            return
        source = _find_shorter_run(requested)
        source_recipe = source.recipe()
        checkpoint = source.state()
        if checkpoint is None:
            raise ModelFileError(
                f"run {source.name!r} can't be extended: "
                + (source.corrupt_checkpoints or ["the checkpoint of its end is missing"])[0],
                where=str(source.path / "state"),
                fix="leave out --extend to train all epochs",
            )
        tensors, counters = checkpoint
        weights, model_metadata = serialization.read_model_file(source.model_path)
        epochs_done = len(counters["rows"])
        recipe = source_recipe.replace(**{"train.epochs": requested.train.epochs})
        best, patience = counters["best"], source_recipe.train.patience
        patience_exhausted = patience is not None and best["stale"] >= patience
        exact = _is_length_independent(recipe) and not patience_exhausted
        if patience_exhausted:
            best = {**best, "stale": 0}
        run_dir.save_state(tensors, {**counters, "best": best})
        for name in ("split.csv", "images.csv.gz"):
            if (source.path / name).exists():
                files.write_atomic(run_dir.path / name, (source.path / name).read_bytes())
        # After the files that may be overwritten (`find_or_create_run_dir`): a directory with a
        # model file counts as taken.
        # Without its calibration: the longer training makes its own at its end.
        run_dir.save_model(
            weights,
            {k: v for k, v in model_metadata.items() if k != "calibration"} | {"run": run_dir.name},
        )
        metadata = {k: v for k, v in source.metadata().items() if k not in END_KEYS}
        metadata["digests"] = [requested.digest(), recipe.digest()]
        metadata["extends"] = {"run": source.name, "epochs": epochs_done, "exact": exact}
        run_dir.inherit_test_uses(source, model_metadata["data"]["fingerprint"])
        run_dir.create(recipe, metadata)
    whole = f"{recipe.train.epochs} epochs from scratch"
    rule = (
        f"the result has the same bits as {whole}"
        if exact
        else f"the result differs from {whole}: what depends on the length of the training "
        "continues at its position in the longer one"
    )
    print_status(f"extending [bold]{escape(source.name)}[/] after {epochs_done} epochs: {rule}")


def _find_shorter_run(requested: Recipe) -> RunDir:
    """Return the finished run of the same recipe with the most epochs below those requested."""
    epochs = requested.train.epochs
    if epochs == "auto":
        raise UsageError("--extend needs a number of epochs", fix="e.g. train.epochs=60 --extend")
    longest, longest_epochs = None, 0
    for candidate in run.list_runs():
        try:
            if not candidate.is_finished:
                continue
            candidate_epochs = int(candidate.recipe().train.epochs)
        except ConvlensError:
            continue  # damaged or edited
        is_same_recipe = any(
            is_run_of(requested.replace(**{"train.epochs": each}), candidate)
            for each in (candidate_epochs, "auto")
        )
        if is_same_recipe and longest_epochs < candidate_epochs < epochs:
            longest, longest_epochs = candidate, candidate_epochs
    if longest is None:
        raise UsageError(
            f"there is no finished run of this recipe with fewer than {epochs} epochs to extend",
            where=f"{run.MODELS_DIR}/",
            fix="leave out --extend to train all epochs; only train.epochs may differ",
        )
    return longest


def _is_length_independent(recipe: Recipe) -> bool:
    """Return whether no step depends on the number of steps."""
    options = recipe.optim
    windows = [group for group in options.groups if (group.start, group.end) != (0.0, 1.0)]
    constant = options.schedule == "constant" and not options.warmup
    return constant and not (windows or options.head_first or options.lookahead)
