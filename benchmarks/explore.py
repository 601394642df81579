"""Times of `convlens explore` from the browser's side.

- start: the page, and the first prediction
- Try: from a drop to prediction, heat map and activations with a ResNet-18 at 224 px; the brush
  with the digits network
- Judge: frames while 10,000 images are scrolled through, and from a jump to all thumbnails in view
- Watch: how far the page is behind a training, and the time that the training loses by it, as a
  ratio of trainings with and without the page, in turns

All networks are trained for a moment on images that the script makes. Needs chromium and
chromedriver. Prints one JSON object.

    python benchmarks/explore.py [--images 40] [--pairs 5]
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
BROWSED, BROWSED_SHARE = 11_200, 0.9  # small images, and the share that is browsed
JUMPS = 20
WATCHED = ["model.widths=[8,16]", "train.epochs=12", "augment=[]"]
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
# Scroll from the first row to the last in 200 steps; return the milliseconds of each frame.
SCROLL = """
    const done = arguments[arguments.length - 1], view = document.getElementById('window');
    const total = view.scrollHeight - view.clientHeight, frames = [];
    let last = 0, step = 0;
    const frame = (now) => {
      if (last) frames.push(now - last);
      last = now;
      if (step > 200) return done(frames);
      view.scrollTop = total * step++ / 200;
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
"""
# Scroll to a share of the height; return the milliseconds until all images in view are shown.
JUMP = """
    const done = arguments[arguments.length - 1], view = document.getElementById('window');
    const start = performance.now();
    view.scrollTop = (view.scrollHeight - view.clientHeight) * arguments[0];
    const frame = () => {
      const {top, bottom} = view.getBoundingClientRect();
      const shown = [...document.querySelectorAll('#images img')].filter((image) => {
        const box = image.getBoundingClientRect();
        return box.bottom > top && box.top < bottom;
      });
      if (shown.length && shown.every((image) => image.complete && image.naturalWidth)) {
        return done(performance.now() - start);
      }
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(() => requestAnimationFrame(frame));
"""
# Note when the table shows each epoch of a run, and when the curves were drawn.
OBSERVE = """
    const run = arguments[0];
    window.rows = {}; window.drawn = [];
    new MutationObserver(() => {
      const row = [...document.getElementById('runs').rows].find((r) => r.dataset.run === run);
      const epoch = row && parseInt(row.cells[3].textContent);
      if (epoch && !(epoch in window.rows)) window.rows[epoch] = Date.now();
      const box = row && row.querySelector('input');
      if (box && !box.disabled && !box.checked) box.click();
    }).observe(document.getElementById('runs'), {childList: true});
    new MutationObserver(() => window.drawn.push(Date.now()))
      .observe(document.getElementById('curves'), {childList: true});
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
    generator = np.random.default_rng(0)
    for number in range(BROWSED):
        path = folder / "many" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((28, 28), Image.Resampling.BICUBIC).save(path)
    settings = {"model.name": "cnn", "model.weights": "none", "model.widths": [8, 16]}
    settings |= {"train.epochs": 1, "data.val_fraction": BROWSED_SHARE, "data.test_fraction": 0.05}
    convlens.train(str(folder / "many"), settings, name="browsed", test=False, quiet=True)


@contextlib.contextmanager
def explored(*runs: str) -> Iterator[tuple[str, float]]:
    """Run the command, for all runs by default; yield the URL and the time of its start."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "convlens", "explore", *runs, "--no-open"]
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


def browse_times(window: Browser) -> tuple[list[float], list[float]]:
    """Return the milliseconds of each frame while all images are scrolled, and of each jump."""
    with explored("browsed") as (url, _):
        window.open(url)
        window.open(url.partition("?")[0] + "judge?run=browsed")
        window.until("return document.querySelector('#images img')")
        window.do(
            "const only = document.getElementById('only'); only.value = 'all';"
            "only.dispatchEvent(new Event('change'));"
        )
        window.until("return document.getElementById('gallery-note').textContent.startsWith('10,')")
        frames = window.wait(SCROLL)
        shares = np.random.default_rng(0).random(JUMPS + 1)
        return frames, [window.wait(JUMP, share) for share in shares][1:]


def train_watched(name: str) -> tuple[dict[int, float], float]:
    """Train; return when each epoch was in `metrics.csv`, and the seconds of training."""
    folder = Path("models") / name
    command = [sys.executable, "-m", "convlens", "train", "many", "--name", name, "--no-test"]
    process = subprocess.Popen(
        [*command, "model.name=cnn", "model.weights=none", *WATCHED], stderr=subprocess.DEVNULL
    )
    written: dict[int, float] = {}
    while process.poll() is None:
        with contextlib.suppress(OSError):
            rows = (folder / "metrics.csv").read_text().count("\n") - 1
            for epoch in range(1, rows + 1):
                written.setdefault(epoch, 1000 * time.time())
        time.sleep(0.02)
    assert process.returncode == 0
    return written, float(json.loads((folder / "run.json").read_text())["training_seconds"])


def watch_times(window: Browser, pairs: int) -> dict[str, Any]:
    """Return how far the page is behind trainings, and what these lose by it."""
    rows, curves, ratios = [], [], []
    for pair in range(pairs + 1):  # the first one decodes the images and chooses the plan
        seconds = {}
        for watched in (pair % 2 == 0, pair % 2 == 1):
            name = f"watched-{pair}-{watched}"
            if not watched:
                window.open("about:blank")
                _, seconds[watched] = train_watched(name)
                continue
            with explored() as (url, _):
                window.open(url)
                window.open(url.partition("?")[0] + "watch")
                window.until("return document.getElementById('runs').rows.length")
                window.do(OBSERVE, name)
                written, seconds[watched] = train_watched(name)
                time.sleep(2)
                shown = {int(k): v for k, v in window.do("return window.rows").items()}
                drawn = window.do("return window.drawn")
            if pair:
                rows += [shown[epoch] - written[epoch] for epoch in written if epoch in shown]
                ends = [min((d for d in drawn if d >= t), default=None) for t in shown.values()]
                curves += [
                    end - written[epoch]
                    for epoch, end in zip(shown, ends, strict=True)
                    if end is not None
                ]
        if pair:
            ratios.append(seconds[True] / seconds[False])
    return {
        "row_behind": summarize(rows),
        "curves_behind": summarize(curves),
        "training_time_ratio": round(statistics.median(ratios), 3),
        "training_time_ratios": [round(ratio, 3) for ratio in ratios],
    }


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Return median and 95th percentile in milliseconds."""
    return {
        "p50_ms": round(statistics.median(values)),
        "p95_ms": round(float(np.percentile(values, 95))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=5, help="of watched and unwatched trainings")
    options = parser.parse_args()
    images = options.images
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
        frames, jumps = browse_times(window)
        figures["scrolled_images"] = round(BROWSED_SHARE * BROWSED)
        figures["frame"] = summarize(frames) | {"longest_ms": round(max(frames))}
        figures["jump_to_images"] = summarize(jumps)
        figures["watch"] = watch_times(window, options.pairs)
    print(json.dumps(record("explore", figures)))


if __name__ == "__main__":
    main()
