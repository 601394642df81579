"""Random recipes and command lines either work or give a clear error.

By default some hundreds of fixed cases; with --slow more than 20,000 new ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings, strategies as st
from ruamel.yaml.error import YAMLError

from convlens import cli, evaluation, recipe, run
from convlens.data.sources import find_source
from convlens.data.transforms.pipeline import AUGMENTS, MIXES
from convlens.errors import ConvlensError, DataError, UsageError
from convlens.models import MODELS, model_options
from convlens.recipe import NESTED, SECTIONS
from convlens.training import resolve, train
from convlens.training.resolve import validate_recipe
from convlens.utils import yaml
from helpers.commands import constant_model, here, picture, refused

slow = pytest.mark.slow


def fuzz(strategy: st.SearchStrategy[Any], body: Callable[[Any], None], cases: int) -> None:
    """Call `body` with `cases` draws: up to 1,000 are fixed, more are random."""
    setting = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=cases < 1000,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    setting(given(strategy)(body))()


# Values as people and programs might write them

WORDS = st.sampled_from(
    [
        "",
        " ",
        "~",
        "~nobody/photos",
        "null",
        "no",
        "yes",
        "1e-3",
        "1_000",
        "0x10",
        "12:30:45",
        ".inf",
        ".nan",
        "-",
        "--",
        "...",
        "---",
        "*",
        "&a",
        "*a",
        "!!python/object:os.system",
        "!x",
        "%",
        "@",
        "`",
        "\t",
        "a\0b",
        "\ud800",
        "\udcff",
        "ä\u2028",
        "\ufeff",
        "x" * 300,
        "x" * 5000,
        "/nowhere",
        "..",
        "../../etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        "C:\\photos\\",
        "a/b/c",
        "head",
        "all",
        "last:4",
        "last:99999999999999999999",
        "layer3+",
        "auto",
        "default",
        "none",
        "IMAGENET1K_V1",
        "digits",
        "shapes",
        "[1",
        "{a",
        "'",
        '"',
        "a: b",
        "- a",
        "# a",
        "2026-11-27",
        "2026-11-27T10:00:00Z",
        "{0..99999999999}.tar",
        "{a,b}.tar",
        "{",
        "{}",
        "hf-hub:x/y",
        "timm/x",
        "[bold]x[/nothing]",
        "<script>",
        "$HOME",
        "`id`",
        "x.yaml",
        "x.safetensors",
        "x.csv",
        "x.tar",
        "x.zip",
        "models/x",
    ]
)
NUMBERS = (
    st.integers(-3, 40)
    | st.integers()
    | st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400])
    | st.floats()
)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=12) | WORDS
ODD_KEYS = st.text(max_size=6) | WORDS | st.integers() | st.booleans() | st.none()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ODD_KEYS, inner, max_size=3),
    max_leaves=8,
)
ODD = VALUES | st.binary(max_size=4) | st.dates() | st.sets(st.integers(), max_size=2)
MODEL_KEYS = sorted({key for name in MODELS for key in model_options(name)})


def section(name: str, kind: Any) -> st.SearchStrategy[Any]:
    keys = [*kind.model_fields, *(MODEL_KEYS if name == "model" else ())]
    named = st.sampled_from(keys) | st.sampled_from(sorted(NESTED)) | st.text(max_size=5)
    return st.dictionaries(named, ODD, max_size=4)


OPERATIONS = st.sampled_from([*AUGMENTS, *MIXES]) | WORDS
ARGUMENTS = st.dictionaries(
    st.sampled_from(sorted({a for e in [*AUGMENTS.values(), *MIXES.values()] for a in e.rules})),
    VALUES,
    max_size=3,
)
AUGMENT = st.lists(
    OPERATIONS | st.dictionaries(OPERATIONS, ARGUMENTS | LEAVES, max_size=2), max_size=4
)
TREES = st.fixed_dictionaries(
    {},
    optional={
        **{name: section(name, kind) | LEAVES for name, kind in SECTIONS.items()},
        "augment": AUGMENT | ODD,
        "name": ODD,
        "about": ODD,
        "base": WORDS | LEAVES,
        "variants": st.dictionaries(ODD_KEYS, VALUES, max_size=2) | LEAVES,
        "surprise": ODD,
    },
)


def assert_clear(error: ConvlensError) -> None:
    assert error.what
    assert error.exit_code in (2, 3, 4, 5)
    assert len(str(error)) < 20_000  # it may quote a long input


def check_recipe(read: Callable[[], recipe.Recipe]) -> None:
    """Assert that `read` gives a recipe that survives writing and reading, or a clear error."""
    try:
        found = read()
        validate_recipe(found)
    except ConvlensError as error:
        assert_clear(error)
        return
    text = found.to_text()
    text.encode()
    assert recipe.load_recipe(yaml.parse_yaml(text, where="")).digest() == found.digest()
    assert run.safe_name(found.name)


@pytest.mark.parametrize("cases", [120, pytest.param(6000, marks=slow)])
def test_random_mappings_give_a_recipe_or_a_clear_error(cases: int) -> None:
    fuzz(TREES, lambda tree: check_recipe(lambda: recipe.load_recipe(tree)), cases)


def written(content: str | bytes) -> str:
    path = Path("fuzz.yaml")
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    return str(path)


BITS = st.sampled_from(
    [
        *"[]{}:,-&*!|>'\"#%@`?\t\n ~=<\\",
        "&a ",
        "*a",
        "<<: ",
        "\n\n",
        "\0",
        "base: mnist\n",
        "variants: {a: ",
        "---\n",
        "...\n",
        "\xff",
    ]
)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Draw the YAML of a recipe with random insertions and deletions."""
    start = draw(st.sampled_from(["digits", "mnist-best", "resnet18-pretrained", "folder"]))
    text = recipe.recipe_text(start)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(text)))
        piece = draw(BITS | WORDS | st.text(max_size=5))
        text = text[:at] + piece + text[at + draw(st.integers(0, 20)) :]
    return text


