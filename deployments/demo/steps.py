"""The steps of a demo. Each takes the `Stage` (the stack, its tenants, the table) and adds rows to the table."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from deployments.demo.checks import Checks
from deployments.demo.client import Counted, TenantClient, mcp_session
from deployments.demo.corpus import Conversation
from deployments.issuer import mint
from deployments.prefect_api import PrefectApi, Run
from shared import catalogue, registry
from shared.control_plane import ControlPlane
from shared.errors import EngramError
from shared.objects import ObjectStore
from shared.settings import Settings
from shared.tenant import TenantPaths

SCOPES = ("memories:read", "memories:write", "search")
_TOKEN_TTL_SECONDS = 3_600
_USAGE_WAIT_SECONDS = 60.0
Advance = Callable[[], None]


@dataclass(slots=True)
class Actor:
    """One tenant of the demo: its conversation, its client's counts, what the gateway acknowledged."""

    tenant_id: str
    conversation: Conversation
    token: str
    counted: Counted = field(default_factory=Counted)
    acknowledged: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class Stage:
    settings: Settings
    control_plane: ControlPlane
    prefect: PrefectApi
    objects: ObjectStore
    checks: Checks
    actors: list[Actor]

    @property
    def victim(self) -> Actor:
        return self.actors[0]


def cast(settings: Settings, control_plane: ControlPlane, conversations: list[Conversation]) -> list[Actor]:
    """Make one tenant a conversation; ids carry the time, so that a demo can be repeated on one stack."""
    run = format(int(time.time()), "x")
    actors = []
    for conversation in conversations:
        name = "".join(c if c.isalnum() else "-" for c in conversation.name.lower())[:40].strip("-") or "tenant"
        tenant_id = f"demo-{name}-{run}"
        registry.create(control_plane, settings, tenant_id)
        token, _ = mint(settings, tenant_id, SCOPES, ttl_seconds=_TOKEN_TTL_SECONDS)
        actors.append(Actor(tenant_id, conversation, token))
    return actors


@asynccontextmanager
async def _client(stage: Stage, actor: Actor) -> AsyncIterator[TenantClient]:
    limits = httpx.Limits(max_connections=16)
    async with httpx.AsyncClient(base_url=stage.settings.gateway_url, timeout=30.0, limits=limits) as http:
        yield TenantClient(http, actor.tenant_id, actor.token, actor.counted)


def write(stage: Stage, advance: Advance) -> None:
    """Every memory of every conversation over REST, tenants side by side."""

    async def one(actor: Actor) -> None:
        async with _client(stage, actor) as client:
            actor.acknowledged = await client.create_all(actor.conversation.memories, advance)

    async def everyone() -> None:
        await asyncio.gather(*(one(actor) for actor in stage.actors))

    asyncio.run(everyone())
    stage.checks.equal(
        "memories acknowledged by the gateway",
        sum(len(a.conversation.memories) for a in stage.actors),
        sum(len(a.acknowledged) for a in stage.actors),
    )


def use(stage: Stage, advance: Advance) -> None:
    """Searches, reads, updates and deletes; another tenant's memory must not be seen, a bad query is a 400."""

    async def one(actor: Actor, stranger: Actor) -> bool:
        async with _client(stage, actor) as client:
            query, content = actor.conversation.distinctive()
            answer = await client.search(query)
            found = [hit["memory"]["content"] for hit in answer["results"]] == [content]
            for word in actor.conversation.common_words(10):
                await client.search(word)
            await client.search('"unbalanced', expect=400)
            first, second, third, *_ = actor.acknowledged
            await client.call("GET", f"/v1/memories/{first}", expect=200, route="/v1/memories/{id}")
            path = f"/v1/memories/{second}"
            changed = await client.call("PATCH", path, expect=200, json={"importance": 0.9}, route="/v1/memories/{id}")
            actor.acknowledged[second] = changed
            await client.call("DELETE", f"/v1/memories/{third}", expect=204, route="/v1/memories/{id}")
            del actor.acknowledged[third]
            await client.call("GET", f"/v1/memories/{third}", expect=404, route="/v1/memories/{id}")
            if stranger is not actor:
                other = next(iter(stranger.acknowledged))
                await client.call("GET", f"/v1/memories/{other}", expect=404, route="/v1/memories/{id}")
            advance()
            return found

    async def everyone() -> list[bool]:
        others = stage.actors[1:] + stage.actors[:1]
        return [await one(actor, other) for actor, other in zip(stage.actors, others, strict=True)]

    found = asyncio.run(everyone())
    stage.checks.equal("tenants whose search finds the one right memory", len(stage.actors), sum(found))


