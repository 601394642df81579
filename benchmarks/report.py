"""Write `BENCHMARKS.md` from `benchmarks/results/*.json`.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from pathlib import Path

from tables.accuracy import accuracies, published, variants
from tables.gpu import cifar_speed, roofline, warm_mnist
from tables.inside import attribution, labels, looking
from tables.peers import peers
from tables.photographs import photographs
from tables.speed import (
    allocator,
    depthwise,
    explore,
    inference,
    overhead,
    processes,
    scaling,
    serve,
    startup,
    time_to_99,
)
from tables.trust import chaos, saving
from tables.unequal import unequal_classes
from tables.unknown import unknown_images
from tables.words import where

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parent.parent / "BENCHMARKS.md"
HEAD = """# Benchmarks

Made by `python benchmarks/report.py` from the raw results in `benchmarks/results/`, each of which
holds its command, versions and hardware. Accuracies are of the test split, read once with weights
chosen by validation (or the last ones, where the recipe says so): mean ± sample deviation over
seeds (and splits). Ratios are medians of paired windows in one run; the machines are shared, so
look at ratios before milliseconds, and at CPU seconds (user and system, all threads) before
seconds.
"""

SECTIONS = {
    "peers": lambda r: peers(r, where(r)),
    "cifar-speed": cifar_speed,
    "warm-mnist-fast": warm_mnist,
    "roofline": roofline,
    "roofline-cpu": roofline,
    "time-to-99": time_to_99,
    "overhead": overhead,
    "allocator": allocator,
    "depthwise": depthwise,
    "inference": inference,
    "explore": explore,
    "serve": serve,
    "processes": processes,
    "startup": startup,
    "scaling": scaling,
    "saving": saving,
    "chaos": chaos,
    "looking": looking,
    "attribution": attribution,
    "unequal-classes": unequal_classes,
    "unknown-images": unknown_images,
    "photographs": photographs,
    "photographs-20": photographs,
}


def main() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    measured = [result for name, result in results.items() if name.startswith("accuracy-")]
    tested = [result for result in measured if result["split"] == "test"]
    compared = [result for result in measured if result["split"] == "val"]
    parts = [HEAD]
    parts += [accuracies(tested), published(tested)] if tested else []
    parts += [variants(compared)] if compared else []
    parts += [make(results[name]) for name, make in SECTIONS.items() if name in results]
    planted = [result for name, result in results.items() if name.startswith("labels-")]
    parts += [labels(planted)] if planted else []
    TARGET.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
