"""Makes `BENCHMARKS.md` from `benchmarks/results/*.json`, and from nothing else.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from peers_table import peers

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parent.parent / "BENCHMARKS.md"
HEAD = """# Benchmarks

Made by `python benchmarks/report.py` from the raw results in `benchmarks/results/`, each of which
holds its command, versions and hardware. Accuracies are of the test split, read once with weights
chosen by validation (or the last ones, where the recipe says so): mean ± sample deviation over
seeds (and splits). Ratios are medians of paired windows in one run; the machines are shared, so
look at ratios before milliseconds, and at CPU seconds (user and system, all threads) before
seconds.
"""

# Images a class, test accuracy in %, method and source.
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


def where(result: dict[str, Any]) -> str:
    """One line of circumstances, for below a table."""
    h = result["hardware"]
    return (
        f"`{result['command']}`, {result['date']}: {h['cpu']} ({h['cpu_capability']}), "
        f"{h['threads']} threads, Python {h['python']}, torch {h['torch'].split('+')[0]}, "
        f"torchvision {result['torchvision'].split('+')[0]}, load {result['load_average']:.1f}."
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
            f"**{100 * r['mean']:.2f}{_sd(r['sd'])}%** | {each} | {_span(r['epochs'])} | "
            f"{_mean(r['training_seconds'])} | {_mean(r.get('cpu_seconds'))} | "
            f"{_weights(r)} | {plan} |"
        )
    lines += ["", *_circumstances(results), ""]
    return "\n".join(lines)


def _circumstances(results: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(f"- {where(r)}" for r in results))


def settings(results: list[dict[str, Any]]) -> str:
    """Settings of a recipe that were compared on validation, beside the first of them."""
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
            f"{first['n']:,}) of the last weights, and what each adds to `{first['setting']}` "
            "within the same seed.",
            "",
            "| setting | validation | over the first | its loss, nats | CPU s a run |",
            "|---|---|---|---|---|",
        ]
        for r in group:
            gain = "–" if r is first else f"{100 * r['over_first']:+.2f}{_sd(r['over_first_sd'])}"
            lines.append(
                f"| `{r['setting']}` | {100 * r['mean']:.2f}{_sd(r['sd'])}% | {gain} | "
                f"{statistics.fmean(r['losses']):.2f} | {_mean(r.get('cpu_seconds'))} |"
            )
        lines += ["", *_circumstances(group), ""]
    return "\n".join(lines)


def published(results: list[dict[str, Any]]) -> str:
    """Ours on tiny CIFAR-10 between what others published."""
    rows = [(per_class, accuracy, what, False) for per_class, accuracy, what in PUBLISHED]
    for r in results:
        found = re.search(r"(\d+) of each class", r["splits"]["train"])
        if found and "tiny" in r["recipe"]:  # not what was pre-trained elsewhere
            label = f"**convlens {_recipe(r)}**, {_runs(r)}, CIFAR-10's own test set"
            rows.append((int(found[1]), f"**{100 * r['mean']:.2f}{_sd(r['sd'])}**", label, True))
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


def _sd(value: float | None) -> str:
    return "" if value is None else f" ± {100 * value:.2f}"


def _recipe(r: dict[str, Any]) -> str:
    setting = f" `{r['setting']}`" if r.get("setting") else ""
    return f"`{r['recipe']}`{setting}{' (refit)' if r.get('refit') else ''}"


def _runs(r: dict[str, Any]) -> str:
    """`3 seeds`, `2 splits × 3 seeds`."""
    seeds, splits = len(set(r["seeds"])), len(set(r.get("data_seeds", [0])))
    words = [f"{n} {what}s" for n, what in ((splits, "split"), (seeds, "seed")) if n > 1]
    return " × ".join(words) or "1 run"


def _mean(seconds: list[float | None] | None) -> str:
    known = [value for value in seconds or () if value is not None]
    return f"{statistics.fmean(known):,.0f}" if known and len(known) == len(seconds or ()) else "–"


def _weights(r: dict[str, Any]) -> str:
    """How many there are, and how many were trained where some were frozen."""
    trained = r.get("trainable_parameters", r["parameters"])
    some = f" ({trained:,} trained)" if trained != r["parameters"] else ""
    return f"{r['parameters']:,}{some}"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def time_to_99(r: dict[str, Any]) -> str:
    each = ", ".join(f"{seconds:.1f}" for seconds in r["training_seconds"])
    lines = [
        "## Seconds of training to 99% on MNIST",
        "",
        "| what | seconds | test accuracy |",
        "|---|---|---|",
        f"| `{r['recipe']}`, mean of {len(r['seeds'])} seeds ({each}) | "
        f"**{r['seconds_mean']:.1f}** | {100 * r['accuracy_mean']:.2f} ± "
        f"{100 * r['accuracy_sd']:.2f}% |",
    ]
    peer = r.get("peer")
    if peer:
        for number, row in enumerate(peer["epochs"], 1):
            lines.append(
                f"| pytorch/examples `{peer['command']}`, unmodified, after epoch {number} | "
                f"{row['seconds']:.0f} | {100 * row['test']:.2f}% |"
            )
    if peer and "ratio" in r:
        reached = peer["seconds_to_99"] is not None
        lines += [
            "",
            f"The peer takes {'' if reached else 'more than '}**{r['ratio']:.0f} times** as long"
            f"{'' if reached else ' (it had not reached 99%)'}; its own tests between epochs are "
            "not counted. Our runs took place before, between and after its epochs, while it was "
            "held.",
        ]
    return "\n".join([*lines, "", where(r), ""])


def overhead(r: dict[str, Any]) -> str:
    lines = [
        "## What the loop costs",
        "",
        "Times of a training step over those of a bare one (forward, backward and optimiser on one "
        "resident batch), with the 95% interval of the median; 1.00 is the least there can be. "
        "Augmented steps are divided by a bare one that augments its batch, too.",
        "",
        "| network | bare ms | convlens / bare | interval | augmented / bare with the same "
        "operations | interval | DataLoader loop / bare |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in r.items():
        if not (isinstance(case, dict) and "convlens_over_bare" in case):
            continue
        cells = [f"{case['bare_ms_a_step']}"]
        for loop in ("convlens", "augmented"):
            low, *_, high = case.get(f"{loop}_over_bare_interval", ("", ""))
            ratio = case.get(f"{loop}_over_bare")
            cells += ["–", "–"] if not low else [f"**{ratio:.3f}**", f"{low:.3f}-{high:.3f}"]
        usual = case.get("dataloader_over_bare")
        cells.append("–" if usual is None else f"{usual:.2f}")
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", where(r), ""])


def startup(r: dict[str, Any]) -> str:
    lines = ["## Waiting", "", "| what | seconds | CPU s |", "|---|---|---|"]
    for key, value in r.items():
        if key.endswith("_seconds") and not key.endswith("_cpu_seconds"):
            name = key.removesuffix("_seconds")
            cpu = r.get(f"{name}_cpu_seconds", "–")
            lines.append(f"| {name.replace('_', ' ')} | {value} | {cpu} |")
    note = "Commands from the shell to their end, with compiled bytecode and warm files."
    if r["images"]:
        note += f" Starts are of {r['images']:,} 16 px PNGs, on top of imports; the first decodes."
    return "\n".join([*lines, "", note, "", where(r), ""])


def inference(r: dict[str, Any]) -> str:
    lines = [
        "## Inference",
        "",
        "`predict` over decoding the same files with as many threads, paired on a tenth of the "
        "files; then all of them, from the shell to the last line of CSV, and decoding alone.",
        "",
        "| files, network | predict / decode | quartiles | files | command s | decode s |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in r["predict"].items():
        low, _, high = case["quartiles"]
        lines.append(
            f"| {name} | **{case['ratio']:.2f}** | {low:.2f}-{high:.2f} | {case['files']:,} | "
            f"{case['command_seconds']:.1f} | {case['decode_seconds']:.1f} |"
        )
    lines += [
        "",
        "A pass as `evaluate` makes it, choice of memory format included, over the bare forward "
        "pass on normalised batches that are there already, in the best size and format tried.",
        "",
        "| network | images | evaluate / bare | quartiles | images/s | best bare |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in r["evaluate"].items():
        low, _, high = case["quartiles"]
        lines.append(
            f"| {name} | {case['images']:,} | **{case['ratio']:.3f}** | {low:.3f}-{high:.3f} | "
            f"{case['images'] / case['seconds']:,.0f} | {case['bare']} |"
        )
    return "\n".join([*lines, "", where(r), ""])


def allocator(r: dict[str, Any]) -> str:
    lines = [
        "## Keeping freed memory between steps (`device.keep_freed_memory`)",
        "",
        "| network | step time, kept / returned | page faults a step, returned | kept |",
        "|---|---|---|---|",
    ]
    for name, case in r["networks"].items():
        lines.append(
            f"| {name} | **{case['ratio']:.2f}** | {case['faults_returned']:,.0f} | "
            f"{case['faults_kept']:,.0f} |"
        )
    return "\n".join([*lines, "", where(r), ""])


def labels(results: list[dict[str, Any]]) -> str:
    """Planted label errors: what was found, and what cleanlab's other rules find."""
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
                shares = (*(f"**{c[k]:.2f}**" for k in ("precision", "recall")),
                          f"{first:.2f} / {second:.2f}")  # fmt: skip
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
    return "\n".join([*lines, "", *_circumstances(results), ""])


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


