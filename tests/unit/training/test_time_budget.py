"""`train.minutes`: the choice of a training that fits into the time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from convlens import optim
from convlens.data.conversion import NativeImages
from convlens.device import Plan
from convlens.errors import UsageError
from convlens.recipe import Recipe, load_recipe
from convlens.run import RunDir
from convlens.runtime import RuntimeContext
from convlens.training import time_budget, transfer
from convlens.training.backbones import installed_backbones
from convlens.training.time_budget import ImageCounts, Option, Speed, choose
from convlens.training.train import train
from helpers.commands import command, here, pictures, refused
from helpers.interrupted_runs import Interrupting, equal, interrupting as interrupting

IMAGES = ImageCounts(train=1000, val=100, test=100)
# At 100 px: 1 ms to train an image, 0.5 ms for features, 2 ms for validation and test.
SPEED = Speed(100, 1e-3, 0.5e-3, 2e-3)
HEAD = Option(100, head_only=True)
SMALL, LARGE = Option(100, 50, min_share=0.2), Option(200, 150, min_share=2 / 3)
OPTIONS = [HEAD, SMALL, LARGE]


def folder(*overrides: str) -> Recipe:
    return load_recipe("folder", overrides)


def test_the_time_of_an_epoch_is_that_of_its_pixels() -> None:
    # 1000 images of a quarter of the pixels, with the margin; 100 validation images of 100 px.
    assert SMALL.epoch_seconds(IMAGES, SPEED) == pytest.approx(1.1 * 1000 * 0.25e-3 + 100 * 2e-3)
    # 150 px have 2.25 times the pixels, 200 px four times.
    assert LARGE.epoch_seconds(IMAGES, SPEED) == pytest.approx(1.1 * 2.25 + 100 * 8e-3)


def test_the_other_time_is_that_of_calibration_test_and_features() -> None:
    # Validation, test and 300 stored features in float32, and the constant part.
    assert SMALL.other_seconds(IMAGES, SPEED, 300) == pytest.approx(5 + 1.1 * 500 * 2e-3)
    # There are only 1000 training images.
    assert SMALL.other_seconds(IMAGES, SPEED, 2000) == pytest.approx(5 + 1.1 * 1200 * 2e-3)
    # The features of all training images, and those of the validation images in float32.
    features = 1000 * 0.5e-3 + 100 * 2e-3
    assert HEAD.other_seconds(IMAGES, SPEED, 300) == pytest.approx(5 + 1.1 * (1 + features))


@pytest.mark.parametrize(
    ("seconds", "option", "epochs", "fits"),
    [
        # 200 stored features: 5.88 s and 0.475 s for each epoch of 100 px. 2 of 9 epochs must fit.
        (6.84, SMALL, 2, True),
        (7.0, SMALL, 2, True),
        (7.4, SMALL, 3, True),
        # Of 200 px: 0.0005 s for each stored feature, at most 5% of the time; 6 of 9 must fit.
        (26.5, SMALL, 9, True),
        (29.0, LARGE, 6, True),
        (200.0, LARGE, 9, True),
        # Only the head: 6.65 s, and 1 ms for each of 30 epochs. It is the shortest training.
        (6.8, HEAD, 30, True),
        (6.69, HEAD, 30, True),
        (6.67, HEAD, 30, False),
        (6.0, HEAD, 30, False),
        (-5.0, HEAD, 30, False),
    ],
)
def test_the_best_option_that_fits_is_chosen(
    seconds: float, option: Option, epochs: int, fits: bool
) -> None:
    choice = choose(OPTIONS, IMAGES, SPEED, seconds, usual_epochs=9)
    assert (choice.option, choice.epochs, choice.fits) == (option, epochs, fits)


@pytest.mark.parametrize(
    ("seconds", "option", "fits"),
    [
        # 200 stored features. A head of 100 px takes 6.68 s, one of 200 px 11.72 s, four times as
        # much beside the constant part; 4 of 9 epochs of training at 100 px 7.78 s.
        (6.6, HEAD, False),
        (7.7, HEAD, True),
        (7.8, replace(SMALL, min_share=0.4), True),
    ],
)
def test_a_head_has_the_largest_images_that_fit(seconds: float, option: Option, fits: bool) -> None:
    heads = [HEAD, replace(HEAD, image_size=200)]
    trained = replace(SMALL, min_share=0.4)
    choice = choose([*heads, trained], IMAGES, SPEED, seconds, usual_epochs=9)
    assert (choice.option, choice.fits) == (option, fits)
    # Where a step takes ten times as long, a head of larger images fits first.
    slow = replace(SPEED, train=1e-2)
    for seconds, size in ((11.5, 100), (11.8, 200), (18.0, 200)):
        choice = choose([*heads, trained], IMAGES, slow, seconds, usual_epochs=9)
        assert (choice.option, choice.fits) == (replace(HEAD, image_size=size), True)


def test_with_few_images_a_head_on_larger_ones_is_better_than_a_training_on_small_ones() -> None:
    options = [HEAD, replace(HEAD, image_size=200), SMALL, replace(LARGE, min_share=1.0)]

    def choice(seconds: float, enough: float, options: list[Option] = options) -> Option:
        chosen = choose(options, IMAGES, SPEED, seconds, usual_epochs=20, enough_epochs=enough)
        return chosen.option

    assert choice(20.0, 20.0) == SMALL
    assert choice(20.0, 100.0) == SMALL  # 20% are the usual 20 epochs, which fit
    assert choice(20.0, 101.0) == options[1]
    assert choice(300.0, 101.0) == options[3]  # the usual training
    # Without a head there is nothing else.
    assert choice(20.0, 101.0, options[2:]) == SMALL


def test_the_epochs_of_the_recipe_stay() -> None:
    for seconds, option, fits in ((100.0, LARGE, True), (9.0, SMALL, True), (6.0, SMALL, False)):
        choice = choose([SMALL, LARGE], IMAGES, SPEED, seconds, usual_epochs=9, fixed_epochs=5)
        assert (choice.option, choice.epochs, choice.fits) == (option, 5, fits)


def test_the_cheapest_training_has_one_epoch() -> None:
    choice = choose([SMALL, LARGE], IMAGES, SPEED, 1.0, usual_epochs=9)
    assert (choice.option, choice.epochs, choice.fits) == (SMALL, 1, False)


seconds_of_images = st.floats(1e-5, 1.0)


@given(
    train=st.integers(2, 100_000),
    held_out=st.integers(0, 20_000),
    speed=st.builds(
        Speed, st.integers(32, 224), seconds_of_images, seconds_of_images, seconds_of_images
    ),
    minutes=st.tuples(st.floats(0.01, 600), st.floats(0.01, 600)),
    usual=st.integers(1, 60),
    first=st.integers(0, 1),
)
def test_more_time_is_never_a_cheaper_training(
    train: int,
    held_out: int,
    speed: Speed,
    minutes: tuple[float, float],
    usual: int,
    first: int,
) -> None:
    """And what is predicted to take longer than the time is the cheapest training."""
    options = OPTIONS[first:]
    images = ImageCounts(train, held_out, held_out)
    less, more = (
        choose(options, images, speed, 60 * each, usual_epochs=usual) for each in sorted(minutes)
    )
    rank = [options.index(each.option) for each in (less, more)]
    assert rank[0] <= rank[1]
    if rank[0] == rank[1]:
        assert less.epochs <= more.epochs
        assert less.references <= more.references
    for choice, each in zip((less, more), sorted(minutes), strict=True):
        assert choice.seconds <= 60 * each * (1 + 1e-9) or choice.option == options[0]
        assert choice.fits == (choice.seconds <= 60 * each) or math.isclose(
            choice.seconds, 60 * each
        )
        assert choice.end_seconds <= choice.seconds


def test_what_a_recipe_leaves_open_decides_the_options() -> None:
    here = [("resnet18", "IMAGENET1K_V1")]
    photographs = NativeImages(300, 3, 1000)

    def options(
        *overrides: str, native: NativeImages = photographs, decoded: int | None = None
    ) -> list[tuple[int, int | None, bool]]:
        requested = folder("train.minutes=1", *overrides)
        start = transfer.choose_start(requested, native, here).recipe
        found = time_budget.options_for(requested, start, native, 192, decoded)
        return [(each.image_size, each.crop_size, each.head_only) for each in found]

    heads = [(size, None, True) for size in (128, 160, 192, 224)]
    trained = [(128, 96, False), (160, 112, False), (192, 144, False), (224, 160, False)]
    assert options() == [*heads, *trained]
    assert options("model.trainable=layer4+") == trained
    assert options("train.epochs=3") == trained
    assert options("augment=[]") == [(each[0], None, False) for each in trained]
    assert options("data.image_size=100") == [(100, None, True), (100, 64, False)]
    assert options(decoded=160) == [(160, None, True), (160, 112, False)]
    # Images are not enlarged beyond the usual size.
    assert options(native=NativeImages(150, 3, 1000))[-1] == (192, 144, False)
    # From scratch there is nothing to freeze.
    scratch = [(each, None, False) for each in (32, 48, 64, 96, 128, 192)]
    assert options("model.name=cnn", "model.weights=none") == scratch


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("0", "greater than 0"),
        ("-1", "greater than 0"),
        (".nan", "train.minutes"),
        (".inf", "train.minutes"),
        ("soon", "a number"),
        ("[1]", "a number"),
    ],
)
def test_minutes_that_are_no_time_are_refused(value: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        folder(f"train.minutes={value}")
    assert "minutes" in str(caught.value)
    assert part in str(caught.value)


def test_recipes_without_minutes_keep_their_digest() -> None:
    plain = folder()
    assert plain.digest() == folder("train.minutes=null").digest()
    assert "minutes" not in json.dumps(plain._content())
    assert plain.digest() != folder("train.minutes=1").digest()
    assert folder("train.minutes=1").digest() != folder("train.minutes=2").digest()


def test_nothing_is_measured_where_nothing_is_open() -> None:
    assert time_budget.is_open(folder("train.minutes=1"))
    assert not time_budget.is_open(folder())
    fixed = ("data.image_size=32", "train.epochs=2", "model.trainable=all")
    assert not time_budget.is_open(folder("train.minutes=1", *fixed))


def test_a_network_is_measured() -> None:
    start = transfer.choose_start(
        folder("model.widths=[4,8]", "data.image_size=16"), NativeImages(16, 3), []
    ).recipe
    speed = time_budget.measure_speed(start, RuntimeContext.create("cpu"))
    assert speed.size == 16
    assert 0 < speed.features < 1
    assert 0 < speed.inference < 1
    assert 0 < speed.train < 1
    assert speed.plan["device"] == "cpu"
    assert Speed(**json.loads(json.dumps(vars(speed)))) == speed


# ---- slower than expected ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "done", "left", "expected"),
    [
        (6, 2, 40.0, 6),  # exactly as many as planned
        (6, 2, 90.0, 6),  # never more
        (6, 2, 39.9, 5),
        (6, 2, 10.0, 3),
        (6, 2, -30.0, 3),  # at least one more
        (6, 5, 0.0, 6),
        (6, 6, -1.0, 6),
    ],
)
def test_the_number_of_epochs_that_fit(epochs: int, done: int, left: float, expected: int) -> None:
    fitting = time_budget.epochs_that_fit(epochs, done, seconds_per_epoch=10.0, seconds_left=left)
    assert fitting == expected


def test_a_shortened_schedule_ends_as_the_planned_one() -> None:
    planned = optim.build_schedule(folder().optim)
    # Of 10 epochs of 7 steps, 4 are done, and 2 more fit.
    short = time_budget.shorten_schedule(planned, steps=7, planned=10, done=4, epochs=6)
    before = [short(step / 42) for step in range(28)]
    assert before == [planned(step / 70) for step in range(28)]  # the same bits
    assert short(28 / 42) == pytest.approx(planned(0.4))
    assert short(35 / 42) == pytest.approx(planned(0.7))
    assert short(1.0) == pytest.approx(planned(1.0))
    # It can be shortened again.
    again = time_budget.shorten_schedule(short, steps=7, planned=6, done=4, epochs=5)
    assert [again(step / 35) for step in range(28)] == before
    assert again(28 / 35) == pytest.approx(planned(0.4))
    assert again(1.0) == pytest.approx(planned(1.0))


# ---- whole trainings ---------------------------------------------------------------------

SMALL_NET = ("model.name=cnn", "model.weights=none", "model.widths=[4,8]", "optim.lr=0.01")


@pytest.fixture
def photos() -> str:
    return str(pictures(Path("photos"), {"blue": 12, "green": 12, "red": 12}, size=80))


def recipe_of(name: str) -> dict[str, Any]:
    return RunDir(Path("models") / name).recipe().model_dump()


def test_a_short_time_is_kept_by_the_command(photos: str) -> None:
    done = command("train", photos, "train.minutes=0.001", *SMALL_NET, "--name", "short")
    assert done.code == 0, done.err
    line = r"0.001 minutes: 32 px, the whole network trained, 1 epoch; about \d+ s in total: the "
    assert re.search(line + "time is too short", " ".join(done.err.split()))
    recipe = recipe_of("short")
    assert (recipe["data"]["image_size"], recipe["train"]["epochs"]) == (32, 1)
    assert recipe["train"]["minutes"] == 0.001
    refused(here("train", photos, "train.minutes=0"), 2, "train.minutes=0: must be greater than 0")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that makes choices depend on a given speed, not on that of the machine."""

    def set_speed(seconds: float) -> None:
        plan = Plan("cpu", "fp32", "contiguous").to_dict()
        given = Speed(32, seconds, seconds / 10, seconds / 10, plan)
        monkeypatch.setattr(time_budget, "measure_speed", lambda *_: given)

    return set_speed


