"""Seconds of training to 99% MNIST test accuracy: `mnist-fast` and, beside it, a peer's script.

    python benchmarks/time_to_accuracy.py [--seeds 5] [--peer EXAMPLES/mnist/main.py]

Ours: the training time of the run (from the first step to the last, augmentation included;
loading, validation and testing apart), final weights, tested once. The peer runs unmodified in
its own folder, and finds its data in `../data` as it expects; its clock starts at its first line
of training output and stops at the first epoch whose test accuracy is 99% or more.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convlens import asking, metrics, several
from recording import record

GOAL = 0.99


def peer(script: Path, data: Path, epochs: int) -> dict[str, object]:
    """Runs the peer's script as it is; seconds and accuracy after each of its epochs."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "mnist"
        place.mkdir()
        shutil.copy(script, place / "main.py")
        (Path(folder) / "data").symlink_to(data.resolve())
        command = [sys.executable, "-u", "main.py", "--epochs", str(epochs)]
        process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        began, rows = None, []
        for line in process.stdout:
            if line.startswith("Train Epoch") and began is None:
                began = time.perf_counter()
            found = re.search(r"Accuracy: (\d+)/(\d+)", line)
            if found and began is not None:
                accuracy = int(found[1]) / int(found[2])
                rows.append({"seconds": round(time.perf_counter() - began, 1), "test": accuracy})
                print(f"peer epoch {len(rows)}: {rows[-1]}", file=sys.stderr)
                if accuracy >= GOAL:
                    process.terminate()
                    break
        process.wait()
    reached = next((row["seconds"] for row in rows if float(row["test"]) >= GOAL), None)
    return {"command": " ".join(command[2:]), "epochs": rows, "seconds_to_99": reached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipe", default="mnist-fast")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--peer-epochs", type=int, default=4)
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    asked = asking.read_settings(arguments.recipe, None)
    (reached,) = several.train_many(asked, seeds=arguments.seeds, fresh=True).summaries
    found, facts = reached.to_dict(), reached.outcomes[0].facts
    mean, sd = metrics.mean_sd(found["training_seconds"])
    figures: dict[str, object] = {
        "recipe": arguments.recipe,
        "seeds": found["seeds"],
        "accuracies": found["accuracies"],
        "accuracy_mean": found["mean"],
        "accuracy_sd": found["sd"],
        "training_seconds": found["training_seconds"],
        "cpu_seconds": found["cpu_seconds"],
        "seconds_mean": mean,
        "seconds_sd": sd,
        "plan": facts["plan"],
        "parameters": facts["parameters"],
    }
    if arguments.peer:
        figures["peer"] = peer(arguments.peer, arguments.data, arguments.peer_epochs)
    print(json.dumps(record("time-to-99", figures)))


if __name__ == "__main__":
    main()
