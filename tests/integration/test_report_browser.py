"""Report pages in a real browser. Skipped without one, except in continuous integration."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import convlens
from helpers.browser import Browser, browser, check_browser
from helpers.commands import pictures
from helpers.support import working_in

NAMES = ("<script>alert(1)<", '"quoted" \'n $x$ &amp;', "قطة", "long " * 30 + "end")
DESK, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module", autouse=True)
def require_browser() -> None:
    check_browser()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one.html` of a run with hostile names, `two.html` of two runs."""
    root = tmp_path_factory.mktemp("pages")
    with working_in(root):
        images = pictures(root / "images", dict.fromkeys(NAMES, 20))
        net = {"data.image_size": 8, "model.widths": [2, 4], "augment": []}
        for epochs in (2, 3):
            convlens.train(
                str(images), {**net, "train.epochs": epochs}, name=f"run-{epochs}", quiet=True
            )
        convlens.report("run-2", output="one.html")
        convlens.report("run-2", "run-3", output="two.html")
        shutil.rmtree(images)
    return root


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as window:
        yield window


def rgb(window: Browser, selector: str, key: str) -> list[int]:
    """Return a computed color as three numbers."""
    text = window.do(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]",
        selector,
        key,
    )
    return [int(part) for part in text.removeprefix("rgb(").rstrip(")").split(",")]


@pytest.mark.parametrize("page", ["one.html", "two.html"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_opens_without_console_messages_or_requests(
    pages: Path, window: Browser, page: str, size: tuple[int, int], dark: bool
) -> None:
    window.requested()
    window.size(*size, dark=dark)
    window.open(pages / page)
    assert window.requested() == [(pages / page).as_uri()]
    assert window.console() == []
    width = window.do("return document.documentElement.scrollWidth")
    assert width == size[0]  # wide tables scroll inside the page
    assert (sum(rgb(window, "body", "backgroundColor")) < 200) == dark
    broken = window.do("return [...document.images].filter((i) => !i.naturalWidth).length")
    assert broken == 0


def test_links_lead_to_their_sections(pages: Path, window: Browser) -> None:
    window.size(*DESK)
    window.open(pages / "one.html")
    count = window.do("return document.querySelectorAll('nav a').length")
    assert count >= 8
    for number in range(1, count + 1):
        window.click(f"nav li:nth-child({number}) a")
        top, height = window.do(
            "const s = document.getElementById(location.hash.slice(1));"
            "return [s.getBoundingClientRect().top, window.innerHeight]"
        )
        assert 0 <= top < height


def test_clicked_cell_shows_its_images(pages: Path, window: Browser) -> None:
    window.size(*DESK)
    window.open(pages / "one.html")
    window.do("document.querySelector('[data-cell]').scrollIntoView({block: 'center'})")
    window.click("[data-cell]")
    label, pressed, count, sizes, title = window.do(
        "const b = document.querySelector('[data-cell]'), s = document.getElementById('shown');"
        "return [b.getAttribute('aria-label'), b.getAttribute('aria-pressed'), b.textContent,"
        " [...s.querySelectorAll('img')].map((i) => i.naturalWidth),"
        " s.querySelector('h3').textContent]"
    )
    assert pressed == "true"
    assert sizes == [8] * min(20, int(count))
    assert title in label
    assert (
        window.do("return document.getElementById('shown').getAttribute('aria-live')") == "polite"
    )
    assert window.console() == []


def test_cells_are_reachable_by_keyboard(pages: Path, window: Browser) -> None:
    window.size(*DESK)
    window.open(pages / "one.html")
    row, column = window.do(
        # The first cell gets the focus; arrow keys must lead on from it.
        "const all = [...document.querySelectorAll('[data-cell]')];"
        "all[0].focus(); return all[0].dataset.cell.split('-').map(Number)"
    )
    window.press("\ue015", "\ue014", "\ue007")  # down, right, enter: selects a cell
    focused = window.do("return document.activeElement.dataset.cell")
    selected = window.do("return document.querySelector('[aria-pressed=true]').dataset.cell")
    assert focused == selected
    cell = [int(part) for part in focused.split("-")]
    assert cell[0] >= row
    assert cell[1] >= column
    # The first link that Tab reaches skips the navigation.
    window.do("document.activeElement.blur()")
    window.open(pages / "one.html")
    window.press("\ue004", "\ue007")
    assert window.do("return document.activeElement.id") == "content"


def test_table_of_classes_is_sortable(pages: Path, window: Browser) -> None:
    window.size(*DESK)
    window.open(pages / "one.html")

    def after_click() -> tuple[list[float], str]:
        window.do("document.querySelector('[data-sort=f1]').click()")
        values = window.do(
            "return [...document.querySelectorAll('[data-f1]')].map((r) => r.dataset.f1)"
        )
        sort = (
            "return document.querySelector('[data-sort=f1]').parentNode.getAttribute('aria-sort')"
        )
        return [float(value or "nan") for value in values], window.do(sort)

    descending, order = after_click()
    assert order == "descending"
    assert descending == sorted(descending, reverse=True)
    ascending, order = after_click()
    assert order == "ascending"
    assert ascending == sorted(ascending)


def test_theme_button_changes_the_colors(pages: Path, window: Browser) -> None:
    window.size(*DESK, dark=False)
    window.open(pages / "one.html")
    light = rgb(window, "body", "backgroundColor")
    window.click("#theme")
    assert sum(rgb(window, "body", "backgroundColor")) < sum(light) / 3
    window.click("#theme")
    assert rgb(window, "body", "backgroundColor") == light


@pytest.mark.skipif(
    importlib.util.find_spec("axe_core_python") is None, reason="axe-core-python is not installed"
)
@pytest.mark.parametrize("page", ["one.html", "two.html"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_accessibility_problems(
    pages: Path, window: Browser, page: str, dark: bool
) -> None:
    """WCAG A and AA and best practices, including contrast, with the images of a cell shown."""
    spec = importlib.util.find_spec("axe_core_python")
    assert spec is not None
    assert spec.origin is not None
    script = (Path(spec.origin).parent / "axe.min.js").read_text("utf-8")
    window.size(*DESK, dark=dark)
    window.open(pages / page)
    window.do("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    window.do("document.querySelector('[data-cell]')?.click()")
    # axe cannot judge contrast above a gradient, so that of scrollable tables is removed.
    window.do(
        "document.querySelectorAll('.scroll').forEach((d) => { d.style.background = 'none'; })"
    )
    window.do(script)
    result = window.wait("axe.run().then(arguments[arguments.length - 1])")
    violations = [
        (rule["id"], node["target"], node["failureSummary"])
        for rule in result["violations"]
        for node in rule["nodes"][:3]
    ]
    assert violations == []
    undecided = [  # axe does not judge single digits, which are too short
        str(node["target"])
        for rule in result["incomplete"]
        for node in rule["nodes"]
        if "too short" not in str(node["any"])
    ]
    assert not [target for target in undecided if "data-cell" in target]
    assert len(result["passes"]) > 20
