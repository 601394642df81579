"""Inference compared with its lower bound: decoding and the bare network.

- predict: time of `predict` on files, relative to decoding the same files with as many threads
  plus the bare forward pass for as many images; and the time of the whole command on all files,
  including its start and the CSV.
- single: time of one image with an opened model (`Run.open`), relative to decoding its file,
  normalization and the bare forward pass; and the time of `convlens.predict`, which loads the
  model.
- evaluate: time of a pass over a resident split, relative to the bare forward pass on the same
  images, normalized and batched in advance in the best of several batch sizes and memory formats.
  The pass includes timing both formats; `loop` is the pass with a known format.

    python benchmarks/inference.py [--files 10000] [--rounds 7] [--data data]
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

# First, since it sets variables that libgomp reads when torch is imported.
from recording import record  # isort: skip

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import nn

from convlens import device, models, prediction, recipe
from convlens.data.cache import ArrayRows
from convlens.data.dataset import Split
from convlens.data.decode import decode
from convlens.device import MEMORY_FORMATS, Plan
from convlens.engine import inference
from convlens.run import LoadedModel, Preprocessing, RunDir
from convlens.training.transfer import choose_start
from convlens.utils import process

MIN_PAIRED_S = 40.0  # minimum seconds of measuring a ratio
DISTINCT_FILES = 500  # the other files are copies
CLASSES = tuple("0123456789")
CALLS = 20  # of one image in a measurement
# Recipe of the network, image size, channels; PASSES: also number of images and batch sizes.
Case = tuple[str, int, int]
FILES: dict[str, tuple[str, Case]] = {
    "28 px PNG, mnist": ("png", ("mnist", 28, 1)),
    "28 px PNG, mnist-fast": ("png", ("mnist-fast", 28, 1)),
    "224 px JPEG to 64 px, folder": ("jpg", ("folder", 64, 3)),
}
SINGLE: dict[str, Case] = {
    "one image of 8 px, digits": ("digits", 8, 1),
    "one image of 32 px, ResNet-18": ("resnet18", 32, 3),
}
PASSES: dict[str, tuple[Case, int, Sequence[int]]] = {
    "mnist, 28 px": (("mnist", 28, 1), 10_000, (64, 256, 1024, 4096)),
    "mnist-fast, 28 px": (("mnist-fast", 28, 1), 10_000, (64, 256, 1024, 4096)),
    "cifar10-cpu, 32 px": (("cifar10-cpu", 32, 3), 5_000, (64, 256, 1024, 4096)),
    "ResNet-18, 32 px": (("resnet18", 32, 3), 10_000, (64, 256, 1024, 4096)),
    "ResNet-18, 224 px": (("resnet18", 224, 3), 320, (8, 16, 32)),
}


def loaded(case: Case) -> LoadedModel:
    """Return the initialized network of a recipe as if it were loaded from a model file."""
    name, size, channels = case
    from_scratch = ["model.name=cnn", "model.weights=none"] if name == "folder" else []
    net = choose_start(recipe.load_recipe(name, from_scratch), None, []).recipe.model
    torch.manual_seed(0)
    model = models.build_model(net.name, len(CLASSES), channels, size, net.options).eval()
    pre = Preprocessing(size, channels, "crop", [0.5] * channels, [0.25] * channels)
    model_metadata = {
        "convlens": "benchmark",
        "model": {"name": net.name, "options": net.options},
        "classes": list(CLASSES),
        "preprocessing": asdict(pre),
    }
    return LoadedModel(model, CLASSES, pre, model_metadata)


def write_files(folder: Path, kind: str, count: int, photographs: Sequence[Path]) -> list[str]:
    """Write PNGs of 28 px with strokes, or JPEGs of photographs with a short side of 224 px."""
    folder.mkdir()
    random = np.random.default_rng(0)
    contents = []
    for number in range(min(DISTINCT_FILES, count)):
        if kind == "png":
            strokes = np.zeros((28, 28), np.uint8)
            strokes[6:22, 6:22] = 255 * (random.random((16, 16)) > 0.7)
            image = Image.fromarray(strokes).filter(ImageFilter.GaussianBlur(0.7))
        elif photographs:
            image = Image.open(photographs[number % len(photographs)]).convert("RGB")
            scale = 224 / min(image.size)
            image = image.resize([round(scale * side) for side in image.size])
        else:
            image = Image.fromarray(random.integers(0, 256, (14, 18, 3), dtype=np.uint8))
            image = image.resize((288, 224), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, "PNG" if kind == "png" else "JPEG", quality=88)
        contents.append(stream.getvalue())
    paths = [folder / f"{number:05}.{kind}" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(contents[number % len(contents)])
    return [str(path) for path in paths]


def only_decode(paths: Sequence[str], pre: Preprocessing) -> None:
    """Decode all files with as many threads as `predict` does."""

    def decode_some(start: int) -> None:
        for path in paths[start : start + prediction.IMAGES_PER_TASK]:
            decode(path, size=pre.image_size, channels=pre.channels, fit=pre.fit)

    with ThreadPoolExecutor(device.usable_cores()) as pool:
        for _ in pool.map(decode_some, range(0, len(paths), prediction.IMAGES_PER_TASK)):
            pass


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(ours: Callable[[], object], least: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Return median and quartiles of the paired ratios `ours / least`; the order alternates.

    Short passes are repeated for at least `MIN_PAIRED_S`.
    """
    pairs: list[tuple[float, float]] = []
    seconds_of(least), seconds_of(ours)
    while len(pairs) < rounds or sum(map(sum, pairs)) < MIN_PAIRED_S:
        first, second = (ours, least) if len(pairs) % 2 else (least, ours)
        times = {id(work): seconds_of(work) for work in (first, second)}
        pairs.append((times[id(ours)], times[id(least)]))
    ratios = [a / b for a, b in pairs]
    return {
        "pairs": len(pairs),
        "ratio": round(statistics.median(ratios), 4),
        "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
        "seconds": round(statistics.median(a for a, _ in pairs), 4),
        "least_seconds": round(statistics.median(b for _, b in pairs), 4),
    }


