"""The shape of the code: levels, sealed doors, quick starts. What no linter knows."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import convlens
from convlens import cli
from helpers.paths import REPOSITORY, TESTS
from helpers.support import tiny

ROOT = Path(convlens.__file__).parent

# A module imports only from its own level or lower ones. A package counts as one entry.
LEVELS: dict[int, tuple[str, ...]] = {
    0: ("errors", "version", "predict_onnx"),
    1: ("utils", "metrics", "models", "uncertainty", "run_folders", "user_code"),
    2: ("recipe", "device", "distributed", "plots"),
    3: ("data", "optim", "serialization", "runtime"),
    4: ("engine", "run", "recipe_reference"),
    5: ("onnx_model", "prediction", "run_plots"),
    6: ("evaluation",),
    7: ("training", "model_export"),
    8: ("interpret", "estimator"),
    9: ("analysis", "reports"),
    10: ("explore",),
    11: ("api",),
    12: ("__init__",),
    13: ("cli", "__main__"),
}
LEVEL = {name: level for level, entries in LEVELS.items() for name in entries}

# Identifiers that were retired because readers could not guess their meaning (docs/glossary.md).
RETIRED = frozenset(
    ["told", "lets", "leads", "spoilt", "onlooker", "begun", "chances", "truths", "taking"]
)

# Modules without a test file of their own, and the reason.
WITHOUT_OWN_TESTS: dict[str, str] = {
    "__init__": "lazy attribute access, tested in unit/test_api.py",
    "__main__": "one call of the command line, tested by every subprocess test",
    "version": "a constant",
}

# What a module may do when it is imported, beyond making functions, classes and tables.
AT_IMPORT = {
    "__main__": {"run"},
}
CALLS_AT_IMPORT = {
    "frozenset",
    "tuple",
    "range",
    "list",
    "Path",
    "TypeVar",
    "ParamSpec",
    "Field",
    "re.compile",
    "inspect.unwrap",
    "np.dtype",
    "datetime.timedelta",
    "ContextVar",
    "TruncatedImagesRefused",  # data.decode: counts the threads that decode
    "MemorySemaphore",  # data.locks: bounds the memory of all threads together
    "typer.Typer",
    "typer.Option",
    "typer.Argument",
    # data.rules, for the table of augmentations
    "angles",
    "below",
    "factor",
    "interval",
    "number",
    "one_of",
    "optional",
    "whole",
}


@cache
def modules() -> dict[str, Path]:
    """Every module by its name below `convlens`; a package by its own name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text("utf-8"))