@pytest.mark.parametrize("cases", [100, pytest.param(5000, marks=slow)])
def test_random_yaml_gives_a_recipe_or_a_clear_error(cases: int) -> None:
    fuzz(
        texts() | st.binary(max_size=60) | TREES.map(_dumped),
        lambda text: check_recipe(lambda: recipe.load_recipe(written(text))),
        cases,
    )


def _dumped(tree: Any) -> str:
    try:
        return yaml.dump_yaml(tree)
    except YAMLError:
        return "{}"


KEYS = [f"{name}.{field}" for name, kind in SECTIONS.items() for field in kind.model_fields]
KEYS += [f"model.{key}" for key in MODEL_KEYS]
KEYS += ["augment", "about", "name", "base", "variants", "model", "optim", "x", "x.y", "a.b.c", ""]
OVERRIDE = st.tuples(
    st.sampled_from(KEYS) | WORDS,
    st.just("=") | st.sampled_from(["", "==", " = "]),
    st.text(max_size=12) | WORDS | VALUES.map(lambda v: _dumped(v).strip()),
).map("".join)


@pytest.mark.parametrize("cases", [120, pytest.param(6000, marks=slow)])
def test_random_overrides_give_a_recipe_or_a_clear_error(cases: int) -> None:
    names = st.sampled_from(["digits", "mnist", "resnet18-pretrained", "shapes"]) | WORDS

    def body(drawn: tuple[str, list[str]]) -> None:
        check_recipe(lambda: resolve.resolve_recipe(drawn[0], overrides=drawn[1]).recipe)

    fuzz(st.tuples(names, st.lists(OVERRIDE, max_size=4)), body, cases)


@pytest.mark.parametrize("cases", [80, pytest.param(2000, marks=slow)])
def test_random_names_of_data_and_runs_give_a_clear_error(cases: int) -> None:
    def body(name: str) -> None:
        for read in (find_source, run.find_run):
            try:
                read(name)
            except ConvlensError as error:
                assert_clear(error)

    fuzz((WORDS | st.text(max_size=30)).filter(_is_small), body, cases)


@pytest.mark.parametrize("name", ["~\0", "~\ud800", "~nobody", "\0", "~/\0.csv"])
def test_impossible_names_give_a_clear_error(name: str) -> None:
    for read in (find_source, run.find_run):
        with pytest.raises(ConvlensError) as caught:
            read(name)
        assert_clear(caught.value)


def _is_small(name: str) -> bool:
    """Return whether `name` is not the root or home folder, whose scan would take very long."""
    try:
        path = os.path.realpath(os.path.expanduser(name))
    except ValueError:  # null bytes and lone surrogates are not valid in paths
        return True
    return path not in ("/", os.path.expanduser("~"))


# Command lines

