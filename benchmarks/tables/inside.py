"""Tables of looking inside networks and of label errors."""

from __future__ import annotations

from typing import Any

from tables.words import circumstances, where


def looking(r: dict[str, Any]) -> str:
    lines = [
        "## Looking inside",
        "",
        "All stages of a ResNet-18 for one image, from pixels to the PNG and the arrays on disk, "
        "after the model is loaded; the forward pass alone below.",
        "",
        "| what | seconds | quartiles | CPU s |",
        "|---|---|---|---|",
    ]
    for name, case in r.items():
        if isinstance(case, dict) and "cpu_seconds" in case:
            low, _, high = case["quartiles"]
            lines.append(
                f"| {name.replace('_', ' ')} | **{case['seconds']:.2f}** | {low:.2f}-{high:.2f} | "
                f"{case['cpu_seconds']:.2f} |"
            )
    return "\n".join([*lines, "", where(r), ""])


def attribution(r: dict[str, Any]) -> str:
    lines = [
        "## What attribution costs",
        "",
        "Time of a method over one forward and backward pass of the same images, paired.",
        "",
        "| network and images | method | ms | over a pass | quartiles |",
        "|---|---|---|---|---|",
    ]
    for name, case in r.items():
        if not (isinstance(case, dict) and "grad-cam" in case):
            continue
        for method, figures in case.items():
            low, _, high = figures["quartiles"]
            lines.append(
                f"| {name.replace('_', ' ')} | {method} | {figures['ms']:.0f} | "
                f"**{figures['ratio']:.2f}** | {low:.2f}-{high:.2f} |"
            )
    return "\n".join([*lines, "", where(r), ""])


def labels(results: list[dict[str, Any]]) -> str:
    """Format how many planted label errors our rule and those of cleanlab find."""
    lines = [
        "## Label errors that were planted (`convlens labels`)",
        "",
        "A share of the labels is wrong: any other class (symmetric) or each class to the next "
        "(asymmetric). Counted are the images outside the test split; a set's own errors count as "
        "right labels. AP: average precision of the ranking, by the probability of the given "
        "label / by its margin over the best other class.",
        "",
        "| set | errors | images | planted | out-of-fold accuracy | named | precision | recall "
        "| AP | estimated noise | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        for kind, c in r["cases"].items():
            shares = ("–", "–", "–")
            if c["planted"]:
                first, second = c["average_precision"], c["average_precision_margin"]
                shares = (
                    *(f"**{c[k]:.2f}**" for k in ("precision", "recall")),
                    f"{first:.2f} / {second:.2f}",
                )
            lines.append(
                f"| {r['data']} | {kind} | {c['images']:,} | {c['planted']} | "
                f"{100 * c['accuracy']:.1f}% | {c['named']} | {' | '.join(shares)} | "
                f"{100 * c['noise']:.1f}% | {c['cpu_seconds']:.0f} |"
            )
    lines += [
        "",
        "The same probabilities by each rule of cleanlab's (`filter_by`), precision / recall:",
        "",
    ]
    cases = [(r, kind, c) for r in results for kind, c in r["cases"].items() if c["planted"]]
    lines.append("| rule |" + "".join(f" {r['data']}, {kind} |" for r, kind, _ in cases))
    lines.append("|---|" + "---|" * len(cases))
    for rule in results[0]["cases"]["symmetric"]["rules"]:
        found = [c["rules"][rule] for _, _, c in cases]
        cells = "".join(f" {f['precision']:.2f} / {f['recall']:.2f} |" for f in found)
        lines.append(f"| `{rule}` |{cells}")
    return "\n".join([*lines, "", *circumstances(results), ""])
