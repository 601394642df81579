"""A model gives the same numbers for any batch size, number of processes and interface."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convlens import Run, metrics
from convlens.data.dataset import Data, load_data
from convlens.engine import data_parallel, inference
from convlens.engine.inference import split_logits
from convlens.metrics import NEAR_TIE, near_ties
from convlens.prediction import all_probabilities
from convlens.run import load_model
from helpers.commands import here
from helpers.evaluating_together import SIZES, evaluate_sizes
from helpers.launching import torchrun
from helpers.paths import HELPERS
from helpers.support import PLAN

SCRIPT = HELPERS / "evaluating_together.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on digits with batch norm and dropout that classifies most images correctly."""
    folder = tmp_path_factory.mktemp("same")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = here(
            "train",
            "digits",
            "model.widths=[8,16]",
            "model.dropout=0.2",
            "train.epochs=2",
            "--no-test",
            "--name",
            "small",
        )
        assert done.code == 0, done.err
    return folder / "models" / "small"


@pytest.fixture
def small(digits: Path) -> Run:
    return Run.load(shutil.copytree(digits, Path("models") / "small"))


def reference_logits(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Compute logits and labels of the test split with minimal code: float64, image by image."""
    loaded = load_model(run.path / "model.safetensors")
    test = load_data(run.recipe.data, memory_budget=1 << 30).unseal_test()
    model, pre = loaded.model.double().eval(), loaded.preprocessing
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (pre.mean, pre.std))
    found = []
    with torch.no_grad():
        for number in range(len(test)):
            image = test.rows.gather(torch.tensor([number]))[0]
            found.append(model(((image.double() / 255 - mean) / std)[None])[0])
    return torch.stack(found).numpy(), test.labels.numpy()


def expected(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    preds = logits.argmax(1)
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    table = np.zeros((logits.shape[1],) * 2, int)
    np.add.at(table, (labels, preds), 1)
    return {
        "n": len(labels),
        "correct": int((preds == labels).sum()),
        "confusion": table.tolist(),
        "loss": float(losses.mean()),
    }


def agree(found: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert equal counts and a loss within 1e-6; this data set has no near ties."""
    for key in ("n", "correct", "confusion"):
        assert found[key] == other[key], key
    assert found["loss"] == pytest.approx(other["loss"], abs=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_any_batch_size_and_number_of_images_give_the_reference_numbers(
    batch: int, small: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = reference_logits(small)
    monkeypatch.setattr(inference, "MAX_BATCH", batch)
    monkeypatch.setattr(inference, "FIRST_BATCH", min(16, batch))
    found = evaluate_sizes(small.run_dir, 256)
    assert [each["n"] for each in found] == [*SIZES, len(labels)]
    for each in found:
        assert each["near_ties"] == 0
        agree(each, expected(logits[: each["n"]], labels[: each["n"]]))


@pytest.mark.parametrize("pieces", [3, 256])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_the_parts_of_all_processes_make_up_the_split(
    pieces: int, processes: int, small: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image belongs to one process, and the logits concatenate in order."""
    monkeypatch.setattr(data_parallel, "EVAL_CHUNK", pieces)
    loaded = load_model(small.path / "model.safetensors")
    test = load_data(small.recipe.data, memory_budget=1 << 30).unseal_test()
    normalize = loaded.preprocessing.normalize
    whole, _ = split_logits(loaded.model, test, normalize, PLAN)
    for size in SIZES:
        counts = data_parallel.rows_per_rank(size, processes)
        found = []
        for rank, count in enumerate(counts):
            start = sum(counts[:rank])
            part = data_parallel.SplitSlice(test, start, start + count)
            found += [split_logits(loaded.model, part, normalize, PLAN)[0]] if count else []
        assert sum(counts) == size
        torch.testing.assert_close(torch.cat(found), whole[:size], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_gives_the_reference_numbers(processes: int, small: Run) -> None:
    done = torchrun(processes, SCRIPT, small.path, "found.json")
    assert done.code == 0, done.err
    logits, labels = reference_logits(small)
    found = json.loads(Path("found.json").read_text())
    assert set(found) == {"256", "3"}
    for results in found.values():
        assert [each["n"] for each in results] == [*SIZES, len(labels)]
        for each in results:
            agree(each, expected(logits[: each["n"]], labels[: each["n"]]))
    # Each evaluation was logged once, although several processes took part.
    assert len(small.results) == 2 * (len(SIZES) + 1)


def compare_all_interfaces(run: Run, data: Data) -> None:
    """Compare evaluate, predict and the Python API on the test split, as files and as an array."""
    test = data.unseal_test()
    pixels = test.rows.gather(torch.arange(len(test))).numpy()
    labels, names = test.labels.numpy(), np.array(data.classes)
    for number, (label, image) in enumerate(zip(labels, pixels, strict=True)):
        path = Path("files") / names[label] / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, 2)).save(path)

    own = here("evaluate", run.name, "--json").json
    by_files = here("evaluate", run.name, "--data", "files", "--json").json
    python = run.evaluate("test").to_dict()
    assert own["n"] == by_files["n"] == python["n"] == len(labels)

    k = len(names)
    answers = here("predict", run.name, "files", "-k", str(k), "--json").json["predictions"]
    order = [int(Path(answer["filename"]).stem) for answer in answers]
    probs = {
        "predict": np.zeros((len(labels), k)),
        "files": np.zeros((len(labels), k)),
        "array": np.zeros((len(labels), k)),
        "all": all_probabilities(load_model(run.path / "model.safetensors"), pixels),
    }
    column = {name: number for number, name in enumerate(names)}
    for row, answer in zip(order, answers, strict=True):
        for entry in answer["top"]:
            probs["predict"][row, column[entry["label"]]] = entry["prob"]
    paths = sorted(Path("files").rglob("*.png"), key=lambda path: path.name)
    for interface, inputs in (("files", paths), ("array", pixels)):
        for row, answer in enumerate(run.predict(inputs, top_k=k)):
            for name, share in answer.top:
                probs[interface][row, column[name]] = share

    preds = {interface: rows.argmax(1) for interface, rows in probs.items()}
    ranked = np.sort(np.log(np.maximum(probs["all"], 1e-300)), axis=1)
    # Probabilities are those of the logits divided by the temperature, the loss is without it.
    temperature = own["temperature"]
    near = temperature * (ranked[:, -1] - ranked[:, -2]) < NEAR_TIE
    assert int(near.sum()) == own["near_ties"] == by_files["near_ties"]
    for interface, rows in probs.items():
        assert not (preds[interface] != preds["all"])[~near].any(), interface
        np.testing.assert_allclose(rows, probs["all"], rtol=0, atol=1e-5, err_msg=interface)
        logits = temperature * np.log(np.maximum(rows, 1e-300))
        loss = metrics.cross_entropy(logits, labels)
        for result in (own, by_files, python):
            assert loss == pytest.approx(result["loss"], abs=1e-6), interface
            table = metrics.confusion_matrix(labels, preds[interface], k)
            difference = np.abs(table - np.array(result["confusion"])).sum()
            assert difference <= 2 * int(near.sum()), interface
            assert abs(int(table.trace()) - result["correct"]) <= int(near.sum()), interface
    print(f"{len(labels):,} images, {int(near.sum())} near ties, accuracy {own['accuracy']:.4f}")


def test_every_interface_gives_the_same_numbers(small: Run) -> None:
    compare_all_interfaces(small, load_data(small.recipe.data, memory_budget=1 << 30))


@pytest.mark.data
@pytest.mark.slow
def test_every_interface_gives_the_same_numbers_for_ten_thousand_images() -> None:
    done = here(
        "train", "mnist", "data.per_class=200", "train.epochs=2", "--no-test", "--name", "mnist"
    )
    assert done.code == 0, done.err
    run = Run.load("mnist")
    data = load_data(run.recipe.data, memory_budget=1 << 30)
    assert len(data.unseal_test()) == 10_000
    compare_all_interfaces(run, data)


def test_near_ties_are_counted_as_by_hand() -> None:
    logits = [[0.0, 1.0, 1.0], [0.0, 1.0, 1.00005], [0.0, 1.0, 1.001], [3.0, 1.0, 1.0]]
    assert near_ties(np.array(logits)) == 2
    assert near_ties(np.array(logits), 0.01) == 3
    assert near_ties(np.zeros((5, 2))) == 5
    assert near_ties(np.zeros((5, 1))) == 0
    assert near_ties(np.array([[1e4, 1e4 + NEAR_TIE / 2]], np.float32)) == 1
    assert math.isclose(NEAR_TIE, 1e-4)
