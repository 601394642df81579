"""Work that must not block the page: bounded queues with one worker thread each.

A request waits for its job without blocking the server. Of jobs with the same key, the newest
replaces those that wait and cancels the one that runs: while a brush moves, only its last position
matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from convlens import user_code
from convlens.errors import ResourceError
from convlens.utils import console

MAX_WAITING = 32
MAX_FINISHED = 64  # whose state can be asked for
YIELD_SECONDS = 10.0  # the longest time that background work waits for quick work


class JobCancelled(Exception):  # noqa: N818
    """Raised inside a job that was cancelled or replaced, and in whoever waits for it."""


@dataclass(eq=False)
class Job:
    """A function that a worker thread runs.

    Attributes:
        key: a newer job with the same key replaces this one; empty for none.
        state: `waiting`, `running`, `done`, `failed` or `cancelled`.
        done, total: steps; a total of 0 is unknown.
        text: what it is doing.
        future: its result or exception.
    """

    function: Callable[[Job], Any]
    key: str = ""
    title: str = ""
    id: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    state: str = "waiting"
    done: int = 0
    total: int = 0
    text: str = ""
    future: Future[Any] = field(default_factory=Future)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _before_step: Callable[[], None] = lambda: None

    def progress(self, text: str, done: int, total: int) -> None:
        """Record progress; long work calls this often.

        Raises:
            JobCancelled: the job has been cancelled.
        """
        self.text, self.done, self.total = text, done, total
        self.check()
        self._before_step()
        self.check()

    def check(self) -> None:
        """Raise `JobCancelled` if the job has been cancelled, or nobody waits for it any more."""
        if self._cancelled.is_set() or self.future.cancelled():
            raise JobCancelled

    def cancel(self) -> None:
        """Cancel the job; one that runs ends at its next step."""
        self._cancelled.set()
        if self.state == "waiting":
            self.state = "cancelled"
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(JobCancelled())

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "title": self.title,
            "state": self.state,
            "done": self.done,
            "total": self.total,
            "text": self.text,
        }


class WorkQueue:
    """A bounded queue of jobs and the thread that runs them.

    Args:
        before_step: called at each step of a job, which may wait there.
    """

    def __init__(
        self,
        name: str,
        *,
        max_waiting: int = MAX_WAITING,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._max_waiting = max_waiting
        self._before_step = before_step
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._trusted = user_code.trusted()  # a thread does not see the context of its creator
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[Job], Any], key: str = "", title: str = "") -> Job:
        """Add a job; it replaces older ones with the same key.

        Raises:
            ResourceError: too many jobs are waiting.
        """
        job = Job(function, key, title, _before_step=self._before_step)
        with self._changed:
            if key:
                for older in [each for each in self._waiting if each.key == key]:
                    self._waiting.remove(older)
                    older.cancel()
                if self._running is not None and self._running.key == key:
                    self._running.cancel()
            if self._closed or len(self._waiting) >= self._max_waiting:
                raise ResourceError(
                    "too much work is waiting" if not self._closed else "the server is stopping",
                    fix="try again in a moment",
                )
            self._waiting.append(job)
            self._jobs[job.id] = job
            self._forget()
            self._changed.notify_all()
        return job

    def find(self, job_id: str) -> Job | None:
        """Return a job that waits, runs or ended recently."""
        return self._jobs.get(job_id)

    def running_or_waiting(self, key: str) -> Job | None:
        """Return the job with this key that has not ended yet."""
        with self._changed:
            found = [self._running, *self._waiting]
            return next((job for job in found if job is not None and job.key == key), None)

    @property
    def is_busy(self) -> bool:
        with self._changed:
            return self._running is not None or bool(self._waiting)

    def wait_until_idle(self, timeout: float) -> None:
        """Wait until no job runs or waits, at most `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._running is None and not self._waiting, timeout)

    def close(self) -> None:
        """Cancel all jobs and end the thread after the step that it is in."""
        with self._changed:
            self._closed = True
            for job in itertools.chain(self._waiting, filter(None, [self._running])):
                job.cancel()
            self._waiting.clear()
            self._changed.notify_all()

    def _forget(self) -> None:
        """Drop the oldest jobs that have ended."""
        ended = [job for job in self._jobs.values() if job.state not in ("waiting", "running")]
        for job in ended[: max(0, len(ended) - MAX_FINISHED)]:
            del self._jobs[job.id]

    def _work(self) -> None:
        while (job := self._next()) is not None:
            result: Any = None
            error: BaseException | None = None
            try:
                with (
                    console.listen_to_progress(job.progress),
                    console.quiet_mode(),
                    user_code.trust(self._trusted),
                ):
                    result = job.function(job)
                state = "done"
            except JobCancelled as cancelled:
                state, error = "cancelled", cancelled
            except BaseException as failure:
                state, error = "failed", failure
            with self._changed:
                self._running = None
                job.state = state
                # Whoever waits for it has already been answered if it was cancelled.
                with contextlib.suppress(InvalidStateError):
                    if error is None:
                        job.future.set_result(result)
                    else:
                        job.future.set_exception(error)
                self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._waiting))
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            self._running.state = "running"
            return self._running


class Jobs:
    """The queues of the server.

    Attributes:
        quick: what somebody is waiting for: predictions, heat maps, the brush.
        data: reading images of a data set, without a network.
        long: work over many images. It pauses at its next step while quick work is to be done,
            since both need the same cores.
        commands: waiting for convlens commands in processes of their own.
    """

    def __init__(self) -> None:
        self.quick = WorkQueue("convlens-quick")
        self.data = WorkQueue("convlens-data")
        self.commands = WorkQueue("convlens-commands")
        self.long = WorkQueue(
            "convlens-long", before_step=lambda: self.quick.wait_until_idle(YIELD_SECONDS)
        )

    def find(self, job_id: str) -> Job | None:
        return next((job for queue in self._all() if (job := queue.find(job_id))), None)

    def close(self) -> None:
        for queue in self._all():
            queue.close()

    def _all(self) -> tuple[WorkQueue, ...]:
        return self.quick, self.data, self.long, self.commands


async def result_of(job: Job) -> Any:
    """Wait for a job without blocking the event loop; return its result or raise its exception."""
    return await asyncio.wrap_future(job.future)


@contextlib.contextmanager
def started_jobs() -> Iterator[Jobs]:
    """Yield queues that end with the block."""
    jobs = Jobs()
    try:
        yield jobs
    finally:
        jobs.close()
