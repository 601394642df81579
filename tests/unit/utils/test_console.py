"""Messages as log records, their handlers, quiet mode, and the display of a training."""

from __future__ import annotations

import io
import logging
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass

import pytest

from convlens.utils import console
from convlens.utils.console import (
    ProgressDisplay,
    format_duration,
    is_first_time,
    message_scope,
    print_once,
    print_status,
    print_table,
    progress_bar,
    quiet_mode,
    status_handler,
)

LOGGER = logging.getLogger("convlens")


@pytest.fixture
def log_file() -> Iterator[io.StringIO]:
    """The log file of an application that logs INFO records of all libraries."""
    file = io.StringIO()
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(filename)s %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield file
    root.setLevel(level)
    root.removeHandler(handler)


def test_without_logging_messages_are_shown_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_status("[bold]digits[/] takes 5% of \\[the time]")
    assert capsys.readouterr() == ("", "digits takes 5% of [the time]\n")
    assert LOGGER.handlers == []
    assert LOGGER.level == logging.NOTSET


def test_application_that_logs_gets_messages_as_plain_text(
    log_file: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    print_status("[bold]digits[/] takes 5% of \\[the time] :warning:")
    print_table(("stage", "rate"), [("stem", "0.1"), ("[head]", "1.0")])
    first, *rows = log_file.getvalue().splitlines()
    assert first == "convlens INFO test_console.py digits takes 5% of [the time] :warning:"
    assert rows[0].startswith("convlens INFO test_console.py ")
    assert [row.split() for row in rows][-2:] == [["stem", "0.1"], ["[head]", "1.0"]]
    assert capsys.readouterr() == ("", "")


def test_application_that_logs_only_warnings_does_not_hide_messages(
    log_file: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    """Notebooks have a root logger at WARNING, which does not mean `quiet=True`."""
    logging.getLogger().setLevel(logging.WARNING)
    print_status("epoch 1")
    assert log_file.getvalue() == ""
    assert capsys.readouterr().err == "epoch 1\n"


def test_status_handler_of_the_command_line_is_removed_again(
    log_file: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    with status_handler():
        print_status("[bold]epoch[/] 1")
        LOGGER.warning("50%% [of] %s", "it")
    assert capsys.readouterr().err == "epoch 1\n50% [of] it\n"
    assert log_file.getvalue() == ""
    assert (LOGGER.handlers, LOGGER.level, LOGGER.propagate) == ([], logging.NOTSET, True)


def test_quiet_mode_drops_messages_tables_and_records(
    log_file: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    with quiet_mode():
        with quiet_mode(False):  # does not undo the outer one
            print_status("a")
        print_table(("b",), [("c",)])
        with progress_bar("d", 1) as bar:
            bar.advance()
    print_status("e")
    assert log_file.getvalue().splitlines() == ["convlens INFO test_console.py e"]
    assert capsys.readouterr().err == ""


def test_quiet_mode_of_one_thread_does_not_affect_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    inside, spoken = threading.Event(), threading.Event()

    def quiet_thread() -> None:
        with quiet_mode():
            inside.set()
            assert spoken.wait(120)
            print_status("from the quiet thread")

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(quiet_thread)
        assert inside.wait(120)
        print_status("from the other thread")
        spoken.set()
        done.result()
    assert capsys.readouterr().err == "from the other thread\n"


def test_thread_with_the_context_of_a_quiet_one_is_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with quiet_mode(), ThreadPoolExecutor(1) as pool:
        pool.submit(copy_context().run, print_status, "quiet").result()
        pool.submit(print_status, "not quiet").result()
    assert capsys.readouterr().err == "not quiet\n"


def test_only_rank_0_prints_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, printed in ((0, "hello\n"), (1, "")):
        monkeypatch.setattr(console.process, "global_rank", lambda rank=rank: rank)
        print_status("hello")
        assert capsys.readouterr().err == printed


@dataclass
class DelayedStep:
    """A step whose numbers are ready after `delay` calls of `ready`."""

    epoch: int = 1
    images: int = 4
    calls: int = 0
    delay: int = 2

    def numbers(self) -> DelayedStep:
        return self

    def ready(self) -> bool:
        self.calls += 1
        return self.calls > self.delay

    def values(self) -> list[float]:
        assert self.calls > self.delay
        return [0.25, 3.0]


class RecordingBar:
    def __init__(self) -> None:
        self.moves: list[tuple[int, str | None]] = []
        self.totals: list[int] = []

    def advance(self, amount: int = 1, text: str | None = None) -> None:
        self.moves.append((amount, text))

    def set_total(self, total: int) -> None:
        self.totals.append(total)


def test_a_message_is_printed_once_within_a_scope(capsys: pytest.CaptureFixture[str]) -> None:
    def print_notes() -> None:
        with message_scope():  # nested: the outer block counts
            print_once("x: 12 copies in 1,204 images")
            print_once("x: 9 copies in 87 images")
            print_once("y: 9 copies in 87 images")

    with message_scope():
        with quiet_mode():
            print_notes()  # what nobody has seen does not count
        print_notes()
        print_notes()
        assert not is_first_time("y: 0 copies in 0 images")
        assert is_first_time("z")
        assert not is_first_time("z")
    assert capsys.readouterr().err.splitlines() == [
        "x: 12 copies in 1,204 images",
        "y: 9 copies in 87 images",
    ]
    print_once("x: 1 copies in 1 images")
    print_once("x: 1 copies in 1 images")
    assert capsys.readouterr().err == "x: 1 copies in 1 images\n" * 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (42.4, "42 s"),
        (89.4, "89 s"),
        (91, "2 min"),
        (484, "8 min"),
        (5300, "88 min"),
        (7740, "2 h 10 min"),
        (86_000, "23 h 50 min"),
        (10_800, "3 h"),
    ],
)
def test_durations_are_rounded(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("expected_s", "shown"),
    [
        (None, ["about 18 min left, by the first steps"]),
        (2000.0, ["about 18 min left, by the first steps"]),
        (1100.0, []),
    ],
)
def test_the_time_left_is_estimated_by_the_first_steps(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    expected_s: float | None,
    shown: list[str],
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "perf_counter", lambda: now)
    # 5 epochs of 100 steps and a validation that takes as long as 10.
    display = ProgressDisplay(
        RecordingBar(), 5, work=550.0, validation_work=10.0, expected_s=expected_s
    )
    display.interval_s = math.inf
    now += 30.0  # the first step warms up
    for _ in range(20):
        display.step(DelayedStep())
        now += 2.0
    # Known after 5 more steps of 2 s: 550 - 6 are left, which take 1,088 s.
    assert capsys.readouterr().err.splitlines() == shown


def test_short_trainings_are_not_estimated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "perf_counter", lambda: now)
    display = ProgressDisplay(RecordingBar(), 1, work=30.0)
    display.interval_s = math.inf
    for _ in range(30):
        display.step(DelayedStep())
        now += 2.0
    assert capsys.readouterr().err == ""  # 24 steps of 2 s


def test_progress_display_shows_numbers_when_they_have_arrived() -> None:
    bar = RecordingBar()
    display = ProgressDisplay(bar, 3)
    display.interval_s = 0.0
    first, more = DelayedStep(), [DelayedStep(delay=0) for _ in range(3)]
    for record in [first, *more]:
        display.step(record)
    # Requested at the first step and ready at the third, where those of the first are shown.
    (amount, text), (next_amount, _) = bar.moves
    assert (amount, next_amount) == (3, 1)
    assert text is not None
    assert text.startswith("epoch 1/3  loss 0.250  accuracy 75.0%")


def test_a_shortened_training_shows_its_new_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "perf_counter", lambda: now)
    bar = RecordingBar()
    # 5 epochs of 100 steps and a validation that takes as long as 10.
    display = ProgressDisplay(bar, 5, steps=100, work=550.0, validation_work=10.0)
    display.interval_s = math.inf
    display.shorten(3)
    assert bar.totals == [300]
    now += 30.0  # the first step warms up
    for _ in range(20):
        display.step(DelayedStep())
        now += 2.0
    # 330 steps, of which 324 are left after 6 of them: 648 s.
    assert capsys.readouterr().err.splitlines() == ["about 11 min left, by the first steps"]
    row = {"epoch": 1.0, "train_loss": 1.0, "train_accuracy": 0.5, "val_accuracy": math.nan}
    display.epoch({**row, "images_per_second": 10.0, "seconds": 2.0}, 1)
    assert capsys.readouterr().err.startswith("epoch   1/3 ")


def test_the_total_of_a_bar_can_change() -> None:
    seen: list[tuple[object, ...]] = []
    with (
        console.listen_to_progress(lambda *progress: seen.append(progress)),
        console.progress_bar("training", 10, shown=False) as bar,
    ):
        bar.advance(2)
        bar.set_total(6)
        bar.advance(4)
    assert seen == [("training", 2, 10), ("training", 6, 6)]


def test_listener_gets_the_progress_of_all_bars_and_can_stop_the_work() -> None:
    seen: list[tuple[object, ...]] = []

    def listen(*progress: object) -> None:
        seen.append(progress)
        if progress[1] == 3:
            raise KeyError("stop")

    with console.listen_to_progress(listen), console.progress_bar("one", 5, shown=False) as bar:
        bar.advance()
        with console.quiet_mode(), console.progress_bar("two", 2) as inner:
            inner.advance(2)
        with pytest.raises(KeyError, match="stop"):
            bar.advance(2)
    with console.progress_bar("after", 1, shown=False) as bar:
        bar.advance()
    assert seen == [("one", 1, 5), ("two", 2, 2), ("one", 3, 5)]
