"""Errors as RFC 9457 problem documents: one table from every error of the core to a status.

A client gets `type, title, status, detail, request_id`, on 429/503 also `retry_after` (and the `Retry-After`
header), and a `reason` where a program may want to branch (`gateway.schemas.ProblemView` says where that is). Details
say what the caller can do; causes (paths, SQLite messages, stack traces) go to the log under the same request id.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request
from litestar.exceptions import HTTPException, ValidationException
from litestar.response import Response

from gateway.exchange import exchange_of
from shared import errors
from shared.log import get_logger

MEDIA_TYPE = "application/problem+json"
log = get_logger("gateway")


@dataclass(frozen=True, slots=True)
class Problem:
    status: int
    detail: str
    reason: str | None = None
    retry_after: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self, request_id: str) -> bytes:
        title = "Client Closed Request" if self.status == 499 else HTTPStatus(self.status).phrase
        document: dict[str, Any] = {
            "type": "urn:engram:problem:" + (self.reason or title).lower().replace(" ", "-").replace("'", ""),
            "title": title,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }
        if self.reason is not None:
            document["reason"] = self.reason
        if self.retry_after is not None:
            document["retry_after"] = self.retry_after
        return msgspec.json.encode(document | self.extra)

    def all_headers(self) -> dict[str, str]:
        if self.retry_after is None:
            return self.headers
        return {**self.headers, "Retry-After": str(self.retry_after)}


class Refusal(Exception):
    """The gateway itself refuses a request, with this problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class Detour(Exception):
    """Not refused: answered by this ASGI application instead of the route's handler."""

    def __init__(self, app: Any) -> None:
        super().__init__("answered elsewhere")
        self.app = app


class _Detoured(Response[bytes]):
    """The answer of a `Detour`, for whoever expects a response."""

    def __init__(self, app: Any) -> None:
        super().__init__(b"")
        self._app = app

    def to_asgi_response(self, *_: Any, **__: Any) -> Any:
        return self._app


def bad_request(detail: str) -> Refusal:
    return Refusal(Problem(400, detail))


def forbidden(detail: str) -> Refusal:
    return Refusal(Problem(403, detail))


def shed(detail: str) -> Refusal:
    """Work was refused because the queue in front of it is full."""
    return Refusal(Problem(503, detail, reason="shed", retry_after=1))


MAINTENANCE = Problem(503, "The tenant is under maintenance.", reason="maintenance", retry_after=1)
DATABASE = Problem(503, "The tenant's database is unavailable.", reason="tenant database unavailable", retry_after=5)
SPOOL_FULL = Problem(503, "Usage cannot be recorded at the moment.", reason="spool full", retry_after=1)
CONTROL_PLANE = Problem(503, "The control plane did not answer.", reason="control plane unavailable", retry_after=5)
NO_SPACE = Problem(507, "There is no space left to store this.")
INACTIVE_TENANT = Problem(403, "The token's tenant is not active here.")
CLIENT_LEFT = Problem(499, "The client closed the connection before its request was whole.")
BROKEN_BODY = Problem(400, "The body ended before it was whole.")
INTERNAL = Problem(500, "The request failed; the cause is in the log under this request id.")


def problem_of(e: BaseException) -> Problem:
    """What the caller is told about this exception."""
    match e:
        case Refusal():
            return e.problem
        case errors.InMaintenance():
            return MAINTENANCE
        case errors.SpoolUnavailable():
            return SPOOL_FULL
        case errors.TenantDatabaseUnavailable():
            return NO_SPACE if _is_no_space(e) else DATABASE
        case errors.CorruptDatabase() | errors.SchemaTooNew():
            return DATABASE
        case errors.ControlPlaneUnavailable():
            return CONTROL_PLANE
        case errors.BadSearchQuery():
            return Problem(400, f"The search query is not valid: {e}")
        case errors.UnknownMemory():
            return Problem(404, "There is no such memory.")
        case errors.UnknownTenant() | errors.TenantNotActive() | errors.UnsafeTenantId():
            return INACTIVE_TENANT
        case errors.Transient():
            return Problem(503, "The request cannot be served at the moment.", reason="unavailable", retry_after=1)
        case HTTPException() if e.status_code < 500:
            return _of_litestar(e)
        case _:
            return INTERNAL


def answer(request: Request[Any, Any, Any], e: Exception) -> Response[bytes]:
    """Litestar's exception handler for everything; logs what an operator must see."""
    if isinstance(e, Detour):
        return _Detoured(e.app)
    problem = problem_of(e)
    exchange = exchange_of(request.scope)
    if problem is CLIENT_LEFT:  # counted as that; who is still there (its chunks were malformed) reads this
        exchange.outcome, problem = CLIENT_LEFT.status, BROKEN_BODY
    exchange.shed = problem.reason in ("shed", "spool full")
    exchange.maintenance = problem is MAINTENANCE
    if problem.status >= 500 and problem is not MAINTENANCE and not isinstance(e, Refusal):
        log_failure(e, problem, exchange.request_id, exchange.tenant_id)
    return Response(
        problem.body(exchange.request_id),
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers=problem.all_headers(),
    )


def log_failure(e: BaseException, problem: Problem, request_id: str, tenant_id: str | None) -> None:
    """One line with the cause; with a stack trace when nobody foresaw the error."""
    if problem is INTERNAL:
        log.error("request_failed", request_id=request_id, tenant_id=tenant_id, exc_info=e)
    else:
        log.error(
            "request_refused",
            request_id=request_id,
            tenant_id=tenant_id,
            status=problem.status,
            reason=problem.reason,
            error=type(e).__name__,
            cause=str(e)[:500],
        )


def _of_litestar(e: HTTPException) -> Problem:
    detail = e.detail
    if isinstance(e, ValidationException):
        # Litestar's own detail repeats the URL; its `extra` names the parameter and what is wrong with it.
        found = [f"{x['key']}: {x['message']}" for x in _dicts(e.extra) if "key" in x and "message" in x]
        detail = "; ".join(found) or "The request is not valid."
    elif e.status_code in (404, 405):
        detail = "There is nothing at this path." if e.status_code == 404 else "This path has no such method."
    return Problem(e.status_code, detail, headers=dict(e.headers or {}))


def _dicts(extra: object) -> list[dict[str, Any]]:
    return [x for x in extra if isinstance(x, dict)] if isinstance(extra, list) else []


def _is_no_space(e: BaseException) -> bool:
    code = getattr(e.__cause__, "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_FULL
