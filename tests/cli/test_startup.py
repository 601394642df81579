"""Duration of commands: no slow imports, and a fast exit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from convlens.version import __version__
from helpers.commands import DIGITS, environment, picture

# Importing each of these takes from half a second to about as long as torch itself.
SLOW = ("torch._dynamo", "torch._inductor", "sympy", "sklearn", "scipy", "pandas", "torchvision")
SCRIPT = """
import json, sys
from convlens import cli
for arguments in json.loads(sys.argv[1]):
    try:
        cli.main(arguments)
    except SystemExit as end:
        assert end.code == 0, end.code
print(json.dumps([name for name in json.loads(sys.argv[2]) if name in sys.modules]))
"""


def test_train_evaluate_and_predict_import_nothing_slow_except_torch() -> None:
    train = ["train", *DIGITS, "--name", "small"]
    image = str(picture(Path("a.png"), (90,), size=8))
    # The second time, the run is found and tested again.
    commands = [train, train, ["predict", "small", image]]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands), json.dumps(SLOW)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


ENDING = """
import atexit, os, sys, threading, time
from convlens import cli
atexit.register(print, "handler")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
class Object:
    def __del__(self, write=os.write):
        write(2, b"freed")
kept = Object()
cli.run()
"""


@pytest.mark.parametrize(("typed", "code"), [("--version", 0), ("trian", 2)])
def test_exit_runs_threads_and_handlers_and_frees_no_objects(typed: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING, typed], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    version = [f"convlens {__version__}"] * (code == 0)
    assert done.stdout.splitlines() == [*version, "thread", "handler"]
    assert "freed" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_full_output_device_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "convlens", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