def test_a_continued_run_keeps_the_choice(
    photos: str, speed: Callable[[float], None], interrupting: Interrupting
) -> None:
    recipe = folder(f"data.name={photos}", "train.minutes=1", *SMALL_NET)
    speed(0.2)  # 5.9 s for an epoch of 26 images with 32 px
    interrupting.after = 3
    with pytest.raises(KeyboardInterrupt):
        train(recipe, name="kept", quiet=True, test=False)
    before = recipe_of("kept")
    assert before["data"]["image_size"] == 32
    assert before["train"]["epochs"] == 9
    speed(1e-6)  # a new run would have 60 epochs of larger images
    run_dir = train(recipe, name="kept", quiet=True, test=False)
    assert recipe_of("kept") == before
    assert run_dir.metadata()["epochs"] == before["train"]["epochs"]


def test_a_slow_training_is_shortened_and_continued_with_the_same_bits(
    photos: str,
    speed: Callable[[float], None],
    interrupting: Interrupting,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = folder(f"data.name={photos}", "train.minutes=1", "train.batch_size=16", *SMALL_NET)
    speed(0.2)
    fitting = partial(time_budget.epochs_that_fit, seconds_per_epoch=10.0, seconds_left=15.0)
    monkeypatch.setattr(time_budget, "epochs_that_fit", lambda *counts, **_: fitting(*counts))
    whole = train(recipe, name="whole", test=False)
    # After epoch 1 one more fits, and then the rest is as planned.
    assert whole.metadata()["shortened"] == [{"after": 1, "epochs": 2}]
    assert whole.metadata()["epochs"] == 2
    planned = whole.recipe().train.epochs
    printed = capsys.readouterr().err
    message = f"slower than expected: 2 instead of {planned} epochs fit into 1 minute"
    assert message in " ".join(printed.split())
    assert re.findall(r"^epoch +(\d+/\d+)", printed, re.M) == [f"1/{planned}", "2/2"]
    # The first of two steps continues the schedule, the second is halfway to its end.
    halfway = optim.build_schedule(recipe.optim)((1 + 1 / planned) / 2)
    assert float(whole.metrics()[-1]["lr"]) == pytest.approx(0.01 * halfway)
    interrupting.after = 3  # the first step of epoch 2
    with pytest.raises(KeyboardInterrupt):
        train(recipe, name="stopped", quiet=True, test=False)
    equal(train(recipe, name="stopped", quiet=True, test=False), whole)


@pytest.mark.skipif(not installed_backbones(), reason="needs a backbone of a package")
def test_a_backbone_is_frozen_if_there_is_no_time_to_train_it(photos: str) -> None:
    """The features of the frozen backbone are computed once, for images of the smallest size."""
    done = here("train", photos, "train.minutes=0.001", "--name", "frozen", "--no-test")
    assert done.code == 0, done.err
    text = " ".join(done.err.split())
    assert "0.001 minutes: 128 px, only the head trained, 30 epochs; about" in text
    recipe = recipe_of("frozen")
    assert recipe["model"]["trainable"] == "head"
    assert recipe["augment"] == []
    assert recipe["train"]["reference_images"] == 200
    metadata = RunDir(Path("models/frozen")).metadata()
    assert metadata["trunk_cached"]
    assert metadata["epochs"] == 30  # it is not shortened
