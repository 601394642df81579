"""Times of `convlens explore` from the browser's side: start, drop to answer, brush.

A ResNet-18 at 224 px, and the digits network for the brush; both are trained for a moment on
images that the script makes. Needs chromium and chromedriver. Prints one JSON object.

    python benchmarks/explore.py [--images 40]
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np
from PIL import Image

import convlens

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from helpers.browser import Browser, browser

PHOTO = (640, 480)  # pixels of a dropped photo
READY = "return document.querySelectorAll('.view[aria-busy=false] .layer').length"
# Drop a file, and note when the page shows each answer.
DROP = """
    const done = arguments[arguments.length - 1];
    const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], 'photo.jpg', {type: 'image/jpeg'}));
    const times = {}, parts = {prediction: 'verdict', heat_map: 'heat-note', activations: 'layers'};
    const start = performance.now();
    for (const [name, part] of Object.entries(parts)) {
      const observer = new MutationObserver(() => {
        observer.disconnect();
        times[name] = performance.now() - start;
        if (Object.keys(times).length === 3) done(times);
      });
      observer.observe(document.querySelector(`[data-part=${part}]`), {childList: true});
    }
    document.body.dispatchEvent(
      new DragEvent('drop', {bubbles: true, cancelable: true, dataTransfer: data}));
"""
# Move the brush for two seconds, and count the answers that the page shows.
BRUSH = """
    const done = arguments[arguments.length - 1], stage = document.querySelector('.stage');
    let updates = 0, step = 0;
    const observer = new MutationObserver(() => { updates += 1; });
    observer.observe(document.querySelector('[data-part=bars]'), {childList: true});
    stage.focus();
    const start = performance.now(), keys = ['ArrowRight', ' ', 'ArrowDown', ' ', 'ArrowLeft', ' '];
    const move = () => {
      const key = keys[step++ % keys.length];
      stage.dispatchEvent(new KeyboardEvent('keydown', {key, cancelable: true}));
      if (performance.now() - start < 2000) setTimeout(move, 10);
      else { observer.disconnect(); done(updates / (performance.now() - start) * 1000); }
    };
    move();
"""


def photo(seed: int) -> bytes:
    """Return a smooth random color image as JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(small).resize(PHOTO, Image.Resampling.BICUBIC).save(content, "JPEG")
    return content.getvalue()


def make_runs(folder: Path) -> None:
    """Train `resnet` at 224 px for one epoch, and `digits`."""
    for number in range(60):
        path = folder / "images" / "abc"[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    settings = {"model.name": "resnet18", "model.weights": "none", "data.image_size": 224}
    settings |= {"train.epochs": 1, "model.stem": "imagenet"}
    convlens.train(str(folder / "images"), settings, name="resnet", test=False, quiet=True)
    convlens.train("digits", name="digits", test=False, quiet=True)


@contextlib.contextmanager
def explored(run: str) -> Iterator[tuple[str, float]]:
    """Run the command; yield the URL and the time at which it was started."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "convlens", "explore", run, "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), start
        finally:
            process.terminate()


def start_times(window: Browser) -> tuple[float, float]:
    """Return the seconds from the command to the page, and to the first prediction."""
    with explored("resnet") as (url, start):
        window.open(url)  # returns when the page is loaded
        shown = time.perf_counter() - start
        window.until("return document.querySelector('.bars li')")
        return shown, time.perf_counter() - start


def drop_times(window: Browser, images: int) -> dict[str, list[float]]:
    """Return the milliseconds from each drop to prediction, heat map and activations."""
    times: dict[str, list[float]] = {"prediction": [], "heat_map": [], "activations": []}
    with explored("resnet") as (url, _):
        window.open(url)
        window.until(READY)
        for number in range(images + 3):  # the first ones warm up
            window.until(READY)
            each = window.wait(DROP, base64.b64encode(photo(1000 + number)).decode())
            for name, milliseconds in each.items():
                if number >= 3:
                    times[name].append(milliseconds)
    return times


def brush_rate(window: Browser) -> float:
    """Return the answers per second while the brush moves over a digit."""
    with explored("digits") as (url, _):
        window.open(url)
        window.until(READY)
        window.wait(BRUSH)
        return float(window.wait(BRUSH))


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Return median and 95th percentile in milliseconds."""
    return {
        "p50_ms": round(statistics.median(values)),
        "p95_ms": round(float(np.percentile(values, 95))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=40)
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), browser() as window:
        make_runs(Path(folder))
        window.size(1280, 900)
        starts = [start_times(window) for _ in range(4)][1:]  # the first one compiles bytecode
        figures: dict[str, Any] = {
            "images": images,
            "page_s": round(statistics.median(shown for shown, _ in starts), 2),
            "first_prediction_s": round(statistics.median(first for _, first in starts), 2),
        }
        for name, times in drop_times(window, images).items():
            figures[f"drop_to_{name}"] = summarize(times)
        figures["brush_updates_per_s"] = round(brush_rate(window), 1)
    print(json.dumps(record("explore", figures)))


if __name__ == "__main__":
    main()
