"""Pages of several runs compare predictions image by image."""

from __future__ import annotations

from pathlib import Path

import pytest

from convlens.metrics import class_means_difference, newcombe_interval
from convlens.reports import compare
from convlens.reports.contents import ReportContents, gather_contents
from convlens.reports.html import Markup
from convlens.run import RunDir
from helpers.reports import contents_of, two_class_contents


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("section", list(compare.COMPARE_SECTIONS))
def test_section_of_several_runs_is_html_or_left_out(section: str) -> None:
    two = [
        gather_contents(name, audit=False, device="cpu", with_images=False)
        for name in ("small", "hostile")
    ]
    nothing = [ReportContents(RunDir(Path(f"models/{n}"))) for n in range(2)]
    for runs in (two, [two_class_contents(), two_class_contents()], nothing):
        html = compare.COMPARE_SECTIONS[section][1](compare.gather_runs(runs))
        assert html is None or (isinstance(html, Markup) and html.strip())


def test_differences_are_counted_image_by_image() -> None:
    labels = [0] * 10
    first = contents_of("first", [0] * 9 + [1], labels)
    other = contents_of("other", [1] * 3 + [0] * 7, labels)  # loses three, gains one
    comparison = compare.gather_runs([first, other])
    assert comparison.first is first
    (difference,) = comparison.differences
    assert (difference.name, difference.gained, difference.lost) == ("other", 1, 3)
    assert difference.points == pytest.approx(-0.2)
    assert difference.interval == pytest.approx(newcombe_interval(6, 3, 1, 0))
    assert difference.p == pytest.approx(
        2 * (1 + 4) / 2**4
    )  # of four fair coins, three or more alike
    # The recall of the only class with images: 9/10 and 7/10.
    means = difference.class_means["balanced_accuracy"]
    assert means.value == pytest.approx(-0.2)
    assert (
        means
        == class_means_difference(labels, [0] * 9 + [1], [1] * 3 + [0] * 7, 2)["balanced_accuracy"]
    )
    html = compare.compare_paired(comparison)
    assert html is not None
    assert "balanced accuracy" in html
    assert comparison.verdict == (
        "first: 90.0% of 10 test images; not distinguishable from other (McNemar's exact test)."
    )


def test_p_values_are_corrected_for_the_number_of_comparisons() -> None:
    labels = [0] * 20
    first = contents_of("first", [0] * 20, labels)
    others = [contents_of(f"r{n}", [1] * 6 + [0] * 14, labels) for n in range(2)]
    comparison = compare.gather_runs([first, *others])
    assert [d.p for d in comparison.differences] == pytest.approx([2 * 2 / 2**6] * 2)
    assert comparison.verdict.endswith(
        "; not distinguishable from r0 and r1 (McNemar's exact test)."
    )
    single = compare.gather_runs([first, others[0]])
    assert single.verdict.endswith("; more accurate than r0 (McNemar's exact test).")
    reversed_ = compare.gather_runs([others[0], first])
    assert reversed_.verdict.endswith("; less accurate than first (McNemar's exact test).")


def test_runs_on_different_images_are_not_compared() -> None:
    first, second = contents_of("a", [0, 1], [0, 1]), contents_of("b", [0, 1], [0, 1])
    assert second.predictions is not None
    second.predictions = second.predictions._replace(images="other")
    comparison = compare.gather_runs([first, second])
    assert not comparison.comparable
    assert comparison.differences == []
    assert "cannot be compared" in comparison.verdict
