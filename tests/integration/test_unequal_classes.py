"""The options for unequal classes on the command line, from the training to the comparison."""

from __future__ import annotations

import csv
from pathlib import Path

from convlens.run import RunDir
from helpers.commands import here, pictures, refused

SMALL = ("model.widths=[4]", "train.epochs=2", "augment=[]", "optim.ema=null", "--device", "cpu")


def test_from_training_to_comparison() -> None:
    pictures(Path("photos"), {"blue": 40, "green": 10, "red": 20})
    no_figures = ("--figures", "none")
    assert here("train", "photos", *SMALL, *no_figures, "--name", "plain").code == 0
    options = ("optim.class_weights=auto", "data.balance=sqrt", "train.monitor=val_macro_f1")
    done = here("train", "photos", *SMALL, *no_figures, *options, "--name", "balanced")
    assert done.code == 0, done.err
    assert "class weights from" in done.err
    assert "macro F1" in done.err
    assert "balanced accuracy" in done.out
    run_dir = RunDir(Path("models/balanced"))
    with run_dir.metrics_path.open() as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: (float(row["val_macro_f1"]), -float(row["val_loss"])))
    assert run_dir.metadata()["kept_epoch"] == int(best["epoch"])
    (entry,) = run_dir.evaluations()
    low, high = entry["macro_f1_interval95"]
    assert 0 <= low <= entry["macro_f1"] <= high <= 1
    (verdict,) = here("compare", "plain", "balanced", "--json", "--device", "cpu").json["verdicts"]
    assert set(verdict["class_means"]) == {"macro_f1", "balanced_accuracy"}
    page = here("report", "balanced", "--no-audit", "--json").json["path"]
    assert "balanced accuracy" in Path(page).read_text()
    # The same command finds the run; a misspelled class creates none.
    assert "already trained" in here("train", "photos", *SMALL, *options, "--name", "balanced").err
    done = here("train", "photos", *SMALL, "optim.class_weights={grene: 2}", "--name", "wrong")
    refused(done, 2, "does not have: grene", "did you mean green?")
    assert not RunDir(Path("models/wrong")).metadata()
