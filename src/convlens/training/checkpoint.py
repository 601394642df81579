"""What a training writes and when: by time and at its end, not after every epoch.

An epoch may take a tenth of a second; files that are whole on the disk before anything goes on
would then cost more than the training. What a killed process loses is computed again, to the
same bits.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from convlens import models, optim, run, serialization
from convlens.engine import oom
from convlens.engine.loop import TrainState
from convlens.errors import ConvlensError, ModelFileError, ResourceError, UsageError
from convlens.recipe import Recipe
from convlens.run import RunDir, check_same_checkpoint
from convlens.training.setup import InitialState, TrainingJob
from convlens.utils import files
from convlens.utils.console import print_status
from convlens.version import __version__

SAVE_INTERVAL_S = 60.0  # the most work that a killed process loses; $CONVLENS_SAVE_SECONDS
METRICS_INTERVAL_S = 1.0  # the most that `metrics.csv` is behind
RETRY_PAUSES_S = (
    0.5,
    4.0,
)  # seconds before a save that failed is tried again: network disks come back

ModelSnapshot = tuple[dict[str, Tensor], dict[str, Any]]


class CheckpointManager:
    """The epochs' rows, the best epoch, and the weights that are to be kept.

    Attributes:
        rows: the epochs so far, those of before a stop included.
        best: by `train.monitor` on the validation split.
    """

    def __init__(self, setup: TrainingJob, run_dir: RunDir) -> None:
        self._setup, self._run_dir = setup, run_dir
        self.best = BestEpoch(setup.recipe.train.monitor)
        self.rows = restore_checkpoint(run_dir, setup, self.best)
        self._pending: ModelSnapshot | None = None  # to be kept, not written yet
        self._saved, self._listed = time.perf_counter(), -math.inf
        self._every = save_interval_s()
        self._micro_batch_size = setup.state.micro_batch_size  # as `run.json` has it
        self._kept: int | None = None  # the epoch whose weights this process has written

    def take(self, row: dict[str, float]) -> None:
        """Takes in an epoch's row, and its weights if they are the ones to keep."""
        recipe = self._setup.recipe
        self.rows.append(row)
        improved = recipe.data.validates and self.best.improved(row)
        if improved or recipe.train.keep == "last":
            self._pending = model_snapshot(self._setup, self._run_dir.name, row)
        if time.perf_counter() - self._listed >= METRICS_INTERVAL_S:
            self._list()

    @property
    def over(self) -> bool:
        """Whether the training is at its end: all epochs done, or patience."""
        patience = self._setup.recipe.train.patience
        return self._setup.state.epoch > self._setup.epochs or self.best.stale_for(patience)

    @property
    def due(self) -> bool:
        """Whether it is time to save: also where steps are done differently from here on."""
        changed = self._setup.state.micro_batch_size != self._micro_batch_size
        return changed or time.perf_counter() - self._saved >= self._every

    def save(self) -> None:
        """Writes all that continuing needs; call it between steps only.

        Raises:
            ResourceError: the disk refused it three times; what was saved before is intact.
        """
        for pause in RETRY_PAUSES_S:
            try:
                self._write()
                break
            except ResourceError as error:
                print_status(
                    f"not saved: {escape(error.what)} ({escape(error.where)}); tried again soon"
                )
                time.sleep(pause)
        else:
            self._write()
        self._saved = time.perf_counter()
        if self._setup.state.micro_batch_size != self._micro_batch_size:
            self._tell_micro_batch_size()

    def _write(self) -> None:
        """The state comes last: what the other files are ahead of it is only written again."""
        self.keep_weights()
        self._list()
        save_checkpoint(self._run_dir, self._setup, self.best, self.rows)

    def keep_weights(self) -> None:
        """Writes the model file, if there are weights to keep that it doesn't hold yet."""
        if self._pending is not None:
            self._run_dir.save_model(*self._pending)
            self._kept, self._pending = int(self._pending[1]["chosen"]["epoch"]), None

    def complete(self) -> None:
        """Of a run that is taken up behind its last step, the files that its state has all of."""
        if not self._run_dir.model_path.exists():  # keep=last; the best weights no state has
            self._pending = model_snapshot(self._setup, self._run_dir.name, self.rows[-1])
        self.keep_weights()
        self._list()

    def kept(self) -> int:
        """The epoch of the weights in the model file: the best one.

        A run that was killed between writing these and its state has those of a later epoch, which
        it then trains again; where that doesn't end in the same bits, it need not be the best one
        any more, but is what the file holds.
        """
        if self._kept is None:
            self._kept = run.model_epoch(self._run_dir.model_path)
        if self._kept != self.best.epoch:
            print_status(
                f"the weights of epoch {self._kept} are kept: those of {self.best.epoch}, which "
                "this time was the best, were replaced before the run was killed"
            )
        return self._kept

    def _tell_micro_batch_size(self) -> None:
        """Memory ran out: the state has it already, now the user and `run.json` are told."""
        state, model = self._setup.state, self._setup.feed.model
        self._micro_batch_size = size = state.micro_batch_size
        print_status(oom.micro_batching_message(model, self._setup.recipe.train.batch_size, size))
        told = {"part": size, "epoch": state.epoch, "step": state.step}  # the first one done so
        told["batch_norm"] = oom.uses_batch_statistics(model)
        self._run_dir.update_metadata(
            {"out_of_memory": [*self._run_dir.metadata().get("out_of_memory", []), told]}
        )

    def _list(self) -> None:
        self._run_dir.write_metrics(self.rows)
        self._listed = time.perf_counter()


