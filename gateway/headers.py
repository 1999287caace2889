"""What every request's head must look like, and what every answer's head carries.

A thin ASGI layer around the application, inside the edge: a head that is too large or names no host is refused
here before anything is routed (Granian itself refuses more than 100 fields, and far larger heads, with an empty
body). Answers get their fields through the exchange, so that the edge adds them to errors too.

CORS: a browser may call from the configured origins, with `cors_localhost` from any port of localhost too; a preflight
is answered here, without a token. Tokens travel in a header, never in a cookie: credentials are not allowed.

Behind trusted proxies the client's own address and scheme are put into the scope here, before anybody asks for them
(`gateway.proxies`). Outside dev a request of the API that came in plain text, to such a proxy or past it to us, is
refused: its token has been read by whoever listened, and HSTS promised otherwise. Only this machine itself may ask so.
No `Strict-Transport-Security` is sent over plain text (RFC 6797).

A path with repeated slashes is refused: Litestar would take it for the one with single ones, after everything here and
in front of us that goes by how a path begins took it for another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gateway.edge import ASGIApp, Receive, Scope, Send
from gateway.exchange import Exchange, exchange_of
from gateway.problems import MEDIA_TYPE, Problem
from gateway.proxies import Proxies, is_loopback
from shared.settings import Settings, words

MAX_FIELDS = 64
PREFLIGHT_SECONDS = 600
_LOCALHOST = re.compile(rb"http://(localhost|127\.0\.0\.1)(:\d{1,5})?\Z")
_METHODS = b"GET, POST, PATCH, DELETE"
# What the web clients of both revisions of MCP send; a browser sends none of them unless all are allowed.
_REQUEST_FIELDS = (
    b"Authorization, Content-Type, X-Request-Id, X-Engram-Tenant, Mcp-Protocol-Version, Mcp-Method, Mcp-Name, "
    b"Mcp-Session-Id, Last-Event-ID"
)
_ANSWER_FIELDS = (
    b"X-Request-Id, Retry-After, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, RateLimit-Policy, "
    b"X-Engram-Quota-Warning, WWW-Authenticate, Mcp-Session-Id"
)
REPEATED_SLASHES = Problem(404, "No path has repeated slashes.")
NO_HOST = Problem(400, "A request must name exactly one Host.")
FOREIGN_ORIGIN = Problem(403, "This origin may not call from a browser.")
PLAIN_TEXT = Problem(
    403, "This API is spoken over HTTPS alone; change the token that was sent.", reason="https required"
)


class Heads:
    """The ASGI application `app`, with heads checked and completed."""

    def __init__(self, app: ASGIApp, settings: Settings, methods: Mapping[str, Iterable[str]] | None = None) -> None:
        """`methods` of each path template, for OPTIONS."""
        self._app = app
        self._methods = {path: _with_head(those) for path, those in (methods or {}).items()}
        self._url_limit = settings.url_limit_bytes
        self._header_limit = settings.header_limit_bytes
        self._origins = frozenset(origin.rstrip("/").encode() for origin in words(settings.cors_allowed_origins))
        self._localhost = settings.cors_localhost
        self._proxies = Proxies(settings)
        self._proxied = bool(self._proxies)
        self._wants_tls = settings.env != "dev"
        always = [
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
        ]
        if self._localhost or self._origins:
            always.append((b"vary", b"Origin"))
        hsts = [(b"strict-transport-security", b"max-age=%d; includeSubDomains" % settings.hsts_seconds)]
        over_tls = [*always, *hsts] if self._wants_tls and settings.hsts_seconds else always
        no_store = (b"cache-control", b"no-store")
        # Each for other paths, and for those under /v1.
        self._over_tls = over_tls, [*over_tls, no_store]
        self._in_plain_text = always, [*always, no_store]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = exchange_of(scope)
        under_v1 = scope["path"].startswith("/v1/")
        peer = scope.get("client")
        proxied = self._proxied and self._proxies.settle(scope)
        if self._wants_tls and scope["scheme"] == "http":
            exchange.headers.extend(self._in_plain_text[under_v1])
            if under_v1 and (proxied or not is_loopback(peer)):
                await _refuse(PLAIN_TEXT, exchange.request_id, send)
                return
        else:
            exchange.headers.extend(self._over_tls[under_v1])
        fields = exchange.fields
        origin, asked = fields.get(b"origin"), fields.get(b"access-control-request-method")
        problem = self._problem(scope, exchange)
        allowed = origin is not None and self._allows(origin)
        if allowed and origin is not None:
            exchange.headers.append((b"access-control-allow-origin", origin))
            exchange.headers.append((b"access-control-expose-headers", _ANSWER_FIELDS))
        if problem is None and origin is not None and asked is not None and scope["method"] == "OPTIONS":
            if allowed:
                await _preflight(send)
                return
            problem = FOREIGN_ORIGIN
        if problem is not None:
            await _refuse(problem, exchange.request_id, send)
            return
        if scope["method"] == "OPTIONS":
            send = self._with_all_methods(scope, send)
        try:
            await self._app(scope, receive, send)
        finally:
            leave, exchange.leave = exchange.leave, None
            if leave is not None:
                leave()

    def _problem(self, scope: Scope, exchange: Exchange) -> Problem | None:
        fields, head = exchange.fields, exchange.head
        if exchange.repeats:
            size = sum(len(name) + len(value) for name, value in head)
        else:
            size = sum(map(len, fields)) + sum(map(len, fields.values()))
        if "//" in scope["path"]:
            return REPEATED_SLASHES
        if len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"]) > self._url_limit:
            return Problem(414, f"The URL is longer than {self._url_limit} bytes.")
        if size > self._header_limit:
            return Problem(431, f"The header fields are larger than {self._header_limit} bytes.")
        if len(head) > MAX_FIELDS:
            return Problem(431, f"There are more than {MAX_FIELDS} header fields.")
        # Granian gives a request without a Host an empty one. HTTP/2 names it in :authority.
        if not fields.get(b"host") and scope["http_version"] == "1.1":
            return NO_HOST
        if exchange.repeats and len(exchange.every(b"host")) > 1:
            return NO_HOST
        return None

    def _with_all_methods(self, scope: Scope, send: Send) -> Send:
        """Litestar's own answer to OPTIONS forgets the methods of all but a path's first handler."""

        async def answer(message: Any) -> None:
            methods = self._methods.get(scope.get("path_template", ""))
            if methods and message["type"] == "http.response.start" and message["status"] < 300:
                others = [(k, v) for k, v in message["headers"] if k.lower() != b"allow"]
                message["headers"] = [*others, (b"allow", ", ".join(methods).encode())]
            await send(message)

        return answer

    def _allows(self, origin: bytes) -> bool:
        return origin in self._origins or (self._localhost and _LOCALHOST.match(origin) is not None)


def _with_head(methods: Iterable[str]) -> list[str]:
    return sorted({*methods, "HEAD"} if "GET" in methods else methods)


async def _preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-allow-headers", _REQUEST_FIELDS),
        (b"access-control-max-age", b"%d" % PREFLIGHT_SECONDS),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _refuse(problem: Problem, request_id: str, send: Send) -> None:
    body = problem.body(request_id)
    headers: list[Any] = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
