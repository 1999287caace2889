"""The tools: what each takes, gives, needs and does. Nothing here knows of MCP's wire.

A tool takes what its REST route takes, by the same structs, draws on the same pool and is refused for the same
reasons: its scope, an operator's shedding of its class of routes, the quotas of its counters. What it made or searched
goes into the exchange, and from there into the request's one usage event.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec

from gateway import v1, whole
from gateway.exchange import Exchange
from gateway.limits import Cost, cost_of
from gateway.mcp.arguments import (
    BATCH,
    Created,
    CreateMemories,
    Deleted,
    ListMemories,
    MemoryById,
    NoArguments,
    Stats,
    UpdateMemoryById,
)
from gateway.mcp.filling import Result
from gateway.problems import CLIENT_LEFT, SPOOL_FULL, Refusal, bad_request, forbidden
from gateway.quota import WARNING_HEADER
from gateway.ratelimit import TOO_MANY_REQUESTS, too_many
from gateway.schemas import (
    CreateMemory,
    MemoryPage,
    MemoryView,
    Search,
    SearchResults,
)
from gateway.services import Services
from shared.engine import memories
from shared.engine.memories import Changes, NewMemory
from shared.engine.schema import schema_version
from shared.storage import kept_bytes


class Call(NamedTuple):
    """Who calls, and what the call may reach for."""

    services: Services
    exchange: Exchange

    @property
    def tenant_id(self) -> str:
        assert self.exchange.tenant_id is not None  # the guard set it
        return self.exchange.tenant_id


class Tool(NamedTuple):
    """`cost` is the one of the REST route that does the same."""

    name: str
    description: str
    scope: str
    cost: Cost
    takes: type[msgspec.Struct]
    gives: type[msgspec.Struct]
    run: Callable[[Call, Any], Awaitable[Result]]


async def run(tool: Tool, call: Call, arguments: dict[str, Any]) -> Result:
    """Raises what a REST handler raises; `gateway.problems.problem_of` says what the caller is told."""
    if tool.scope not in call.exchange.scopes:
        raise forbidden(f"The token lacks the scope {tool.scope}.")
    if tool.cost.rate == "write" and not call.services.spool.takes_writes:
        raise Refusal(SPOOL_FULL)
    try:
        taken = whole.convert(arguments, tool.takes)
    except (msgspec.ValidationError, RecursionError) as e:
        raise bad_request(f"The arguments are not valid: {str(e)[:300]}") from None
    parts = len(taken.memories) if isinstance(taken, CreateMemories) else 1
    _check_rate(tool.cost, call, parts)
    _check_quota(tool.cost, call, parts)
    await change_place(tool.cost, call)
    return await tool.run(call, taken)


def _check_rate(cost: Cost, call: Call, parts: int) -> None:
    """What the guard could not know: of which class the request is, and of how many parts. One place of the tenant's
    rate it has taken; what it said of the rest is no longer true."""
    call.services.gate.check(cost.route_class)
    decision = call.services.rates.within(call.tenant_id, cost.rate, parts)
    if decision is None:
        return
    headers = call.exchange.headers
    headers[:] = [*(field for field in headers if not field[0].startswith(b"ratelimit-")), *decision.headers()]
    if decision.never:
        most = decision.bucket.size
        raise bad_request(
            f"A batch of {parts} is more than the tenant's rate limit ever allows: at most {most} at once."
        )
    if not decision.allowed:
        raise Refusal(too_many(decision, TOO_MANY_REQUESTS))


def _check_quota(cost: Cost, call: Call, memories: int) -> None:
    """That of api_calls was the guard's."""
    counters = [counter for counter in cost.counters if counter != "api_calls"]
    warning = call.services.quotas.check(call.tenant_id, counters, memories) if counters else None
    if warning is not None:
        call.exchange.headers.append((WARNING_HEADER, warning))


async def change_place(cost: Cost, call: Call) -> None:
    """Give the guard's place back for one of the tool's class, so that searches go first here too. The SDK runs a tool
    in a task of its own, which may outlive its request: nobody would give back what is taken then."""
    exchange = call.exchange
    leave, exchange.leave = exchange.leave, None
    if leave is None:
        raise Refusal(CLIENT_LEFT)
    leave()
    leave = await call.services.gate.enter(call.tenant_id, cost.route_class)
    if exchange.status:
        leave()
        raise Refusal(CLIENT_LEFT)
    exchange.leave = leave


def _new(data: CreateMemory) -> NewMemory:
    return NewMemory(data.content, data.memory_type, data.tags, data.metadata, data.importance)


