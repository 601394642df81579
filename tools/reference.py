"""Write the generated files: the JSON schema of recipes and the pages of docs/reference.

    python tools/reference.py

What the pages say about keys and commands is taken from the code. Variables and files are described
here; `tests/integration/test_reference.py` compares them with the sources and with a real run, and
fails if a generated file is stale.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer.core
from typer.main import get_command

from convlens import errors, models, recipe_reference
from convlens.cli.common import PANELS, app
from convlens.recipe import SECTIONS, load_recipe
from convlens.recipe_reference import RecipeKey, value_in_yaml

REPOSITORY = Path(__file__).resolve().parents[1]
WIDTH = 120
GENERATED = "<!-- Written by tools/reference.py. -->"

EXIT_CODES_WITHOUT_ERROR = {
    0: "Success.",
    1: "A part of yours fails `convlens check`; a bug of convlens, with a traceback; or a closed "
    "pipe.",
    130: "Ctrl-C; the same command resumes a training.",
}
VARIABLES = {
    "CONVLENS_CACHE": "Folder of decoded images. Default: `~/.cache/convlens`.",
    "CONVLENS_DATA": "Folder of downloaded data sets, which is searched before `data`.",
    "CONVLENS_MEMORY": "Memory budget for images, e.g. `8GB`. Default: half of the free memory.",
    "CONVLENS_FIGURES": "As `--figures`: `svg` or `pdf` for a second format, `none` to draw only "
    "what is requested.",
    "CONVLENS_SAVE_SECONDS": "Seconds between two checkpoints. Default: 60.",
    "CONVLENS_DEBUG": "As `--debug`, if it is not empty: errors keep their traceback.",
    "CONVLENS_TOKEN": "As `serve --token`.",
    "CONVLENS_RENDEZVOUS_TIMEOUT_S": "Seconds that the processes of one training wait for each "
    "other at the start. Default: 600.",
}
OTHER_VARIABLES = {
    "OMP_NUM_THREADS": "Number of threads of torch. Default: the usable cores.",
    "GOMP_SPINCOUNT": "How long waiting threads stay busy. The command line sets it to 1000 unless "
    "it or `OMP_WAIT_POLICY` is set; set it before torch is imported in Python.",
    "TORCH_HOME": "Folder of torchvision's pretrained weights.",
    "HF_HOME": "Folder of timm's pretrained weights.",
    "NO_COLOR": "No colors in the terminal.",
}
# The files of a run folder: `models/RUN/`.
RUN_FILES = {
    "model.safetensors": "The model: weights, classes, preprocessing, recipe, origin of pretrained "
    "weights, a SHA-256 over every byte, and what calibrates predictions: a temperature, outputs "
    "for half of the validation images, and features of training images (`train.calibrate`).",
    "recipe.yaml": "The recipe with all values; `auto` is replaced by what was chosen. "
    "`convlens train models/RUN/recipe.yaml --fresh` trains it again.",
    "run.json": "What was requested and how it went; see below.",
    "metrics.csv": "A row for each epoch; see below.",
    "results.json": "Every evaluation, and every use of the test images, the latest last; see "
    "below.",
    "split.csv": "The images that were held out for validation and test: `id`, `split`. Only if "
    "convlens chose them.",
    "images.csv.gz": "All images of the data set: `id`, `class`, `split`, and the first 16 digits "
    "of the file's SHA-256.",
    "answers/": "Outputs of the model for whole splits, so that `report` and `compare` need not "
    "compute them again. May be deleted.",
    "state/": "The two latest checkpoints: weights, optimizer, averages, position. They resume a "
    "stopped training and extend a finished one (`--extend`). May be deleted otherwise.",
    "code/": "Copies of the files of user code that the run uses (`FILE.py:NAME`).",
    "trainer.json": "The process that trains the run, while it does.",
    ".lock, .results.lock": "Keep two commands from writing at the same time. Empty.",
    "model.onnx, model.pt2": "Written by `convlens export`.",
    "predict_onnx.py": "Written by `convlens export` beside an ONNX file: a program that needs "
    "Pillow, numpy and onnxruntime only.",
}
METRICS = {
    "epoch": "Number of the epoch, from 1.",
    "train_loss, train_accuracy": "Means over the augmented images of the epoch, while the weights "
    "changed.",
    "val_loss, val_accuracy, val_macro_f1, val_balanced_accuracy": "After the epoch, on the "
    "validation images; empty without a validation split.",
    "lr": "Learning rate of the last step.",
    "seconds, cpu_seconds": "Time of the epoch without validation, and CPU time of all threads.",
    "data_seconds": "The part of it that was spent waiting for images.",
    "images_per_second": "Training images per second.",
}
RUN_JSON = {
    "created, status": "Time of the start in UTC; `training` or `finished`.",
    "out_of_memory, diverged, changed, shortened": "Only if it happened: batches that were split "
    "because memory ran out; where the loss became NaN; that a run was resumed with another "
    "version or machine; that `train.minutes` left fewer epochs.",
    "digests": "Hashes of the recipes by which the same command finds the run again.",
    "data": "Name, fingerprint, classes, how the splits were made, skipped images, and the path.",
    "weights": "Origin, hash and licence of pretrained weights; null without.",
    "plan, timings": "Device, precision, memory format, and the step times by which they were "
    "chosen.",
    "parameters, trainable_parameters": "Number of weights.",
    "epochs, kept_epoch": "Number of epochs, and the one whose weights are the model.",
    "training_seconds, cpu_seconds": "Time of the training, and CPU time.",
    "trunk_cached": "Whether the features of a frozen backbone were computed once.",
    "convlens, hardware, world_size": "Version, machine, number of processes.",
}


def schema_page() -> str:
    """Return the JSON schema of recipes."""
    return json.dumps(recipe_reference.recipe_schema(), indent=1) + "\n"


def recipe_keys_page() -> str:
    """Return the page of all keys of a recipe, options of networks, and augmentations."""
    keys = recipe_reference.recipe_keys(load_recipe({"name": "defaults", "model": {"name": "cnn"}}))
    of_cnn = {key.key for key in recipe_reference.model_option_keys("cnn", {})}
    common = [key for key in keys if key.key not in of_cnn]
    parts = [
        _heading(
            "Keys of a recipe",
            "A recipe has five parts: `data`, `augment`, `model`, `optim` and `train`. Any key can "
            "be changed on the command line, `convlens train mnist optim.lr=0.01`, in Python, "
            '`convlens.train("mnist", {"optim.lr": 0.01})`, and in a file (`convlens recipes mnist '
            "> mine.yaml`). `convlens recipes NAME --keys` prints this table with the values of a "
            "recipe. The defaults here are those of a recipe that sets nothing; the recipe for "
            "your own images, `folder`, sets some of them.",
        ),
        _key_list(key for key in common if "." not in key.key),
    ]
    for section, kind in SECTIONS.items():
        parts += [f"## {section}", inspect.cleandoc(kind.__doc__ or "").partition("\n")[0]]
        of_section = [key for key in common if key.key.startswith(f"{section}.")]
        parts.append(_key_list(key for key in of_section if not key.is_rare))
        if rare := [key for key in of_section if key.is_rare]:
            parts += ["Rarely needed:", _key_list(rare)]
        if section == "model":
            parts += _network_options()
    parts += [
        "### Entries of optim.groups, and optim.lookahead",
        _key_list(recipe_reference.nested_keys()),
        "## Augmentations",
        _prose(
            "`augment` is a list of names, with arguments where they are needed: "
            "`augment=[RandomHorizontalFlip, {RandomCrop: {padding: 4}}]`. Names and arguments are "
            "those of torchvision. Operations that mix images come last."
        ),
        _augmentation_list(),
    ]
    return "\n\n".join([GENERATED, *parts]) + "\n"


def commands_page() -> str:
    """Return the page of all commands with their arguments and options."""
    group: Any = get_command(app)
    context = typer.Context(group, info_name="convlens")
    parts = [
        _heading(
            "Commands",
            "`convlens COMMAND -h` prints the same. Results go to stdout and messages to stderr; "
            "with `--json` stdout has one JSON object and nothing else.",
        ),
        _option_lists(group.get_params(context)),
    ]
    for panel, names in PANELS.items():
        parts.append(f"## {panel}")
        for name in names:
            command = group.commands[name]
            parts += _command_section(name, command, typer.Context(command, parent=context))
    return "\n\n".join([GENERATED, *parts]) + "\n"


def environment_page() -> str:
    """Return the page of exit codes and environment variables."""
    kinds = [errors.UsageError, errors.DataError, errors.ModelFileError, errors.ResourceError]
    codes = dict(EXIT_CODES_WITHOUT_ERROR)
    for kind in [*kinds, errors.Diverged, errors.Stopped]:
        text = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
        codes[kind.exit_code] = text.replace(f" (exit code {kind.exit_code})", "")
    parts = [
        _heading("Environment variables and exit codes", ""),
        "## Environment variables",
        _file_list(VARIABLES),
        "Variables of other programs that matter here:",
        _file_list(OTHER_VARIABLES),
        "## Exit codes",
        _table(["code", "meaning"], [[str(code), codes[code]] for code in sorted(codes)]),
        _prose(
            "A script can run a command that ended with 75 again to resume it; after 6 the same "
            "command would diverge again. `convlens audit --strict` ends with 3 also for harmful "
            "duplicates. Errors are printed as `error:` or `stopped:` with what happened, where, "
            "and what to do."
        ),
    ]
    return "\n\n".join([GENERATED, *parts]) + "\n"


def run_folder_page() -> str:
    """Return the page of the files of a run."""
    parts = [
        _heading(
            "Files of a run",
            "A run is a folder, `models/RUN/`, with figures in `plots/RUN/`. It can be moved and "
            "copied; `model.safetensors` alone is enough for `predict`, `export` and `serve`.",
        ),
        _file_list(RUN_FILES),
        "## metrics.csv",
        _file_list(METRICS),
        "## run.json",
        _file_list(RUN_JSON),
        "## results.json",
        _prose(
            "A list. An evaluation has the fields of `convlens evaluate --json`: `when`, `split`, "
            "`data`, `n`, `accuracy` with `interval95`, the means and scores of the classes, "
            "`confusion`, `loss`, `ece` and more. Other uses of the test images have `when`, "
            "`split`, `by` (the command) and `looks` (the number of uses so far)."
        ),
    ]
    return "\n\n".join([GENERATED, *parts]) + "\n"


def _network_options() -> list[str]:
    parts = [
        "### Options of networks",
        _prose(
            "These are keys of `model`, too, each for one network: `convlens train mnist "
            "model.widths=[16,32]`."
        ),
    ]
    networks: dict[str, list[str]] = {}  # by their options, since those of ResNets are equal
    for name in models.MODELS:
        options = _key_list(recipe_reference.model_option_keys(name, {}))
        networks.setdefault(options, []).append(name)
    for options, names in networks.items():
        parts += [f"#### {', '.join(names)}", options]
    zoo = [(f"`model.{name}`", text) for name, text in recipe_reference.ZOO_OPTIONS.items()]
    parts += [
        "#### Networks of torchvision and timm",
        "Each network has some of these; an error names those of a network.",
        _list(zoo),
    ]
    return parts


def _command_section(name: str, command: Any, context: typer.Context) -> list[str]:
    text, _, examples = inspect.cleandoc(command.help or "").partition("\nExamples:\n")
    parameters = [each for each in command.get_params(context) if not _is_hidden(each)]
    arguments = [each for each in parameters if isinstance(each, typer.core.TyperArgument)]
    usage = " ".join(["convlens", name, *(each.metavar or "" for each in arguments), "[OPTIONS]"])
    parts = [f"### {name}", f"```\n{usage}\n```"]
    parts += [_prose(paragraph) for paragraph in text.strip().split("\n\n")]
    parts.append(f"```\n{textwrap.dedent(examples).strip()}\n```")
    if arguments:
        parts.append(_list((f"`{each.metavar}`", each.help or "") for each in arguments))
    return [*parts, _option_lists(parameters)]


def _option_lists(parameters: Sequence[Any]) -> str:
    """Return a list for each panel of options; `Options` comes last."""
    panels: dict[str, list[tuple[str, str]]] = {}
    for each in parameters:
        if isinstance(each, typer.core.TyperOption) and not _is_hidden(each):
            panel = getattr(each, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append(_option_item(each))
    panels["Options"] = panels.pop("Options", [])
    return "\n\n".join(f"{panel}:\n\n{_list(rows)}" for panel, rows in panels.items() if rows)


def _option_item(option: Any) -> tuple[str, str]:
    names = ", ".join([*sorted(option.opts, key=len), *option.secondary_opts])
    term = f"`{names} {option.metavar}`" if option.metavar else f"`{names}`"
    default = option.default
    is_shown = isinstance(default, int | str) and not isinstance(default, bool)
    suffix = f" Default: {default}." if is_shown and option.show_default else ""
    return term, f"{option.help or ''}{suffix}"


def _is_hidden(parameter: Any) -> bool:
    return bool(getattr(parameter, "hidden", False)) or "--help" in parameter.opts


def _key_list(keys: Iterable[RecipeKey]) -> str:
    items = []
    for key in keys:
        default = value_in_yaml(key.default) or '""'
        choices = f" Choices: {key.choices}." if key.choices else ""
        items.append((f"`{key.key}={default}`", key.meaning + choices))
    return _list(items)


def _augmentation_list() -> str:
    items = []
    for name, summary, arguments in recipe_reference.augmentation_rows():
        words = [
            f"`{argument}`"
            + ("" if default is None else f" (default {value_in_yaml(default)})")
            + f": {valid}"
            for argument, (default, valid) in arguments.items()
        ]
        items.append((f"`{name}`", " ".join([summary, "; ".join(words) + "." * bool(words)])))
    return _list(items)


def _file_list(texts: dict[str, str]) -> str:
    return _list(
        (", ".join(f"`{name}`" for name in names.split(", ")), text)
        for names, text in texts.items()
    )


def _list(items: Iterable[tuple[str, str]]) -> str:
    """Return a list of terms with their meaning, with lines that fit the limit of the docs."""
    return "\n".join(
        textwrap.fill(
            f"- **{term}** {' '.join(text.split())}".rstrip(),
            WIDTH,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for term, text in items
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _heading(title: str, text: str) -> str:
    return f"# {title}\n\n{_prose(text)}" if text else f"# {title}"


def _prose(text: str) -> str:
    words = " ".join(text.split())
    return textwrap.fill(words, WIDTH, break_long_words=False, break_on_hyphens=False)


PAGES: dict[str, Callable[[], str]] = {
    f"src/convlens/recipes/{recipe_reference.SCHEMA_FILE}": schema_page,
    "docs/reference/recipe-keys.md": recipe_keys_page,
    "docs/reference/commands.md": commands_page,
    "docs/reference/environment-and-exit-codes.md": environment_page,
    "docs/reference/run-folder.md": run_folder_page,
}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        path = REPOSITORY / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
