"""Quotas: never applied too early, exact over drains, and never the reason that a request waits for PostgreSQL."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gateway.problems import Refusal
from gateway.quota import CountingSpool, Quotas
from shared import metering, registry, storage
from shared.control_plane import ControlPlane
from shared.ids import mint
from shared.settings import Settings
from shared.tenant import TenantPaths
from shared.usage import UsageEvent
from tests.gateway_stack import Stack, assert_problem, eventually, gateway, stack  # noqa: F401


@pytest.fixture
def control_plane(control_plane_url: str) -> Iterator[ControlPlane]:
    with ControlPlane(Settings(control_plane_url=control_plane_url)) as opened:  # type: ignore[arg-type]
        yield opened


def plan(control_plane: ControlPlane, plan_id: str, tenant_id: str, **limits: int) -> None:
    """Give the tenant a plan with these limits."""
    with control_plane.transaction() as connection:
        connection.execute("INSERT INTO plans (plan_id) VALUES (%s) ON CONFLICT DO NOTHING", (plan_id,))
        for column, value in limits.items():
            connection.execute(f"UPDATE plans SET {column} = %s WHERE plan_id = %s", (value, plan_id))  # type: ignore[arg-type]
        connection.execute("UPDATE tenants SET plan_id = %s WHERE tenant_id = %s", (plan_id, tenant_id))


def event(tenant_id: str, api_calls: int = 1, created: int = 0) -> UsageEvent:
    now = time.time()
    return UsageEvent(mint(int(now * 1e3)), tenant_id, "/v1/memories", 200, api_calls, 0, created, int(now * 1e6))


def current_of(quotas: Quotas, tenant_id: str) -> int:
    with pytest.raises(Refusal) as refused:
        quotas.check(tenant_id, ("api_calls",))
    current: int = refused.value.problem.extra["current"]
    return current


def test_own_events_are_counted_once_before_and_after_they_are_drained(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    """Appending, sealing, draining and refreshing in every order: what is judged is what happened, to the event."""
    settings = Settings(
        data_dir=tmp_path,
        control_plane_url="x",  # type: ignore[arg-type]
        usage_flush_events=3,
        usage_flush_seconds=0.001,
    )
    for tenant in ("acme", "other"):
        registry.create(control_plane, settings, tenant)
    plan(control_plane, "none-allowed", "acme", api_calls_hard=0)

    async def test() -> None:
        spool = CountingSpool(settings)
        quotas = spool.quotas = Quotas(control_plane, settings)

        async def refresh() -> None:
            await asyncio.to_thread(quotas.refresh)
            await asyncio.sleep(0)

        await refresh()
        total = 0
        for turn in range(30):
            for _ in range(turn % 4):
                spool.append(event("acme"))
                spool.append(event("other"))
                total += 1
            assert current_of(quotas, "acme") == total
            if turn % 3 == 0:
                await asyncio.sleep(0.002)
                spool.tick()
            if turn % 5 == 0:
                list(metering.drain_all(control_plane, settings))
            assert current_of(quotas, "acme") == total
            if turn % 2 == 0:
                await refresh()
            assert current_of(quotas, "acme") == total
        assert quotas.check("other", ("api_calls",)) is None
        spool.close()
        list(metering.drain_all(control_plane, settings))
        await refresh()
        assert current_of(quotas, "acme") == total and not quotas._own

    asyncio.run(test())


def test_what_is_not_known_refuses_nobody(
    control_plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first snapshot and after the last one grew old."""
    settings = Settings(data_dir=tmp_path, control_plane_url="x", quota_stale_seconds=60)  # type: ignore[arg-type]
    registry.create(control_plane, settings, "acme")
    plan(control_plane, "none-allowed", "acme", api_calls_hard=0, storage_bytes_soft=1)
    now = [100.0]
    monkeypatch.setattr("gateway.quota.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def test() -> None:
        quotas = Quotas(control_plane, settings)
        assert quotas.check("acme", ("api_calls",)) is None
        await asyncio.to_thread(quotas.refresh)
        await asyncio.sleep(0)
        now[0] += 60
        with pytest.raises(Refusal):
            quotas.check("acme", ("api_calls",))
        warning = quotas.check("acme", ("storage_bytes",))
        assert warning is not None and warning.startswith(b"storage_bytes; current=")
        now[0] += 0.1
        assert quotas.check("acme", ("api_calls",)) is None

    asyncio.run(test())


def test_a_month_ends_with_the_month(control_plane: ControlPlane, tmp_path: Path) -> None:
    """Earlier months do not count; a suspended tenant and one without limits are not even read."""
    settings = Settings(data_dir=tmp_path, control_plane_url="x")  # type: ignore[arg-type]
    for tenant in ("acme", "free", "gone"):
        registry.create(control_plane, settings, tenant)
        with control_plane.transaction() as connection:
            connection.execute(
                "INSERT INTO usage_daily (tenant_id, bucket, api_calls) VALUES"
                " (%(t)s, date_trunc('month', now(), 'UTC'), 5),"
                " (%(t)s, date_trunc('month', now(), 'UTC') - interval '1 day', 1000)",
                {"t": tenant},
            )
    for tenant in ("acme", "gone"):
        plan(control_plane, "small", tenant, api_calls_hard=5)
    registry.suspend(control_plane, "gone")
    rows = control_plane.rows("quota_usage", segments=[])
    assert [(r["tenant_id"], r["api_calls"], r["api_calls_hard"], r["search_queries_hard"]) for r in rows] == [
        ("acme", 5, 5, None)
    ]


def test_a_hard_quota_is_402_with_its_numbers_and_a_soft_one_a_header(stack: Stack) -> None:  # noqa: F811
    """Only what draws on that counter is refused; a plan changed in the control plane works within seconds."""
    tenant, other = stack.tenant(), stack.tenant()
    plan(stack.control_plane, "three", tenant, memories_created_soft=1, memories_created_hard=3)
    data_dir = stack.lend_tenants(stack.settings.data_dir.parent / "quotas")
    with gateway(
        data_dir, stack.control_plane_url, stack.issuer, gateway_workers=1, quota_refresh_seconds=0.2
    ) as served:
        api = served.client
        mine: dict[str, Any] = {"headers": stack.headers(tenant)}
        made = []

        def create() -> int:
            made.append(api.post("/v1/memories", json={"content": "x"}, **mine))
            return made[-1].status_code

        eventually(lambda: create() == 402)
        assert [r.status_code for r in made] == [201] * (len(made) - 1) + [402]
        created = len(made) - 1
        assert created >= 3, "the first ones may have come before the snapshot"
        document = assert_problem(made[-1], 402)
        assert (document["metric"], document["limit"]) == ("memories_created", 3)
        assert 3 <= document["current"] <= created
        assert served.metric("engram_quota_exceeded_total", counter="memories_created") == 1
        if created == 3:
            assert "x-engram-quota-warning" in made[2].headers
        assert "memories_created" in made[-1].json()["metric"]
        path = f"/v1/memories/{made[0].json()['id']}"
        assert api.get(path, **mine).status_code == 200
        assert api.patch(path, json={"content": "y"}, **mine).status_code == 200
        assert api.delete(path, **mine).status_code == 204
        assert api.get("/v1/usage", **mine).status_code == 200
        assert api.post("/v1/memories", json={"content": "x"}, headers=stack.headers(other)).status_code == 201

        plan(stack.control_plane, "three", tenant, memories_created_hard=1_000)
        eventually(lambda: create() == 201)
        assert made[-1].headers["x-engram-quota-warning"].startswith("memories_created; current=")


def test_in_shadow_a_hard_quota_warns_counts_and_refuses_nobody(stack: Stack) -> None:  # noqa: F811
    """As staging runs, to see whom prod would refuse: REST and MCP go on, each request over the limit is counted."""
    tenant = stack.tenant()
    plan(stack.control_plane, "shadowed", tenant, memories_created_hard=0)
    data_dir = stack.lend_tenants(stack.settings.data_dir.parent / "shadowed-quotas")
    settings = {"gateway_workers": 1, "quota_refresh_seconds": 0.2, "quota_mode": "shadow"}
    with gateway(data_dir, stack.control_plane_url, stack.issuer, **settings) as served:

        def shadowed() -> float:
            return served.metric("engram_quota_shadowed_total", counter="memories_created")

        def create() -> httpx.Response:
            made = served.client.post("/v1/memories", json={"content": "x"}, headers=stack.headers(tenant))
            assert made.status_code == 201, made.text
            return made

        eventually(lambda: "x-engram-quota-warning" in create().headers)
        counted = shadowed()
        assert counted >= 1
        warning = create().headers["x-engram-quota-warning"]
        assert warning.startswith("memories_created; current=") and warning.endswith("limit=0")
        assert shadowed() == counted + 1
        call = {"name": "memory_create", "arguments": {"content": "x"}}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
        accept = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-11-25"}
        answer = served.client.post("/v1/mcp", json=message, headers=stack.headers(tenant) | accept)
        assert answer.status_code == 200 and not answer.json()["result"].get("isError"), answer.text
        assert shadowed() == counted + 2
        assert served.metric("engram_quota_exceeded_total", counter="memories_created") == 0
        found = served.client.get("/v1/usage", headers=stack.headers(tenant))
        assert found.status_code == 200 and "x-engram-quota-warning" not in found.headers


def test_who_deletes_gets_out_of_a_full_storage_quota(stack: Stack) -> None:  # noqa: F811
    """Without anybody's help, as soon as the next look at it; and all who tell the number tell the same one."""
    tenant = stack.tenant()
    limit = 600_000
    plan(stack.control_plane, "small-storage", tenant, storage_bytes_hard=limit)
    data_dir = stack.lend_tenants(stack.settings.data_dir.parent / "storage-quotas")
    with gateway(data_dir, stack.control_plane_url, stack.issuer, quota_refresh_seconds=0.2) as served:
        api = served.client
        mine: dict[str, Any] = {"headers": stack.headers(tenant)}
        made = []

        def create() -> httpx.Response:
            words = " ".join(secrets.token_hex(4) for _ in range(2_000))
            answer = api.post("/v1/memories", json={"content": words}, **mine)
            if answer.status_code == 201:
                made.append(answer.json()["id"])
            return answer

        refused = eventually(lambda: answer if (answer := create()).status_code == 402 else None)
        document = assert_problem(refused, 402)
        assert (document["metric"], document["limit"]) == ("storage_bytes", limit)
        assert document["current"] >= limit and made
        for memory_id in made:
            assert api.delete(f"/v1/memories/{memory_id}", **mine).status_code == 204
        eventually(lambda: create().status_code == 201)
        kept = api.get("/v1/usage", **mine).json()["storage_bytes"]
        assert kept < limit
        storage.measure(stack.control_plane, stack.settings)
        day = api.get("/v1/usage", params={"granularity": "day"}, **mine).json()
        assert [bucket["storage_bytes"] for bucket in day["buckets"]][-1] == day["storage_bytes"] == kept


def test_a_wal_fills_no_storage_quota(stack: Stack) -> None:  # noqa: F811
    """It is ours: pages a second time, however little is kept."""
    tenant = stack.tenant()
    limit = 200_000
    plan(stack.control_plane, "tiny-storage", tenant, storage_bytes_soft=limit, storage_bytes_hard=limit)
    data_dir = stack.lend_tenants(stack.settings.data_dir.parent / "wal-quotas")
    paths = TenantPaths.of(stack.settings.tenants_dir, tenant)
    with gateway(data_dir, stack.control_plane_url, stack.issuer, quota_refresh_seconds=0.1) as served:
        mine: dict[str, Any] = {"headers": stack.headers(tenant)}

        def create_and_delete() -> None:
            made = served.client.post("/v1/memories", json={"content": "x"}, **mine)
            assert made.status_code == 201 and "x-engram-quota-warning" not in made.headers, made.text
            assert served.client.delete(f"/v1/memories/{made.json()['id']}", **mine).status_code == 204

        while storage.volume_bytes(paths) < 4 * limit:
            create_and_delete()
        for _ in range(3):
            time.sleep(0.3)
            create_and_delete()


def test_a_database_that_cannot_be_read_is_not_the_reason_that_others_are_not_judged(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    """It counts as it did in the turn before, and as nothing in the first one."""
    settings = Settings(data_dir=tmp_path, control_plane_url="x")  # type: ignore[arg-type]
    tenants = ("broken", "gone", "whole")
    for tenant in tenants:
        registry.create(control_plane, settings, tenant)
        plan(control_plane, "one-byte", tenant, storage_bytes_hard=1)
    broken = TenantPaths.of(settings.tenants_dir, "broken").database.resolve()
    shutil.rmtree(TenantPaths.of(settings.tenants_dir, "gone").root)

    def refused(quotas: Quotas) -> list[str]:
        found = []
        for tenant in tenants:
            try:
                quotas.check(tenant, ("storage_bytes",))
            except Refusal:
                found.append(tenant)
        return found

    async def test() -> None:
        quotas = Quotas(control_plane, settings)
        for of in (quotas, quotas, Quotas(control_plane, settings)):
            await asyncio.to_thread(of.refresh)
            await asyncio.sleep(0)
            assert refused(of) == (["broken", "whole"] if of is quotas else ["whole"])
            broken.write_bytes(b"no database" * 1_000)

    asyncio.run(test())
