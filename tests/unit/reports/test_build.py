"""The HTML page of a run: its numbers, what it must not do, and what it does without."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convlens
from convlens import reports
from convlens.data import dataset
from convlens.errors import ModelFileError, UsageError
from convlens.evaluation import CachedPredictions
from convlens.metrics import summarize
from convlens.reports import compare, contents, sections
from convlens.reports.contents import ReportContents, gather_contents
from convlens.reports.html import Markup, PageFigure, _environment, embed_image, figures_of
from convlens.reports.sections import calibration, verdict_section
from convlens.run import RunDir
from helpers.commands import constant_model, here, pictures, refused
from helpers.support import TINY

HOSTILE = (
    "<script>alert(1)<",
    '"quoted" \'n $x^2$ & {{ 7*7 }}',
    "-->\u2028]]>",
    "قطة",
    "long " * 40 + "end",
)
NET = {"data.image_size": 8, "model.widths": [2, 4], "train.epochs": 2, "augment": []}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs: `small` on digits, `hostile` (with its images), `sealed`."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("CONVLENS_CACHE", str(root / "cache"))
        convlens.train(TINY, name="small", quiet=True)
        convlens.train(TINY, name="sealed", test=False, quiet=True)
        images = pictures(root / "images", dict.fromkeys(HOSTILE, 16))
        convlens.train(str(images), NET, name="hostile", quiet=True)
    return root


@pytest.fixture
def runs(made: Path) -> None:
    """The runs, in copies that a test may change."""
    shutil.copytree(made / "models", "models")


class Page(HTMLParser):
    """Tags with their attributes, and all text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.json, self._inside = "", "", ""
        self.html = path.read_text("utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, text: str) -> None:
        kind = self.tags[-1][1].get("type") if self.tags else None
        if self._inside == "script" and kind == "application/json":
            self.json += text
        elif not self._inside:
            self.text += text

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# The page


@pytest.mark.usefixtures("runs")
def test_the_page_states_what_evaluate_states() -> None:
    evaluated = convlens.evaluate("small", "test")
    report = convlens.report("small")
    assert report.path == Path("plots/small/report.html")
    assert report.bytes == report.path.stat().st_size
    found = Page(report.path)
    low, high = evaluated.interval95
    for text in (f"{evaluated.accuracy:.1%}", f"{evaluated.n:,} test", f"{low:.1%} to {high:.1%}"):
        assert text in report.verdict
    assert report.verdict in found.text
    assert f"{evaluated.accuracy:.2%}" in found.text
    counts = [int(match) for match in re.findall(r'data-cell="\d+-\d+"[^>]*>(\d+)<', found.html)]
    assert sum(counts) == evaluated.n
    shown = json.loads(found.json)
    for key, cell in shown["cells"].items():
        truth, said = map(int, key.split("-"))
        assert cell["n"] == evaluated.confusion[truth][said]
        assert 1 <= len(cell["images"]) <= cell["n"]
    assert "Test set used 2 times" in found.text


@pytest.mark.usefixtures("runs")
def test_a_page_is_the_same_bytes_again_and_tests_nothing_anew() -> None:
    first = convlens.report("small").path.read_bytes()
    looks = Path("models/small/results.json").read_bytes()
    assert convlens.report("small", output="again.html").path.read_bytes() == first
    assert Path("models/small/results.json").read_bytes() == looks


@pytest.mark.usefixtures("runs")
def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    found = Page(convlens.report("small").path)
    policy = next(m for m in found.all("meta") if m.get("http-equiv"))
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert "default-src 'none'" in str(policy["content"])
    for _, attributes in found.tags:
        for key in ("src", "href", "srcset", "action", "data"):
            assert str(attributes.get(key) or "#").startswith(("#", "data:")), attributes
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:)", found.html)


@pytest.mark.usefixtures("runs")
def test_headings_tables_and_pictures_are_told_to_who_can_not_see_them() -> None:
    found = Page(convlens.report("small").path)
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in found.tags}
    assert all(a.get("scope") in ("row", "col") for a in found.all("th"))
    assert all(a.get("alt") for a in found.all("img"))
    charts = [a for a in found.all("svg") if a.get("aria-hidden") != "true"]
    assert all(a.get("role") == "img" and a.get("aria-label") for a in charts)
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in found.all("a")} <= set(ids)


@pytest.mark.usefixtures("runs")
def test_names_of_classes_and_files_stay_names() -> None:
    """Whatever they hold, they add no tag, and the JSON says just what they are."""
    found = Page(convlens.report("hostile").path)
    for name in HOSTILE:
        assert name in found.text
    assert "{{ 7*7 }}" in found.text
    assert len(found.all("script")) == 2
    assert sorted(json.loads(found.json)["classes"]) == sorted(HOSTILE)
    assert not {"<", ">", "&", "'", "\u2028"} & set(found.json)
    handlers = {key for _, attributes in found.tags for key in attributes if key.startswith("on")}
    assert handlers == set()
    assert convlens.report("hostile", "small").path.parent.name == "report-hostile-small"


