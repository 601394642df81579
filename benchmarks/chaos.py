"""Kills trainings at random moments and compares what they end with; keeps the score.

python benchmarks/chaos.py [--kills 50] [--pairs 20]    as many with two processes each
"""

from __future__ import annotations

import argparse
import json
import time

# First: it sets what libgomp reads when torch is imported.
from recording import record  # isort: skip

from convlens.resuming import chaos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    figures = {}
    for name, kills, processes in (("one", asked.kills, 1), ("two", asked.pairs, 2)):
        if kills:
            begun = time.perf_counter()
            score = chaos.chaos(kills, processes=processes, seed=asked.seed).to_dict()
            figures[name] = {**score, "minutes": round((time.perf_counter() - begun) / 60, 1)}
    print(json.dumps(record("chaos", figures)))


if __name__ == "__main__":
    main()
