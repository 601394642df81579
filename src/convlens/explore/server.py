"""The application, its pages, and the uvicorn server that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from convlens.errors import ConvlensError, ResourceError, UsageError
from convlens.explore import security, web
from convlens.explore.data_sets import data_routes
from convlens.explore.jobs import Job, started_jobs
from convlens.explore.judge import judge_routes
from convlens.explore.labels import labels_routes
from convlens.explore.security import Access, Guard, Limits
from convlens.explore.try_image import try_routes
from convlens.explore.watch import watch_routes
from convlens.explore.web import answer, workspace_of
from convlens.explore.workspace import Workspace
from convlens.utils.console import print_status
from convlens.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

WARM_UP_AFTER_S = 0.7  # a page that is open by then has asked for its model already
HEADER_SECONDS = 10.0  # until a connection has sent the headers of its next request
MAX_CONNECTIONS = 256  # above it, requests are refused; above twice that, connections are closed
SHUTDOWN_SECONDS = 3  # until requests that are being answered are cut off
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class PagePart:
    """A part of the page.

    Attributes:
        name: of its path `/NAME`, its template `NAME.html` and its script `static/NAME.js`.
        title: in the navigation.
        routes: returns its routes, which start with `/api/`.
    """

    name: str
    title: str
    routes: Callable[[], list[Route]]


PARTS = (
    PagePart("try", "Try", try_routes),
    PagePart("watch", "Watch", watch_routes),
    PagePart("judge", "Judge", judge_routes),
    PagePart("labels", "Labels", labels_routes),
    PagePart("data", "Data", data_routes),
)


def make_app(workspace: Workspace, access: Access, limits: Limits | None = None) -> Starlette:
    """Return the application: the pages of all parts and their routes behind the guard."""
    routes = [
        Route("/", _first_page),
        Route("/static/{name}", _static),
        Route("/api/runs", _runs),
        Route("/api/jobs/{job}", _job, methods=["GET"]),
        Route("/api/jobs/{job}", _cancel_job, methods=["DELETE"]),
    ]
    for part in PARTS:
        routes.append(Route(f"/{part.name}", functools.partial(_page, part=part)))
        routes += part.routes()
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, access=access, limits=limits)],
        exception_handlers=web.error_handlers(),
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.workspace = workspace
    app.state.stopping = threading.Event()
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    """Import torch and open the first model soon after the server has started.

    Not at once, since loading torch's libraries blocks all threads, and the page comes first.
    """
    asyncio.get_running_loop().call_later(WARM_UP_AFTER_S, _warm_up, app.state.workspace)
    yield


def _warm_up(workspace: Workspace) -> None:
    def open_first(job: Job) -> None:
        workspace.open(workspace.run_ids()[0])

    with contextlib.suppress(ResourceError):  # the server is stopping
        # Errors are left to the requests for this run.
        workspace.jobs.quick.submit(open_first, title="opening the model")


# -- pages ------------------------------------------------------------------------------------


async def _first_page(request: Request) -> Response:
    return RedirectResponse(f"/{PARTS[0].name}", status_code=303)


async def _page(request: Request, part: PagePart) -> Response:
    """Return the page of a part; its script asks for everything else."""
    runs = workspace_of(request).run_ids()
    html = (
        _environment()
        .get_template(f"{part.name}.html")
        .render(part=part, parts=PARTS, runs=runs, version=__version__)
    )
    return HTMLResponse(html)


async def _static(request: Request) -> Response:
    """Return a script or style sheet of the package, or one that reports use, too."""
    files = _static_files()
    name = request.path_params["name"]
    if name not in files:
        raise HTTPException(404, "no such file")
    package, folder = files[name]
    content = (resources.files(package) / folder / name).read_bytes()
    media_type = MEDIA_TYPES[name[name.rindex(".") :]]
    return Response(content, media_type=f"{media_type}; charset=utf-8")


@functools.cache
def _static_files() -> dict[str, tuple[str, str]]:
    """Return package and folder of every file that is served, by name."""
    own = resources.files("convlens.explore") / "static"
    files = {
        entry.name: ("convlens.explore", "static")
        for entry in own.iterdir()
        if entry.name.endswith(tuple(MEDIA_TYPES))
    }
    shared = ("page.css", "tables.js")  # with reports
    return files | dict.fromkeys(shared, ("convlens.reports", "templates"))


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("convlens.explore", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


async def _runs(request: Request) -> JSONResponse:
    return answer({"runs": workspace_of(request).run_ids()})


async def _job(request: Request) -> JSONResponse:
    """Return state and progress of a job, and its result or error once it has ended."""
    job = _find_job(request)
    content: dict[str, Any] = job.to_dict()
    if job.state == "done":
        content["result"] = job.future.result()
    elif job.state == "failed":
        error = job.future.exception()
        if isinstance(error, ConvlensError):
            content |= {"error": error.what, "fix": error.fix}
        else:
            logging.getLogger("uvicorn.error").error("a job failed", exc_info=error)
            content |= {"error": "this failed unexpectedly; the terminal shows why", "fix": ""}
    return answer(content)


async def _cancel_job(request: Request) -> JSONResponse:
    job = _find_job(request)
    job.cancel()
    return answer(job.to_dict())


def _find_job(request: Request) -> Job:
    job = workspace_of(request).jobs.find(request.path_params["job"])
    if job is None:
        raise HTTPException(404, "no such job")
    return job


# -- server -----------------------------------------------------------------------------------


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 that closes connections of clients which are slow, too many, or do not read.

    uvicorn only limits the time between two requests, and a single byte ends it. So it would wait
    for ever for the rest of a header, and for the rest of a body that it has refused.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unsent = 0
        self._impatience = self.loop.call_later(HEADER_SECONDS, self._check_progress)
        if len(self.connections) > 2 * MAX_CONNECTIONS:  # before there are no more file handles
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._impatience.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        # The next request has as much time as the first one. It may be complete already, and then
        # it is in work when the time has passed.
        self._impatience.cancel()
        self._impatience = self.loop.call_later(HEADER_SECONDS, self._check_progress)
        super().on_response_complete()

    def _check_progress(self) -> None:
        """Close the connection if no request is in work, or the client does not read answers."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent == self._unsent:
            self.transport.abort()
            return
        if not unsent and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
            return
        self._unsent = unsent
        self._impatience = self.loop.call_later(HEADER_SECONDS, self._check_progress)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP with an error as data, and close the connection.

        Nothing can be sent if they end a request that has been answered already, e.g. a body that
        was refused. uvicorn would try, and fail with a traceback.
        """
        error = sys.exc_info()[1]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status = getattr(error, "error_status_hint", 400)
            answer = security.refuse(status, "this is not a valid HTTP request")
            headers = [*answer.raw_headers, (b"connection", b"close")]
            headers += [(k.encode(), v.encode()) for k, v in security.SECURITY_HEADERS.items()]
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # whoever reads the body must not answer as well
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


class ExploreServer(uvicorn.Server):
    """uvicorn's server; Ctrl-C and SIGTERM end it without being raised again afterwards."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.config.app.state.stopping.set()  # type: ignore[union-attr]  # ends open streams
        super().handle_exit(sig, frame)


