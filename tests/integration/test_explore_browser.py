"""`convlens explore` in a real browser. Skipped without one, except in continuous integration."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import convlens
from helpers.browser import Browser, browser, check_browser
from helpers.commands import picture, start
from helpers.exploring import running_page
from helpers.support import TINY, working_in

DESK, PHONE = (1280, 900), (390, 844)
HOSTILE_NAME = "<img src=x onerror=alert(1)>.png"
READY = "return document.querySelectorAll('.view[aria-busy=false] .layer').length"
# The probabilities that are shown, as text.
BARS = "return [...document.querySelectorAll('.bars li')].map((e) => e.textContent).join('|')"
# The value of each pixel that the network sees, and the number of hidden pixels. Copies are read,
# since Chromium logs a warning about a canvas that is read often.
READ = """
    const c = document.querySelector(`[data-part=${name}]`);
    const copy = new OffscreenCanvas(c.width, c.height);
    const context = copy.getContext('2d', {willReadFrequently: true});
    context.drawImage(c, 0, 0);
    const data = context.getImageData(0, 0, c.width, c.height).data;
    const every = (n) => [...data.keys()].filter((i) => i % 4 === n).map((i) => data[i]);
"""
PICTURE = f"const name = 'picture'; {READ} return every(0)"
HIDDEN = f"const name = 'brush'; {READ} return every(3).filter((alpha) => alpha).length"


@pytest.fixture(scope="module", autouse=True)
def require_browser() -> None:
    check_browser()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `one` and `two` on digits, and an image with a hostile name."""
    root = tmp_path_factory.mktemp("explored")
    with working_in(root):
        for name, epochs in (("one", 3), ("two", 4)):
            convlens.train(TINY, {"train.epochs": epochs}, name=name, test=False, quiet=True)
        picture(root / HOSTILE_NAME, [200], size=8)
    return root


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with working_in(root), running_page() as url:
        yield url


@pytest.fixture(scope="module")
def window(url: str) -> Iterator[Browser]:
    """One window for all tests, which has the cookie."""
    with browser() as window:
        window.size(*DESK)
        window.open(url)
        window.until(READY)
        yield window


@pytest.fixture
def page(window: Browser, url: str) -> Iterator[Browser]:
    """The part Try with the example that it chooses itself."""
    window.size(*DESK)
    window.open(base(url) + "try")
    window.until(READY)
    yield window
    assert window.console() == []


# Two charts have been drawn for the run that is selected first.
WATCHED = "return document.querySelectorAll('#curves svg.chart').length == 2"
STATES = "return [...document.getElementById('runs').rows].map((r) => r.dataset.state).join()"


def base(url: str) -> str:
    return url.partition("?")[0]


