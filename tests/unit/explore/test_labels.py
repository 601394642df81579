from __future__ import annotations

import csv
import http.client
import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import convlens
from convlens.explore.jobs import JobCancelled
from convlens.explore.label_review import Decisions
from helpers.commands import start
from helpers.exploring import Page, open_page
from helpers.reviews import HOSTILE, review_table

TAB, OTHER = "tab-of-one-browser", "tab-of-another"


@pytest.fixture
def page(explored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    """A client in a folder with a list of suspects and a run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(explored / "models", tmp_path / "models")
    review_table(tmp_path, suspects=4)
    with open_page() as page:
        yield page


def ask(page: Page, name: str, /, **body: Any) -> Any:
    return page.post(f"/api/labels/{name}", {"review": "photos", **body})


def decide(page: Page, number: int, decision: str, known: int, /, **more: Any) -> Any:
    body = {"number": number, "decision": decision, "page": TAB, "known": known}
    return ask(page, "decide", **(body | more))


def lines() -> list[list[str]]:
    with Path("plots/labels-photos/decisions.csv").open(newline="") as file:
        return [[Path(row[3]).name, *row[4:6]] for row in list(csv.reader(file))[1:]]


def test_suspects_are_listed_with_their_images(page: Page) -> None:
    assert page.post("/api/labels/lists", {}) == {"lists": ["photos"], "job": None}
    shown = ask(page, "open")
    assert (shown["total"], shown["known"], shown["of_files"]) == (4, 0, True)
    assert shown["classes"] == sorted(["blue", "green", HOSTILE])
    assert shown["suspects"][1] == {
        "name": "<b>1<b>.png",
        "label": "green",
        "split": "train",
        "suggested": HOSTILE,
        "score": 0.02,
        "p_suggested": 0.93,
        "copies": "",
        "decision": None,
    }
    assert ask(page, "image", number=1)["source"].startswith("data:image/png")
    for number in (4, 99):
        assert page.send("/api/labels/image", {"review": "photos", "number": number}).is_error
    for review in ("", "x", "../small", "labels-photos/labels.csv"):
        assert page.send("/api/labels/open", {"review": review}).status_code == 400


def test_each_decision_is_in_the_file_when_it_is_answered(page: Page) -> None:
    ask(page, "open")
    assert decide(page, 0, "keep", 0)["accepted"]
    assert lines() == [["photo 0.png", "keep", ""]]
    answered = decide(page, 1, "change", 1, label=HOSTILE)
    assert answered["changes"] == {"1": {"kind": "change", "label": HOSTILE}}
    assert lines()[1] == ["<b>1<b>.png", "change", HOSTILE]
    decide(page, 2, "delete", 2)
    assert ask(page, "undo", page=TAB, known=3)["number"] == 2
    page.workspace.jobs.data.wait_until_idle(20)
    with Path("plots/labels-photos/corrected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["blue", HOSTILE, HOSTILE, "blue", "green", HOSTILE]
    for wrong in (
        {"decision": "change"},
        {"decision": "change", "label": "nope"},
        {"decision": "keep", "label": "blue"},
        {"decision": "burn"},
        {"number": 77},
        {"page": ""},
    ):
        body = {"review": "photos", "number": 0, "decision": "keep", "page": TAB, "known": 0}
        assert page.send("/api/labels/decide", body | wrong).status_code == 400
    assert len(lines()) == 4


def test_two_tabs_interleave(page: Page) -> None:
    ask(page, "open")
    assert decide(page, 0, "keep", 0)["accepted"]
    refused = decide(page, 0, "delete", 0, page=OTHER)
    assert refused["accepted"] is False
    assert refused["changes"] == {"0": {"kind": "keep", "label": ""}}
    assert decide(page, 0, "delete", refused["known"], page=OTHER)["accepted"]
    assert decide(page, 1, "skip", 1)["changes"].keys() == {"0", "1"}
    assert ask(page, "undo", page=TAB, known=3)["number"] == 1
    nothing = page.send("/api/labels/undo", {"review": "photos", "page": TAB, "known": 4})
    assert nothing.json()["error"] == "there is nothing to undo"
    assert ask(page, "undo", page=OTHER, known=4)["number"] == 0
    assert ask(page, "open")["suspects"][0]["decision"] == {"kind": "keep", "label": ""}


def test_unreadable_image_can_still_be_deleted(page: Page) -> None:
    Path("photos/photo 0.png").write_bytes(b"broken")
    refused = page.send("/api/labels/image", {"review": "photos", "number": 0})
    assert refused.status_code == 422
    assert decide(page, 0, "delete", 0)["accepted"]


def test_training_again_shows_the_command_and_makes_a_run(page: Page) -> None:
    review_table(Path.cwd(), suspects=2, clean=40)
    ask(page, "open")
    decide(page, 0, "delete", 0)
    body = {"run": "small", "name": ""}
    shown = ask(page, "command", **body)
    assert shown["name"] == "small-corrected"
    assert shown["delete"] == 1
    assert shown["command"].startswith("convlens train ")
    assert "--data plots/labels-photos/corrected.csv" in shown["command"]
    assert shown["command"].endswith("--name small-corrected --no-test")
    for name in ("../x", "a/b", "--fresh", "x y"):
        refused = page.send("/api/labels/train", {"review": "photos", "run": "small", "name": name})
        assert refused.status_code == 400
    state = ask(page, "train", **body)
    end = time.monotonic() + 120
    while state["state"] == "running" and time.monotonic() < end:
        time.sleep(0.1)
        state = page.post("/api/labels/training", {"training": state["id"]})
    assert state["state"] == "done", state
    run = convlens.Run.load("models/small-corrected")
    assert run.run_dir.is_finished
    assert run.run_dir.recipe().data.name.endswith("corrected.csv")
    assert "small-corrected" in page.get("/api/runs")["runs"]


def test_suspects_are_found_with_progress(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = page.post("/api/labels/find", {"run": "small", "folds": 2})["job"]
    assert page.post("/api/labels/find", {"run": "small", "folds": 3})["job"] == job
    assert page.post("/api/labels/lists", {})["job"] == job
    page.result(job, seconds=300)
    state = page.get(f"/api/jobs/{job}")
    assert (state["done"], state["total"]) == (6, 6)  # epochs of both models
    assert page.post("/api/labels/lists", {})["lists"] == ["photos", "small"]
    shown = page.post("/api/labels/open", {"review": "small"})
    assert shown["total"] > 0
    assert shown["of_files"] is False  # digits are arrays
    body = {"review": "small", "number": 0, "decision": "keep", "page": TAB, "known": 0}
    assert "not files" in page.send("/api/labels/decide", body).json()["error"]
    body = {"review": "small", "run": "small"}
    assert "not files" in page.send("/api/labels/command", body).json()["error"]


def test_search_for_suspects_can_be_cancelled(page: Page) -> None:
    job = page.post("/api/labels/find", {"run": "small", "folds": 2})["job"]
    page.client.delete(f"/api/jobs/{job}", headers={"origin": str(page.client.base_url)})
    page.workspace.jobs.commands.wait_until_idle(60)
    assert page.get(f"/api/jobs/{job}")["state"] == "cancelled"
    found = page.workspace.jobs.find(job)
    assert found is not None
    assert isinstance(found.future.exception(), JobCancelled)
    assert page.send("/api/labels/find", {"run": "nope"}).status_code == 400


def test_decisions_survive_a_killed_server(
    explored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tabs post as fast as they can until the server is killed in the middle."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(explored / "models", tmp_path / "models")
    review_table(tmp_path, suspects=400, clean=0, size=8)
    server = start("explore", "--no-open", "small")
    assert server.stdout is not None
    try:
        url = server.stdout.readline().strip()
        acknowledged: dict[str, list[int]] = {TAB: [], OTHER: []}

        def post(tab: str, numbers: range) -> None:
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            opener.open(url).close()
            base = url.partition("?")[0]
            headers = {"origin": base.rstrip("/"), "content-type": "application/json"}
            for number in numbers:
                body = {"number": number, "decision": "keep", "page": tab, "known": 0}
                content = json.dumps({"review": "photos", **body}).encode()
                request = urllib.request.Request(f"{base}api/labels/decide", content, headers)
                try:
                    with opener.open(request, timeout=60) as answer:
                        assert json.load(answer)["accepted"]
                except (OSError, http.client.HTTPException):
                    return
                acknowledged[tab].append(number)

        tabs = [
            threading.Thread(target=post, args=(TAB, range(200))),
            threading.Thread(target=post, args=(OTHER, range(200, 400))),
        ]
        for tab in tabs:
            tab.start()
        end = time.monotonic() + 120
        while min(map(len, acknowledged.values())) < 15 and time.monotonic() < end:
            time.sleep(0.001)
        server.kill()
        for tab in tabs:
            tab.join()
    finally:
        server.kill()
        server.communicate()
    decisions = Decisions(tmp_path / "plots/labels-photos/decisions.csv")
    decisions.refresh()
    for tab, numbers in acknowledged.items():
        assert 15 <= len(numbers) < 200
        written = [line.image for line in decisions.lines if line.page == tab]
        first = 0 if tab == TAB else 200
        shown = [Path(image).name for image in written[: len(numbers)]]
        assert shown == [
            f"<b>{n}<b>.png" if n % 2 else f"photo {n}.png"
            for n in range(first, first + len(shown))
        ]
        assert len(written) - len(numbers) in (0, 1)  # the last may not have been answered
    with open_page(["small"]) as page:  # a new server carries them out
        ask(page, "open")
        assert Path("plots/labels-photos/corrected.csv").is_file()
