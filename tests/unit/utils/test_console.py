"""Messages are log records; who shows them, and who keeps quiet."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest

from convlens.utils import console
from convlens.utils.console import (
    print_status,
    print_table,
    progress_bar,
    quiet_mode,
    status_handler,
)

LOGGER = logging.getLogger("convlens")


@pytest.fixture
def log_file() -> Iterator[io.StringIO]:
    """What an application gets that logs INFO records of all libraries to a file."""
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


def test_an_application_that_logs_gets_the_messages_as_plain_text(
    log_file: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    print_status("[bold]digits[/] takes 5% of \\[the time] :warning:")
    print_table(("stage", "rate"), [("stem", "0.1"), ("[head]", "1.0")])
    first, *rows = log_file.getvalue().splitlines()
    assert first == "convlens INFO test_console.py digits takes 5% of [the time] :warning:"
    assert rows[0].startswith("convlens INFO test_console.py ")
    assert [row.split() for row in rows][-2:] == [["stem", "0.1"], ["[head]", "1.0"]]
    assert capsys.readouterr() == ("", "")


def test_an_application_that_logs_warnings_only_does_not_hide_the_messages(
    log_file: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own level says nothing of a call that was not asked to be quiet (notebooks have one)."""
    logging.getLogger().setLevel(logging.WARNING)
    print_status("epoch 1")
    assert log_file.getvalue() == ""
    assert capsys.readouterr().err == "epoch 1\n"


def test_the_command_line_handles_messages_itself_and_leaves_nothing_behind(
    log_file: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    with status_handler():
        print_status("[bold]epoch[/] 1")
        LOGGER.warning("50%% [of] %s", "it")
    assert capsys.readouterr().err == "epoch 1\n50% [of] it\n"
    assert log_file.getvalue() == ""
    assert (LOGGER.handlers, LOGGER.level, LOGGER.propagate) == ([], logging.NOTSET, True)


def test_quiet_drops_messages_tables_and_records(
    log_file: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    with quiet_mode():
        with quiet_mode(False):  # what is inside does not undo it
            print_status("a")
        print_table(("b",), [("c",)])
        with progress_bar("d", 1) as bar:
            bar.advance()
    print_status("e")
    assert log_file.getvalue().splitlines() == ["convlens INFO test_console.py e"]
    assert capsys.readouterr().err == ""


def test_quiet_in_one_thread_does_not_silence_another(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_thread_with_the_context_of_a_quiet_one_is_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with quiet_mode(), ThreadPoolExecutor(1) as pool:
        pool.submit(copy_context().run, print_status, "quiet").result()
        pool.submit(print_status, "not quiet").result()
    assert capsys.readouterr().err == "not quiet\n"


def test_only_the_first_rank_shows_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, shown in ((0, "hello\n"), (1, "")):
        monkeypatch.setattr(console.ranks, "rank", lambda rank=rank: rank)
        print_status("hello")
        assert capsys.readouterr().err == shown