def test_json_in_a_page_can_not_end_its_script() -> None:
    content = {"</script><!--": ["<b>&'\"", "\u2028", "ü"]}
    text = embed_image(content)
    assert json.loads(text) == content
    assert not {"<", ">", "&", "'"} & set(text)
    assert text.isascii()


def test_every_template_is_shipped_and_found() -> None:
    folder = resources.files("convlens.reports") / "templates"
    names = [file.name for file in folder.iterdir()]
    assert {"page.html", "page.css", "page.js"} <= set(names)
    project = Path(str(reports.__file__)).parents[3] / "pyproject.toml"
    if project.exists():  # not where the package was installed for good
        globs = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["convlens"]
        shipped = [f"reporting/templates/{name}" for name in names]
        assert all(any(fnmatch(path, glob) for glob in globs) for path in shipped)
    for name in names:
        if name.endswith(".html"):
            assert _environment().get_template(name)
            source = (folder / name).read_text("utf-8")
            assert "|safe" not in source.replace(" ", "")


# The parts


def by_hand(**changes: Any) -> ReportContents:
    """A run that was judged by four images of two classes: three right, one wrong."""
    logits = np.array([[2, 0], [2, 0], [0, 2], [2, 0]], np.float32)
    labels = np.array([0, 0, 1, 1])
    found = ReportContents(RunDir(Path("models/by-hand")), split="test")
    found.facts = {"data": {"name": "x", "classes": ["a", "b"]}, "kept_epoch": 1, "epochs": 1}
    found.answers = CachedPredictions(logits, labels, "")
    found.summary = summarize(logits, labels, ["a", "b"])
    for key, value in changes.items():
        setattr(found, key, value)
    return found


@pytest.mark.usefixtures("runs")
# The ids are told from the marks, one of which is `data`.
@pytest.mark.parametrize("name", list(sections.SECTIONS), ids="section-{}".format)
def test_a_section_is_html_or_nothing(name: str) -> None:
    """Of a whole run, of one that has numbers only, of one with nothing at all."""
    draw = sections.SECTIONS[name][1]
    for found in (
        gather_contents("small", audit=True, on="cpu"),
        by_hand(),
        ReportContents(RunDir(Path("models/nothing"))),
    ):
        html = draw(found)
        assert html is None or (isinstance(html, Markup) and html.strip())
    if name not in sections.INSIDE_SECTIONS:
        assert draw(gather_contents("small", audit=None, on="cpu")) is not None


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("name", list(compare.COMPARE_SECTIONS))
def test_a_section_of_several_runs_is_html_or_nothing(name: str) -> None:
    two = [
        gather_contents(each, audit=False, on="cpu", alone=False) for each in ("small", "hostile")
    ]
    nothing = [ReportContents(RunDir(Path(f"models/{n}"))) for n in range(2)]
    for found in (two, [by_hand(), by_hand()], nothing):
        html = compare.COMPARE_SECTIONS[name][1](compare.gather_runs(found))
        assert html is None or (isinstance(html, Markup) and html.strip())


def test_finished_pictures_become_a_section() -> None:
    figures = [
        PageFigure(b"\x89PNG....", "what <it> shows", "below"),
        PageFigure(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "drawn"),
    ]
    html = figures_of(figures, "lead")
    assert html is not None
    assert "data:image/png;base64,iVBORy4uLi4=" in html
    assert "data:image/svg+xml;base64," in html
    assert "what &lt;it&gt; shows" in html
    assert figures_of([]) is None
    with pytest.raises(ValueError, match="PNG"):
        figures_of([PageFigure(b"GIF89a", "x")])


def test_the_verdict_is_the_numbers() -> None:
    row = {"epoch": 1.0, "train_accuracy": 0.99}
    assert verdict_section(by_hand(rows=[row])) == (
        "75.0% of 4 test images are classified correctly (95% interval 30.1% to 95.4%); "
        "not distinguishable from always saying 'a' (50.0%); "
        "24.0 points below the 99.0% on training images (overfitting); its confidence agrees "
        "with its accuracy, as far as so many images can tell."
    )
    row["train_accuracy"] = 0.8
    assert "not distinguishable from the 80.0% on training images" in verdict_section(
        by_hand(rows=[row])
    )
    assert verdict_section(by_hand(summary=None)).startswith("Not judged: there are no images")


@pytest.mark.parametrize(
    ("sure", "right", "words"),
    [(0.9, 0.6, "overconfident"), (0.6, 0.9, "underconfident"), (0.8, 0.8, "within chance")],
)
def test_calibration_has_a_word(sure: float, right: float, words: str) -> None:
    logits = np.tile(np.log([sure, 1 - sure]), (1000, 1)).astype(np.float32)
    labels = (np.arange(1000) >= 1000 * right).astype(np.int64)
    summary = summarize(logits, labels, ["a", "b"])
    found = calibration(by_hand(answers=CachedPredictions(logits, labels, ""), summary=summary))
    assert found is not None
    assert found.words == words
    assert found.surplus == pytest.approx(sure - right, abs=1e-6)
    assert found.error == pytest.approx(abs(sure - right), abs=1e-6)


