"""Kill trainings at random moments, resume them, and compare the results bit by bit.

    python tools/selftest.py --kills 5                  about ten seconds each
    python tools/selftest.py --kills 5 --processes 2    under torchrun (Linux)

Needs convlens installed; everything happens in a temporary folder. Real processes get a real
SIGKILL. One training runs uninterrupted. Each of the others is killed once, at a moment between
shortly before it writes its first file and its end, and then the same command is run again. With
several processes one of them is killed at random, and torchrun restarts them all.

The exit status is 1 if a resumed training ends with other bits than the uninterrupted one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from convlens import device, serialization
from convlens.errors import ConvlensError, ResourceError, UsageError
from convlens.recipe import load_recipe
from convlens.run import RunDir
from convlens.utils.console import print_status, progress_bar

# Uses everything in a training that is random, averaged, selected or counted.
RECIPE: dict[str, Any] = {
    "name": "selftest",
    "data": {"name": "digits", "per_class": 60},
    "augment": [
        {"RandomAffine": {"degrees": 10, "translate": [0.1, 0.1]}},
        {"RandomErasing": {"p": 0.3}},
        {"MixUp": {"p": 0.5}},
    ],
    "model": {"name": "cnn", "widths": [8, 16], "depth": 2, "dropout": 0.2},
    "optim": {"name": "adamw", "lr": 0.01, "schedule": "one-cycle", "ema": 0.97, "clip_norm": 5},
    "train": {
        "epochs": 40,
        "batch_size": 32,
        "patience": 4,
        "monitor": "val_accuracy",
        "precision": "fp32",
        "memory_format": "contiguous",
    },
}
SAVE_INTERVAL_S = "0.2"  # so short that many kills interrupt a save
HANG_TIMEOUT_S = 600.0  # a training that takes longer hangs
# Kills start at this fraction of the time to the first file: before it, Python imports torch.
EARLIEST_KILL = 0.8
PROC = Path("/proc")  # Linux's list of processes
MAX_PROCESSES = 64  # each takes some hundred MB, and torchrun would start any number
CLOCK_COLUMNS = ("seconds", "cpu_seconds", "data_seconds", "images_per_second")


@dataclass(frozen=True)
class Kill:
    """One killed training: when it was killed, what it had saved, and what differs in the end."""

    after: float  # seconds from the start
    saved: str
    differences: list[str]


@dataclass(frozen=True)
class Score:
    """All kills; `same` of them ended with the same bits as the uninterrupted training."""

    kills: list[Kill]
    processes: int

    @property
    def same(self) -> int:
        return sum(not kill.differences for kill in self.kills)

    def to_dict(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "kills": len(self.kills),
            "processes": self.processes,
            "each": [asdict(kill) for kill in self.kills],
        }


def kill_and_resume(
    kills: int, *, processes: int = 1, seed: int = 0, jobs: int | None = None
) -> Score:
    """Kill and resume `kills` trainings of `processes` processes each.

    Args:
        seed: seed of the moments of the kills.
        jobs: number of concurrent trainings; by default one per core.

    Raises:
        UsageError: the system does not support it.
        ResourceError: the uninterrupted training fails.
    """
    if os.name == "nt":
        raise UsageError("SIGKILL is needed, which Windows does not have", fix="run it in WSL")
    if processes > MAX_PROCESSES:
        raise UsageError(f"--processes {processes:,}: at most {MAX_PROCESSES}")
    if processes > 1 and not _children(os.getpid()).exists():
        raise UsageError(
            "the processes that torchrun starts can only be seen on Linux, in /proc",
            fix="leave out --processes",
        )
    jobs = jobs or max(1, device.usable_cores() // processes)
    with tempfile.TemporaryDirectory(prefix="convlens-selftest-") as root:
        uninterrupted = _Training(Path(root) / "uninterrupted", processes)
        first_file, end = uninterrupted.run_to_end()
        print_status(f"uninterrupted run: {end:.1f} s (first file after {first_file:.1f} s)")
        moments = [random.Random(f"{seed} {n}") for n in range(kills)]
        results = []
        with progress_bar("kills", kills) as bar, ThreadPoolExecutor(jobs) as pool:
            futures = [
                pool.submit(_killed, Path(root) / f"{n}", uninterrupted, rng, first_file, end)
                for n, rng in enumerate(moments)
            ]
            try:
                for future in as_completed(futures):
                    kill = future.result()
                    results.append(kill)
                    result = "; ".join(kill.differences) or "the same bits"
                    print_status(
                        escape(f"killed after {kill.after:.2f} s ({kill.saved}): {result}"[:600])
                    )
                    bar.advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return Score(results, processes)


class _Training:
    """One training in a folder of its own, started from the command line."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes
        self.run_dir = RunDir(folder / "models" / "selftest")
        self.saved = "nothing saved yet"  # at the moment of the kill

    def start(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = self.folder / "selftest.yaml"
        if not recipe.exists():
            recipe.write_text(load_recipe(RECIPE).to_text())
        launch = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--max-restarts",
            "3",
            "--nproc-per-node",
            str(self.processes),
        ]
        command = ["-m", "convlens", "train", "selftest.yaml", "--device", "cpu"]
        environment = {
            **os.environ,
            "CONVLENS_SAVE_SECONDS": SAVE_INTERVAL_S,
            "OMP_NUM_THREADS": "1",
            "CONVLENS_CACHE": str(self.folder / "cache"),
        }
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

    def run_to_end(self) -> tuple[float, float]:
        """Return the seconds until the first file, and until the end."""
        started, first = time.perf_counter(), 0.0
        with self._running() as process:
            while process.poll() is None:
                if time.perf_counter() - started > HANG_TIMEOUT_S:
                    raise ResourceError("a training hangs", where=self._log_tail())
                if not first and self.run_dir.path.exists():
                    first = time.perf_counter() - started
                time.sleep(0.01)
        self._refuse_failed(process)
        return first, time.perf_counter() - started

    def kill(self, after: float, rng: random.Random) -> bool:
        """Kill a process `after` seconds from the start, or as soon as there is one.

        Return False if the training ended before that.

        Raises:
            ResourceError: The training fails by itself, or torchrun hangs or fails instead of
                restarting its processes.
        """
        started = time.perf_counter()
        with self._running() as process:
            while time.perf_counter() - started < after or not self._hit(process, rng):
                if process.poll() is not None:
                    self._refuse_failed(process)
                    return False
                time.sleep(0.002)
            with contextlib.suppress(ConvlensError):
                checkpoint = self.run_dir.checkpoints.read()
                if checkpoint is not None:
                    self.saved = f"saved: epoch {checkpoint.epoch}, step {checkpoint.step}"
            if self.processes > 1:
                try:
                    process.wait(HANG_TIMEOUT_S)  # torchrun restarts them
                except subprocess.TimeoutExpired as error:
                    raise ResourceError("torchrun hangs", where=self._log_tail()) from error
                self._refuse_failed(process)
        return True

    def _hit(self, process: subprocess.Popen[bytes], rng: random.Random) -> bool:
        """Kill the training or one of torchrun's processes; return False if none is alive."""
        if self.processes == 1:
            process.kill()
            return process.wait() == -signal.SIGKILL  # not with an exit code of its own
        workers = _workers(process.pid)
        with contextlib.suppress(ProcessLookupError):
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
                return True
        return False

    @contextlib.contextmanager
    def _running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run the command; leave none of its processes behind, whatever happens."""
        process = self.start()
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _kill_all_in(self.folder)

    def _refuse_failed(self, process: subprocess.Popen[bytes]) -> None:
        if process.returncode:
            what = "torchrun" if self.processes > 1 else "a training"
            raise ResourceError(f"{what} ended with {process.returncode}", where=self._log_tail())

    def _log_tail(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")[-400:]


def _children(process: int) -> Path:
    return PROC / f"{process}/task/{process}/children"


def _workers(agent: int) -> list[int]:
    """Return the living processes that a torchrun has started (Linux)."""
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
    return state not in "ZX"  # a process that has ended stays until its parent waits for it


def _kill_all_in(folder: Path) -> None:
    """Kill all processes whose working directory is this folder (Linux).

    torchrun gives each of its processes a session of its own, so they survive its death.
    """
    path, deadline = os.path.realpath(folder), time.perf_counter() + 10
    while time.perf_counter() < deadline:
        left = _all_in(path)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _all_in(path: str) -> list[int]:
    pids = []
    for name in filter(str.isdecimal, os.listdir(PROC) if PROC.is_dir() else ()):
        with contextlib.suppress(OSError):  # it has just ended, or belongs to another user
            if os.readlink(PROC / name / "cwd") == path:
                pids.append(int(name))
    return pids


def _killed(
    folder: Path, uninterrupted: _Training, rng: random.Random, first_file: float, end: float
) -> Kill:
    """Kill a training, resume it, and compare it with the uninterrupted one."""
    training = _Training(folder, uninterrupted.processes)
    after = rng.uniform(EARLIEST_KILL * first_file, end)
    try:
        while not training.kill(after, rng):  # it ended before the kill
            after = rng.uniform(EARLIEST_KILL * first_file, after)
            training = _Training(folder / "again", uninterrupted.processes)
            folder = training.folder
        training.run_to_end()
        different = differences(uninterrupted.run_dir, training.run_dir)
    except ConvlensError as error:
        different = [str(error)]
    return Kill(round(after, 3), training.saved, different)


def differences(one: RunDir, other: RunDir) -> list[str]:
    """List what differs between two finished runs, except for times; empty if no bit does."""
    runs = (one, other)
    found = []
    (weights, model), (other_weights, other_model) = (
        serialization.read_model_file(run.model_path) for run in runs
    )
    found += _tensor_differences("the model", weights, other_weights)
    if model["chosen"] != other_model["chosen"]:
        found.append(f"the chosen epoch: {other_model['chosen']} for {model['chosen']}")
    if model.get("calibration") != other_model.get("calibration"):
        found.append("the calibration")
    state, other_state = (run.state() for run in runs)
    if state is None or other_state is None:
        found.append("no final state")
    else:
        found += _tensor_differences("the state", state[0], other_state[0])
        if _without_times(state[1]) != _without_times(other_state[1]):
            found.append("the state's counters")
    for name in ("recipe.yaml", "split.csv"):
        paths = [run.path / name for run in runs]
        if len({path.read_bytes() if path.exists() else b"" for path in paths}) > 1:
            found.append(name)
    rows, other_rows = (
        [{k: v for k, v in row.items() if k not in CLOCK_COLUMNS} for row in run.metrics()]
        for run in runs
    )
    if rows != other_rows:
        found.append("metrics.csv")
    metadata, other_metadata = one.metadata(), other.metadata()
    for key in ("status", "epochs", "kept_epoch"):
        if metadata[key] != other_metadata[key]:
            found.append(f"run.json: {key}")
    keys = ("n", "correct", "loss", "confusion")
    tested, other_tested = (
        [{key: test[key] for key in keys} for test in run.evaluations()[-1:]] for run in runs
    )
    if tested != other_tested:
        found.append("the test results")
    return found


def _tensor_differences(what: str, one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    if one.keys() != other.keys():
        return [f"{what}: other tensors"]
    different = [name for name in one if not torch.equal(one[name], other[name])]
    return [f"{what}: {len(different)} of {len(one)} tensors"] if different else []


def _without_times(counters: dict[str, Any]) -> dict[str, Any]:
    """Return a state's counters without times and without the hash over them."""
    # `part` is the micro-batch size after running out of memory: not a result.
    position = {k: v for k, v in counters["position"].items() if k not in (*CLOCK_COLUMNS, "part")}
    rows = [{k: v for k, v in row.items() if k not in CLOCK_COLUMNS} for row in counters["rows"]]
    rest = {k: v for k, v in counters.items() if k not in ("sha256", "position", "rows")}
    return {**rest, "position": position, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="trainings to kill (5)")
    parser.add_argument("--processes", type=int, default=1, help="processes of each training (1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (0)")
    parser.add_argument("--json", action="store_true", help="print the score as JSON on stdout")
    options = parser.parse_args()
    if options.kills < 1 or options.processes < 1:
        parser.error("--kills and --processes must be at least 1")
    try:
        score = kill_and_resume(options.kills, processes=options.processes, seed=options.seed)
    except UsageError as error:
        parser.error(str(error))
    except ConvlensError as error:
        sys.exit(str(error))
    if options.json:
        print(json.dumps(score.to_dict()))
    print_status(f"[bold]{score.same}/{options.kills}[/] ended with the same bits")
    return 0 if score.same == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