async def _create(call: Call, data: CreateMemory) -> Result:
    new = _new(data)
    made = await call.services.pool.write(call.tenant_id, memories.Creation(new))
    call.exchange.created = 1
    return Result.of(made)


async def _create_batch(call: Call, data: CreateMemories) -> Result:
    """One job is one transaction: all or nothing."""
    new = [_new(each) for each in data.memories]

    def job(connection: sqlite3.Connection) -> Result:
        return Result.of({"memories": memories.create_all(connection, new), "count": len(new)})

    made = await call.services.pool.write(call.tenant_id, job)
    call.exchange.created = len(new)
    return made


async def _get(call: Call, data: MemoryById) -> Result:
    key = v1.known_form(data.id)
    return await call.services.pool.look_up(call.tenant_id, lambda c: Result.of(memories.get(c, key)))


async def _update(call: Call, data: UpdateMemoryById) -> Result:
    key = v1.known_form(data.id)
    changes = Changes(data.content, data.memory_type, data.tags, data.metadata, data.importance)
    return await call.services.pool.write(call.tenant_id, lambda c: Result.of(memories.update(c, key, changes)))


async def _delete(call: Call, data: MemoryById) -> Result:
    key = v1.known_form(data.id)
    await call.services.pool.write(call.tenant_id, lambda c: memories.delete(c, key))
    return Result.of({"id": key, "deleted": True})


async def _list(call: Call, data: ListMemories) -> Result:
    limit_bytes = call.services.settings.answer_limit_bytes
    before = v1.seq_of(data.cursor, call.tenant_id, data.tag) if data.cursor is not None else None

    def job(connection: sqlite3.Connection) -> Result:
        return Result.of(v1.listed(connection, call.tenant_id, data.limit, before, data.tag, limit_bytes))

    return await call.services.pool.read(call.tenant_id, job, brief=True)


async def _search(call: Call, data: Search) -> Result:
    limit_bytes = call.services.settings.answer_limit_bytes

    found = await call.services.pool.read(call.tenant_id, lambda c: Result.of(v1.found(c, data, limit_bytes)))
    call.exchange.searches = 1
    return found


async def _stats(call: Call, _: NoArguments) -> Result:
    def job(connection: sqlite3.Connection) -> Result:
        by_type = memories.count_by_type(connection)
        total = sum(by_type.values())
        return Result.of(Stats(total, by_type, schema_version(connection), kept_bytes(connection)))

    return await call.services.pool.read(call.tenant_id, job)


_READ, _WRITE = "memories:read", "memories:write"
_CREATE_COST = cost_of("POST", "/v1/memories")
_LIST_COST = cost_of("GET", "/v1/memories")
_BY_ID = "/v1/memories/{memory_id}"

TOOLS = {
    tool.name: tool
    for tool in (
        Tool("memory_create", "Store a memory.", _WRITE, _CREATE_COST, CreateMemory, MemoryView, _create),
        Tool(
            "memory_create_batch",
            f"Store 1 to {BATCH} memories in one transaction: all of them or, when one is not valid, none.",
            _WRITE,
            _CREATE_COST,
            CreateMemories,
            Created,
            _create_batch,
        ),
        Tool("memory_get", "Read one memory.", _READ, cost_of("GET", _BY_ID), MemoryById, MemoryView, _get),
        Tool(
            "memory_update",
            "Change the given fields of a memory; the others stay. The earlier version is kept.",
            _WRITE,
            cost_of("PATCH", _BY_ID),
            UpdateMemoryById,
            MemoryView,
            _update,
        ),
        Tool(
            "memory_delete",
            "Remove a memory with all its versions.",
            _WRITE,
            cost_of("DELETE", _BY_ID),
            MemoryById,
            Deleted,
            _delete,
        ),
        Tool(
            "memory_list",
            "The newest memories first, all of them or those with a tag; `next_cursor` continues the list, also after a"
            " page that is short because its memories are long.",
            _READ,
            _LIST_COST,
            ListMemories,
            MemoryPage,
            _list,
        ),
        Tool(
            "memory_search",
            'Full-text search, best match first. Words are combined with AND; OR, NOT, NEAR, "a phrase" and'
            " prefix* are understood (SQLite FTS5).",
            "search",
            cost_of("POST", "/v1/search"),
            Search,
            SearchResults,
            _search,
        ),
        Tool(
            "memory_stats",
            "How many memories there are, how many of each type, and how many bytes they take.",
            _READ,
            _LIST_COST,
            NoArguments,
            Stats,
            _stats,
        ),
    )
}
