"""A web server of this machine's own, for tests of downloads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Pages(BaseHTTPRequestHandler):
    """Sends what is in `pages`, half of it if `cut`; `asked` is what was asked for, in order."""

    pages: dict[str, bytes]
    cut: bool = False
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        content = self.pages.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.cut else content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(kind: type[Pages] = Pages) -> Iterator[tuple[str, type[Pages]]]:
    """The address of a server that lives as long as the context, and its handler."""
    handler = type("Handler", (kind,), {"pages": {}, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads, running.block_on_close = True, False
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/", handler
        running.shutdown()
