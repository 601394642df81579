"""Where the processes of one training find each other: a store at MASTER_ADDR, MASTER_PORT.

Under `torchrun` its agent serves the store, which outlives the processes; elsewhere the first
process does.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import time
import uuid
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from convlens.errors import ResourceError
from convlens.system import ranks
from convlens.system.console import console

PATIENCE = 600.0  # seconds for all to come: machines don't start at the same moment
LOOKUP = 60.0  # seconds for a machine's name to be known: a new one's may take a while
TELL = 20.0  # seconds after which it is said who is waited for
POLL = 0.02


def meet() -> Any:
    """A part of the store that these processes have for themselves, once all of them are here.

    `torchrun --max-restarts` starts processes anew with the same store (torch 2.15), where the
    addresses of ended ones still stand, and who read such an address could not connect. Counts of
    restarts differ between machines. So each process writes down a name that it has made up, and
    the first one tells all which names it read, until each of them has found its own.

    Raises:
        ResourceError: the store can't be had, or not all came; says which, and where.
    """
    whole, rank = store(), ranks.rank()
    name = uuid.uuid4().hex
    whole.set(f"convlens/here/{rank}", name)
    part = _gathered(whole, ranks.size()) if rank == 0 else _found(whole, rank, name)
    _met.append(part)
    return dist.PrefixStore(f"convlens/{part}", whole)  # type: ignore[attr-defined]


def first_to_fail(code: int) -> tuple[bool, int]:
    """For a process that is about to end with an error: whether it is the first to do so.

    The first one tells the user, and all end with its exit code. The store decides; without it,
    one process of each machine speaks.
    """
    try:
        if _missed:
            return ranks.local_rank() == 0, code
        # Restarts count where they have not met yet.
        part = _met[-1] if _met else os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if store().add(f"convlens/{part}/failed", 1) == 1:
            store().set(f"convlens/{part}/code", str(code))
            return True, code
        return False, int(store().get(f"convlens/{part}/code"))
    except (RuntimeError, ValueError, ResourceError):
        return ranks.local_rank() == 0, code


def restarted() -> bool:
    """Whether others have met here before: known to the first process, once it met these."""
    return bool(_before)


_before: list[str] = []  # the part of the round before
_met: list[str] = []  # the part of the store where this process met the others
_missed: list[ResourceError] = []  # why it has no store


@functools.cache
def store() -> Any:
    """What all processes of this training read and write.

    Raises:
        ResourceError: nobody answers there in time, or another program does.
    """
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if not _serves():
            _reach(host, port)
        return dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            is_master=_serves(),
            timeout=timedelta(seconds=PATIENCE),
            wait_for_workers=False,  # `meet` does, and can say for whom
        )
    except ResourceError as error:
        _missed.append(error)
        raise
    except (RuntimeError, ValueError) as error:  # of torch
        told = " ".join(str(error).split())
        busy = "EADDRINUSE" in told or "already in use" in told
        _missed.append(_busy() if busy else _unanswered(told[:160]))
        raise _missed[-1] from error


def _serves() -> bool:
    """Whether this process serves the store itself."""
    return ranks.rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _reach(host: str, port: int) -> None:
    """Waits until somebody answers there, which torch would do without a word."""
    waiting = _Waiting("the store", "is there one at this address?")
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except socket.gaierror as error:
            if waiting.seconds > LOOKUP:
                raise ResourceError(
                    f"no machine is known by the name of {host!r}: {error.strerror or error}",
                    where=f"MASTER_ADDR of process {ranks.rank()} of {ranks.size()}",
                    fix="give a name or an address that this machine knows "
                    "(torchrun: --rdzv-endpoint or --master-addr)",
                ) from error
        except OSError:  # nobody listens yet
            pass
        waiting.a_moment()


def _gathered(whole: Any, size: int) -> str:
    """What the first process does: tells the names of all who are here, as often as they change."""
    part, told = "", list[str]()
    if whole.check(["convlens/part"]):
        _before.append(json.loads(whole.get("convlens/part"))[0])
    waiting = _Waiting("the other processes", "did all machines start theirs?")
    while True:
        missing = [r for r in range(size) if not whole.check([f"convlens/here/{r}"])]
        if not missing:
            names = [whole.get(f"convlens/here/{r}").decode() for r in range(size)]
            if names != told:
                part, told = uuid.uuid4().hex, names
                whole.set("convlens/part", json.dumps([part, names]))
            missing = [r for r in range(1, size) if not whole.check([f"convlens/{part}/{r}"])]
            if not missing:
                whole.set(f"convlens/{part}/complete", "")
                return part
        waiting.a_moment(f": {', '.join(map(str, missing[:8]))} of 0 to {size - 1}")


def _found(whole: Any, rank: int, name: str) -> str:
    """What every other process does: looks whether it is among those who are here."""
    part = ""
    waiting = _Waiting("the first process", "did its machine start it?")
    while not part or not whole.check([f"convlens/{part}/complete"]):
        if whole.check(["convlens/part"]):
            newest, names = json.loads(whole.get("convlens/part"))
            if newest != part and names[rank : rank + 1] == [name]:
                part = newest
                whole.set(f"convlens/{part}/{rank}", "")
        waiting.a_moment()
    return part


class _Waiting:
    """For `what`, with a word to the user when it takes long, and an end."""

    def __init__(self, what: str, ask: str) -> None:
        self._what, self._ask = what, ask
        self._begun, self._silent = time.monotonic(), True

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def a_moment(self, who: str = "") -> None:
        """Sleeps a little; `who` is still missing.

        Raises:
            ResourceError: it has taken too long.
        """
        if self.seconds > PATIENCE:
            _give_up(f"{self._what}{who}", self._ask)
        if self.seconds > TELL and self._silent:
            self._silent = False
            _tell(f"waiting for {self._what}{who}, at {_address()}")
        time.sleep(POLL)


def _give_up(whom: str, ask: str) -> NoReturn:
    raise ResourceError(
        f"waited {PATIENCE / 60:.0f} minutes in vain for {whom}",
        where=_address(),
        fix=f"{ask} does a firewall let this port through?",
    )


def _busy() -> ResourceError:
    port = os.environ["MASTER_PORT"]
    return ResourceError(
        f"port {port}, where the processes should meet, is in use on this machine",
        where=f"MASTER_PORT={port}",
        fix="take another one for all processes (torchrun: --master-port, --rdzv-endpoint; "
        "or --standalone, which finds one)",
    )


def _unanswered(told: str) -> ResourceError:
    return ResourceError(
        f"can't use the store where the processes should meet: {told}",
        where=_address(),
        fix="see that only this training uses the port, and run the same command again",
    )


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _tell(told: str) -> None:
    """Said by one process of each machine: the first one may be what is waited for."""
    if ranks.local_rank() == 0:
        console().print(told)
