"""A local web server for tests of downloads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Pages(BaseHTTPRequestHandler):
    """Serves `pages`, or the first half of each with `truncate`; `requested` lists the paths."""

    pages: dict[str, bytes]
    truncate: bool = False
    requested: list[str]

    def do_GET(self) -> None:
        self.requested.append(self.path)
        content = self.pages.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.truncate else content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(kind: type[Pages] = Pages) -> Iterator[tuple[str, type[Pages]]]:
    """Run a server within the context; yields its URL and its handler."""
    handler = type("Handler", (kind,), {"pages": {}, "requested": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads, running.block_on_close = True, False
        # It looks for `shutdown` at this interval: the default of 0.5 s would delay each test.
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/", handler
        running.shutdown()
