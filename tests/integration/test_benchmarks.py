"""Arithmetic of the benchmarks, and the protocol by which peers take turns."""

from __future__ import annotations

import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.paths import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("n", "rank"),
    # The largest k with 2 P(Binomial(n, 1/2) < k) <= 5%, from tables of the sign test.
    [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (40, 14)],
)
def test_the_interval_of_a_median_lies_between_two_of_the_values(n: int, rank: int) -> None:
    from intervals import median_interval

    values = [float(v) for v in np.random.default_rng(n).permutation(n) + 1]
    assert median_interval(values) == (rank, n + 1 - rank)
    outside = 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n
    assert outside <= 0.05 or rank == 1


def row(folder: Path) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (24, 12, 12), dtype=np.uint8)
    np.savez(folder / "few.npz", images=images, labels=generator.integers(0, 10, 24))
    return {
        "name": "few",
        "net": "cnn",
        "options": {"widths": [2, 3]},
        "batch": 8,
        "steps": 3,
        "lr": 0.001,
        "augment": False,
        "pixels": str(folder / "few.npz"),
        "mean": [0.4],
        "std": [0.2],
        # Two convolutions without bias, two norms, the classifier.
        "parameters": 1 * 9 * 2 + 2 * 2 + 2 * 9 * 3 + 2 * 3 + 3 * 10 + 10,
    }


