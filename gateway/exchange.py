"""One request and its answer, as the edge sees them: ids, clocks, and what the inner layers found out.

The edge makes an `Exchange` before anything else runs and hangs it on the ASGI scope; the guard writes who is
calling, a handler writes how many memories it made, and the edge turns all of it into one usage event, one
access line and one count.

Request ids are minted here (`shared.ids`). A client's own id is never a key: it could be repeated, and a repeated key
is lost usage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shared.ids import as_text, mint
from shared.limits import RouteClass

SCOPE_KEY = "engram.exchange"
CLIENT_REQUEST_ID_CHARS = 128


class Exchange:
    """Mutable on purpose: it is filled while the request runs. `status` is 0 until it was recorded."""

    __slots__ = (
        "auth_failure",
        "billed",
        "client_request_id",
        "created",
        "fields",
        "head",
        "headers",
        "key",
        "leave",
        "maintenance",
        "method",
        "outcome",
        "reached",
        "repeats",
        "request_id",
        "routed",
        "scopes",
        "searches",
        "shed",
        "started",
        "status",
        "subject",
        "tenant_id",
        "ticket",
        "ts_us",
        "unproven",
        "whole",
        "works_as",
    )

    def __init__(self, method: str, head: Sequence[tuple[bytes, bytes]] = (), ticket: int = 0) -> None:
        """`head` are the request's header fields as in the ASGI scope."""
        self.ticket = ticket  # of `shared.unfinished`, taken before the time
        now_ns = time.time_ns()
        self.key = key = mint(now_ns // 1_000_000)
        self.request_id = as_text(key)
        self.ts_us = now_ns // 1_000
        self.started = time.perf_counter()
        self.method = method
        self.head = head
        self.fields = dict(head)  # of one that comes twice the last
        self.repeats = len(self.fields) != len(head)  # some field comes twice
        self.client_request_id = _printable(self.first(b"x-request-id"))
        self.tenant_id: str | None = None
        self.reached = False  # the token was accepted and named an active tenant: this request is an event
        self.scopes: frozenset[str] = frozenset()  # the token's
        self.subject = ""  # of the token
        self.created = 0
        self.searches = 0  # by MCP tools; of a route the path says it
        self.outcome = 0  # the status of a tool error's problem, which MCP sends as a 200
        self.shed = False
        self.maintenance = False
        self.routed: str | None = None  # how it was passed on to another machine, which counts and bills it
        self.auth_failure: str | None = None
        self.unproven = False  # its token is being judged, or was not accepted
        self.status = 0
        self.billed = 0  # the status its event was given before it was recorded (`gateway.durable`)
        self.whole = False  # the request was read to its end
        self.headers: list[tuple[bytes, bytes]] = []  # of the answer, whatever it will be
        self.works_as: RouteClass | None = None  # a place of this class is to be taken once the body is there
        self.leave: Callable[[], None] | None = None  # gives back the place this request took (`gateway.shed`)

    def first(self, name: bytes) -> bytes | None:
        """The value of a header field; of one that comes twice the first."""
        value = self.fields.get(name)
        if value is None or not self.repeats:
            return value
        return next(value for each, value in self.head if each == name)

    def every(self, name: bytes) -> list[bytes]:
        """All values of a header field."""
        value = self.fields.get(name)
        if value is None:
            return []
        if not self.repeats:
            return [value]
        return [value for each, value in self.head if each == name]


def exchange_of(scope: Mapping[str, Any]) -> Exchange:
    """The exchange the edge hung on this scope."""
    exchange: Exchange = scope[SCOPE_KEY]
    return exchange


def _printable(value: bytes | None) -> str | None:
    """The client's own `X-Request-Id`, cut and stripped of what does not print: it goes into a log line."""
    if value is None:
        return None
    kept = bytes(b for b in value[:CLIENT_REQUEST_ID_CHARS] if 0x20 <= b < 0x7F)
    return kept.decode("ascii") or None
