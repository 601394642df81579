"""Tables of the cost of saving, and of killed runs that resumed to the same bits."""

from __future__ import annotations

from typing import Any

from tables.words import where


def saving(r: dict[str, Any]) -> str:
    lines = [
        "## What saving costs",
        "",
        "One save of all that continuing needs, fsynced, with hashes, every "
        f"{r['save_seconds']:.0f} s of training; and of the model file as well, where an epoch "
        "since the last save was the best so far.",
        "",
        "| network | weights | state MB | model MB | state s | of the training | both s | CPU s "
        "| of the training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {n['parameters']:,} | {n['state_mb']:.1f} | {n['model_mb']:.1f} | "
        f"{n['state_seconds']:.3f} | **{n['state_share']:.2%}** | {n['seconds']:.3f} | "
        f"{n['cpu_seconds']:.3f} | **{n['share']:.2%}** |"
        for name, n in r["networks"].items()
    ]
    return "\n".join([*lines, "", where(r), ""])


def chaos(r: dict[str, Any]) -> str:
    lines = [
        "## Killed and continued",
        "",
        "Trainings (augmentation, mixed images, dropout, averaged weights, early stopping) killed "
        "by SIGKILL at random moments, continued by the same command, and compared with one "
        "that was left alone: weights, optimiser, averages, metrics, choice of epoch, test.",
        "",
        "| processes | killed | the same bits | minutes |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {case['processes']} | {case['kills']} | **{case['same']}/{case['kills']}** | "
        f"{case['minutes']:.0f} |"
        for case in (r[key] for key in ("one", "two") if key in r)
    ]
    return "\n".join([*lines, "", where(r), ""])
