"""Looks at the first 1 to 50 images of a run's test split, and at all: for tests under torchrun.

The images are dealt out in the usual pieces, and in pieces of three, so that few images are many
pieces, the last one is smaller, and some process has none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from convlens import device, distributed, evaluation, run
from convlens.data.dataset import Split
from convlens.engine import data_parallel
from convlens.evaluation import EvalSplit
from convlens.run import RunDir
from convlens.utils import console

SIZES = range(1, 51)


def looks(place: RunDir, pieces: int) -> list[dict[str, Any]]:
    """What `evaluate` says of each size; the same in all processes."""
    world = distributed.init_process_group()
    place = run.shared_run_dir(world, lambda: place)
    device.prepare(False)
    loaded = run.load_model(place.model_path)
    whole, name, fingerprint = evaluation.load_eval_split(loaded, "test", device="cpu")
    found = []
    usual, data_parallel.EVAL_CHUNK = data_parallel.EVAL_CHUNK, pieces
    try:
        with console.quiet_mode():
            for size in (*SIZES, len(whole)):
                rows = data_parallel.SplitSlice(whole, 0, size)
                part = Split(rows, whole.labels[:size], list(whole.ids)[:size])
                judged = EvalSplit(part, name, f"{fingerprint}-{size}-{pieces}")
                seen = evaluation.evaluate_split(
                    place, loaded, judged, "test", "cpu", draw=False, world=world
                ).evaluation
                keys = ("n", "correct", "confusion", "near_ties", "loss", "ece")
                found.append({key: getattr(seen, key) for key in keys})
    finally:
        data_parallel.EVAL_CHUNK = usual
    assert world.broadcast(lambda: found) == found
    return found


def main(path: str, out: str) -> None:
    found = {str(pieces): looks(RunDir(Path(path)), pieces) for pieces in (256, 3)}
    if distributed.init_process_group().is_main_process:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
