"""Kills trainings at random moments, continues them, and compares what they end with, bit by bit.

`convlens selftest --chaos N` does it on the user's own machine: real processes, a real SIGKILL.
One training is left alone; each of the others is killed once, somewhere between shortly before its
first file and its end, and then the same command is run again. With several processes (`torchrun`)
a random one is killed, and `torchrun` itself starts them anew.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from convlens import device
from convlens.errors import ConvlensError, ResourceError, UsageError
from convlens.formats import modelfile
from convlens.recipe import load
from convlens.run import RunFolder
from convlens.system.console import print_status, progress

# All that is drawn, averaged, chosen or counted in a training is on.
RECIPE: dict[str, Any] = {
    "name": "chaos",
    "data": {"name": "digits", "per_class": 60},
    "augment": [
        {"RandomAffine": {"degrees": 10, "translate": [0.1, 0.1]}},
        {"RandomErasing": {"p": 0.3}},
        {"MixUp": {"p": 0.5}},
    ],
    "model": {"name": "cnn", "widths": [8, 16], "depth": 2, "dropout": 0.2},
    "optim": {"name": "adamw", "lr": 0.01, "schedule": "one-cycle", "ema": 0.97, "clip_norm": 5},
    "train": {
        "epochs": 40, "batch_size": 32, "patience": 4, "monitor": "val_accuracy",
        "precision": "fp32", "memory_format": "contiguous",
    },
}  # fmt: skip
SAVE_SECONDS = "0.2"  # so that many of the kills meet a save
LONGEST = 600.0  # seconds; a training that takes longer hangs
EARLIER = 0.8  # of the time to its first file: what comes before is Python's importing of torch
PROC = Path("/proc")  # Linux's list of processes
MOST = 64  # processes of one training: each takes some hundred MB, and torchrun asks for all
CLOCK = ("seconds", "cpu_seconds", "data_seconds", "images_per_second")


@dataclass(frozen=True)
class Kill:
    """One killed training: when, how far it was by its files, and where it ended differently."""

    after: float
    saved: str
    differences: list[str]


@dataclass(frozen=True)
class Score:
    """`same` of `kills` ended with the same bits as the training that was left alone."""

    kills: list[Kill]
    processes: int

    @property
    def same(self) -> int:
        return sum(not kill.differences for kill in self.kills)

    def to_dict(self) -> dict[str, Any]:
        told = [{"after": k.after, "saved": k.saved, "differences": k.differences}
                for k in self.kills]  # fmt: skip
        return {"same": self.same, "kills": len(told), "processes": self.processes, "each": told}


def chaos(kills: int, *, processes: int = 1, seed: int = 0, jobs: int | None = None) -> Score:
    """Kills `kills` trainings of `processes` processes each.

    Args:
        seed: of the moments.
        jobs: trainings at a time; by default as many as there are cores for.

    Raises:
        UsageError: on a system that can't; ResourceError: the training that is left alone fails.
    """
    if os.name == "nt":
        raise UsageError("this needs SIGKILL, which Windows hasn't", fix="run it in WSL")
    if processes > MOST:
        raise UsageError(f"--processes {processes:,}: at most {MOST}", fix="2 show what there is")
    if processes > 1 and not _children(os.getpid()).exists():
        raise UsageError(
            "which processes torchrun has started can only be seen on Linux, in /proc",
            fix="leave out --processes",
        )
    jobs = jobs or max(1, device.usable_cores() // processes)
    with tempfile.TemporaryDirectory(prefix="convlens-chaos-") as root:
        whole = _Training(Path(root) / "whole", processes)
        begins, ends = whole.to_its_end()
        print_status(f"left alone it takes {ends:.1f} s, {begins:.1f} s until its first file")
        moments = [random.Random(f"{seed} {n}") for n in range(kills)]
        found = []
        with progress("kills", kills) as bar, ThreadPoolExecutor(jobs) as pool:
            waiting = [
                pool.submit(_killed, Path(root) / f"{n}", whole, draw, begins, ends)
                for n, draw in enumerate(moments)
            ]
            try:
                for done in as_completed(waiting):
                    kill = done.result()
                    found.append(kill)
                    end = "the same bits" if not kill.differences else "; ".join(kill.differences)
                    print_status(
                        escape(f"killed after {kill.after:.2f} s ({kill.saved}): {end}"[:600])
                    )
                    bar.advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return Score(found, processes)


class _Training:
    """One training in a folder of its own, by a command like any other."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes
        self.place = RunFolder(folder / "models" / "chaos")
        self.saved = "nothing was saved yet"  # when it was killed

    def start(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = self.folder / "chaos.yaml"
        if not recipe.exists():
            recipe.write_text(load(RECIPE).to_text())
        launch = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3",
                  "--nproc-per-node", str(self.processes)]  # fmt: skip
        command = ["-m", "convlens", "train", "chaos.yaml", "--device", "cpu"]
        environment = {
            **os.environ, "CONVLENS_SAVE_SECONDS": SAVE_SECONDS, "OMP_NUM_THREADS": "1",
            "CONVLENS_CACHE": str(self.folder / "cache"),
        }  # fmt: skip
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *(launch if self.processes > 1 else []), *command],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def to_its_end(self) -> tuple[float, float]:
        """Seconds until its first file, and until its end."""
        begun, first = time.perf_counter(), 0.0
        with self._running() as process:
            while process.poll() is None:
                if time.perf_counter() - begun > LONGEST:
                    raise ResourceError("a training hangs", where=self._told())
                if not first and self.place.path.exists():
                    first = time.perf_counter() - begun
                time.sleep(0.01)
        self._refuse_failed(process)
        return first, time.perf_counter() - begun

    def kill(self, after: float, draw: random.Random) -> bool:
        """Kills one of its processes `after` seconds from its start, or as soon as there is one.

        False if it has ended before that.

        Raises:
            ResourceError: it ended with an error of its own; torchrun hangs, or fails, instead of
                starting its processes anew.
        """
        begun = time.perf_counter()
        with self._running() as process:
            while time.perf_counter() - begun < after or not self._hit(process, draw):
                if process.poll() is not None:
                    self._refuse_failed(process)
                    return False
                time.sleep(0.002)
            with contextlib.suppress(ConvlensError):
                found = self.place.generations.read()
                self.saved = f"saved: {found.generation.place}" if found else self.saved
            if self.processes > 1:
                try:
                    process.wait(LONGEST)  # torchrun starts them anew
                except subprocess.TimeoutExpired as error:
                    raise ResourceError("torchrun hangs", where=self._told()) from error
                self._refuse_failed(process)
        return True

    def _hit(self, process: subprocess.Popen[bytes], draw: random.Random) -> bool:
        """Kills the training, or one of torchrun's processes; False if none of them lives."""
        if self.processes == 1:
            process.kill()
            return process.wait() == -signal.SIGKILL  # and not with a code of its own
        workers = _workers(process.pid)
        with contextlib.suppress(ProcessLookupError):
            if workers:
                os.kill(draw.choice(workers), signal.SIGKILL)
                return True
        return False

    @contextlib.contextmanager
    def _running(self) -> Iterator[subprocess.Popen[bytes]]:
        """The command at work; none of its processes is left behind, whatever happens."""
        process = self.start()
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _end_all_in(self.folder)

    def _refuse_failed(self, process: subprocess.Popen[bytes]) -> None:
        if process.returncode:
            what = "torchrun" if self.processes > 1 else "a training"
            raise ResourceError(f"{what} ended with {process.returncode}", where=self._told())

    def _told(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")[-400:]


def _children(process: int) -> Path:
    return PROC / f"{process}/task/{process}/children"


def _workers(agent: int) -> list[int]:
    """The processes that a torchrun has started and that live (Linux)."""
    try:
        started = _children(agent).read_text().split()
    except OSError:
        return []
    return [int(pid) for pid in started if _lives(pid)]


def _lives(pid: str) -> bool:
    try:
        state = (PROC / pid / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # one that has ended stays until its parent has asked for it


def _end_all_in(folder: Path) -> None:
    """Kills what works in this folder, which is one training's (Linux).

    torchrun gives each of its processes a session of its own: killed itself, it leaves them.
    """
    place, until = os.path.realpath(folder), time.perf_counter() + 10
    while time.perf_counter() < until:
        left = _all_in(place)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _all_in(place: str) -> list[int]:
    found = []
    for name in filter(str.isdecimal, os.listdir(PROC) if PROC.is_dir() else ()):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            if os.readlink(PROC / name / "cwd") == place:
                found.append(int(name))
    return found


def _killed(
    folder: Path, whole: _Training, draw: random.Random, begins: float, ends: float
) -> Kill:
    """One training that is killed, continued, and compared with the one that wasn't."""
    training = _Training(folder, whole.processes)
    after = draw.uniform(EARLIER * begins, ends)
    try:
        while not training.kill(after, draw):  # it was quicker this time
            after = draw.uniform(EARLIER * begins, after)
            training = _Training(folder / "again", whole.processes)
            folder = training.folder
        training.to_its_end()
        found = differences(whole.place, training.place)
    except ConvlensError as error:
        found = [str(error)]
    return Kill(round(after, 3), training.saved, found)


def differences(one: RunFolder, other: RunFolder) -> list[str]:
    """In what two finished runs differ, times aside; nothing if all bits are the same."""
    found = []
    (weights, card), (others, its_card) = (modelfile.read(each.model_path) for each in (one, other))
    found += _of_tensors("the model", weights, others)
    states = [each.state() for each in (one, other)]
    if states[0] is None or states[1] is None:
        found.append("no state of the end")
    else:
        found += _of_tensors("the state", states[0][0], states[1][0])
        if _timeless(states[0][1]) != _timeless(states[1][1]):
            found.append("the state's counters")
    if card["chosen"] != its_card["chosen"]:
        found.append(f"the choice of epoch: {its_card['chosen']} for {card['chosen']}")
    for name in ("recipe.yaml", "split.csv"):
        contents = [(each.path / name) for each in (one, other)]
        if len({path.read_bytes() if path.exists() else b"" for path in contents}) > 1:
            found.append(name)
    rows, its_rows = (
        [{k: v for k, v in row.items() if k not in CLOCK} for row in each.metrics()]
        for each in (one, other)
    )
    if rows != its_rows:
        found.append("metrics.csv")
    mine, its = one.facts(), other.facts()
    found += [f"run.json: {k}" for k in ("status", "epochs", "kept_epoch") if mine[k] != its[k]]
    kept = ("n", "correct", "loss", "confusion")
    tested, its_tested = (
        [{k: look[k] for k in kept} for look in each.results()[-1:]] for each in (one, other)
    )
    if tested != its_tested:
        found.append("the test's numbers")
    return found


def _of_tensors(what: str, one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    if one.keys() != other.keys():
        return [f"{what}: other tensors"]
    different = [name for name in one if not torch.equal(one[name], other[name])]
    return [f"{what}: {len(different)} of {len(one)} tensors"] if different else []


def _timeless(counters: dict[str, Any]) -> dict[str, Any]:
    """A state's counters without seconds, and without the hash over them."""
    # `part` is how a batch was computed where memory ran out, not what came of it.
    position = {k: v for k, v in counters["position"].items() if k not in (*CLOCK, "part")}
    rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in counters["rows"]]
    rest = {k: v for k, v in counters.items() if k not in ("sha256", "position", "rows")}
    return {**rest, "position": position, "rows": rows}
