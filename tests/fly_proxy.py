"""A stand-in for Fly's proxy: what its documentation says of `fly-replay`, on one machine, over real sockets.

https://fly.io/docs/networking/dynamic-request-routing and …/request-headers: an answer of any status with `fly-replay`
is not passed on, its request is repeated at the named app with `fly-replay-src`; a request over 1 MB is an error
instead; when no connection to the app comes about, `fallback=force_self` brings the request back to the machine that
asked, with `fly-replay-failed`, and that machine cannot ask again. What the documentation leaves open is taken the way
that is harder for us: fields of these names that a client sends are passed on, and a chain of repeats is not stopped.
"""

from __future__ import annotations

import contextlib
import http.client
import time
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple

from tests.http_fixtures import Handler, Server

REPLAY_LIMIT_BYTES = 1_000_000
MOST_HOPS = 8  # only so that a test with a loop ends
_SET_BY_THE_PROXY = ("fly-client-ip", "fly-forwarded-port", "fly-region", "x-forwarded-proto", "via", "connection")


class Hop(NamedTuple):
    """One delivery of a request: to which app, the app's status (0: no connection), what was asked for, and what the
    app was told by the proxy."""

    app: str
    status: int
    replay: dict[str, str]
    head: dict[str, str]


class FlyProxy:
    """Clients connect to `url` and reach the app `entry`. `apps` maps names to ports; `hops` is of all requests."""

    def __init__(self, entry: str, apps: dict[str, int]) -> None:
        self.entry = entry
        self.apps = apps
        self.hops: list[Hop] = []
        proxy = self

        class Deliver(Handler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                proxy._serve(self)

            do_GET = do_POST = do_PATCH = do_DELETE = _any

        self._server = Server(Deliver)

    @property
    def url(self) -> str:
        return self._server.url

    def close(self) -> None:
        self._server.close()

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = _body(request)
        head = [(k, v) for k, v in request.headers.items() if k.lower() not in _SET_BY_THE_PROXY]
        head += [
            ("fly-client-ip", "192.0.2.7"),
            ("fly-region", "ams"),
            ("x-forwarded-proto", "https"),
            ("via", "2 fly.io"),
        ]
        size = len(request.requestline) + sum(len(k) + len(v) + 4 for k, v in head) + len(body)
        app, may_replay = self.entry, True
        told: dict[str, str] = {}
        source: tuple[str, dict[str, str]] | None = None  # who asked for the replay, and how
        for _ in range(MOST_HOPS):
            answer = self._deliver(app, request, [*head, *told.items()], body)
            replay = _fields(answer.getheader("fly-replay", "")) if answer is not None else {}
            self.hops.append(Hop(app, 0 if answer is None else answer.status, replay, told))
            if answer is None and source is not None and source[1].get("fallback") == "force_self":
                told = {
                    "fly-replay-failed": f"app={app};replay_source={source[0]};reason=retries_exhausted;elapsed_ms=9"
                }
                app, source, may_replay = source[0], None, False
                continue
            if answer is None:
                return _error(request, "no machine of the app could be reached")
            if not replay:
                return _pass_on(request, answer)
            if not may_replay or size > REPLAY_LIMIT_BYTES:
                return _error(request, "the request cannot be replayed")
            state = f";state={replay['state']}" if "state" in replay else ""
            told = {"fly-replay-src": f"instance=of-{app};region=ams;t={time.time_ns() // 1_000}{state}"}
            source = (app, replay)
            app = replay["app"]
        _error(request, "too many hops")

    def _deliver(
        self, app: str, request: BaseHTTPRequestHandler, head: list[tuple[str, str]], body: bytes
    ) -> http.client.HTTPResponse | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.apps.get(app, 1), timeout=30)
        try:
            connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in head:
                connection.putheader(name, value)
            connection.endheaders()
            if "chunked" in request.headers.get("transfer-encoding", ""):
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            with contextlib.suppress(OSError):  # the app may answer, and close, before it has read all
                connection.sock.sendall(body)
            answer = connection.getresponse()
            answer.whole = answer.read()  # type: ignore[attr-defined]
            return answer
        except ConnectionRefusedError:
            return None
        finally:
            connection.close()


def _fields(text: str) -> dict[str, str]:
    return dict(part.strip().split("=", 1) for part in text.split(";") if part.strip())


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in request.headers.get("transfer-encoding", ""):
        return request.rfile.read(int(request.headers.get("content-length", 0)))
    pieces = []
    while size := int(request.rfile.readline(), 16):
        pieces.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(pieces)


def _pass_on(request: BaseHTTPRequestHandler, answer: http.client.HTTPResponse) -> None:
    body: bytes = answer.whole  # type: ignore[attr-defined]
    request.send_response_only(answer.status)
    for name, value in answer.getheaders():
        if name.lower() not in ("connection", "transfer-encoding", "content-length"):
            request.send_header(name, value)
    request.send_header("content-length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def _error(request: BaseHTTPRequestHandler, what: str) -> None:
    """The proxy's own, no problem document."""
    request.send_response_only(502)
    request.send_header("content-type", "text/plain")
    request.send_header("content-length", str(len(what)))
    request.end_headers()
    request.wfile.write(what.encode())
