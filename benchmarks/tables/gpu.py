"""Tables of the GPU benchmarks: speed records, warm runs, share of the peak rate."""

from __future__ import annotations

from typing import Any

from tables.words import sd, where


def cifar_speed(r: dict[str, Any]) -> str:
    lines = [
        f"## CIFAR-10 to 94%, seconds ({r['hardware'].get('gpu', 'CPU')})",
        "",
        "Warm: whitening, training and evaluation with six views, after a run that compiles. "
        "Cold: from starting the process to the first test accuracy, compiler caches empty. "
        "airbench94_muon and hiverge's speedrun run unmodified in the same session.",
        "",
        "| what | warm s | cold s | test accuracy (TTA) | runs |",
        "|---|---|---|---|---|",
    ]
    peers = [name for name in ("airbench", "hiverge") if name in r]
    lines += [_warm_rows(name, r[name], r[name]["cold_seconds"]) for name in peers]
    cold = r["cold"].get("seconds")
    for key, figures in r.items():
        if key.startswith("warm_"):
            mode = key.removeprefix("warm_")
            lines.append(
                _warm_rows(f"convlens, {mode}", figures, cold if mode == "eager" else None)
            )
    return "\n".join([*lines, "", where(r), ""])


def warm_mnist(r: dict[str, Any]) -> str:
    lines = [
        f"## `{r['recipe']}`, warm, seconds ({r['hardware'].get('gpu', 'CPU')})",
        "",
        "| steps | training and test s | – | test accuracy | runs |",
        "|---|---|---|---|---|",
    ]
    modes = ("eager", "graph", "reduce-overhead", "compiled")
    by_mode = {key: value for key, value in r.items() if key in modes}
    lines += [_warm_rows(mode, figures, None) for mode, figures in by_mode.items()]
    return "\n".join([*lines, "", where(r), ""])


def roofline(r: dict[str, Any]) -> str:
    rate = r["matmul"]
    lines = [
        f"## How much of the device each recipe uses ({r['hardware'].get('gpu', 'CPU')})",
        "",
        f"Measured rate of {rate['size']} x {rate['size']} products in {rate['precision']}: "
        f"**{rate['flops_a_second'] / 1e12:.2f} TFLOP/s**. Loop / bare: images a second of the "
        "real loop, augmentation included, over the same step on one resident batch.",
        "",
        "| recipe | plan | batch | GFLOP an image | images/s | loop / bare | TFLOP/s | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in r["rows"]:
        if "failed" in row:
            lines.append(f"| {row['recipe']} | {row['plan']} | failed: {row['failed']} | | | | | |")
            continue
        lines.append(
            f"| {row['recipe']} | {row['plan']} | {row['batch']} | "
            f"{row['flops_an_image'] / 1e9:.3f} | {row['images_a_second']:,.0f} | "
            f"{row['loop_over_bare']:.3f} | {row['flops_a_second'] / 1e12:.2f} | "
            f"**{100 * row['share']:.1f}%** |"
        )
    return "\n".join([*lines, "", where(r), ""])


def _warm_rows(name: str, figures: dict[str, Any], cold: float | None) -> str:
    if "seconds" not in figures:
        return f"| {name} | failed: {figures.get('failed')} | | | |"
    return (
        f"| {name} | **{figures['seconds']:.3f}{_sd_seconds(figures['seconds_sd'])}** | "
        f"{'–' if cold is None else f'{cold:.1f}'} | {100 * figures['tta']:.2f}"
        f"{sd(figures['tta_sd'])}% | {len(figures['runs'])} |"
    )


def _sd_seconds(sd: float | None) -> str:
    return "" if sd is None else f" ± {sd:.3f}"
