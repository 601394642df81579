"""Formatting shared by the tables."""

from __future__ import annotations

import statistics
from typing import Any


def where(result: dict[str, Any]) -> str:
    """Return a line with command, date, hardware and versions, to be put below a table."""
    h = result["hardware"]
    return (
        f"`{result['command']}`, {result['date']}: {h['cpu']} ({h['cpu_capability']}), "
        f"{h['threads']} threads, Python {h['python']}, torch {h['torch'].split('+')[0]}, "
        f"torchvision {result['torchvision'].split('+')[0]}, load {result['load_average']:.1f}."
    )


def circumstances(results: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(f"- {where(r)}" for r in results))


def sd(value: float | None) -> str:
    return "" if value is None else f" ± {100 * value:.2f}"


def mean(seconds: list[float | None] | None) -> str:
    known = [value for value in seconds or () if value is not None]
    return f"{statistics.fmean(known):,.0f}" if known and len(known) == len(seconds or ()) else "–"


def span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
