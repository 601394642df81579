"""The typer app, its help pages and error messages, and options shared by several commands."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import typer.core

from convlens.cli import completion
from convlens.errors import UsageError, did_you_mean_suffix, lookup
from convlens.utils import options

if TYPE_CHECKING:
    from convlens.recipe import DataConfig

# The commands in the order of `convlens --help`, by panel.
PANELS = {
    "Everyday": ("train", "predict", "evaluate", "report"),
    "Understand": ("explore", "look", "compare", "diagnose"),
    "Data": ("audit", "labels", "augment", "shard"),
    "Hand over": ("export", "serve"),
    "Other": ("check", "recipes", "weights", "info"),
}
MIN_ABBREVIATION = 3  # letters of a beginning that is understood as a longer option
NAME_COLUMN_WIDTH = 28  # maximum, of options and commands in a help page
# Old names and those of other tools, for the suggestion in the error message. They are not aliases.
OTHER_NAMES = {
    "data": ("audit", "augment", "shard"),
    "browse": ("explore",),
    "gui": ("explore",),
    "ui": ("explore",),
    "app": ("explore",),
    "tensorboard": ("explore",),
    "doctor": ("diagnose",),
    "fit": ("train",),
    "finetune": ("train",),
    "fine-tune": ("train",),
    "run": ("train",),
    "resume": ("train",),
    "test": ("evaluate",),
    "val": ("evaluate",),
    "validate": ("evaluate",),
    "eval": ("evaluate",),
    "score": ("evaluate",),
    "benchmark": ("evaluate",),
    "infer": ("predict",),
    "inference": ("predict",),
    "classify": ("predict",),
    "detect": ("predict",),
    "inspect": ("audit", "diagnose"),
    "verify": ("audit", "diagnose"),
    "show": ("look",),
    "visualize": ("look",),
    "visualise": ("look",),
    "explain": ("look",),
    "plot": ("look",),
    "convert": ("export",),
    "deploy": ("serve", "export"),
    "api": ("serve",),
    "server": ("serve",),
    "list": ("recipes",),
    "ls": ("recipes",),
    "models": ("recipes", "weights"),
    "pretrained": ("weights",),
    "backbones": ("weights",),
    "download": ("weights",),
    "version": ("info",),
    "env": ("info",),
    "--settings": ("--variants",),
    "--splits": ("--repeat-splits",),
    "--dataset": ("--data",),
    "--gpu": ("--device",),
    "--gpus": ("--device",),
    "--cuda": ("--device",),
    "--accelerator": ("--device",),
}


class Command(typer.core.TyperCommand):
    """A command whose help page has no type tags and one example per line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _print_help(self, ctx)


class CommandGroup(typer.core.TyperGroup):
    """The group of all commands; reports usage errors in the same form as all other errors."""

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
        is_unknown = name not in self.commands and not name.startswith("-")
        if is_unknown and not ctx.resilient_parsing:  # as while a shell completes a line
            close = OTHER_NAMES.get(name.casefold()) or difflib.get_close_matches(
                name, self.commands
            )
            raise UsageError(
                f"no such command {name!r}{did_you_mean_suffix(close)}",
                fix="`convlens -h` lists the commands",
            )
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _print_help(self, ctx)


