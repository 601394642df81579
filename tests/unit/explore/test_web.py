from __future__ import annotations

import math

import pytest
from starlette.requests import ClientDisconnect

from convlens.errors import DataError, ModelFileError, ResourceError, UsageError
from convlens.explore.jobs import JobCancelled
from convlens.explore.web import MAX_JSON_BYTES, MAX_TEXT, answer, error_response
from helpers.exploring import URL, Page


@pytest.mark.parametrize(
    ("content", "media_type", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"run": 1, "image": "x"}', "application/json", 400),
        (b'{"run": "small"}', "application/json", 400),
        (b'{"run": "small", "image": "x", "more": 1}', "application/json", 400),
        (b'{"run": "\xff"}', "application/json", 400),
        (b'{"run": "%b"}' % (b"x" * (MAX_TEXT + 1)), "application/json", 400),
        (b'{"run": "small", "image": "x", "%b": 1}' % (b"x" * 9999), "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b" " * (MAX_JSON_BYTES + 1), "application/json", 413),
        (b"run=small&image=x", "application/x-www-form-urlencoded", 415),
        (b'{"run": "small", "image": "x"}', "text/plain", 415),
    ],
)
def test_bad_json_is_refused_with_a_reason(
    page: Page, content: bytes, media_type: str, status: int
) -> None:
    headers = {"origin": URL, "content-type": media_type}
    refused = page.client.post("/api/try/predict", content=content, headers=headers)
    assert refused.status_code == status
    assert 0 < len(refused.json()["error"]) < 300


def test_errors_are_data_without_paths() -> None:
    for error, status in (
        (UsageError("no"), 400),
        (DataError("no", where="/home/someone/x.png", fix="do this"), 422),
        (ModelFileError("no"), 422),
        (ResourceError("no"), 503),
        (JobCancelled(), 409),
        (ClientDisconnect(), 400),
        (MemoryError(), 503),
    ):
        response = error_response(error)
        assert response.status_code == status
        assert b"/home" not in response.body
    with pytest.raises(ZeroDivisionError):
        error_response(ZeroDivisionError())


def test_numbers_that_json_cannot_represent_become_null() -> None:
    assert answer({"a": [1.5, math.nan, (math.inf,)]}).body == b'{"a":[1.5,null,[null]]}'


def test_names_that_are_not_utf8_are_escaped() -> None:
    assert answer({"a": "\udcff\u00e9<"}).body == b'{"a":"\\udcff\\u00e9<"}'
    assert error_response(UsageError("no class \udcff")).status_code == 400
