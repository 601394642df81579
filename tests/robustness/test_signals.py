"""Real signals to real commands: wherever they come, the end is in order and nothing is broken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from convlens.run import RunDir, load_model as load
from helpers.commands import brightness_model, command, environment, picture, start
from helpers.serving import Pages, serving
from helpers.support import tiny

TRAIN = ("train", "long.yaml", "--no-test", "--device", "cpu")


def until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Waits for it; a command that ends before that has failed."""
    for _ in range(12_000):
        if holds():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    raise AssertionError("it didn't come")


def ended(process: subprocess.Popen[str], *signals: int) -> tuple[int, str]:
    """Exit code and stderr; within ten seconds of the signals, or it counts as a hang."""
    for number in signals:
        process.send_signal(number)
    _, told = process.communicate(timeout=10)
    assert "Traceback" not in told, told
    return process.returncode, told


@pytest.fixture
def long_run() -> RunDir:
    Path("long.yaml").write_text(tiny("train.epochs=400", "optim.ema=0.9").to_text())
    return RunDir(Path("models/tiny"))


@pytest.fixture
def many() -> Path:
    """Images that take some seconds to decode."""
    first = picture(Path("many/dark/0000.jpg"), (20, 20, 20), size=500).read_bytes()
    light = picture(Path("many/light/0000.jpg"), (230, 230, 230), size=500).read_bytes()
    for n in range(1, 500):
        Path(f"many/dark/{n:04}.jpg").write_bytes(first)
        Path(f"many/light/{n:04}.jpg").write_bytes(light)
    return Path("many")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_training_saves_and_ends_with_75(long_run: RunDir, number: int) -> None:
    process = start(*TRAIN)
    until(lambda: len(long_run.metrics()) > 0, process)
    code, told = ended(process, number)
    assert code == 75
    assert "the same command resumes the training" in told
    found = long_run.checkpoints.read()
    assert found is not None
    assert f"epoch {found.epoch} after {found.step} steps" in told


def test_a_second_signal_ends_it_at_once_and_nothing_is_broken(long_run: RunDir) -> None:
    process = start(*TRAIN, CONVLENS_SAVE_SECONDS="0")  # always in the middle of a save
    until(lambda: len(long_run.metrics()) > 1, process)
    code, _ = ended(process, signal.SIGTERM, signal.SIGTERM)
    assert code in (75, -signal.SIGTERM)
    assert long_run.checkpoints.read() is not None
    assert long_run.checkpoints.corrupt == []
    load(long_run.model_path)
    process = start(*TRAIN)
    until(lambda: len(long_run.metrics()) > 3, process)
    assert "resuming" in ended(process, signal.SIGINT)[1]


def test_decoding_is_left_without_a_trace(many: Path) -> None:
    cache = Path(os.environ["CONVLENS_CACHE"])
    process = start("train", many, "--device", "cpu", "data.image_size=64")
    until(lambda: any(cache.glob("**/.*")), process)
    code, told = ended(process, signal.SIGTERM)
    assert code == 75
    assert "stopped: stopped by (SIGTERM)" in told
    assert not list(cache.glob("**/.*"))
    assert not list(Path().glob("models/*/run.json"))


def test_testing_is_left_without_a_trace(many: Path) -> None:
    place = brightness_model(Path("models/brightness"))
    cache = Path(os.environ["CONVLENS_CACHE"])
    process = start("evaluate", place.path, "--data", many, "--device", "cpu")
    until(lambda: any(cache.glob("**/.*")), process)
    assert ended(process, signal.SIGTERM)[0] == 75
    assert place.evaluation_log() == []
    assert not list(cache.glob("**/.*"))


def test_predicting_is_left_in_the_middle(many: Path) -> None:
    place = brightness_model(Path("models/brightness"))
    process = start("predict", place.path, many, "--device", "cpu", "--format", "csv")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("filename")
    assert ended(process, signal.SIGTERM)[0] in (75, 0)  # it may have been quicker


# Downloads MNIST from an address of this machine.
DOWNLOADING = """
import sys
from dataclasses import replace
from convlens import cli
from convlens.data.dataset import downloads
its = downloads.SETS["mnist"]
downloads.SETS["mnist"] = replace(its, mirrors=(sys.argv[1],))
cli.main(["train", "mnist", "--device", "cpu"])
"""


class Endless(Pages):
    """Sends a few bytes and then nothing any more."""

    def do_GET(self) -> None:  # noqa: N802 (the server's name for it)
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "100000000")
        self.end_headers()
        self.wfile.write(b"x" * 1000)
        self.wfile.flush()
        time.sleep(30)


def test_a_download_is_left_without_a_trace(tmp_path: Path) -> None:
    with serving(Endless) as (url, handler):
        process = subprocess.Popen(
            [sys.executable, "-c", DOWNLOADING, url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(CONVLENS_DATA=str(tmp_path / "sets")),
        )
        until(lambda: bool(handler.asked), process)
        assert ended(process, signal.SIGTERM)[0] == 75
    left = [path for path in (tmp_path / "sets").rglob("*") if path.is_file()]
    assert [path.name for path in left if "lock" not in path.name] == []


def test_a_closed_terminal_does_not_end_a_training() -> None:
    Path("short.yaml").write_text(tiny().to_text())
    read, write = os.pipe()
    os.close(read)  # each write fails with EPIPE, as it fails with EIO where a terminal was
    process = subprocess.Popen(
        [sys.executable, "-m", "convlens", "train", "short.yaml", "--no-test", "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=write,
        env=environment(),
    )
    os.close(write)
    assert process.wait(120) == 0
    assert RunDir(Path("models/tiny")).is_finished


def test_a_full_disk_under_the_log_does_not_end_a_training() -> None:
    Path("short.yaml").write_text(tiny().to_text())
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "convlens", "train", "short.yaml", "--device", "cpu"],
            stdout=subprocess.DEVNULL,
            stderr=full,
            env=environment(),
        )
    assert process.wait(120) == 0
    assert RunDir(Path("models/tiny")).is_finished


def test_two_trainings_of_one_run_are_one(long_run: RunDir) -> None:
    first = start(*TRAIN)
    until(lambda: len(long_run.metrics()) > 0, first)
    second = start(*TRAIN)
    _, told = second.communicate(timeout=60)
    assert second.returncode == 5
    assert f"another process is using run {long_run.name!r}" in told
    assert ended(first, signal.SIGTERM)[0] == 75


def test_nohup_is_heeded() -> None:
    Path("short.yaml").write_text(tiny("train.epochs=30").to_text())
    place = RunDir(Path("models/tiny"))
    process = subprocess.Popen(
        [sys.executable, "-m", "convlens", "train", "short.yaml", "--no-test", "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    until(lambda: len(place.metrics()) > 0, process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert place.is_finished


def test_what_is_printed_into_a_closed_pipe_ends_quietly() -> None:
    brightness_model(Path("models/brightness"))
    paths = [picture(Path(f"p/{n}.png"), (200, 200, 200)) for n in range(40)]
    process = start("predict", "brightness", *paths, "--device", "cpu", "--format", "csv")
    assert process.stdout is not None
    process.stdout.close()  # as `| head` does
    assert process.stderr is not None
    told = process.stderr.read()
    process.wait(60)
    assert "Traceback" not in told
    assert command("predict", "brightness", paths[0], "--device", "cpu").code == 0
