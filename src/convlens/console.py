"""What people read while they wait: messages, tables and progress bars, all on stderr.

Results go to stdout (`--json` must print one object and nothing else there), so nothing in
this module ever writes to it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, SupportsFloat

from convlens import ranks

if TYPE_CHECKING:
    from rich.console import Console


class Bar(Protocol):
    """A progress bar: `advance` moves it, `text` is shown at its end."""

    def advance(self, amount: int = 1, text: str | None = None) -> None: ...


class Step(Protocol):
    """What is shown of a training step."""

    @property
    def epoch(self) -> int: ...
    @property
    def images(self) -> int: ...
    @property
    def loss(self) -> SupportsFloat: ...
    @property
    def correct(self) -> SupportsFloat: ...


_console: Console | None = None


def console() -> Console:
    """The one rich console of the process, on stderr."""
    global _console
    if _console is None:
        from rich.console import Console as RichConsole

        _console = RichConsole(stderr=True, highlight=False, emoji=False, soft_wrap=True)
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
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
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

    EVERY = 0.2  # seconds between looks at the numbers: reading one waits for the device

    def __init__(self, bar: Bar, epochs: int) -> None:
        self._bar, self._epochs = bar, epochs
        self._pending, self._images, self._looked = 0, 0, time.perf_counter()
        self._validated = ""

    def step(self, record: Step) -> None:
        """Takes in a step; looks at its numbers only a few times a second."""
        self._pending, self._images = self._pending + 1, self._images + record.images
        now = time.perf_counter()
        if now - self._looked < self.EVERY:
            return
        speed = self._images / (now - self._looked)
        right = float(record.correct) / record.images
        self._bar.advance(
            self._pending,
            f"epoch {record.epoch}/{self._epochs}  loss {float(record.loss):.3f}  "
            f"accuracy {right:.1%}{self._validated}  {speed:,.0f} images/s",
        )
        self._pending, self._images, self._looked = 0, 0, now

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
