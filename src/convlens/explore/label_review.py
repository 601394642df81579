"""Decisions on suspected labels, kept beside the CSV of `convlens labels`.

`labels.csv` lists the images, the suspects first. Each decision is a line that is appended to
`decisions.csv` and on the disk before it is acknowledged; lines are never changed, so an undo is a
line, too. Several pages and processes may decide: the file is locked while a line is appended, and
lines of others are read first. `corrected.csv` is `labels.csv` with the decisions carried out, a
data set to train on; it can be written again at any time.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convlens.errors import DataError, UsageError
from convlens.utils import files

COLUMNS = ("number", "time", "page", "image", "decision", "label", "undoes")
KINDS = ("keep", "change", "delete", "skip")
UNDO = "undo"
MAX_SUSPECTS = 5000  # that are listed; the most certain
LOCK_SECONDS = 20.0


@dataclass(frozen=True)
class Suspect:
    """A row of `labels.csv` whose label is probably wrong.

    Attributes:
        image: its path, or its id if it is not a file.
        suggested: the most probable class, with the probability `p_suggested`.
        score: probability of the given label.
    """

    image: str
    label: str
    split: str
    suggested: str
    score: float
    p_suggested: float
    copies: str


@dataclass(frozen=True)
class Decision:
    """A line of `decisions.csv`.

    Attributes:
        number: counts from 1.
        page: the browser tab that decided.
        label: the new class of a `change`.
        undoes: number of the decision that an `undo` takes back; 0 otherwise.
    """

    number: int
    page: str
    image: str
    kind: str
    label: str = ""
    undoes: int = 0


@dataclass
class Decisions:
    """All decisions on the images of one `labels.csv`, in the file `path`."""

    path: Path
    lines: list[Decision] = field(default_factory=list)
    _valid: dict[str, list[Decision]] = field(default_factory=dict)  # by image, the newest last
    _read_bytes: int = 0

    def of(self, image: str) -> Decision | None:
        """Return the decision on an image that is valid now."""
        valid = self._valid.get(image)
        return valid[-1] if valid else None

    def changed_since(self, number: int) -> list[str]:
        """Return the images of all lines after the line `number`."""
        return list(dict.fromkeys(line.image for line in self.lines[number:]))

    def decide(self, image: str, kind: str, label: str, page: str, known: int) -> bool:
        """Append a decision; return False if another page has decided since the line `known`."""
        with self._locked():
            others = [line for line in self.lines[known:] if line.page != page]
            if any(line.image == image for line in others):
                return False
            self._append(page, image, kind, label)
        return True

    def undo(self, page: str) -> Decision:
        """Take back the last valid decision of this page; return it.

        Raises:
            UsageError: there is none.
        """
        with self._locked():
            for line in reversed(self.lines):
                if line.page == page and line is self.of(line.image):
                    self._append(page, line.image, UNDO, undoes=line.number)
                    return line
        raise UsageError(
            "there is nothing to undo",
            fix="undo takes back decisions of this tab that no other tab has replaced",
        )

    def refresh(self) -> None:
        """Read the lines that others have appended.

        Raises:
            DataError: the file has been damaged.
        """
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._read_bytes:  # replaced by a shorter one
                    self.lines, self._valid, self._read_bytes = [], {}, 0
                file.seek(self._read_bytes)
                content = file.read()
        except FileNotFoundError:
            self.lines, self._valid, self._read_bytes = [], {}, 0
            return
        except OSError as error:
            raise files.cannot_read(self.path, error) from error
        complete = content[: _complete_length(content)]
        try:
            rows = list(csv.reader(io.StringIO(complete.decode(), newline=""), strict=True))
            if self._read_bytes == 0 and rows and tuple(rows.pop(0)) != COLUMNS:
                raise ValueError
            for row in rows:
                self._add(_parse(row, len(self.lines) + 1))
        except (ValueError, KeyError, csv.Error):
            raise DataError(
                "this is not the list of decisions that convlens has written",
                where=str(self.path),
                fix="undo your changes to it, or move it away to start again",
            ) from None
        self._read_bytes += len(complete)

    def _add(self, line: Decision) -> None:
        self.lines.append(line)
        if line.kind == UNDO:
            undone = self.lines[line.undoes - 1]
            self._valid[line.image].remove(undone)
        else:
            self._valid.setdefault(line.image, []).append(line)

    def _append(self, page: str, image: str, kind: str, label: str = "", undoes: int = 0) -> None:
        """Append a line and return once it is on the disk."""
        from convlens.data.image_list import escape_csv_formula

        text = io.StringIO(newline="")
        # By default a carriage return is not quoted, but ends a row when it is read.
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        if self._read_bytes == 0:
            writer.writerow(COLUMNS)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        cells = (escape_csv_formula(each) for each in (page, image, kind, label))
        writer.writerow([len(self.lines) + 1, time, *cells, undoes or ""])
        is_new = not self.path.exists()
        if is_new:
            files.write_atomic(self.path, b"")  # also makes its name durable
        try:
            with self.path.open("r+b") as file:
                file.seek(self._read_bytes)
                file.truncate()  # half a line of a process that was killed
                file.write(text.getvalue().encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise files.cannot_write(self.path, error) from error
        self.refresh()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.path.with_name(f".{self.path.name}.lock")
        with files.lock(lock, what="these decisions", timeout_s=LOCK_SECONDS):
            self.refresh()
            yield


def _complete_length(content: bytes) -> int:
    """Return the length of the complete CSV rows; a cell in quotes may contain line breaks."""
    length = position = 0
    in_quotes = False
    for line in content.splitlines(keepends=True):
        position += len(line)
        in_quotes ^= line.count(b'"') % 2 == 1
        if line.endswith(b"\n") and not in_quotes:
            length = position
    return length


def _parse(row: Sequence[str], expected: int) -> Decision:
    """Return a line of the file.

    Raises:
        ValueError: it is not one.
    """
    from convlens.data.image_list import unescape_csv_formula

    number, _, *cells, undoes = row
    page, image, kind, label = map(unescape_csv_formula, cells)
    line = Decision(int(number), page, image, kind, label, int(undoes or 0))
    if line.number != expected or kind not in (*KINDS, UNDO) or line.undoes >= line.number:
        raise ValueError
    return line


@dataclass
class Review:
    """The suspects of one `labels.csv`, and the decisions on them.

    Attributes:
        classes: all class names of the data set.
        of_files: whether the images are files, so that the corrected list can be used for training.
        total: number of suspects, more than are listed where there are very many.
    """

    table: Path
    classes: list[str]
    suspects: list[Suspect]
    of_files: bool
    total: int
    decisions: Decisions

    @property
    def corrected(self) -> Path:
        return sibling(self.table, "corrected")

    def write_corrected(self) -> dict[str, int]:
        """Write the list with all decisions carried out; return how many images they concern."""
        from convlens.data.image_list import escape_csv_formula, unescape_csv_formula

        self.decisions.refresh()
        counts = {"change": 0, "delete": 0}
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        rows = _rows(self.table)
        columns = next(rows)
        writer.writerow(columns)
        image_column, label_column = columns.index("path"), columns.index("label")
        for row in rows:
            decision = self.decisions.of(unescape_csv_formula(row[image_column]))
            if decision is not None and decision.kind in counts:
                counts[decision.kind] += 1
                if decision.kind == "delete":
                    continue
                row[label_column] = escape_csv_formula(decision.label)
            writer.writerow(row)
        files.write_atomic(self.corrected, text.getvalue())
        return counts


def sibling(table: Path, name: str) -> Path:
    """Return the file that belongs to a table: `corrected-2.csv` to `labels-2.csv`."""
    return table.with_name(f"{name}{table.stem.removeprefix('labels')}.csv")


def find_tables(plots: Path) -> dict[str, Path]:
    """Return the lists that `convlens labels` has written below a folder, by a short name."""
    found = {}
    for table in sorted(plots.glob("labels-*/labels*.csv")):
        if (
            table.stem.removeprefix("labels").removeprefix("-").isdecimal()
            or table.stem == "labels"
        ):
            name = table.parent.name.removeprefix("labels-")
            found[name + table.stem.removeprefix("labels")] = table
    return found


def read_review(table: Path) -> Review:
    """Read a list of `convlens labels` and the decisions so far.

    Raises:
        DataError: it is not such a list.
    """
    from convlens.data.class_names import sort_classes
    from convlens.data.image_list import unescape_csv_formula

    suspects: list[Suspect] = []
    classes: set[str] = set()
    total = 0
    rows = _rows(table)
    columns = next(rows, [])
    needed = {"label", "split", "suspect", "suggested", "score", "p_suggested", "copies"}
    if not needed <= set(columns) or columns[0] not in ("path", "id"):
        raise DataError(
            "this is not a list of suspected labels",
            where=str(table),
            fix="run `convlens labels` again",
        )
    for cells in rows:
        row = {key: unescape_csv_formula(cell) for key, cell in zip(columns, cells, strict=True)}
        classes |= {row["label"], row["suggested"]} - {""}
        if not row["suspect"]:
            continue
        total += 1
        if total <= MAX_SUSPECTS:
            suspects.append(
                Suspect(
                    row[columns[0]],
                    row["label"],
                    row["split"],
                    row["suggested"],
                    float(row["score"]),
                    float(row["p_suggested"]),
                    row["copies"],
                )
            )
    decisions = Decisions(sibling(table, "decisions"))
    decisions.refresh()
    return Review(
        table, list(sort_classes(classes)), suspects, columns[0] == "path", total, decisions
    )


def _rows(table: Path) -> Iterator[list[str]]:
    """Yield the rows of a CSV file, the names of the columns first.

    Raises:
        DataError: it is not a CSV file with equally long rows.
    """
    try:
        with table.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            first: list[str] = next(reader, [])
            for row in itertools.chain([first], reader):
                if len(row) != len(first):
                    raise csv.Error
                yield row
    except OSError as error:
        raise files.cannot_read(table, error) from error
    except (csv.Error, UnicodeDecodeError):
        raise DataError(
            "this is not a list of suspected labels",
            where=str(table),
            fix="undo your changes to it, or run `convlens labels` again",
        ) from None


def describe_decision(decision: Decision | None) -> dict[str, Any] | None:
    """Return a decision as plain values for JSON."""
    if decision is None:
        return None
    return {"kind": decision.kind, "label": decision.label}