def scaling(r: dict[str, Any]) -> str:
    """Cost against work; the ratios are to the first row of the same table."""
    lines = [
        "## Cost against work",
        "",
        "CPU time of training and evaluating an image (its pixels, where the side changes), each "
        f"size in a process of its own, {r['rounds']} times in turn; ratios (to the first row, a "
        "pixel's where the side changes) are medians of those within a round. Images in memory: "
        f"at most {r['budget'] >> 20} MiB, larger sets stream.",
        "",
        "![CPU time against images, classes and pixels](docs/figures/scaling.svg)",
        "",
        "| images | classes | side | training µs | ratio | evaluating µs | ratio | opening CPU s "
        "| peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in r["series"].items():
        for row in rows:
            sizes = " | ".join(
                f"**{row[key]:,}**" if key == name else f"{row[key]:,}"
                for key in ("images", "classes", "side")
            )
            each = row["side"] ** 2 if name == "side" else 1
            cells = (
                f"{1e6 * each * row[f'{key}_cpu']:,.0f} | **{row[f'{key}_cpu_ratio']:.2f}**"
                for key in ("train", "evaluate")
            )
            lines.append(
                f"| {sizes} | {' | '.join(cells)} | {each * row['open_cpu']:.2f} | "
                f"{row['peak'] / 2**20:,.0f} |"
            )
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


def processes(r: dict[str, Any]) -> str:
    """One process with all cores against several that share them and every batch."""
    lines = [
        f"## One process and {r['processes']} that share every batch (torchrun, gloo)",
        "",
        f"On the same {r['cores']} cores. A sum is of as many numbers as there are weights; it is "
        "part of each step together.",
        "",
        "| network of | batch | weights | ms a step alone | alone, one thread | together | a sum "
        "| together is faster by | quartiles | than one thread by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, c in r["cases"].items():
        low, _, high = c["faster_by_quartiles"]
        lines.append(
            f"| {name} | {c['batch']} | {c['weights']:,} | {c['alone_ms']:.1f} | "
            f"{c['one_thread_ms']:.1f} | {c['together_ms']:.1f} | {c['sum_ms']:.1f} | "
            f"**{c['faster_by']:.2f}** | {low:.2f}-{high:.2f} | "
            f"{c['faster_than_one_thread_by']:.2f} |"
        )
    return "\n".join([*lines, "", where(r), ""])


def _warm_rows(name: str, figures: dict[str, Any], cold: float | None) -> str:
    if "seconds" not in figures:
        return f"| {name} | failed: {figures.get('failed')} | | | |"
    return (
        f"| {name} | **{figures['seconds']:.3f}{_sd_seconds(figures['seconds_sd'])}** | "
        f"{'–' if cold is None else f'{cold:.1f}'} | {100 * figures['tta']:.2f}"
        f"{_sd(figures['tta_sd'])}% | {len(figures['runs'])} |"
    )


def _sd_seconds(sd: float | None) -> str:
    return "" if sd is None else f" ± {sd:.3f}"


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
            way = key.removeprefix("warm_")
            lines.append(_warm_rows(f"convlens, {way}", figures, cold if way == "eager" else None))
    return "\n".join([*lines, "", where(r), ""])


def warm_mnist(r: dict[str, Any]) -> str:
    lines = [
        f"## `{r['recipe']}`, warm, seconds ({r['hardware'].get('gpu', 'CPU')})",
        "",
        "| steps | training and test s | – | test accuracy | runs |",
        "|---|---|---|---|---|",
    ]
    ways = {key: value for key, value in r.items() if key in ("eager", "graph", "compiled")}
    lines += [_warm_rows(way, figures, None) for way, figures in ways.items()]
    return "\n".join([*lines, "", where(r), ""])


def saving(r: dict[str, Any]) -> str:
    lines = [
        "## What saving costs",
        "",
        "One save of all that continuing needs, and of the model file: fsynced, with hashes, "
        f"every {r['save_seconds']:.0f} s of training.",
        "",
        "| network | weights | state MB | model MB | seconds | CPU s | of the training |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {n['parameters']:,} | {n['state_mb']:.1f} | {n['model_mb']:.1f} | "
        f"{n['seconds']:.3f} | {n['cpu_seconds']:.3f} | **{n['share_of_interval']:.2%}** |"
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


SECTIONS = {
    "peers": lambda r: peers(r, where(r)),
    "cifar-speed": cifar_speed,
    "warm-mnist-fast": warm_mnist,
    "roofline": roofline,
    "roofline-cpu": roofline,
    "time-to-99": time_to_99,
    "overhead": overhead,
    "allocator": allocator,
    "inference": inference,
    "processes": processes,
    "startup": startup,
    "scaling": scaling,
    "saving": saving,
    "chaos": chaos,
    "looking": looking,
    "attribution": attribution,
}


def main() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    measured = [result for name, result in results.items() if name.startswith("accuracy-")]
    tested = [result for result in measured if result["split"] == "test"]
    compared = [result for result in measured if result["split"] == "val"]
    parts = [HEAD]
    parts += [accuracies(tested), published(tested)] if tested else []
    parts += [settings(compared)] if compared else []
    parts += [make(results[name]) for name, make in SECTIONS.items() if name in results]
    planted = [result for name, result in results.items() if name.startswith("labels-")]
    parts += [labels(planted)] if planted else []
    TARGET.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
