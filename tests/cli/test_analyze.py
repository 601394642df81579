"""Commands that analyze runs and data: what they print."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from convlens.cli import analyze
from helpers.commands import DIGITS, here, refused


def test_compare_diagnose_and_report_print_their_results() -> None:
    for seed in (0, 1):
        name = ["--name", f"run{seed}", f"train.seed={seed}"]
        assert here("train", *DIGITS, *name).code == 0
    done = here("compare", "run0", "run1", "--split", "val")
    assert done.code == 0, done.err
    assert "images/s of inference on this machine" in done.out
    done = here("diagnose", "run0")
    assert done.code == 0, done.err
    assert done.out.startswith("run0: finished, 2 epochs in metrics.csv")
    assert "no sign of" in done.out or "cannot tell: " in done.out
    done = here("report", "run0")
    assert done.code == 0, done.err
    assert "report  " in done.out
    refused(here("compare", "run0", "run2"), 2, "run2")


def test_labels_prints_the_number_of_suspects_and_the_csv_file() -> None:
    done = here("labels", *DIGITS, "train.epochs=1", "--folds", "2", "--figures", "none")
    assert done.code == 0, done.err
    assert "labels are suspected" in done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith("CSV ")]
    assert Path(line.split()[1]).is_file()


@pytest.mark.parametrize(
    ("evidence", "text"),
    [
        ({"loss": 0.123456, "epoch": 3}, "loss 0.1235, epoch 3"),
        ({"rate": None}, "rate unknown"),
        ({"layers": {"a": 1, "b": 0.5}}, "layers (a 1, b 0.5)"),
        (
            {"layers": {f"l{i}": i for i in range(14)}},
            "layers (l0 0, l1 1, l2 2, l3 3, l4 4, l5 5, l6 6, l7 7, l8 8, l9 9, l10 10, l11 11 "
            "and 2 more)",
        ),
    ],
)
def test_evidence_is_one_line_and_long_tables_are_shortened(evidence: Any, text: str) -> None:
    finding: Any = SimpleNamespace(evidence=evidence)
    assert analyze.format_evidence(finding) == text