def predict_case(kind: str, case: Case, paths: list[str], rounds: int) -> dict[str, Any]:
    """Measure `predict` on a tenth of the files, and the command on all of them."""
    model, some = loaded(case), paths[: max(100, len(paths) // 10)]
    normalize = model.preprocessing.normalize
    forward, _ = best_bare(model.model, pixels_of(case, len(some)), normalize, (64, 256))
    decoding: list[float] = []

    def lower_bound() -> None:
        decoding.append(seconds_of(lambda: only_decode(some, model.preprocessing)))
        forward()

    found = ratio(
        lambda: list(prediction.iter_predictions(model, some, quiet=True)), lower_bound, rounds
    )
    found["decoding_seconds"] = round(statistics.median(decoding[1:]), 4)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder) / "model")
        run_dir.save_model(model.model.state_dict(), model.model_metadata)
        program = [sys.executable, "-m", "convlens", "predict", str(run_dir.model_path)]
        command = [*program, str(Path(paths[0]).parent), "--format", "csv"]
        spent = seconds_of(lambda: subprocess.run(command, check=True, capture_output=True))
    whole = seconds_of(lambda: only_decode(paths, model.preprocessing))
    return {
        "kind": kind,
        "files": len(paths),
        **found,
        "command_seconds": round(spent, 2),
        "decode_seconds": round(whole, 2),
    }


def single_case(case: Case, folder: Path, rounds: int) -> dict[str, Any]:
    """Measure an opened model on one file."""
    model = loaded(case)
    pre = model.preprocessing
    path = str(folder / f"{case[1]}.png")
    pixels = pixels_of(case, 1)[0].numpy()
    Image.fromarray(pixels[0] if case[2] == 1 else pixels.transpose(1, 2, 0)).save(path)
    run_dir = RunDir(folder / case[0])
    run_dir.save_model(model.model.state_dict(), model.model_metadata)
    opened, plan = prediction.Predictor(model, "cpu"), Plan("cpu", "fp32", "contiguous")

    @torch.inference_mode()
    def lower_bound() -> None:
        for _ in range(CALLS):
            image = decode(path, size=pre.image_size, channels=pre.channels, fit=pre.fit)
            model.model(pre.normalize(torch.from_numpy(image)[None], plan))

    def ours() -> None:
        for _ in range(CALLS):
            opened.predict(path)

    found = ratio(ours, lower_bound, rounds)
    loading = [
        seconds_of(lambda: prediction.predict(run_dir, path, device="cpu")) for _ in range(rounds)
    ]
    return {
        **found,
        "milliseconds": round(1e3 * found["seconds"] / CALLS, 3),
        "least_milliseconds": round(1e3 * found["least_seconds"] / CALLS, 3),
        "loading_milliseconds": round(1e3 * statistics.median(loading), 1),
    }


