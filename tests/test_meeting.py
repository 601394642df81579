"""How processes find each other, and what is said where they don't."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore

from commands import environment
from convlens.distributed import meeting
from convlens.errors import ResourceError


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    """What a process knows of its store, it knows for good."""
    yield
    meeting.store.cache_clear()
    meeting._met.clear()
    meeting._before.clear()
    meeting._missed.clear()


def as_process(patch: pytest.MonkeyPatch, rank: int, size: int, host: str, port: int) -> None:
    for key, value in {
        "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": host, "MASTER_PORT": port,
    }.items():  # fmt: skip
        patch.setenv(key, str(value))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_machine_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "LOOKUP", 0.0)
    as_process(monkeypatch, 1, 2, "no-such-machine.invalid", 29500)
    with pytest.raises(
        ResourceError, match=r"known by the name of 'no-such-machine\.invalid'"
    ) as e:
        meeting.meet()
    assert e.value.where == "MASTER_ADDR of process 1 of 2"
    assert "--rdzv-endpoint" in e.value.fix
    # Each machine says it once: there is no store to agree by, and nobody waits for one again.
    begun = time.monotonic()
    assert meeting.first_to_fail(5) == (True, 5)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert meeting.first_to_fail(5) == (False, 5)
    assert time.monotonic() - begun < 5


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        as_process(monkeypatch, 0, 2, "127.0.0.1", port)
        with pytest.raises(ResourceError, match=f"port {port}.* is in use on this machine") as e:
            meeting.meet()
    assert "--master-port" in e.value.fix


def test_nobody_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "PATIENCE", 0.5)
    monkeypatch.setattr(meeting, "TELL", 0.1)
    port = free_port()
    as_process(monkeypatch, 1, 2, "127.0.0.1", port)
    with pytest.raises(ResourceError, match="in vain for the store") as e:
        meeting.meet()
    assert e.value.where == f"127.0.0.1:{port}"
    assert f"waiting for the store, at 127.0.0.1:{port}" in capsys.readouterr().err


def test_it_is_said_who_has_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    as_process(monkeypatch, 0, 3, "127.0.0.1", free_port())
    threading.Timer(0.2, lambda: meeting.store().set("convlens/here/1", "of process 1")).start()
    meeting.store()
    monkeypatch.setattr(meeting, "PATIENCE", 1.0)
    with pytest.raises(ResourceError, match=r"in vain for the other processes: 2 of 0 to 2"):
        meeting.meet()


JOINED = """
import os, sys, time
from convlens.distributed import meeting, processes
print("begun", flush=True)
world = processes.join()
print("total", world.total(1.0), meeting.restarted(), flush=True)
if sys.argv[1] == "killed":
    os._exit(9)
"""


@pytest.mark.parametrize("machines", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_processes_that_are_started_anew_do_not_ask_for_the_ended(machines: int) -> None:
    """torchrun's store outlives them, with addresses that nobody answers at any more."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def begun(rank: int, restarts: int, how: str) -> subprocess.Popen[str]:
        told = {
            "RANK": rank,
            "LOCAL_RANK": rank if machines == 1 else 0,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2 // machines,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "GROUP_WORLD_SIZE": machines,
            # torchrun counts those that it started itself.
            "TORCHELASTIC_RESTART_COUNT": restarts if machines == 1 or rank == 0 else 0,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        return subprocess.Popen(
            [sys.executable, "-c", JOINED, how], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=environment(**{key: str(value) for key, value in told.items()}),
        )  # fmt: skip

    both = [begun(rank, 0, "killed") for rank in (0, 1)]
    assert [process.wait(120) for process in both] == [9, 9]
    # Those of a second round are killed while one of them still looks for the other.
    lonely = begun(0, 1, "")
    assert lonely.stdout is not None
    assert lonely.stdout.readline() == "begun\n"
    time.sleep(1)
    lonely.kill()
    lonely.communicate()
    second = begun(1, 2, "")
    assert second.stdout is not None
    assert second.stdout.readline() == "begun\n"
    time.sleep(1)
    for process, leads in ((begun(0, 2, ""), True), (second, False)):
        assert f"total 2.0 {leads}" in process.communicate(timeout=120)[0]
        assert process.returncode == 0
