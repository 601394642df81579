"""Contents of report pages made by hand, and a parser of finished pages."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convlens.data.dataset import Split
from convlens.evaluation import CachedPredictions
from convlens.metrics import summarize
from convlens.reports.contents import ReportContents
from convlens.run import RunDir
from helpers.support import Memory

HOSTILE_CLASSES = (
    "<script>alert(1)<",
    '"quoted" \'n $x^2$ & {{ 7*7 }}',
    "-->\u2028]]>",
    "قطة",
    "long " * 40 + "end",
)


class Page(HTMLParser):
    """Tags with their attributes, and all text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.json, self._inside = "", "", ""
        self.html = path.read_text("utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, text: str) -> None:
        kind = self.tags[-1][1].get("type") if self.tags else None
        if self._inside == "script" and kind == "application/json":
            self.json += text
        elif not self._inside:
            self.text += text

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def two_class_contents(**changes: Any) -> ReportContents:
    """A run evaluated on four images of two classes, with three correct predictions."""
    logits = np.array([[2, 0], [2, 0], [0, 2], [2, 0]], np.float32)
    labels = np.array([0, 0, 1, 1])
    contents = ReportContents(RunDir(Path("models/by-hand")), split="test")
    contents.metadata = {"data": {"name": "x", "classes": ["a", "b"]}, "kept_epoch": 1, "epochs": 1}
    contents.predictions = CachedPredictions(logits, labels, "")
    contents.summary = summarize(logits, labels, ["a", "b"])
    for key, value in changes.items():
        setattr(contents, key, value)
    return contents


def contents_of(name: str, preds: list[int], labels: list[int], classes: int = 2) -> ReportContents:
    """A run with these predictions, all of the same confidence."""
    logits = np.zeros((len(preds), classes), np.float32)
    logits[np.arange(len(preds)), preds] = 1
    contents = ReportContents(RunDir(Path("models") / name), split="test")
    contents.metadata = {"data": {"classes": [f"class {k}" for k in range(classes)]}}
    contents.predictions = CachedPredictions(logits, np.array(labels), "same")
    contents.summary = summarize(logits, np.array(labels), contents.classes)
    return contents


def split_of(pixels: torch.Tensor) -> Split:
    """A split of these images, with ids `0.png`, `1.png`, ..."""
    ids = [f"{i}.png" for i in range(len(pixels))]
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    return Split(Memory(pixels), labels, ids)  # type: ignore[arg-type]
