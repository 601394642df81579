"""The parts of the GPU benchmarks that do not need a GPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import convlens

BENCHMARKS = Path(convlens.__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("recording", "warm", "cifar_speed", "roofline", "report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


# As both scripts print it: cells of fixed width; `eval` is the epoch of the final row of a run.
PRINTED = """\
----------------------------------------------------------------------------------
|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |
----------------------------------------------------------------------------------
|  warmup  |      7  |     0.1000  |   0.1000  |               |        1.5000  |
|          |   eval  |     0.1000  |   0.1000  |       0.1000  |        1.6000  |
----------------------------------------------------------------------------------
|       0  |      7  |     0.9500  |   0.9300  |               |        1.2000  |
|          |   eval  |     0.9500  |   0.9300  |       0.9400  |        1.2500  |
----------------------------------------------------------------------------------
Mean accuracy after 1 runs: 0.941200 | Mean time: 1.190000s\r|       2  |   eval  |     0.9600  \
|   0.9310  |       0.9412  |        1.1900  |
"""


def test_the_tables_that_peers_print_are_parsed(benchmark: Any) -> None:
    found = list(benchmark("cifar_speed").results_in(iter(PRINTED.splitlines(keepends=True))))
    assert found == [
        {"run": "warmup", "tta": 0.1, "plain": 0.1, "seconds": 1.6},
        {"run": "0", "tta": 0.94, "plain": 0.93, "seconds": 1.25},
        {"run": "2", "tta": 0.9412, "plain": 0.931, "seconds": 1.19},
    ]


def test_a_peer_runs_unmodified_and_is_stopped(benchmark: Any, tmp_path: Path) -> None:
    """A simulated peer prints its table forever and reads the images where it expects them."""
    script = tmp_path / "peer.py"
    script.write_text(
        "import itertools, torch\n"
        "n = len(torch.load('cifar10/train.pt')['images'])\n"
        "for run in itertools.chain(['warmup'], itertools.count()):\n"
        "    print(f'|  {run}  |   eval  |  0.5  |  0.9  |  {n / 100}  |  2.5  |')\n"
    )
    (tmp_path / "cifar10").mkdir()
    torch.save({"images": torch.zeros(91, 2)}, tmp_path / "cifar10" / "train.pt")
    found = benchmark("cifar_speed").run_peer(script, tmp_path, 3)
    assert [run["run"] for run in found["runs"]] == ["0", "1", "2"]
    assert (found["seconds"], found["tta"], found["seconds_sd"]) == (2.5, 0.91, 0.0)
    assert found["cold_seconds"] > 0
    assert found["failed"] is None


def test_the_error_of_a_failing_peer_is_reported(benchmark: Any, tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text("raise RuntimeError('no GPU here')")
    (tmp_path / "cifar10").mkdir()
    found = benchmark("cifar_speed").run_peer(script, tmp_path, 3)
    assert found["failed"] == "RuntimeError: no GPU here"
    assert found["runs"] == []


def test_the_matrix_rate_counts_a_product_as_two_operations(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    roofline = benchmark("roofline")
    clock = [0.0]

    def now() -> float:
        clock[0] += 0.5
        return clock[0]

    monkeypatch.setattr(roofline.time, "perf_counter", now)
    found = roofline.matmul_rate("cpu", 16, 1.0)
    assert found == {"size": 16, "precision": "fp32", "flops_a_second": 5 * 2 * 16**3 / 0.5}


def test_the_flops_of_a_recipe_are_those_of_its_convolutions(benchmark: Any) -> None:
    """airbench94 has 118 million multiplications forward, 0.71 GFLOP per training image."""
    case = benchmark("roofline").Case("cifar10-fast", "cpu", "eager", 8, "")
    assert case.flops() == pytest.approx(0.71e9, rel=0.01)


def test_the_report_has_tables_of_both_benchmarks(benchmark: Any) -> None:
    report = benchmark("report")
    shared = {
        "command": "c",
        "date": "d",
        "torchvision": "0.26",
        "load_average": 1.0,
        "hardware": {
            "gpu": "G",
            "cpu": "C",
            "cpu_capability": "AVX2",
            "threads": 1,
            "python": "3.12",
            "torch": "2.11",
        },
    }
    runs = {"runs": [1, 2], "seconds": 1.25, "seconds_sd": 0.01, "tta": 0.94, "tta_sd": 0.001}
    speed = {
        **shared,
        "airbench": {**runs, "cold_seconds": 60.0},
        "warm_eager": runs,
        "warm_graph": {"failed": "why"},
        "cold": {"seconds": 8.0},
    }
    text = report.cifar_speed(speed)
    assert "| airbench | **1.250 ± 0.010** | 60.0 | 94.00 ± 0.10% | 2 |" in text
    assert "| convlens, eager | **1.250 ± 0.010** | 8.0 |" in text
    assert "failed: why" in text
    row = {
        "recipe": "r",
        "plan": "p",
        "batch": 8,
        "flops_an_image": 2e9,
        "images_a_second": 1000.0,
        "loop_over_bare": 0.98,
        "flops_a_second": 2e12,
        "share": 0.25,
    }
    matmul = {"size": 8, "precision": "bf16", "flops_a_second": 8e12}
    text = report.roofline({**shared, "matmul": matmul, "rows": [row]})
    assert "| r | p | 8 | 2.000 | 1,000 | 0.980 | 2.00 | **25.0%** |" in text
    assert "**8.00 TFLOP/s**" in text
