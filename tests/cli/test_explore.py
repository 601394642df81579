from __future__ import annotations

import socket
from pathlib import Path

import pytest

from convlens import explore
from helpers.commands import brightness_model, command, here, refused


def test_typos_and_missing_runs_are_explained() -> None:
    refused(here("explore"), 2, "there are no runs here", "convlens train digits")
    brightness_model(Path("models/brightness"))
    Path("models/brightness/run.json").write_text("{}")
    refused(here("explore", "brigthness", "--no-open"), 2, "did you mean brightness?")
    refused(here("explore", "./nothing", "--no-open"), 4, "no such run")
    refused(here("explore", "--prot", "8000"), 2, "--port")
    refused(here("exlpore"), 2, "explore")
    refused(here("tensorboard"), 2, "did you mean explore?")


def test_a_mistyped_run_is_an_error_of_the_real_command() -> None:
    brightness_model(Path("models/brightness"))
    done = command("explore", "brightnes", "--no-open")
    refused(done, 2, "no run called 'brightnes'")
    assert done.out == ""


def test_other_machines_need_permission_and_a_token() -> None:
    refused(here("explore", "--host", "0.0.0.0"), 2, "not encrypted", "--allow-remote")
    refused(here("explore", "--host", "0.0.0.0", "--allow-remote"), 2, "--token")


def test_a_port_in_use_is_named() -> None:
    brightness_model(Path("models/brightness"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        refused(here("explore", "brightness", "--no-open", "--port", port), 5, port, "--port")


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore, "REQUIRED_PACKAGES", ("starlette", "no_such_package"))
    done = here("explore")
    refused(done, 2, "no_such_package", "pip install 'convlens[explore]'")
