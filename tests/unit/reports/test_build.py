"""The page of a run: its numbers, its safety, and pages of incomplete runs."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

import convlens
from convlens import evaluation
from convlens.data import dataset
from convlens.errors import ModelFileError, ResourceError, UsageError
from convlens.reports.build import Report
from convlens.run import RunDir
from convlens.utils import notebook
from helpers.commands import constant_model, here, refused
from helpers.reports import HOSTILE_CLASSES, Page


@pytest.mark.usefixtures("runs")
def test_page_states_the_numbers_of_evaluate() -> None:
    evaluated = convlens.evaluate("small", "test")
    report = convlens.report("small")
    assert report.path == Path("plots/small/report.html")
    assert report.bytes == report.path.stat().st_size
    page = Page(report.path)
    low, high = evaluated.interval95
    for text in (f"{evaluated.accuracy:.1%}", f"{evaluated.n:,} test", f"{low:.1%} to {high:.1%}"):
        assert text in report.verdict
    assert report.verdict in page.text
    assert f"{evaluated.accuracy:.2%}" in page.text
    counts = [int(match) for match in re.findall(r'data-cell="\d+-\d+"[^>]*>(\d+)<', page.html)]
    assert sum(counts) == evaluated.n
    shown = json.loads(page.json)
    for key, cell in shown["cells"].items():
        target, pred = map(int, key.split("-"))
        assert cell["n"] == evaluated.confusion[target][pred]
        assert 1 <= len(cell["images"]) <= cell["n"]
    assert "Test set used 3 times" in page.text  # by train, evaluate and this page


@pytest.mark.usefixtures("runs")
def test_second_page_differs_only_in_the_number_of_uses(
    small_report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page is one use of the test split, but nothing is evaluated again."""
    shutil.copytree(small_report.path.parents[2] / "models", "models", dirs_exist_ok=True)
    monkeypatch.setattr(evaluation, "evaluate_split", None)
    first = small_report.path.read_text("utf-8")
    again = convlens.report("small", output="again.html").path.read_text("utf-8")
    assert "Test set used 2 times" in first
    assert again == first.replace("Test set used 2 times", "Test set used 3 times")
    log = RunDir(Path("models/small")).evaluation_log()
    assert [(e["split"], e["looks"], e.get("by")) for e in log] == [
        ("test", 1, None),
        ("test", 2, "report"),
        ("test", 3, "report"),
    ]


@pytest.mark.usefixtures("runs", "without_inside")
def test_a_page_that_cannot_be_written_is_not_a_use_of_the_test_split() -> None:
    Path("file").write_text("")
    with pytest.raises(ResourceError):
        convlens.report("small", output="file/page.html")
    Path("models/small/answers").rename("models/small/gone")  # evaluated again, but one use
    convlens.report("small")
    log = RunDir(Path("models/small")).evaluation_log()
    assert [(e["split"], e["looks"]) for e in log] == [("test", 1), ("test", 2)]


def test_report_is_short_and_links_to_the_page_in_notebooks(small_report: Report) -> None:
    assert repr(small_report).startswith(f"Report('{small_report.path}', ")
    shown = small_report._repr_html_()
    assert notebook.link(small_report.path) in shown
    assert notebook.paragraph(small_report.verdict) in shown


def test_page_loads_nothing_from_elsewhere(small_report: Report) -> None:
    page = Page(small_report.path)
    policy = next(m for m in page.all("meta") if m.get("http-equiv"))
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert "default-src 'none'" in str(policy["content"])
    for _, attributes in page.tags:
        for key in ("src", "href", "srcset", "action", "data"):
            assert str(attributes.get(key) or "#").startswith(("#", "data:")), attributes
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:)", page.html)


def test_headings_tables_and_images_are_accessible(small_report: Report) -> None:
    page = Page(small_report.path)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in page.tags}
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    assert all(a.get("alt") for a in page.all("img"))
    charts = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert all(a.get("role") == "img" and a.get("aria-label") for a in charts)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in page.all("a")} <= set(ids)


@pytest.mark.usefixtures("runs")
def test_hostile_names_are_shown_as_text() -> None:
    """They add no tags, and the JSON holds exactly these names."""
    page = Page(convlens.report("hostile").path)
    for name in HOSTILE_CLASSES:
        assert name in page.text
    assert "{{ 7*7 }}" in page.text
    assert len(page.all("script")) == 2
    assert sorted(json.loads(page.json)["classes"]) == sorted(HOSTILE_CLASSES)
    assert not {"<", ">", "&", "'", "\u2028"} & set(page.json)
    handlers = {key for _, attributes in page.tags for key in attributes if key.startswith("on")}
    assert handlers == set()
    assert convlens.report("hostile", "small").path.parent.name == "report-hostile-small"


