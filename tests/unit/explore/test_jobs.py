from __future__ import annotations

import asyncio
import threading
from concurrent.futures import wait

import pytest

from convlens.errors import ResourceError
from convlens.explore.jobs import Job, JobCancelled, Jobs, WorkQueue, result_of, started_jobs
from convlens.utils.console import progress_bar

SECONDS = 20  # far more than anything here takes


@pytest.fixture
def jobs() -> Jobs:
    with started_jobs() as started:
        yield started


class Blocker:
    """A job that runs until it is released."""

    def __init__(self) -> None:
        self.running, self.released = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> str:
        self.running.set()
        assert self.released.wait(SECONDS)
        job.check()
        return "released"


def test_results_and_errors_reach_those_who_wait(jobs: Jobs) -> None:
    def fail(job: Job) -> None:
        raise ValueError("no")

    assert asyncio.run(result_of(jobs.quick.submit(lambda job: 7))) == 7
    failed = jobs.quick.submit(fail)
    with pytest.raises(ValueError, match="no"):
        asyncio.run(result_of(failed))
    assert failed.state == "failed"
    assert jobs.find(failed.id) is failed
    assert jobs.find("unknown") is None


def test_newest_job_of_a_key_replaces_waiting_and_running_ones(jobs: Jobs) -> None:
    first, ran = Blocker(), []
    running = jobs.quick.submit(first, key="brush")
    assert first.running.wait(SECONDS)
    waiting = [
        jobs.quick.submit(lambda job, number=number: ran.append(number), key="brush")
        for number in range(5)
    ]
    other = jobs.quick.submit(lambda job: ran.append("other"), key="another")
    for replaced in [running, *waiting[:-1]]:
        with pytest.raises(JobCancelled):
            replaced.future.result(SECONDS)
    first.released.set()
    wait([waiting[-1].future, other.future], SECONDS)
    assert ran == [4, "other"]
    jobs.quick.wait_until_idle(SECONDS)
    assert [running.state, *(job.state for job in waiting)] == ["cancelled"] * 5 + ["done"]


def test_full_queue_refuses_work() -> None:
    queue, blocker = WorkQueue("test", max_waiting=2), Blocker()
    queue.submit(blocker)
    assert blocker.running.wait(SECONDS)
    queue.submit(lambda job: None)
    queue.submit(lambda job: None)
    with pytest.raises(ResourceError, match="too much work"):
        queue.submit(lambda job: None)
    blocker.released.set()
    queue.close()
    with pytest.raises(ResourceError, match="stopping"):
        queue.submit(lambda job: None)


def test_progress_bars_of_the_library_are_the_progress_of_the_job(jobs: Jobs) -> None:
    seen = []

    def work(job: Job) -> None:
        with progress_bar("reading", 10) as bar:
            bar.advance(4)
            seen.append(job.to_dict())
            job.cancel()
            bar.advance(1)
            seen.append("not reached")

    job = jobs.long.submit(work, title="features")
    with pytest.raises(JobCancelled):
        job.future.result(SECONDS)
    jobs.long.wait_until_idle(SECONDS)
    (state,) = seen
    assert (state["text"], state["done"], state["total"]) == ("reading", 4, 10)
    assert (state["state"], state["title"], job.state) == ("running", "features", "cancelled")


def test_long_work_waits_at_its_next_step_for_quick_work(jobs: Jobs) -> None:
    quick, order = Blocker(), []
    jobs.quick.submit(quick)
    assert quick.running.wait(SECONDS)

    def work(job: Job) -> None:
        started.set()
        job.progress("step", 1, 2)
        order.append("long")

    started = threading.Event()
    long = jobs.long.submit(work)
    assert started.wait(SECONDS)
    order.append("quick")
    quick.released.set()
    long.future.result(SECONDS)
    assert order == ["quick", "long"]


def test_ended_jobs_are_forgotten_but_running_ones_are_not(jobs: Jobs) -> None:
    blocker = Blocker()
    long = jobs.long.submit(blocker, key="features")
    assert jobs.long.running_or_waiting("features") is long
    first = jobs.quick.submit(lambda job: None)
    for _ in range(100):
        jobs.quick.submit(lambda job: None).future.result(SECONDS)
    assert jobs.find(first.id) is None
    assert jobs.find(long.id) is long
    blocker.released.set()
    long.future.result(SECONDS)
    jobs.long.wait_until_idle(SECONDS)
    assert jobs.long.running_or_waiting("features") is None
