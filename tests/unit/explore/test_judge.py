from __future__ import annotations

import io
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convlens
from convlens import run_plots
from convlens.errors import UsageError
from convlens.explore import judge
from convlens.explore.jobs import MAX_WAITING
from convlens.reports.compare import compare_with_first
from convlens.reports.contents import ReportContents
from helpers.commands import pictures
from helpers.exploring import Page, open_page
from helpers.reports import HOSTILE_CLASSES
from helpers.support import TINY

HOSTILE_NET = {"data.image_size": 8, "model.widths": [2, 4], "train.epochs": 1, "augment": []}


@pytest.fixture(scope="module")
def root(explored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `small`, `longer` and `hostile`, whose test splits are sealed."""
    root = tmp_path_factory.mktemp("judged")
    shutil.copytree(explored / "models", root / "models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("CONVLENS_CACHE", str(root / "cache"))
        convlens.train(TINY, {"train.epochs": 5}, name="longer", test=False, quiet=True)
        images = pictures(root / "images", dict.fromkeys(HOSTILE_CLASSES, 8))
        convlens.train(str(images), HOSTILE_NET, name="hostile", test=False, quiet=True)
    return root


@pytest.fixture(autouse=True)
def in_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work beside the runs; every test starts in a folder of its own otherwise."""
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def page(root: Path) -> Iterator[Page]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        with open_page() as page:
            yield page


def figures(page: Page, run: str = "small", split: str = "val") -> Any:
    return page.result(page.post("/api/judge/figures", {"run": run, "split": split})["job"])


def loaded(page: Page, run: str = "small", split: str = "val") -> str:
    """Return the id of the gallery, whose images have been loaded."""
    gallery: str = figures(page, run, split)["gallery"]
    page.result(page.post("/api/judge/load", {"gallery": gallery})["job"])
    return gallery


def html_of(content: Any, section: str) -> str:
    return next(str(each["html"]) for each in content["sections"] if each["id"] == section)


def contents_of(page: Page, run: str) -> ReportContents:
    figures(page, run)
    found: ReportContents = page.workspace.open(run).results["judged-val"]
    return found


def uses(name: str) -> list[dict[str, Any]]:
    """Return the logged uses of a run's test split."""
    log = convlens.Run.load(f"models/{name}").run_dir.evaluation_log()
    return [entry for entry in log if entry["split"] == "test"]


def test_figures_are_those_of_evaluate(page: Page) -> None:
    content = figures(page)
    result = convlens.evaluate("models/small", "val")
    assert f"{result.accuracy:.2%}" in html_of(content, "summary")
    cells = re.findall(
        r'data-cell="(\d+)-(\d+)"[^>]*>(\d+)</button>', html_of(content, "confusion")
    )
    shown = np.zeros((10, 10), int)
    for target, pred, count in cells:
        shown[int(target), int(pred)] = int(count)
    assert shown.tolist() == result.confusion
    assert content["images"] == result.n
    for name, scores in result.per_class.items():
        row = html_of(content, "classes").split(f'title="{name}"')[1].partition("</tr>")[0]
        assert f"<td>{scores['recall']:.1%}</td>" in row
    sections = [each["id"] for each in content["sections"]]
    assert sections == ["summary", "confusion", *judge.REPORT_SECTIONS]
    assert [each["id"] for each in content["inside"]] == list(judge.INSIDE)


def test_cached_predictions_are_not_computed_again(page: Page) -> None:
    content = figures(page)
    log = Path("models/small/results.json").read_text()
    with open_page() as other:
        # Read while long work is going on.
        ended = threading.Event()
        other.workspace.jobs.long.submit(lambda job: ended.wait(60))
        again = figures(other)
        ended.set()
    assert again["sections"] == content["sections"]
    assert Path("models/small/results.json").read_text() == log


def test_sections_have_no_styles_or_scripts_that_the_policy_blocks(page: Page) -> None:
    for content in (figures(page), figures(page, "hostile")):
        for section in content["sections"]:
            assert not re.search(r"<script|<style|\sstyle=|\son[a-z]+=", section["html"])


def test_hostile_names_are_escaped(page: Page) -> None:
    content = figures(page, "hostile")
    assert sorted(content["classes"]) == sorted(HOSTILE_CLASSES)
    html = "".join(each["html"] for each in content["sections"])
    assert "&lt;script&gt;alert(1)&lt;" in html
    gallery = loaded(page, "hostile")
    facts = page.post("/api/judge/image", {"gallery": gallery, "number": 0})
    assert facts["label"] in HOSTILE_CLASSES
    assert len(facts["top"]) == len(HOSTILE_CLASSES)


def test_lists_are_those_of_a_loop(page: Page) -> None:
    predictions = contents_of(page, "small").predictions
    assert predictions is not None
    gallery = figures(page)["gallery"]
    probs, labels = predictions.probs, predictions.labels.tolist()
    images = [
        (number, label, int(row.argmax()), float(row.max()), float(row[label]))
        for number, (row, label) in enumerate(zip(probs, labels, strict=True))
    ]
    orders = {"number": lambda i: i[0], "worst": lambda i: i[4], "unsure": lambda i: i[3]}
    mistake = next(each for each in images if each[1] != each[2])
    for order, key in orders.items():
        for only in ("all", "wrong", "right"):
            for target, pred in ((None, None), (mistake[1], None), (mistake[1], mistake[2])):
                body = {"gallery": gallery, "only": only, "order": order}
                content = page.post("/api/judge/list", body | {"target": target, "pred": pred})
                expected = sorted(
                    (
                        each
                        for each in images
                        if (only == "all" or (each[1] == each[2]) == (only == "right"))
                        and target in (None, each[1])
                        and pred in (None, each[2])
                    ),
                    key=key,
                )
                assert content["total"] == len(expected)
                assert content["numbers"] == [each[0] for each in expected]
                assert content["targets"] == [each[1] for each in expected]
                assert content["preds"] == [each[2] for each in expected]
                assert content["confidence"] == [round(each[3], 4) for each in expected]
    worst = page.post("/api/judge/list", {"gallery": gallery, "only": "wrong", "order": "worst"})
    assert worst["numbers"] == run_plots.worst_mistake_images(probs, predictions.labels).tolist()


def test_long_lists_end_and_say_so(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "MAX_LISTED", 3)
    content = page.post("/api/judge/list", {"gallery": figures(page)["gallery"]})
    assert content["numbers"] == [0, 1, 2]
    assert content["total"] > 3


def test_images_are_those_of_the_split(page: Page) -> None:
    gallery = loaded(page)
    split = page.workspace.open("small").split("val")
    for number in (0, 5, len(split) - 1):
        expected = split.rows.gather(torch.tensor([number]))[0, 0].numpy()
        for kind in ("thumbnails", "pictures"):
            sent = page.client.get(f"/api/judge/{kind}/{gallery}/{number}")
            assert sent.status_code == 200
            shown = np.array(Image.open(io.BytesIO(sent.content)).convert("L"))
            assert shown.tolist() == expected.tolist()
        facts = page.post("/api/judge/image", {"gallery": gallery, "number": number})
        assert facts["name"] == str(split.ids[number])
        assert facts["label"] == str(int(split.labels[number]))
        predictions = contents_of(page, "small").predictions
        assert predictions is not None
        assert facts["top"][0]["prob"] == pytest.approx(float(predictions.probs[number].max()))


def test_more_thumbnails_than_the_queue_holds_are_not_refused(page: Page) -> None:
    gallery, data = loaded(page), page.workspace.jobs.data
    paths = [f"/api/judge/thumbnails/{gallery}/{number % 10}" for number in range(MAX_WAITING + 8)]
    ended = threading.Event()
    data.submit(lambda job: ended.wait(60))
    with ThreadPoolExecutor(len(paths)) as pool:
        answers = [pool.submit(page.client.get, path) for path in paths]
        while len(data._waiting) < judge.IMAGES_AT_ONCE:
            time.sleep(0.01)
        ended.set()
        assert {answer.result(60).status_code for answer in answers} == {200}


def test_unknown_images_are_not_found(page: Page) -> None:
    gallery, count = loaded(page), figures(page)["images"]
    for path in (f"{gallery}/{count}", f"{gallery}/99999999999", "unknown/0", "..%2f..%2fx/0"):
        for kind in ("thumbnails", "pictures"):
            sent = page.client.get(f"/api/judge/{kind}/{path}")
            assert sent.status_code == 404
            assert set(sent.json()) == {"error", "where", "fix"}
    bodies: dict[str, dict[str, Any]] = {
        "image": {"number": 0},
        "list": {},
        "load": {},
        "section": {"section": "stages"},
    }
    for name, more in bodies.items():
        body = {"gallery": "unknown", **more}
        assert page.send(f"/api/judge/{name}", body).status_code == 400
    assert page.send("/api/judge/image", {"gallery": gallery, "number": -1}).status_code == 400


def test_old_galleries_are_dropped(page: Page) -> None:
    contents = contents_of(page, "small")
    opened = page.workspace.open("small")
    galleries = judge.Galleries()
    first = galleries.of(opened, contents)
    assert galleries.of(opened, contents) is first
    for _ in range(judge.MAX_GALLERIES):
        galleries.of(opened, replace(contents))
    with pytest.raises(UsageError):
        galleries.find(first.id)


def test_comparison_is_the_paired_test(page: Page) -> None:
    answer = page.post("/api/judge/compare", {"runs": ["small", "longer"], "split": "val"})
    content = page.result(answer["job"])
    first, other = contents_of(page, "small"), contents_of(page, "longer")
    assert first.predictions is not None
    assert other.predictions is not None
    right, also = (
        each.logits.argmax(1) == each.labels for each in (first.predictions, other.predictions)
    )
    (difference,) = compare_with_first(first, [other])
    assert difference.gained == sum(b and not a for a, b in zip(right, also, strict=True))
    assert difference.lost == sum(a and not b for a, b in zip(right, also, strict=True))
    (verdict,) = convlens.compare("models/small", "models/longer", split="val").verdicts
    assert verdict.test == "images"
    assert difference.points == pytest.approx(verdict.difference)
    assert difference.p == pytest.approx(verdict.p)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html_of(content, "differences"))
    assert cells[2:4] == [str(difference.gained), str(difference.lost)]
    assert "McNemar" in content["verdict"]


