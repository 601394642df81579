"""The parts Labels and Data of `convlens explore` in a real browser, with keys and clicks."""

from __future__ import annotations

import csv
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import convlens
from helpers.browser import Browser, browser, check_browser
from helpers.commands import pictures
from helpers.exploring import running_page
from helpers.reviews import HOSTILE, review_table
from helpers.support import TINY, working_in

DESK, PHONE = (1280, 900), (390, 844)
LEFT, RIGHT = "\ue012", "\ue014"
TITLE = "return document.getElementById('image-title').textContent"
DECISION = "return document.getElementById('decision').textContent"
TEXT = "return document.querySelector(arguments[0]).textContent"
IMAGES = "return document.querySelectorAll('#images img').length"


@pytest.fixture(scope="module", autouse=True)
def require_browser() -> None:
    check_browser()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on digits, a list of suspects, and images with a hostile class."""
    root = tmp_path_factory.mktemp("explored")
    review_table(root, suspects=8, size=48)
    folder = pictures(root / "shapes", {"blue": 130, HOSTILE: 20})
    shutil.copy(folder / "blue/000.png", folder / "blue/<i>copy.png")
    shutil.copy(folder / "blue/000.png", folder / HOSTILE / "same.png")
    (folder / "blue/broken.png").write_bytes(b"no image")
    with working_in(root):
        convlens.train(TINY, name="one", test=False, quiet=True)
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with working_in(root), running_page("one", "--data", "shapes") as url:
        yield url


@pytest.fixture(scope="module")
def window(address: str) -> Iterator[Browser]:
    with browser() as window:
        window.size(*DESK)
        window.open(address)
        yield window


@pytest.fixture
def base(address: str) -> str:
    return address.partition("?")[0]


@pytest.fixture
def labels(window: Browser, base: str, root: Path) -> Iterator[Browser]:
    """The part Labels without decisions."""
    for file in ("decisions.csv", "corrected.csv"):
        (root / "plots/labels-photos" / file).unlink(missing_ok=True)
    window.size(*DESK)
    window.open(base + "labels")
    window.until("return document.getElementById('picture').naturalWidth")
    yield window
    assert window.console() == []


@pytest.fixture
def data(window: Browser, base: str) -> Iterator[Browser]:
    window.size(*DESK)
    window.open(base + "data")
    window.until(IMAGES)
    yield window
    assert window.console() == []


def decisions(root: Path) -> list[list[str]]:
    """Return name, decision and class of the lines on the disk."""
    with (root / "plots/labels-photos/decisions.csv").open(newline="") as file:
        return [[Path(row[3]).name, *row[4:6]] for row in list(csv.reader(file))[1:]]


def change(page: Browser, element: str, value: str) -> None:
    page.do(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('change'))",
        element,
        value,
    )


def title_is(page: Browser, text: str) -> None:
    page.until("return document.getElementById('image-title').textContent === arguments[0]", text)


def test_labels_are_decided_by_keys(labels: Browser, root: Path) -> None:
    assert labels.do(TITLE) == "photo 0.png"
    labels.press("k")
    title_is(labels, "<b>1<b>.png")
    assert labels.do("return document.querySelector('#image-title b, #choices img')") is None
    labels.press("1")  # the suggested class
    title_is(labels, "photo 2.png")
    labels.press("d")
    title_is(labels, "<b>3<b>.png")
    labels.press("s")
    title_is(labels, "photo 4.png")
    labels.press("2")  # the other class
    title_is(labels, "<b>5<b>.png")
    labels.press("u")
    title_is(labels, "photo 4.png")
    assert labels.do(DECISION) == "none yet"
    labels.press(LEFT)
    title_is(labels, "<b>3<b>.png")
    assert labels.do(DECISION) == "skipped"
    labels.press("d", "k")  # faster than the server: both, in this order
    labels.until(
        "return document.getElementById('list-facts').textContent.startsWith('5 of 8 decided, in')"
    )
    assert decisions(root) == [
        ["photo 0.png", "keep", ""],
        ["<b>1<b>.png", "change", HOSTILE],
        ["photo 2.png", "delete", ""],
        ["<b>3<b>.png", "skip", ""],
        ["photo 4.png", "change", "blue"],
        ["photo 4.png", "undo", ""],
        ["<b>3<b>.png", "delete", ""],
        ["photo 4.png", "keep", ""],
    ]
    labels.open(labels.do("return location.href"))
    title_is(labels, "<b>5<b>.png")  # the first that is left
    labels.press("u")  # after a reload, too
    title_is(labels, "photo 4.png")


def test_labels_are_decided_by_clicks_and_training_asks_first(labels: Browser, root: Path) -> None:
    labels.click("[data-kind=delete]")
    title_is(labels, "<b>1<b>.png")
    labels.click("#choices button")
    title_is(labels, "photo 2.png")
    labels.click("#undo")
    title_is(labels, "<b>1<b>.png")
    labels.click("#next")
    title_is(labels, "photo 2.png")
    labels.click("#train")
    labels.until("return !document.getElementById('confirm-yes').disabled")
    command = labels.do(TEXT, "#confirm-command")
    assert command.startswith("convlens train ")
    assert command.endswith(
        " --data plots/labels-photos/corrected.csv --name one-corrected --no-test"
    )
    assert "0 labels are changed and 1 images left out" in labels.do(TEXT, "#confirm-facts")
    labels.click("#confirm-no")
    assert not (root / "models/one-corrected").exists()


def test_two_tabs_see_the_decisions_of_each_other(labels: Browser, root: Path) -> None:
    send = """
        const done = arguments[arguments.length - 1];
        const body = {review: 'photos', number: 0, decision: 'delete', label: '',
                      page: 'another-tab', known: 0};
        fetch('/api/labels/decide', {method: 'POST', body: JSON.stringify(body),
              headers: {'content-type': 'application/json'}}).then((r) => r.json()).then(done);
    """
    assert labels.wait(send)["accepted"]
    labels.press("k")
    labels.until("return document.getElementById('messages').textContent.includes('Another tab')")
    assert labels.do(TITLE) == "photo 0.png"
    assert labels.do(DECISION) == "delete the image"
    labels.press("k")
    title_is(labels, "<b>1<b>.png")
    labels.until(f"return (function () {{{TEXT}}})('#list-facts').includes(' decided, in ')")
    assert [line[1] for line in decisions(root)] == ["delete", "keep"]


def test_data_set_is_browsed_by_class_page_and_image(data: Browser) -> None:
    assert data.do("return document.querySelector('#set').value") == "set:0"
    assert data.do("return document.querySelector('#classes img')") is None
    first = data.do("return document.querySelector('#images button').title")
    total = int(data.do(TEXT, "#images-title").split()[0])
    assert total > 96
    assert data.do(IMAGES) == 96
    data.press(RIGHT)
    data.until("return document.getElementById('page').value == 2")
    assert data.do(IMAGES) == total - 96
    data.click("#previous")
    data.until("return document.querySelector('#images button').title === arguments[0]", first)
    data.do("document.querySelectorAll('#classes button')[1].click()")
    data.until(
        "return document.getElementById('images-title').textContent.includes(arguments[0])", HOSTILE
    )
    data.click("#images button")
    data.until("return document.querySelectorAll('#views img').length == 12")
    assert data.do(TITLE) == HOSTILE
    facts = data.do(TEXT, "#image-facts")
    data.press(RIGHT)
    data.until("return document.getElementById('image-facts').textContent !== arguments[0]", facts)
    data.click("#image-close")


def test_copies_and_unreadable_files_are_shown(data: Browser) -> None:
    data.click("#check")
    data.until("return !document.getElementById('found').hidden")
    found = data.do(TEXT, "#found")
    assert "1 unreadable file." in found
    assert "blue/broken.png" in found
    assert "1 group of equal images" in found
    assert data.do("return document.querySelectorAll('#found .group').length") >= 1


def test_test_split_asks_before_it_is_opened(data: Browser, root: Path) -> None:
    change(data, "split", "test")
    data.until("return document.getElementById('sealed').open")
    assert data.do("return document.getElementById('open-sealed').disabled")  # no run, no log
    data.click("#keep-sealed")
    change(data, "set", "run:one")
    data.until("return document.querySelector('#images button')?.title.startsWith('digits/')")
    change(data, "split", "test")
    data.until("return document.getElementById('sealed').open")
    uses = convlens.Run.load(root / "models/one").run_dir.evaluation_log
    assert uses() == []
    data.click("#open-sealed")
    data.until("return !document.getElementById('sealed').open")
    data.until("return document.getElementById('images-title').textContent.startsWith('270')")
    assert [entry["by"] for entry in uses()] == ["explore"]


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_both_parts_fit_and_axe_finds_no_problems(
    window: Browser, base: str, size: tuple[int, int], dark: bool
) -> None:
    spec = importlib.util.find_spec("axe_core_python")
    window.size(*size, dark=dark)
    for part, shown in (("labels", "#picture[src]"), ("data", "#images img")):
        window.open(base + part)
        window.until("return document.querySelector(arguments[0])", shown)
        assert window.do("return document.documentElement.scrollWidth") == size[0]
        color = window.do("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, color[4:-1].split(","))) < 200) == dark
        if spec is not None and spec.origin is not None:
            script = (Path(spec.origin).parent / "axe.min.js").read_text("utf-8")
            window.do(script)
            result = window.wait("axe.run().then(arguments[arguments.length - 1])")
            assert [
                (rule["id"], node["target"], node["failureSummary"])
                for rule in result["violations"]
                for node in rule["nodes"][:3]
            ] == []
    assert window.console() == []