@pytest.mark.usefixtures("runs")
def test_sealed_test_split_stays_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unseal(self: dataset.Data) -> None:
        raise AssertionError("the test split was opened")

    monkeypatch.setattr(dataset.Data, "unseal_test", unseal)
    report = convlens.report("sealed")
    assert report.split == "val"
    text = Page(report.path).text
    assert "validation images are classified correctly" in report.verdict
    assert "test split of this run is still sealed" in text
    log = json.loads(Path("models/sealed/results.json").read_text())
    assert [entry["split"] for entry in log] == ["val"]
    # Beside a run that was tested, each has its own split, and they are not compared.
    comparison = convlens.report("sealed", "small")
    assert comparison.split == "mixed"
    assert "cannot be compared" in comparison.verdict


@pytest.mark.usefixtures("runs")
def test_run_whose_images_are_gone_still_has_a_page(trained: Path) -> None:
    (trained / "images").rename(trained / "elsewhere")
    try:
        report = convlens.report("hostile")
        Path("models/hostile/answers").rename("models/hostile/gone")
        without_predictions = convlens.report("hostile", output="less.html")
    finally:
        (trained / "elsewhere").rename(trained / "images")
    page = Page(report.path)
    assert any("does not exist any more" in line for line in report.missing)
    assert "Confusion" in page.text
    assert "Calibration" in page.text
    assert page.json == ""
    assert page.all("button")
    assert not [b for b in page.all("button") if "data-cell" in b]
    assert any("were not kept" in line for line in without_predictions.missing)
    assert without_predictions.verdict.startswith(report.verdict.split(";")[0])
    assert "Confusion" in Page(without_predictions.path).text


@pytest.mark.usefixtures("runs")
def test_unfinished_and_empty_runs_have_pages() -> None:
    RunDir(Path("models/small")).update_metadata({"status": "training"})
    report = convlens.report("small")
    assert (
        report.verdict == "Not evaluated yet: training has not finished; 3 epochs are in its log."
    )
    assert "Curves" in Page(report.path).text
    Path("models/empty").mkdir()
    Path("models/empty/run.json").write_text('{"status": "training"}')
    report = convlens.report("empty")
    assert "no weights yet" in report.missing[0]
    assert "0 epochs" in report.verdict
    assert convlens.report("empty", "small").verdict == "None of these runs has been evaluated yet."


def test_model_file_without_a_run_has_a_page() -> None:
    constant_model(Path("alone"), [0.0, 1.0], ["a", "b"])
    report = convlens.report("alone/model.safetensors", output="alone.html")
    assert report.verdict.startswith("Not evaluated: no images")
    assert any("changed since" in line for line in report.missing)
    assert "Recipe" in Page(report.path).text


@pytest.mark.usefixtures("runs", "without_inside")
def test_losses_that_are_not_finite_are_named() -> None:
    path = Path("models/small/metrics.csv")
    lines = path.read_text().splitlines()
    cells = lines[2].split(",")
    lines[2] = ",".join([cells[0], "nan", cells[2], "inf", *cells[4:]])
    path.write_text("\n".join(lines) + "\n")
    text = Page(convlens.report("small").path).text
    assert "The training loss was not finite in epoch 2" in text


@pytest.mark.usefixtures("runs")
def test_unknown_and_damaged_runs_are_errors() -> None:
    with pytest.raises(UsageError, match="no run called 'smal'"):
        convlens.report("small", "smal")
    with pytest.raises(UsageError, match="no run to report on"):
        convlens.report()
    Path("models/small/model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(ModelFileError):
        convlens.report("small")


@pytest.mark.usefixtures("runs", "without_inside")
def test_command_prints_the_path_or_one_json_object() -> None:
    done = here("report", "small", "--audit")
    assert done.code == 0, done.err
    assert "report  plots/small/report.html" in done.out
    assert "readable images" in Page(Path("plots/small/report.html")).text
    done = here("report", "small", "--json", "--output", "deep/er/page.html", "--no-audit")
    assert done.json["path"] == "deep/er/page.html"
    assert done.json["runs"] == ["small"]
    assert "Not audited," in Page(Path("deep/er/page.html")).text
    refused(here("report", "smalll"), 2, "no run called 'smalll'", "did you mean small")


@pytest.mark.usefixtures("runs")
def test_report_does_not_overwrite_files_of_look() -> None:
    convlens.look("small", measure="dead")
    before = Path("plots/small/look/measures.json").read_bytes()
    convlens.report("small")
    assert Path("plots/small/look/measures.json").read_bytes() == before
