"""Process group helpers on `torch.distributed`, for training under `torchrun`.

`init_process_group` returns the `ProcessGroup` of this process. Without `torchrun` it is
`SINGLE_PROCESS`, in which every collective is a no-op. Messages and CPU tensors use gloo, CUDA
tensors NCCL.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import datetime
import functools
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from convlens.errors import ResourceError, Stopped, UsageError
from convlens.utils import process as utils_process
from convlens.version import __version__

T = TypeVar("T")

# Machines of one job do not start at the same moment. CONVLENS_RENDEZVOUS_TIMEOUT_S overrides it.
RENDEZVOUS_TIMEOUT_S = 600.0
RENDEZVOUS_POLL_S = 0.05
# A process that exits is noticed at once on a CPU, because its connections close; on a GPU by
# torchrun, which then sends SIGTERM to the others. These are the limits for a process that hangs:
# in a training step, and where one process works while the others wait (decoding images, timing
# plans, testing, saving).
COLLECTIVE_TIMEOUT_S = 600.0
CONTROL_TIMEOUT_S = 7200.0
# On a GPU the stop votes of a step are read this many steps later, so that the host does not wait.
STOP_VOTE_LAG_STEPS = 4
STOP_GRACE_S = 10.0  # how long a step on a GPU may still take after a stop was requested

# Parts of the messages of gloo and NCCL; gloo raises a plain RuntimeError.
COMMUNICATION_ERRORS = ("gloo", "Gloo", "NCCL", "monitoredBarrier", "Connection closed by peer")


class PeerLostError(Stopped):
    """Another process of this training ended or does not respond (exit code 75)."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            "another process of this training ended or does not respond",
            where=" ".join(reason.split())[:240],
            fix="see its error message; the same command resumes from the last checkpoint",
        )


