"""What people read while they wait: messages, tables and progress bars, all on stderr.

Results go to stdout (`--json` must print one object and nothing else there), so nothing in
this module ever writes to it.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from convlens.system import ranks

if TYPE_CHECKING:
    from rich.console import Console


class Bar(Protocol):
    """A progress bar: `advance` moves it, `text` is shown at its end."""

    def advance(self, amount: int = 1, text: str | None = None) -> None: ...


class Numbers(Protocol):
    """A step's loss and its number of right answers, on their way here."""

    def ready(self) -> bool: ...
    def values(self) -> list[float]: ...


class Step(Protocol):
    """What is shown of a training step."""

    @property
    def epoch(self) -> int: ...
    @property
    def images(self) -> int: ...
    def numbers(self) -> Numbers: ...


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


_console: Console | None = None


def console() -> Console:
    """The one rich console of the process, on stderr."""
    global _console
    if _console is None:
        from rich.console import Console as RichConsole

        err = cast(IO[str], _Stderr())
        _console = RichConsole(file=err, highlight=False, emoji=False, soft_wrap=True)
        _console.quiet = ranks.rank() > 0  # of several processes the first one speaks
    return _console


def say(message: str) -> None:
    """One line to the user. `message` may hold rich markup; escape user text first."""
    console().print(message)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table among the messages: the first column to the left, the others to the right."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        shown.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        shown.add_row(*map(escape, row))
    console().print(shown)


@contextlib.contextmanager
def progress(description: str, total: int, *, shown: bool = True) -> Iterator[Bar]:
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
    disable = not (shown and console().is_terminal)
    with Progress(*columns, console=console(), transient=True, disable=disable) as bars:
        task = bars.add_task(description, total=total, text="")

        class _Bar:
            def advance(self, amount: int = 1, text: str | None = None) -> None:
                bars.advance(task, amount)
                if text is not None:
                    bars.update(task, text=text)

        yield _Bar()


class Watch:
    """The live view of a training: one bar for the whole of it, one line for each epoch."""

    EVERY = 0.2  # seconds between looks at the numbers

    def __init__(self, bar: Bar, epochs: int) -> None:
        self._bar, self._epochs = bar, epochs
        self._pending, self._images, self._looked = 0, 0, time.perf_counter()
        self._coming: tuple[Step, Numbers] | None = None
        self._validated = ""

    def step(self, record: Step) -> None:
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
        say(
            f"epoch {row['epoch']:>3.0f}/{self._epochs}  "
            f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}  "
            f"{validated}{row['images_per_second']:,.0f} images/s  {row['seconds']:.1f} s{star}"
        )


@contextlib.contextmanager
def watch(epochs: int, steps: int, done: int, *, shown: bool) -> Iterator[Watch]:
    """A `Watch` on `epochs` times `steps` steps of which `done` are behind us."""
    with quieted(not shown), progress("training", epochs * steps, shown=shown) as bar:
        bar.advance(done)
        yield Watch(bar, epochs)


@contextlib.contextmanager
def quieted(quiet: bool = True) -> Iterator[None]:
    """Messages and bars stay away inside, errors don't (they are raised, not said)."""
    held = console().quiet
    console().quiet = held or quiet
    try:
        yield
    finally:
        console().quiet = held
