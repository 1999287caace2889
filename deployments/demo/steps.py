"""The steps of a demo. Each takes the `Stage` and adds rows to its table. What was billed is in `usage`."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import Callable
from typing import Any

from deployments.demo.client import mcp_session
from deployments.demo.stage import Actor, Stage, client_of, run_deployment
from shared import catalogue
from shared.errors import EngramError
from shared.tenant import TenantPaths

Advance = Callable[[], None]


def write(stage: Stage, advance: Advance) -> None:
    """Every memory of every conversation over REST, tenants side by side."""

    async def one(actor: Actor) -> None:
        async with client_of(stage, actor) as client:
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
        async with client_of(stage, actor) as client:
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
        async with mcp_session(url, actor.token, actor.counted) as mcp, client_of(stage, actor) as client:
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
        async with client_of(stage, victim) as client:
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
        async with client_of(stage, actor) as client:
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
