"""Several machines, rehearsed on this one: torchruns that meet at an address of its loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
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
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def machines(count: int, *arguments: str | Path, restarts: int = 0) -> list[subprocess.Popen[str]]:
    """Two torchruns of `count` processes each, which meet at the first one's address."""
    meeting = f"127.0.0.1:{free_port()}"
    how = (
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        str(count),
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "rehearsal",
        "--rdzv-endpoint",
        meeting,
        "--max-restarts",
        str(restarts),
    )
    return [
        launch(count, *arguments, how=(*how, "--rdzv-conf", f"is_host={host}"))
        for host in ("true", "false")
    ]


def test_two_machines_rehearsed_on_loopback() -> None:
    written("dropout")
    for done in [ended(agent) for agent in machines(2, SCRIPT, "4", "dropout")]:
        assert done.code == 0, done.err
    main("1", "dropout")
    close("dropout", 4)
    assert RunDir(Path("models/dropout-4")).metadata()["world_size"] == 4


def test_when_one_of_two_machines_loses_a_process_all_begin_anew_where_they_were() -> None:
    place = a_long_run()
    agents = machines(1, *TRAIN, restarts=2)
    for agent, epoch in zip(agents, (2, 12), strict=True):  # one after the other
        in_epoch(place, agents[0], epoch)
        os.kill(processes_of(agent)[0], signal.SIGKILL)
    for done in [ended(agent) for agent in agents]:
        assert done.code == 0, done.err
    shutil.move("models/tiny", "killed")
    whole = torchrun(2, *TRAIN)
    assert whole.code == 0, whole.err
    same(weights(Path("killed")), weights(Path("models/tiny")))


def test_a_machine_that_is_lost_with_the_meeting_place_ends_the_other_one() -> None:
    place = a_long_run()
    lost, other = machines(1, *TRAIN)
    in_epoch(place, lost, 2)
    for pid in (lost.pid, *processes_of(lost)):
        os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    done = ended(other, timeout=120)
    assert time.monotonic() - begun < 60
    assert done.code != 0
    assert done.err.count("another process of this training ended or does not respond") == 1, (
        done.err
    )
    assert "the same command resumes from the last checkpoint" in done.err
    lost.communicate()
    for again in [ended(agent) for agent in machines(1, *TRAIN)]:
        assert again.code == 0, again.err
    assert place.is_finished
