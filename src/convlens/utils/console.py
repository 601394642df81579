"""Status messages, tables and progress bars, all on stderr.

Results go to stdout (`--json` must print one object and nothing else there), so nothing in
this module ever writes to it.

Every message is an INFO record of the logger `convlens`. Who handles it, in this order:

1. the application, if it has configured logging so that INFO records of `convlens` are handled
   (`logging.basicConfig(level=logging.INFO)`). The command line does so with `StatusHandler`;
2. otherwise `StatusHandler` as a last resort, as Python's own `logging.lastResort` prints warnings
   of applications that never configured logging.

So `convlens.train()` in a notebook shows its messages, and nothing is attached to any logger.
`quieted` drops messages and bars; it is a context variable, so it holds for one thread or task.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from convlens.utils import process

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LOGGER = "convlens"

_quiet: ContextVar[bool] = ContextVar("convlens_quiet", default=False)


class ProgressBar(Protocol):
    """A progress bar: `advance` moves it, `text` is shown at its end."""

    def advance(self, amount: int = 1, text: str | None = None) -> None: ...


class ScalarReader(Protocol):
    """A step's loss and its number of right answers, on their way here."""

    def ready(self) -> bool: ...
    def values(self) -> list[float]: ...


class StepRecord(Protocol):
    """What is shown of a training step."""

    @property
    def epoch(self) -> int: ...
    @property
    def images(self) -> int: ...
    def numbers(self) -> ScalarReader: ...


class _Stderr:
    """sys.stderr as it is at the moment; what it can't take any more is dropped.

    A closed terminal or a full disk under a log must not end a training.
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
    """The one rich console of the process, on stderr."""
    from rich.console import Console as RichConsole

    err = cast(IO[str], _Stderr())
    return RichConsole(file=err, highlight=False, emoji=False, soft_wrap=True)


class StatusHandler(logging.Handler):
    """Shows records on stderr as rich renders them: messages in bold and colour, tables."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record; markup in messages of other libraries is printed as it stands."""
        from rich.text import Text

        try:
            shown = getattr(record, "rich", None)
            console().print(Text(self.format(record)) if shown is None else shown)
        except Exception:  # as in logging.StreamHandler: a message must not end a training
            self.handleError(record)


@contextlib.contextmanager
def status_handler() -> Iterator[None]:
    """Handle all INFO records of `convlens` on stderr inside: what the command line does."""
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
    """Log one status message. It may hold rich markup; escape user text first."""
    if is_quiet():
        return
    from rich.text import Text

    _log(Text.from_markup(message, emoji=False).plain, message)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Log a table: the first column aligned left, the others right."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    if is_quiet():
        return
    shown = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        shown.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        shown.add_row(*map(escape, row))
    _log(_plain(shown), shown)


def is_quiet() -> bool:
    """Whether messages and bars are dropped here: in `quieted`, and on all ranks but the first."""
    return _quiet.get() or process.global_rank() > 0


def _log(plain: str, shown: str | Table) -> None:
    """Hand a record to the application's handlers, or show it if there are none for it.

    Its message is plain text, for log files; `rich` is what `StatusHandler` shows.
    """
    logger = logging.getLogger(LOGGER)
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        # Not `plain` as the format: a per cent sign in it is not a placeholder.
        logger.info("%s", plain, extra={"rich": shown}, stacklevel=3)
    else:
        console().print(shown)


def _plain(shown: Table) -> str:
    from rich.console import Console as RichConsole

    page = io.StringIO()
    RichConsole(file=page, width=200).print(shown)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()).strip("\n")


@contextlib.contextmanager
def progress_bar(description: str, total: int, *, shown: bool = True) -> Iterator[ProgressBar]:
    """A progress bar with count, time spent and time left; silent when stderr is no terminal."""
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

    class Cut(ProgressColumn):
        """The text at the end: where a terminal is too narrow for all, this alone is shortened."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")

    wide = console().width >= 100
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24 if wide else 10, table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        *([TimeElapsedColumn(table_column=Column(no_wrap=True))] if wide else []),
        TextColumn("left"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        Cut(),
    )
    disable = not (shown and console().is_terminal) or is_quiet()
    with Progress(*columns, console=console(), transient=True, disable=disable) as bars:
        task = bars.add_task(description, total=total, text="")

        class _Bar:
            def advance(self, amount: int = 1, text: str | None = None) -> None:
                bars.advance(task, amount)
                if text is not None:
                    bars.update(task, text=text)

        yield _Bar()


class ProgressDisplay:
    """The live view of a training: one bar for the whole of it, one line for each epoch."""

    EVERY = 0.2  # seconds between looks at the numbers

    def __init__(self, bar: ProgressBar, epochs: int) -> None:
        self._bar, self._epochs = bar, epochs
        self._pending, self._images, self._looked = 0, 0, time.perf_counter()
        self._coming: tuple[StepRecord, ScalarReader] | None = None
        self._validated = ""

    def step(self, record: StepRecord) -> None:
        """Takes in a step; asks for its numbers a few times a second, and never waits for them."""
        self._pending, self._images = self._pending + 1, self._images + record.images
        now = time.perf_counter()
        if now - self._looked < self.EVERY:
            return
        self._coming = self._coming or (record, record.numbers())
        asked, numbers = self._coming
        if not numbers.ready():
            return
        speed = self._images / (now - self._looked)
        loss, right = numbers.values()
        self._bar.advance(
            self._pending,
            f"epoch {asked.epoch}/{self._epochs}  loss {loss:.3f}  "
            f"accuracy {right / asked.images:.1%}{self._validated}  {speed:,.0f} images/s",
        )
        self._pending, self._images, self._looked, self._coming = 0, 0, now, None

    def epoch(self, row: Mapping[str, float], best: int) -> None:
        """Prints the epoch's line; the best one so far is starred."""
        self._bar.advance(self._pending)
        self._pending = 0
        validated = ""
        if not math.isnan(row["val_accuracy"]):
            self._validated = f"  validation {row['val_accuracy']:.2%}"
            validated = (
                f"validation loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.2%}  "
            )
        star = " *" if best == row["epoch"] else ""
        print_status(
            f"epoch {row['epoch']:>3.0f}/{self._epochs}  "
            f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}  "
            f"{validated}{row['images_per_second']:,.0f} images/s  {row['seconds']:.1f} s{star}"
        )


@contextlib.contextmanager
def progress_display(
    epochs: int, steps: int, done: int, *, shown: bool
) -> Iterator[ProgressDisplay]:
    """A `Watch` on `epochs` times `steps` steps of which `done` are behind us."""
    with quiet_mode(not shown), progress_bar("training", epochs * steps, shown=shown) as bar:
        bar.advance(done)
        yield ProgressDisplay(bar, epochs)


@contextlib.contextmanager
def quiet_mode(quiet: bool = True) -> Iterator[None]:
    """Drop messages and bars inside, in this thread; errors are raised as always.

    Threads that are started inside begin with a context of their own: give them this one with
    `contextvars.copy_context().run`.
    """
    token = _quiet.set(_quiet.get() or quiet)
    try:
        yield
    finally:
        _quiet.reset(token)
