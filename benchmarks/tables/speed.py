"""Tables of training and inference speed, start-up, scaling and several processes."""

from __future__ import annotations

import statistics
from typing import Any

from tables.words import where


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


def depthwise(r: dict[str, Any]) -> str:
    """Table of `benchmarks/depthwise.py`."""
    lines = [
        "## Gradients of depthwise convolutions",
        "",
        f"Forward and backward pass of `{r['network']}` on {r['batch']} images of {r['size']} px, "
        "on the CPU. Milliseconds for an image, and in brackets the ratio to convlens (bfloat16 "
        "with its own gradients), as medians of rounds in turns.",
        "",
        "| trained from | torch, float32 | torch, bfloat16 | convlens, bfloat16 |",
        "|---|---|---|---|",
    ]
    for first, row in r["stages"].items():
        cells = [
            f"{row[kind]['ms_an_image']:.2f} (**{row[kind]['over_convlens']:.2f}**)"
            for kind in ("float32", "bfloat16")
        ]
        lines.append(f"| {first} | {' | '.join(cells)} | {row['convlens']['ms_an_image']:.2f} |")
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
        "`predict` over what it can't do without, paired on a tenth of the files: decoding them "
        "with as many threads, and the bare forward pass. Then all of them, from the shell to the "
        "last line of CSV, and decoding alone.",
        "",
        "| files, network | predict / needed | quartiles | of which decoding | files | command s "
        "| decode s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in r["predict"].items():
        low, _, high = case["quartiles"]
        share = case["decoding_seconds"] / case["least_seconds"]
        lines.append(
            f"| {name} | **{case['ratio']:.2f}** | {low:.2f}-{high:.2f} | {share:.0%} | "
            f"{case['files']:,} | {case['command_seconds']:.1f} | {case['decode_seconds']:.1f} |"
        )
    if "single" in r:  # results of earlier versions lack it
        lines += [
            "",
            "One image with an opened model (`Run.open`) over decoding its file, normalization and "
            "the bare forward pass; and with `convlens.predict`, which loads the model.",
            "",
            "| image, network | opened / needed | quartiles | ms | needed ms | loading, too, ms |",
            "|---|---|---|---|---|---|",
        ]
    for name, case in r.get("single", {}).items():
        low, _, high = case["quartiles"]
        lines.append(
            f"| {name} | **{case['ratio']:.2f}** | {low:.2f}-{high:.2f} | "
            f"{case['milliseconds']:.2f} | {case['least_milliseconds']:.2f} | "
            f"{case['loading_milliseconds']:.0f} |"
        )
    lines += [
        "",
        "The loop of `evaluate` over the bare forward pass on the same images, which are there "
        "normalised and in batches, in the best size and format tried; and a whole pass as the "
        "first one is, which times both memory formats on its first images.",
        "",
        "| network | images | loop / bare | quartiles | first pass / bare | quartiles | images/s "
        "| format |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in r["evaluate"].items():
        low, _, high = case["loop_quartiles"]
        least, _, most = case["quartiles"]
        lines.append(
            f"| {name} | {case['images']:,} | **{case['loop_ratio']:.3f}** | {low:.3f}-{high:.3f} "
            f"| **{case['ratio']:.3f}** | {least:.3f}-{most:.3f} | "
            f"{case['images'] / case['seconds']:,.0f} | {case['memory_format']} |"
        )
    return "\n".join([*lines, "", where(r), ""])


def allocator(r: dict[str, Any]) -> str:
    lines = [
        "## Keeping freed memory between steps (`utils.process.keep_freed_memory`)",
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


def scaling(r: dict[str, Any]) -> str:
    """Format cost against work, with ratios to the first row of the same table."""
    threads = ", on one thread" if r.get("threads") == 1 else ""
    lines = [
        "## Cost against work",
        "",
        "CPU time of training and evaluating an image (its pixels, where the side changes), each "
        f"size in a process of its own{threads}, {r['rounds']} times in turn; ratios (to the "
        "first row, a pixel's where the side changes) are medians of those within a round. Images "
        f"in memory: at most {r['budget'] >> 20} MiB, larger sets stream.",
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


def processes(r: dict[str, Any]) -> str:
    """Compare one process on all cores with several that share them and every batch."""
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


def explore(r: dict[str, Any]) -> str:
    """Table of `benchmarks/explore.py`."""
    watch = r["watch"]
    rows = [
        ("the page is shown after the command, s", r["page_s"], None),
        (
            "first prediction (torch is imported, the model loaded), s",
            r["first_prediction_s"],
            None,
        ),
        *(
            (f"from a drop to {what}, ms", r[key]["p50_ms"], r[key]["p95_ms"])
            for what, key in (
                ("the prediction", "drop_to_prediction"),
                ("the heat map", "drop_to_heat_map"),
                ("all activations", "drop_to_activations"),
            )
        ),
        ("updates of the brush on the digits network, per s", r["brush_updates_per_s"], None),
        (
            f"a frame while {r['scrolled_images']:,} images are scrolled through, ms",
            r["frame"]["p50_ms"],
            r["frame"]["p95_ms"],
        ),
        (
            "from a jump among them to all thumbnails in view, ms",
            r["jump_to_images"]["p50_ms"],
            r["jump_to_images"]["p95_ms"],
        ),
        *(
            (f"{what} behind a training, ms", watch[key]["p50_ms"], watch[key]["p95_ms"])
            for what, key in (("the table of runs", "row_behind"), ("curves", "curves_behind"))
        ),
    ]
    cells = [f"| {what} | {p50} | {'–' if p95 is None else p95} |" for what, p50, p95 in rows]
    ratios = watch["training_time_ratios"]
    return "\n".join(
        [
            "## The live page",
            "",
            "`convlens explore` from the side of a headless Chromium on the same cores: a "
            f"ResNet-18 at 224 px and {r['images']} photographs of 640 x 480 pixels.",
            "",
            "| what | median | p95 |",
            "|---|---|---|",
            *cells,
            "",
            "A training that the page and its browser watch takes "
            f"**{watch['training_time_ratio']:.2f}** times as long as without them (median of "
            f"{len(ratios)} pairs in turns, {min(ratios):.2f}-{max(ratios):.2f}). The longest "
            f"frame took {r['frame']['longest_ms']} ms.",
            "",
            where(r),
            "",
        ]
    )


def serve(r: dict[str, Any]) -> str:
    ratios = [pair["ratio"] for pair in r["pairs"]]
    alone = statistics.median(pair["one_process"] for pair in r["pairs"])
    long, times = r["endurance"], r["milliseconds"]
    memory = long["memory_mb"]
    errors = len(long["errors"]) or "no"
    return "\n".join(
        [
            "## Serving",
            "",
            f"`convlens serve` with a ResNet-18 at 224 px and {r['clients']} clients on the same "
            "cores, each of which sends a JPEG photograph and waits for the answer; and decoding "
            "and bare forward passes of the same files in one process, in the fastest of several "
            "batch sizes and both memory formats. Windows take turns.",
            "",
            "| serve, images/s | one process | ratio | lowest-highest | p50 ms | p95 ms | p99 ms "
            "| one client, p50 ms |",
            "|---|---|---|---|---|---|---|---|",
            f"| {r['images_per_second']:.1f} | {alone:.1f} | **{r['ratio']:.2f}** | "
            f"{min(ratios):.2f}-{max(ratios):.2f} | {times['p50']:.0f} | {times['p95']:.0f} | "
            f"{times['p99']:.0f} | {r['single_milliseconds']['p50']:.0f} |",
            "",
            f"{long['requests']:,} requests in {long['seconds']:.0f} s: {errors} errors, p99 "
            f"{long['milliseconds']['p99']:.0f} ms, memory {memory['early']:.0f} MB after a tenth "
            f"of the time and {memory['late']:.0f} MB in the last one.",
            "",
            where(r),
            "",
        ]
    )
