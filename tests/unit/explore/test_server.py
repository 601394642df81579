from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from convlens.errors import ConvlensError, UsageError
from convlens.explore.server import PARTS, check_host
from helpers.commands import environment
from helpers.exploring import Page, running_page


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_part_has_a_page_whose_files_are_served(page: Page, part: object) -> None:
    name = part.name  # type: ignore[attr-defined]
    html = page.client.get(f"/{name}").text
    assert "small" in html
    files = re.findall(r'(?:src|href)="(/static/[^"]+)"', html)
    assert f"/static/{name}.js" in files
    for file in files:
        answer = page.client.get(file)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(("text/css", "text/javascript"))
    # The policy would block them.
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", html)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static//etc/passwd",
        "/static/page.html",
        "/static/",
        "/api/jobs/x",
        "/models/small/model.safetensors",
    ],
)
def test_other_files_and_unknown_ids_are_not_found(page: Page, path: str) -> None:
    answer = page.client.get(path)
    assert answer.status_code == 404
    assert set(answer.json()) == {"error", "where", "fix"}


def test_jobs_show_progress_results_and_errors(page: Page) -> None:
    def fail(job: object) -> None:
        raise UsageError("not possible", fix="do something else")

    queue = page.workspace.jobs.long
    assert page.result(queue.submit(lambda job: {"n": 3}).id) == {"n": 3}
    failed = queue.submit(fail, title="trying")
    queue.wait_until_idle(20)
    state = page.get(f"/api/jobs/{failed.id}")
    assert (state["state"], state["error"]) == ("failed", "not possible")
    assert (state["fix"], state["title"]) == ("do something else", "trying")
    cancelled = page.client.delete(
        f"/api/jobs/{failed.id}", headers={"origin": str(page.client.base_url)}
    )
    assert cancelled.status_code == 200


def test_host_that_others_can_reach_must_be_asked_for() -> None:
    check_host("127.0.0.1", False, None)
    for host, allowed, token in (
        ("0.0.0.0", False, "long enough token"),
        ("0.0.0.0", True, None),
        ("192.168.0.1", True, "short"),
    ):
        with pytest.raises(ConvlensError):
            check_host(host, allowed, token)
    check_host("0.0.0.0", True, "long enough token")


def test_importing_the_server_does_not_import_torch() -> None:
    code = "import sys, convlens.explore.server; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.strip() == "False"


def test_command_prints_its_url_and_ends_with_ctrl_c(
    explored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(explored)
    with running_page("small") as url:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=\S{16,}", url)
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(url) as answer:
            assert answer.url.endswith("/try")
            assert "token" not in answer.url
        base = url.partition("?")[0]
        with opener.open(f"{base}api/runs") as answer:
            assert json.load(answer) == {"runs": ["small"]}
