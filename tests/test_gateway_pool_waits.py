"""What waits for the pool's threads: not for ever, and not behind the slow searches of others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from gateway.handles import OpenTenant
from gateway.pool import FILES_PER_TENANT, TenantPool
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


def test_a_search_that_waits_for_a_thread_keeps_its_tenants_other_requests_from_nothing(tmp_path: Path) -> None:
    """It waits for other tenants' searches; what its own tenant writes, lists and looks up need not."""

    async def test(pool: TenantPool) -> None:
        slow, brief = Held(), Held()
        searching = await slow.begin(pool.read, "t0")
        first = asyncio.create_task(pool.read("t1", memories.count))
        await asyncio.sleep(0.05)
        made = await pool.write("t1", _create)
        assert await pool.read("t1", memories.count, brief=True) == 1
        assert await pool.look_up("t1", lambda c: memories.get(c, made.id)) == made
        listing = await brief.begin(lambda tenant_id, job: pool.read(tenant_id, job, brief=True), "t1")
        second = asyncio.create_task(pool.read("t1", memories.count))
        another = asyncio.create_task(pool.read("t1", memories.count, brief=True))
        await asyncio.sleep(0.05)
        brief.let_go()
        assert await asyncio.gather(listing, another) == ["held", 1]
        assert not first.done() and not second.done()
        slow.let_go()
        assert await asyncio.gather(searching, first, second) == ["held", 1, 1]

    with_pool(tmp_path, test, 2, gateway_threads=2, query_timeout_seconds=0, database_wait_seconds=60)


def test_slow_reads_never_have_all_threads_and_none_is_left_waiting_for_one(tmp_path: Path) -> None:
    """Whatever mixture comes, leaves and writes: each is answered once, and in the end nothing is taken."""

    async def test(pool: TenantPool) -> None:
        lock, at_work, most = threading.Lock(), 0, 0

        def slow(_connection: sqlite3.Connection) -> str:
            nonlocal at_work, most
            with lock:
                at_work += 1
                most = max(most, at_work)
            time.sleep(0.0002)
            with lock:
                at_work -= 1
            return "slow"

        async def client(n: int) -> None:
            for m in range(40):
                tenant_id = f"t{(n + m) % 4}"
                if n % 8 == 7:
                    leaves = asyncio.create_task(pool.read(tenant_id, slow))
                    await asyncio.sleep(0.0005 * (m % 5))
                    leaves.cancel()
                elif n % 8 == 6:
                    await pool.write(tenant_id, lambda _: None)
                elif n % 2:
                    assert await pool.read(tenant_id, lambda _: "brief", brief=True) == "brief"
                else:
                    assert await pool.read(tenant_id, slow) == "slow"

        await asyncio.wait_for(asyncio.gather(*(client(n) for n in range(24))), 120)
        assert most == 2
        tenants = list(pool._open.leaving())
        async with asyncio.timeout(60):
            while any(t.users or t.reading or t.searching or t.lock.locked() for t in tenants):
                await asyncio.sleep(0.001)
        assert pool._turns._slow_places._value == 2 and pool._queued == 0

    with_pool(tmp_path, test, 4, gateway_threads=3, query_timeout_seconds=0, database_wait_seconds=120)


def test_a_tenants_writes_lists_and_lookups_do_not_wait_for_its_searches(tmp_path: Path) -> None:
    """Not even for the one that runs: a slow search would else shed whatever else its tenant asks for."""

    async def test(pool: TenantPool) -> None:
        held = Held()
        running = await held.begin(pool.read, "t0")
        searches = [asyncio.create_task(pool.read("t0", memories.count)) for _ in range(3)]
        made = await pool.write("t0", _create)
        assert await pool.read("t0", memories.count, brief=True) == 1
        for _ in range(3):
            assert await pool.look_up("t0", lambda c: memories.get(c, made.id)) == made
        assert not any(task.done() for task in searches)
        held.let_go()
        assert await asyncio.gather(running, *searches) == ["held", 1, 1, 1]
        assert (await pool.write("t0", _create)).content == "m"
        assert await pool.read("t0", memories.count) == 2

    with_pool(tmp_path, test, 1, gateway_threads=2, query_timeout_seconds=0, database_wait_seconds=60)