# typer bundles a private copy of click, so there is no public type for its commands.
GROUP: dict[str, Any] = vars(typer.main.get_command(cli.app))["commands"]
COMMANDS = sorted(GROUP)
POOL = st.sampled_from(
    [
        "model",
        "models/model",
        "models/model/model.safetensors",
        "a.png",
        "set",
        "digits",
        "shapes",
        "fuzz.yaml",
        "class:red:3",
        "test:0",
        "worst:5",
        "val:1",
        "optim.lr=0.1",
        "data.seed=3",
        "train.epochs=1",
        "cpu",
        "cuda",
        "meta",
        "flip",
        "json",
        "csv",
        "all",
        "stage1",
        "stage1:0",
        "pca",
    ]
)
SMALL = st.integers(-2, 5).map(str) | NUMBERS.map(lambda n: str(n)[:40])
# Arguments cannot contain null bytes. Paths outside of the working folder are excluded.
TEXTS = (
    (WORDS | st.text(max_size=10))
    .map(lambda text: os.fsdecode(text.encode("utf-8", "replace").replace(b"\0", b"")))
    .filter(lambda text: "/" not in text[:1] and ".." not in text and text != "~")
)


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(COMMANDS) | TEXTS)
    arguments = draw(st.lists(POOL | TEXTS, max_size=3))
    known = GROUP[name].params if name in GROUP else []
    for option in draw(st.lists(st.sampled_from(known), max_size=4)) if known else []:
        if option.param_type_name != "option" or "--help" in option.opts:
            continue
        arguments.append(draw(st.sampled_from([*option.opts, *option.secondary_opts])))
        if not option.is_flag or draw(st.integers(0, 9)) == 0:
            arguments.append(draw(POOL | SMALL | TEXTS))
    return [name, *arguments]


