"""Table and figure of the accuracy on photographs after some minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from convlens.plots.charts import line_style
from convlens.plots.style import save_figure, use_style
from tables.words import sd, where

FOLDER = Path(__file__).parents[2]
TITLES = {
    "convlens": "convlens, `train.minutes`",
    "fastai": "fastai, `fine_tune`",
    "loop": "fine-tuning loop of tutorials",
    "features": "frozen features, scikit-learn",
}


def photographs(r: dict[str, Any]) -> str:
    few = f", {r['per_class']} training images of each class" if r["per_class"] else ""
    figure = Path("docs") / "figures" / f"{r['name']}.svg"
    save_figure(draw(r), FOLDER / figure)
    lines = [
        f"## Photographs: accuracy after some minutes ({r['data']}{few})",
        "",
        "The same images, weights (EfficientNet-Lite0 of ImageNet) and two threads for all; the "
        "time is from the start of the process to the last prediction of the test images. "
        f"Mean ± sample deviation over {r['splits']} splits. In brackets what convlens gains on "
        "the same test images, in points with its 95% interval; bold where it does not contain 0.",
        "",
        "| minutes | | test accuracy | convlens gains | seconds | image size | epochs |",
        "|---|---|---|---|---|---|---|",
    ]
    for minutes, case in r["minutes"].items():
        for name, summary in case["summary"].items():
            results = case["runs"][name].values()
            sizes, epochs = (
                _span([each.get(key) for each in results]) for key in ("size", "epochs")
            )
            lines.append(
                f"| {minutes} | {TITLES[name]} | {100 * summary['mean']:.1f}{sd(summary['sd'])}% | "
                f"{_gain(summary)} | {summary['seconds']:.0f} | {sizes} | {epochs} |"
            )
    alt = "Accuracy against minutes"
    return "\n".join([*lines, "", f"![{alt}]({figure.as_posix()})", "", where(r), ""])


def _gain(summary: dict[str, Any]) -> str:
    if "gain" not in summary:
        return "–"
    low, high = summary["gain_interval95"]
    text = f"{100 * summary['gain']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def _span(values: list[int | None]) -> str:
    known = sorted({value for value in values if value is not None})
    if not known:
        return "–"
    return str(known[0]) if len(known) == 1 else f"{known[0]}-{known[-1]}"


@use_style
def draw(r: dict[str, Any]) -> Figure:
    """Draw the accuracy against the time that was used, with the deviation over the splits."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for case in r["minutes"].values() for name in case["summary"]))
    for number, name in enumerate(names):
        summaries = [
            case["summary"][name] for case in r["minutes"].values() if name in case["summary"]
        ]
        x = [each["seconds"] / 60 for each in summaries]
        y = [100 * each["mean"] for each in summaries]
        spread = [100 * (each["sd"] or 0) for each in summaries]
        style = line_style(number)
        axes.errorbar(x, y, spread, capsize=2, label=TITLES[name].replace("`", ""), **style)
    axes.set(xscale="log", xlabel="minutes used", ylabel="test accuracy in %")
    ticks = [float(minutes) for minutes in r["minutes"]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="lower right")
    return figure
