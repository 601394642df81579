"""Random damage to every file that convlens writes and reads is reported, repaired or harmless.

Text files that people edit (JSON, CSV) have no checksum: they parse, or the error says so. By
default 25 cases per file; with --slow 1,000 per file, whose score is printed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convlens import evaluation, serialization
from convlens.data import cache, dataset, tar_index
from convlens.data.cache import image_checksums
from convlens.data.decode import Conversion
from convlens.data.types import FilePaths
from convlens.device import Plan
from convlens.run import RunDir, load_model
from convlens.training import autotune
from convlens.utils.files import CorruptError, add_checksum, verify_checksum
from helpers.commands import here, pictures, refused
from helpers.damage import score
from helpers.shards import shards

CASES, SLOW_CASES = 25, 1000
CONVERSION = Conversion(8, 3, "crop")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a finished, evaluated run on images in a folder."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CONVLENS_CACHE", str(folder / "cache"))
        pictures(Path("photos"), {"red": 12, "green": 12, "blue": 12})
        arguments = (
            "photos",
            "model.widths=[4]",
            "train.epochs=3",
            "augment=[]",
            "--name",
            "original",
        )
        done = here("train", *arguments)
        assert done.code == 0, done.err
        assert here("evaluate", "original", "--split", "val").code == 0
    return folder


@pytest.fixture
def run(finished_run: Path) -> RunDir:
    shutil.copytree(finished_run / "photos", "photos")
    return RunDir(Path(shutil.copytree(finished_run / "models" / "original", "models/original")))


Case = tuple[Path, Callable[[], Any], Any]


def _model(run: RunDir) -> Case:
    def read() -> Any:
        loaded = load_model(run.model_path)
        tensors = {name: t.numpy().tobytes() for name, t in loaded.model.state_dict().items()}
        return tensors, loaded.classes, loaded.preprocessing, loaded.model_metadata

    return run.model_path, read, None


def _run_json(run: RunDir) -> Case:
    return run.path / "run.json", run.metadata, None


def _results(run: RunDir) -> Case:
    return run.path / "results.json", run.evaluation_log, None


def _metrics(run: RunDir) -> Case:
    return run.metrics_path, lambda: repr(run.metrics()), None


def _recipe(run: RunDir) -> Case:
    # The digest leaves out name and description, which do not affect the training.
    return run.path / "recipe.yaml", lambda: run.recipe().digest(), None


def _images(run: RunDir) -> Case:
    path = run.path / dataset.IMAGES_FILE
    return path, lambda: dataset._read_image_list(path), None


def _predictions(run: RunDir) -> Case:
    model_metadata = serialization.read_model_file(run.model_path)[1]
    fingerprint, sha = model_metadata["data"]["fingerprint"], model_metadata["sha256"]

    def read() -> Any:
        found = evaluation.load_predictions(run, "test", fingerprint, sha)
        return found and (found.logits.tobytes(), found.labels.tobytes(), found.images)

    (path,) = (run.path / "answers").glob("test-*")
    return path, read, None


def _pixels(run: RunDir) -> Case:
    files = FilePaths(sorted(map(str, Path("photos").rglob("*.png"))))
    return _cached(files, ".pixels", 1 << 30)


def _checked(run: RunDir) -> Case:
    from convlens.data.sources import find_source

    shards(Path("sharded"), {"train": 20})
    files = find_source("sharded").parts["train"].images
    assert isinstance(files, tar_index.TarMembers)
    return _cached(files, ".checked", 0)


def _cached(files: Any, suffix: str, budget: int) -> Case:
    def read() -> Any:
        found = cache.decode_images(files, CONVERSION, memory_budget=budget)
        rows = found.rows.gather(torch.arange(len(files)))
        return found.content, found.bad, found.digests.tobytes(), rows.numpy().tobytes()

    read()
    (path,) = cache.cache_folder().glob(f"*{suffix}")
    return path, read, None


def _index(run: RunDir) -> Case:
    root = shards(Path("sharded"), {"train": 20})
    paths = sorted(map(str, Path(root).rglob("*.tar")))

    def read() -> Any:
        index, times = tar_index.tar_index(paths)
        arrays = (index.shard, index.offset, index.size, index.label, times)
        entries = (index.labels, list(index.keys), index.ignored)
        return [array.tobytes() for array in arrays], entries

    read()
    (path,) = cache.cache_folder().glob("*.index")
    return path, read, None


def _plans(run: RunDir) -> Case:
    cache.cache_folder().mkdir(parents=True, exist_ok=True)
    for key in ("a" * 64, "b" * 64):
        plan = Plan("cpu", "fp32", "channels_last", micro_batch_size=32)
        autotune._store_timings(
            key, autotune.TunedPlan(plan, {"fp32 contiguous": 1.5, str(plan): 1.25})
        )
    return cache.cache_folder() / "plans.json", autotune._load_timings, {}


def _state(run: RunDir) -> Case:
    """Two checkpoints: if the newer one is damaged, the older one is read."""
    folder = run.path / "two-states"

    def read() -> Any:
        found = serialization.CheckpointStore(folder).read()
        return found and (found.counters, {k: t.tolist() for k, t in found.tensors.items()})

    store, contents = serialization.CheckpointStore(folder), []
    for epoch in (1, 2):
        weights = {"model.weight": torch.full((5,), float(epoch)), "model.bias": torch.ones(2)}
        store.save(weights, {"position": {"epoch": epoch, "step": 0}, "rows": [{"loss": 0.5}]})
        contents.append(read())
    return folder / "0002-000000.safetensors", read, contents[0]


FILES: dict[str, Callable[[RunDir], Case]] = {
    "state": _state,
    "model.safetensors": _model,
    "run.json": _run_json,
    "results.json": _results,
    "metrics.csv": _metrics,
    "recipe.yaml": _recipe,
    "images.csv.gz": _images,
    "answers": _predictions,
    "pixels": _pixels,
    "checked": _checked,
    "index": _index,
    "plans.json": _plans,
}
WITHOUT_CHECKSUM = {"run.json", "results.json", "metrics.csv", "plans.json"}


@pytest.mark.parametrize("name", FILES)
def test_damage_is_reported_repaired_or_has_no_effect(run: RunDir, name: str) -> None:
    path, read, gone = FILES[name](run)
    has_checksum = name not in WITHOUT_CHECKSUM
    found = score(path, read, CASES, seed=1, gone=gone, has_checksum=has_checksum)
    assert found.wrong == []
    assert sum(found.counts.values()) == CASES


@pytest.mark.slow
def test_more_than_ten_thousand_damaged_files(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, total = [], 0
    for name, make in FILES.items():
        path, read, gone = make(run)
        has_checksum = name not in WITHOUT_CHECKSUM
        found = score(path, read, SLOW_CASES, seed=2, gone=gone, has_checksum=has_checksum)
        total += SLOW_CASES
        wrong += [f"{name}: {each}" for each in found.wrong]
        shutil.rmtree("sharded", ignore_errors=True)
        shutil.rmtree(run.path / "two-states", ignore_errors=True)
        shutil.rmtree(cache.cache_folder(), ignore_errors=True)
        with capsys.disabled():
            print(f"\n{name}: {found}; {len(found.wrong)} wrong", end="")
    with capsys.disabled():
        print(f"\n{total} damaged files, {len(wrong)} read wrong or with a traceback")
    assert total >= 10_000
    assert wrong == []


# Error messages


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("file", ["run.json", "results.json", "metrics.csv"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"3", b"[" * 100_000])
def test_a_text_file_that_does_not_parse_is_a_clear_error(
    run: RunDir, file: str, content: bytes
) -> None:
    before = run.model_path.read_bytes()
    (run.path / file).write_bytes(content)
    refused(here("report", "original"), 4, file)
    if file == "run.json":
        again = ("train", "photos", "model.widths=[4]", "train.epochs=3", "augment=[]", "--name")
        refused(here(*again, "original"), 4, "run.json", "--fresh")
    if file == "results.json":
        refused(here("evaluate", "original"), 4, "results.json")
    if file == "metrics.csv":
        assert here("evaluate", "original").code == 0  # neither weights nor results depend on it
    assert run.model_path.read_bytes() == before


def test_hashes_that_earlier_versions_wrote_into_json_are_ignored(run: RunDir) -> None:
    metadata, log = run.metadata(), run.evaluation_log()
    for name, content in (("run.json", metadata), ("results.json", log)):
        entries = content if isinstance(content, list) else [content]
        old = [{"format": 1, "sha256": "0" * 64, **entry} for entry in entries]
        text = json.dumps(old if isinstance(content, list) else old[0])
        (run.path / name).write_text(text)
    run.update_metadata({"metrics_sha256": "0" * 64})
    assert run.metadata() == {**metadata, "metrics_sha256": "0" * 64}
    assert run.evaluation_log() == log
    assert len(run.metrics()) == 3


def test_an_edited_recipe_file_starts_another_run(run: RunDir) -> None:
    path = run.path / "recipe.yaml"
    replace_text(path, "epochs: 3", "epochs: 1")
    refused(here("labels", run.path, "--folds", "2"), 4, "changed after the run started")
    done = here("train", path, "--no-test", "--json")  # an edited recipe: a new run
    assert done.code == 0, done.err
    assert done.json["run"] != "original"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "epoch\n",
        "epoch,loss\n1,2\n",
        "epoch,lr\n1\n",
        "epoch,lr\n2,1\n",
        "epoch,lr\n1,x\n",
        "epoch,lr\n1,2,3\n",
        'epoch,lr\n1,"2',
        "epoch,lr\n1,0.1\n1,0.1\n",
    ],
)
def test_the_metrics_of_an_unfinished_run_are_read_strictly(run: RunDir, text: str) -> None:
    run.update_metadata({"status": "training"})
    run.metrics_path.write_text(text)
    if text == "epoch\n":
        assert run.metrics() == []
    else:
        refused(
            here("diagnose", "original"),
            4,
            "metrics.csv cannot be used",
            "models/original/metrics.csv",
        )


def test_a_damaged_cache_is_rebuilt(run: RunDir) -> None:
    """One flipped pixel: the image is decoded again and the next start rebuilds the cache."""
    path, read, _ = _pixels(run)
    original, expected = path.read_bytes(), read()
    path.write_bytes(original[:100] + bytes([original[100] ^ 4]) + original[101:])
    assert read() == expected
    assert not path.exists()
    assert read() == expected
    assert path.read_bytes() == original


def test_a_damaged_cache_without_its_image_file_is_an_error(run: RunDir) -> None:
    from convlens.errors import DataError

    files = FilePaths(sorted(map(str, Path("photos").rglob("*.png"))))
    found = cache.decode_images(files, CONVERSION, memory_budget=1 << 30)
    (path,) = cache.cache_folder().glob("*.pixels")
    with path.open("r+b") as file:
        file.write(b"\x99" * 3)
    Path(files[0]).unlink()
    with pytest.raises(DataError, match="can't be read any more"):
        found.rows.gather(torch.arange(2))


# Checksums


def test_checksums_detect_changed_bytes() -> None:
    for content in (b"", b"x", bytes(100)):
        original = add_checksum(content)
        assert verify_checksum(original) == content
        for broken in (original[:-1], original + b"\0", content, b"x" * 40):
            with pytest.raises(CorruptError):
                verify_checksum(broken)


def test_channel_sums_detect_every_flipped_bit() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 8, 8), np.uint8)
    before = image_checksums(image)[0]
    for at in range(64 * 8):
        flipped = image.copy()
        flipped.reshape(-1)[at // 8] ^= 1 << (at % 8)
        assert image_checksums(flipped)[0] != before
    assert image_checksums(np.zeros((0, 1, 8, 8), np.uint8)).tolist() == []