def save_interval_s() -> float:
    """Seconds between two saves: a minute, or what the environment says."""
    asked = os.environ.get("CONVLENS_SAVE_SECONDS", "")
    try:
        return max(0.0, float(asked)) if asked else SAVE_INTERVAL_S
    except ValueError as error:
        raise UsageError(f"CONVLENS_SAVE_SECONDS={asked!r} is no number", fix="e.g. 30") from error


def model_snapshot(setup: TrainingJob, name: str, row: dict[str, float] | None) -> ModelSnapshot:
    """A copy of the weights as they are now (or of their average), and their model file's card.

    Args:
        name: the run's.
        row: of the epoch they ended; None in the middle of one.
    """
    recipe, data = setup.recipe, setup.data
    validated = row is not None and recipe.data.validates
    chosen: dict[str, Any] = {"epoch": setup.state.epoch - 1, "validated": validated}
    if row is not None:
        keep = recipe.train.keep
        chosen["rule"] = "last epoch" if keep == "last" else f"best {recipe.train.monitor}"
        if validated:
            chosen |= {key: row[key] for key in ("val_loss", "val_accuracy")}
    model_metadata = {
        "convlens": __version__,
        "run": name,
        "model": {"name": recipe.model.name, "options": recipe.model.options},
        "classes": list(data.classes),
        "preprocessing": asdict(setup.preprocessing),
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "chosen": chosen,
        "recipe": recipe.model_dump(mode="json"),
        "weights": setup.weights,
    }
    with optim.averaged_weights(setup.averager):
        weights = {key: value.clone() for key, value in setup.trained.state_dict().items()}
    return weights, model_metadata


# ---- states ----------------------------------------
# What an unfinished run keeps on disk, and how a run is taken up from it.
#
# Order, augmentation and dropout are functions of (seed, epoch, step), so weights, optimiser
# state, averages and the position are all there is to keep: no generator's state.

# Fields of `TrainState` that are stored by another name.
STORED_KEYS = {"micro_batch_size": "part", "num_correct": "correct"}


class EpochClock:
    """Seconds of this epoch, on the wall and of all processors; goes on from a stopped epoch's.

    On a shared machine the wall's seconds are the neighbours', too; the processors' (user and
    system, all threads of this process) are ours alone.
    """

    def __init__(self, state: TrainState) -> None:
        self.start()
        self._wall -= state.seconds
        self._cpu -= state.cpu_seconds

    def start(self) -> None:
        """From 0 again."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Wall and CPU seconds."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


@dataclass
class BestEpoch:
    """The epoch whose weights are kept, by one number on the validation split.

    Equal values don't replace an earlier epoch. `monitor` is `val_loss` (lower is better) or
    `val_accuracy` (higher; of equal ones, which few images often give, that with the lower loss).
    """

    monitor: str
    epoch: int = 0
    value: float = math.nan
    loss: float = math.nan
    stale: int = 0  # epochs since the best one

    def stale_for(self, patience: int | None) -> bool:
        """Whether it is time to stop: `patience` epochs without a better one."""
        return patience is not None and self.stale >= patience

    def improved(self, row: dict[str, float]) -> bool:
        """Takes in an epoch's row; says whether it is the best so far."""
        value = row[self.monitor]
        lower = self.monitor == "val_loss"
        first = self.epoch == 0
        # Every comparison with NaN is false, so a first value of NaN would never be beaten.
        first = first or (math.isnan(self.value) and not math.isnan(value))
        better = value < self.value if lower else value > self.value
        tie = not lower and value == self.value and row["val_loss"] < self.loss
        if first or better or tie:
            self.epoch, self.value, self.loss = int(row["epoch"]), value, row["val_loss"]
            self.stale = 0
            return True
        self.stale += 1
        return False