def imported(name: str, nodes: Iterator[ast.AST]) -> set[str]:
    """The modules of ours that are imported in `nodes`; names of a package count as modules."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            base, _, rest = (node.module or "").partition(".")
            if base == "convlens":
                for alias in node.names:
                    inner = f"{rest}.{alias.name}".strip(".")
                    found.add(inner if inner in modules() else rest or "__init__")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("convlens"), f"{name}: import {alias.name}"
    return found - {name}


def when_imported(name: str) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported (not those under TYPE_CHECKING)."""
    waiting: list[ast.AST] = list(tree(name).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def outside(name: str, nodes: Iterator[ast.AST]) -> set[str]:
    """The top-level packages of others that are imported in `nodes`."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


every = pytest.mark.parametrize("name", list(modules()))


@every
def test_a_file_imports_only_from_its_own_level_or_lower_ones(name: str) -> None:
    mine = LEVEL[name.split(".")[0]]
    theirs = {other: LEVEL[other.split(".")[0]] for other in imported(name, ast.walk(tree(name)))}
    assert {other for other, level in theirs.items() if level > mine} == set()


def test_there_are_no_circles() -> None:
    assert circle({name: imported(name, when_imported(name)) for name in modules()}) == ""


def test_packages_do_not_need_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {name.split(".")[0]: set() for name in modules()}
    for name in modules():
        mine = name.split(".")[0]
        theirs = {other.split(".")[0] for other in imported(name, ast.walk(tree(name)))}
        graph[mine] |= theirs - {mine}
    assert circle(graph) == ""


def circle(graph: dict[str, set[str]]) -> str:
    """The first circle of imports that is found, empty if there is none."""
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> str:
        if name in above:
            return " -> ".join([*above, name])
        if name not in done:
            for other in graph[name]:
                if found := walk(other, (*above, name)):
                    return found
            done.add(name)
        return ""

    return next(filter(None, (walk(name, ()) for name in graph)), "")


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == ""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == "a -> b -> c -> b"


@every
def test_nothing_happens_when_a_module_is_imported(name: str) -> None:
    own = {n.name for n in tree(name).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in tree(name).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            assert ast.unparse(node.value.func) in AT_IMPORT.get(name, ()), ast.unparse(node)
            continue
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
            continue
        kinds = (
            ast.Import,
            ast.ImportFrom,
            ast.FunctionDef,
            ast.AsyncFunctionDef,
            ast.ClassDef,
            ast.Assign,
            ast.AnnAssign,
            ast.Expr,
        )
        assert isinstance(node, kinds), ast.unparse(node)
    tables = [n for n in tree(name).body if isinstance(n, ast.Assign | ast.AnnAssign)]
    for call in _calls(tables):
        known = call in own or call in CALLS_AT_IMPORT or call.endswith(".items")
        assert known, f"{name} calls {call} when it is imported"


def _calls(nodes: list[ast.Assign | ast.AnnAssign]) -> Iterator[str]:
    waiting: list[ast.AST] = [n.value for n in nodes if n.value is not None]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        waiting += ast.iter_child_nodes(node)


@every
def test_every_module_says_what_lives_in_it(name: str) -> None:
    if name not in ("__main__", "version"):
        assert ast.get_docstring(tree(name))


# Doors


def test_only_evaluation_opens_the_test_split() -> None:
    users = {
        name
        for name in modules()
        for node in ast.walk(tree(name))
        if (isinstance(node, ast.Attribute) and node.attr in ("unseal_test", "_test"))
        or (isinstance(node, ast.Constant) and node.value == "unseal_test")
    }
    assert users == {"data.dataset", "evaluation"}


def test_matplotlib_is_imported_in_plots_only() -> None:
    users = {n for n in modules() if "matplotlib" in outside(n, ast.walk(tree(n)))}
    assert users
    assert {name.split(".")[0] for name in users} == {"plots"}
    for name in modules():
        if name.split(".")[0] != "plots":
            at_once = imported(name, when_imported(name))
            assert not {other for other in at_once if other.split(".")[0] == "plots"}, name


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    for name in modules():
        at_once = outside(name, when_imported(name))
        if name != "models.resnet":  # subclasses torchvision's; named, not imported, in `MODELS`
            assert "torchvision" not in at_once, name
        assert "models.resnet" not in imported(name, when_imported(name)), name
        assert "scipy" not in at_once, name
        if name != "estimator":  # its base classes are scikit-learn's
            assert "sklearn" not in at_once, name


def test_nothing_is_unpickled() -> None:
    for name in modules():
        assert not {"pickle", "dill", "joblib"} & outside(name, ast.walk(tree(name))), name
        for node in ast.walk(tree(name)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            # User code is executed in one place, which asks whether it is trusted.
            assert called not in ("eval", "exec") or (name, called) == ("user_code", "exec"), name
            if called == "YAML":
                assert isinstance(node, ast.Call)
                arguments = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert arguments["typ"] == "'safe'"
            if called == "torch.load":  # in one place, by the unpickler that calls nobody's code
                assert isinstance(node, ast.Call)
                assert name == "serialization"
                assert {k.arg: ast.unparse(k.value) for k in node.keywords}[
                    "weights_only"
                ] == "True"
            if called == "np.load":
                assert isinstance(node, ast.Call)
                assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, name


# Starting


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "convlens", "--help"],
        ["-m", "convlens", "--version"],
        ["-m", "convlens", "train", "--help"],
        ["-m", "convlens", "recipes"],
        ["-m", "convlens", "recipes", "folder", "--keys"],
        ["-c", "import convlens; dir(convlens)"],
        ["-c", "import convlens.recipe; convlens.recipe.load_recipe('mnist')"],
        ["-c", "import convlens.explore.server"],
    ],
    ids=["help", "version", "train-help", "recipes", "keys", "import", "recipe", "explore"],
)
def test_what_needs_no_torch_does_not_import_it(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=True,
    )
    lines = [line.rpartition("|")[2].strip() for line in run.stderr.splitlines()]
    loaded = {line.split(".")[0] for line in lines}
    assert "convlens" in loaded
    assert loaded.isdisjoint({"torch", "torchvision", "matplotlib", "sklearn", "scipy", "numpy"})


# Words


@cache
def identifiers(path: Path) -> frozenset[str]:
    """Return the names of variables, attributes, parameters, functions, classes and imports."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            found.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found |= set((node.asname or node.name).split("."))
    return frozenset(found)


def python_files() -> list[Path]:
    folders = ("src", "tests", "benchmarks", "experiments", "examples", "tools")
    installed = REPOSITORY / "benchmarks" / "peers" / "environments"  # made by `make bench-peers`
    return [
        path
        for folder in folders
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        if installed not in path.parents
    ]


def test_retired_identifiers_do_not_come_back() -> None:
    found = {
        str(path.relative_to(REPOSITORY)): used
        for path in python_files()
        if (used := {name for name in identifiers(path) if name.lower().strip("_") in RETIRED})
    }
    assert found == {}


def test_a_retired_identifier_is_found(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text("def begin(chances):\n    world.told(lambda: chances)\n")
    assert identifiers(path) & RETIRED == {"chances", "told"}


def test_a_run_directory_is_never_called_place() -> None:
    """`place` once meant a run directory, a device, a folder and a position."""
    users = {
        str(path.relative_to(REPOSITORY))
        for path in python_files()
        if {"place", "_place", "places"} & identifiers(path)
    }
    assert users == set()


def test_public_names_are_unique() -> None:
    """The Python API and the commands share the names of the core functions on purpose."""
    owners: dict[str, list[str]] = {}
    for name in modules():
        if name == "api" or name.partition(".")[0] == "cli":
            continue
        for node in tree(name).body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef)
            if public and not node.name.startswith("_"):
                owners.setdefault(node.name, []).append(name)
    assert {name: where for name, where in owners.items() if len(where) > 1} == {}


# Tests


def test_each_module_has_a_test_file_of_its_name() -> None:
    missing = set()
    for name, path in modules().items():
        relative = path.relative_to(ROOT)
        package = relative.name == "__init__.py"
        stem = relative.parent.name if package else relative.stem
        folder = TESTS / "unit" / relative.parent
        only_a_docstring = package and len(tree(name).body) <= 1
        if name in WITHOUT_OWN_TESTS or only_a_docstring:
            continue
        if name.partition(".")[0] == "cli":
            folder = TESTS / "cli"
        if not (folder / f"test_{stem}.py").is_file():
            missing.add(name)
    assert missing == set()


def test_exemptions_are_needed() -> None:
    assert set(WITHOUT_OWN_TESTS) <= set(modules())


# The path from the command to the training step


class ReachedBackward(Exception):  # noqa: N818
    """Raised where `loss.backward()` would be."""


def test_the_train_command_calls_train_which_runs_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("tiny.yaml").write_text(tiny().to_text())

    def backward(self: torch.Tensor) -> None:
        raise ReachedBackward

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(ReachedBackward) as caught:
        cli.main(["train", "tiny.yaml", "--no-test", "--device", "cpu"])
    frames = [
        Path(frame.filename).relative_to(ROOT).with_suffix("").as_posix() + "." + frame.name
        for frame in traceback.extract_tb(caught.value.__traceback__)
        if Path(frame.filename).is_relative_to(ROOT)
    ]
    path = frames[frames.index("cli/train.train") :]
    # The call that starts the engine stands in training/train.py; nothing else is in between.
    assert {name.partition(".")[0] for name in path} == {
        "cli/train",
        "training/train",
        "engine/loop",
    }
    assert path[-1].startswith("engine/loop.")
