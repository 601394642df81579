"""Seconds of training to 99% MNIST test accuracy: `mnist-fast` and a peer's script.

    python benchmarks/time_to_accuracy.py [--seeds 5] [--peer EXAMPLES/mnist/main.py]

Our time is the training time of the run, from the first step to the last with augmentation, without
loading, validation and testing; the final weights are tested once. The peer runs unmodified in its
own folder and finds its data in `../data` as it expects. Its time is counted from the first to the
last output line of each training epoch, without its tests; it ends with the first epoch whose test
accuracy is at least 99%. Our runs alternate with it: one before, one after each of its epochs while
it is stopped (SIGSTOP), and the remaining ones after its last epoch.
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

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

from convlens import metrics
from convlens.training import resolve
from convlens.training.repeats import train_many

TARGET_ACCURACY = 0.99


def peer_epochs(script: Path, data: Path, arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Run the peer's script; yield seconds of training and accuracy after each epoch.

    The script is stopped while the caller handles an epoch.
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
    """Train and test with this seed; return the results."""
    recipes = resolve.resolve_variants(recipe, None, overrides=[f"train.seed={seed}"])
    (reached,) = train_many(recipes, fresh=True, quiet=True).summaries
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
    parser.add_argument("--peer-arguments", nargs="*", default=[], help="by default none")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with MNIST/raw/")
    arguments = parser.parse_args()
    one_run(arguments.recipe, 0)  # fills the caches of plans and images
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
            if row["test"] >= TARGET_ACCURACY:
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
        reached = next((row["seconds"] for row in rows if row["test"] >= TARGET_ACCURACY), None)
        command = " ".join(["main.py", *arguments.peer_arguments])
        figures["peer"] = {"command": command, "epochs": rows, "seconds_to_99": reached}
        figures["ratio"] = round((reached or rows[-1]["seconds"]) / mean, 1)
    print(json.dumps(record("time-to-99", figures)))


if __name__ == "__main__":
    main()
