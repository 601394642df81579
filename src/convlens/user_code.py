"""Load networks, losses and other parts that users write, by import path, and only if trusted.

A recipe names such a part where it would name one of convlens: `model.name=./mynet.py:Net`, or
`package.module:Net`. Packages can register names of their own as entry points (`convlens.models`,
`convlens.losses`, ...). `load_object` imports a part. It raises `UntrustedCode` before anything is
imported, unless the user has agreed (`trust`): a recipe or a model file of somebody else never runs
code by itself.

The SHA-256 of each source is part of the recipe (`Recipe.code`), and a copy of the file is in the
run directory. Within `recorded_code`, exactly the source with that hash is imported: the file
itself if it is unchanged, otherwise the copy.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, ParamSpec, TypeVar

from rich.markup import escape

from convlens.errors import ModelFileError, UsageError, close_matches, did_you_mean_suffix
from convlens.utils import files, options
from convlens.utils.console import print_once

P = ParamSpec("P")
T = TypeVar("T")
# The tables that user code can extend. Entry points are in the group `convlens.KIND`.
Kind = Literal["models", "losses", "optimizers", "augmentations", "datasets"]
KINDS: tuple[Kind, ...] = ("models", "losses", "optimizers", "augmentations", "datasets")

# What a part is called in messages.
WORDS: Mapping[Kind, str] = {
    "models": "model",
    "losses": "loss",
    "optimizers": "optimizer",
    "augmentations": "augmentation",
    "datasets": "data set",
}
COPIES_FOLDER = "code"  # of a run directory
MODULE_PREFIX = "user_code_"
_FILE = re.compile(r"(?P<module>.+\.py):(?P<attribute>[^\W\d]\w*)")
_MODULE = re.compile(r"(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<attribute>[^\W\d]\w*)")


class UntrustedCode(ModelFileError):  # noqa: N818 - reads as the reason
    """A model file, run or recipe needs user code that was not trusted (exit code 4)."""


@dataclass(frozen=True)
class Source:
    """The file that defines a part.

    Attributes:
        name: as the recipe has it.
        module: a path ending in `.py`, or the dotted name of a module.
        attribute: the name in that module.
        path: the file.
    """

    name: str
    module: str
    attribute: str
    path: Path

    @property
    def is_file(self) -> bool:
        """Whether the part is named by its file rather than by an importable module."""
        return self.module.endswith(".py")

    @functools.cached_property
    def content(self) -> bytes:
        """The bytes of the file."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"{self.name} cannot be read: {error.strerror or error}",
                where=str(self.path),
                fix="check the path; paths are relative to the current folder",
            ) from error

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class _Recorded:
    """Hashes of the sources that a run was trained with, and the folder of their copies."""

    hashes: Mapping[str, str]
    folder: Path | None = None


_trusted: ContextVar[frozenset[str] | bool] = ContextVar("convlens_trusted_code", default=False)
_recorded: ContextVar[_Recorded | None] = ContextVar("convlens_recorded_code", default=None)


# Consent


@contextmanager
def trust(names: bool | Collection[str]) -> Iterator[None]:
    """Allow user code to be imported inside the block, in addition to what is allowed already.

    Args:
        names: of the parts, as a recipe names them; True for all.
    """
    before = trusted()
    now = before
    if names is True:
        now = True
    elif names and not isinstance(before, bool):
        now = before | frozenset(names)
    elif names and before is False:
        now = frozenset(names)
    token = _trusted.set(now)
    try:
        yield
    finally:
        _trusted.reset(token)


def trusted() -> bool | frozenset[str]:
    """Return what is trusted in this context: all code, nothing, or the parts of these names."""
    return True if options.trust_code() else _trusted.get()


