from __future__ import annotations

import csv
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from convlens.errors import DataError, UsageError
from convlens.explore.label_review import (
    COLUMNS,
    Decisions,
    find_tables,
    read_review,
)
from helpers.reviews import HOSTILE, review_table

A, B = "page-of-tab-a", "page-of-tab-b"


def kinds(decisions: Decisions) -> dict[str, str]:
    """Return the valid decisions by image."""
    images = dict.fromkeys(line.image for line in decisions.lines)
    found = {image: decisions.of(image) for image in images}
    return {image: f"{d.kind} {d.label}".strip() for image, d in found.items() if d}


def test_decisions_are_lines_of_a_csv_and_undo_is_one_too(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path / "decisions.csv")
    assert decisions.decide("a.png", "keep", "", A, 0)
    assert decisions.decide("b.png", "change", "=cat", A, 1)
    assert decisions.decide("a.png", "delete", "", A, 2)
    assert kinds(decisions) == {"a.png": "delete", "b.png": "change =cat"}
    undone = decisions.undo(A)
    assert (undone.number, undone.image) == (3, "a.png")
    assert kinds(decisions) == {"a.png": "keep", "b.png": "change =cat"}
    with decisions.path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [[row[0], *row[3:]] for row in rows[1:]] == [
        ["1", "a.png", "keep", "", ""],
        ["2", "b.png", "change", "'=cat", ""],
        ["3", "a.png", "delete", "", ""],
        ["4", "a.png", "undo", "", "3"],
    ]
    again = Decisions(decisions.path)
    again.refresh()
    assert (again.lines, kinds(again)) == (decisions.lines, kinds(decisions))


def test_two_tabs_see_each_other_and_undo_only_their_own_decisions(tmp_path: Path) -> None:
    one, two = (Decisions(tmp_path / "decisions.csv") for _ in range(2))  # of two servers
    assert one.decide("a", "keep", "", A, 0)
    assert not two.decide("a", "delete", "", B, 0)  # it has not seen the decision of the other tab
    assert kinds(two) == {"a": "keep"}
    assert two.decide("b", "skip", "", B, 0)
    assert two.decide("a", "delete", "", B, 1)
    assert one.decide("c", "keep", "", A, 3)
    assert one.undo(A).image == "c"
    with pytest.raises(UsageError, match="nothing to undo"):
        one.undo(A)  # its decision on `a` has been replaced by the other tab
    assert two.undo(B).image == "a"
    assert kinds(two) == {"a": "keep", "b": "skip"}
    assert one.undo(A).image == "a"  # it is valid again
    assert kinds(one) == {"b": "skip"}


names = st.sampled_from(["a", "b\nc", 'd"e', "=f", "'-g", "ä,ö", "h\r"])
steps = st.tuples(st.integers(0, 1), names, st.sampled_from(["keep", "change", "undo"]))


@settings(max_examples=25, deadline=None)
@given(script=st.lists(steps, max_size=12))
def test_every_file_reads_back_as_written(
    script: list[tuple[int, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("d") / "decisions.csv"
    tabs = [Decisions(path), Decisions(path)]
    history: dict[str, list[tuple[int, str]]] = {}  # by image: tab and decision, the newest last
    order: list[tuple[int, str]] = []
    for tab, image, kind in script:
        decisions = tabs[tab]
        if kind == "undo":
            own = [k for k in reversed(order) if k[0] == tab and history[k[1]][-1:] == [k]]
            if own:
                assert decisions.undo(AB[tab]).image == own[0][1]
                history[own[0][1]].pop()
                order.reverse()
                order.remove(own[0])
                order.reverse()
            continue
        decisions.refresh()
        label = image if kind == "change" else ""
        assert decisions.decide(image, kind, label, AB[tab], len(decisions.lines))
        history.setdefault(image, []).append((tab, image))
        order.append((tab, image))
    fresh = Decisions(path)
    fresh.refresh()
    for tab_decisions in tabs:
        tab_decisions.refresh()
        assert tab_decisions.lines == fresh.lines
    assert set(kinds(fresh)) == {image for image, entries in history.items() if entries}


AB = (A, B)


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_half_a_line_of_a_killed_process_is_replaced(tmp_path: Path, cut: int) -> None:
    decisions = Decisions(tmp_path / "decisions.csv")
    decisions.decide("a", "keep", "", A, 0)
    complete = decisions.path.read_bytes()
    decisions.decide('b"\n"c', "change", "x\ny", A, 1)
    whole = decisions.path.read_bytes()
    decisions.path.write_bytes(whole[: len(complete) + cut])
    restarted = Decisions(decisions.path)
    restarted.refresh()
    assert kinds(restarted) == {"a": "keep"}
    restarted.decide("d", "delete", "", A, 1)
    again = Decisions(decisions.path)
    again.refresh()
    assert kinds(again) == {"a": "keep", "d": "delete"}


def test_threads_of_two_servers_lose_no_decision(tmp_path: Path) -> None:
    def work(name: str) -> None:
        decisions = Decisions(tmp_path / "decisions.csv")
        for number in range(15):
            assert decisions.decide(f"{name}{number}", "keep", "", name * 8, 0)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decisions = Decisions(tmp_path / "decisions.csv")
    decisions.refresh()
    assert set(kinds(decisions)) == {f"{name}{n}" for name in "abc" for n in range(15)}
    assert [line.number for line in decisions.lines] == list(range(1, 46))


def test_damaged_decisions_are_an_error(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path / "decisions.csv")
    decisions.decide("a", "keep", "", A, 0)
    text = decisions.path.read_text()
    for damaged in ("hello\n", text.replace("keep", "kept"), text + "7,x,p,i,keep,,\n"):
        decisions.path.write_text(damaged)
        with pytest.raises(DataError, match="not the list of decisions"):
            Decisions(decisions.path).refresh()


def test_corrected_list_has_all_rows_but_the_deleted_ones(tmp_path: Path) -> None:
    table = review_table(tmp_path)
    review = read_review(table)
    assert review.classes == sorted(["blue", HOSTILE, "green"])
    assert [suspect.label for suspect in review.suspects] == ["blue", "green", HOSTILE]
    assert review.of_files
    first, second, third = (suspect.image for suspect in review.suspects)
    review.decisions.decide(first, "change", HOSTILE, A, 0)
    review.decisions.decide(second, "delete", "", A, 1)
    review.decisions.decide(third, "keep", "", A, 2)
    assert review.write_corrected() == {"change": 1, "delete": 1}
    with table.open(newline="") as file:
        before = list(csv.DictReader(file))
    with review.corrected.open(newline="") as file:
        after = list(csv.DictReader(file))
    expected = [row for row in before if row["path"] != second]
    expected[0] = expected[0] | {"label": HOSTILE}
    assert after == expected


def test_lists_are_found_and_other_files_are_not(tmp_path: Path) -> None:
    for name in ("labels-a/labels.csv", "labels-a/labels-2.csv", "labels-a/corrected.csv", "b/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("path,label\n")
    assert sorted(find_tables(tmp_path)) == ["a", "a-2"]
    with pytest.raises(DataError, match="not a list of suspected labels"):
        read_review(tmp_path / "labels-a/labels.csv")
