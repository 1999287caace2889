"""Asking another machine's gateway for its answer, over the private network (`gateway.routing` says when and whom).

The body is read to its end first, under the limits of any other: a slow client waits here, not there. The answer is
passed on as it comes, with that gateway's own fields and request id, the id under which it is billed there. The request
goes out once: one that failed before it was sent says 503, one whose answer broke off says 502, because nobody here
knows whether it was done.

Of the head everything goes on but what belongs to the connection and what is Fly's. `x-engram-forwarded-by` marks the
request as passed on. The client's address goes on in `ENGRAM_CLIENT_ADDRESS_HEADER`, which the other gateway believes
if this machine is in its `ENGRAM_TRUSTED_PROXIES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import httpx

from gateway import raw_body
from gateway.edge import ASGIApp, Receive, Scope, Send
from gateway.exchange import exchange_of
from gateway.patience import Patience
from gateway.problems import BROKEN_BODY, CLIENT_LEFT, MEDIA_TYPE, Problem, Refusal, bad_request, shed
from shared import metrics
from shared.log import get_logger
from shared.settings import Settings

FORWARDED_BY = b"x-engram-forwarded-by"
AT_ONCE = 64  # of one worker; more are shed
OF_A_MACHINE = 32  # of these: one that hangs must not keep the others' requests out
OF_A_TENANT = 16
CONNECT_SECONDS = 5.0
IDLE_SECONDS = 5.0  # less than the other gateway keeps an idle connection: a write must not meet one that is closing
_OF_THE_CONNECTION = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade host expect content-length".split()
)
_NOT_PASSED_BACK = _OF_THE_CONNECTION - {b"content-length"} | {b"date", b"server", b"x-request-id"}
UNREACHABLE = Problem(
    503, "The tenant's machine cannot be reached at the moment.", reason="machine unreachable", retry_after=5
)
BROKE_OFF = Problem(
    502, "The tenant's machine gave no whole answer; whether the request was carried out is not known.",
    reason="machine broke off",
)  # fmt: skip
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
log = get_logger("routing")


class Forwarder:
    """For one event loop."""

    def __init__(self, settings: Settings, patience: Patience) -> None:
        self._settings = settings
        self._patience = patience
        # Made here, which takes tens of milliseconds, not by the first request; most gateways never forward.
        self._client = self._connect() if settings.routing != "off" else None
        self._under_way: dict[str, int] = {}
        self._address_field = settings.client_address_header.lower().encode()
        of_proxies = (b"forwarded", b"x-forwarded-for", b"x-forwarded-proto", self._address_field)
        self._dropped = {*_OF_THE_CONNECTION, *of_proxies, FORWARDED_BY}

    def to(self, url: str) -> ASGIApp:
        """An application that answers a request with what the gateway at `url` answers."""

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                tenant_id = exchange_of(scope).tenant_id or ""
                body = await self._body(receive, tenant_id)  # a slow client takes none of the places
                with self._place({"all": AT_ONCE, f"of {tenant_id}": OF_A_TENANT, f"at {url}": OF_A_MACHINE}):
                    await self._forward(url, scope, body, send)
            except Refusal as e:
                await _refuse(e.problem, scope, send)

        return application

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    @contextmanager
    def _place(self, bounds: dict[str, int]) -> Iterator[None]:
        """Apart from the places of what is served here (`gateway.shed`). Raises a `Refusal` when all are taken."""
        under_way = self._under_way
        if any(under_way.get(who, 0) >= bound for who, bound in bounds.items()):
            raise shed("Too many requests wait for another machine.")
        for who in bounds:
            under_way[who] = under_way.get(who, 0) + 1
        try:
            yield
        finally:
            for who in bounds:
                under_way[who] -= 1
                if not under_way[who]:
                    del under_way[who]

    async def _body(self, receive: Receive, tenant_id: str) -> bytes:
        seconds = self._settings.body_timeout_seconds
        try:
            reading = raw_body.read(receive, self._settings.body_limit_bytes)
            return await self._patience.wait(reading, seconds, tenant_id)
        except TimeoutError:
            raise Refusal(raw_body.too_late(seconds)) from None

    async def _forward(self, url: str, scope: Scope, body: bytes, send: Send) -> None:
        assert self._client is not None  # nobody is sent here while routing is off
        head, target = self._head(scope, body), {"target": _target(scope)}
        request = httpx.Request(scope["method"], url, headers=head, content=body, extensions=target)
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.LocalProtocolError:  # nothing was sent; it quotes the field, which may be the token
            raise bad_request("The head has a field that cannot be passed on.") from None
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as e:
            raise self._refusal(UNREACHABLE, e) from e
        except httpx.HTTPError as e:
            raise self._refusal(BROKE_OFF, e) from e
        exchange = exchange_of(scope)
        try:
            exchange.routed = "forward"
            exchange.headers.clear()  # the other gateway said them
            exchange.request_id = answer.headers.get("x-request-id", exchange.request_id)
            head = [(k.lower(), v) for k, v in answer.headers.raw]
            head = [(k, v) for k, v in head if k not in _NOT_PASSED_BACK]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": head})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await answer.aclose()

    def _connect(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            timeout=httpx.Timeout(self._settings.routing_timeout_seconds, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=AT_ONCE, keepalive_expiry=IDLE_SECONDS),
            trust_env=False,
        )

    def _head(self, scope: Scope, body: bytes) -> list[tuple[bytes, bytes]]:
        # HTTP/2 leaves the blanks around a value, HTTP/1.1 must not have them.
        passed = ((k, v.strip(b" \t")) for k, v in scope["headers"])
        head = [(k, v) for k, v in passed if k not in self._dropped and not k.startswith(b"fly-")]
        head += self._origin(scope)
        head += [(k, v) for k, v in scope["headers"] if k == b"host"]
        head.append((FORWARDED_BY, self._settings.machine_id.encode("ascii", "replace")))
        if body or scope["method"] in ("POST", "PUT", "PATCH"):
            head.append((b"content-length", b"%d" % len(body)))
        return head

    def _origin(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Who asked, and by which scheme, in the field that the other gateway reads (`gateway.proxies`)."""
        client, scheme = scope.get("client"), scope["scheme"].encode("ascii")
        address = b"" if client is None else client[0].encode("ascii", "replace")
        if self._address_field == b"forwarded":
            return [(b"forwarded", b'for="%s";proto=%s' % (b"[%s]" % address if b":" in address else address, scheme))]
        named = [(self._address_field, address)] if address else []
        return [*named, (b"x-forwarded-proto", scheme)]

    @staticmethod
    def _refusal(problem: Problem, e: httpx.HTTPError) -> Refusal:
        metrics.requests_unrouted_total.labels("unreachable").inc()
        log.error("request_not_forwarded", error=type(e).__name__, cause=str(e)[:300])
        return Refusal(problem)


def _target(scope: Scope) -> bytes:
    """The client's path and query as they came, to the setting's host: no part of them can name another. httpx would
    resolve `.` and `..` in it, and refuse what is not ASCII, which HTTP/1.1 has to have escaped."""
    path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    query: bytes = scope["query_string"]
    return quote(path + (b"?" + query if query else b""), safe=_PRINTABLE).encode()


async def _refuse(problem: Problem, scope: Scope, send: Send) -> None:
    exchange = exchange_of(scope)
    if problem is CLIENT_LEFT:  # as `gateway.problems.answer` does
        exchange.outcome, problem = CLIENT_LEFT.status, BROKEN_BODY
    exchange.shed = problem.reason == "shed"
    body = problem.body(exchange.request_id)
    headers = [(k.lower().encode(), v.encode()) for k, v in problem.all_headers().items()]
    headers += [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
