"""Seconds of training to 99% MNIST test accuracy: `mnist-fast` and, beside it, a peer's script.

    python benchmarks/time_to_accuracy.py [--seeds 5] [--peer EXAMPLES/mnist/main.py]

Ours: the training time of the run (from the first step to the last, augmentation included;
loading, validation and testing apart), final weights, tested once. The peer runs unmodified in
its own folder, and finds its data in `../data` as it expects. Its clock runs from the first to the
last line of each epoch of training, and not while it tests; it is over with the first epoch whose
test accuracy is 99% or more. Our runs take turns with it: one before, one after each of its
epochs while it is held (SIGSTOP), the rest after its last.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# First: it sets what libgomp reads when torch is imported.
from recording import record  # isort: skip

from convlens import metrics
from convlens.training import resolve
from convlens.training.repeats import train_many

GOAL = 0.99


def peer_epochs(script: Path, data: Path, arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Runs the peer's script as it is; seconds of training and accuracy after each epoch.

    It is held while the caller does something else between two of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        working_dir = Path(folder) / "mnist"
        working_dir.mkdir()
        shutil.copy(script, working_dir / "main.py")
        (Path(folder) / "data").symlink_to(data.resolve())
        command = [sys.executable, "-u", "main.py", *arguments]
        process = subprocess.Popen(command, cwd=working_dir, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        spent, first, last = 0.0, None, 0.0
        try:
            for line in process.stdout:
                now = time.perf_counter()
                if line.startswith("Train Epoch"):
                    first, last = first or now, now
                found = re.search(r"Accuracy: (\d+)/(\d+)", line)
                if found and first:
                    spent, first = spent + last - first, None
                    process.send_signal(signal.SIGSTOP)
                    yield {"seconds": round(spent, 1), "test": int(found[1]) / int(found[2])}
                    process.send_signal(signal.SIGCONT)
        finally:
            process.kill()
            process.wait()


def one_run(recipe: str, seed: int) -> dict[str, Any]:
    """Our run with this seed, tested: what its table says."""
    asked = resolve.resolve_variants(recipe, None, overrides=[f"train.seed={seed}"])
    (reached,) = train_many(asked, fresh=True, quiet=True).summaries
    found = reached.to_dict()
    return {
        "seed": seed,
        "accuracy": found["accuracies"][0],
        "seconds": found["training_seconds"][0],
        "cpu_seconds": found["cpu_seconds"][0],
        "facts": reached.outcomes[0].facts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipe", default="mnist-fast")
    parser.add_argument("--peer", type=Path, help="pytorch/examples' mnist/main.py")
    parser.add_argument("--peer-arguments", nargs="*", default=[], help="as it comes: none")
    parser.add_argument("--data", type=Path, default=Path("data"), help="has MNIST/raw/")
    arguments = parser.parse_args()
    one_run(arguments.recipe, 0)  # chooses and remembers a plan, reads the images once
    waiting, runs = list(range(arguments.seeds)), list[dict[str, Any]]()

    def run_one() -> None:
        if waiting:
            runs.append(one_run(arguments.recipe, waiting.pop(0)))
            summary = {key: runs[-1][key] for key in ("seed", "accuracy", "seconds")}
            print(f"{arguments.recipe}: {summary}", file=sys.stderr)

    rows = list[dict[str, Any]]()
    if arguments.peer:
        run_one()
        for row in peer_epochs(arguments.peer, arguments.data, arguments.peer_arguments):
            rows.append(row)
            print(f"peer, epoch {len(rows)}: {row}", file=sys.stderr)
            run_one()
            if row["test"] >= GOAL:
                break
    while waiting:
        run_one()
    accuracy, accuracy_sd = metrics.mean_sd([run["accuracy"] for run in runs])
    mean, sd = metrics.mean_sd([run["seconds"] for run in runs])
    figures: dict[str, Any] = {
        "recipe": arguments.recipe,
        "seeds": [run["seed"] for run in runs],
        "accuracies": [run["accuracy"] for run in runs],
        "accuracy_mean": accuracy,
        "accuracy_sd": accuracy_sd,
        "training_seconds": [run["seconds"] for run in runs],
        "cpu_seconds": [run["cpu_seconds"] for run in runs],
        "seconds_mean": mean,
        "seconds_median": statistics.median(run["seconds"] for run in runs),
        "seconds_sd": sd,
        "plan": runs[0]["facts"]["plan"],
        "parameters": runs[0]["facts"]["parameters"],
    }
    if rows:
        reached = next((row["seconds"] for row in rows if row["test"] >= GOAL), None)
        command = " ".join(["main.py", *arguments.peer_arguments])
        figures["peer"] = {"command": command, "epochs": rows, "seconds_to_99": reached}
        figures["ratio"] = round((reached or rows[-1]["seconds"]) / mean, 1)
    print(json.dumps(record("time-to-99", figures)))


if __name__ == "__main__":
    main()
