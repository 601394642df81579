"""Contents of a page are gathered from the run directory and the data."""

from __future__ import annotations

from dataclasses import replace

import pytest

import convlens
from convlens.errors import UsageError
from convlens.reports import contents
from convlens.reports.contents import gather_contents, gather_split
from convlens.reports.sections import head_section
from convlens.run import find_run, load_model


@pytest.mark.usefixtures("runs")
def test_small_data_sets_are_audited_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gather_contents("hostile", audit=None, device="cpu").audit is not None
    monkeypatch.setattr(contents, "QUICK_AUDIT_IMAGES", 10)
    assert gather_contents("hostile", audit=None, device="cpu").audit is None


@pytest.mark.usefixtures("runs")
def test_contents_hold_the_evaluation_and_images_of_a_run() -> None:
    gathered = gather_contents("small", audit=False, device="cpu")
    assert gathered.missing == []
    assert gathered.audit is None
    assert (gathered.split, gathered.is_finished) == ("test", True)
    assert gathered.summary is not None
    assert gathered.images is not None
    assert gathered.summary["n"] == len(gathered.images.labels)
    assert gathered.train_accuracy is not None
    assert gathered.train_accuracy.n == gathered.train_accuracy.total == 80
    evaluated = convlens.evaluate("small", "train", device="cpu")
    assert gathered.train_accuracy.correct == evaluated.correct
    without_images = gather_contents("small", audit=True, device="cpu", with_images=False)
    assert without_images.images is without_images.audit is None
    assert without_images.summary == gathered.summary


@pytest.mark.usefixtures("runs")
def test_unavailable_device_is_an_error() -> None:
    with pytest.raises(UsageError):
        gather_contents("small", audit=None, device="tpu")


@pytest.mark.usefixtures("runs")
def test_contents_of_a_split_are_those_that_were_asked_for() -> None:
    run_dir = find_run("small")
    loaded = load_model(run_dir.model_path)
    uses = [entry for entry in run_dir.evaluation_log() if entry["split"] == "test"]
    tested = gather_split(run_dir, loaded, "test", device="cpu")
    assert tested.summary == gather_contents("small", audit=False, device="cpu").summary
    validated = gather_split(run_dir, loaded, "val", device="cpu")
    assert validated.split == "val"
    assert validated.summary is not None
    assert validated.summary["accuracy"] == convlens.evaluate("small", "val").accuracy
    # Whoever shows the test split logs that.
    assert [entry for entry in run_dir.evaluation_log() if entry["split"] == "test"] == uses


@pytest.mark.usefixtures("runs")
def test_page_says_that_validation_chose_the_epoch_only_if_it_did() -> None:
    best = gather_split(
        find_run("small"), load_model(find_run("small").model_path), "val", device="cpu"
    )
    assert best.recipe is not None
    assert best.validation_chose_epoch
    last = replace(best, recipe=best.recipe.replace(**{"train.keep": "last"}))
    assert not last.validation_chose_epoch
    assert "Validation images chose the epoch" in head_section(best)
    assert "Validation images chose the epoch" not in head_section(last)
    assert "Evaluated on the validation split" in head_section(last)
