"""Training on several machines, simulated by torchruns that connect over the loopback address."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from convlens.run import RunDir
from helpers.commands import weights
from helpers.launching import ended, launch, torchrun
from helpers.recipes_together import main
from helpers.support import same
from helpers.torchrun import SCRIPT, TRAIN, a_long_run, close, in_epoch, processes_of, written

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def machines(count: int, *arguments: str | Path, restarts: int = 0) -> list[subprocess.Popen[str]]:
    """Start two torchruns of `count` processes each, which connect to the address of the first."""
    endpoint = f"127.0.0.1:{free_port()}"
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        str(count),
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "test",
        "--rdzv-endpoint",
        endpoint,
        "--max-restarts",
        str(restarts),
    )
    return [
        launch(count, *arguments, launcher=(*launcher, "--rdzv-conf", f"is_host={host}"))
        for host in ("true", "false")
    ]


def test_two_machines_train_to_the_weights_of_one_process() -> None:
    written("dropout")
    for done in [ended(agent) for agent in machines(2, SCRIPT, "4", "dropout")]:
        assert done.code == 0, done.err
    main("1", "dropout")
    close("dropout", 4)
    assert RunDir(Path("models/dropout-4")).metadata()["world_size"] == 4


def test_after_the_loss_of_a_process_on_either_machine_all_processes_resume() -> None:
    run_dir = a_long_run()
    agents = machines(1, *TRAIN, restarts=2)
    for agent, epoch in zip(agents, (2, 12), strict=True):  # one after the other
        in_epoch(run_dir, agents[0], epoch)
        os.kill(processes_of(agent)[0], signal.SIGKILL)
    for done in [ended(agent) for agent in agents]:
        assert done.code == 0, done.err
    shutil.move("models/tiny", "killed")
    whole = torchrun(2, *TRAIN)
    assert whole.code == 0, whole.err
    same(weights(Path("killed")), weights(Path("models/tiny")))


def test_the_loss_of_the_machine_with_the_rendezvous_endpoint_ends_the_other_one() -> None:
    run_dir = a_long_run()
    lost, other = machines(1, *TRAIN)
    in_epoch(run_dir, lost, 2)
    for pid in (lost.pid, *processes_of(lost)):
        os.kill(pid, signal.SIGKILL)
    done = ended(other, timeout=120)  # a process that does not notice waits for ten minutes
    assert done.code != 0
    assert done.err.count("another process of this training ended or does not respond") == 1, (
        done.err
    )
    assert "the same command resumes from the last checkpoint" in done.err
    lost.communicate()
    for again in [ended(agent) for agent in machines(1, *TRAIN)]:
        assert again.code == 0, again.err
    assert run_dir.is_finished