def _print_help(command: Any, ctx: Any) -> None:
    """Print a help page: usage, description, examples, arguments, options and commands.

    typer's own page shows a Python type beside every option, which does not help users of the
    command line, and joins the lines of a docstring, so that examples run together.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False, emoji=False)
    description, _, examples = inspect.cleandoc(command.help or "").partition("\nExamples:\n")
    visible = [each for each in command.get_params(ctx) if not getattr(each, "hidden", False)]
    arguments = [each for each in visible if isinstance(each, typer.core.TyperArgument)]
    group = isinstance(command, CommandGroup)

    usage = [*(each.metavar or "" for each in arguments), "[OPTIONS]", *["COMMAND ..."] * group]
    line = Text.assemble(("Usage: ", "yellow"), (f"{ctx.command_path} {' '.join(usage)}", "bold"))
    console.print(Padding(line, (1, 1)))
    paragraphs = [" ".join(paragraph.split()) for paragraph in description.strip().split("\n\n")]
    for number, paragraph in enumerate(paragraphs):
        console.print(Padding(Text(paragraph, "dim" if number else ""), (0, 1, 1, 1)))
    if examples:
        lines = textwrap.dedent(examples).strip()
        console.print(Padding(Text("Examples:", "yellow"), (0, 1)))
        console.print(Padding(Text(lines, "green"), (0, 1, 1, 3)))

    _print_panel(
        console, "Arguments", [(each.metavar or "", each.help or "") for each in arguments]
    )
    panels: dict[str, list[tuple[str, str]]] = {}
    for option in visible:
        if isinstance(option, typer.core.TyperOption):
            panel = getattr(option, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append(_option_row(option))
    if group:
        panel_of = {name: panel for panel, names in PANELS.items() for name in names}
        for name in command.list_commands(ctx):
            text = inspect.cleandoc(command.get_command(ctx, name).help or "")
            summary = " ".join(text.partition("\n\n")[0].split())
            panels.setdefault(panel_of.get(name, "Other"), []).append((name, summary))
    panels["Options"] = panels.pop("Options", [])  # last, since they are rarely needed
    for title, rows in panels.items():
        _print_panel(console, title, rows)


def _option_row(option: Any) -> tuple[str, str]:
    """Return the names of an option with its placeholder, and its help text with the default."""
    names = ", ".join(sorted(option.opts, key=len))
    if option.secondary_opts:
        names += "/" + "/".join(option.secondary_opts)
    if option.metavar:
        names += f" {option.metavar}"
    text = option.help or ""
    default = option.default
    if isinstance(default, int | str) and not isinstance(default, bool) and option.show_default:
        text += f" [default: {default}]"
    return names, text


def _print_panel(console: Any, title: str, rows: list[tuple[str, str]]) -> None:
    """Print a titled table of names and help texts; nothing if it has no rows."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(box=None, show_header=False, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
    # Names of commands are never broken; a long list of alternatives may be.
    widest = max(len(name) for name, _ in rows)
    table.add_column(style="bold cyan", width=min(widest, NAME_COLUMN_WIDTH), overflow="fold")
    table.add_column(ratio=1)
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    console.print(Panel(table, title=title, title_align="left", border_style="dim"))


@contextlib.contextmanager
def translate_usage_errors() -> Iterator[None]:
    """Turn usage errors of typer into `UsageError`, with the recipe key an option may mean."""
    # typer has no public name for the base class of its errors.
    typer_usage_error = cast("type[Exception]", typer.BadParameter.__mro__[1])
    try:
        yield
    except typer_usage_error as raised:
        error: Any = raised
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        command = error.ctx.command_path if error.ctx else "convlens COMMAND"
        kind = "commands" if error.ctx and not error.ctx.parent else "options"
        what, fix = error.format_message(), f"`{command} -h` lists the {kind}"
        if option := getattr(error, "option_name", ""):
            has_overrides = error.ctx and any(
                parameter.name == "overrides" for parameter in error.ctx.command.params
            )
            keys = _recipe_keys(option) if has_overrides else []
            if keys and not _renamed_options(error):
                what = f"no such option: {option}; this is a recipe key"
                fix = " or ".join(f"{key}=VALUE" for key in keys) + f"; {fix}"
            elif type(error).__name__ == "NoSuchOption":
                what = _describe_unknown_option(error)
        raise UsageError(what[:1].lower() + what[1:].rstrip("."), fix=fix) from error