def use_mcp(stage: Stage, advance: Advance) -> None:
    """Each tenant as an agent would: store, search and read with the official MCP client; REST sees the same."""

    async def one(actor: Actor) -> bool:
        url = stage.settings.gateway_url
        async with mcp_session(url, actor.token, actor.counted) as mcp, _client(stage, actor) as client:
            made = await mcp.call("memory_create", content=f"stored by {actor.tenant_id} over MCP", tags=["mcp"])
            batch = [{"content": f"one of several, number {n}", "tags": ["mcp"]} for n in range(3)]
            several = await mcp.call("memory_create_batch", memories=batch)
            for memory in (made, *several["memories"]):
                actor.acknowledged[memory["id"]] = memory
            found = await mcp.call("memory_search", query=f'"{actor.tenant_id}"', tags=["mcp"])
            read = await mcp.call("memory_get", id=made["id"])
            stats = await mcp.call("memory_stats")
            path = f"/v1/memories/{made['id']}"
            same = await client.call("GET", path, expect=200, route="/v1/memories/{id}")
            advance()
            return [hit["memory"] for hit in found["results"]] == [made] == [read] == [same] and stats[
                "memories"
            ] == len(actor.acknowledged)

    async def everyone() -> list[bool]:
        return [await one(actor) for actor in stage.actors]

    served = asyncio.run(everyone())
    stage.checks.equal("tenants served over MCP, with what REST reads", len(stage.actors), sum(served))


def run_deployment(stage: Stage, deployment: str, parameters: dict[str, Any]) -> tuple[Run, str]:
    """Start a deployment and wait for its end; the run and "completed", or its cause."""
    run = stage.prefect.start(deployment, parameters)
    try:
        return stage.prefect.finish(run), "completed"
    except EngramError as e:
        return run, str(e)


def back_up(stage: Stage) -> None:
    """The `backup` deployment for every tenant of the demo; each object is read back and hashed here."""
    ids = [actor.tenant_id for actor in stage.actors]
    run, outcome = run_deployment(stage, "backup/backup", {"tenants": ids, "all": False, "kind": "manual"})
    stage.checks.equal("backup run", "completed", outcome, run.url)
    whole = 0
    for actor in stage.actors:
        try:
            backup = catalogue.newest(stage.control_plane, actor.tenant_id)
            digest, _ = stage.objects.sha256(backup.key)
        except EngramError:
            continue
        whole += digest == backup.sha256 and backup.manifest["memories"] == len(actor.acknowledged)
    stage.checks.equal("backups whole in the store, with every memory", len(stage.actors), whole, run.url)


