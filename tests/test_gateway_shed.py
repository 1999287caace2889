"""Overload: bounded work, the expensive first to go, and slow queries are cut."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.problems import Refusal
from gateway.shed import TOO_SLOW, Gate, bounded
from shared.limits import Watch, clear, set_limit
from shared.settings import Settings
from tests.gateway_stack import Stack, assert_problem, eventually, gateway, new_key, stack  # noqa: F401


def with_gate(tmp_path: Path, test: Callable[[Gate], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        configured = Settings(data_dir=tmp_path, **settings)
        await asyncio.wait_for(test(Gate(configured, Watch(configured))), 20)

    asyncio.run(run())


def test_under_overload_searches_go_first_and_lookups_last(tmp_path: Path) -> None:
    """Each class may fill only its share of the places."""

    async def test(gate: Gate) -> None:
        granted = {}
        for route_class in ("search", "list", "write", "get"):
            count = 0
            try:
                while True:
                    await gate.enter(f"t{count}", route_class)  # type: ignore[arg-type]
                    count += 1
            except Refusal as e:
                assert e.problem.status == 503 and e.problem.reason == "shed" and e.problem.retry_after
            granted[route_class] = count
        assert granted == {"search": 10, "list": 5, "write": 3, "get": 2}

    with_gate(tmp_path, test, inflight_requests=20, inflight_wait_seconds=0.01)


def test_one_tenant_cannot_take_all_places(tmp_path: Path) -> None:
    """Neither those at work nor those in the queue."""

    async def test(gate: Gate) -> None:
        hot = [asyncio.create_task(gate.enter("hot", "get")) for _ in range(20)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [t.done() and t.exception() is None for t in hot].count(True) == 3
        assert [t.done() and t.exception() is not None for t in hot].count(True) == 14, "three wait"
        leave = await gate.enter("calm", "get")
        leave()
        for task in hot[:3]:
            task.result()()
        results = await asyncio.gather(*hot, return_exceptions=True)
        assert sum(not isinstance(r, Refusal) for r in results) == 6

    with_gate(tmp_path, test, inflight_requests=20, inflight_tenant_requests=3, inflight_wait_seconds=10)


def test_a_place_given_back_goes_to_the_most_urgent_who_waits(tmp_path: Path) -> None:
    """And a full queue drops a cheaper one for a dearer one, never the other way."""

    async def test(gate: Gate) -> None:
        order: list[str] = []

        async def ask(name: str, route_class: Any) -> None:
            leave = await gate.enter(name, route_class)
            order.append(name)
            await asyncio.sleep(0)
            leave()

        first = await gate.enter("first", "get")
        second = await gate.enter("second", "get")
        waiting = []
        for name, route_class in (("search", "search"), ("list", "list")):
            waiting.append(asyncio.create_task(ask(name, route_class)))
            await asyncio.sleep(0)
        waiting.append(asyncio.create_task(ask("lookup", "get")))
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert waiting[0].done() and isinstance(waiting[0].exception(), Refusal)
        with pytest.raises(Refusal):
            await gate.enter("late search", "search")
        first()
        second()
        await asyncio.gather(*waiting[1:])
        assert order == ["lookup", "list"]

    with_gate(tmp_path, test, inflight_requests=2, inflight_wait_seconds=10)


def test_no_place_is_lost_whatever_becomes_of_those_who_wait(tmp_path: Path) -> None:
    """Cancelled, timed out or admitted: afterwards all places are free."""

    async def test(gate: Gate) -> None:
        async def use(n: int) -> None:
            leave = await gate.enter(f"t{n % 3}", ("search", "list", "write", "get")[n % 4])  # type: ignore[arg-type]
            try:
                await asyncio.sleep(0.001 * (n % 3))
            finally:
                leave()

        tasks = [asyncio.create_task(use(n)) for n in range(300)]
        for n, task in enumerate(tasks):
            if n % 7 == 0:
                await asyncio.sleep(0)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert gate._at_work == 0 and gate._queued == 0 and not gate._tenants and not gate._queued_of_tenant
        for n in range(4):
            await gate.enter(f"t{n}", "get")

    with_gate(tmp_path, test, inflight_requests=4, inflight_tenant_requests=2, inflight_wait_seconds=0.005)


def test_a_slow_query_is_interrupted_and_the_connection_is_good_afterwards() -> None:
    """503 with its own reason; a quick one and one without a limit run to their end."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)  # as `shared.engine.connection` opens it

    def endless(c: sqlite3.Connection) -> object:
        return c.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        ).fetchone()

    def quick(c: sqlite3.Connection) -> object:
        return c.execute("SELECT 7").fetchone()[0]

    with pytest.raises(Refusal) as refused:
        bounded(endless, 0.05)(connection)
    assert refused.value.problem is TOO_SLOW
    assert bounded(quick, 0.05)(connection) == 7 == bounded(quick, 0)(connection)
    with pytest.raises(sqlite3.OperationalError):
        bounded(lambda c: c.execute("SELEC"), 1)(connection)


def test_a_job_past_its_limit_never_interrupts_the_next_one_on_its_connection() -> None:
    """The limit is kept by another thread, which may look late: by then the connection is somebody else's."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 100000) SELECT count(*) FROM n"
    for _ in range(20):
        bounded(lambda _: time.sleep(0.002), 0.001)(connection)
        assert connection.execute(count).fetchone() == (100_000,)


def test_an_operator_changes_what_all_workers_do_without_a_restart(stack: Stack) -> None:  # noqa: F811
    """Searches shed for a while, and the issuer's keys fetched again by each worker, once."""
    tenant, rotated = stack.tenant(), new_key("ES256")
    data_dir = stack.lend_tenants(stack.settings.data_dir.parent / "operated")
    operator = Settings(data_dir=data_dir)
    with gateway(
        data_dir, stack.control_plane_url, stack.issuer, limits_poll_seconds=0.05, jwks_cooldown_seconds=300
    ) as served:
        mine = stack.headers(tenant)

        def statuses(headers: dict[str, str]) -> set[int]:
            return {
                httpx.post(
                    f"{served.url}/v1/search", json={"query": "x"}, headers=headers, trust_env=False, timeout=30
                ).status_code
                for _ in range(12)
            }

        eventually(lambda: statuses(mine) == {200})
        set_limit(operator, "shed", ["search"], ttl_seconds=60, reason="test")
        eventually(lambda: statuses(mine) == {503})
        refused = served.client.post("/v1/search", json={"query": "x"}, headers=mine)
        assert assert_problem(refused, 503)["reason"] == "shed"
        assert served.client.get("/v1/memories", headers=mine).status_code == 200
        assert served.client.get("/health").status_code == 200
        assert served.metric("engram_shed_total", route="/v1/search") >= 13
        clear(operator, "shed")
        eventually(lambda: statuses(mine) == {200})

        with_rotated = {"Authorization": f"Bearer {stack.issuer.token(tenant, key=rotated)}"}
        statuses(with_rotated)  # every worker asked the issuer for this key, and will not again for 300 s
        stack.issuer.keys.append(rotated)
        assert statuses(with_rotated) == {401}
        before = stack.issuer.fetches
        set_limit(operator, "jwks_refresh", True, ttl_seconds=60, reason="rotated")
        eventually(lambda: statuses(with_rotated) == {200})
        assert stack.issuer.fetches == before + 2