@pytest.mark.parametrize(
    "name", ["convlens", pytest.param("dataloader-tuned", marks=pytest.mark.slow)]
)
def test_a_peer_trains_in_its_turn_and_stops_on_request(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import against_peers
    from turns import Row

    peer = against_peers.PEERS[name]
    peer_here = against_peers.Peer(
        peer.title, peer.command, environment=""
    )  # the environment of the tests
    monkeypatch.setitem(against_peers.PEERS, name, peer_here)
    with (tmp_path / "log").open("w+") as log:
        process = against_peers.Process(name, tmp_path, tmp_path, log)
        assert "torch" in process.receive()["versions"]
        small_row = Row(**row(tmp_path))
        variants = process.variants(small_row)
        best, tried = against_peers.best_variant(process, small_row, variants[:2], 0.01)
        plans = ("fp32 contiguous", "fp32 channels_last")  # the plan that convlens timed best
        assert best in (variants if len(variants) > 1 else plans)
        assert set(tried) == (set(variants[:2]) if len(variants) > 1 else set())
        process.send({"do": "go", "seconds": 0.05})
        window = process.receive()
        assert window["images"] % 24 == 0
        assert window["seconds"] >= 0.05
        process.stop()
        process.start(small_row, variants[-1])
        process.stop()
        process.close()


def test_the_table_names_the_peers_that_were_faster() -> None:
    from tables.peers import peers

    def measured(rate: float, over: float, low: float) -> dict[str, Any]:
        return {
            "variant": "v",
            "images_per_second": rate,
            "convlens_over": over,
            "convlens_over_interval": [low, over + 0.1],
        }

    result = {
        "rounds": 5,
        "bound": "bare",
        "titles": {"convlens": "convlens", "fast": "Fast", "near": "Near", "bare": "Bare"},
        "versions": {"torch": "2"},
        "rows": {
            "net": {
                "title": "Net",
                "parameters": 1234,
                "batch": 8,
                "peers": {
                    "convlens": measured(1000, 1.0, 1.0),
                    "fast": measured(1250, 0.8, 0.7),
                    "near": measured(990, 1.01, 0.99),
                    "bare": measured(1300, 0.77, 0.7),
                },
            }
        },
    }
    text = peers(json.loads(json.dumps(result)), "Here.")
    assert "| Fast | **1,250** (0.80) |" in text
    assert "| Bare | 1,300 (0.77) |" in text
    assert "**Not won**: Fast on Net (0.80)." in text
    assert "not in every round: Near on Net (1.01)." in text
    assert sys.modules["tables.peers"].__file__ == str(BENCHMARKS / "tables" / "peers.py")


def test_long_tailed_sets_follow_the_exponential_profile(tmp_path: Path) -> None:
    from unequal_classes import Case, class_sizes, select_images

    # 5000 * 50^(-i / 9), Cao et al. 2019.
    sizes = class_sizes(10, 5000, 50)
    assert sizes == [5000, 3237, 2096, 1357, 879, 569, 368, 239, 154, 100]
    for name, count in {"a": 20, "b": 32, "c": 24}.items():
        for number in range(count):
            path = tmp_path / "set" / name / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    case = Case("set", None, 4, 24, {})
    first, second = (select_images(case, tmp_path, seed, 24, None) for seed in (0, 1))
    counts = [sum(row[1:] == (name, "train") for row in first) for name in "bca"]
    assert counts == [24, 12, 6]  # the largest class keeps the most images
    tests = [{path for path, _, split in rows if split == "test"} for rows in (first, second)]
    assert tests[0] == tests[1]
    assert len(tests[0]) == 8 + 6 + 5  # a quarter of each class
    assert first != second
    train = {path for path, _, split in first if split == "train"}
    assert not train & tests[0]
    assert first == select_images(case, tmp_path, 0, 24, None)


def test_the_gains_for_unequal_classes_are_paired_by_seed() -> None:
    from tables.unequal import unequal_classes
    from unequal_classes import METRICS, summarize

    def run(value: float) -> dict[str, Any]:
        scores = dict.fromkeys(METRICS, value)
        return {**scores, "recall": {"a": value, "b": 0.9}, "cpu_seconds": 60.0, "n": 100}

    runs = {"nothing": [run(0.5), run(0.7)], "balance": [run(0.61), run(0.79)]}
    summary = summarize(runs)
    means = summary["balance"]["macro_f1"]
    assert means["mean"] == pytest.approx(0.7)
    assert means["gain"] == pytest.approx(0.1)  # 0.11 and 0.09
    half = 12.7062 * 0.01  # t(0.975, 1) times the standard error
    assert means["gain_interval95"] == pytest.approx((0.1 - half, 0.1 + half), abs=1e-5)
    result = {
        "recipe": "folder",
        "seeds": 2,
        "cases": {"set": {"counts": {"a": 9, "b": 90}, "runs": runs, "summary": summary}},
        "command": "c",
        "date": "2026-11-30",
        "hardware": {
            "cpu": "CPU",
            "cpu_capability": "AVX2",
            "threads": 2,
            "python": "3.11",
            "torch": "2",
        },
        "torchvision": "0",
        "load_average": 0.0,
    }
    text = unequal_classes(json.loads(json.dumps(result)))
    assert "90 to 9 training and validation images of a class, 99 in total; 100 test images" in text
    assert "| `nothing` | 60.00 ± 14.14 |" in text
    assert "70.00 ± 12.73 (+10.00, -2.71 to +22.71) | 70.0 | 60 |" in text


def test_unknown_images_are_compared_by_hand() -> None:
    from tables.unknown import unknown_images
    from unknown_images import choose, compare

    known = {"neighbors": np.arange(20.0) - 18.5, "confidence": np.arange(20.0)}
    unknown = {"neighbors": np.array([0.6, 5, -30, 2]), "confidence": np.full(4, 9.5)}
    result = compare(known, unknown)
    # 0.6 is above 19 + 1 of the 20 known scores, -30 above none.
    assert result["neighbors"]["auroc"] == pytest.approx((20 + 20 + 0 + 20) / 80)
    # 95% of the known scores are below -0.45; only -30 is as well.
    assert result["neighbors"]["fpr95"] == 0.25
    assert result["neighbors"]["marked"] == 0.75
    assert result["confidence"] == {"auroc": 0.5, "fpr95": 1.0}
    labels = np.repeat([0, 1, 2], [5, 2, 9])
    chosen = choose(labels, 3, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [3, 2, 3]
    draw = {
        "unknown": ["a"],
        "accuracy": 0.9,
        "known_marked": {"neighbors": 0.05},
        "groups": {"classes left out": {**result, "energy": {"auroc": 0.6, "fpr95": 0.9}}},
    }
    recorded = {
        "sets": {"digits": {"draws": [draw, draw]}},
        "command": "x",
        "date": "x",
        "hardware": dict.fromkeys(("cpu", "cpu_capability", "threads", "python", "torch"), "x"),
        "torchvision": "x",
        "load_average": 0.0,
    }
    table = unknown_images(recorded)
    assert "| digits without 1 class, 2 draws | 90.0 ± 0.00% | classes left out |" in table
    assert "| nearest neighbors | **75.0 ± 0.00%** | 25.0 ± 0.00% | 75.0 ± 0.00% | 5.0" in table
    assert "| confidence | **50.0 ± 0.00%** | 100.0 ± 0.00% | – | – |" in table


def test_load_counts_answers_errors_and_latencies() -> None:
    from serve import Load

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200 if content == b"good" else 415)
            self.send_header("content-length", "10")
            self.end_headers()
            self.wfile.write(b'{"label":1')

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        load = Load(f"127.0.0.1:{server.server_port}", [b"good", b"bad"], clients=2)
        rate = load.run(0.2)
        server.shutdown()
    assert rate > 0
    assert len(load.errors) in range(len(load.latencies) // 2 - 2, len(load.latencies) // 2 + 3)
    assert all("415" in error for error in load.errors)
    load.latencies = [n / 1000 for n in range(101)]
    assert load.percentiles() == pytest.approx({"p50": 50, "p95": 95, "p99": 99})


def test_table_of_serving_states_the_ratio_and_the_memory() -> None:
    from tables.speed import serve

    times = {"p50": 10.0, "p95": 20.0, "p99": 30.0}
    result = {
        "clients": 8,
        "pairs": [{"one_process": 10.0, "serve": rate, "ratio": rate / 10} for rate in (8.0, 9.0)],
        "ratio": 0.85,
        "images_per_second": 8.5,
        "milliseconds": times,
        "single_milliseconds": {**times, "p50": 7.0},
        "endurance": {
            "seconds": 600,
            "requests": 5000,
            "errors": [],
            "milliseconds": times,
            "memory_mb": {"early": 900.0, "late": 901.0, "largest": 902.0},
        },
        "command": "python benchmarks/serve.py",
        "date": "2026-01-01",
        "torchvision": "0",
        "load_average": 0.0,
        "hardware": {"cpu": "c", "cpu_capability": "x", "threads": 2, "python": "3", "torch": "2"},
    }
    table = serve(result)
    assert "| 8.5 | 10.0 | **0.85** | 0.80-0.90 | 10 | 20 | 30 | 7 |" in table
    assert "5,000 requests in 600 s: no errors, p99 30 ms, memory 900 MB" in table


def test_the_lists_of_photographs_are_stratified_and_differ_by_split(tmp_path: Path) -> None:
    import photographs

    for name in ("ants", "bees"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "set" / name / f"{number:02}.jpg").touch()

    def lists(split: int, **options: int) -> dict[str, list[str]]:
        photographs.write_list(tmp_path / "set", split, tmp_path / "list.csv", **options)
        rows = [line.split(",") for line in (tmp_path / "list.csv").read_text().split()[1:]]
        return {
            name: [
                Path(path).parent.name + Path(path).stem for path, _, part in rows if part == name
            ]
            for name in ("train", "val", "test")
        }

    first, second = lists(0), lists(1)
    assert {name: len(images) for name, images in first.items()} == {
        "train": 28,
        "val": 6,
        "test": 6,
    }
    every = [sorted(image for part in each.values() for image in part) for each in (first, second)]
    assert every[0] == every[1]
    assert first != second
    assert photographs.test_labels(tmp_path / "list.csv") == [0, 0, 0, 1, 1, 1]
    few = lists(0, per_class=5)
    assert (few["val"], few["test"]) == (first["val"], first["test"])
    assert [sum(image.startswith(name) for image in few["train"]) for name in ("ants", "bees")] == [
        5,
        5,
    ]


def test_the_gain_on_photographs_is_paired_over_the_images_of_all_splits() -> None:
    from photographs import compare

    labels = {"0": [0, 0, 1, 1], "1": [0, 1, 1, 1]}
    ours, theirs = {"0": [0, 0, 1, 0], "1": [0, 1, 1, 1]}, {"0": [0, 1, 0, 1], "1": [0, 1, 1, 0]}
    runs: Any = {
        name: {
            split: {
                "predicted": predicted[split],
                "seconds": 60.0,
                "accuracy": np.mean(np.array(predicted[split]) == labels[split]),
            }
            for split in labels
        }
        for name, predicted in (("convlens", ours), ("loop", theirs))
    }
    summary = compare(runs, labels)
    assert summary["convlens"]["mean"] == pytest.approx((0.75 + 1) / 2)
    assert summary["loop"]["mean"] == pytest.approx((0.5 + 0.75) / 2)
    # 3 of 8 images only we have right, 1 of 8 only they: McNemar's p is 2 * (1 + 4) / 16.
    assert summary["loop"]["gain"] == pytest.approx((3 - 1) / 8)
    assert summary["loop"]["p"] == pytest.approx(0.625)


def test_the_peers_choose_the_largest_size_for_which_five_epochs_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    from photographs_task import size_and_epochs

    # 1.05 s for a batch of 160 px, 10 batches an epoch; the warm-up does not count. At 224 px the
    # five epochs and two other batches take 1.05 * 1.96 * 52 = 107.0 s.
    times = [9.0, 1.0, 1.0]
    assert size_and_epochs(times, 10, 107.1, other_batches=2) == (224, 5)
    assert size_and_epochs(times, 10, 106.9, other_batches=2) == (192, 6)
    # At 128 px 1.05 * 0.64 * 12 = 8.1 s for one epoch, which is the least.
    assert size_and_epochs(times, 10, 8.2, other_batches=2) == (128, 1)
    assert size_and_epochs(times, 10, -1.0, other_batches=2) == (128, 1)
    assert size_and_epochs(times, 10, 1e6, other_batches=2) == (224, 20)


def test_the_table_of_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tables import photographs

    monkeypatch.setattr(photographs, "FOLDER", tmp_path)
    runs = {"0": {"seconds": 58.0, "epochs": 4, "size": 128}}
    hardware = {"cpu": "a CPU", "cpu_capability": "AVX2", "threads": 2, "python": "3", "torch": "2"}
    summary = {"mean": 0.9, "sd": 0.01, "seconds": 58.0}
    gain = {"gain": 0.05, "gain_interval95": [0.01, 0.09], "p": 0.01}
    result = {
        "name": "photographs",
        "data": "flowers",
        "splits": 1,
        "per_class": None,
        "minutes": {
            "1": {
                "runs": {"convlens": runs, "loop": runs},
                "summary": {"convlens": summary, "loop": {**summary, **gain}},
            }
        },
        "hardware": hardware,
        "command": "make",
        "date": "today",
        "torchvision": "0",
        "load_average": 0.0,
    }
    text = photographs.photographs(result)
    assert "| 1 | convlens, `train.minutes` | 90.0 ± 1.00% | – | 58 | 128 | 4 |" in text
    assert "| **+5.0 (+1.0 to +9.0)** | 58 | 128 | 4 |" in text
    assert (tmp_path / "docs" / "figures" / "photographs.svg").read_text().startswith("<?xml")
