"""A tiny HTTP server of one folder, with ranges: a web server to some, S3 with path-style addresses to others."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FileServer(http.server.ThreadingHTTPServer):
    """Serves `folder`; `status` answers everything with that status, `silent` with nothing; `asked` lists requests."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.status, self.silent = folder, 0, False
        self.ranges = True
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def do_GET(self) -> None:
        server = self.server
        server.asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        while server.silent:
            time.sleep(0.05)
        file = server.folder / self.path.split("?")[0].lstrip("/")
        if server.status or not file.is_file():
            self._answer(server.status or 404, b"")
            return
        data, wanted = file.read_bytes(), re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or not server.ranges:
            self._answer(200, data)
            return
        first, last = wanted.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            self._answer(416, b"")
            return
        self._answer(206, data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    do_HEAD = do_GET

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "ETag": '"1"', **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[FileServer]:
    """A server of `folder` on a free port, gone at the end."""
    with FileServer(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.silent = False
            server.shutdown()