def pixels_of(case: Case, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, case[2], case[1], case[1])
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@torch.inference_mode()
def best_bare(
    model: nn.Module,
    images: torch.Tensor,
    normalize: Callable[[torch.Tensor, Plan], torch.Tensor],
    sizes: Sequence[int],
) -> tuple[Callable[[], None], Plan]:
    """Return the forward pass on all images in the best batch size and format, and its plan."""
    tried: list[tuple[float, nn.Module, Plan, int]] = []
    for name in MEMORY_FORMATS:
        plan = Plan("cpu", "fp32", name)
        twin = plan.prepare_model(copy.deepcopy(model))
        for size in sizes:
            batch = normalize(images[:size], plan)
            times = [seconds_of(lambda t=twin, b=batch: t(b)) / size for _ in range(4)]  # type: ignore[misc]
            tried.append((statistics.median(times[1:]), twin, plan, size))
    _, twin, plan, size = min(tried, key=lambda each: each[0])
    ready = [normalize(part, plan) for part in images.split(size)]

    @torch.inference_mode()
    def run() -> None:
        for batch in ready:
            twin(batch)

    return run, plan


@torch.inference_mode()
def evaluate_case(case: Case, count: int, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Measure a pass over `count` resident images, relative to their bare forward pass."""
    model, pixels = loaded(case), pixels_of(case, count)
    split = Split(ArrayRows(pixels), torch.zeros(count, dtype=torch.int64), [""] * count)
    normalize = model.preprocessing.normalize
    bare, known = best_bare(model.model, pixels, normalize, sizes)

    def first() -> None:
        # Starts in the memory format of model files.
        plan = inference.place_model(model.model, "cpu")
        inference.split_outputs(
            model.model, split, normalize, plan, None, choose_memory_format=True
        )

    twin = known.prepare_model(copy.deepcopy(model.model))
    loop = ratio(lambda: inference.split_outputs(twin, split, normalize, known, None), bare, rounds)
    return {
        "images": count,
        "memory_format": known.memory_format,
        **ratio(first, bare, rounds),
        **{f"loop_{key}": loop[key] for key in ("ratio", "quartiles")},
    }


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Any]]]:
    selected = arguments.only or [*FILES, *SINGLE, *PASSES]
    photographs = sorted(Path(arguments.data, "flowers").rglob("*.jpg"))[::7]
    with tempfile.TemporaryDirectory() as folder:
        written: dict[str, list[str]] = {}
        for name, (kind, case) in FILES.items():
            if name in selected:
                if kind not in written:
                    target = Path(folder) / kind
                    written[kind] = write_files(target, kind, arguments.files, photographs)
                found = predict_case(kind, case, written[kind], arguments.rounds)
                yield "predict", name, {"photographs": bool(photographs), **found}
        for name, case in SINGLE.items():
            if name in selected:
                yield "single", name, single_case(case, Path(folder), arguments.rounds)
    for name, (case, count, sizes) in PASSES.items():
        if name in selected:
            yield "evaluate", name, evaluate_case(case, count, sizes, arguments.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data", default=os.environ.get("CONVLENS_DATA", "data"))
    parser.add_argument("--only", action="append", help="one case by name; nothing is recorded")
    arguments = parser.parse_args()
    process.keep_freed_memory()
    device.prepare(deterministic=False)
    figures: dict[str, Any] = {"rounds": arguments.rounds}
    figures |= {"predict": {}, "single": {}, "evaluate": {}}
    for group, name, found in cases(arguments):
        figures[group][name] = found
        sys.stderr.write(f"{group} {name}: {json.dumps(found)}\n")
    print(json.dumps(figures if arguments.only else record("inference", figures)))


if __name__ == "__main__":
    main()