def _describe_unknown_option(error: Any) -> str:
    """Return the message about an unknown option, with those that it may mean, or their commands.

    Only options that are hardly different are proposed: one with another effect, such as
    `--no-test` for `--test`, might be tried.
    """
    option = error.option_name
    what = f"no such option: {option}"
    if renamed := _renamed_options(error):
        return what + did_you_mean_suffix(renamed)
    if not error.ctx:
        return what
    commands = getattr(error.ctx.find_root().command, "commands", {})
    owners = [
        name
        for names in PANELS.values()
        for name in names
        if name in commands and option in _option_names(commands[name])
    ]
    if owners:
        return f"{what}; it is an option of {', '.join(owners)}"
    own = _option_names(error.ctx.command)
    return what + did_you_mean_suffix([name for name in own if is_typo(option, name)])


def _option_names(command: Any) -> list[str]:
    """Return the long names of a command's options that its help lists."""
    options = [each for each in command.params if not getattr(each, "hidden", False)]
    return [name for each in options for name in each.opts if name.startswith("--")]


def is_typo(typed: str, name: str) -> bool:
    """Return whether an option is a beginning of another one, or differs from it by a slip.

    A slip is a letter that is wrong, missing or too much, or two that are exchanged; in names of
    seven letters or more there may be two.
    """
    first, second = typed.strip("-").replace("_", "-"), name.strip("-")
    if first.startswith("no-") != second.startswith("no-"):
        return False
    if len(first) >= MIN_ABBREVIATION and second.startswith(first):
        return True
    shorter = min(len(first), len(second))
    allowed = 2 if shorter >= 7 else 1 if shorter >= 4 else 0
    return _edit_distance(first, second) <= allowed


def _edit_distance(first: str, second: str) -> int:
    """Return the number of insertions, deletions, replacements and exchanges of neighbors."""
    rows = [list(range(len(second) + 1))]
    for i, letter in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            cost = letter != other
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + cost)
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def _renamed_options(error: Any) -> list[str]:
    """Return the options of this command that an old name, or one of another tool, stands for."""
    known = {name for each in error.ctx.command.params for name in each.opts} if error.ctx else ()
    return [name for name in OTHER_NAMES.get(error.option_name, ()) if name in known]


def _recipe_keys(option: str) -> list[str]:
    """Return the recipe keys that an option such as `--batch-size` or `--model` may mean."""
    from convlens.recipe import keys_named  # imports pydantic, which takes time

    return keys_named(option.strip("-").replace("-", "_"))


app = typer.Typer(
    name="convlens",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

DATA_HELP = (
    "Images: a folder with one sub-folder per class, a list of images (CSV and others), shards, a "
    "built-in set (digits, shapes, mnist, cifar10 ...), or the name of a folder under data/."
)
DEVICE_HELP = "cpu, cuda, cuda:1 or mps. Default: the fastest one."

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
HostOption = Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help=DEVICE_HELP,
        autocompletion=lambda incomplete: completion.one_of(incomplete, "cpu", "cuda", "mps"),
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="test|val|train",
        help="Images to use. Default: test, or all images of DATA if it has no splits.",
        autocompletion=lambda incomplete: completion.one_of(incomplete, "test", "val", "train"),
    ),
]
TtaOption = Annotated[
    str | None,
    typer.Option(
        metavar="VIEWS",
        help="Also average the answers for mirrored (flip) or mirrored and shifted (flip+shifts) "
        "copies of each image, beside the plain answer. Only for classes that mirroring does not "
        "change: not for text or digits.",
        autocompletion=lambda incomplete: completion.one_of(incomplete, "flip", "flip+shifts"),
    ),
]
MinAccuracyOption = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Answer 'unsure' where this accuracy, e.g. 95%, can't be promised for images like "
        "those of the validation split.",
    ),
]
ConfidenceOption = Annotated[
    str, typer.Option(metavar="SHARE", help="Probability with which that promise holds.")
]
PredictionSetOption = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Also print a set of classes that holds the true one for this share of images, e.g. "
        "90%.",
    ),
]
MaxPixelsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Refuse image files with more pixels. Default: the limit of the training, mostly 89 "
        "million.",
    ),
]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A trained model: name or folder of a run, or a model file.",
        autocompletion=completion.complete_run,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Change the recipe, e.g. train.epochs=20 optim.lr=0.01 data.image_size=96. All keys: "
        "`convlens recipes folder --keys`.",
        autocompletion=completion.complete_key,
    ),
]
DataOverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="How to read DATA, e.g. image_size=96 fit=pad val_fraction=0.2.",
        autocompletion=completion.complete_data_key,
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(metavar="DATA", help=DATA_HELP, autocompletion=completion.complete_data),
]


