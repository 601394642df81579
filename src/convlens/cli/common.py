"""The typer app, its help page, and options that several commands share."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, cast

import typer
import typer.core

from convlens.errors import UsageError, did_you_mean_suffix, lookup
from convlens.utils import options

# The commands in the order of `convlens --help`, by panel.
PANELS = {
    "Everyday": ("train", "predict", "evaluate", "report"),
    "Understand": ("look", "compare", "diagnose"),
    "Data": ("audit", "labels", "augment", "shard"),
    "Hand over": ("export",),
    "Other": ("recipes", "info"),
}
# Old names, for the suggestion in the error. They are not aliases.
RENAMED = {
    "data": ("audit", "augment", "shard"),
    "doctor": ("diagnose",),
    "--settings": ("--variants",),
    "--splits": ("--repeat-splits",),
}


class Command(typer.core.TyperCommand):
    """A command with our help page: no type tags, one example per line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _print_help(self, ctx)


class CommandGroup(typer.core.TyperGroup):
    """All commands, in panels. Usage errors are reported in the same form as every other error."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with translate_usage_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with translate_usage_errors():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        listed = [name for names in PANELS.values() for name in names if name in self.commands]
        return [*listed, *(name for name in self.commands if name not in listed)]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            close = RENAMED.get(name) or difflib.get_close_matches(name, self.commands)
            raise UsageError(
                f"no such command {name!r}{did_you_mean_suffix(close)}",
                fix="`convlens -h` lists the commands",
            )
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _print_help(self, ctx)


def _print_help(command: Any, ctx: Any) -> None:
    """Print a help page: usage, description, examples, arguments, options, commands.

    typer's own page has a tag with the Python type beside every option, which says nothing to a
    user of the command line, and joins the lines of a docstring, so that examples run together.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False, emoji=False)
    prose, _, examples = inspect.cleandoc(command.help or "").partition("\nExamples:\n")
    shown = [each for each in command.get_params(ctx) if not getattr(each, "hidden", False)]
    arguments = [each for each in shown if isinstance(each, typer.core.TyperArgument)]
    options_ = [each for each in shown if isinstance(each, typer.core.TyperOption)]
    group = isinstance(command, CommandGroup)

    words = [*(each.metavar or "" for each in arguments), "[OPTIONS]", *["COMMAND ..."] * group]
    usage = Text.assemble(("Usage: ", "yellow"), (f"{ctx.command_path} {' '.join(words)}", "bold"))
    console.print(Padding(usage, (1, 1)))
    paragraphs = [" ".join(paragraph.split()) for paragraph in prose.strip().split("\n\n")]
    for number, paragraph in enumerate(paragraphs):
        console.print(Padding(Text(paragraph, "dim" if number else ""), (0, 1, 1, 1)))
    if examples:
        lines = textwrap.dedent(examples).strip()
        console.print(Padding(Text("Examples:", "yellow"), (0, 1)))
        console.print(Padding(Text(lines, "green"), (0, 1, 1, 3)))

    _print_panel(
        console, "Arguments", [(each.metavar or "", each.help or "") for each in arguments]
    )
    panels: dict[str, list[tuple[str, str]]] = {"Options": []}
    for option in options_:
        panel = getattr(option, "rich_help_panel", None) or "Options"
        panels.setdefault(panel, []).append(_option_row(option))
    if group:
        every = {name: command.get_command(ctx, name) for name in command.list_commands(ctx)}
        panel_of = {name: panel for panel, names in PANELS.items() for name in names}
        for name, each in every.items():
            first = inspect.cleandoc(each.help or "").partition("\n\n")[0]
            row = (name, " ".join(first.split()))
            panels.setdefault(panel_of.get(name, "Other"), []).append(row)
        panels["Options"] = panels.pop("Options")  # last: they are rarely needed
    for title, rows in panels.items():
        _print_panel(console, title, rows)


def _option_row(option: Any) -> tuple[str, str]:
    """The names of an option with its placeholder, and its help with the default."""
    names = ", ".join(sorted(option.opts, key=len))
    if option.secondary_opts:
        names += "/" + "/".join(option.secondary_opts)
    if option.metavar:
        names += f" {option.metavar}"
    words = option.help or ""
    default = option.default
    if isinstance(default, int | str) and not isinstance(default, bool) and option.show_default:
        words += f" [default: {default}]"
    return names, words


def _print_panel(console: Any, title: str, rows: list[tuple[str, str]]) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(box=None, show_header=False, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
    # Commands are never broken; a long list of alternatives may be.
    widest = max(len(name) for name, _ in rows)
    table.add_column(style="bold cyan", width=min(widest, 28), overflow="fold")
    table.add_column(ratio=1)
    for name, words in rows:
        table.add_row(Text(name), Text(words))
    console.print(Panel(table, title=title, title_align="left", border_style="dim"))


@contextlib.contextmanager
def translate_usage_errors() -> Iterator[None]:
    """Turn usage errors of typer into `UsageError`, with the recipe key an option may mean."""
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
                what = f"no such option: {option}; this is a recipe key"
                fix = " or ".join(f"{key}=VALUE" for key in keys) + f"; {fix}"
            elif type(error).__name__ == "NoSuchOption":
                what = f"no such option: {option}{did_you_mean_suffix(_close_options(error))}"
        raise UsageError(what[:1].lower() + what[1:].rstrip("."), fix=fix) from error


def _close_options(error: Any) -> Sequence[str]:
    """The options that a mistyped or renamed one may mean."""
    known = {name for each in error.ctx.command.params for name in each.opts} if error.ctx else ()
    new = [name for name in RENAMED.get(error.option_name, ()) if name in known]
    return new or error.possibilities or ()


def _takes_keys(command: Any) -> bool:
    return any(parameter.name == "overrides" for parameter in command.params)


def _keys(option: str) -> list[str]:
    """Return the recipe keys whose last part is the name of an option such as `--batch-size`."""
    from convlens.recipe import matching_keys  # pydantic: only now is it worth its time

    name = option.strip("-").replace("-", "_")
    return [key for key in matching_keys(name) if key.rpartition(".")[2] == name]


app = typer.Typer(
    name="convlens",
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

DATA_HELP = "Built-in name, folder, CSV file, or the name of a folder under data/."

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1 or mps; by default the fastest one."),
]
Split = Annotated[str, typer.Option(metavar="test|val|train", help="Split to evaluate.")]
TtaOption = Annotated[
    str | None,
    typer.Option(
        metavar="VIEWS",
        help="Test-time augmentation, reported beside the plain result: flip, or flip+shifts "
        "(shifts of 1 pixel in 32). Only for classes that a mirror image does not change.",
    ),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Name or folder of a run, or a model file.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. optim.lr=0.1"),
]
DataOption = Annotated[
    str | None,
    typer.Option(metavar="DATA", help=DATA_HELP),
]


def _choose_figures(value: str | None) -> str | None:
    """Check `--figures` and set it for this command, wherever on the command line it stands."""
    if value is not None:
        lookup(dict.fromkeys(("svg", "pdf", "none")), value, "format of figures")
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


def split_commas(text: str | None) -> list[str]:
    """Split a comma-separated list of names."""
    return [each.strip() for each in (text or "").split(",") if each.strip()]


def print_json(wanted: bool, content: Any) -> None:
    """Print one JSON object on stdout if `wanted`; NaN and infinity become null."""
    if wanted:
        text = json.dumps(_plain(content), ensure_ascii=False, allow_nan=False)
        sys.stdout.write(text + "\n")


def _plain(content: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot represent, by None."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
