"""The command `serve`: a model as a web service, without pages.

`POST /predict` takes an image as the body, or several as `multipart/form-data`, and answers as
`convlens predict --json`. Images that arrive at the same time are classified together.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import FormParserError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from convlens.explore import openapi, security, web
from convlens.explore.batching import Batcher, Room
from convlens.explore.security import Access, Guard, Limits
from convlens.explore.server import check_host, listen, run_server, url_of
from convlens.utils.console import print_status

if TYPE_CHECKING:  # these import torch
    from convlens.data.input_images import InputImage
    from convlens.prediction import Prediction, PredictionColumns
    from convlens.run import RunLike
    from convlens.uncertainty.promises import ShareLike

DEFAULT_PORT = 8000
MAX_PIXELS = 1 << 25  # of an image, unless the caller or the training has another limit
MAX_IMAGES = 64  # in a request
MAX_WAITING_IMAGES = 256
MAX_WAITING_BYTES = 256 << 20  # of all bodies together
MAX_BODY_BYTES = 32 << 20
BODY_SECONDS = 30.0  # until a body has arrived
MAX_REQUESTS = 512  # at the same time; images and bytes are limited below that
SHUTDOWN_SECONDS = 35  # until requests that are being answered are cut off; above `BODY_SECONDS`
WARM_UP_BATCH = 8
OPEN_PATHS = frozenset({"/healthz"})


@dataclass
class Service:
    """What the routes work with.

    Attributes:
        name: of the run.
        batcher: classifies the images.
        columns: what an answer contains.
        images, body_bytes: room for images that are being classified, and for bodies.
    """

    name: str
    batcher: Batcher
    columns: PredictionColumns
    description: dict[str, Any]
    images: Room = field(default_factory=lambda: Room(MAX_WAITING_IMAGES, "images"))
    body_bytes: Room = field(default_factory=lambda: Room(MAX_WAITING_BYTES, "bytes"))


def make_service_app(
    service: Service, access: Access, body_seconds: float = BODY_SECONDS
) -> Starlette:
    """Return the application: the routes of a service behind the guard."""
    limits = Limits(MAX_BODY_BYTES, body_seconds, MAX_REQUESTS)
    app = Starlette(
        routes=[
            Route("/predict", _predict, methods=["POST"]),
            Route("/healthz", _health, methods=["GET"]),
            Route("/openapi.json", _openapi, methods=["GET"]),
        ],
        middleware=[Middleware(Guard, access=access, limits=limits)],
        exception_handlers=web.error_handlers(),
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.stopping = threading.Event()  # `run_server` expects it
    return app


async def _predict(request: Request) -> JSONResponse:
    """Classify the image in the body, or all files of a multipart body."""
    service: Service = request.app.state.service
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "compressed bodies are not accepted: send the image file itself")
    async with _body(request, service.body_bytes) as content:
        is_multipart = request.headers.get("content-type", "").lower().startswith("multipart/")
        images = await _split(request, content) if is_multipart else [_single(content)]
        with service.images.hold(len(images)):
            futures = [asyncio.wrap_future(service.batcher.submit(image)) for image in images]
            predictions: list[Prediction] = await asyncio.gather(*futures)
    if not is_multipart and predictions[0].error is not None:
        raise HTTPException(415, predictions[0].error)
    return web.answer({"predictions": list(map(service.columns.to_dict, predictions))})


@contextlib.asynccontextmanager
async def _body(request: Request, room: Room) -> AsyncIterator[bytes]:
    """Yield the body of a request; its size and duration are limited by the guard.

    Raises:
        Busy: all bodies together would be too large.
    """
    parts, size = [], 0
    try:
        async for part in request.stream():
            room.enter(len(part))
            size += len(part)
            parts.append(part)
        yield b"".join(parts)
    finally:
        room.leave(size)


def _single(content: bytes) -> InputImage:
    from convlens.data.input_images import InputImage

    return InputImage("-", content)  # the name that `predict` gives to an image in a pipe


class _InMemoryParser(MultiPartParser):
    """A parser that writes no temporary files; the body is in memory anyway."""

    spool_max_size = MAX_BODY_BYTES + 1


async def _split(request: Request, content: bytes) -> list[InputImage]:
    """Return the files of a multipart body.

    Raises:
        HTTPException: the body is damaged, has no files, or too many.
    """
    from convlens.data.input_images import InputImage

    async def stream() -> AsyncGenerator[bytes, None]:
        yield content

    # One file more than allowed, so that their number is reported in our own words.
    parser = _InMemoryParser(request.headers, stream(), max_files=MAX_IMAGES + 1, max_fields=8)
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError, UnicodeError) as error:  # also an odd charset
        if "Too many files" in str(error):
            raise _too_many() from error
        raise HTTPException(400, f"the multipart body is damaged: {error}") from error
    images = []
    for name, part in form.multi_items():
        if isinstance(part, str):
            raise HTTPException(400, f"the part {name!r} is not a file: each part needs a filename")
        images.append(InputImage(part.filename or name, part.file.read()))
    await form.close()
    if not images:
        raise HTTPException(400, "the multipart body has no files")
    if len(images) > MAX_IMAGES:
        raise _too_many()
    return images


def _too_many() -> HTTPException:
    return HTTPException(413, f"more than {MAX_IMAGES} images: send them in several requests")


async def _health(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})


async def _openapi(request: Request) -> JSONResponse:
    service: Service = request.app.state.service
    return JSONResponse(service.description)


def serve(
    run: RunLike,
    *,
    port: int = DEFAULT_PORT,
    host: str = "127.0.0.1",
    allow_remote: bool = False,
    token: str | None = None,
    top_k: int = 1,
    min_accuracy: ShareLike | None = None,
    confidence: ShareLike = 0.95,
    prediction_set: ShareLike | None = None,
    max_pixels: int | None = None,
    device: str | None = None,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM; print the URL on stdout when it is ready.

    Args:
        run: a run by name, folder or model file (also an exported ONNX file), or a `Run`.
        port: 0 for any free one.
        host: the address to listen on; another than that of this machine needs `allow_remote` and
            `token`.
        token: what requests have to send (`Authorization: Bearer TOKEN`); by default nothing.
        top_k, min_accuracy, confidence, prediction_set, max_pixels, device: as for `predict`.

    Raises:
        UsageError: unknown run, or a host that is open to others without being asked for.
        ResourceError: the port is in use.
    """
    check_host(host, allow_remote, token, "classify images with the model")
    with listen(host, port) as listening:
        service = open_service(
            run,
            top_k=top_k,
            min_accuracy=min_accuracy,
            confidence=confidence,
            prediction_set=prediction_set,
            max_pixels=max_pixels,
            device=device,
            needs_token=bool(token),
        )
        access = Access(
            token or "",
            # A page of another host can reach this server under a name of its own (DNS rebinding),
            # but does not know the token. With one, any name may be used, e.g. that of a container.
            security.own_names(host),
            bearer_only=bool(token),
            open_paths=OPEN_PATHS,
        )
        with service.batcher:
            url = url_of(host, listening.getsockname()[1])
            print_status(f"{service.name} is ready: POST images to {url}/predict; Ctrl-C ends it")
            sys.stdout.write(url + "\n")
            sys.stdout.flush()
            run_server(make_service_app(service, access), listening, SHUTDOWN_SECONDS)