@pytest.fixture
def workplace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Create a model, images and a recipe; reading training images raises an error."""
    constant_model(Path("models/model"), [0.0, 1.0], ["green", "red"])
    picture(Path("a.png"), (1, 2, 3))
    picture(Path("set/red/a.png"), (1, 2, 3))
    Path("fuzz.yaml").write_text("base: digits\nvariants: {a: {optim.lr: 0.1}}\n")

    def stop(*_: object, **__: object) -> Any:
        raise DataError("this far and no further")

    for module in (train, evaluation):
        monkeypatch.setattr(module, "load_data", stop)


def line(arguments: list[str]) -> None:
    done = here(*arguments)
    assert done.code in (0, 2, 3, 4, 5), done.err
    assert "Traceback" not in done.err
    if done.code not in (0, 2):
        refused(done, done.code)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("cases", [60, pytest.param(2500, marks=slow)])
def test_random_command_lines_end_without_a_traceback(cases: int) -> None:
    fuzz(lines(), line, cases)


# Cases that the fuzzing found, and related ones


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("about: &a [*a]", "Circular reference"),
        ("about: &a {b: *a}", "Circular reference"),
        ("[" * 1000, "not valid YAML: nested too deeply"),
        ("augment: " + "[" * 40 + "]" * 40, "is not an operation"),
        ("about: " + "x" * (1 << 17), "too many for a recipe"),
        ("model: {widths: [0x" + "f" * 40 + "]}", "an integer of 160 bits"),
        ("model: {widths: [0x" + "f" * 9000 + "]}", "not valid YAML"),
        ("model: {widths: [.inf]}", "model.widths=inf: not a finite number"),
        ("model: {activation: .nan}", "model.activation=nan: not a finite number"),
        ("train: {seed: 9223372036854775808}", "train.seed: an integer of 64 bits"),
        ("model: {widths: !!binary aGVsbG8=}", "a recipe cannot contain a bytes"),
        ("model: {widths: 2026-11-27}", "a recipe cannot contain a date"),
        ("model: {widths: !!set {a}}", "a recipe cannot contain a set"),
        ("model: {5: 6}", "5 is not a key"),
        ('data: {name: "\\ud800"}', "not valid Unicode text"),
        ("model: {depth: 99999999}", "convolutions; at most 1,000"),
        ("augment: [{RandAugment: {num_ops: 10000000000}}]", "from 1 to 100"),
        ("train: {epochs: 99999999999}", "train.epochs=99999999999"),
    ],
)
def test_short_yaml_with_excessive_values_is_refused(text: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate_recipe(recipe.load_recipe(written(text)))
    assert what in caught.value.what
    assert len(str(caught.value)) < 1000


def test_files_that_are_not_recipes_are_refused() -> None:
    os.mkfifo("pipe.yaml")
    Path("zero.yaml").symlink_to("/dev/zero")
    Path("loop.yaml").symlink_to("loop.yaml")
    Path("folder.yaml").mkdir()
    Path("large.yaml").write_bytes(b"a" * (1 << 21))
    Path("utf16.yaml").write_text("about: x", encoding="utf-16")
    Path("latin.yaml").write_bytes(b"name: x\nabout: caf\xe9\n")
    for name, what in {
        "pipe": "a regular file",
        "zero": "a regular file",
        "folder": "a regular file",
        "loop": "can't read the recipe",
        "large": "too many for a recipe",
        "utf16": "not UTF-8",
        "latin": "not UTF-8",
        "x" * 300: "can't read the recipe",
    }.items():
        refused(here("train", f"{name}.yaml"), 2, what)
    assert "line 2" in here("train", "latin.yaml").err
    with pytest.raises(UsageError, match="can't read the recipe"):
        recipe.load_recipe("a\0b.yaml")
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbfbase: digits\r\ntrain:\r\n  epochs: 3\r\n")
    assert recipe.load_recipe("bom.yaml").train.epochs == 3


def test_wrong_keys_of_a_file_are_reported_with_line_numbers() -> None:
    text = "base: digits\ntrain:\n  epochs: 0\n  batch_size: 16\noptim: {lr: -1}\nmodle: {}\n"
    with pytest.raises(UsageError) as caught:
        recipe.load_recipe(written(text))
    for part in ("train.epochs=0", "(line 3)", "optim.lr=-1", "(line 5)", "'modle'", "(line 6)"):
        assert part in caught.value.what
    with pytest.raises(UsageError) as caught:  # an override has no line number
        recipe.load_recipe(written(text), ["train.epochs=-2"])
    assert "train.epochs=-2: must be greater than 0 or auto;" in caught.value.what


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("train:\n\tepochs: 3", "found character '\\t'", "line 2"),
        ("train: {epochs: 3}\ntrain: {epochs: 4}", 'duplicate key "train"', "line 2"),
        ("train:\n  epochs: 3\n  epochs: 4", 'duplicate key "epochs"', "line 3"),
        ("model: {weights: no}", "model.weights=False", "fuzz.yaml"),
        ("data: {name: 5}", "data.name=5", "fuzz.yaml"),
        ("train: {epochs: '3x'}", "train.epochs='3x'", "fuzz.yaml"),
        ("optim: {lr: 1e-3x}", "optim.lr='1e-3x'", "fuzz.yaml"),
    ],
)
def test_surprising_yaml_is_refused_with_its_line(text: str, what: str, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.load_recipe(written(text))
    assert what in caught.value.what
    assert where in caught.value.where + caught.value.what


def test_common_spellings_of_numbers_and_paths_are_accepted() -> None:
    Path("my photos").mkdir()
    found = recipe.load_recipe(written("data: {name: 'C:\\my photos\\x'}\noptim: {lr: 1e-3}\n"))
    assert (found.data.name, found.optim.lr) == ("C:\\my photos\\x", 0.001)
    refused(here("train", "my photos"), 3, "no class folders", "my photos")


def test_contradictory_options_are_refused_before_images_are_read() -> None:
    """The data folder is empty, so reading it would be a different error."""
    Path("empty").mkdir()
    for arguments, what in (
        (["train.precision=fp16"], "fp16 is for NVIDIA GPUs"),
        (["train.compile=graph"], "CUDA graphs are now a part of torch.compile"),
        (["data.fold=1"], "data.fold=1 without data.folds"),
        (["data.val_fraction=0", "train.patience=3"], "no validation split"),
        (["model.name=resnet18", "model.widths=[3]"], "unknown key 'model.widths'"),
        (["augment=[MixUp, RandomHorizontalFlip]"], "must come last"),
    ):
        done = here("train", "folder", "--data", "empty", *arguments, "--device", "cpu")
        assert done.code in (2, 3), done.err
        if done.code == 3:
            pytest.fail(f"{arguments}: the images were read first: {done.err}")
        assert what in done.err


def test_too_many_runs_at_once_are_refused() -> None:
    for option in ("--seeds", "--repeat-splits"):
        refused(
            here("train", "digits", option, "99999999"),
            2,
            "99,999,999 runs are too many for one command; the limit is 10,000",
        )
    assert here("train", "digits", "--seeds", "9" * 30).code == 2


@pytest.mark.figures
@pytest.mark.usefixtures("figures_of_one_pixel")
def test_run_names_that_are_not_valid_folder_names_are_made_safe() -> None:
    arguments = ("digits", "data.per_class=4", "model.widths=[2]", "train.epochs=1", "--no-test")
    for name in (
        "x" * 400,
        "ü" * 300,
        "../../out",
        "/",
        "a/b",
        "..",
        "-",
        "\ud83d\ude00".join("ab"),
    ):
        done = here("train", *arguments, "--name", name, "--json")
        assert done.code == 0, done.err
        folder = Path(done.json["path"])
        assert folder.parent == Path("models")
        assert (folder / "run.json").is_file()
        assert folder.resolve().parent == Path("models").resolve()
    assert sorted(os.listdir()) == ["models", "plots"]


def test_circular_links_and_unknown_home_folders_are_refused() -> None:
    Path("loop").symlink_to("loop")
    for name in ("loop/", "~nobody-at-all/photos", "x" * 300 + "/y"):
        refused(here("train", name), 3, "no such file or folder")
        refused(here("train", "digits", "--data", name), 3, "no such file or folder")
        refused(here("evaluate", name), 4, "no such run or model file")
