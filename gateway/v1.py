"""The REST interface under /v1. A handler says which scope it needs and which job runs on which connection.

Answers are encoded where the rows are read, in the thread, and sent as they are.
"""

from __future__ import annotations

import base64
import hashlib
import re
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec
from litestar import Response, Router, delete, get, patch, post
from litestar.openapi import ResponseSpec
from litestar.params import Parameter

from gateway.body import JsonRequest
from gateway.exchange import exchange_of
from gateway.guard import guard
from gateway.problems import MEDIA_TYPE, bad_request
from gateway.schemas import (
    CreateMemory,
    MemoryPage,
    MemoryView,
    ProblemView,
    Search,
    SearchResults,
    UpdateMemory,
    UsageView,
)
from gateway.services import Services, services_of
from shared.engine import memories
from shared.engine.memories import Changes, NewMemory
from shared.engine.search import search
from shared.errors import UnknownMemory
from shared.usage_report import Granularity

_JSON = "application/json"
_MEMORY_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_HOURLY_WINDOW = timedelta(days=92)  # some 300 KB
_CURSOR = re.compile(r"[A-Za-z0-9_-]{22}\Z")
_encode = msgspec.json.Encoder().encode

_PROBLEMS = {
    400: "The request is not valid.",
    401: "No valid token; the body is the same whatever the cause.",
    403: "The token lacks the scope, or its tenant is suspended, unknown, or not the one in X-Engram-Tenant.",
    404: "There is no such memory.",
    408: "The body did not arrive in time.",
    411: "The tenant's data is on another machine, and a body of unknown length cannot be passed on to it.",
    413: "The body is too large.",
    415: "The body is not JSON, or has a `Content-Encoding`.",
    421: "The tenant's data is on another machine, to which this one passes nothing on.",
    429: "The tenant's rate limit is reached, or too many bad tokens came from this address.",
    500: "The request failed.",
    502: "The tenant's machine gave no whole answer; whether the request was carried out is not known.",
    503: "Maintenance, overload, an unavailable machine, database, control plane or usage spool; see `reason`.",
    507: "There is no space left.",
}


def _answers(status: int, view: type[msgspec.Struct] | None, *problems: int) -> dict[int, ResponseSpec]:
    """What a route answers, for the OpenAPI document: one success and the problems it shares with all. Which answer 402
    the document knows from what they cost."""
    specs: dict[int, ResponseSpec] = {}
    if view is not None:
        specs[status] = ResponseSpec(view, generate_examples=False, description="Success.")
    problems += (411,) if 413 in problems else ()
    for problem in sorted({400, 401, 403, 421, 429, 500, 502, 503, *problems}):
        specs[problem] = ResponseSpec(
            ProblemView, media_type=MEDIA_TYPE, generate_examples=False, description=_PROBLEMS[problem]
        )
    return specs


def _tenancy(request: JsonRequest) -> tuple[Services, str]:
    tenant_id = exchange_of(request.scope).tenant_id
    assert tenant_id is not None  # the guard set it
    return services_of(request), tenant_id


class Encoded(Response[bytes]):
    """A JSON answer whose body is ready. Litestar's `__init__` looks at each argument's type first, 2 of 50 µs."""

    __slots__ = ()

    def __init__(self, content: bytes, status_code: int) -> None:
        self.content = content
        self.status_code = status_code
        self.media_type = _JSON
        self.encoding = "utf-8"
        self.background = None
        self.cookies = []
        self.headers = {}
        self.response_type_encoders = {}


def _answer(body: bytes, status: int = 200) -> Response[bytes]:
    return Encoded(body, status)


def known_form(text: str) -> str:
    """A malformed id is an id nobody has: 404, and nothing strange reaches SQLite."""
    if not _MEMORY_ID.match(text):
        raise UnknownMemory("malformed id")
    return text


def listed(
    connection: sqlite3.Connection, tenant_id: str, limit: int, before: int | None, tag: str | None, limit_bytes: int
) -> dict[str, Any]:
    """A `MemoryPage`, to be encoded."""
    page = memories.page(connection, limit=limit, before_seq=before, tag=tag, limit_bytes=limit_bytes)
    following = cursor_of(page.next_seq, tenant_id, tag) if page.next_seq is not None else None
    return {"memories": page.memories, "next_cursor": following}


def found(connection: sqlite3.Connection, data: Search, limit_bytes: int) -> dict[str, Any]:
    """`SearchResults`, to be encoded."""
    hits = search(
        connection,
        data.query,
        limit=data.limit,
        tags=data.tags,
        memory_type=data.memory_type,
        limit_bytes=limit_bytes,
    )
    return {"results": hits, "count": len(hits)}


@post("/memories", opt={"scope": "memories:write"}, responses=_answers(201, MemoryView, 408, 413, 415, 507))
async def create_memory(request: JsonRequest, data: CreateMemory) -> Response[bytes]:
    """Store a memory."""
    services, tenant_id = _tenancy(request)
    new = NewMemory(data.content, data.memory_type, data.tags, data.metadata, data.importance)
    memory = await services.pool.write(tenant_id, memories.Creation(new))
    exchange_of(request.scope).created = 1
    return _answer(_encode(memory), 201)


