"""What an unfinished run keeps on disk, and how a run is taken up from it.

Order, augmentation and dropout are functions of (seed, epoch, step), so weights, optimiser
state, averages and the position are all there is to keep: no generator's state.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from convlens import models
from convlens.engine import TrainState
from convlens.onlooker import check_same_checkpoint
from convlens.run import RunFolder
from convlens.starting.beginning import Begun
from convlens.starting.preparing import Setup
from convlens.system.console import print_status

# Fields of `TrainState` that are stored by another name.
STORED_KEYS = {"micro_batch_size": "part", "num_correct": "correct"}


class Clock:
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
class Best:
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


def save(place: RunFolder, setup: Setup, best: Best, rows: list[dict[str, float]]) -> None:
    """Writes all that `restore` needs; call it between steps only."""
    # `vars`, since `dataclasses.asdict` deep-copies tensors on the device.
    position = {STORED_KEYS.get(k, k): float(value) for k, value in vars(setup.state).items()}
    if not math.isfinite(position["loss_sum"]):
        return  # on a GPU the loop raises `NonFiniteLoss` some steps later
    tensors: dict[str, Tensor] = {
        f"model.{name}": tensor for name, tensor in setup.trained.state_dict().items()
    }
    for index, values in setup.optimiser.state_dict()["state"].items():
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
    place.save_state(tensors, counters)


def begun_with(place: RunFolder) -> Begun | None:
    """What `prepare` needs instead of pretrained weights, if the run had any and saved a state."""
    record = place.facts().get("weights")
    stored = place.state() if record else None
    return Begun(_under("model", stored[0]), record) if record and stored else None


def restore(place: RunFolder, setup: Setup, best: Best) -> list[dict[str, float]]:
    """Brings `setup` and `best` to where the run stopped; returns the epochs' rows so far."""
    stored = place.state()
    at = stored[1]["position"] if stored else {"epoch": 1, "step": 0}
    if place.corrupt_checkpoints:
        _tell_lost(place, int(at["epoch"]), int(at["step"]))
    if stored is None:
        check_same_checkpoint(setup.world, [1, 0], place)
        return []
    tensors, counters = stored
    models.load(setup.trained, _under("model", tensors))
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in setup.optimiser.param_groups for p in group["params"]]
    for name, tensor in _under("optim", tensors).items():
        index, _, key = name.partition(".")
        like = parameters[int(index)]
        if tensor.shape == like.shape:
            # Fused kernels walk weights and moments side by side in memory: files are
            # contiguous, weights may be channels_last.
            tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        optimizer_state.setdefault(int(index), {})[key] = tensor
    groups = setup.optimiser.state_dict()["param_groups"]
    setup.optimiser.load_state_dict({"state": optimizer_state, "param_groups": groups})
    if setup.averager is not None:
        average = _under("ema", tensors)
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
    check_same_checkpoint(setup.world, [state.epoch, state.step], place)
    # A run that an earlier version left unfinished didn't count them.
    late = ("cpu_seconds", "data_seconds")
    return [{**row, **{key: row.get(key, math.nan) for key in late}} for row in counters["rows"]]


def _tell_lost(place: RunFolder, epoch: int, step: int) -> None:
    """A damaged state costs time and nothing else: what it held is trained again, to its bits."""
    for reason in place.corrupt_checkpoints:
        print_status(f"[bold]can't be used[/]: {escape(reason)}")
    where = f"epoch {epoch}, step {step}" if (epoch, step) != (1, 0) else "the beginning"
    print_status(f"going on from {where}; what came after it is trained again")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name[len(prefix) + 1 :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}.")
    }
