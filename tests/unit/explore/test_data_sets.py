from __future__ import annotations

import base64
import io
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convlens import run_plots
from convlens.data.audit import audit
from convlens.explore import data_sets
from convlens.explore.data_sets import IMAGES_PER_PAGE, VIEWS
from helpers.commands import pictures
from helpers.exploring import Page, open_page
from helpers.reviews import HOSTILE
from helpers.support import working_in

RUN, SET = "run:small", "set:0"


@pytest.fixture(scope="module")
def page(explored: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A client of a server for the run `small` and a folder with copies and a broken file."""
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(explored / "models", root / "models")
    folder = pictures(root / "photos", {"blue": 20, HOSTILE: 20})
    for number in range(12):
        shutil.copy(folder / f"blue/{number:03}.png", folder / f"blue/copy{number}.png")
    shutil.copy(folder / "blue/000.png", folder / HOSTILE / "same.png")
    (folder / "blue/broken.png").write_bytes(b"no image")
    with working_in(root), open_page(["small"], data=["photos"]) as page:
        yield page


def opened(page: Page, set_id: str) -> Any:
    return page.result(page.post("/api/data/open", {"set": set_id})["job"])


def images(page: Page, set_id: str, split: str, /, **more: Any) -> Any:
    return page.post("/api/data/images", {"set": set_id, "split": split, **more})


def test_sets_are_those_of_runs_and_of_the_command(page: Page) -> None:
    assert page.post("/api/data/sets", {})["sets"] == [
        {"id": SET, "name": "photos"},
        {"id": RUN, "name": "data of small"},
    ]
    numbers = ("set:1", "set:-1", "set:00", "set:+0", "set:\u0660", "set:" + "9" * 4000, "set:x")
    for unknown in (*numbers, "photos", "", "run:nope", "run:../x", "/etc"):
        assert page.send("/api/data/open", {"set": unknown}).status_code == 400


def test_classes_and_splits_are_counted(page: Page) -> None:
    run = opened(page, RUN)
    data = page.workspace.open("small").data()
    assert run["splits"] == {
        "train": len(data.train),
        "val": len(data.val),
        "test": data.summary.splits["test"],
    }
    assert [each["train"] for each in run["classes"]] == [8] * 10
    assert sum(each["test"] for each in run["classes"]) == run["splits"]["test"]
    photos = opened(page, SET)
    assert [each["name"] for each in photos["classes"]] == [HOSTILE, "blue"]
    counts = {
        each["name"]: sum(each[s] for s in ("train", "val", "test")) for each in photos["classes"]
    }
    assert counts == {HOSTILE: 21, "blue": 32}  # without the broken file


def test_pages_hold_all_images_of_a_split_and_class_once(page: Page) -> None:
    facts = opened(page, RUN)
    data = page.workspace.open("small").data()
    size = facts["splits"]["val"]
    shown = []
    for number in range(-(-size // IMAGES_PER_PAGE) + 1):
        answer = images(page, RUN, "val", page=number)
        assert answer["total"] == size
        shown += answer["images"]
    assert [each["number"] for each in shown] == list(range(size))
    assert [each["name"] for each in shown] == [str(i) for i in data.val.ids]
    assert [each["label"] for each in shown] == [data.classes[n] for n in data.val.labels]
    sevens = images(page, RUN, "val", label="7")
    assert sevens["total"] == int((data.val.labels == 7).sum())
    assert Counter(each["label"] for each in sevens["images"]).keys() == {"7"}
    content = base64.b64decode(shown[3]["source"].partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    assert (pixels == data.val.rows.gather(torch.tensor([3]))[0, 0].numpy()).all()
    assert (
        page.send("/api/data/images", {"set": RUN, "split": "val", "label": "nope"}).status_code
        == 400
    )


def test_image_is_shown_as_the_epochs_of_a_training_show_it(page: Page) -> None:
    opened(page, SET)
    shown = page.post("/api/data/image", {"set": SET, "split": "train", "number": 2})
    assert shown["name"] == images(page, SET, "train")["images"][2]["name"]
    assert len(set(shown["views"])) > 1
    assert len(shown["views"]) == VIEWS
    too_far = {"set": SET, "split": "train", "number": 9999}
    assert page.send("/api/data/image", too_far).status_code == 400


def test_a_named_set_is_read_and_augmented_as_its_training_would(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photographs start with pretrained weights, which changes their size and crops."""
    from convlens.training import transfer

    pictures(Path("large"), {"blue": 8, "red": 8}, size=64)
    monkeypatch.setattr(transfer, "backbones_for", lambda recipe: [("resnet18", "default")])
    monkeypatch.setattr(page.workspace, "data_names", ["large"])
    found = data_sets._open_named_set(page.workspace, SET)
    assert found.data.image_size == transfer.SMALL_FINE_TUNING_SIZE
    assert ("RandomResizedCrop", 96) in [(n, a.get("size")) for n, a in found.recipe.operations]


def test_views_are_those_of_the_training_pipeline() -> None:
    from convlens.data.loader import to_unit
    from convlens.data.transforms.random import SampleInfo
    from convlens.device import derive_seed
    from helpers.support import images_of, tiny

    recipe = tiny("augment=[{RandomCrop: {padding: 2}}, {MixUp: {alpha: 0.4}}]")
    data = images_of(recipe)
    views = run_plots.augmented_views(recipe, data, data.train, 5, 3)
    assert views.shape == (3, 1, 8, 8)
    augment = run_plots.augmentation(recipe, data)
    number = torch.tensor([5, 0, 39, 79])
    batch = to_unit(data.train.rows.gather(number))
    for epoch, view in enumerate(views, 1):
        generator = torch.Generator().manual_seed(derive_seed(0, epoch, 0))
        expected, _ = augment(
            batch, data.train.labels[number], SampleInfo(number, epoch, seed=0), generator
        )
        assert (view == expected[0].clamp(0, 1).mul(255).round().numpy()).all()
    assert len(run_plots.augmented_views(tiny("augment=[]"), data, data.train, 5, 3)) == 0


def test_copies_and_unreadable_files_are_those_of_the_audit(page: Page) -> None:
    opened(page, SET)
    job = page.post("/api/data/check", {"set": SET})["job"]
    found = page.result(job)
    expected = audit(page.client.app.state.data_sets[SET].recipe.data)  # type: ignore[attr-defined]
    assert found["exact"]["total"] == expected.duplicates.groups == 12
    assert found["exact"]["across_splits"] == expected.duplicates.across_splits
    assert [each["name"] for each in found["unreadable"]] == ["blue/broken.png"]
    test_ids = {
        identity
        for group in expected.duplicates.listed
        for identity, split in zip(group.ids, group.splits, strict=True)
        if split == "test"
    }
    assert test_ids  # there are copies in the sealed split
    text = str(found)
    assert not [identity for identity in test_ids if repr(identity) in text]
    assert "'sealed': True" in text
    shown = [i for group in found["exact"]["groups"] for i in group["images"] if "source" in i]
    assert {each["split"] for each in shown} <= {"train", "val"}
    assert all(each["source"].startswith("data:image/") for each in shown)


def test_test_split_is_sealed_until_a_run_opens_it(page: Page) -> None:
    for set_id in (RUN, SET):
        opened(page, set_id)
        for path in ("images", "image"):
            body = {"set": set_id, "split": "test"} | ({"number": 0} if path == "image" else {})
            refused = page.send(f"/api/data/{path}", body)
            assert refused.status_code == 400
            assert "sealed" in refused.json()["error"]
    assert page.send("/api/data/open-test", {"set": SET}).status_code == 400
    log = page.workspace.open("small").subject.run_dir
    assert log is not None
    assert log.evaluation_log() == []
    for _ in range(2):
        assert page.post("/api/data/open-test", {"set": RUN}) == {"test_uses": 1}
    shown = images(page, RUN, "test")
    test = page.workspace.open("small").split("test")
    assert shown["total"] == len(test)
    assert [each["name"] for each in shown["images"]] == list(map(str, test.ids[:IMAGES_PER_PAGE]))
    assert [e["by"] for e in log.evaluation_log()] == ["explore"]
    assert page.send("/api/data/images", {"set": SET, "split": "test"}).status_code == 400
