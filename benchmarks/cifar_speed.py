"""CIFAR-10 to 94%: `cifar10-fast` beside unmodified airbench94_muon and hiverge's speedrun.

    python benchmarks/cifar_speed.py --airbench CHECKOUT --hiverge CHECKOUT [--seeds 10]

Checkouts of KellerJordan/cifar10-airbench and hiverge/cifar10-speedrun; without them ours runs
alone. All use the same images and the same torch in one run. Two times are measured:

- warm: training and final evaluation with test-time augmentation, including whitening, after a
  warm-up that compiles. Loading, upload and initialization are not counted. For the peers it is
  the time that their scripts print.
- cold: from starting the process to the first test accuracy, everything included, with an empty
  compiler cache. Decoded images (ours) and `train.pt` (theirs) exist already.

The peers' scripts run 200 times; they are stopped after `--seeds` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from warm import summary

HERE = Path(__file__).parent
SCRIPTS = {"airbench": "airbench94_muon.py", "hiverge": "cifar10_speedrun.py"}
TTA = "flip+shifts"


# The peers


def convert(folder: Path, count: int | None = None) -> None:
    """Write `cifar10/train.pt` and `test.pt` as both scripts cache them: uint8 `[N, 32, 32, 3]`.

    The order is random: the scripts whiten with the first images, and our order may be by class.
    """
    import torch

    from convlens.data.dataset import load_external_data
    from convlens.data.decode import Conversion

    target = folder / "cifar10"
    target.mkdir(parents=True)
    for name in ("train", "test"):
        part, classes, *_ = load_external_data(
            "cifar10", name, conversion=Conversion(32, 3, "crop"), memory_budget=1 << 31
        )
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count]
        images = part.rows.gather(order).permute(0, 2, 3, 1).contiguous()
        content = {"images": images, "labels": part.labels[order], "classes": list(classes)}
        torch.save(content, target / f"{name}.pt")


def results_in(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the final row of each run in the tables that both scripts print.

    `| run | epoch | train_acc | val_acc | tta_val_acc | time_seconds |`, where the final row
    has the epoch `eval`. Only the first row of a run names the run. The final row of airbench has
    the accuracies of its last epoch.
    """
    run = ""
    for line in lines:
        cells = [cell.strip() for cell in line.replace("\r", "\n").splitlines()[-1].split("|")]
        if len(cells) != 8 or cells[2] == "epoch":
            continue
        run = cells[1] or run
        if cells[2] == "eval":
            yield {
                "run": run,
                "tta": float(cells[5]),
                "plain": float(cells[4] or "nan"),
                "seconds": float(cells[6]),
            }


def run_peer(script: Path, data: Path, seeds: int) -> dict[str, Any]:
    """Run a peer's script in a temporary folder; return its own times and the cold time."""
    # stderr goes to a file: a pipe that is not read would fill up and block the script.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        (Path(folder) / "cifar10").symlink_to((data / "cifar10").resolve())
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-u", str(script.resolve())],
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_cold_caches(folder),
        )
        assert process.stdout is not None
        runs, cold = [], None
        for result in results_in(iter(process.stdout.readline, "")):
            print(f"{script.name}: {result}", file=sys.stderr)
            if result["run"] == "warmup":
                continue
            cold = cold or time.perf_counter() - start
            runs.append(result)
            if len(runs) == seeds:
                process.terminate()
                break
        process.wait()
        errors.seek(0)
        failure = errors.read().strip().splitlines()[-1:] if not runs else []
    return {**summary(runs), "cold_seconds": cold, "failed": failure[0] if failure else None}


def _cold_caches(folder: str) -> dict[str, str]:
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/tr"}
    return {**os.environ, **caches}


# Ours


def cold(seed: int, changes: list[str]) -> None:
    """Train and evaluate as the command does, in this process; print the accuracies."""
    from convlens import evaluation, recipe
    from convlens.training import train

    loaded = recipe.load_recipe("cifar10-fast", [f"train.seed={seed}", *changes])
    run_dir = train.train(loaded, test=False, quiet=True)
    result = evaluation.evaluate(run_dir, "test", tta=TTA, quiet=True)
    assert result.tta is not None
    print(json.dumps({"plain": result.accuracy, "tta": result.tta["accuracy"]}), flush=True)


def ours_cold(seeds: int, changes: list[str], *, on: str) -> dict[str, Any]:
    runs = []
    for seed in range(seeds + 1):  # the first run fills the decode cache
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(HERE / "cifar_speed.py"), "--cold", str(seed), *changes]
            path = os.pathsep.join(
                str(Path(p).resolve()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep)
            )
            environment = {**_cold_caches(folder), "PYTHONPATH": path}
            start = time.perf_counter()
            process = subprocess.run(
                command, cwd=folder, env=environment, text=True, capture_output=True
            )
            seconds = time.perf_counter() - start
        if process.returncode:
            return {**summary(runs), "failed": process.stderr.strip().splitlines()[-1]}
        result = {**json.loads(process.stdout.splitlines()[-1]), "seconds": seconds}
        print(f"ours, cold{' (fills the cache)' if not seed else ''}: {result}", file=sys.stderr)
        runs += [result] if seed else []
    return summary(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--airbench", type=Path)
    parser.add_argument("--hiverge", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--cold-seeds", type=int, default=3)
    parser.add_argument("--steps", nargs="*", default=["eager", "reduce-overhead", "compiled"])
    parser.add_argument(
        "--change", nargs="*", default=[], help="overrides of the recipe, key=value"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cold", nargs="+", help=argparse.SUPPRESS)  # seed, changes
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU; records nothing")
    options = parser.parse_args()
    if options.cold:
        return cold(int(options.cold[0]), options.cold[1:])
    if options.rehearse:
        options.device, options.seeds, options.cold_seeds, options.steps = "cpu", 1, 1, ["eager"]
        options.change += ["data.per_class=30", "model.widths=[8,8,8]", "train.batch_size=100"]
        options.change += ["train.epochs=1", "optim.groups=[]", "optim.aux_lr=0.1"]
    from recording import record
    from warm import warm

    figures: dict[str, Any] = {"seeds": options.seeds, "changes": options.change}
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {"airbench": options.airbench, "hiverge": options.hiverge}
        given = {name: path for name, path in checkouts.items() if path is not None}
        if given:
            convert(Path(folder))
        for name, path in given.items():
            figures[name] = run_peer(path / SCRIPTS[name], Path(folder), options.seeds)
    for step in options.steps:
        try:
            figures[f"warm_{step}"] = warm(
                "cifar10-fast",
                options.change,
                seeds=options.seeds,
                step=step,
                on=options.device,
                tta=TTA,
            )
        except Exception as error:  # a failing mode must not prevent the others
            figures[f"warm_{step}"] = {"failed": (str(error).splitlines() or [repr(error)])[0]}
    figures["cold"] = ours_cold(options.cold_seeds, options.change, on=options.device)
    print(json.dumps(figures if options.rehearse else record("cifar-speed", figures)))
    return None


if __name__ == "__main__":
    main()
