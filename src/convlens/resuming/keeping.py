"""What a training writes and when: by time and at its end, not after every epoch.

An epoch may take a tenth of a second; files that are whole on the disk before anything goes on
would then cost more than the training. What a killed process loses is computed again, to the
same bits.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from torch import Tensor

from convlens import optim
from convlens.errors import ResourceError, UsageError
from convlens.formats import records
from convlens.resuming.states import Best, restore, save
from convlens.run import RunFolder
from convlens.starting.preparing import Setup
from convlens.stepping import memory
from convlens.system.console import print_status
from convlens.version import __version__

SAVE_SECONDS = 60.0  # the most work that a killed process loses; $CONVLENS_SAVE_SECONDS
LIST_SECONDS = 1.0  # the most that `metrics.csv` is behind
PAUSES = (0.5, 4.0)  # seconds before a save that failed is tried again: network disks come back

Snapshot = tuple[dict[str, Tensor], dict[str, Any]]


class Keeper:
    """The epochs' rows, the best epoch, and the weights that are to be kept.

    Attributes:
        rows: the epochs so far, those of before a stop included.
        best: by `train.monitor` on the validation split.
    """

    def __init__(self, setup: Setup, place: RunFolder) -> None:
        self._setup, self._place = setup, place
        self.best = Best(setup.recipe.train.monitor)
        self.rows = restore(place, setup, self.best)
        self._pending: Snapshot | None = None  # to be kept, not written yet
        self._saved, self._listed = time.perf_counter(), -math.inf
        self._every = save_seconds()
        self._micro_batch_size = setup.state.micro_batch_size  # as `run.json` has it
        self._kept: int | None = None  # the epoch whose weights this process has written

    def take(self, row: dict[str, float]) -> None:
        """Takes in an epoch's row, and its weights if they are the ones to keep."""
        recipe = self._setup.recipe
        self.rows.append(row)
        improved = recipe.data.validates and self.best.improved(row)
        if improved or recipe.train.keep == "last":
            self._pending = snapshot(self._setup, self._place.name, row)
        if time.perf_counter() - self._listed >= LIST_SECONDS:
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
        for pause in PAUSES:
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
        save(self._place, self._setup, self.best, self.rows)

    def keep_weights(self) -> None:
        """Writes the model file, if there are weights to keep that it doesn't hold yet."""
        if self._pending is not None:
            self._place.save_model(*self._pending)
            self._kept, self._pending = int(self._pending[1]["chosen"]["epoch"]), None

    def complete(self) -> None:
        """Of a run that is taken up behind its last step, the files that its state has all of."""
        if not self._place.model_path.exists():  # keep=last; the best weights no state has
            self._pending = snapshot(self._setup, self._place.name, self.rows[-1])
        self.keep_weights()
        self._list()

    def kept(self) -> int:
        """The epoch of the weights in the model file: the best one.

        A run that was killed between writing these and its state has those of a later epoch, which
        it then trains again; where that doesn't end in the same bits, it need not be the best one
        any more, but is what the file holds.
        """
        if self._kept is None:
            self._kept = records.epoch_of(self._place.model_path)
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
        print_status(
            memory.micro_batching_message(model, self._setup.recipe.train.batch_size, size)
        )
        told = {"part": size, "epoch": state.epoch, "step": state.step}  # the first one done so
        told["batch_norm"] = memory.uses_batch_statistics(model)
        self._place.note({"out_of_memory": [*self._place.facts().get("out_of_memory", []), told]})

    def _list(self) -> None:
        self._place.write_metrics(self.rows)
        self._listed = time.perf_counter()


def save_seconds() -> float:
    """Seconds between two saves: a minute, or what the environment says."""
    asked = os.environ.get("CONVLENS_SAVE_SECONDS", "")
    try:
        return max(0.0, float(asked)) if asked else SAVE_SECONDS
    except ValueError as error:
        raise UsageError(f"CONVLENS_SAVE_SECONDS={asked!r} is no number", fix="e.g. 30") from error


def snapshot(setup: Setup, name: str, row: dict[str, float] | None) -> Snapshot:
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
    card = {
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
    with optim.averaged(setup.averager):
        weights = {key: value.clone() for key, value in setup.trained.state_dict().items()}
    return weights, card
