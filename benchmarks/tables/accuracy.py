"""Tables of test accuracies, of variants compared on validation, and of published results."""

from __future__ import annotations

import re
import statistics
from typing import Any

from tables.words import circumstances, mean, sd, span

# Images per class, test accuracy in %, method and source.
PUBLISHED = (
    (50, "55.18", "tuned cross-entropy, WRN-16-8, 500 epochs, ciFAIR-10 (GEM, 30 runs)"),
    (50, "52.39", "cosine loss, ciFAIR-10 (GEM)"),
    (50, "58.00", "harmonic networks, ciFAIR-10 (GEM)"),
    (50, "66.5", "bigger network, long schedule, ciFAIR-10 (Brigato & Mougiakakou 2023)"),
    (50, "67.30", "ChimeraMix, WRN-16-8, ciFAIR-10 (as listed by Papers with Code)"),
    (50, "70.09", "ChimeraMix + AutoAugment, ciFAIR-10 (as listed by Papers with Code)"),
    (100, "74.96", "ChimeraMix, ciFAIR-10 (as listed by Papers with Code)"),
    (100, "76.76", "ChimeraMix + AutoAugment, ciFAIR-10 (as listed by Papers with Code)"),
)


def accuracies(results: list[dict[str, Any]]) -> str:
    lines = [
        "## Accuracy",
        "",
        "| recipe | overrides | n | runs | test accuracy | each | epochs | "
        "training s a run | CPU s | weights | computed in |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        each = ", ".join(f"{100 * accuracy:.2f}" for accuracy in r["accuracies"])
        changed = " ".join(f"`{key}`" for key in r["overrides"]) or "–"
        plan = f"{r['plan']['precision']}, {r['plan']['memory_format']}"
        lines.append(
            f"| {_recipe(r)} | {changed} | {r['n']:,} | {_runs(r)} | "
            f"**{100 * r['mean']:.2f}{sd(r['sd'])}%** | {each} | {span(r['epochs'])} | "
            f"{mean(r['training_seconds'])} | {mean(r.get('cpu_seconds'))} | "
            f"{_weights(r)} | {plan} |"
        )
    lines += ["", *circumstances(results), ""]
    return "\n".join(lines)


def variants(results: list[dict[str, Any]]) -> str:
    """Compare the variants of a recipe on validation with the first of them."""
    lines = ["## Settings side by side, on validation", ""]
    for command in dict.fromkeys(r["command"] for r in results):
        group = [r for r in results if r["command"] == command]
        group.sort(key=lambda r: r["place"])
        first = group[0]
        changed = f" with {' '.join(f'`{key}`' for key in first['overrides'])}" * bool(
            first["overrides"]
        )
        lines += [
            f"`{first['recipe']}`{changed}: {_runs(first)}, validation accuracy (n = "
            f"{first['n']:,}) of the last weights, and what each adds to `{_variant(first)}` "
            "within the same seed.",
            "",
            "| setting | validation | over the first | its loss, nats | CPU s a run |",
            "|---|---|---|---|---|",
        ]
        for r in group:
            gain = "–" if r is first else f"{100 * r['over_first']:+.2f}{sd(r['over_first_sd'])}"
            lines.append(
                f"| `{_variant(r)}` | {100 * r['mean']:.2f}{sd(r['sd'])}% | {gain} | "
                f"{statistics.fmean(r['losses']):.2f} | {mean(r.get('cpu_seconds'))} |"
            )
        lines += ["", *circumstances(group), ""]
    return "\n".join(lines)


def published(results: list[dict[str, Any]]) -> str:
    """Compare our results on small subsets of CIFAR-10 with published ones."""
    rows = [(per_class, accuracy, what, False) for per_class, accuracy, what in PUBLISHED]
    for r in results:
        found = re.search(r"(\d+) of each class", r["splits"]["train"])
        if found and "tiny" in r["recipe"]:  # trained from scratch
            label = f"**convlens {_recipe(r)}**, {_runs(r)}, CIFAR-10's own test set"
            rows.append((int(found[1]), f"**{100 * r['mean']:.2f}{sd(r['sd'])}**", label, True))
    rows.sort(key=lambda row: (row[0], row[1].strip("*")))
    sizes = {per_class for per_class, _, _, ours in rows if ours}
    lines = [
        "## CIFAR-10 from few images, from scratch, beside published results",
        "",
        "Published figures as their authors give them, most on ciFAIR-10, whose test set has "
        "CIFAR-10's near-duplicates replaced (there all are some 0.5 to 1 points lower); none was "
        "run here.",
        "",
        "| images a class | test % | method |",
        "|---|---|---|",
        *(f"| {n} | {accuracy} | {what} |" for n, accuracy, what, _ in rows if n in sizes),
    ]
    return "\n".join([*lines, ""])


def _recipe(r: dict[str, Any]) -> str:
    variant = f" `{_variant(r)}`" if _variant(r) else ""
    return f"`{r['recipe']}`{variant}{' (refit)' if r.get('refit') else ''}"


def _variant(r: dict[str, Any]) -> str | None:
    """The variant's name. Results recorded before the rename call it a setting."""
    name: str | None = r.get("variant", r.get("setting"))
    return name


def _runs(r: dict[str, Any]) -> str:
    """Return e.g. `3 seeds` or `2 splits × 3 seeds`."""
    seeds, splits = len(set(r["seeds"])), len(set(r.get("data_seeds", [0])))
    words = [f"{n} {what}s" for n, what in ((splits, "split"), (seeds, "seed")) if n > 1]
    return " × ".join(words) or "1 run"


def _weights(r: dict[str, Any]) -> str:
    """Return the number of weights, and of trained ones if some were frozen."""
    trained = r.get("trainable_parameters", r["parameters"])
    some = f" ({trained:,} trained)" if trained != r["parameters"] else ""
    return f"{r['parameters']:,}{some}"
