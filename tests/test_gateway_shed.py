"""Overload: bounded work, the expensive first to go, and slow queries are cut."""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gateway.problems import Refusal
from gateway.shed import ORDER, TOO_SLOW, Gate, bounded
from shared.limits import Limits, Watch, clear, set_limit
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


async def grants(gate: Gate, tenant_id: str, route_class: Any) -> int:
    """How many of this class get a place, one after the other, until one is refused."""
    for count in itertools.count():
        try:
            await gate.enter(tenant_id, route_class)
        except Refusal as e:
            assert e.problem.reason == "shed" and e.problem.retry_after
            return count
    raise AssertionError


def test_within_a_tenant_searches_go_first_and_lookups_last(tmp_path: Path) -> None:
    """A tenant's flood of searches must leave places to its own lookups and writes, as it does to those of others."""

    async def test(gate: Gate) -> None:
        found = {each: await grants(gate, "hot", each) for each in ("search", "list", "write", "get")}
        assert found == {"search": 10, "list": 5, "write": 3, "get": 2}

    with_gate(tmp_path, test, inflight_requests=200, inflight_tenant_requests=20, inflight_wait_seconds=0.01)


@pytest.mark.parametrize("cap", range(1, 8))
def test_every_class_has_a_place_however_small_an_operators_bound_is(tmp_path: Path, cap: int) -> None:
    """And all of them together have no more than it says, in whatever order they come."""
    limits = SimpleNamespace(now=Limits(tenant_inflight={"hot": cap}))

    async def test() -> None:
        for order in itertools.permutations(("search", "list", "write", "get")):
            gate = Gate(Settings(data_dir=tmp_path, inflight_wait_seconds=0), limits)  # type: ignore[arg-type]
            found = [await grants(gate, "hot", each) for each in order]
            assert found[0] >= 1 and sum(found) == cap

    asyncio.run(test())


def test_a_tenants_waiting_searches_make_room_for_its_own_lookups_and_writes(tmp_path: Path) -> None:
    """Its share of the queue full of searches would refuse what costs it least to serve. Another tenant's stay."""

    async def test(gate: Gate) -> None:
        leaves = [await gate.enter("hot", "get") for _ in range(2)]
        others = [await gate.enter("calm", "get") for _ in range(2)]

        async def waiting(tenant_id: str, route_class: Any) -> asyncio.Task[Callable[[], None]]:
            task = asyncio.create_task(gate.enter(tenant_id, route_class))
            for _ in range(4):
                await asyncio.sleep(0)
            return task

        calm = await waiting("calm", "search")
        searches = [await waiting("hot", "search") for _ in range(2)]
        write, lookup = await waiting("hot", "write"), await waiting("hot", "get")
        assert [isinstance(each.exception(), Refusal) for each in searches] == [True, True]
        assert not calm.done() and not write.done() and not lookup.done()
        assert isinstance((await waiting("hot", "write")).exception(), Refusal), "none of it is cheaper than a write"
        for leave in leaves:
            leave()
        (await lookup)()
        (await write)()
        for leave in others:
            leave()
        (await calm)()
        assert gate._at_work == gate._queued == 0 and not gate._tenants and not gate._queued_of_tenant

    with_gate(tmp_path, test, inflight_requests=20, inflight_tenant_requests=2, inflight_wait_seconds=10)


@pytest.mark.parametrize("seed", range(20))
def test_nobody_waits_while_there_is_a_place_and_no_bound_is_ever_passed(tmp_path: Path, seed: int) -> None:
    """Whoever comes, leaves, is cancelled or dropped, in any order: a waiting request that nobody admits is a refusal
    for nothing, a place too many is an overload."""
    chance = random.Random(seed)
    places, of_tenant, cap = chance.randint(1, 9), chance.randint(1, 5), chance.randint(1, 4)
    limits = SimpleNamespace(now=Limits(tenant_inflight={"t0": cap}))
    settings = Settings(
        data_dir=tmp_path, inflight_requests=places, inflight_tenant_requests=of_tenant, inflight_wait_seconds=10
    )

    async def test() -> None:
        gate = Gate(settings, limits)  # type: ignore[arg-type]
        coming: list[asyncio.Task[Callable[[], None]]] = []
        at_work: list[Callable[[], None]] = []
        for _ in range(1_000):
            for _ in range(chance.randint(0, 2)):
                route_class = chance.choice(ORDER)
                coming.append(asyncio.create_task(gate.enter(f"t{chance.randrange(4)}", route_class)))
            if at_work and chance.random() < 0.6:
                at_work.pop(chance.randrange(len(at_work)))()
            if coming and chance.random() < 0.2:
                chance.choice(coming).cancel()
            for _ in range(6):
                await asyncio.sleep(0)
            for task in [each for each in coming if each.done()]:
                coming.remove(task)
                if not task.cancelled() and task.exception() is None:
                    at_work.append(task.result())
            assert len(at_work) == gate._at_work <= places
            assert all(count <= (cap if t == "t0" else of_tenant) for t, count in gate._tenants.items())
            assert len(coming) == gate._queued <= places
            for route_class in ORDER:
                assert not any(gate._free(tenant_id, route_class) for tenant_id, _ in gate._queues[route_class])
        for leave in at_work:
            leave()
        for task in coming:
            task.add_done_callback(lambda done: done.result()())
        await asyncio.gather(*coming)
        assert gate._at_work == gate._queued == 0 and not gate._tenants and not gate._queued_of_tenant

    asyncio.run(asyncio.wait_for(test(), 60))


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
                for _ in range(24)  # both workers answer: which one does is as good as drawn by lot
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