# What isn't there


@pytest.mark.usefixtures("runs")
def test_a_sealed_test_split_stays_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(self: dataset.Data) -> None:
        raise AssertionError("the test split was opened")

    monkeypatch.setattr(dataset.Data, "unseal_test", opened)
    report = convlens.report("sealed")
    assert report.split == "val"
    text = Page(report.path).text
    assert "validation images are classified correctly" in report.verdict
    assert "test split of this run is still sealed" in text
    logged = json.loads(Path("models/sealed/results.json").read_text())
    assert [look["split"] for look in logged] == ["val"]
    # Beside a run that was tested: each by its own split, and not compared.
    both = convlens.report("sealed", "small")
    assert both.split == "mixed"
    assert "can't be compared" in both.verdict


@pytest.mark.usefixtures("runs")
def test_a_run_whose_images_have_moved_still_has_its_page(made: Path) -> None:
    (made / "images").rename(made / "elsewhere")
    try:
        report = convlens.report("hostile")
        Path("models/hostile/answers").rename("models/hostile/gone")
        less = convlens.report("hostile", output="less.html")
    finally:
        (made / "elsewhere").rename(made / "images")
    found = Page(report.path)
    assert any("no such file or folder" in line.lower() for line in report.missing)
    assert "Confusion" in found.text
    assert "Calibration" in found.text
    assert found.json == ""
    assert found.all("button")
    assert not [b for b in found.all("button") if "data-cell" in b]
    assert any("was not kept" in line for line in less.missing)
    assert less.verdict.startswith(report.verdict.split(";")[0])
    assert "Confusion" in Page(less.path).text


@pytest.mark.usefixtures("runs")
def test_unfinished_and_empty_runs_have_pages() -> None:
    RunDir(Path("models/small")).update_metadata({"status": "training"})
    report = convlens.report("small")
    assert (
        report.verdict
        == "Not judged yet: the training has not finished; 3 epochs of training are in its log."
    )
    assert "Curves" in Page(report.path).text
    Path("models/empty").mkdir()
    Path("models/empty/run.json").write_text('{"status": "training"}')
    report = convlens.report("empty")
    assert "no weights yet" in report.missing[0]
    assert "0 epochs" in report.verdict
    assert convlens.report("empty", "small").verdict == "None of these runs was judged yet."


def test_a_model_file_alone_has_a_page() -> None:
    constant_model(Path("alone"), [0.0, 1.0], ["a", "b"])
    report = convlens.report("alone/model.safetensors", output="alone.html")
    assert report.verdict.startswith("Not judged: there are no images")
    assert any("changed since" in line for line in report.missing)
    assert "Recipe" in Page(report.path).text


@pytest.mark.usefixtures("runs")
def test_losses_that_are_no_numbers_are_gaps() -> None:
    path = Path("models/small/metrics.csv")
    lines = path.read_text().splitlines()
    cells = lines[2].split(",")
    lines[2] = ",".join([cells[0], "nan", cells[2], "inf", *cells[4:]])
    path.write_text("\n".join(lines) + "\n")
    text = Page(convlens.report("small").path).text
    assert "The training loss was not a number in epoch 2" in text


@pytest.mark.usefixtures("runs")
def test_what_can_not_be_reported_is_an_error() -> None:
    with pytest.raises(UsageError, match="no run called 'smal'"):
        convlens.report("small", "smal")
    with pytest.raises(UsageError, match="no run to report on"):
        convlens.report()
    Path("models/small/model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(ModelFileError):
        convlens.report("small")


@pytest.mark.usefixtures("runs")
def test_the_command_prints_the_path_or_one_object() -> None:
    done = here("report", "small", "--audit")
    assert done.code == 0, done.err
    assert "report  plots/small/report.html" in done.out
    assert "readable images" in Page(Path("plots/small/report.html")).text
    done = here("report", "small", "--json", "--output", "deep/er/page.html", "--no-audit")
    assert done.json["path"] == "deep/er/page.html"
    assert done.json["runs"] == ["small"]
    assert "Not audited here" in Page(Path("deep/er/page.html")).text
    refused(here("report", "smalll"), 2, "no run called 'smalll'", "did you mean small")


def test_few_images_are_audited_unasked(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made / "models", "models")
    assert gather_contents("hostile", audit=None, on="cpu").audit is not None
    monkeypatch.setattr(contents, "QUICK_AUDIT_IMAGES", 10)
    assert gather_contents("hostile", audit=None, on="cpu").audit is None


@pytest.mark.usefixtures("runs")
def test_what_look_has_written_stays() -> None:
    convlens.look("small", measure="dead")
    before = Path("plots/small/look/measures.json").read_bytes()
    convlens.report("small")
    assert Path("plots/small/look/measures.json").read_bytes() == before
