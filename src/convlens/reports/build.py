"""Builds a report: from the names of runs to one HTML file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from convlens import run
from convlens.device import preserve_torch_settings
from convlens.errors import UsageError
from convlens.reports import compare, sections
from convlens.reports.contents import ReportContents, gather_contents
from convlens.reports.html import PageSection, compose_page
from convlens.utils import files
from convlens.utils.console import progress_bar, quiet_mode

MAX_FOLDER_NAME = 120  # characters of the joined names of runs


@dataclass(frozen=True)
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

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@preserve_torch_settings()
def report(
    names: Sequence[str],
    *,
    output: str | Path | None = None,
    audit: bool | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Report:
    """Write the page of a run, or a page that compares several.

    Args:
        names: runs by name, folder or model file.
        output: the file; by default `plots/<run>/report.html`, or `plots/report-<a>-<b>/...`.
        audit: whether to inspect every image of the data set; by default only small sets.
        device: the best one by default.

    Raises:
        UsageError: no runs, or unknown ones.
        ModelFileError: damaged files.
        ResourceError: the page cannot be written.
    """
    if not names:
        raise UsageError("no run to report on", fix="name a run: convlens report RUN")
    names = list(dict.fromkeys(names))
    for name in names:  # a typo in the last name must not cost the work on the first
        run.find_run(name)
    with quiet_mode(quiet):
        runs = [
            gather_contents(name, audit=audit, device=device, with_images=len(names) == 1)
            for name in names
        ]
        if len(runs) == 1:
            (contents,) = runs
            verdict, split = sections.run_verdict(contents), contents.split
            head = functools.partial(sections.head_section, contents)
            text = _compose(contents.name, head, sections.SECTIONS, contents)
        else:
            comparison = compare.gather_runs(runs)
            verdict, split = comparison.verdict, comparison.split
            head = functools.partial(compare.comparison_head, comparison)
            title = " and ".join(comparison.names)
            text = _compose(title, head, compare.COMPARE_SECTIONS, comparison)
    path = Path(output) if output is not None else _output_path(runs)
    files.write_atomic(path, text)
    missing = list(dict.fromkeys(line for contents in runs for line in contents.missing))
    return Report(path, len(text), [c.name for c in runs], split, verdict, missing)


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
    joined = "-".join(run.safe_name(contents.name) for contents in runs)
    return run.PLOTS_DIR / f"report-{joined[:MAX_FOLDER_NAME]}" / "report.html"
