"""The whole job: runs to one HTML file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from convlens.device import preserve_torch_settings
from convlens.errors import UsageError
from convlens.reports import compare, sections
from convlens.reports.contents import ReportContents, gather_contents
from convlens.reports.html import PageSection, compose_page
from convlens.reports.sections import verdict_section
from convlens.run import PLOTS_DIR, RunLike, find_run, run_reference, safe_name
from convlens.utils import files
from convlens.utils.console import progress_bar, quiet_mode


@dataclass(frozen=True)
class Report:
    """A page that was written: where, how large, of which runs, and its first sentence.

    `missing` are sentences about what the page couldn't show.
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
    *runs: RunLike,
    output: str | Path | None = None,
    audit: bool | None = None,
    device: str | None = None,
    quiet: bool = True,
) -> Report:
    """Write the page of a run, or one that compares several.

    Args:
        runs: runs by name, folder or model file, or as `Run`.
        output: the file; by default `plots/<run>/report.html`, or `plots/report-<a>-<b>/...`.
        audit: whether to look at every image of the data set; by default where they are few.
        device: `cpu`, `cuda`, `cuda:1` or `mps`; by default the fastest one.
        quiet: show no progress.

    Raises:
        UsageError: no or unknown runs; ModelFileError: damaged files; ResourceError: the disk.
    """
    if not runs:
        raise UsageError("no run to report on", fix="name a run: convlens report RUN")
    names = list(dict.fromkeys(run_reference(run) for run in runs))
    for name in names:  # a typo in the last one must not cost the work on the first
        find_run(name)
    with quiet_mode(quiet):
        found = [
            gather_contents(name, audit=audit, on=device, alone=len(names) == 1) for name in names
        ]
    parts: dict[str, PageSection]
    head: Callable[[], Markup]
    content: ReportContents | compare.ComparedRuns
    if len(found) == 1:
        (only,) = found
        title, parts, content = only.name, sections.SECTIONS, only
        said, split = verdict_section(only), only.split
        head = functools.partial(sections.head_section, only)
    else:
        both = compare.gather_runs(found)
        title, parts, content = " and ".join(both.names), compare.COMPARE_SECTIONS, both
        said, split = both.verdict, both.split
        head = functools.partial(compare.compare_head, both)
    text = _compose_run_page(title, head, parts, content, quiet).encode("utf-8")
    path = Path(output) if output is not None else _output_path(found)
    files.write_atomic(path, text)
    missing = list(dict.fromkeys(line for each in found for line in each.missing))
    return Report(path, len(text), [each.name for each in found], split, said, missing)


def _compose_run_page(
    title: str,
    head: Callable[[], Markup],
    parts: dict[str, PageSection],
    content: object,
    quiet: bool,
) -> str:
    with quiet_mode(quiet), progress_bar("writing the page", len(parts)) as bar:

        def told(section: PageSection) -> PageSection:
            heading, inner = section

            def draw(found: Any) -> Any:
                html = inner(found)
                bar.advance()
                return html

            return heading, draw

        return compose_page(
            title, head, {name: told(part) for name, part in parts.items()}, content
        )


def _output_path(found: Sequence[ReportContents]) -> Path:
    if len(found) == 1:
        return found[0].run_dir.plots / "report.html"
    joined = "-".join(safe_name(each.name) for each in found)
    return PLOTS_DIR / f"report-{joined[:120]}" / "report.html"
