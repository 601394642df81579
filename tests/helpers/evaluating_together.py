"""Evaluate the first 1 to 50 images of a test split, and all of them; runs under torchrun.

Images are distributed in chunks of the usual size and in chunks of three, so that few images make
many chunks, the last chunk is smaller, and some process has no images.
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


def evaluate_sizes(run_dir: RunDir, pieces: int) -> list[dict[str, Any]]:
    """Return the results of `evaluate` for each size; the same in all processes."""
    group = distributed.init_process_group()
    run_dir = run.shared_run_dir(group, lambda: run_dir)
    device.prepare(False)
    loaded = run.load_model(run_dir.model_path)
    test_split, name, fingerprint, *_ = evaluation.load_eval_split(loaded, "test", device="cpu")
    results = []
    default, data_parallel.EVAL_CHUNK = data_parallel.EVAL_CHUNK, pieces
    try:
        with console.quiet_mode():
            for size in (*SIZES, len(test_split)):
                rows = data_parallel.SplitSlice(test_split, 0, size)
                part = Split(rows, test_split.labels[:size], list(test_split.ids)[:size])
                split = EvalSplit(part, name, f"{fingerprint}-{size}-{pieces}", in_order=False)
                result = evaluation.evaluate_split(
                    run_dir, loaded, split, "cpu", draw=False, process_group=group
                ).evaluation
                keys = ("n", "correct", "confusion", "near_ties", "loss", "ece")
                results.append({key: getattr(result, key) for key in keys})
    finally:
        data_parallel.EVAL_CHUNK = default
    assert group.broadcast(lambda: results) == results
    return results


def main(path: str, out: str) -> None:
    found = {str(pieces): evaluate_sizes(RunDir(Path(path)), pieces) for pieces in (256, 3)}
    if distributed.init_process_group().is_main_process:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
