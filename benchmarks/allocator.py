"""Step times and page faults with and without `process.keep_freed_memory`.

The setting applies to a whole process, so each measurement runs in its own process. They take
turns, and the ratio is the median over pairs.

    python benchmarks/allocator.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from recording import record

WORK = """
import json, resource, statistics, sys, time
import torch, torchvision
from torch import nn
from convlens import models
from convlens.utils import process
if {keep}:
    assert process.keep_freed_memory()
nets = {{
    "cnn 16-32-64, 256 x 1 x 28 x 28": (
        models.build_model("cnn", 10, 1, 28, {{"widths": [16, 32, 64]}}), (256, 1, 28, 28)),
    "cnn 32-64-128-256, 64 x 3 x 64 x 64": (
        models.build_model("cnn", 10, 3, 64, {{"widths": [32, 64, 128, 256]}}), (64, 3, 64, 64)),
    "resnet18, 64 x 3 x 32 x 32": (torchvision.models.resnet18(num_classes=10), (64, 3, 32, 32)),
}}
out = {{}}
for name, (net, shape) in nets.items():
    net = net.to(memory_format=torch.channels_last).train()
    images = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (shape[0],))
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    times = []
    for step in range(14):
        if step == 4:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / 10
    out[name] = [statistics.median(times[4:]), faults]
print(json.dumps(out))
"""


def measure(keep: bool) -> dict[str, list[float]]:
    done = subprocess.run(
        [sys.executable, "-c", WORK.format(keep=keep)], check=True, capture_output=True, text=True
    )
    result: dict[str, list[float]] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    pairs = [(measure(True), measure(False)) for _ in range(rounds)]
    networks = {}
    for name in pairs[0][0]:
        networks[name] = {
            "ratio": round(statistics.median(k[name][0] / r[name][0] for k, r in pairs), 4),
            "ms_kept": round(1000 * statistics.median(k[name][0] for k, _ in pairs), 2),
            "ms_returned": round(1000 * statistics.median(r[name][0] for _, r in pairs), 2),
            "faults_kept": statistics.median(k[name][1] for k, _ in pairs),
            "faults_returned": statistics.median(r[name][1] for _, r in pairs),
        }
    print(json.dumps(record("allocator", {"rounds": rounds, "networks": networks})))


if __name__ == "__main__":
    main()
