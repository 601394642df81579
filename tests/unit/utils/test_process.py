"""Settings that the command line makes for its own process before it imports torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from convlens.utils import process


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": None}),
        ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}),
    ],
)
def test_environment_variables_of_the_user_are_kept(
    given: dict[str, str], expected: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    process.set_environment()
    assert {name: os.environ.get(name) for name in expected} == expected


LOADED = """
import sys, sysconfig
from convlens import cli
cli.main = lambda: __import__("torch").ones(1) and sys.exit(0)
cli.run()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings libgomp on Linux")
@pytest.mark.parametrize(("own", "count"), [(None, "1000"), ("4321", "4321")])
def test_libgomp_of_torch_reads_the_spin_count(
    own: str | None, count: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libgomp lists its settings on stderr when it is loaded."""
    torch_folder = Path(__import__("torch").__file__).parent
    if not [*torch_folder.glob("lib/libgomp*"), *torch_folder.parent.glob("torch.libs/libgomp*")]:
        pytest.skip("this build of torch has another OpenMP")
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if own is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", own)
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    )
    (line,) = {line.strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line}
    assert line.endswith(f"GOMP_SPINCOUNT = '{count}'")


def test_command_line_sets_up_its_process() -> None:
    program = """
import gc, os, sys
from convlens import cli
from convlens.utils import process
def main():
    assert "torch" not in sys.modules
    assert process.keep_freed_memory.cache_info().misses == 1
    assert gc.get_threshold()[0] == 50_000
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    sys.exit(7)
cli.main = main
cli.run()
"""
    left_out = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    done = subprocess.run([sys.executable, "-c", program], check=False, env=environment)
    assert done.returncode == 7


def test_a_signal_is_delivered_after_a_call_of_a_thread_pool() -> None:
    """An exception inside `threading` would leave a lock acquired, and the threads never end."""
    received: list[str] = []

    def terminate() -> None:
        with process.raise_on_signals(), process.defer_signals():
            signal.raise_signal(signal.SIGTERM)
            received.append("the rest of the block runs")

    with pytest.raises(process.Terminated, match="SIGTERM"):
        terminate()
    assert received == ["the rest of the block runs"]
    with pytest.raises(KeyboardInterrupt), process.defer_signals():
        signal.raise_signal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        release = threading.Event()
        task = process.submit_task(pool, release.wait)
        timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGTERM])
        timer.start()
        with pytest.raises(process.Terminated), process.raise_on_signals():
            process.wait_for_result(task)  # although the task does not end
        release.set()
        assert process.wait_for_result(task)
        failing = process.submit_task(pool, int, "x")
        with pytest.raises(ValueError, match="invalid literal"):
            process.wait_for_result(failing)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux only")
def test_the_age_of_a_process_counts_from_its_start() -> None:
    code = (
        "import time; time.sleep(0.3); from convlens.utils.process import process_age; "
        "print(process_age())"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    # The kernel counts in hundredths of a second.
    assert 0.28 <= float(done.stdout) <= time.monotonic() - start + 0.02
