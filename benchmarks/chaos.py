"""Run tools/selftest.py, which kills and resumes trainings, and record its score.

python benchmarks/chaos.py [--kills 50] [--pairs 20]    so many with one and with two processes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip


SELFTEST = Path(__file__).parent.parent / "tools" / "selftest.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    figures = {}
    for name, kills, processes in (("one", asked.kills, 1), ("two", asked.pairs, 2)):
        if kills:
            start = time.perf_counter()
            options = {"--kills": kills, "--processes": processes, "--seed": asked.seed}
            words = [str(word) for option in options.items() for word in option]
            command = [sys.executable, str(SELFTEST), "--json", *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if not done.stdout:  # without a score; the reason is on stderr
                sys.exit(done.returncode)
            minutes = (time.perf_counter() - start) / 60
            figures[name] = {**json.loads(done.stdout), "minutes": round(minutes, 1)}
    print(json.dumps(record("chaos", figures)))


if __name__ == "__main__":
    main()
