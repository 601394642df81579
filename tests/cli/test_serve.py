"""The command `serve`."""

from __future__ import annotations

import socket
from pathlib import Path

from helpers.commands import brightness_model, here, refused


def test_servers_for_other_machines_must_be_asked_for(tmp_path: Path) -> None:
    model = str(brightness_model(tmp_path / "bright").model_path)
    refused(here("serve", model, "--host", "0.0.0.0"), 2, "classify images", "--allow-remote")
    remote = ("serve", model, "--host", "0.0.0.0", "--allow-remote")
    refused(here(*remote), 2, "--token")
    refused(here(*remote, "--token", "short"), 2, "12 characters")


def test_unknown_runs_and_used_ports_are_errors(tmp_path: Path) -> None:
    refused(here("serve", "nothing", "--port", "0"), 2, "nothing")
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        refused(here("serve", "nothing", "--port", str(port)), 5, f"127.0.0.1:{port}")
