"""The confusion section: a table whose cells show their images, or a list where it is too large."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from convlens.reporting import thumbnails
from convlens.reporting.contents import Contents
from convlens.reporting.page import render
from convlens.reporting.verdict import WORDS

LARGEST = 40  # classes that still make a readable table
PAIRS = 60  # confusions that are listed where there are more

Table = npt.NDArray[np.int64]


def confusion(found: Contents) -> Markup | None:
    """What each class was taken for. A cell is a button: it shows the images counted in it."""
    if found.summary is None or not found.summary.get("confusion"):
        return None
    table = np.asarray(found.summary["confusion"], dtype=np.int64)
    whole = len(table) <= LARGEST
    wanted = cells(table) if whole else pairs(table)
    shown = _images(found, wanted)
    return render(
        "confusion.html",
        classes=found.classes, what=WORDS[found.split], whole=whole,
        rows=[_row(table, t, shown) for t in range(len(table))] if whole else [],
        pairs=[] if whole else [_pair(found, table, t, s, shown) for t, s in wanted],
        confusions=int((table - np.diag(table.diagonal()) > 0).sum()),
        content={"cells": shown, "classes": found.classes} if shown else None,
    )  # fmt: skip


def cells(table: Table) -> list[tuple[int, int]]:
    """(truth, said) of every cell with images in it."""
    return [(int(t), int(s)) for t, s in np.argwhere(table > 0)]


def pairs(table: Table) -> list[tuple[int, int]]:
    """(truth, said) of the most frequent confusions, the most frequent first."""
    wrong = table - np.diag(table.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    places = (np.unravel_index(int(i), wrong.shape) for i in order)
    return [(int(t), int(s)) for t, s in places if wrong[t, s]]


def shade(count: int, total: int, right: bool) -> int:
    """From 0 (none) to 9 (all): the share of the class; the root of it for mistakes.

    A good model's mistakes are a few per cent of a class: on one scale with the diagonal they
    would all look white.
    """
    if not count:
        return 0
    share = count / total
    return max(1, min(9, round(9 * (share if right else math.sqrt(share)))))


def _row(table: Table, truth: int, shown: dict[str, Any]) -> list[dict[str, Any]]:
    total = int(table[truth].sum())
    return [
        {
            "said": said, "truth": truth, "count": int(count), "right": said == truth,
            "shade": shade(int(count), total, said == truth),
            "share": count / total if total else None,
            "key": _key(truth, said) if _key(truth, said) in shown else None,
        }
        for said, count in enumerate(table[truth].tolist())
    ]  # fmt: skip


def _pair(
    found: Contents, table: Table, truth: int, said: int, shown: dict[str, Any]
) -> dict[str, Any]:
    key = _key(truth, said)
    return {
        "truth": found.classes[truth], "said": found.classes[said],
        "count": int(table[truth, said]), "share": table[truth, said] / table[truth].sum(),
        "key": key if key in shown else None,
    }  # fmt: skip


def _key(truth: int, said: int) -> str:
    return f"{truth}-{said}"


def _images(found: Contents, wanted: list[tuple[int, int]]) -> dict[str, Any]:
    """For each cell its count and, for the first images, picture, id and confidence.

    The surest mistakes come first; of right answers the least sure.
    """
    if found.answers is None or found.images is None:
        return {}
    chances, labels = found.answers.chances, found.answers.labels
    said = chances.argmax(axis=1)
    sure = chances.max(axis=1)
    places: dict[str, list[int]] = {}
    for truth, guess in wanted:
        here = np.flatnonzero((labels == truth) & (said == guess))
        by = sure[here] if truth == guess else -sure[here]
        places[_key(truth, guess)] = here[np.argsort(by, kind="stable")].tolist()
    pictures = thumbnails.of_cells(found.images, places)
    ids = found.images.ids
    return {
        key: {
            "n": len(where),
            "images": [
                [source, str(ids[i]), round(float(sure[i]), 4)]
                for source, i in zip(pictures[key], where, strict=False)
            ],
        }
        for key, where in places.items()
    }
