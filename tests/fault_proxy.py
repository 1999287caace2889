"""A proxy before a real S3 that spoils chosen requests, and sees all of them."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"


class Request(NamedTuple):
    method: str
    path: str


@dataclass
class Fault:
    """What happens to a request: answered with `status` instead of being passed on, or passed on and spoiled.

    `lose` is "request" (closed before it is passed on), "reply" (passed on, its answer dropped) or "silence".
    `cut` answers with half a body, `flip` is the body ("request" or "reply") of which one byte is turned. `rate` is the
    bytes a second of an answer's body; 0 is no limit.
    """

    status: int = 0
    code: str = "InternalError"
    message: str = "told to"
    headers: dict[str, str] = field(default_factory=dict)
    lose: str = ""
    cut: bool = False
    flip: str = ""
    rate: int = 0


@dataclass
class FaultProxy:
    url: str
    seen: list[Request] = field(default_factory=list)
    _choose: Callable[[str, str], Fault | None] = lambda _method, _path: None

    def fail(self, fault: Fault, *, method: str = "", times: int = 1_000_000, containing: str = "") -> None:
        """Spoil the next `times` requests of this method whose path and query contain a text."""
        left = [times]

        def choose(asked: str, path: str) -> Fault | None:
            if method not in ("", asked) or containing not in path or left[0] <= 0:
                return None
            left[0] -= 1
            return fault

        self.seen.clear()
        self._choose = choose

    def count(self, method: str) -> int:
        return sum(request.method == method for request in self.seen)


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    target = urlsplit(upstream).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy._choose(self.command, self.path) or Fault()
            proxy.seen.append(Request(self.command, self.path))
            self._answer(fault, body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

        def _answer(self, fault: Fault, body: bytes) -> None:
            if fault.status:
                return self._send(
                    fault.status, fault.headers, ERROR.format(code=fault.code, message=fault.message).encode(), False
                )
            if fault.lose == "request":
                return self._hang_up()
            if fault.lose == "silence":
                time.sleep(3)
                return self._hang_up()
            if fault.flip == "request" and body:
                body = _flipped(body)
            connection = http.client.HTTPConnection(target, timeout=30)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body)
                reply = connection.getresponse()
                content = reply.read()
            finally:
                connection.close()
            if fault.lose == "reply":
                return self._hang_up()
            if fault.flip == "reply" and content:
                content = _flipped(content)
            headers = {n: v for n, v in reply.getheaders() if n.lower() not in ("transfer-encoding", "connection")}
            return self._send(reply.status, headers, content, fault.cut, fault.rate)

        def _send(self, status: int, headers: dict[str, str], content: bytes, cut: bool, rate: int = 0) -> None:
            self.send_response_only(status)
            if self.command != "HEAD":
                headers = {n: v for n, v in headers.items() if n.lower() != "content-length"}
                headers["Content-Length"] = str(len(content))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                content = content[: len(content) // 2] if cut else content
                piece = max(1, rate // 10) if rate else len(content) or 1
                for at in range(0, len(content), piece):
                    self.wfile.write(content[at : at + piece])
                    time.sleep(0.1 if rate else 0)
            if cut:
                self._hang_up()

        def _hang_up(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: object) -> None:
            pass  # clients that gave up

    server = Server(("127.0.0.1", 0), Handler)
    proxy = FaultProxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _flipped(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
