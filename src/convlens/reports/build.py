"""Builds a report: from the names of runs to one HTML file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.markup import escape

from convlens import evaluation
from convlens.device import preserve_torch_settings
from convlens.errors import UsageError, check_path
from convlens.reports import compare, sections
from convlens.reports.contents import ReportContents, gather_contents
from convlens.reports.html import PageSection, compose_page
from convlens.run import PLOTS_DIR, RunLike, find_run, run_reference, safe_name
from convlens.user_code import accepts_trust
from convlens.utils import files, notebook
from convlens.utils.console import message_scope, print_status, progress_bar, quiet_mode

MAX_FOLDER_NAME = 120  # characters of the joined names of runs


@dataclass(frozen=True, repr=False)
class Report:
    """A page that was written.

    Attributes:
        bytes: size of the file.
        verdict: the first sentence of the page.
        missing: sentences about everything the page could not show.
    """

    path: Path
    bytes: int
    runs: list[str]
    split: str
    verdict: str
    missing: list[str]

    def __repr__(self) -> str:
        return f"Report({str(self.path)!r}, {self.bytes / 1e6:.1f} MB)"

    def _repr_html_(self) -> str:
        """Return the verdict and a link to the page for notebooks."""
        return notebook.paragraph(self.verdict) + notebook.link(self.path)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@accepts_trust
@message_scope()
@preserve_torch_settings()
def report(
    *runs: RunLike,
    output: str | Path | None = None,
    audit: bool | None = None,
    device: str | None = None,
    quiet: bool = True,
    trust_code: bool = False,
) -> Report:
    """Write the page of a run, or a page that compares several.

    Args:
        runs: runs by name, folder or model file, or as `Run`.
        output: the file; by default `plots/<run>/report.html`, or `plots/report-<a>-<b>/...`.
        audit: whether to inspect every image of the data set; by default only small sets.
        device: the best one by default.
        trust_code: import user code that the model needs; otherwise that is an error.

    Raises:
        UsageError: no runs, or unknown ones.
        ModelFileError: damaged files.
        ResourceError: the page cannot be written.
    """
    if not runs:
        raise UsageError("no run to report on", fix="name a run: convlens report RUN")
    target = None if output is None else check_path("output", output)
    names = list(dict.fromkeys(run_reference(each) for each in runs))
    for name in names:  # a typo in the last name must not cost the work on the first
        find_run(name)
    with quiet_mode(quiet):
        reports = [
            gather_contents(name, audit=audit, device=device, with_images=len(names) == 1)
            for name in names
        ]
        if len(reports) == 1:
            (contents,) = reports
            verdict, split = sections.run_verdict(contents), contents.split
            head = functools.partial(sections.head_section, contents)
            text = _compose(contents.name, head, sections.SECTIONS, contents)
        else:
            comparison = compare.gather_runs(reports)
            verdict, split = comparison.verdict, comparison.split
            head = functools.partial(compare.comparison_head, comparison)
            title = " and ".join(comparison.names)
            text = _compose(title, head, compare.COMPARE_SECTIONS, comparison)
    path = target or _output_path(reports)
    files.write_atomic(path, text)
    with quiet_mode(quiet):
        for contents in reports:  # last: a page that is not written is not a use of the test split
            _log_test_use(contents)
    missing = list(dict.fromkeys(line for contents in reports for line in contents.missing))
    return Report(path, len(text), [c.name for c in reports], split, verdict, missing)


def _log_test_use(contents: ReportContents) -> None:
    if contents.shows_test_split and contents.loaded and contents.summary:
        n = int(contents.summary["n"])
        uses = evaluation.log_test_use(contents.run_dir, contents.loaded, n, "report")
        print_status(f"{escape(contents.name)}: test set used {evaluation.times(uses)} (logged)")


def _compose(
    title: str,
    head: Callable[[], Markup],
    parts: Mapping[str, PageSection],
    contents: ReportContents | compare.ComparedRuns,
) -> bytes:
    with progress_bar("writing the page", len(parts)) as bar:
        return compose_page(title, head, parts, contents, bar.advance).encode("utf-8")


def _output_path(runs: Sequence[ReportContents]) -> Path:
    if len(runs) == 1:
        return runs[0].run_dir.plots / "report.html"
    joined = "-".join(safe_name(contents.name) for contents in runs)
    return PLOTS_DIR / f"report-{joined[:MAX_FOLDER_NAME]}" / "report.html"