def explore(
    runs: Sequence[str] = (),
    *,
    data: Sequence[str] = (),
    port: int = 0,
    host: str = "127.0.0.1",
    allow_remote: bool = False,
    token: str | None = None,
    open_browser: bool = True,
    device: str | None = None,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM; print its URL on stdout.

    Args:
        runs: by name or folder, or model files; by default all runs of the current directory.
        data: data sets that the part Data shows, beside those of the runs.
        port: 0 for any free one.
        host: the address to listen on; another than that of this machine needs `allow_remote` and
            `token`.
        token: what the URL has to contain; by default a random one.
        open_browser: open the page in a browser.
        device: where models compute; by default the fastest one.

    Raises:
        UsageError: unknown runs, or a host that is open to others without being asked for.
        ResourceError: the port is in use.
    """
    check_host(host, allow_remote, token)
    with started_jobs() as jobs, listen(host, port) as listening:
        workspace = Workspace(runs, jobs, device, data=data)
        if not workspace.run_ids() and not data:
            raise UsageError(
                "there are no runs here",
                fix="train one: `convlens train digits` takes seconds; or name images with --data",
            )
        port = listening.getsockname()[1]
        access = Access(
            token or secrets.token_urlsafe(16),
            security.own_names(host, [socket.gethostname()] if allow_remote else []),
            addresses=not security.is_loopback(host),
            cookie=f"convlens-{port}",
        )
        url = f"{url_of(host, port)}/?token={access.token}"
        print_status(_who_can_see_it(host))
        sys.stdout.write(url + "\n")
        sys.stdout.flush()
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        run_server(make_app(workspace, access), listening)


def _who_can_see_it(host: str) -> str:
    if security.is_loopback(host):
        return "the page is at this URL, for this machine only; Ctrl-C ends it"
    return (
        "[yellow]warning:[/] whoever has this URL can use the page from other machines, and the "
        "connection is not encrypted; Ctrl-C ends it"
    )


def run_server(
    app: Starlette, listening: socket.socket, shutdown_seconds: int = SHUTDOWN_SECONDS
) -> None:
    """Run an application on a socket until it is asked to stop.

    Args:
        shutdown_seconds: until requests that are being answered are cut off.
    """
    server = ExploreServer(server_config(app, shutdown_seconds))
    app.state.server = server
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        server.run(sockets=[listening])
        return
    # A notebook runs its own event loop in this thread.
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        server.handle_exit(signal.SIGINT, None)
        thread.join()


def server_config(app: Starlette, shutdown_seconds: int = SHUTDOWN_SECONDS) -> uvicorn.Config:
    """Return the settings of uvicorn."""
    return uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        log_level=logging.ERROR,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=shutdown_seconds,
        h11_max_incomplete_event_size=security.MAX_HEADER_BYTES,
        limit_concurrency=MAX_CONNECTIONS,
    )


def check_host(
    host: str,
    allow_remote: bool,
    token: str | None,
    use: str = "use the page, see the images and correct labels",
) -> None:
    """Check that a server which other machines can reach was asked for.

    Args:
        use: what other people could do, for the error message.

    Raises:
        UsageError: it was not, or it has no token of its own.
    """
    if security.is_loopback(host):
        return
    if not allow_remote:
        raise UsageError(
            f"--host {host}: everybody in this network could {use}; the connection is not "
            "encrypted",
            fix="leave it out and use `ssh -L`, or add --allow-remote and --token TOKEN",
        )
    if not token or len(token) < 12:
        raise UsageError(
            "--allow-remote needs a token that others cannot guess",
            fix="add --token with 12 characters or more",
        )


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket that listens on an address.

    Raises:
        ResourceError: the port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ResourceError(
                f"cannot listen on {host}:{port}: {getattr(error, 'strerror', '') or error}",
                fix="leave out --port to use a free one, and --host to use this machine",
            ) from error
        listening.listen(128)
        yield listening


def url_of(host: str, port: int) -> str:
    """Return the URL of a server that listens on an address."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
