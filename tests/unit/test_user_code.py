"""User code: consent before any import, import paths, entry points, recorded sources."""

from __future__ import annotations

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from convlens import user_code
from convlens.errors import ModelFileError, UsageError
from convlens.user_code import UntrustedCode, load_object, recorded_code, trust
from convlens.utils import options
from helpers.user_parts import TRACE, forget_imports, write_parts

NET = "./parts.py:Net"


@pytest.fixture(autouse=True)
def parts() -> Path:
    forget_imports()
    return write_parts()


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# Consent


def test_nothing_is_imported_without_consent() -> None:
    with pytest.raises(UntrustedCode, match=r"needs user code, \./parts\.py:Net") as caught:
        load_object("models", NET)
    assert caught.value.exit_code == 4
    assert "--trust-code" in caught.value.fix
    assert not TRACE.exists()


def test_consent_ends_with_its_block() -> None:
    with trust(True):
        assert load_object("models", NET).__name__ == "Net"
    assert TRACE.exists()
    with pytest.raises(UntrustedCode):
        load_object("models", NET)


def test_consent_to_one_name_is_no_consent_to_another() -> None:
    with trust([NET]), pytest.raises(UntrustedCode):
        load_object("optimizers", "./parts.py:SignDescent")
    with trust([NET]), trust(["./parts.py:SignDescent"]):  # both
        load_object("models", NET)
        load_object("optimizers", "./parts.py:SignDescent")
    with trust(True), trust(False), trust([]):  # nothing is taken away
        load_object("models", NET)


def test_the_option_of_the_command_line_is_a_consent() -> None:
    token = options.update(trust_code=True)
    try:
        assert user_code.trusted() is True
        load_object("models", NET)
    finally:
        options.reset(token)
    assert user_code.trusted() is False


def test_threads_do_not_inherit_a_consent() -> None:
    with trust(True), ThreadPoolExecutor(1) as threads:
        assert threads.submit(user_code.trusted).result() is False


def test_functions_take_the_consent_of_their_call_or_of_a_run() -> None:
    class Opened:
        trust_code = frozenset([NET])

    @user_code.accepts_trust
    def function(*runs: object, trust_code: bool = False) -> Any:
        return user_code.trusted()

    assert function("run") is False
    assert function("run", trust_code=True) is True
    assert function("run", Opened()) == {NET}
    assert function(["run", Opened()]) == {NET}


# Import paths


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./mynet.py:Net", True),
        ("/a b/mynet.py:Net", True),
        ("package.module:Net", True),
        ("module:Net", True),
        ("resnet18", False),
        ("timm/resnet18", False),
        ("flowers/train", False),
        ("http://host:80", False),
        ("mynet.py", False),
        ("mynet.py:", False),
        ("mynet.py:1", False),
        ("a-b:c", False),
    ],
)
def test_what_is_an_import_path(name: str, expected: bool) -> None:
    assert user_code.is_import_path(name) is expected


@given(st.text(max_size=20))
def test_any_text_is_an_import_path_or_not(text: str) -> None:
    if user_code.is_import_path(text):
        module, _, attribute = text.rpartition(":")
        assert module
        assert attribute.isidentifier()


def test_a_file_is_executed_once_and_found_by_its_content() -> None:
    Path("copy.py").write_bytes(Path("parts.py").read_bytes())
    with trust(True):
        net = load_object("models", NET)
        TRACE.unlink()
        assert load_object("models", NET) is net
        assert load_object("models", "./copy.py:Net") is net
        assert not TRACE.exists()
        Path("copy.py").write_text("Net = 1")
        assert load_object("models", "./copy.py:Net") == 1
    assert net.__module__ == f"user_code_{sha256('parts.py')[:16]}"
    assert "parts" not in sys.modules


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path("site/own_package")
    folder.mkdir(parents=True)
    folder.joinpath("__init__.py").write_text("from pathlib import Path\nPath('imported').touch()")
    folder.joinpath("helper.py").write_text("VALUE = 7")
    folder.joinpath("nets.py").write_text("from .helper import VALUE\nNet = ('nets', VALUE)")
    monkeypatch.syspath_prepend("site")
    for name in [name for name in sys.modules if name.startswith("own_package")]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def test_the_file_of_a_module_is_found_without_importing_its_package(package: Path) -> None:
    source = user_code.locate_source("models", "own_package.nets:Net")
    assert source.path.samefile(package / "nets.py")
    assert source.sha256 == sha256(package / "nets.py")
    assert not TRACE.exists()
    with trust(True):
        assert load_object("models", "own_package.nets:Net") == ("nets", 7)
    assert TRACE.exists()