def shown_image(page: Browser) -> str:
    return str(page.do("return document.getElementById('image-name').textContent"))


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_opens_without_console_messages_and_fits(
    window: Browser, url: str, size: tuple[int, int], dark: bool
) -> None:
    window.size(*size, dark=dark)
    window.requested()
    window.open(base(url) + "try")
    window.until(READY)
    assert window.console() == []
    requested = window.requested()
    assert requested
    assert all(address.startswith(base(url)) for address in requested)
    assert "token" not in window.do("return location.href")
    assert window.do("return document.documentElement.scrollWidth") == size[0]
    color = window.do("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, color[4:-1].split(","))) < 200) == dark


def test_uploaded_file_with_a_hostile_name_is_shown_as_text(page: Browser, root: Path) -> None:
    page.upload("#file", root / HOSTILE_NAME)
    page.until(
        "return document.getElementById('image-name').textContent == arguments[0]", HOSTILE_NAME
    )
    page.until(READY)
    assert page.do("return document.querySelector('#image-name img')") is None
    assert page.do("return document.querySelectorAll('.bars li').length") == 5
    assert page.do("return document.querySelectorAll('[data-part=nearest] img').length") == 6


def test_dropped_and_pasted_files_are_shown(page: Browser) -> None:
    send = """
        const canvas = new OffscreenCanvas(8, 8), done = arguments[arguments.length - 1];
        canvas.getContext('2d').fillRect(2, 2, 3, 5);
        canvas.convertToBlob().then((blob) => {
          const data = new DataTransfer();
          data.items.add(new File([blob], arguments[1], {type: 'image/png'}));
          const options = {bubbles: true, cancelable: true};
          const event = arguments[0] === 'drop'
            ? new DragEvent('drop', {...options, dataTransfer: data})
            : new ClipboardEvent('paste', {...options, clipboardData: data});
          document.querySelector('main').dispatchEvent(event);
          done();
        });
    """
    for kind in ("drop", "paste"):
        page.wait(send, kind, f"{kind}.png")
        page.until(
            "return document.getElementById('image-name').textContent == arguments[0]",
            f"{kind}.png",
        )
        page.until(READY)
        assert page.do("return document.querySelector('[data-part=truth]').textContent") == ""


def test_broken_file_gives_a_message(page: Browser, root: Path) -> None:
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    page.upload("#file", root / "broken.png")
    message = page.until("return document.getElementById('messages').textContent")
    assert "can't be read as an image" in message
    page.click("#messages button")
    assert page.do("return document.getElementById('messages').textContent") == ""
    failed = page.console()  # Chromium logs the status 422
    assert all("422" in line for line in failed)


def test_drawn_digit_is_classified(page: Browser) -> None:
    page.click("#use-draw")
    before = page.do(BARS)
    page.drag("#canvas", (0.5, 0.15), (0.5, 0.5), (0.5, 0.85))
    page.until("return document.getElementById('image-name').textContent == 'drawing.png'")
    page.until(READY)
    page.until("return (" + BARS.removeprefix("return ") + ") !== arguments[0]", before)
    page.until(f"return Math.max(...(() => {{{PICTURE}}})()) > 150")
    drawn = page.do(PICTURE)
    rows = [drawn[8 * row : 8 * row + 8] for row in range(8)]
    # A light vertical line in the middle of a dark image.
    assert max(rows[4][3:5]) > 150
    assert max(rows[4][:2] + rows[4][6:]) < 30


def test_brush_by_mouse_and_keys_moves_the_probabilities(page: Browser) -> None:
    before = page.do(BARS)
    assert page.do(HIDDEN) == 0
    page.drag(".stage", (0.2, 0.5), (0.35, 0.5), (0.5, 0.5), (0.65, 0.5), (0.8, 0.5))
    assert page.do(HIDDEN) >= 4
    page.until("return (" + BARS.removeprefix("return ") + ") !== arguments[0]", before)
    page.click("#reveal")
    page.until("return (" + BARS.removeprefix("return ") + ") === arguments[0]", before)
    assert page.do(HIDDEN) == 0
    page.do("document.querySelector('.stage').focus()")
    page.press("\ue013", " ", "\ue014", " ")  # up, hide, right, hide
    assert page.do(HIDDEN) >= 1


def test_heat_map_follows_class_method_and_opacity(page: Browser) -> None:
    note = "return document.querySelector('[data-part=heat-note]').textContent"
    page.do(
        "const s = document.querySelector('[data-part=target]'); s.value = '3';"
        "s.dispatchEvent(new Event('change'))"
    )
    page.until(f"return (() => {{{note}}})().includes('for 3')")
    page.do(
        "const s = document.getElementById('method'); s.value = 'occlusion';"
        "s.dispatchEvent(new Event('change'))"
    )
    page.until(f"return (() => {{{note}}})().startsWith('Occlusion for 3')")
    page.do(
        "const s = document.getElementById('opacity'); s.value = 20;"
        "s.dispatchEvent(new Event('input'))"
    )
    assert page.do("return document.querySelector('[data-part=heat]').style.opacity") == "0.2"


def test_channel_is_enlarged_with_its_images_which_open(page: Browser) -> None:
    page.do("document.querySelector('.channels button').scrollIntoView({block: 'center'})")
    page.click(".channels button")
    page.until("return document.querySelectorAll('#channel-images img').length == 9")
    title = page.do("return document.getElementById('channel-title').textContent")
    page.press("\ue014")  # the next channel
    page.until("return document.getElementById('channel-title').textContent != arguments[0]", title)
    page.until("return document.querySelectorAll('#channel-images img').length == 9")
    name = page.do("return document.querySelector('#channel-images button').title")
    page.click("#channel-images button")
    page.until("return document.getElementById('image-name').textContent == arguments[0]", name)
    assert page.do("return document.getElementById('channel').open") is False
    page.until(READY)


def test_images_of_the_data_are_offered_and_the_test_split_asks_first(
    page: Browser, root: Path
) -> None:
    page.click("#use-choose")
    count = "return document.querySelectorAll('#chosen img').length"
    page.until(count)
    change = (
        "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change'))"
    )
    # The images that are offered so far stay until the others arrive.
    page.do("document.querySelector('#chosen button').dataset.before = 'yes'")
    page.do(change, "how", "worst")
    page.until(
        "const b = document.querySelector('#chosen button');"
        "return b && !b.dataset.before && !document.querySelector('#chosen-note progress')"
    )
    name = page.do("return document.querySelector('#chosen button').title")
    page.click("#chosen button")
    page.until("return document.getElementById('image-name').textContent == arguments[0]", name)
    page.until("return document.querySelector('.truth.wrong')")
    uses = convlens.Run.load(root / "models/one").run_dir.evaluation_log
    page.do(change, "how", "random")
    page.do(change, "split", "test")
    page.until("return document.getElementById('sealed').open")
    page.click("#keep-sealed")
    page.until("return document.getElementById('split').value != 'test'")
    assert uses() == []
    page.do(change, "split", "test")
    page.until("return document.getElementById('sealed').open")
    page.click("#open-sealed")
    page.until("return document.querySelector('#chosen button')?.title.startsWith('test:')")
    assert [entry["by"] for entry in uses()] == ["explore"]


def test_two_runs_show_the_same_image_side_by_side(page: Browser) -> None:
    page.do(
        "const s = document.getElementById('other'); s.value = 'two';"
        "s.dispatchEvent(new Event('change'))"
    )
    page.until("return document.querySelectorAll('.view[aria-busy=false] .layer').length == 4")
    tops = page.do(
        "return [...document.querySelectorAll('.view')].map((v) => v.getBoundingClientRect().top)"
    )
    assert tops[0] == tops[1]
    facts = page.do(
        "return [...document.querySelectorAll('.view')].map((v) =>"
        " [v.querySelector('h2').textContent, v.querySelector('.truth').textContent.slice(0, 20),"
        "  v.querySelector('[data-part=picture]').toDataURL()])"
    )
    assert [name for name, _, _ in facts] == ["one", "two"]
    assert facts[0][1:] == facts[1][1:]


# The part Judge shows figures, and images of the gallery have been drawn.
JUDGED = (
    "return document.querySelector('#confusion [data-cell]')"
    " && document.querySelector('#images img[src]')"
)
CHANGE = (
    "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
    "s.dispatchEvent(new Event('change'))"
)
LISTED = "return document.getElementById('gallery-note').textContent"


@pytest.fixture
def judge(window: Browser, url: str) -> Iterator[Browser]:
    """The part Judge with the run `two`."""
    window.size(*DESK)
    window.open(base(url) + "judge?run=two")
    window.until(JUDGED)
    yield window
    assert window.console() == []


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_judge_opens_without_console_messages_and_fits(
    window: Browser, url: str, size: tuple[int, int], dark: bool
) -> None:
    window.size(*size, dark=dark)
    window.requested()
    window.open(base(url) + "judge?run=two")
    window.until(JUDGED)
    window.do("for (const d of document.querySelectorAll('#sections details')) d.open = true")
    window.until("return document.querySelectorAll('#sections figure.paper img').length >= 3")
    assert window.console() == []
    assert all(address.startswith(base(url)) for address in window.requested())
    assert window.do("return document.documentElement.scrollWidth") == size[0]


def test_judge_cell_opens_its_images_and_keys_step_through_them(judge: Browser) -> None:
    judge.do("document.querySelector('#confusion [data-cell]').scrollIntoView({block: 'center'})")
    count = judge.do("return document.querySelector('#confusion [data-cell]').textContent")
    judge.click("#confusion [data-cell]")
    judge.until(f"return (() => {{{LISTED}}})().startsWith(arguments[0] + ' of')", count)
    assert judge.do("return document.querySelectorAll('#images li').length") == int(count)
    assert judge.do("return document.getElementById('target').value") == "0"
    judge.do(CHANGE, "target", "")
    judge.do(CHANGE, "pred", "")
    judge.do(CHANGE, "order", "number")
    judge.until(
        "const n = [...document.querySelectorAll('#images img')].map((i) => i.alt);"
        "return n[0] === 'Image 0' && n[1] === 'Image 1'"
    )
    total = judge.do(f"return parseInt((() => {{{LISTED}}})())")
    judge.do("document.getElementById('window').focus()")
    name = "return document.getElementById('image-title').textContent"
    judge.press("\ue014", "\ue014", "\ue007")  # the first image, the next one, open it
    first = judge.until(name)
    assert "image 1 of" in judge.do("return document.getElementById('image-label').textContent")
    judge.press("\ue014")
    judge.until(f"const n = (() => {{{name}}})(); return n && n !== arguments[0]", first)
    judge.until("return document.getElementById('picture').naturalWidth == 8")
    assert judge.do("return document.querySelectorAll('#image-bars li').length") == 5
    judge.press("\ue00c")  # escape; the focus follows in the event that the dialog was closed
    judge.until("return document.activeElement.dataset.position == '2'")
    # Only the rows in view exist; the End key shows the last image.
    judge.do("document.getElementById('window').style.maxHeight = '60px'")
    judge.size(*PHONE)
    judge.until("return document.querySelectorAll('#images li').length < arguments[0]", total)
    judge.until("return document.activeElement.dataset.position == '2'")
    judge.press("\ue010")  # end
    judge.until("return document.activeElement.dataset.position == arguments[0]", total - 1)
    judge.until("return document.activeElement.querySelector('img').naturalWidth == 8")
    judge.press("\ue011")  # home
    judge.until("return document.activeElement.dataset.position == 0")


def test_judge_image_opens_in_try(judge: Browser) -> None:
    judge.do(CHANGE, "only", "all")
    judge.do("document.getElementById('gallery').scrollIntoView()")
    judge.until("const i = document.querySelector('#images img'); return i && i.naturalWidth")
    judge.click("#images button")
    judge.until("return document.getElementById('image-title').textContent")
    number = judge.do(
        "return new URL(document.getElementById('image-try').href).searchParams.get('number')"
    )
    judge.click("#image-try")
    judge.until(READY)
    assert shown_image(judge) == f"val:{number}"


def test_judge_tables_are_sorted_and_walked_by_keys(judge: Browser) -> None:
    judge.do("document.querySelector('#confusion [data-cell]').focus()")
    before = judge.do("return document.activeElement.dataset.cell")
    judge.press("\ue015", "\ue014")  # down, right
    after = judge.do("return document.activeElement.dataset.cell")
    assert after
    assert after != before
    judge.do("document.querySelector('#sections details').open = true")
    judge.click("[data-sort=recall]")
    recalls = judge.do(
        "return [...document.querySelectorAll('.sortable tbody tr')].map((r) => +r.dataset.recall)"
    )
    assert recalls == sorted(recalls, reverse=True)


def test_judge_compares_two_runs_on_the_same_images(judge: Browser) -> None:
    judge.do(CHANGE, "other", "one")
    verdict = judge.until(
        "const v = document.querySelector('#comparison .verdict'); return v && v.textContent"
    )
    assert "McNemar" in verdict
    assert judge.do("return document.querySelector('#comparison tbody th').textContent") == "one"


def test_judge_asks_before_it_opens_the_test_split(judge: Browser, root: Path) -> None:
    uses = convlens.Run.load(root / "models/two").run_dir.evaluation_log
    tested = "return document.getElementById('summary').textContent.includes('test accuracy')"
    judge.do(CHANGE, "split", "test")
    judge.until("return document.getElementById('sealed').open")
    assert "never been used" in judge.do("return document.getElementById('sealed').textContent")
    judge.press("\ue00c")  # escape keeps it sealed
    judge.until("return document.getElementById('split').value == 'val'")
    judge.until(JUDGED)
    assert [entry["split"] for entry in uses()] == ["val"]
    judge.do(CHANGE, "split", "test")
    judge.until("return document.getElementById('sealed').open")
    judge.click("#open-sealed")
    judge.until(tested)
    assert "used once" in judge.do("return document.getElementById('seal').textContent")
    assert [entry["by"] for entry in uses() if entry["split"] == "test"] == ["explore"]


@pytest.mark.skipif(
    importlib.util.find_spec("axe_core_python") is None, reason="axe-core-python is not installed"
)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_judge_has_no_accessibility_problems(window: Browser, url: str, dark: bool) -> None:
    spec = importlib.util.find_spec("axe_core_python")
    assert spec is not None
    assert spec.origin is not None
    window.size(*DESK, dark=dark)
    window.open(base(url) + "judge?run=two")
    window.until(JUDGED)
    window.do("for (const d of document.querySelectorAll('#sections details')) d.open = true")
    window.until("return document.querySelectorAll('#sections figure.paper img').length >= 3")
    window.devtools("Page.setBypassCSP", enabled=True)
    window.do((Path(spec.origin).parent / "axe.min.js").read_text("utf-8"))
    result = window.wait("axe.run().then(arguments[arguments.length - 1])")
    assert [
        (rule["id"], node["target"], node["failureSummary"])
        for rule in result["violations"]
        for node in rule["nodes"][:3]
    ] == []
    assert len(result["passes"]) > 20


def test_webcam_picture_is_classified(page: Browser) -> None:
    page.click("#use-webcam")
    page.until("return document.getElementById('video').videoWidth")
    page.click("#take")
    page.until("return document.getElementById('image-name').textContent == 'webcam.png'")
    page.until(READY)
    page.click("#use-webcam")
    assert page.do("return document.getElementById('video').srcObject") is None


def check_accessibility(window: Browser, script: str) -> None:
    """Run axe-core, whose source is `script`, on the page that is open."""
    window.do(script)
    result = window.wait("axe.run().then(arguments[arguments.length - 1])")
    violations = [
        (rule["id"], node["target"], node["failureSummary"])
        for rule in result["violations"]
        for node in rule["nodes"][:3]
    ]
    assert violations == []
    assert len(result["passes"]) > 20


@pytest.mark.skipif(
    importlib.util.find_spec("axe_core_python") is None, reason="axe-core-python is not installed"
)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_accessibility_problems(window: Browser, url: str, dark: bool) -> None:
    """WCAG A and AA and best practices, with all panels open, and with a dialog."""
    spec = importlib.util.find_spec("axe_core_python")
    assert spec is not None
    assert spec.origin is not None
    script = (Path(spec.origin).parent / "axe.min.js").read_text("utf-8")
    window.size(*DESK, dark=dark)
    window.open(base(url) + "try")
    window.until(READY)
    window.click("#use-choose")
    window.until("return document.querySelectorAll('#chosen img').length")
    window.devtools("Page.setBypassCSP", enabled=True)
    for selector in ("#none", ".channels button"):
        window.do("document.querySelector(arguments[0])?.click()", selector)
        if selector != "#none":
            window.until("return document.querySelectorAll('#channel-images img').length == 9")
        check_accessibility(window, script)
    window.do("document.getElementById('channel').close()")
    window.open(base(url) + "watch")
    window.until(WATCHED)
    check_accessibility(window, script)


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_watch_draws_the_curves_of_the_selected_runs(
    window: Browser, url: str, size: tuple[int, int]
) -> None:
    window.size(*size)
    window.open(base(url) + "watch")
    window.until(WATCHED)
    assert window.do(STATES) == "finished,finished"
    legend = "return [...document.querySelectorAll('#curves bdi')].map((e) => e.textContent).join()"
    assert window.do(legend) == "training,validation,training,validation"
    cells = "return [...document.querySelectorAll('#runs tr')].map((r) => r.cells[3].textContent)"
    assert window.do(cells) == ["3/3", "4/4"]
    window.click("#runs tr:nth-child(2) input")
    assert window.until(f"const f = () => {{ {legend} }}; return f() === 'one,two,one,two'")
    assert window.do("return document.activeElement.type") == "checkbox"  # it keeps the focus
    assert window.do("return document.documentElement.scrollWidth") == size[0]
    assert window.console() == []


def test_watch_follows_a_training_and_stops_it(window: Browser, url: str, root: Path) -> None:
    window.size(*DESK)
    window.open(base(url) + "watch")
    window.until(WATCHED)
    with working_in(root):
        training = start(
            *("train", "digits", "data.per_class=8", "train.epochs=1000000", "--name", "long")
        )
    try:
        row = "const r = document.querySelector('tr[data-run=long]'); return r && "
        window.until(row + "r.dataset.state === 'training' && r.cells[8].textContent !== '–'")
        epoch = window.do(row + "parseInt(r.cells[3].textContent)")
        window.until(row + f"parseInt(r.cells[3].textContent) > {epoch}")
        window.click("tr[data-run=long] button")
        window.click("#stop-no")
        assert training.poll() is None
        window.click("tr[data-run=long] button")
        window.click("#stop-yes")
        _, errors = training.communicate(timeout=60)
        assert "everything is saved" in errors
        window.until(row + "r.dataset.state === 'interrupted'")
        assert window.console() == []
    finally:
        training.kill()
        training.wait()
        shutil.rmtree(root / "models" / "long", ignore_errors=True)
