"""What the routes of all parts use: request bodies, results of jobs, and errors as data."""

from __future__ import annotations

import io
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from convlens.errors import (
    ConvlensError,
    DataError,
    ModelFileError,
    ResourceError,
    UsageError,
)
from convlens.explore.jobs import Job, JobCancelled, WorkQueue, result_of
from convlens.explore.security import Answer, refuse
from convlens.explore.workspace import OpenedRun, Workspace

if TYPE_CHECKING:
    import numpy as np

MAX_JSON_BYTES = 1 << 20
MAX_NAME_SHOWN = 100  # characters of the name of an unknown key in an error message
MAX_TEXT = 4096  # characters of a text in it, unless its field has another limit
LOSSLESS_PIXELS = 128 * 128  # images up to this size are sent without loss
STATUS_OF_ERROR: dict[type[ConvlensError], int] = {
    UsageError: 400,
    DataError: 422,
    ModelFileError: 422,
    ResourceError: 503,
}
# Errors that a request can cause. Another one is a bug.
EXPECTED_ERRORS = (ConvlensError, JobCancelled, HTTPException, ClientDisconnect, MemoryError)


class RequestBody(BaseModel):
    """Base class of the JSON bodies of requests: types are strict and unknown keys are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", str_max_length=MAX_TEXT)


Body = TypeVar("Body", bound=RequestBody)
T = TypeVar("T")


def workspace_of(request: Request) -> Workspace:
    workspace: Workspace = request.app.state.workspace
    return workspace


def part_state(request: Request, name: str, make: Callable[[], T]) -> T:
    """Return what a part of the page keeps in the application, made at its first request.

    Args:
        name: of the attribute.
    """
    state = request.app.state
    if not hasattr(state, name):
        setattr(state, name, make())
    kept: T = getattr(state, name)
    return kept


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a request.

    Raises:
        HTTPException: it is too large.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPException(413, f"the body has more than {limit:,} bytes")
        parts.append(part)
    return b"".join(parts)


async def read_json(request: Request, model: type[Body]) -> Body:
    """Return the JSON body of a request.

    Raises:
        HTTPException: the body is not JSON, too large, or has other keys or types.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "the body must be application/json")
    content = await read_body(request, MAX_JSON_BYTES)
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:MAX_NAME_SHOWN] or "body"
        raise HTTPException(400, f"{where}: {first['msg']}") from None
    except RecursionError:
        raise HTTPException(400, "the body is nested too deeply") from None


async def compute(
    request: Request, function: Callable[[Job], Any], key: str = "", title: str = ""
) -> JSONResponse:
    """Run a function in the queue of quick work and answer with its result.

    Args:
        key: a newer request with the same key replaces this one, which is then answered with the
            status 409.
    """
    job = workspace_of(request).jobs.quick.submit(function, key, title)
    return answer(await result_of(job))


async def open_run(request: Request, run: str) -> OpenedRun:
    """Return the opened model of a run, without blocking the server while it is loaded."""
    workspace = workspace_of(request)
    opened: OpenedRun = await result_of(
        workspace.jobs.quick.submit(lambda job: workspace.open(run))
    )
    return opened


async def open_test_split(request: Request, opened: OpenedRun) -> JSONResponse:
    """Open the sealed test split of a run after the page has asked; the use is logged."""
    jobs = workspace_of(request).jobs
    await result_of(jobs.data.submit(lambda job: opened.open_test_split()))
    return answer({"test_uses": opened.test_uses()})


def start(queue: WorkQueue, function: Callable[[Job], Any], key: str, title: str) -> Job:
    """Return the job of long work with this key: the one that has not ended yet, or a new one."""
    return queue.running_or_waiting(key) or queue.submit(function, key, title)


def answer(content: Any, status: int = 200) -> JSONResponse:
    """Return JSON; NaN and infinity, which it cannot represent, become null."""
    return Answer(_finite(content), status_code=status)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def error_handlers() -> dict[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    """Return the handlers of an application that answer with errors as data."""
    expected = dict.fromkeys(EXPECTED_ERRORS, _answer_with_error)
    return {**expected, Exception: _answer_to_bug}


async def _answer_with_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _answer_to_bug(request: Request, error: Exception) -> Response:
    """Answer with an error as data; uvicorn prints the traceback."""
    return refuse(500, "this failed unexpectedly; the terminal shows why")


def error_response(error: Exception) -> JSONResponse:
    """Return an error as data: `error`, `where` and `fix`.

    Raises:
        Exception: a bug of convlens, which the server logs.
    """
    if isinstance(error, JobCancelled):
        return refuse(409, "a newer request has replaced this one, or it was cancelled")
    if isinstance(error, HTTPException):
        return refuse(error.status_code, str(error.detail))
    if isinstance(error, ClientDisconnect):
        return refuse(400, "the connection was closed")  # nobody reads it
    if isinstance(error, MemoryError):
        return refuse(503, "out of memory", "send a smaller image")
    if isinstance(error, ConvlensError):
        status = next((s for kind, s in STATUS_OF_ERROR.items() if isinstance(error, kind)), 500)
        # No path of this machine: the page may be shown to others.
        return refuse(status, error.what, error.fix)
    raise error


def picture_source(pixels: np.ndarray, side: int) -> str:
    """Return an image uint8 `[C, H, W]` as a data URI, reduced to at most `side` pixels."""
    import numpy as np
    from PIL import Image

    from convlens.reports import html

    gray = pixels.shape[0] == 1
    image = Image.fromarray(pixels[0] if gray else np.ascontiguousarray(np.moveaxis(pixels, 0, 2)))
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if image.width * image.height <= LOSSLESS_PIXELS:
        image.save(buffer, "PNG")
        return html.data_uri(buffer.getvalue(), "image/png")
    image.save(buffer, "JPEG", quality=90)
    return html.data_uri(buffer.getvalue(), "image/jpeg")