def save_checkpoint(
    run_dir: RunDir, setup: TrainingJob, best: BestEpoch, rows: list[dict[str, float]]
) -> None:
    """Writes all that `restore` needs; call it between steps only."""
    # `vars`, since `dataclasses.asdict` deep-copies tensors on the device.
    position = {STORED_KEYS.get(k, k): float(value) for k, value in vars(setup.state).items()}
    if not math.isfinite(position["loss_sum"]):
        return  # on a GPU the loop raises `NonFiniteLoss` some steps later
    tensors: dict[str, Tensor] = {
        f"model.{name}": tensor for name, tensor in setup.trained.state_dict().items()
    }
    for index, values in setup.optimizer.state_dict()["state"].items():
        tensors |= {f"optim.{index}.{k}": v for k, v in values.items() if v is not None}
    counters: dict[str, Any] = {
        "position": position,
        "best": asdict(best),
        "rows": rows,
        "model_epoch": best.epoch if setup.recipe.train.keep == "best" else 0,
    }
    if setup.averager is not None:
        state = setup.averager.state()
        counters["ema_steps"] = state["steps"]
        tensors |= {f"ema.{i}": t for i, t in enumerate(state["average"])}
    if setup.scaler is not None:
        counters["scaler"] = setup.scaler.state_dict()
    run_dir.save_state(tensors, counters)


def load_initial_weights(run_dir: RunDir) -> InitialState | None:
    """What `prepare` needs instead of pretrained weights, if the run had any and saved a state."""
    record = run_dir.metadata().get("weights")
    stored = run_dir.state() if record else None
    return InitialState(_with_prefix("model", stored[0]), record) if record and stored else None


def restore_checkpoint(
    run_dir: RunDir, setup: TrainingJob, best: BestEpoch
) -> list[dict[str, float]]:
    """Brings `setup` and `best` to where the run stopped; returns the epochs' rows so far."""
    stored = run_dir.state()
    at = stored[1]["position"] if stored else {"epoch": 1, "step": 0}
    if run_dir.corrupt_checkpoints:
        _report_corrupt(run_dir, int(at["epoch"]), int(at["step"]))
    if stored is None:
        check_same_checkpoint(setup.world, [1, 0], run_dir)
        return []
    tensors, counters = stored
    models.load_weights(setup.trained, _with_prefix("model", tensors))
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in setup.optimizer.param_groups for p in group["params"]]
    for name, tensor in _with_prefix("optim", tensors).items():
        index, _, key = name.partition(".")
        like = parameters[int(index)]
        if tensor.shape == like.shape:
            # Fused kernels walk weights and moments side by side in memory: files are
            # contiguous, weights may be channels_last.
            tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        optimizer_state.setdefault(int(index), {})[key] = tensor
    groups = setup.optimizer.state_dict()["param_groups"]
    setup.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    if setup.averager is not None:
        average = _with_prefix("ema", tensors)
        ordered = [average[str(i)] for i in range(len(average))]
        setup.averager.load({"steps": counters["ema_steps"], "average": ordered})
    if setup.scaler is not None and "scaler" in counters:  # else of an earlier version
        setup.scaler.load_state_dict(counters["scaler"])
    state, position = setup.state, counters["position"]
    state.epoch, state.step = int(position["epoch"]), int(position["step"])
    state.images = int(position["images"])
    state.seconds, state.cpu_seconds = position["seconds"], position.get("cpu_seconds", 0.0)
    state.data_seconds = position.get("data_seconds", 0.0)
    state.micro_batch_size = int(position.get(STORED_KEYS["micro_batch_size"], 0))
    # Of the same type as before: a division of Python numbers would round differently.
    state.loss_sum = position["loss_sum"]
    state.num_correct = int(position[STORED_KEYS["num_correct"]])
    if setup.plan.device != "cpu":
        device = setup.plan.device
        state.loss_sum = torch.tensor(state.loss_sum, dtype=torch.float32, device=device)
        state.num_correct = torch.tensor(state.num_correct, device=device)
    best.__dict__.update(counters["best"])
    check_same_checkpoint(setup.world, [state.epoch, state.step], run_dir)
    # A run that an earlier version left unfinished didn't count them.
    late = ("cpu_seconds", "data_seconds")
    return [{**row, **{key: row.get(key, math.nan) for key in late}} for row in counters["rows"]]


