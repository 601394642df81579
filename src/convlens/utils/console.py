"""Status messages, tables and progress bars, all on stderr.

Results go to stdout (`--json` must print one object and nothing else there), so nothing in
this module ever writes to it.

Every message is an INFO record of the logger `convlens`. It is handled

1. by the application, if it has configured logging so that INFO records of `convlens` are handled
   (`logging.basicConfig(level=logging.INFO)`). The command line does so with `StatusHandler`;
2. otherwise by `StatusHandler` as a last resort, just as Python's own `logging.lastResort` prints
   warnings of applications that never configured logging.

So `convlens.train()` in a notebook shows its messages, and nothing is attached to any logger.
`quiet_mode` drops messages and bars. It is a context variable, so it applies to one thread or task.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from convlens.utils import process

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LOGGER = "convlens"
DISPLAY_INTERVAL_S = 0.2  # between two updates of the numbers beside the progress bar
LOG_WIDTH = 200  # columns of a table in a log file
# Time and number of steps from which the rest of a training is estimated, and what an earlier
# estimate must be wrong by to be corrected.
ESTIMATE_AFTER_S, ESTIMATE_AFTER_STEPS = 10.0, 5
MIN_CORRECTION = 1.5
MIN_REMAINING_S = 60.0  # not worth a message below
WIDE_TERMINAL = 100  # columns from which the progress bar also shows the elapsed time

_quiet: ContextVar[bool] = ContextVar("convlens_quiet", default=False)
# Keys of the messages that `print_once` has printed within `message_scope`; None outside of it.
_printed: ContextVar[set[str] | None] = ContextVar("convlens_printed", default=None)
# Called with the description of a bar, the steps done and their total.
ProgressListener = Callable[[str, int, int], None]
_progress_listener: ContextVar[ProgressListener | None] = ContextVar(
    "convlens_progress_listener", default=None
)


class ProgressBar(Protocol):
    """A progress bar.

    `advance` moves it and sets the text that is shown at its end; `set_total` changes its length.
    """

    def advance(self, amount: int = 1, text: str | None = None) -> None: ...
    def set_total(self, total: int) -> None: ...


class ScalarReader(Protocol):
    """Loss and number of correct predictions of a step, being copied from the device."""

    def ready(self) -> bool: ...
    def values(self) -> list[float]: ...


class StepRecord(Protocol):
    """The part of a training step that is displayed."""

    @property
    def epoch(self) -> int: ...
    @property
    def images(self) -> int: ...
    def numbers(self) -> ScalarReader: ...


class _Stderr:
    """The current `sys.stderr`. Output that it cannot accept is dropped.

    A closed terminal, or a full disk under a log file, must not end a training.
    """

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@functools.cache
def console() -> Console:
    """Return the process's only rich console, which writes to stderr."""
    from rich.console import Console as RichConsole

    err = cast(IO[str], _Stderr())
    return RichConsole(file=err, highlight=False, emoji=False, soft_wrap=True)


class StatusHandler(logging.Handler):
    """Show log records on stderr, with rich's colors and tables."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record; text of other libraries is not interpreted as markup."""
        from rich.text import Text

        try:
            content = getattr(record, "rich", None)
            console().print(Text(self.format(record)) if content is None else content)
        except Exception:  # as in logging.StreamHandler: a message must not end a training
            self.handleError(record)


@contextlib.contextmanager
def status_handler() -> Iterator[None]:
    """Show all INFO records of `convlens` on stderr within the block. For the command line."""
    logger, handler = logging.getLogger(LOGGER), StatusHandler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def print_status(message: str) -> None:
    """Log one status message. It may contain rich markup, so escape user text first."""
    if is_quiet():
        return
    from rich.text import Text

    _log(Text.from_markup(message, emoji=False).plain, message)


def print_once(message: str) -> None:
    """Log a status message, unless it was logged within the same `message_scope`.

    Messages that differ only in numbers count as equal: the folds of a data set have the same
    problems with other counts.
    """
    if is_first_time(re.sub(r"[0-9][0-9,.]*", "0", message)):
        print_status(message)


def is_first_time(key: str) -> bool:
    """Return whether `key` is new within `message_scope`, and remember it.

    Always true outside of a scope. Never true if messages are dropped anyway.
    """
    if is_quiet():
        return False
    printed = _printed.get()
    if printed is None:
        return True
    is_new = key not in printed
    printed.add(key)
    return is_new