def accepts_trust(function: Callable[P, T]) -> Callable[P, T]:
    """Trust user code while a public function runs, if it is called with `trust_code=True`.

    A run that was opened with `trust_code=True` counts as well. The function has the keyword
    `trust_code` in its signature.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        names: bool | frozenset[str] = kwargs.get("trust_code") is True
        for value in (*args, *kwargs.values()):
            for run in value if isinstance(value, list | tuple) else [value]:
                names = names or getattr(run, "trust_code", False)
        with trust(names):
            return function(*args, **kwargs)

    return call


# Names


def is_import_path(name: str) -> bool:
    """Return whether a name has the form `FILE.py:NAME` or `package.module:NAME`."""
    return bool(_FILE.fullmatch(name) or _MODULE.fullmatch(name))


def is_user_code(kind: Kind, name: str) -> bool:
    """Return whether a name, which is not in the table of convlens, means user code."""
    return is_import_path(name) or _entry_point(kind, name) is not None


def source_hashes(names: Collection[tuple[Kind, str]]) -> dict[str, str]:
    """Return the SHA-256 of the source of each name that means user code; nothing is imported.

    Raises:
        UsageError: a file or module does not exist, or a name means two of them.
    """
    hashes: dict[str, str] = {}
    for kind, name in names:
        if is_user_code(kind, name):
            sha256 = locate_source(kind, name).sha256
            if hashes.setdefault(name, sha256) != sha256:
                raise UsageError(
                    f"{name!r} is an entry point of two kinds", fix="name the parts by import paths"
                )
    return hashes


def locate_source(kind: Kind, name: str) -> Source:
    """Return the file of a part without importing anything.

    Raises:
        UsageError: there is no such file or module.
    """
    path = name if is_import_path(name) else _entry_point(kind, name)
    match = path and (_FILE.fullmatch(path) or _MODULE.fullmatch(path))
    if not match:
        raise UsageError(
            f"{name!r} is not an import path", fix="write FILE.py:NAME or package.module:NAME"
        )
    module, attribute = match["module"], match["attribute"]
    if module.endswith(".py"):
        return Source(name, module, attribute, Path(module).expanduser())
    return Source(name, module, attribute, _file_of_module(module))


def _entry_point(kind: Kind, name: str) -> str | None:
    """Return the import path that an installed package registered for a name."""
    found = {point.value for point in entry_points(group=f"convlens.{kind}", name=name)}
    if len(found) > 1:
        raise UsageError(
            f"several packages have an entry point convlens.{kind} named {name!r}",
            fix=f"name one by its import path: {' or '.join(sorted(found))}",
        )
    return next(iter(found), None)


def _file_of_module(name: str) -> Path:
    """Return the file of a module; its parent packages are not imported."""
    parts = name.split(".")
    try:
        spec: ModuleSpec | None = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        spec = None
    for number in range(2, len(parts) + 1):
        locations = spec.submodule_search_locations if spec is not None else None
        name_so_far = ".".join(parts[:number])
        spec = PathFinder.find_spec(name_so_far, list(locations)) if locations else None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise UsageError(
            f"no Python module {name!r}",
            fix="install it or add its folder to PYTHONPATH; a file is named as ./FILE.py:NAME",
        )
    return Path(spec.origin)


# Copies in the run directory


def write_copies(code: Mapping[str, str], folder: Path) -> None:
    """Write a copy of the source of each part into a folder.

    Args:
        code: the names of the parts, and the hash of each source (`Recipe.code`).

    Raises:
        UsageError: a source has changed since its hash was computed.
    """
    for name, sha256 in code.items():
        kinds = [kind for kind in KINDS if is_user_code(kind, name)]
        sources = [locate_source(kind, name) for kind in kinds]
        source = next((each for each in sources if each.sha256 == sha256), None)
        if source is None:
            raise UsageError(
                f"{name} has changed while the training was starting", fix="start it again"
            )
        files.write_atomic(folder / _copy_name(source, sha256), source.content)


def _copy_name(source: Source, sha256: str) -> str:
    return f"{sha256[:12]}-{source.path.name}"


@contextmanager
def recorded_code(code: object, folder: Path | None = None) -> Iterator[None]:
    """Inside the block, import exactly the sources with the recorded hashes.

    Args:
        code: `Recipe.code`, also from a file that may be damaged.
        folder: of the copies; used where the source has changed or is gone.
    """
    hashes = code if isinstance(code, Mapping) else {}
    token = _recorded.set(_Recorded(hashes, folder))
    try:
        yield
    finally:
        _recorded.reset(token)


# Import


def load_object(kind: Kind, name: str) -> Any:
    """Import a part by its import path or entry point, and return it.

    Raises:
        UntrustedCode: the code was not trusted; nothing was imported.
        ModelFileError: the source that a run was trained with is gone.
        UsageError: the module does not exist, fails, or lacks the name.
    """
    allowed = trusted()
    if allowed is not True and (allowed is False or name not in allowed):
        raise _untrusted(name)
    source = locate_source(kind, name)
    recorded = _recorded.get()
    expected = recorded.hashes.get(name) if recorded is not None else None
    if expected is not None and not _is_unchanged(source, expected):
        assert recorded is not None
        source = _copy_of(source, expected, recorded.folder)
        module = _import_file(source)
    elif source.is_file:
        module = _import_file(source)
    else:
        module = _import_module(source)
    if not hasattr(module, source.attribute):
        defined = [each for each in vars(module) if not each.startswith("_")]
        close = close_matches(source.attribute, defined)
        raise UsageError(
            f"{name}: the module has no {source.attribute!r}{did_you_mean_suffix(close)}",
            where=str(source.path),
        )
    return getattr(module, source.attribute)


def _untrusted(name: str) -> UntrustedCode:
    recorded = _recorded.get()
    folder = recorded.folder if recorded is not None else None
    where = str(folder) if folder is not None and folder.is_dir() else name.rpartition(":")[0]
    return UntrustedCode(
        f"this needs user code, {name}, which runs with all your rights",
        where=where or name,
        fix="read it; if you trust it, add --trust-code (in Python: trust_code=True)",
    )


def _is_unchanged(source: Source, sha256: str) -> bool:
    try:
        return source.sha256 == sha256
    except UsageError:  # the file is gone, or this is another folder
        return False


def _copy_of(source: Source, sha256: str, folder: Path | None) -> Source:
    """Return the copy of a source in a run directory."""
    path = source.path if folder is None else folder / _copy_name(source, sha256)
    copy = Source(source.name, source.module, source.attribute, path)
    if not _is_unchanged(copy, sha256):
        raise ModelFileError(
            f"{source.name} is not the code that this model was trained with, and there is no copy",
            where=str(path),
            fix=f"restore the file with the SHA-256 {sha256}",
        )
    if source.path.is_file():
        print_once(
            f"{escape(source.name)} has changed since the training; its copy "
            f"{escape(str(copy.path))} is used"
        )
    return copy


def _import_file(source: Source) -> ModuleType:
    """Execute the content whose hash was checked, once in a process."""
    name = MODULE_PREFIX + source.sha256[:16]
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(source.path)
    if not source.is_file:  # a copy of a module: its relative imports are those of its package
        module.__package__ = source.module.rpartition(".")[0]
    sys.modules[name] = module  # dataclasses and pickle look modules up there
    try:
        exec(compile(source.content, str(source.path), "exec"), vars(module))
    except BaseException as error:
        del sys.modules[name]
        raise _import_error(source, error) from error
    return module


def _import_module(source: Source) -> ModuleType:
    try:
        return importlib.import_module(source.module)
    except BaseException as error:
        raise _import_error(source, error) from error


def _import_error(source: Source, error: BaseException) -> BaseException:
    """Return the error to raise for an exception while a module was imported."""
    if isinstance(error, KeyboardInterrupt | MemoryError):
        return error
    return UsageError(
        f"{source.name} cannot be imported: {describe_error(error)}",
        where=error_location(error, str(source.path)),
        fix="run the file with Python to see the whole error",
    )


# Messages and calls


def describe_error(error: BaseException) -> str:
    """Return an exception of user code in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def error_location(error: BaseException, path: str) -> str:
    """Return the last line of a file that an exception passed through, or else the file."""
    line, traceback = None, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == path:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    if line is None and isinstance(error, SyntaxError) and error.filename == path:
        line = error.lineno
    return path if line is None else f"{path}, line {line}"


