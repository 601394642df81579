"""Table of the options for unequal classes."""

from __future__ import annotations

from typing import Any

from tables.words import sd, where

METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
}


def unequal_classes(r: dict[str, Any]) -> str:
    lines = [
        "## Unequal classes",
        "",
        f"Recipe `{r['recipe']}` with one option each; {r['seeds']} seeds, each with another "
        "selection of training images and another validation split. Epochs are selected by macro "
        "F1 on validation, the test split is used once by each run. Mean ± sd in %, and in "
        "brackets the paired gain over `nothing` in points with its 95% t interval.",
        "",
    ]
    for name, case in r["cases"].items():
        counts = case["counts"].values()
        n = next(iter(case["runs"].values()))[0]["n"]
        lines += [
            f"**{name}**, {max(counts):,} to {min(counts):,} training and validation images of a "
            f"class, {sum(counts):,} in total; {n:,} test images:",
            "",
            f"| option | {' | '.join(METRICS.values())} | lowest recall of a class | CPU s |",
            "|---|---|---|---|---|---|",
        ]
        for option, summary in case["summary"].items():
            runs = case["runs"][option]
            cells = [_cell(summary[metric]) for metric in METRICS]
            lowest = sum(min(run["recall"].values()) for run in runs) / len(runs)
            seconds = sum(run["cpu_seconds"] for run in runs) / len(runs)
            lines.append(
                f"| `{option}` | {' | '.join(cells)} | {100 * lowest:.1f} | {seconds:,.0f} |"
            )
        lines.append("")
    return "\n".join([*lines, where(r), ""])


def _cell(figures: dict[str, Any]) -> str:
    text = f"{100 * figures['mean']:.2f}{sd(figures['sd'])}"
    if "gain" not in figures:
        return text
    interval = figures["gain_interval95"]
    ends = f", {100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}" if interval else ""
    gain = f"{100 * figures['gain']:+.2f}{ends}"
    is_clear = interval is not None and (interval[0] > 0 or interval[1] < 0)
    return f"{text} (**{gain}**)" if is_clear else f"{text} ({gain})"
