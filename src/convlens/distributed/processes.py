"""Several processes that train one network: who takes which rows, and what they tell each other.

`join` makes the `World` that `torchrun` started; alone it is a world of one, in which everything
here leaves things as they are. Messages go over gloo, tensors on a GPU over NCCL.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import datetime
import functools
import json
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from convlens.distributed import meeting
from convlens.errors import ResourceError, Stopped
from convlens.system import ranks
from convlens.version import __version__

T = TypeVar("T")

# A process that ends is noticed at once on a CPU, since its connections close; on GPUs by
# `torchrun`, which asks the others to stop (`World._until`). One that hangs is given up after this
# long: within a step, and where one works while the others wait (decoding images, choosing by
# timing, testing, saving).
STEP = datetime.timedelta(minutes=10)
PATIENCE = datetime.timedelta(hours=2)
# On a GPU the host reads what was said so many steps ago, instead of waiting for this one.
LAG = 4
GRACE = 10.0  # seconds that a step may still take when it was asked to stop


class Lost(Stopped):
    """Another process of this training ended or doesn't answer (exit code 75)."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "another process of this training ended, or does not answer any more",
            where=" ".join(reason.split())[:160],
            fix="look for what it said; the same command goes on from what was saved last",
        )


@dataclass(frozen=True)
class Share:
    """The rows of a batch of `total` images that one process takes, from `start` to `stop`.

    `weight` is what its mean counts in the mean over the batch. It is 0 for a process that the
    batch is too small for, which then goes through other rows so that all do the same steps.
    """

    start: int
    stop: int
    total: int
    weight: float

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class World:
    """The processes that train together. A world of one says nothing and waits for nobody.

    Args:
        rank: this process's number; 0 leads.
        size: how many there are.
        control: the group for words, where patience is long; tensors go over torch's default one.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, control: dist.ProcessGroup | None = None
    ) -> None:
        self.rank, self.size, self._control = rank, size, control
        self.asks_to_stop: Callable[[], bool] = lambda: False
        self._said = collections.deque[tuple[Tensor, torch.cuda.Event | None]]()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> Share:
        """This process's rows of a batch: even parts of at least two images, in order.

        (Two, since batch norm can't train on one.)
        """
        active = max(1, min(self.size, total // 2))
        if self.rank >= active:
            return Share(0, min(2, total), total, 0.0)
        each, more = divmod(total, active)
        start = self.rank * each + min(self.rank, more)
        count = each + (self.rank < more)
        return Share(start, start + count, total, count / total)

    # -- words ----------------------------------------------------------------------------

    def told(self, make: Callable[[], T]) -> T:
        """What the first process finds, for all: only there is `make` called.

        It must be what JSON can hold; not a single bit of a number is lost.
        """
        if self.size == 1:
            return make()
        text = json.dumps(make()).encode() if self.leads else b""
        length = torch.tensor([len(text)])
        with _noticing():
            dist.broadcast(length, 0, group=self._control)
            data = torch.tensor(list(text) or [0] * int(length), dtype=torch.uint8)
            dist.broadcast(data, 0, group=self._control)
        return cast(T, json.loads(bytes(data.tolist())))

    def other(self, mine: str) -> int | None:
        """The first process whose text isn't that of the one that leads; the same in all."""
        differs = self.told(lambda: mine) != mine
        rank = int(self.least(float(self.rank if differs else self.size)))
        return rank if rank < self.size else None

    def wait(self) -> None:
        """Until all processes are here."""
        self.total(0.0)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """One process of each machine goes first; the others find its work done (a cache)."""
        if ranks.local_rank() > 0:
            self.wait()
        yield
        if ranks.local_rank() == 0:
            self.wait()

    def total(self, number: float) -> float:
        """The sum of the processes' numbers."""
        return self._reduced(number, dist.ReduceOp.SUM)

    def least(self, number: float) -> float:
        """The least of the processes' numbers."""
        return self._reduced(number, dist.ReduceOp.MIN)

    def _reduced(self, number: float, how: dist.ReduceOp.RedOpType) -> float:
        if self.size == 1:
            return number
        value = torch.tensor([number], dtype=torch.float64)
        with _noticing():
            dist.all_reduce(value, how, group=self._control)
        return float(value)

    @contextlib.contextmanager
    def naming(self, where: Callable[[], str]) -> Iterator[None]:
        """Inside, `Lost` says which process of which machine noticed, and where it was by then."""
        try:
            yield
        except Lost as error:
            told = f"process {self.rank} of {self.size} on {socket.gethostname()} noticed it"
            error.where = f"{told} in {where()}: {error.where}"
            raise

    # -- tensors --------------------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> None:
        """Replaces a contiguous tensor by its sum over the processes, the same bits in all."""
        with _noticing():
            dist.all_reduce(tensor)

    def equalise(self, tensors: Sequence[Tensor]) -> None:
        """Gives all processes the first one's values, in place; tensors on the CPU."""
        if self.size == 1:
            return
        with _noticing(), torch.no_grad():
            for tensor in tensors:
                sent = tensor.contiguous()
                dist.broadcast(sent, 0, group=self._control)
                tensor.copy_(sent)

    def gathered(self, part: Tensor | None, counts: Sequence[int]) -> Tensor:
        """All processes' rows in order of rank; `part` has `counts[rank]` rows, None for none."""
        if self.size == 1 and part is not None:
            return part
        shape = self.told(lambda: list(cast(Tensor, part).shape[1:]))
        whole = torch.zeros(sum(counts), *shape)
        with _noticing():
            for rank, rows in enumerate(whole.split(list(counts))):
                if rank == self.rank and part is not None:
                    rows.copy_(part)
                if len(rows):
                    dist.broadcast(rows, rank, group=self._control)
        return whole

    # -- stopping -------------------------------------------------------------------------

    def hear(self, asked: Tensor) -> None:
        """Takes what the processes said in a step: how many of them ask to stop."""
        if not asked.is_cuda:
            self._said.append((asked, None))
            return
        copy = torch.empty(asked.shape, dtype=asked.dtype, pin_memory=True)
        copy.copy_(asked, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._said.append((copy, event))

    def stops(self, *, now: bool) -> bool:
        """Whether to stop at this step: all processes get the same answer.

        Args:
            now: ask them all; else it goes by what was said in the step (on a GPU, `LAG` before).
        """
        if self.size == 1:
            return self.asks_to_stop()
        if now:
            return self.total(float(self.asks_to_stop())) > 0
        stop = False
        while self._said and (self._said[0][1] is None or len(self._said) > LAG):
            asked, event = self._said.popleft()
            if event is not None:
                self._until(event)
            stop = stop or float(asked) > 0
        return stop

    def _until(self, event: torch.cuda.Event) -> None:
        """Waits until the GPU is there.

        It waits without end for a process that died. `torchrun` notices that one has, and asks the
        others to stop; then a step that doesn't end is given up.
        """
        asked = math.inf
        while not event.query():
            time.sleep(0.0001)
            if self.asks_to_stop():
                asked = min(asked, time.monotonic())
                if time.monotonic() - asked > GRACE:
                    raise Lost(f"a step doesn't end, {GRACE:.0f} s after it was asked to stop")


ALONE = World()


@functools.cache
def join() -> World:
    """The world that this process belongs to; joined at the first call, which all must make.

    Raises:
        ResourceError: the others can't be found (`meeting`), or have other versions.
    """
    if ranks.size() == 1:
        return ALONE
    with _noticing():
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=meeting.meet(),
            rank=ranks.rank(),
            world_size=ranks.size(),
            timeout=STEP,
        )
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    world = World(ranks.rank(), ranks.size(), cast(dist.ProcessGroup, control))
    _same_versions(world)
    return world


def _same_versions(world: World) -> None:
    mine = f"convlens {__version__}, torch {torch.__version__}"
    other = world.other(mine)
    if other is not None:
        raise ResourceError(
            f"process {other} of {world.size} has other versions than the first one",
            where=f"process {world.rank} on {socket.gethostname()} has {mine}",
            fix="install the same versions on all machines",
        )


@contextlib.contextmanager
def _noticing() -> Iterator[None]:
    """Turns a broken connection or a timeout into `Lost`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise Lost(str(error).splitlines()[0]) from error
