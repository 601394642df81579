"""Table of `results/peers.json`: images per second of all peers, and which ones were faster."""

from __future__ import annotations

from typing import Any

FIRST = "convlens"


def peers(r: dict[str, Any], where: str) -> str:
    """Format the images per second of every peer on every network.

    Args:
        r: the result of `against_peers.py`.
        where: the line with command, date, hardware and versions.
    """
    rows, bound = list(r["rows"].values()), r["bound"]
    lines = [
        "## Images a second beside other loops",
        "",
        "The same network, batch, Adam and images, trained in turn in one run; medians of "
        f"{r['rounds']} windows, in brackets convlens over the peer (paired within rounds; with "
        "fewer than six rounds the interval below is their range). Of each peer the variant "
        "counts that was fastest when all were tried (named below). The last line is no loop: "
        "plain PyTorch's forward, backward and fused Adam on one batch that is there already.",
        "",
        "| loop |" + "".join(f" {_title(row)} |" for row in rows),
        "|---|" + "---|" * len(rows),
    ]
    names = [name for name in r["titles"] if name != bound]
    for name in [*names, *([bound] if bound in r["titles"] else [])]:
        cells = "".join(f" {_cell(row, name, names)} |" for row in rows)
        lines.append(f"| {r['titles'][name]} |{cells}")
    lines += ["", *_verdict(rows, names, r["titles"]), "", "Variants and intervals:", ""]
    for row in rows:
        each = "; ".join(
            f"{r['titles'][name]}: {found['variant']}, {_interval(found)}"
            for name, found in row["peers"].items()
            if name != FIRST
        )
        lines.append(f"- {_title(row)}: {each}.")
    versions = ", ".join(f"{name} {number}" for name, number in sorted(r["versions"].items()))
    return "\n".join([*lines, "", f"{where} Peers: {versions}.", ""])


def _title(row: dict[str, Any]) -> str:
    return f"{row['title']}, {row['parameters']:,} weights, batch {row['batch']}"


def _cell(row: dict[str, Any], name: str, names: list[str]) -> str:
    """Return a rate, bold if it is the best of the row, and the ratio of convlens to it."""
    found = row["peers"][name]
    rate = f"{found['images_per_second']:,.0f}"
    best = max(row["peers"][n]["images_per_second"] for n in names)
    if found["images_per_second"] == best and name in names:
        rate = f"**{rate}**"
    return rate if name == FIRST else f"{rate} ({found['convlens_over']:.2f})"


def _interval(found: dict[str, Any]) -> str:
    low, high = found["convlens_over_interval"]
    return f"{low:.2f}-{high:.2f}"


def _verdict(rows: list[dict[str, Any]], names: list[str], titles: dict[str, str]) -> list[str]:
    """Return sentences that name the peers that were faster."""
    lost, even = [], []
    for row in rows:
        for name in names:
            if name == FIRST:
                continue
            found = row["peers"][name]
            entry = f"{titles[name]} on {row['title']} ({found['convlens_over']:.2f})"
            if found["convlens_over"] < 1:
                lost.append(entry)
            elif found["convlens_over_interval"][0] < 1:
                even.append(entry)
    lines = []
    if lost:
        lines.append(f"**Not won**: {'; '.join(lost)}.")
    if even:
        lines.append(f"Ahead by the median, but not in every round: {'; '.join(even)}.")
    if not lines:
        lines.append("convlens is first in every column, and was so in every round.")
    return lines
