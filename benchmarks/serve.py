"""`convlens serve` under the load of several clients, compared with the same work in one process.

A ResNet-18 at 224 px (weights as drawn, since the time does not depend on them) classifies JPEG
photographs. Windows of both kinds take turns, and the ratio is the median of pairs:

- one process: threads decode the files while the bare network runs on batches, in the fastest of
  several batch sizes and both memory formats;
- serve: clients that send one image each and wait for the answer, in a process beside the server,
  on the same cores.

Then clients keep the server busy for `--endurance` seconds, while its memory is read every second.

    python benchmarks/serve.py [--rounds 5] [--seconds 20] [--clients 8] [--endurance 600]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np
import torch
from PIL import Image

from convlens import device, models, recipe
from convlens.data.decode import Pixels
from convlens.data.input_images import InputImage
from convlens.device import MEMORY_FORMATS, Plan
from convlens.engine.inference import batch_logits
from convlens.prediction import ImageReader
from convlens.run import RunDir, load_model
from convlens.utils import process

BATCHES = (4, 8, 32)  # sizes that are tried in one process
DISTINCT_FILES = 64


def write_model(folder: Path) -> Path:
    """Write a model file of a ResNet-18 for images of 224 px."""
    torch.manual_seed(0)
    options = {"stem": "imagenet"}
    net = models.build_model("resnet18", 10, 3, 224, options)
    tree = recipe.load_recipe(
        {"name": "serve", "data": {"name": "shapes"}, "model": {"name": "resnet18", **options}}
    )
    Plan("cpu", "fp32", "contiguous").prepare_model(net)
    run_dir = RunDir(folder / "resnet18")
    metadata = {
        "convlens": "benchmark",
        "run": "resnet18",
        "model": {"name": "resnet18", "options": options},
        "classes": list("abcdefghij"),
        "preprocessing": {
            "image_size": 224,
            "channels": 3,
            "fit": "crop",
            "mean": [0.5] * 3,
            "std": [0.25] * 3,
        },
        "data": {"name": "shapes", "fingerprint": "none"},
        "chosen": {},
        "recipe": tree.model_dump(mode="json"),
    }
    run_dir.save_model(net.state_dict(), metadata)
    return run_dir.model_path


def photographs() -> list[bytes]:
    """Return JPEG files of 500 x 375 px with detail at all scales, about 60 KB each."""
    random = np.random.default_rng(0)
    contents = []
    for _ in range(DISTINCT_FILES):
        pixels = np.zeros((375, 500, 3))
        for side in (4, 16, 64, 250):
            noise = random.integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
            layer = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
            pixels += np.asarray(layer) / 4
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=88)
        contents.append(stream.getvalue())
    return contents


class OneProcess:
    """Decoding in threads and bare forward passes in one process."""

    def __init__(self, model: Path) -> None:
        loaded = load_model(model)
        self.model, self.normalize = loaded.model, loaded.preprocessing.normalize
        self.reader = ImageReader(loaded.preprocessing.conversion)
        self.batch, self.plan = self._best_batch()

    def _best_batch(self) -> tuple[int, Plan]:
        """Return the batch size and the memory format with the shortest time per image."""
        times = {}
        for memory_format in MEMORY_FORMATS:
            plan = Plan("cpu", "fp32", memory_format)
            plan.prepare_model(self.model)
            for size in BATCHES:
                images = torch.zeros(size, 3, 224, 224, dtype=torch.uint8)
                spent = []
                for _ in range(max(3, 32 // size)):
                    start = time.process_time()  # other programs count less than in wall time
                    batch_logits(self.model, images, self.normalize, plan)
                    spent.append((time.process_time() - start) / size)
                times[size, memory_format] = min(spent)
        size, memory_format = min(times, key=lambda key: times[key])
        plan = Plan("cpu", "fp32", memory_format)
        plan.prepare_model(self.model)
        self.cpu_milliseconds = {f"{n} {name}": 1000 * t for (n, name), t in times.items()}
        return size, plan

    def images_per_second(self, files: Sequence[bytes], seconds: float) -> float:
        done, start = 0, time.perf_counter()
        with ThreadPoolExecutor(device.usable_cores()) as pool:
            waiting: list[list[Future[Pixels]]] = []
            endless = cycle(files)
            while True:
                batch = islice(endless, self.batch)
                waiting.append([pool.submit(self._decode, content) for content in batch])
                if len(waiting) < 3:  # two batches are decoded ahead
                    continue
                pixels = np.stack([each.result() for each in waiting.pop(0)])
                batch_logits(self.model, torch.from_numpy(pixels), self.normalize, self.plan)
                done += self.batch
                if (spent := time.perf_counter() - start) >= seconds:
                    for tasks in waiting:
                        for task in tasks:
                            task.cancel()
                    return done / spent

    def _decode(self, content: bytes) -> Pixels:
        return self.reader.read(InputImage("", content))


@contextlib.contextmanager
def running_server(model: Path) -> Iterator[tuple[str, int]]:
    """Run `convlens serve`; yield its address and its process id."""
    command = [sys.executable, "-m", "convlens", "serve", str(model), "--port", "0"]
    server = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield urlsplit(server.stdout.readline().strip()).netloc, server.pid
        server.send_signal(signal.SIGTERM)
        if server.wait(60) != 0:
            raise RuntimeError("the server failed")
    finally:
        server.kill()


class Load:
    """Requests of several clients, each of which waits for its answer."""

    def __init__(self, address: str, files: Sequence[bytes], clients: int) -> None:
        self.address, self.files, self.clients = address, files, clients
        self.latencies: list[float] = []
        self.errors: list[str] = []

    def run(self, seconds: float) -> float:
        """Return the images per second."""
        end = time.perf_counter() + seconds
        before, start = len(self.latencies), time.perf_counter()
        threads = [
            threading.Thread(target=self._client, args=(number, end))
            for number in range(self.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (len(self.latencies) - before) / (time.perf_counter() - start)

    def _client(self, number: int, end: float) -> None:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        for content in cycle([*self.files[number:], *self.files[:number]]):
            start = time.perf_counter()
            if start >= end:
                break
            try:
                connection.request("POST", "/predict", content)
                answer = connection.getresponse()
                text = answer.read()
                if answer.status != 200 or b'"label"' not in text:
                    self.errors.append(f"{answer.status}: {text[:200]!r}")
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(repr(error))
                connection.close()
            self.latencies.append(time.perf_counter() - start)
        connection.close()

    def percentiles(self) -> dict[str, float]:
        """Return latencies in milliseconds."""
        values = np.percentile(self.latencies, (50, 95, 99)) * 1000
        return dict(zip(("p50", "p95", "p99"), map(float, values), strict=True))


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def endure(load: Load, pid: int, seconds: float) -> dict[str, Any]:
    """Keep the server busy; return speed, latencies, errors and memory in MB over time."""
    memory: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            memory.append(resident_mb(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    rate = load.run(seconds)
    stop.set()
    watcher.join()
    tenth = max(1, len(memory) // 10)
    return {
        "seconds": seconds,
        "images_per_second": rate,
        "requests": len(load.latencies),
        "errors": load.errors[:10],
        "milliseconds": load.percentiles(),
        # After the first tenth, in which buffers of all batch sizes are allocated.
        "memory_mb": {
            "early": statistics.median(memory[tenth : 2 * tenth] or memory),
            "late": statistics.median(memory[-tenth:]),
            "largest": max(memory),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a window")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--endurance", type=float, default=60.0, help="seconds; 600 for the report")
    arguments = parser.parse_args()
    process.set_up()
    files = photographs()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        one_process = OneProcess(model)
        pairs, latencies = [], []
        with running_server(model) as (address, pid):
            Load(address, files, arguments.clients).run(min(3.0, arguments.seconds))
            for _ in range(arguments.rounds):
                alone = one_process.images_per_second(files, arguments.seconds)
                load = Load(address, files, arguments.clients)
                served = load.run(arguments.seconds)
                if load.errors:
                    raise RuntimeError(load.errors[0])
                pairs.append({"one_process": alone, "serve": served, "ratio": served / alone})
                latencies.append(load.percentiles())
                print(json.dumps(pairs[-1] | latencies[-1]), file=sys.stderr, flush=True)
            single = Load(address, files, 1)
            single.run(min(5.0, arguments.seconds))
            long = endure(Load(address, files, arguments.clients), pid, arguments.endurance)
    record(
        "serve",
        {
            "clients": arguments.clients,
            "batch": one_process.batch,
            "memory_format": one_process.plan.memory_format,
            "cpu_milliseconds": one_process.cpu_milliseconds,
            "pairs": pairs,
            "ratio": statistics.median(pair["ratio"] for pair in pairs),
            "images_per_second": statistics.median(pair["serve"] for pair in pairs),
            "milliseconds": {
                name: statistics.median(each[name] for each in latencies) for name in latencies[0]
            },
            "single_milliseconds": single.percentiles(),
            "endurance": long,
            "file_bytes": round(statistics.fmean(map(len, files))),
            "cores": os.cpu_count(),
        },
    )


if __name__ == "__main__":
    main()