@dataclass(frozen=True)
class Share:
    """The rows `start` to `stop` of a batch of `total` images: the part of one process.

    `weight` is the fraction of the batch that they are. A process for which the batch has no rows
    has weight 0; it computes other rows so that all processes take the same steps.
    """

    start: int
    stop: int
    total: int
    weight: float

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together. With a single process every collective is a no-op.

    Args:
        rank: the number of this process, from 0.
        size: the number of processes.
        control: a gloo group with a long timeout, for messages between training steps; gradients
            use the default group.
        restarted: whether `torchrun --max-restarts` has restarted these processes.
        stop_requested: returns whether this process was asked to stop.
    """

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    restarted: bool = False
    stop_requested: Callable[[], bool] = lambda: False
    _votes: collections.deque[tuple[Tensor, torch.cuda.Event | None]] = field(
        default_factory=collections.deque, init=False, repr=False, compare=False
    )

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, the only one that writes and prints."""
        return self.rank == 0

    def with_stop_requested(self, stop_requested: Callable[[], bool]) -> ProcessGroup:
        """Return the same group with another source of stop requests."""
        return replace(self, stop_requested=stop_requested)

    def share(self, total: int) -> Share:
        """Return this process's rows of a batch: consecutive, equal to within one image.

        Each share has at least two rows, because batch norm cannot train on one; ranks that a
        small batch has no rows for get weight 0.
        """
        active = max(1, min(self.size, total // 2))
        if self.rank >= active:
            return Share(0, min(2, total), total, 0.0)
        rows_each, remainder = divmod(total, active)
        start = self.rank * rows_each + min(self.rank, remainder)
        count = rows_each + (self.rank < remainder)
        return Share(start, start + count, total, count / total)

    # -- messages -------------------------------------------------------------------------

    def broadcast(self, fn: Callable[[], T]) -> T:
        """Run `fn` on rank 0 and broadcast its JSON-serializable result to every rank.

        It is JSON and not `broadcast_object_list`, because that unpickles what comes from the
        network, which could execute code. Floats keep all their bits.
        """
        if self.size == 1:
            return fn()
        message = json.dumps(fn()).encode() if self.is_main_process else b""
        length = torch.tensor([len(message)])
        with _peer_errors():
            dist.broadcast(length, 0, group=self.control)
            data = torch.zeros(int(length), dtype=torch.uint8)
            if self.is_main_process:
                data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            dist.broadcast(data, 0, group=self.control)
        return cast(T, json.loads(data.numpy().tobytes()))

    def first_rank_that_differs(self, text: str) -> int | None:
        """Return the first rank whose `text` is not that of rank 0, the same on every rank."""
        differs = self.broadcast(lambda: text) != text
        rank = int(self.all_reduce_min(float(self.rank if differs else self.size)))
        return rank if rank < self.size else None

    def barrier(self) -> None:
        """Wait until every rank has reached this point; a timeout error names the missing one."""
        if self.size > 1:
            # Its default timeout is not that of the group.
            timeout = datetime.timedelta(seconds=CONTROL_TIMEOUT_S)
            with _peer_errors():
                dist.monitored_barrier(group=self.control, timeout=timeout)

    @contextlib.contextmanager
    def local_rank_zero_first(self) -> Iterator[None]:
        """Run the block on one process of each machine first, so that it fills the cache."""
        if utils_process.local_rank() > 0:
            self.barrier()
        yield
        if utils_process.local_rank() == 0:
            self.barrier()

    def all_reduce_sum(self, number: float) -> float:
        """Return the sum of the processes' numbers."""
        return self._all_reduce(number, dist.ReduceOp.SUM)

    def all_reduce_min(self, number: float) -> float:
        """Return the smallest of the processes' numbers."""
        return self._all_reduce(number, dist.ReduceOp.MIN)

    def _all_reduce(self, number: float, op: dist.ReduceOp.RedOpType) -> float:
        if self.size == 1:
            return number
        value = torch.tensor([number], dtype=torch.float64)
        with _peer_errors():
            dist.all_reduce(value, op, group=self.control)
        return float(value)

    @contextlib.contextmanager
    def annotate_errors(self, where: Callable[[], str]) -> Iterator[None]:
        """Add this rank, its machine and `where()` to a `PeerLostError` raised in the block.

        Errors of gloo and NCCL, which `DistributedDataParallel` raises in the backward pass, become
        a `PeerLostError`.
        """
        try:
            yield
        except (RuntimeError, ValueError, Stopped) as error:
            lost: BaseException = error
            if self.size > 1 and is_communication_error(error):
                lost = PeerLostError(str(error))
            if isinstance(lost, PeerLostError):
                process = f"rank {self.rank} of {self.size} on {socket.gethostname()}"
                lost.where = f"noticed by {process} in {where()}: {lost.where}"
                raise lost from error
            raise

    # -- tensors --------------------------------------------------------------------------

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over the processes, with equal bits on all."""
        if self.size > 1:
            with _peer_errors():
                dist.all_reduce(tensor)

    def broadcast_tensors_(self, tensors: Sequence[Tensor]) -> None:
        """Replace CPU tensors by those of rank 0."""
        if self.size == 1:
            return
        with _peer_errors(), torch.no_grad():
            for tensor in tensors:
                sent = tensor.contiguous()
                dist.broadcast(sent, 0, group=self.control)
                tensor.copy_(sent)

    def all_gather(self, part: Tensor | None, counts: Sequence[int]) -> Tensor:
        """Return the rows of all processes in order of rank.

        Args:
            part: this rank's `counts[rank]` rows; None if it has none. Rank 0 always has some.
            counts: the number of rows of each rank. They need not be equal, which
                `torch.distributed.all_gather` requires.
        """
        if self.size == 1 and part is not None:
            return part
        shape = self.broadcast(lambda: list(cast(Tensor, part).shape[1:]))
        whole = torch.zeros(sum(counts), *shape, dtype=torch.float32)
        with _peer_errors():
            for rank, rows in enumerate(whole.split(list(counts))):
                if rank == self.rank and part is not None:
                    rows.copy_(part)
                if len(rows):
                    dist.broadcast(rows, rank, group=self.control)
        return whole

    # -- stopping -------------------------------------------------------------------------

    def record_stop_votes(self, votes: Tensor) -> None:
        """Record how many processes asked to stop in a step (already summed over the ranks)."""
        if not votes.is_cuda:
            self._votes.append((votes, None))
            return
        copy = torch.empty(votes.shape, dtype=votes.dtype, pin_memory=True)
        copy.copy_(votes, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._votes.append((copy, event))

    def should_stop(self, *, now: bool) -> bool:
        """Return whether to stop at this step, the same on every rank.

        Args:
            now: ask all ranks; else use the recorded votes (on a GPU those of
                `STOP_VOTE_LAG_STEPS` steps before).
        """
        if self.size == 1:
            return self.stop_requested()
        if now:
            return self.all_reduce_sum(float(self.stop_requested())) > 0
        stop = False
        while self._votes and (self._votes[0][1] is None or len(self._votes) > STOP_VOTE_LAG_STEPS):
            votes, event = self._votes.popleft()
            if event is not None:
                self._wait_for(event)
            stop = stop or float(votes) > 0
        return stop

    def _wait_for(self, event: torch.cuda.Event) -> None:
        """Wait for the GPU for a limited time.

        A kernel of NCCL never ends if a peer has died. torchrun notices that and asks the other
        processes to stop; a step that is not finished `STOP_GRACE_S` later is given up.
        """
        requested_at = math.inf
        while not event.query():
            time.sleep(0.0001)
            if self.stop_requested():
                requested_at = min(requested_at, time.monotonic())
                if time.monotonic() - requested_at > STOP_GRACE_S:
                    raise PeerLostError(
                        f"a step did not finish within {STOP_GRACE_S:.0f} s after a stop request"
                    )


SINGLE_PROCESS = ProcessGroup()


def init_process_group() -> ProcessGroup:
    """Return the process group of this process; all processes must make the first call.

    Raises:
        ResourceError: the processes did not find each other in time, or have other versions.
    """
    if utils_process.world_size() == 1:
        return replace(SINGLE_PROCESS, restarted=utils_process.restarted())
    return _init_torch_distributed()


@functools.cache  # like torch's default group, there is one for each process
def _init_torch_distributed() -> ProcessGroup:
    timeout_s = rendezvous_timeout_s()
    try:
        store, attempt = _rendezvous(datetime.timedelta(seconds=timeout_s))
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
            store=store,
            rank=utils_process.global_rank(),
            world_size=utils_process.world_size(),
            timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        control = dist.new_group(
            backend="gloo", timeout=datetime.timedelta(seconds=CONTROL_TIMEOUT_S)
        )
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            f"process {utils_process.global_rank()} of {utils_process.world_size()} could not "
            f"connect to the others within {timeout_s:g} s: {_first_line(error)}"[:300],
            where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            fix="start the same command on all machines, with the address of the first one and a "
            "free port that no firewall blocks (torchrun: --rdzv-endpoint)",
        ) from error
    atexit.register(dist.destroy_process_group)
    group = ProcessGroup(
        utils_process.global_rank(),
        utils_process.world_size(),
        cast(dist.ProcessGroup, control),
        restarted=attempt > 1 or utils_process.restarted(),
    )
    _check_same_versions(group)
    restarted = group.all_reduce_sum(float(group.restarted)) > 0  # torchrun counts by machine
    return replace(group, restarted=restarted)


def rendezvous_timeout_s() -> float:
    """Return how long the processes wait for each other at the start, in seconds.

    Raises:
        UsageError: CONVLENS_RENDEZVOUS_TIMEOUT_S is not a positive number.
    """
    text = os.environ.get("CONVLENS_RENDEZVOUS_TIMEOUT_S", str(RENDEZVOUS_TIMEOUT_S))
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise UsageError(
        f"CONVLENS_RENDEZVOUS_TIMEOUT_S={text!r} is not a positive number of seconds",
        fix="unset it, or give seconds, e.g. 600",
    )


def _rendezvous(timeout: datetime.timedelta) -> tuple[Any, int]:
    """Return a store for these processes only, and the number of the attempt, from 1.

    torchrun 2.15 starts the processes of a restart with the store of those that ended. Their
    addresses are still in it, and plain `init_method="env://"` waits for them until its timeout
    ("connection refused"). So each attempt gets its own prefix. TORCHELASTIC_RESTART_COUNT
    can't be that prefix: each machine counts only the failures of its own processes.

    Rank 0 counts the attempts in the store and publishes the newest number. Another rank may read
    the number of an earlier attempt; therefore it writes a random token under the number, and
    waits for rank 0 to acknowledge just that token. If the number changes, it tries the new one.
    """
    store: Any
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    if rank == 0:
        attempt = store.add("convlens/attempts", 1)
        store.set("convlens/attempt", str(attempt))
        for peer in range(1, size):
            token = _get(store, f"convlens/{attempt}/joined/{peer}", f"{peer} of {size}")
            store.set(f"convlens/{attempt}/acknowledged/{peer}", token)
    else:
        attempt = _join_attempt(store, rank, size, time.monotonic() + timeout.total_seconds())
    return dist.PrefixStore(f"convlens/{attempt}", store), attempt  # type: ignore[attr-defined]


def _join_attempt(store: Any, rank: int, size: int, deadline: float) -> int:
    """Return the number of the attempt in which rank 0 acknowledged this process."""
    token = uuid.uuid4().hex.encode()
    while time.monotonic() < deadline:
        attempt = int(_get(store, "convlens/attempt", f"0 of {size}"))
        store.set(f"convlens/{attempt}/joined/{rank}", token)
        key = f"convlens/{attempt}/acknowledged/{rank}"
        if store.check([key]) and store.get(key) == token:
            return attempt
        time.sleep(RENDEZVOUS_POLL_S)
    raise RuntimeError(f"process 0 of {size} did not start")


def _get(store: Any, key: str, writer: str) -> bytes:
    """Wait for a value in the store, up to the store's timeout."""
    try:
        value: bytes = store.get(key)
    except RuntimeError as error:
        raise RuntimeError(f"process {writer} did not start") from error
    return value


def _check_same_versions(group: ProcessGroup) -> None:
    versions = f"convlens {__version__}, torch {torch.__version__}"
    other = group.first_rank_that_differs(versions)
    if other is not None:
        raise ResourceError(
            f"process {other} of {group.size} has different versions from process 0",
            where=f"process {group.rank} on {socket.gethostname()} has {versions}",
            fix="install the same versions on all machines",
        )


def is_communication_error(error: BaseException) -> bool:
    """Return whether gloo or NCCL raised `error`, because a peer ended or does not respond."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in COMMUNICATION_ERRORS
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn a broken connection or a timeout into `PeerLostError`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise PeerLostError(str(error)) from error