@contextlib.contextmanager
def message_scope() -> Iterator[None]:
    """Make `print_once` print each message once within the block; blocks may be nested."""
    if _printed.get() is not None:
        yield
        return
    token = _printed.set(set())
    try:
        yield
    finally:
        _printed.reset(token)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Log a table. The first column is aligned to the left, the others to the right."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    if is_quiet():
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    _log(_render_text(table), table)


def is_quiet() -> bool:
    """Return whether messages and bars are dropped: in `quiet_mode`, and on ranks other than 0."""
    return _quiet.get() or process.global_rank() > 0


def _log(text: str, content: str | Table) -> None:
    """Pass a record to the application's handlers, or show it if no handler accepts it.

    Args:
        text: plain text for log files.
        content: the same with markup, for `StatusHandler`.
    """
    logger = logging.getLogger(LOGGER)
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        # Not `text` as the format: a percent sign in it is not a placeholder.
        logger.info("%s", text, extra={"rich": content}, stacklevel=3)
    else:
        console().print(content)


def _render_text(table: Table) -> str:
    """Render a table as plain text."""
    from rich.console import Console as RichConsole

    page = io.StringIO()
    RichConsole(file=page, width=LOG_WIDTH).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()).strip("\n")


@contextlib.contextmanager
def progress_bar(description: str, total: int, *, shown: bool = True) -> Iterator[ProgressBar]:
    """Show a progress bar with count, elapsed and remaining time, if stderr is a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class TruncatedText(ProgressColumn):
        """The text at the end, the only column that is shortened in a narrow terminal."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")

    wide = console().width >= WIDE_TERMINAL
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24 if wide else 10, table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        *([TimeElapsedColumn(table_column=Column(no_wrap=True))] if wide else []),
        TextColumn("left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TruncatedText(),
    )
    disable = not (shown and console().is_terminal) or is_quiet()
    listener, done = _progress_listener.get(), 0
    with Progress(*columns, console=console(), transient=True, disable=disable) as bars:
        task = bars.add_task(description, total=total, text="")

        class _Bar:
            def advance(self, amount: int = 1, text: str | None = None) -> None:
                nonlocal done
                done += amount
                bars.advance(task, amount)
                if text is not None:
                    bars.update(task, text=text)
                if listener is not None:
                    listener(description, done, total)

            def set_total(self, new_total: int) -> None:
                nonlocal total
                total = new_total
                bars.update(task, total=total)

        yield _Bar()


@contextlib.contextmanager
def listen_to_progress(listener: ProgressListener) -> Iterator[None]:
    """Pass the progress of all bars within the block to a function, whether they are shown or not.

    The function gets the description, the steps done and their total. It may raise an exception
    to stop the work.
    """
    token = _progress_listener.set(listener)
    try:
        yield
    finally:
        _progress_listener.reset(token)


