"""The command line's app, and what its commands share."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from typing import Annotated, Any, cast

import typer
import typer.core

from convlens.errors import UsageError
from convlens.names import hint, pick
from convlens.system import options


class Commands(typer.core.TyperGroup):
    """All commands; what was typed wrongly is told as every other error is."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with in_our_words():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with in_our_words():
            return super().invoke(ctx)


@contextlib.contextmanager
def in_our_words() -> Iterator[None]:
    """A `UsageError` of ours for typer's, with the key of a recipe that an option may mean."""
    # typer has no public name for the base class of what it raises.
    typed_wrongly = cast("type[Exception]", typer.BadParameter.__mro__[1])
    try:
        yield
    except typed_wrongly as raised:
        error: Any = raised
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        command = error.ctx.command_path if error.ctx else "convlens COMMAND"
        listed = "commands" if error.ctx and not error.ctx.parent else "options"
        what, fix = error.format_message(), f"`{command} -h` lists the {listed}"
        if option := getattr(error, "option_name", ""):
            keys = _keys(option) if error.ctx and _takes_keys(error.ctx.command) else []
            if keys:
                what = f"no such option: {option}; this is a key of the recipe"
                fix = " or ".join(f"{key}=VALUE" for key in keys) + f"; {fix}"
            elif type(error).__name__ == "NoSuchOption":
                what = f"no such option: {option}{hint(error.possibilities or ())}"
        raise UsageError(what[:1].lower() + what[1:].rstrip("."), fix=fix) from error


def _takes_keys(command: Any) -> bool:
    return any(parameter.name == "overrides" for parameter in command.params)


def _keys(option: str) -> list[str]:
    """The keys of a recipe whose last part is an option's name: `--batch-size`."""
    from convlens.recipe import meant  # pydantic: only now is it worth its time

    name = option.strip("-").replace("-", "_")
    return [key for key in meant(name) if key.rpartition(".")[2] == name]


app = typer.Typer(
    name="convlens",
    cls=Commands,
    help="Train, test and look inside convolutional image classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

DATA_HELP = "Built-in name, folder, CSV file, or the name of a folder under data/."

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
    typer.Option(metavar="DATA", help=DATA_HELP),
]


def _choose_figures(value: str | None) -> str | None:
    """Check `--figures` and set it for this command, wherever on the command line it stands."""
    if value is not None:
        pick(dict.fromkeys(("svg", "pdf", "none")), value, "format of figures")
        options.update(figures=value)
    return value


# For every command that draws. Its callback does the work, so the commands ignore the value.
Figures = Annotated[
    str | None,
    typer.Option(
        metavar="svg|pdf|none",
        help="Also write every figure as SVG or PDF; none: draw only the figures asked for.",
        callback=_choose_figures,
    ),
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