def open_service(
    run: RunLike,
    *,
    top_k: int = 1,
    min_accuracy: ShareLike | None = None,
    confidence: ShareLike = 0.95,
    prediction_set: ShareLike | None = None,
    max_pixels: int | None = None,
    device: str | None = None,
    needs_token: bool = False,
) -> Service:
    """Load a model, run it once, and return it as a service; arguments are those of `serve`."""
    from convlens.device import usable_cores
    from convlens.onnx_model import load_model_or_onnx
    from convlens.prediction import ImageReader, PredictionColumns, Predictor
    from convlens.run import as_run_dir
    from convlens.uncertainty.promises import Promises

    run_dir = as_run_dir(run)
    loaded = load_model_or_onnx(run_dir.model_path)
    promises = Promises.of(loaded.calibration, min_accuracy, confidence, prediction_set)
    conversion = loaded.preprocessing.conversion
    limit = min(conversion.max_pixels, MAX_PIXELS) if max_pixels is None else max_pixels
    predictor = Predictor(loaded, device)
    predictor.warm_up(WARM_UP_BATCH)
    batcher = Batcher(
        predictor,
        ImageReader(conversion, max_pixels=limit),
        top_k=top_k,
        promises=promises,
        threads=usable_cores(),
    )
    columns = PredictionColumns(
        top_k,
        unsure=promises.min_accuracy is not None,
        sets=promises.coverage is not None,
        unlike=loaded.calibration.detector is not None,
    )
    description = openapi.describe_service(
        run_dir.name, predictor.classes, needs_token=needs_token, max_images=MAX_IMAGES
    )
    return Service(run_dir.name, batcher, columns, description)
