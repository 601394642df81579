"""Print a diagnosis: findings, their evidence and what to do."""

from __future__ import annotations

import shlex
from typing import Any

from rich.markup import escape

from convlens.diagnosing.diagnosis import Diagnosis
from convlens.diagnosing.findings import Finding
from convlens.showing.results import stdout


def diagnosed(result: Diagnosis) -> None:
    """Print the findings with their evidence, then the healthy and the undecided rules."""
    out = stdout()
    out.print(
        f"[bold]{escape(result.run)}[/]: {result.status}, {result.epochs:,} epochs in metrics.csv"
    )
    for finding in result.findings:
        out.print(f"\n[bold red]{finding.rule}[/]: {escape(finding.what)}")
        out.print(escape(f"  numbers    {numbers(finding)}"))
        out.print(escape(f"  threshold  {finding.threshold}"))
        out.print(escape(f"  do         {finding.do}"))
        if finding.overrides:
            out.print(escape(f"  try        {' '.join(map(shlex.quote, finding.overrides))}"))
    if result.findings:
        out.print()
    if result.healthy:
        none = "no sign of" if result.findings else "nothing found: no sign of"
        out.print(f"{none} {', '.join(result.healthy)}")
    for rule, why in result.untold.items():
        out.print(f"[dim]cannot tell: {rule}: {escape(why)}[/]")


def numbers(finding: Finding) -> str:
    """Return the evidence in one line; long tables are cut."""
    return ", ".join(f"{key} {_text(value)}" for key, value in finding.evidence.items())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        entries = [f"{key} {_text(inner)}" for key, inner in value.items()]
        more = f" and {len(entries) - 12} more" if len(entries) > 12 else ""
        return f"({', '.join(entries[:12])}{more})"
    return (
        f"{value:.4g}" if isinstance(value, float) else "unknown" if value is None else f"{value}"
    )