def damage(stage: Stage) -> None:
    """Delete rows behind the gateway's back, then overwrite the middle of the database file."""
    paths = TenantPaths.of(stage.settings.tenants_dir, stage.victim.tenant_id)
    half = len(stage.victim.acknowledged) // 2
    connection = sqlite3.connect(paths.database, timeout=30, isolation_level=None)
    connection.execute("DELETE FROM memories WHERE seq IN (SELECT seq FROM memories ORDER BY seq LIMIT ?)", (half,))
    left = connection.execute("SELECT count(*) FROM memories").fetchone()[0]
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    stage.checks.equal("memories left after rows were deleted", len(stage.victim.acknowledged) - half, left)
    with paths.database.open("r+b") as file:
        size = paths.database.stat().st_size
        file.seek(4096)
        file.write(b"\xde\xad\xbe\xef" * ((size - 4096) // 8))
    stage.checks.equal("the damaged file passes an integrity check", "no", _intact(paths))


def _intact(paths: TenantPaths) -> str:
    try:
        connection = sqlite3.connect(f"{paths.database.as_uri()}?mode=ro", uri=True)
        try:
            return "yes" if connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",) else "no"
        finally:
            connection.close()
    except sqlite3.DatabaseError:
        return "no"


def restore(stage: Stage) -> None:
    """The `restore` deployment for the damaged tenant; then every memory is compared over REST."""
    victim = stage.victim
    paths = TenantPaths.of(stage.settings.tenants_dir, victim.tenant_id)
    before = hashlib.sha256(paths.database.read_bytes()).hexdigest()
    run, outcome = run_deployment(
        stage,
        "restore/restore",
        {"tenant_id": victim.tenant_id, "reason": "demo: damaged on purpose", "requested_by": "engram demo"},
    )
    stage.checks.equal("restore run", "completed", outcome, run.url)
    done = stage.prefect.completed_steps(run.id, count=6)
    steps = [name for name in done if name != "safety-backup"]  # there is none of a database that cannot be read
    stage.checks.equal("its steps", "plan download lock swap verify release", " ".join(steps), run.url)

    async def compare() -> dict[str, dict[str, Any]]:
        async with _client(stage, victim) as client:
            found = await client.all_memories()
            query, _ = victim.conversation.distinctive()
            await client.search(query)
            return found

    found = asyncio.run(compare())
    same = sum(found.get(key) == memory for key, memory in victim.acknowledged.items())
    stage.checks.equal("memories back, equal to the letter", len(victim.acknowledged), same, run.url)
    stage.checks.equal("memories that should not be there", 0, len(found.keys() - victim.acknowledged.keys()), run.url)
    kept = hashlib.sha256(paths.backup.read_bytes()).hexdigest() if paths.backup.exists() else "missing"
    stage.checks.equal("the damaged file is kept as engram.db.bak", before[:16], kept[:16])
    stage.checks.equal("restored database passes an integrity check", "yes", _intact(paths))


def others_untouched(stage: Stage) -> None:
    """Every other tenant still has exactly what it was acknowledged."""

    async def one(actor: Actor) -> bool:
        async with _client(stage, actor) as client:
            return await client.all_memories() == actor.acknowledged

    same = [asyncio.run(one(actor)) for actor in stage.actors[1:]]
    stage.checks.equal("other tenants untouched", len(stage.actors) - 1, sum(same))


def drill(stage: Stage) -> None:
    """The `restore-test` deployment; its row in PostgreSQL is what counts."""
    tenant_id = stage.actors[-1].tenant_id
    run, outcome = run_deployment(stage, "restore-test/restore-test", {"tenant_id": tenant_id})
    stage.checks.equal("restore test run", "completed", outcome, run.url)
    with stage.control_plane.transaction() as connection:
        row = connection.execute(
            "SELECT outcome FROM restore_tests WHERE flow_run_id = %s AND tenant_id = %s", (run.id, tenant_id)
        ).fetchone()
    stage.checks.equal("its row in restore_tests", "pass", row["outcome"] if row else "missing", run.url)


def usage(stage: Stage, link: Callable[[], str]) -> None:
    """Wait until what the clients counted is in PostgreSQL; then events and both rollups must equal it."""
    expected = {a.tenant_id: (a.counted.requests, *_billed(a.counted)) for a in stage.actors}
    deadline = time.monotonic() + _USAGE_WAIT_SECONDS
    while (seen := _events(stage)) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    metering = link()
    for position, name in enumerate(("requests", "api_calls", "search_queries", "memories_created")):
        want = sum(row[position] for row in expected.values())
        have = sum(row[position] for row in seen.values())
        what = "requests the clients sent = usage events" if name == "requests" else f"{name}: clients = events"
        stage.checks.equal(what, want, have, metering)
    stage.checks.equal(
        "tenants whose usage is exact", len(expected), sum(seen.get(t) == row for t, row in expected.items())
    )
    billed = {tenant: row[1:] for tenant, row in expected.items()}
    for table in ("usage_hourly", "usage_daily"):
        rollup = _rollup(stage, table)
        exact = sum(rollup.get(tenant) == row for tenant, row in billed.items())
        stage.checks.equal(f"tenants whose {table} is exact", len(billed), exact, metering)


def _billed(counted: Counted) -> tuple[int, int, int]:
    return counted.api_calls, counted.search_queries, counted.memories_created


def _events(stage: Stage) -> dict[str, tuple[int, ...]]:
    return _sums(
        stage,
        "SELECT tenant_id, count(*), sum(api_calls), sum(search_queries), sum(memories_created)"
        " FROM usage_events WHERE tenant_id = ANY (%s) GROUP BY tenant_id",
    )


def _rollup(stage: Stage, table: str) -> dict[str, tuple[int, ...]]:
    select = "SELECT tenant_id, sum(api_calls), sum(search_queries), sum(memories_created) FROM "
    where = " WHERE tenant_id = ANY (%s) GROUP BY tenant_id"
    return _sums(stage, select + ("usage_hourly" if table == "usage_hourly" else "usage_daily") + where)


def _sums(stage: Stage, statement: Any) -> dict[str, tuple[int, ...]]:
    from psycopg.rows import tuple_row

    with stage.control_plane.transaction() as connection, connection.cursor(row_factory=tuple_row) as cursor:
        rows = cursor.execute(statement, ([a.tenant_id for a in stage.actors],)).fetchall()
    return {tenant: tuple(int(value) for value in values) for tenant, *values in rows}


def metering_link(stage: Stage) -> str:
    """The newest metering run's page."""
    return stage.prefect.newest_run_url("metering")
