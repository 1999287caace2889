"""The edge: a raw ASGI layer around everything, so that nothing that reaches us is answered without being counted.

What is not HTTP, or far beyond our own limits (`gateway.headers`), does not: Granian answers it itself, with a 400, 414
or 431 that has no body and no id. Who sent it is not known, and nothing was done that could be billed.

It is not Litestar middleware because Litestar answers some errors outside of its middleware (and counts those
as 200). Per request it mints the id, times, counts, writes one access line, and appends one usage event.

The event is in the spool BEFORE `http.response.start` leaves: an answer a client has seen is an answer we can
bill, whatever dies afterwards. Every path ends in `_record` exactly once: at the start of the answer, or, when
there never was one (the client left, the worker is being stopped), as status 499. With `usage_durability = sync` the
answer waits first for its event to be durable, or becomes a 503 (`gateway.durable`).

A body has ended when as many bytes have come as were announced. Granian says so only when it is asked once more, which
is a second way through its two threads and back, a sixteenth of what a create costs (measured: 356 µs of CPU a create
at 2,500 a second, so 334). HTTP/2 is asked: there a stream that was not read to its end would be reset. A body that is
refused is read to its end all the same, within `DROP_BYTES` and `DROP_SECONDS`, before the answer begins.

HEAD is GET without the content (RFC 9110, section 9.3.2): whatever is below sees a GET and bills it as one; access line
and metrics say HEAD.

A request whose token was not accepted is counted but not timed: the histogram says how fast tenants are served, and who
invents key ids waits for keys (`gateway.jwks`) as long and as often as he likes.

A request that was passed on to another machine (`gateway.routing`) is that machine's request: there it is billed, timed
and counted, here it is one access line and one count of what was passed on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from gateway.access_log import AccessLog
from gateway.busiest import Busiest
from gateway.durable import GroupSync
from gateway.exchange import SCOPE_KEY, Exchange
from gateway.problems import CLIENT_LEFT, INTERNAL, MEDIA_TYPE, SPOOL_FULL, Problem, log_failure
from gateway.pulse import Pulse
from gateway.raw_body import announced_length, is_http2
from shared import metrics, usage
from shared.errors import SpoolUnavailable
from shared.log import get_logger
from shared.playbook.table import ACTIONS
from shared.spool import Spool
from shared.usage import UsageEvent

ROUTE_OF_TEMPLATE = {
    "/v1/memories": "/v1/memories",
    "/v1/memories/{memory_id}": "/v1/memories/{id}",
    "/v1/search": "/v1/search",
    "/v1/usage": "/v1/usage",
    "/v1/mcp": "/v1/mcp",
    "/health": "/health",
    "/ready": "/ready",
    "/metrics": "/metrics",
    "/schema": "/schema",
    "/schema/openapi.json": "/schema",
    **{f"/v1/admin/actions/{name}": "/admin/actions" for name in ACTIONS},
}
_METHODS = frozenset({"GET", "POST", "PATCH", "PUT", "DELETE", "HEAD", "OPTIONS"})
Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
DROP_BYTES = 8_388_608
DROP_SECONDS = 5.0
log = get_logger("gateway")


class Edge:
    """The ASGI application Granian serves: the edge around `app`."""

    def __init__(
        self,
        app: ASGIApp,
        spool: Spool,
        access_log: AccessLog,
        busiest: Busiest | None = None,
        pulse: Pulse | None = None,
        *,
        durable: bool = False,
    ) -> None:
        self._app = app
        self._spool = spool
        self._durable = GroupSync(spool) if durable else None
        self._begin, self._end = spool.unfinished.begin, spool.unfinished.end
        self._line = access_log.request
        self._busy = (busiest or Busiest()).count
        self._pulse = pulse
        self._open = 0
        # Children are looked up once: `labels()` costs more than the increment.
        self._counted: dict[tuple[str, str, int], Callable[[float], None]] = {}
        self._maintenance = {r: metrics.adder(metrics.maintenance_refused_total.labels(r)) for r in metrics.ROUTES}
        self._timed = {r: metrics.observer(metrics.request_duration_seconds.labels(r)) for r in metrics.ROUTES}
        self._routed = {how: metrics.adder(metrics.requests_routed_total.labels(how)) for how in metrics.ROUTED}

    def is_idle(self) -> bool:
        """Whether no request is here: each is from its whole head until its answer was passed on. From any thread."""
        return not self._open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        exchange = Exchange(method if method in _METHODS else "OTHER", scope["headers"], self._begin())
        scope[SCOPE_KEY] = exchange
        if is_head := method == "HEAD":
            scope["method"] = "GET"

        left: int | None = None  # of the body, bytes to come; below 0: nobody said how many; None: nobody asked for it

        async def read() -> Message:
            nonlocal left
            if left is None:
                left = -1 if is_http2(scope) else announced_length(scope) or -1
            message: Message = await receive()
            if exchange.whole and message["type"] == "http.request":  # the end that was left unread below
                message = await receive()
            if message.get("more_body", False):
                left -= len(message["body"])
                exchange.whole = left == 0
                message["more_body"] = not exchange.whole
            else:
                exchange.whole = True  # also when the client has left
            return message

        refused = b""  # the body of a problem that took the answer's place

        async def answer(message: Message) -> None:
            nonlocal refused
            if refused:
                return
            if message["type"] == "http.response.start":
                if self._durable is not None and exchange.reached:
                    refused = await self._bill_first(self._durable, exchange, scope, message)
                self._record(exchange, scope, exchange.outcome or message["status"])
                if message["status"] >= 400 and message["status"] != 408 and not exchange.whole:
                    await _drop_body(read, exchange, scope, begun=left is not None)
                if self._pulse is not None and self._pulse.leaving and scope["http_version"][0] == "1":
                    # The connection would be closed soon anyhow, perhaps just when its client has asked again.
                    exchange.headers.append((b"connection", b"close"))
                message["headers"] = [
                    *message.get("headers", ()),
                    *exchange.headers,
                    (b"x-request-id", exchange.request_id.encode("ascii")),
                ]
            elif is_head:
                message = {**message, "body": b""}
            await send(message)
            if refused:
                await send({"type": "http.response.body", "body": b"" if is_head else refused, "more_body": False})

        self._open += 1
        try:
            await self._app(scope, read, answer)
        except Exception as e:
            if exchange.status:  # the answer has begun: only the connection's end can still say that it failed
                if exchange.status != CLIENT_LEFT.status:
                    log.error("answer_failed", request_id=exchange.request_id, exc_info=e)
                raise
            log_failure(e, INTERNAL, exchange.request_id, exchange.tenant_id)
            await _send_internal_error(exchange, answer)
        finally:
            self._open -= 1
            if not exchange.status:
                self._record(exchange, scope, exchange.billed or CLIENT_LEFT.status)

    async def _bill_first(self, durable: GroupSync, exchange: Exchange, scope: Scope, message: Message) -> bytes:
        """Wait until the event is durable. When it cannot be, `message` becomes the start of a 503 whose body this
        is."""
        exchange.billed = exchange.outcome or message["status"]
        refusal = _event(exchange, scope, SPOOL_FULL.status)
        try:
            await durable.append(_event(exchange, scope, exchange.billed), refusal)
        except SpoolUnavailable as e:
            log.error("usage_not_durable", request_id=exchange.request_id, instead_of=exchange.billed, cause=str(e))
            exchange.billed, exchange.outcome, exchange.shed = SPOOL_FULL.status, 0, True
            start, body = _problem(SPOOL_FULL, exchange)
            message.update(start)
            return body
        return b""

    def _record(self, exchange: Exchange, scope: Scope, status: int) -> None:
        """The event, the counts and the access line of one request."""
        elapsed = time.perf_counter() - exchange.started
        exchange.status = status  # first: a failure below must not record a second time
        route = ROUTE_OF_TEMPLATE.get(scope.get("path_template", ""), "unmatched")
        tenant_id = exchange.tenant_id
        try:
            if exchange.reached and not exchange.billed:
                self._spool.append(_event(exchange, scope, status))
        finally:
            self._end(exchange.ticket)  # or nothing would be complete any more for as long as this worker lives
        if exchange.routed is not None:
            self._routed[exchange.routed](1.0)
        else:
            self._count(route, exchange, status)
            if not exchange.unproven:
                self._timed[route](elapsed)
            if tenant_id is not None:
                self._busy(tenant_id, elapsed, status)
        self._line(
            exchange.request_id,
            tenant_id,
            route,
            exchange.method,
            status,
            round(elapsed * 1_000, 3),
            scope.get("client"),
            exchange.client_request_id,
            exchange.auth_failure,
        )

    def _count(self, route: str, exchange: Exchange, status: int) -> None:
        key = (route, exchange.method, status)
        count = self._counted.get(key)
        if count is None:
            child = metrics.requests_total.labels(route, exchange.method, str(status))
            count = self._counted[key] = metrics.adder(child)
        count(1.0)
        if exchange.shed:
            metrics.shed_total.labels(route).inc()
        if exchange.maintenance:
            self._maintenance[route](1.0)
        if exchange.auth_failure is not None:
            metrics.auth_failures_total.labels(exchange.auth_failure).inc()


async def _drop_body(read: Receive, exchange: Exchange, scope: Scope, *, begun: bool) -> None:
    """Read a refused request to its end, within bounds: a client that is still writing when the connection
    closes, or its stream of HTTP/2 is reset, never sees why.

    One that asked first (`Expect`) has not begun to write, unless its body has `begun` to be read: that told it to.
    With HTTP/2 only Granian knows whether there is a body; when there is none it says so at once."""
    names = exchange.fields.keys()
    if b"expect" in names and not begun:
        return
    if not is_http2(scope) and not names & {b"content-length", b"transfer-encoding"}:
        return
    leave, exchange.leave = exchange.leave, None
    if leave is not None:  # the work is done: who lets a body hang that nobody wants has no place for it
        leave()
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DROP_SECONDS):
            while not exchange.whole and size <= DROP_BYTES:
                size += len((await read()).get("body", b""))


def _event(exchange: Exchange, scope: Scope, status: int) -> UsageEvent:
    """Of a request that reached its tenant."""
    route = ROUTE_OF_TEMPLATE.get(scope.get("path_template", ""), "unmatched")
    assert exchange.tenant_id is not None  # the guard set it
    counters = usage.count(route, status, exchange.created, exchange.searches)
    return UsageEvent(exchange.key, exchange.tenant_id, route, status, *counters, exchange.ts_us)


def _problem(problem: Problem, exchange: Exchange) -> tuple[Message, bytes]:
    """The start of an answer, and its body."""
    body = problem.body(exchange.request_id)
    more = [(name.lower().encode(), value.encode()) for name, value in problem.all_headers().items()]
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode()), *more]
    return {"type": "http.response.start", "status": problem.status, "headers": headers}, body


async def _send_internal_error(exchange: Exchange, answer: Send) -> None:
    start, body = _problem(INTERNAL, exchange)
    await answer(start)
    await answer({"type": "http.response.body", "body": body, "more_body": False})