def test_runs_on_other_images_are_not_compared(page: Page) -> None:
    answer = page.post("/api/judge/compare", {"runs": ["small", "hostile"], "split": "val"})
    content = page.result(answer["job"])
    assert "not all evaluated on the same images" in content["verdict"]
    assert "differences" not in [each["id"] for each in content["sections"]]


def test_sections_look_inside_on_request(page: Page) -> None:
    body = {"gallery": figures(page)["gallery"], "section": "activations"}
    content = page.result(page.post("/api/judge/section", body)["job"])
    assert content["html"].count("<figure") >= 2
    assert content["missing"] == []


def test_test_split_stays_sealed_until_it_is_opened(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "models" / "small", tmp_path / "models" / "sealed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with open_page() as page:
            content = figures(page, "sealed")
            assert (content["test_is_open"], content["test_uses"]) == (False, 0)
            for name, body in (
                ("figures", {"run": "sealed", "split": "test"}),
                ("compare", {"runs": ["sealed", "sealed"], "split": "test"}),
            ):
                refused = page.send(f"/api/judge/{name}", body)
                assert refused.status_code == 400
                assert "sealed" in refused.json()["error"]
            assert uses("sealed") == []
            assert not list(Path("models/sealed/answers").glob("test-*"))

            assert page.post("/api/judge/open-test", {"run": "sealed"}) == {"test_uses": 1}
            tested = figures(page, "sealed", "test")
            assert (tested["test_is_open"], tested["test_uses"]) == (True, 1)
            gallery = loaded(page, "sealed", "test")
            assert page.client.get(f"/api/judge/thumbnails/{gallery}/0").status_code == 200
            page.post("/api/judge/list", {"gallery": gallery})
            page.post("/api/judge/open-test", {"run": "sealed"})
            assert [entry["by"] for entry in uses("sealed")] == ["explore"]
        with open_page() as page:  # sealed again, although the predictions are cached
            body = {"run": "sealed", "split": "test"}
            assert page.send("/api/judge/figures", body).status_code == 400
        result = convlens.evaluate("sealed", "test")
        assert result.looks == 2
        assert f"{result.accuracy:.2%}" in html_of(tested, "summary")


def test_unfinished_run_and_one_without_validation_say_what_is_missing(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "models" / "small", tmp_path / "models" / "unfinished")
    path = tmp_path / "models" / "unfinished" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("CONVLENS_CACHE", str(root / "cache"))
        bare = {"data.val_fraction": 0, "train.keep": "last", "train.epochs": 1}
        convlens.train(TINY, bare, name="bare", test=False, quiet=True)
        with open_page() as page:
            content = figures(page, "unfinished")
            assert content["gallery"] is None
            assert any("not finished" in line for line in content["missing"])
            assert content["inside"] == []
            page.workspace.jobs.long.wait_until_idle(20)
            path.write_text(path.read_text().replace('"running"', '"finished"'))
            assert figures(page, "unfinished")["images"] > 0
            content = figures(page, "bare")
            assert content["gallery"] is None
            assert any("no validation split" in line for line in content["missing"])
            page.post("/api/judge/open-test", {"run": "bare"})
            assert figures(page, "bare", "test")["images"] > 0
            assert len(uses("bare")) == 1