def part_error(
    kind: Kind, name: str, error: Exception, *, reason: str = "", fix: str = ""
) -> UsageError:
    """Return the error for an exception that a part raised.

    Args:
        reason: what is said before the exception.
    """
    source = locate_source(kind, name)
    return UsageError(
        f"{WORDS[kind]} {name}: {reason}{describe_error(error)}",
        where=error_location(error, str(source.path)),
        fix=fix,
    )


def accepted_keywords(function: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Return the keywords that a function or class accepts, and whether it accepts any others.

    Returns:
        The default of each keyword; `inspect.Parameter.empty` where there is none.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return {}, False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    keywords = {p.name: p.default for p in parameters if p.kind in kinds}
    return keywords, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def select_keywords(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `values` that the signature of a function names."""
    keywords, _ = accepted_keywords(function)
    return {key: value for key, value in values.items() if key in keywords}


def check_options(name: str, keywords: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse options that a part does not accept, and missing ones.

    Args:
        keywords: those that it accepts, with their defaults.
        options: the values from the recipe.

    Raises:
        UsageError: with near misses.
    """
    unknown = [key for key in options if key not in keywords]
    if unknown:
        listed = [f"{key!r}{did_you_mean_suffix(close_matches(key, keywords))}" for key in unknown]
        raise UsageError(
            f"{name} has no option {', '.join(listed)}",
            fix=f"its options are: {', '.join(keywords) or 'none'}",
        )
    empty = inspect.Parameter.empty
    missing = [key for key, value in keywords.items() if value is empty and key not in options]
    if missing:
        raise UsageError(
            f"{name} needs a value for {', '.join(missing)}",
            fix="set it in the recipe, or give it a default value in the code",
        )
