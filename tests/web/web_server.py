"""A web server in this process that serves small files well or badly, as a test says."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Web:
    """What is served, and what was asked for.

    Attributes:
        files: path without the leading slash -> bytes.
        faults: what goes wrong with the next requests, one after the other: a status; "drop" (the
            connection ends half-way); "ignore range"; "wrong range"; None is nothing.
        lie: bytes that every announced length is wrong by.
        announce: whether lengths are told at all.
        ranges, agents: the headers of the requests so far.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[int | str | None] = field(default_factory=list)
    lie: int = 0
    announce: bool = True
    has_etag: bool = True
    retry_after: str | None = None
    ranges: list[str | None] = field(default_factory=list)
    agents: list[str | None] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    web: Web

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        web = self.web
        web.ranges.append(self.headers.get("Range"))
        web.agents.append(self.headers.get("User-Agent"))
        fault = web.faults.pop(0) if web.faults else None
        body = web.files.get(self.path.lstrip("/"))
        if isinstance(fault, int) or body is None:
            self._refuse(fault if isinstance(fault, int) else 404)
            return
        etag = '"' + hashlib.md5(body).hexdigest() + '"'
        start = self._start(etag, fault)
        if start is not None and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self._send(body, start, etag, fault)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if self.web.retry_after is not None:
            self.send_header("Retry-After", self.web.retry_after)
        self.end_headers()
        self.wfile.write(b"<html>no</html>")

    def _start(self, etag: str, fault: int | str | None) -> int | None:
        asked = self.headers.get("Range")
        if asked is None or fault == "ignore range" or self.headers.get("If-Range") != etag:
            return None
        return int(asked.removeprefix("bytes=").removesuffix("-"))

    def _send(self, body: bytes, start: int | None, etag: str, fault: int | str | None) -> None:
        rest = body[start or 0 :]
        self.send_response(200 if start is None else 206)
        if start is not None:
            shown = start - 1 if fault == "wrong range" else start
            total = len(body) + self.web.lie
            self.send_header("Content-Range", f"bytes {shown}-{len(body) - 1}/{total}")
        if self.web.announce:
            self.send_header("Content-Length", str(len(rest) + self.web.lie))
        if self.web.has_etag:
            self.send_header("ETag", etag)
        self.end_headers()
        self.wfile.write(rest[: len(rest) // 2] if fault == "drop" else rest)


@contextlib.contextmanager
def serving(**files: bytes) -> Iterator[Web]:
    """Serves files on a free port of this machine while the context lasts."""
    web = Web(files=dict(files))
    handler = type("Handler", (_Handler,), {"web": web})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        web.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()
