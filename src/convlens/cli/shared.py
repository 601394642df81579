"""The command line's app, and what its commands share."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="convlens",
    help="Train, test and look inside convolutional image classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best there is by default.")
]
Tta = Annotated[
    str | None,
    typer.Option(
        metavar="VIEWS",
        help="Test-time augmentation beside the plain answer: flip or flip+shifts (also moved by "
        "a pixel for each 32). Mirror images must not change the class.",
    ),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, folder or model file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. optim.lr=0.1")
]
DataSet = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Built-in name, folder, CSV, or a folder under data/."),
]


def listed(text: str | None) -> list[str]:
    """Names written with commas."""
    return [each.strip() for each in (text or "").split(",") if each.strip()]


def print_json(wanted: bool, content: Any) -> None:
    """One object on stdout, if it was asked for; what is no finite number is null."""
    if wanted:
        text = json.dumps(_plain(content), ensure_ascii=False, allow_nan=False)
        sys.stdout.write(text + "\n")


def _plain(content: Any) -> Any:
    """The same without NaN and infinity, which JSON doesn't have."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
