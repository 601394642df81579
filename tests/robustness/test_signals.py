"""Commands that receive a real signal end cleanly and leave no damaged file, at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convlens.run import RunDir, load_model as load
from helpers.commands import brightness_model, environment, here, picture, refused, start
from helpers.interrupted_runs import Interrupting
from helpers.launching import HANG_TIMEOUT_S, wait_until
from helpers.serving import Pages, serving
from helpers.support import tiny

TRAIN = ("train", "long.yaml", "--no-test", "--device", "cpu")


def ended(process: subprocess.Popen[str], *signals: int) -> tuple[int, str]:
    """Send the signals and return exit code and stderr of the process once it has ended."""
    for number in signals:
        process.send_signal(number)
    _, err = process.communicate(timeout=HANG_TIMEOUT_S)
    assert "Traceback" not in err, err
    return process.returncode, err


@pytest.fixture
def long_run() -> RunDir:
    Path("long.yaml").write_text(tiny("train.epochs=400", "optim.ema=0.9").to_text())
    return RunDir(Path("models/tiny"))


@pytest.fixture
def many() -> Path:
    """Return a folder of images that take some seconds to decode."""
    first = picture(Path("many/dark/0000.jpg"), (20, 20, 20), size=500).read_bytes()
    light = picture(Path("many/light/0000.jpg"), (230, 230, 230), size=500).read_bytes()
    for n in range(1, 500):
        Path(f"many/dark/{n:04}.jpg").write_bytes(first)
        Path(f"many/light/{n:04}.jpg").write_bytes(light)
    return Path("many")


def test_sigterm_from_outside_saves_the_training_and_exits_with_75(long_run: RunDir) -> None:
    process = start(*TRAIN)
    wait_until(lambda: len(long_run.metrics()) > 0, process)
    check_stopped(long_run, *ended(process, signal.SIGTERM))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_in_a_step_saves_the_training_and_exits_with_75(
    long_run: RunDir, number: signal.Signals, interrupting: Interrupting
) -> None:
    interrupting.after, interrupting.number = 7, number
    done = here(*TRAIN)
    check_stopped(long_run, done.code, done.err)


def check_stopped(run_dir: RunDir, code: int, err: str) -> None:
    assert code == 75
    assert "the same command resumes the training" in err
    checkpoint = run_dir.checkpoints.read()
    assert checkpoint is not None
    assert f"epoch {checkpoint.epoch} after {checkpoint.step} steps" in err


def test_a_second_signal_ends_training_at_once_and_damages_no_file(
    long_run: RunDir, interrupting: Interrupting
) -> None:
    process = start(*TRAIN, CONVLENS_SAVE_SECONDS="0")  # saves after every step
    wait_until(lambda: len(long_run.metrics()) > 1, process)
    code, _ = ended(process, signal.SIGTERM, signal.SIGTERM)
    assert code in (75, -signal.SIGTERM)
    assert long_run.checkpoints.read() is not None
    assert long_run.checkpoints.corrupt == []
    load(long_run.model_path)
    interrupting.after = 3
    resumed = here(*TRAIN)
    assert resumed.code == 130
    assert "resuming" in resumed.err


def test_interrupted_decoding_leaves_no_files(many: Path) -> None:
    cache = Path(os.environ["CONVLENS_CACHE"])
    process = start("train", many, "--device", "cpu", "data.image_size=64")
    wait_until(lambda: any(cache.glob("**/.*")), process)
    code, err = ended(process, signal.SIGTERM)
    assert code == 75
    assert "stopped: asked to stop (SIGTERM)" in err
    assert not list(cache.glob("**/.*"))
    assert not list(Path().glob("models/*/run.json"))


def test_an_interrupted_evaluation_leaves_no_files(many: Path) -> None:
    run_dir = brightness_model(Path("models/brightness"))
    cache = Path(os.environ["CONVLENS_CACHE"])
    process = start("evaluate", run_dir.path, "--data", many, "--device", "cpu")
    wait_until(lambda: any(cache.glob("**/.*")), process)
    assert ended(process, signal.SIGTERM)[0] == 75
    assert run_dir.evaluation_log() == []
    assert not list(cache.glob("**/.*"))


def test_prediction_can_be_interrupted(many: Path) -> None:
    run_dir = brightness_model(Path("models/brightness"))
    process = start("predict", run_dir.path, many, "--device", "cpu", "--format", "csv")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("filename")
    assert ended(process, signal.SIGTERM)[0] in (75, 0)  # 0: it finished before the signal


# Trains on MNIST, downloaded from a server on this machine.
DOWNLOAD = """
import sys
from dataclasses import replace
from convlens import cli
from convlens.data import download
mnist = download.DOWNLOADS["mnist"]
download.DOWNLOADS["mnist"] = replace(mnist, mirrors=(sys.argv[1],))
cli.main(["train", "mnist", "--device", "cpu"])
"""


class Endless(Pages):
    """A server that sends a few bytes and then stalls."""

    def do_GET(self) -> None:  # noqa: N802 (the server's name for it)
        self.requested.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "100000000")
        self.end_headers()
        self.wfile.write(b"x" * 1000)
        self.wfile.flush()
        time.sleep(30)


def test_an_interrupted_download_leaves_no_files(tmp_path: Path) -> None:
    with serving(Endless) as (url, handler):
        process = subprocess.Popen(
            [sys.executable, "-c", DOWNLOAD, url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(CONVLENS_DATA=str(tmp_path / "sets")),
        )
        wait_until(lambda: bool(handler.requested), process)
        assert ended(process, signal.SIGTERM)[0] == 75
    left = [path for path in (tmp_path / "sets").rglob("*") if path.is_file()]
    assert [path.name for path in left if "lock" not in path.name] == []


def test_a_closed_terminal_does_not_end_a_training() -> None:
    Path("short.yaml").write_text(tiny().to_text())
    read, write = os.pipe()
    os.close(read)  # writes fail with EPIPE; after a terminal is closed, with EIO
    process = subprocess.Popen(
        [sys.executable, "-m", "convlens", "train", "short.yaml", "--no-test", "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=write,
        env=environment(),
    )
    os.close(write)
    assert process.wait(HANG_TIMEOUT_S) == 0
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
    assert process.wait(HANG_TIMEOUT_S) == 0
    assert RunDir(Path("models/tiny")).is_finished


def test_a_second_training_of_the_same_run_is_refused(long_run: RunDir) -> None:
    first = start(*TRAIN)
    wait_until(lambda: len(long_run.metrics()) > 0, first)
    refused(here(*TRAIN), 5, f"another process is using run {long_run.name!r}")
    assert ended(first, signal.SIGTERM)[0] == 75


def test_nohup_is_respected() -> None:
    Path("short.yaml").write_text(tiny("train.epochs=30").to_text())
    run_dir = RunDir(Path("models/tiny"))
    process = subprocess.Popen(
        [sys.executable, "-m", "convlens", "train", "short.yaml", "--no-test", "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    wait_until(lambda: len(run_dir.metrics()) > 0, process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=HANG_TIMEOUT_S)
    assert process.returncode == 0
    assert run_dir.is_finished


def test_printing_into_a_closed_pipe_ends_without_a_traceback() -> None:
    brightness_model(Path("models/brightness"))
    paths = [picture(Path(f"p/{n}.png"), (200, 200, 200)) for n in range(40)]
    process = start("predict", "brightness", *paths, "--device", "cpu", "--format", "csv")
    assert process.stdout is not None
    process.stdout.close()  # as `| head` does
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(HANG_TIMEOUT_S)
    assert "Traceback" not in err
    assert here("predict", "brightness", paths[0], "--device", "cpu").code == 0