def test_entry_points_are_names_of_parts(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(*, group: str, name: str) -> list[EntryPoint]:
        known = [
            EntryPoint("nets", "own_package.nets:Net", "convlens.models"),
            EntryPoint("nets", "own_package.helper:VALUE", "convlens.datasets"),
            EntryPoint("twice", "a:b", "convlens.models"),
            EntryPoint("twice", "c:d", "convlens.models"),
        ]
        return [point for point in known if (point.group, point.name) == (group, name)]

    monkeypatch.setattr(user_code, "entry_points", entry_points)
    assert user_code.is_user_code("models", "nets")
    assert not user_code.is_user_code("losses", "nets")
    hashes = user_code.source_hashes([("models", "nets"), ("models", "resnet18")])
    assert hashes == {"nets": sha256(package / "nets.py")}
    with pytest.raises(UntrustedCode):
        load_object("models", "nets")
    with trust(["nets"]):
        assert load_object("models", "nets") == ("nets", 7)
    with pytest.raises(UsageError, match="an entry point of two kinds"):
        user_code.source_hashes([("models", "nets"), ("datasets", "nets")])
    with pytest.raises(UsageError, match="several packages") as caught:
        user_code.is_user_code("models", "twice")
    assert "a:b or c:d" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "name", "message", "where"),
    [
        ("1 / 0", NET, "cannot be imported: ZeroDivisionError", "parts.py, line 1"),
        ("\n\nx = (", NET, "cannot be imported: SyntaxError", "parts.py, line 3"),
        ("import sys\nsys.exit(3)", NET, "cannot be imported: SystemExit: 3", "parts.py, line 2"),
        ("import no_such_module", NET, "ModuleNotFoundError", "parts.py, line 1"),
        ("Nett = 1", NET, r"has no 'Net' \(did you mean Nett\?\)", "parts.py"),
        ("", "./no.py:Net", "cannot be read: No such file", "no.py"),
        ("", "no_such_package.nets:Net", "no Python module 'no_such_package.nets'", ""),
        ("", "json.no_such_module:Net", "no Python module 'json.no_such_module'", ""),
    ],
)
def test_what_cannot_be_imported_is_explained(
    text: str, name: str, message: str, where: str
) -> None:
    Path("parts.py").write_text(text)
    with trust(True), pytest.raises(UsageError, match=message) as caught:
        load_object("models", name)
    assert caught.value.where == where
    is_kept = text == "Nett = 1"  # it was imported, and has another name in it
    assert is_kept == any(name.startswith(user_code.MODULE_PREFIX) for name in sys.modules)


# Recorded sources


def test_a_changed_source_is_replaced_by_its_copy(capsys: pytest.CaptureFixture[str]) -> None:
    code = {NET: sha256("parts.py")}
    user_code.write_copies(code, Path("run/code"))
    (copy,) = Path("run/code").iterdir()
    assert copy.name == f"{code[NET][:12]}-parts.py"
    Path("parts.py").write_text("Net = 'changed'")
    with trust(True):
        assert load_object("models", NET) == "changed"
        with recorded_code(code, Path("run/code")):
            assert load_object("models", NET).__name__ == "Net"
        assert "./parts.py:Net has changed since the training" in capsys.readouterr().err
        Path("parts.py").unlink()
        with recorded_code(code, Path("run/code")):
            assert load_object("models", NET).__name__ == "Net"


def test_a_damaged_copy_is_never_imported() -> None:
    code = {NET: sha256("parts.py")}
    user_code.write_copies(code, Path("code"))
    (copy,) = Path("code").iterdir()
    copy.write_text("Net = 'something else'")
    Path("parts.py").unlink()
    forget_imports()
    with (
        trust(True),
        recorded_code(code, Path("code")),
        pytest.raises(ModelFileError, match="is not the code that this model was trained with"),
    ):
        load_object("models", NET)


def test_the_copy_of_a_module_imports_from_its_package(package: Path) -> None:
    name = "own_package.nets:Net"
    code = user_code.source_hashes([("models", name)])
    user_code.write_copies(code, Path("code"))
    package.joinpath("nets.py").write_text("Net = 'changed'")
    with trust(True), recorded_code(code, Path("code")):
        assert load_object("models", name) == ("nets", 7)


def test_a_source_that_changes_at_the_start_is_refused() -> None:
    code = {NET: "0" * 64}
    with pytest.raises(UsageError, match="has changed while the training was starting"):
        user_code.write_copies(code, Path("code"))


@pytest.mark.parametrize("code", [None, [], "text", {NET: 3}])
def test_damaged_metadata_do_not_import_anything(code: object) -> None:
    with recorded_code(code, Path("code")), pytest.raises(UntrustedCode):
        load_object("models", NET)
    assert not TRACE.exists()


# Calls


def test_options_are_checked_against_the_signature() -> None:
    def make(a: int, b: int = 2, *, c: int = 3) -> None: ...

    keywords, takes_any = user_code.accepted_keywords(make)
    assert list(keywords) == ["a", "b", "c"]
    assert not takes_any
    assert user_code.accepted_keywords(lambda **options: None)[1]
    assert user_code.select_keywords(make, {"b": 1, "d": 2}) == {"b": 1}
    user_code.check_options("make", keywords, {"a": 1, "c": 2})
    with pytest.raises(UsageError, match=r"make has no option 'bb' \(did you mean b\?\)"):
        user_code.check_options("make", {"b": 1}, {"bb": 1})
    with pytest.raises(UsageError, match="make needs a value for a"):
        user_code.check_options("make", keywords, {"b": 1})
