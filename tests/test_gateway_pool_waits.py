"""What waits for the pool's threads: not for ever, and not behind the slow searches of others."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.pool import TenantPool
from gateway.problems import Refusal
from shared.engine import memories
from shared.engine.memories import NewMemory
from shared.errors import UnknownMemory
from tests.test_gateway_pool import with_pool


class Held:
    """A job that stays in its thread until it is let go."""

    def __init__(self) -> None:
        self.entered, self._leave = threading.Event(), threading.Event()

    def __call__(self, _connection: sqlite3.Connection) -> str:
        self.entered.set()
        assert self._leave.wait(60)
        return "held"

    async def begin(self, use: Callable[..., object], tenant_id: str) -> asyncio.Task[str]:
        task: asyncio.Task[str] = asyncio.create_task(use(tenant_id, self))  # type: ignore[arg-type]
        assert await asyncio.to_thread(self.entered.wait, 60)
        return task

    def let_go(self) -> None:
        self._leave.set()


def _create(connection: sqlite3.Connection) -> memories.Memory:
    return memories.create(connection, NewMemory("m"))


def test_slow_searches_of_some_leave_a_thread_to_the_others(tmp_path: Path) -> None:
    """The search of one more waits for a place; writes, lists and lookups, also of a tenant just opened, do not."""

    async def test(pool: TenantPool) -> None:
        slow = [Held(), Held()]
        running = [await held.begin(pool.read, f"t{n}") for n, held in enumerate(slow)]
        waiting = asyncio.create_task(pool.read("t2", memories.count))
        await asyncio.sleep(0.05)
        for tenant_id in ("t3", "t4"):
            with pytest.raises(UnknownMemory):
                await pool.look_up(tenant_id, lambda c: memories.get(c, "nobody's"))
            await pool.write(tenant_id, _create)
            assert await pool.read(tenant_id, memories.count, brief=True) == 1
        assert not waiting.done()
        slow[0].let_go()
        assert await waiting == 0
        slow[1].let_go()
        assert await asyncio.gather(*running) == ["held", "held"]

    with_pool(tmp_path, test, 5, gateway_threads=3, query_timeout_seconds=0, database_wait_seconds=60)


def test_a_search_that_comes_to_a_tenants_brief_reads_waits_for_its_own_place(tmp_path: Path) -> None:
    """A thread that was taken for a list goes no further than the search behind it; the list behind that is served."""

    async def test(pool: TenantPool) -> None:
        slow, brief = Held(), Held()
        searching = await slow.begin(pool.read, "t0")
        listing = await brief.begin(lambda tenant_id, job: pool.read(tenant_id, job, brief=True), "t1")
        search = asyncio.create_task(pool.read("t1", memories.count))
        another = asyncio.create_task(pool.read("t1", memories.count, brief=True))
        await asyncio.sleep(0.05)
        brief.let_go()
        assert await listing == "held"
        assert await pool.read("t2", memories.count, brief=True) == 0
        assert not search.done()
        slow.let_go()
        assert await asyncio.gather(searching, search, another) == ["held", 0, 0]

    with_pool(tmp_path, test, 3, gateway_threads=2, query_timeout_seconds=0, database_wait_seconds=60)


def test_a_tenants_lists_and_lookups_do_not_wait_behind_all_its_searches(tmp_path: Path) -> None:
    """Only for the one that runs: else many slow searches at once would shed whatever else their tenant reads."""

    async def test(pool: TenantPool) -> None:
        order: list[str] = []

        def noted(what: str) -> Callable[[sqlite3.Connection], None]:
            return lambda _: order.append(what)

        held = Held()
        running = await held.begin(pool.read, "t0")
        searches = [asyncio.create_task(pool.read("t0", noted("search"))) for _ in range(3)]
        await asyncio.sleep(0)
        others = [
            asyncio.create_task(pool.read("t0", noted("list"), brief=True)),
            asyncio.create_task(pool.look_up("t0", noted("lookup"))),
        ]
        await asyncio.sleep(0)
        held.let_go()
        await asyncio.gather(running, *searches, *others)
        assert order == ["list", "lookup", "search", "search", "search"]

    for threads in (1, 4):
        with_pool(tmp_path / str(threads), test, 2, gateway_threads=threads, query_timeout_seconds=0)


def test_what_no_thread_has_begun_in_time_is_shed_and_never_done(tmp_path: Path) -> None:
    """Behind its own tenant's turn or for want of a thread; what has begun is not, and nothing stays counted."""

    async def test(pool: TenantPool) -> None:
        held = Held()
        running = await held.begin(pool.write, "t0")
        pool._wait_seconds = 0.3  # for those who wait behind that, for nobody before or after them
        waiting = [
            asyncio.create_task(pool.write("t0", _create)),
            asyncio.create_task(pool.read("t0", memories.count)),
            asyncio.create_task(pool.write("t1", _create)),
            asyncio.create_task(pool.read("t2", memories.count)),
            asyncio.create_task(pool.look_up("t3", memories.count)),
        ]
        for result in await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30):
            assert isinstance(result, Refusal) and result.problem.status == 503
            assert result.problem.reason == "shed" and result.problem.retry_after
        pool._wait_seconds = 60
        held.let_go()
        assert await running == "held"
        for tenant_id in ("t0", "t1", "t2", "t3"):
            assert await pool.read(tenant_id, memories.count) == 0
            assert (await pool.write(tenant_id, _create)).content == "m"
        async with asyncio.timeout(20):
            while pool._queued or any(tenant.users or tenant.lock.locked() for tenant in pool._open.leaving()):
                await asyncio.sleep(0.001)

    with_pool(tmp_path, test, 4, gateway_threads=1, database_wait_seconds=60)