class ProgressDisplay:
    """The live view of a training: one progress bar, and one line for each epoch.

    Args:
        steps: of an epoch.
        work: steps that are left, with validations counted in steps.
        validation_work: one validation, in steps.
        expected_s: an estimate of the time that is left, made before the first step.

    Attributes:
        interval_s: time between two updates of the numbers beside the bar.
    """

    def __init__(
        self,
        bar: ProgressBar,
        epochs: int,
        monitor: str = "val_loss",
        *,
        steps: int = 0,
        work: float = 0.0,
        validation_work: float = 0.0,
        expected_s: float | None = None,
    ) -> None:
        self.interval_s = DISPLAY_INTERVAL_S
        self._bar, self._epochs, self._monitor = bar, epochs, monitor
        self._steps = steps
        self._work, self._validation_work = work, validation_work
        self._expected_s = expected_s
        self._timed_from: float | None = None  # the end of the first step, which warms up
        self._timed_steps, self._timed_work = 0, 0.0
        self._is_estimated = work <= 0
        self._pending_steps, self._pending_images = 0, 0  # since the last update of the bar
        self._updated = time.perf_counter()
        self._requested: tuple[StepRecord, ScalarReader] | None = None
        self._val_text = ""

    def step(self, record: StepRecord) -> None:
        """Count a step. Its numbers are requested a few times a second and never waited for."""
        self._pending_steps += 1
        self._pending_images += record.images
        now = time.perf_counter()
        if not self._is_estimated:
            self._estimate(now)
        if now - self._updated < self.interval_s:
            return
        self._requested = self._requested or (record, record.numbers())
        requested, scalars = self._requested
        if not scalars.ready():
            return
        speed = self._pending_images / (now - self._updated)
        loss, num_correct = scalars.values()
        self._bar.advance(
            self._pending_steps,
            f"epoch {requested.epoch}/{self._epochs}  loss {loss:.3f}  "
            f"accuracy {num_correct / requested.images:.1%}{self._val_text}  "
            f"{speed:,.0f} images/s",
        )
        self._pending_steps, self._pending_images = 0, 0
        self._updated, self._requested = now, None

    def _estimate(self, now: float) -> None:
        """Print how much time is left, once, if it is not as expected."""
        self._work -= 1
        if self._timed_from is None:
            self._timed_from = now
            return
        self._timed_steps += 1
        self._timed_work += 1
        seconds = now - self._timed_from
        if seconds < ESTIMATE_AFTER_S or self._timed_steps < ESTIMATE_AFTER_STEPS:
            return
        self._is_estimated = True
        remaining = seconds / self._timed_work * self._work
        expected = self._expected_s
        is_as_expected = (
            expected is not None
            and expected / MIN_CORRECTION < remaining < MIN_CORRECTION * expected
        )
        if remaining >= MIN_REMAINING_S and not is_as_expected:
            print_status(f"about {format_duration(remaining)} left, by the first steps")

    def epoch(self, row: Mapping[str, float], best: int) -> None:
        """Print a line with the results of an epoch; the best epoch so far has a star.

        Args:
            row: a row of `metrics.csv`.
            best: number of the best epoch so far.
        """
        self._bar.advance(self._pending_steps)
        self._pending_steps = 0
        self._work -= self._validation_work
        self._timed_work += self._validation_work
        validation = ""
        if not math.isnan(row["val_accuracy"]):
            self._val_text = f"  validation {row['val_accuracy']:.2%}"
            validation = (
                f"validation loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.2%}  "
            )
            if self._monitor not in ("val_loss", "val_accuracy"):
                name = self._monitor.removeprefix("val_").replace("_", " ").replace("f1", "F1")
                validation += f"{name} {row[self._monitor]:.2%}  "
        mark = "  <- best" if best == row["epoch"] else ""
        print_status(
            f"epoch {row['epoch']:>3.0f}/{self._epochs}  "
            f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}  "
            f"{validation}{row['images_per_second']:,.0f} images/s  {row['seconds']:.1f} s{mark}"
        )

    def shorten(self, epochs: int) -> None:
        """Show from now on that the training has `epochs` epochs, fewer than before."""
        self._work -= (self._epochs - epochs) * (self._steps + self._validation_work)
        self._epochs = epochs
        self._bar.set_total(epochs * self._steps)


@contextlib.contextmanager
def progress_display(
    epochs: int,
    steps: int,
    done: int,
    *,
    monitor: str = "val_loss",
    shown: bool,
    validation_work: float = 0.0,
    expected_s: float | None = None,
) -> Iterator[ProgressDisplay]:
    """Show the progress of a training of `epochs` times `steps` steps, `done` of which are done.

    Args:
        monitor: the metric that selects the best epoch; shown for each epoch.
        validation_work: the time of one validation, in steps.
        expected_s: an estimate of the time of the training.
    """
    with quiet_mode(not shown), progress_bar("training", epochs * steps, shown=shown) as bar:
        bar.advance(done)
        work = epochs * steps - done + validation_work * (epochs - done // steps)
        yield ProgressDisplay(
            bar,
            epochs,
            monitor,
            steps=steps,
            work=work,
            validation_work=validation_work,
            expected_s=expected_s,
        )


def format_duration(seconds: float) -> str:
    """Return a rounded duration, e.g. `40 s`, `8 min` or `2 h 10 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(10 * round(seconds / 600), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


@contextlib.contextmanager
def quiet_mode(quiet: bool = True) -> Iterator[None]:
    """Drop messages and progress bars within the block, in this thread.

    A thread that is started within the block has a new context: run it with
    `contextvars.copy_context().run` to make it quiet, too.
    """
    token = _quiet.set(_quiet.get() or quiet)
    try:
        yield
    finally:
        _quiet.reset(token)
