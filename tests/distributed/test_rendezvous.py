"""How processes connect to each other, and the errors if they cannot."""

from __future__ import annotations

import socket

import pytest
from torch.distributed import TCPStore

from convlens.distributed import init_process_group, rendezvous_timeout_s
from convlens.errors import ResourceError, UsageError
from helpers.launching import Forked, rank_variables, wait_until


def as_process(patch: pytest.MonkeyPatch, rank: int, size: int, host: str, port: int) -> None:
    variables = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "CONVLENS_RENDEZVOUS_TIMEOUT_S": 0.5,
    }
    for name, value in variables.items():
        patch.setenv(name, str(value))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.parametrize("host", ["no-such-machine.invalid", "127.0.0.1"])
def test_an_address_where_nobody_answers_is_an_error_after_the_timeout(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    as_process(monkeypatch, 1, 2, host, port)
    with pytest.raises(
        ResourceError, match=r"process 1 of 2 could not connect to the others within 0\.5 s"
    ) as error:
        init_process_group()
    assert error.value.where == f"{host}:{port}"
    assert "--rdzv-endpoint" in error.value.fix


def test_a_port_that_another_program_uses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        as_process(monkeypatch, 0, 2, "127.0.0.1", other.getsockname()[1])
        with pytest.raises(ResourceError, match="process 0 of 2 could not connect") as error:
            init_process_group()
    assert "free port" in error.value.fix


def test_the_error_counts_the_processes_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    as_process(monkeypatch, 0, 2, "127.0.0.1", free_port())
    with pytest.raises(ResourceError, match="1/2 clients joined"):
        init_process_group()


@pytest.mark.parametrize(("rank", "missing"), [(0, 2), (1, 0)])
def test_under_torchrun_the_error_says_which_process_did_not_start(
    rank: int, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    as_process(monkeypatch, rank, 3, "127.0.0.1", store.port)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    if rank == 0:
        store.set("convlens/1/joined/1", "the token of rank 1")
    with pytest.raises(ResourceError, match=f"process {missing} of 3 did not start"):
        init_process_group()


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_timeout_that_is_not_a_positive_number_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVLENS_RENDEZVOUS_TIMEOUT_S", text)
    with pytest.raises(UsageError, match="not a positive number of seconds"):
        rendezvous_timeout_s()


def test_the_timeout_is_ten_minutes_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVLENS_RENDEZVOUS_TIMEOUT_S", raising=False)
    assert rendezvous_timeout_s() == 600


JOIN = """
import os, sys
from convlens.distributed import init_process_group
group = init_process_group()
print("sum", group.all_reduce_sum(1.0), "restarted", group.restarted, flush=True)
group.barrier()
if sys.argv[1] == "kill":
    os._exit(9)
group.barrier()
"""


@pytest.mark.parametrize("machines", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_restarted_processes_do_not_connect_to_the_ended_ones(machines: int) -> None:
    """torchrun's store outlives the processes, and the addresses of ended ones stay in it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(rank: int, restarts: int, end: str) -> Forked:
        variables = rank_variables(rank, 2, store.port) | {
            "LOCAL_RANK": rank if machines == 1 else 0,
            "LOCAL_WORLD_SIZE": 2 // machines,
            "GROUP_WORLD_SIZE": machines,
            # Each torchrun counts the failures of its own processes only.
            "TORCHELASTIC_RESTART_COUNT": restarts if machines == 1 or rank == 0 else 0,
        }
        return Forked(JOIN, end, **variables)

    def wait_until_joining(process: Forked, key: str) -> None:
        wait_until(lambda: store.check([key]), process)

    first = [start(rank, 0, "kill") for rank in (0, 1)]
    for process in first:
        out = process.communicate()[0]
        assert "sum 2.0 restarted False" in out, out
        assert process.returncode == 9
    # Rank 0 of the second attempt is killed while it waits for rank 1.
    lonely = start(0, 1, "")
    wait_until_joining(lonely, "convlens/attempts")
    wait_until(lambda: store.get("convlens/attempt") == b"2", lonely)
    lonely.kill()
    lonely.communicate()
    # Rank 1 of the third attempt comes first and finds the number of the second.
    second = start(1, 2, "")
    wait_until_joining(second, "convlens/2/joined/1")
    for process in (start(0, 2, ""), second):
        out = process.communicate()[0]
        assert "sum 2.0 restarted True" in out, out
        assert process.returncode == 0