@get("/memories", opt={"scope": "memories:read"}, responses=_answers(200, MemoryPage))
async def list_memories(
    request: JsonRequest,
    limit: Annotated[int, Parameter(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Parameter(max_length=64)] = None,
    tag: Annotated[str | None, Parameter(max_length=128)] = None,
) -> Response[bytes]:
    """The newest memories first, all of them or those with a tag. A page of long memories has fewer than `limit`:
    the list ends where `next_cursor` is null, nowhere else."""
    services, tenant_id = _tenancy(request)
    limit_bytes = services.settings.answer_limit_bytes
    before = seq_of(cursor, tenant_id, tag) if cursor is not None else None

    def job(connection: sqlite3.Connection) -> bytes:
        return _encode(listed(connection, tenant_id, limit, before, tag, limit_bytes))

    return _answer(await services.pool.read(tenant_id, job, brief=True))


@get("/memories/{memory_id:str}", opt={"scope": "memories:read"}, responses=_answers(200, MemoryView, 404))
async def get_memory(request: JsonRequest, memory_id: str) -> Response[bytes]:
    services, tenant_id = _tenancy(request)
    key = known_form(memory_id)
    memory = await services.pool.look_up(tenant_id, lambda connection: memories.get(connection, key))
    return _answer(_encode(memory))


@patch(
    "/memories/{memory_id:str}",
    opt={"scope": "memories:write"},
    responses=_answers(200, MemoryView, 404, 408, 413, 415, 507),
)
async def update_memory(request: JsonRequest, memory_id: str, data: UpdateMemory) -> Response[bytes]:
    """Change the given fields; the earlier version is kept."""
    services, tenant_id = _tenancy(request)
    key = known_form(memory_id)
    changes = Changes(data.content, data.memory_type, data.tags, data.metadata, data.importance)
    memory = await services.pool.write(tenant_id, lambda connection: memories.update(connection, key, changes))
    return _answer(_encode(memory))


@delete("/memories/{memory_id:str}", opt={"scope": "memories:write"}, responses=_answers(204, None, 404, 507))
async def delete_memory(request: JsonRequest, memory_id: str) -> None:
    """Remove a memory with all its versions."""
    services, tenant_id = _tenancy(request)
    key = known_form(memory_id)
    await services.pool.write(tenant_id, lambda connection: memories.delete(connection, key))


@post("/search", opt={"scope": "search"}, status_code=200, responses=_answers(200, SearchResults, 408, 413, 415))
async def search_memories(request: JsonRequest, data: Search) -> Response[bytes]:
    """Full-text search, best match first. Of long memories fewer than `limit` are returned: those that match best."""
    services, tenant_id = _tenancy(request)
    limit_bytes = services.settings.answer_limit_bytes

    def job(connection: sqlite3.Connection) -> bytes:
        return _encode(found(connection, data, limit_bytes))

    return _answer(await services.pool.read(tenant_id, job))


@get("/usage", responses=_answers(200, UsageView))
async def get_usage(
    request: JsonRequest,
    since: Annotated[str | None, Parameter(query="from", max_length=64, description="ISO 8601")] = None,
    until: Annotated[str | None, Parameter(query="to", max_length=64, description="ISO 8601")] = None,
    granularity: Annotated[Granularity, Parameter(description="Of the buckets, in UTC.")] = "day",
) -> Response[bytes]:
    """The tenant's own counters, in sum and by hour or day; by default this UTC month until now."""
    services, tenant_id = _tenancy(request)
    now = datetime.now(UTC)
    first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    begin = _time(since, "from") if since is not None else first
    end = _time(until, "to") if until is not None else now + timedelta(hours=1)
    if begin >= end:
        raise bad_request("`from` must be before `to`.")
    if granularity == "hour" and end - begin > _HOURLY_WINDOW:
        raise bad_request(f"By hour at most {_HOURLY_WINDOW.days} days can be asked for.")
    return _answer(_encode(await services.usage.of(tenant_id, begin, end, granularity)))


def _time(text: str, name: str) -> datetime:
    """ISO 8601; UTC when it names no offset. A `+` that was not percent-encoded arrives as a space."""
    for candidate in (text, text.replace(" ", "+")):
        try:
            time = datetime.fromisoformat(candidate)
            return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).astimezone(UTC)
        except (ValueError, OverflowError):
            continue
    raise bad_request(f"`{name}` must be a time in ISO 8601.")


def cursor_of(seq: int, tenant_id: str, tag: str | None) -> str:
    """A position in one tenant's list for one tag. The checksum catches accidents and tampering alike; there is
    nothing to keep secret: a position opens nothing that the token does not open."""
    position = seq.to_bytes(8, "big")
    return base64.urlsafe_b64encode(position + _checksum(position, tenant_id, tag)).rstrip(b"=").decode()


def seq_of(cursor: str, tenant_id: str, tag: str | None) -> int:
    if _CURSOR.match(cursor):
        raw = base64.urlsafe_b64decode(cursor + "==")
        seq = int.from_bytes(raw[:8], "big")
        if raw[8:] == _checksum(raw[:8], tenant_id, tag) and cursor_of(seq, tenant_id, tag) == cursor:
            return seq
    raise bad_request("The cursor is not one of this list.")


def _checksum(position: bytes, tenant_id: str, tag: str | None) -> bytes:
    scope = "" if tag is None else f"#{tag}"
    return hashlib.sha256(b"\n".join((position, tenant_id.encode(), scope.encode()))).digest()[:8]


def router() -> Router:
    handlers: list[Any] = [
        create_memory,
        list_memories,
        get_memory,
        update_memory,
        delete_memory,
        search_memories,
        get_usage,
    ]
    return Router(
        "/v1",
        route_handlers=handlers,
        before_request=guard,
        request_class=JsonRequest,
        security=[{"bearer": []}],
    )
