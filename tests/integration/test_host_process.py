"""Using convlens as a library leaves the global state of the host process unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from helpers.commands import weights
from helpers.support import same, tiny

PROGRAM = r'''
import faulthandler, gc, hashlib, json, locale, logging, os, pickle, random, signal, socket, sys
import threading, warnings

# libgomp reads it when it is loaded: idle threads would spin on a busy machine.
os.environ["GOMP_SPINCOUNT"] = "1000"

# Packages that change global state when they are imported.
import captum.attr, matplotlib.figure, numpy, PIL.Image, PIL.ImageFile, rich.console, ruamel.yaml
import sklearn
import torch, torchvision
import matplotlib
del os.environ["GOMP_SPINCOUNT"]  # convlens would set it, if it changed the environment

def digest(value):
    return hashlib.sha256(pickle.dumps(value)).hexdigest()

def state():
    """Everything of a process that a library could change for everybody else."""
    umask = os.umask(0o22)
    os.umask(umask)
    loggers = [logging.getLogger(), logging.getLogger("convlens")]
    return {
        "warnings": [repr(each) for each in warnings.filters],
        "showwarning": repr(warnings.showwarning),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
                  torch.backends.cudnn.enabled],
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": [torch.are_deterministic_algorithms_enabled(),
                          torch.is_deterministic_algorithms_warn_only_enabled()],
        "precision": [torch.get_float32_matmul_precision(), str(torch.get_default_dtype())],
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "torch_rng": digest(torch.get_rng_state().numpy()),
        "numpy_rng": digest(numpy.random.get_state()),
        "random": digest(random.getstate()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "environment": dict(os.environ),
        "signals": {each.name: repr(signal.getsignal(each)) for each in signal.valid_signals()
                    if isinstance(each, signal.Signals)},
        "logging": [[repr(each.handlers), each.level, each.propagate] for each in loggers],
        "logging_disabled": logging.root.manager.disable,
        "hooks": [repr(sys.excepthook), repr(threading.excepthook), repr(sys.unraisablehook)],
        "faulthandler": faulthandler.is_enabled(),
        "gc": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()],
        "matplotlib": [digest(sorted(map(str, dict.items(matplotlib.rcParams)))),
                       "matplotlib.pyplot" in sys.modules],
        "pillow": [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES],
        "numpy": [numpy.geterr(), digest(numpy.get_printoptions())],
        "process": [os.getcwd(), umask, locale.setlocale(locale.LC_ALL), sys.path,
                    socket.getdefaulttimeout()],
        "streams": [repr(sys.stdout), repr(sys.stderr), sys.stdout.errors],
    }

# Settings of the host program, different from the defaults and from those of convlens.
torch.set_num_threads(2)
torch.backends.cudnn.benchmark = True
torch.manual_seed(5)
torch.set_default_dtype(torch.float64)
signal.signal(signal.SIGTERM, lambda *_: None)
PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True

changed, before = {}, state()
def compare(call):
    global before
    after = state()
    differs = {key: [before[key], after[key]] for key in after if before[key] != after[key]}
    if differs:
        changed[call] = differs
    before = after

import convlens
compare("import convlens")
from convlens import device
compare("import convlens.device")
device.usable_cores = lambda: 1  # as in a container with a quota: training uses fewer threads
run = convlens.train("tiny.yaml", device="cpu", name="host")
compare("train")
convlens.train("tiny.yaml", ["train.deterministic=true", "train.epochs=1"], device="cpu", name="d",
               quiet=True, test=False)
compare("train, deterministic")
run.evaluate("val", device="cpu")
compare("evaluate")
predictions = run.predict(["digit.png", "bomb.png"], device="cpu")
compare("predict")
run.predict(numpy.zeros((5, 8, 8), numpy.uint8), device="cpu", tta="flip")
compare("predict an array")
run.open("cpu").predict([PIL.Image.new("L", (8, 8)), torch.zeros(8, 8)] * 40)
compare("predict with an opened model")
convlens.look(run, ["digit.png"], device="cpu", attribution=["grad-cam"], filters=["first"],
              dream=["stage1:0"], measure=["probe"], embedding=["pca"])
compare("look")
convlens.report(run, device="cpu")
compare("report")
print(json.dumps({
    "changed": changed,
    "threads": json.load(open("models/host/run.json"))["hardware"]["threads"],
    "errors": [each.error for each in predictions],
}))
'''


@pytest.mark.figures
def test_the_api_leaves_the_host_process_unchanged(tmp_path: Path) -> None:
    Path("tiny.yaml").write_text(tiny().to_text())
    Image.new("L", (8, 8), 200).save("digit.png")
    Image.new("1", (11_000, 11_000)).save("bomb.png")  # Pillow would warn and open it
    done = program()
    assert done["changed"] == {}
    assert done["threads"] == 1
    assert done["errors"] == [
        None,
        "more than 89 million pixels are refused (11000 x 11000); to raise the limit, set "
        "data.max_pixels, or --max-pixels of predict, look and serve",
    ]


def test_the_default_type_of_the_host_changes_no_number() -> None:
    expected = convlens.train(tiny(), name="plain", device="cpu", quiet=True)
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8), np.uint8)
    predictions, opened = expected.predict(images), expected.open("cpu").predict(images[0])
    torch.set_default_dtype(torch.float64)
    try:
        got = convlens.train(tiny(), name="double", device="cpu", quiet=True)
        assert got.evaluate("test").loss == expected.results[-1]["loss"]
        assert got.predict(images) == predictions
        assert got.open("cpu").predict(images[0]) == opened
        assert got.module(got.transform(images[0])[None]).dtype == torch.float32
        labels = images[:, 0, 0] > 127
        convlens.ImageClassifier(epochs=1).fit(images, labels).predict(images)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    same(weights(got.path), weights(expected.path))


def program() -> dict[str, Any]:
    """Run the program without the settings of conftest.py, and return the JSON that it prints."""
    excluded = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "CONVLENS_FIGURES")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key not in excluded},
    )
    assert done.returncode == 0, done.stderr
    assert "epoch   3/3" in done.stderr  # not quiet: shown without any logging configured
    assert "DecompressionBomb" not in done.stderr
    output: dict[str, Any] = json.loads(done.stdout)
    return output