def _set_figures(value: str | None) -> str | None:
    """Check `--figures` and set it for this command; it may come before or after the command."""
    if value is not None:
        lookup(dict.fromkeys(("svg", "pdf", "none")), value, "format of figures")
        options.update(figures=value)
    return value


# For every command that draws. Its callback sets the option, so the commands ignore the value.
Figures = Annotated[
    str | None,
    typer.Option(
        metavar="svg|pdf|none",
        help="Also save every figure as SVG or PDF; none: draw only what was requested.",
        callback=_set_figures,
        autocompletion=lambda incomplete: completion.one_of(incomplete, "svg", "pdf", "none"),
    ),
]


def _set_trust_code(value: bool) -> bool:
    if value:
        options.update(trust_code=True)
    return value


# For every command that opens models. Its callback sets the option, so the commands ignore the
# value.
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Import user code (FILE.py:NAME) that a model file or recipe needs.",
        callback=_set_trust_code,
    ),
]


# Beside `--data`, in commands that name one run.
DataKeysArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="How to read DATA, e.g. data.images=photos.",
        autocompletion=completion.complete_data_key,
    ),
]
_DATA_KEY = re.compile(r"(data\.)?[a-z_]+=")


def split_data_keys(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into names (of runs or images) and `KEY=VALUE` texts for `--data`."""
    is_key = [bool(_DATA_KEY.match(each)) and not os.path.exists(each) for each in arguments]
    names = [each for each, key in zip(arguments, is_key, strict=True) if not key]
    return names, [each for each, key in zip(arguments, is_key, strict=True) if key]


def parse_data(data: str | None, keys: Sequence[str] | None) -> DataConfig | str | None:
    """Return the data set of `--data`, with the keys that say how to read it.

    Raises:
        UsageError: keys without `--data`, or unknown ones.
    """
    if not keys:
        return data
    if data is None:
        raise UsageError(
            f"{keys[0]}: these keys say how to read the data set of --data",
            fix="add --data DATA",
        )
    from convlens.training import resolve  # imports torch

    return resolve.resolve_data_config(data, keys)


def parse_share_option(option: str, text: str | None) -> float | None:
    """Return a share that is given as `95%` or `0.95`; None for None."""
    from convlens.uncertainty.calibration import parse_share  # imports torch

    return None if text is None else parse_share(option, text)


def split_commas(text: str | None) -> list[str]:
    """Split a comma-separated list of names."""
    return [each.strip() for each in (text or "").split(",") if each.strip()]


def write_utf8() -> None:
    """Make stdout UTF-8 if it is a file or a pipe, whatever the locale; a terminal keeps its own.

    Otherwise a class name that the locale cannot represent would be an escape such as \\u732b.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8", errors=sys.stdout.errors)


def print_json(as_json: bool, content: Any) -> None:
    """Print `content` as one JSON object on stdout if `as_json`; NaN and infinity become null."""
    if as_json:
        write_utf8()
        text = json.dumps(_nan_to_none(content), ensure_ascii=False, allow_nan=False)
        sys.stdout.write(text + "\n")


def _nan_to_none(content: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot represent, by None."""
    if isinstance(content, dict):
        return {key: _nan_to_none(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_nan_to_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