def test_a_search_whose_tenant_is_being_closed_is_waited_for(tmp_path: Path) -> None:
    """One that was shed while it waited for a thread still has its turn to come: a handle closed under it, or a lock
    given back that it had not, would cost the worker a thread for searches for good."""

    async def test(pool: TenantPool) -> None:
        first = Held()
        running = await first.begin(pool.read, "t0")
        await pool.write("t0", _create)  # from here on it searches with a connection apart
        first.let_go()
        await running
        other = Held()
        holding = await other.begin(pool.read, "t1")
        pool._wait_seconds = 0.3
        with pytest.raises(Refusal):
            await pool.read("t0", memories.count)
        pool._wait_seconds = 60
        tenant = pool._open.get("t0")
        assert tenant is not None and tenant.users == 0 and tenant.searching
        is_closed = pool.restart("t0")
        await asyncio.sleep(0.05)
        assert not is_closed() and tenant.searcher is not None
        other.let_go()
        await holding
        async with asyncio.timeout(60):
            while not is_closed():
                await asyncio.sleep(0.001)
        assert await pool.read("t0", memories.count) == 1
        async with asyncio.timeout(60):
            while pool._turns._slow_places._value != 1:
                await asyncio.sleep(0.001)

    with_pool(tmp_path, test, 2, gateway_threads=2, query_timeout_seconds=0, database_wait_seconds=60)


def test_a_search_does_not_wait_with_a_thread_for_a_write_that_hangs(tmp_path: Path) -> None:
    """Three tenants whose disk hangs would else stop everybody's searches."""

    async def test(pool: TenantPool) -> None:
        write = Held()
        writing = await write.begin(pool.write, "t0")
        search = asyncio.create_task(pool.read("t0", memories.count))
        assert await pool.read("t1", memories.count) == 0
        assert await search == 0
        write.let_go()
        assert await writing == "held"
        assert (await pool.write("t0", _create)).content == "m"
        assert await pool.read("t0", memories.count) == 1

    with_pool(tmp_path, test, 2, gateway_threads=2, query_timeout_seconds=0, database_wait_seconds=60)


def test_with_one_thread_a_tenants_searches_let_its_other_reads_by(tmp_path: Path) -> None:
    """They wait for the one that runs, not for all that came before."""

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
        await asyncio.sleep(0.05)  # longer than a turn lasts
        held.let_go()
        await asyncio.gather(running, *searches, *others)
        assert sorted(order[:2]) == ["list", "lookup"] and order[2:] == ["search"] * 3

    with_pool(tmp_path, test, 1, gateway_threads=1, query_timeout_seconds=0)


def test_only_who_wants_a_connection_beside_a_long_search_opens_one(tmp_path: Path) -> None:
    """It costs files, memory and an open: most tenants never need it. None is ever left behind."""

    async def test(pool: TenantPool) -> None:
        async def one_after_the_other(*requests: Coroutine[Any, Any, object]) -> OpenTenant:
            """A client is slower than the thread is in saying that it has found no more to do."""
            for request in requests:
                await request
                tenant = pool._open.get("t0")
                assert tenant is not None
                async with asyncio.timeout(60):
                    while tenant.reading or tenant.searching or tenant.writing:
                        await asyncio.sleep(0.001)
            return tenant

        def search() -> Coroutine[Any, Any, int]:
            return pool.read("t0", memories.count)

        brief = pool.read("t0", memories.count, brief=True)
        tenant = await one_after_the_other(search(), brief, search())
        assert tenant.searcher is None and _files(tmp_path) == 4
        await one_after_the_other(pool.write("t0", _create), search(), pool.write("t0", _create), search())
        assert tenant.searcher is None and _files(tmp_path) == 9
        held = Held()
        running = await held.begin(pool.read, "t0")
        await pool.write("t0", _create)
        held.let_go()
        await running
        assert await search() == 3
        assert _files(tmp_path) == FILES_PER_TENANT

    with_pool(tmp_path, test, 1, query_timeout_seconds=0)
    assert _files(tmp_path) == 0


def _files(directory: Path) -> int:
    """How many of this process's open files are in `directory`."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{fd}").startswith(f"{directory}/tenants/")
    return found


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