def _report_corrupt(run_dir: RunDir, epoch: int, step: int) -> None:
    """A damaged state costs time and nothing else: what it held is trained again, to its bits."""
    for reason in run_dir.corrupt_checkpoints:
        print_status(f"[bold]can't be used[/]: {escape(reason)}")
    where = f"epoch {epoch}, step {step}" if (epoch, step) != (1, 0) else "the beginning"
    print_status(f"going on from {where}; what came after it is trained again")


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name[len(prefix) + 1 :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}.")
    }


# ---- extending ----------------------------------------
# More epochs for a finished run: a new run that begins where the finished one ended.
#
# The rule: the new run is the longer recipe from the finished run's last step on. Where nothing in
# the recipe goes by the length of the run (a constant rate, no windows) and patience didn't end it,
# it ends with the bits of the longer recipe trained from its beginning. Elsewhere it doesn't: a
# schedule goes on from where it would be by then (cosine after 30 of 60 epochs is at half its
# rate again, though it had been at 0), and patience that ran out counts anew.

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


def extend_run(run_dir: RunDir, asked: Recipe) -> None:
    """Makes `run_dir` an unfinished run of `asked` that has done all that a shorter one did.

    Does nothing where the run is there already. The finished run is left as it is.

    Raises:
        UsageError: no finished run of this recipe with fewer epochs; ModelFileError: its state,
            which `state/` keeps for this, or its model is gone or damaged.
    """
    with run_dir.lock():
        if run_dir.metadata():
            return
        source = _shorter_run(asked)
        resolved = source.recipe()
        stored = source.state()
        if stored is None:
            raise ModelFileError(
                f"run {source.name!r} can't be extended: "
                + (source.corrupt_checkpoints or ["the checkpoint of its end is gone"])[0],
                where=str(source.path / "state"),
                fix="leave out --extend to train all epochs",
            )
        tensors, counters = stored
        model, model_metadata = serialization.read_model_file(source.model_path)
        done = len(counters["rows"])
        longer = resolved.replace(**{"train.epochs": asked.train.epochs})
        best, patience = counters["best"], resolved.train.patience
        impatient = patience is not None and best["stale"] >= patience
        exact = _is_length_independent(longer) and not impatient
        best = {**best, "stale": 0} if impatient else best
        run_dir.save_state(tensors, {**counters, "best": best})
        for name in ("split.csv", "images.csv.gz"):
            if (source.path / name).exists():
                files.write_atomic(run_dir.path / name, (source.path / name).read_bytes())
        # Behind what can be lost (`run.run_dir`): a model file is somebody's work.
        run_dir.save_model(model, {**model_metadata, "run": run_dir.name})
        facts = {k: v for k, v in source.metadata().items() if k not in END_KEYS}
        told = {"run": source.name, "epochs": done, "exact": exact}
        digests = [asked.digest(), longer.digest()]
        run_dir.create(longer, {**facts, "digests": digests, "extends": told})
    rule = (
        f"the same bits as {longer.train.epochs} epochs from the beginning"
        if exact
        else f"not the same as {longer.train.epochs} epochs from the beginning: what goes by the "
        "length of the run goes on from where it would be in the longer one"
    )
    print_status(f"extending [bold]{escape(source.name)}[/] from {done} epochs: {rule}")


def _shorter_run(asked: Recipe) -> RunDir:
    """The finished run of the same recipe with the most epochs below those asked for."""
    epochs = asked.train.epochs
    if epochs == "auto":
        raise UsageError("--extend needs a number of epochs", fix="e.g. train.epochs=60 --extend")
    best, most = None, 0
    for other in run.list_runs():
        try:
            if not other.finished:
                continue
            its = int(other.recipe().train.epochs)
        except ConvlensError:
            continue  # damaged or edited: not the one that is meant
        kinds = [asked.replace(**{"train.epochs": each}).digest() for each in (its, "auto")]
        same = set(kinds) & set(other.metadata().get("digests", []))
        if same and most < its < epochs:
            best, most = other, its
    if best is None:
        raise UsageError(
            f"there is no finished run of this recipe with fewer than {epochs} epochs to extend",
            where=f"{run.MODELS_DIR}/",
            fix="leave out --extend to train all epochs; nothing but train.epochs may differ",
        )
    return best


def _is_length_independent(recipe: Recipe) -> bool:
    """Whether no step depends on how many there will be."""
    options = recipe.optim
    windows = [group for group in options.groups if (group.start, group.end) != (0.0, 1.0)]
    constant = options.schedule == "constant" and not options.warmup
    return constant and not (windows or options.head_first or options.lookahead)
