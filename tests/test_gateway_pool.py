"""The pool of open databases: its cap, its order, its fairness, and what it does when a database is bad."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway import handles
from gateway.handles import WAL_KEEP_BYTES, OpenTenant
from gateway.pool import FILES_FOR_THE_REST, FILES_PER_TENANT, PER_TENANT_QUEUE, TenantPool
from gateway.problems import Refusal
from shared.engine import database, memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.errors import TenantDatabaseUnavailable, UnknownMemory
from shared.settings import Settings
from shared.tenant import TenantPaths


def with_pool(tmp_path: Path, test: Callable[[TenantPool], Awaitable[None]], tenants: int, **settings: Any) -> None:
    # A fsync may take seconds where others test too: nobody is shed for that, but where it is what is tested.
    configured = Settings(data_dir=tmp_path, **{"database_wait_seconds": 20, **settings})
    for n in range(tenants):
        database.create(TenantPaths.of(configured.tenants_dir, f"t{n}"))

    open_at_the_end: list[str] = []

    async def run() -> None:
        pool = TenantPool(configured)
        try:
            await test(pool)
        finally:
            open_at_the_end.extend(tenant.paths.tenant_id for tenant in pool._open.leaving())
            await asyncio.wait_for(pool.close(), 20)

    asyncio.run(run())
    for n in range(tenants):
        left = list((configured.tenants_dir / f"t{n}" / "generations").rglob("*-wal"))
        if f"t{n}" in open_at_the_end:
            assert not left  # closing for good folds it into the database
        assert all(wal.stat().st_size <= WAL_KEEP_BYTES for wal in left)


def blocked(entered: threading.Event, leave: threading.Event) -> Callable[[sqlite3.Connection], None]:
    def job(connection: sqlite3.Connection) -> None:
        entered.set()
        leave.wait(20)

    return job


def _open_count(pool: TenantPool) -> int:
    return len(pool._open)


def test_the_least_recently_used_is_closed_and_every_tenant_keeps_working(tmp_path: Path) -> None:
    """More tenants than room: never more open than the cap, and what was written is there after reopening."""

    async def test(pool: TenantPool) -> None:
        ids = {}
        for _ in range(3):
            for n in range(6):
                made = await pool.write(f"t{n}", lambda c, n=n: memories.create(c, NewMemory(f"m{n}")))
                ids[n] = made.id
                assert _open_count(pool) <= 2
                found = await pool.look_up(f"t{n}", lambda c, i=made.id: memories.get(c, i))
                assert found == made
        for n in range(6):
            assert await pool.read(f"t{n}", memories.count) == 3

    with_pool(tmp_path, test, 6, tenant_pool_size=2)


def test_many_at_once_on_few_handles_all_finish(tmp_path: Path) -> None:
    """Opening, evicting, reading and writing interleave; every write is there exactly once."""

    async def test(pool: TenantPool) -> None:
        async def use(n: int) -> None:
            tenant = f"t{n % 5}"
            while True:
                try:
                    made = await pool.write(tenant, lambda c: memories.create(c, NewMemory("x")))
                    break
                except Refusal:
                    await asyncio.sleep(0.01)
            with contextlib.suppress(Refusal):
                await pool.look_up(tenant, lambda c: memories.get(c, made.id))

        await asyncio.gather(*(use(n) for n in range(100)))
        assert [await pool.read(f"t{n}", memories.count) for n in range(5)] == [20] * 5

    with_pool(tmp_path, test, 5, tenant_pool_size=2, gateway_threads=2)


def test_closing_for_good_waits_for_what_was_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose database is open twice meanwhile would fold it first, in vain, and leave the `-wal` to the other."""
    evicting, leave = threading.Event(), threading.Event()

    def late(tenant: OpenTenant) -> None:
        evicting.set()
        leave.wait(20)
        handles.close(tenant)

    monkeypatch.setattr("gateway.pool.close", late)

    async def test(pool: TenantPool) -> None:
        await pool.write("t0", lambda c: memories.create(c, NewMemory("x")))
        pool.restart("t0")
        await asyncio.to_thread(evicting.wait, 20)
        assert await pool.read("t0", memories.count) == 1
        asyncio.get_running_loop().call_later(0.2, leave.set)

    with_pool(tmp_path, test, 1, gateway_threads=2)


def test_a_restarted_tenant_is_said_to_be_closed_once_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To close may take seconds, and who was told that it is done goes on to the files."""
    closing, leave = threading.Event(), threading.Event()
    close = TenantDatabase.close

    def late(database: TenantDatabase) -> None:
        closing.set()
        leave.wait(20)
        close(database)

    monkeypatch.setattr(TenantDatabase, "close", late)

    async def test(pool: TenantPool) -> None:
        assert pool.restart("t0")(), "there is nothing to close"
        await pool.write("t0", lambda c: memories.create(c, NewMemory("x")))
        is_closed = pool.restart("t0")
        await asyncio.to_thread(closing.wait, 20)
        assert not is_closed() and not pool.restart("t0")(), "nor is it for who asks again"
        leave.set()
        async with asyncio.timeout(20):
            while not is_closed():
                await asyncio.sleep(0.001)
        assert not _has_open(tmp_path / "tenants" / "t0" / "generations" / "000001")

    with_pool(tmp_path, test, 1)


def test_a_handle_in_use_is_never_evicted(tmp_path: Path) -> None:
    """With every place taken by running work the next tenant is shed, not the work."""

    async def test(pool: TenantPool) -> None:
        entered, leave = threading.Event(), threading.Event()

        def job(connection: sqlite3.Connection) -> int:
            entered.set()
            leave.wait(20)
            return memories.count(connection)

        running = asyncio.create_task(pool.read("t0", job))
        await asyncio.to_thread(entered.wait, 20)
        with pytest.raises(Refusal) as refused:
            await pool.read("t1", memories.count)
        assert refused.value.problem.status == 503 and refused.value.problem.reason == "shed"
        leave.set()
        assert await running == 0
        assert await pool.read("t1", memories.count) == 0

    with_pool(tmp_path, test, 2, tenant_pool_size=1, gateway_threads=2)


def test_a_hot_tenant_is_shed_before_it_takes_the_threads_from_the_others(tmp_path: Path) -> None:
    """Its requests wait on its own lock, up to a bound; another tenant gets through meanwhile."""

    async def test(pool: TenantPool) -> None:
        leave = threading.Event()
        hot = [asyncio.create_task(pool.read("t0", lambda c: leave.wait(20))) for _ in range(PER_TENANT_QUEUE + 10)]
        await asyncio.sleep(0)
        assert await pool.read("t1", memories.count) == 0
        leave.set()
        results = await asyncio.gather(*hot, return_exceptions=True)
        assert sum(isinstance(r, Refusal) for r in results) == 10
        assert results.count(True) == PER_TENANT_QUEUE

    with_pool(tmp_path, test, 2, gateway_threads=3)


def test_a_cancelled_caller_leaves_its_handle_only_when_the_thread_has(tmp_path: Path) -> None:
    """The next user of the tenant waits for the thread, not for the caller that went away."""

    async def test(pool: TenantPool) -> None:
        entered, leave, order = threading.Event(), threading.Event(), []

        def slow(connection: sqlite3.Connection) -> None:
            entered.set()
            leave.wait(20)
            order.append("slow")

        running = asyncio.create_task(pool.read("t0", slow))
        await asyncio.to_thread(entered.wait, 20)
        running.cancel()
        await asyncio.sleep(0)
        following = asyncio.create_task(pool.read("t0", lambda c: order.append("next")))
        await asyncio.sleep(0.05)
        assert order == []
        leave.set()
        await following
        assert order == ["slow", "next"]

    with_pool(tmp_path, test, 1)


def test_reads_that_wait_are_each_answered_and_those_of_who_left_never_run(tmp_path: Path) -> None:
    """A thread serves what waits behind it in order; a failure or a caller that left is that read's own."""

    async def test(pool: TenantPool) -> None:
        entered, leave, order = threading.Event(), threading.Event(), []

        def job(n: int) -> Callable[[sqlite3.Connection], int]:
            def run(_: sqlite3.Connection) -> int:
                order.append(n)
                if n == 3:
                    raise UnknownMemory("three")
                return n

            return run

        first = asyncio.create_task(pool.read("t0", blocked(entered, leave)))
        await asyncio.to_thread(entered.wait, 20)
        waiting = [asyncio.create_task(pool.read("t0", job(n))) for n in range(10)]
        await asyncio.sleep(0.01)
        waiting[5].cancel()
        await asyncio.sleep(0.01)
        leave.set()
        results = await asyncio.gather(first, *waiting, return_exceptions=True)
        assert order == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        assert [type(r) for r in results if not isinstance(r, int)] == [
            type(None),
            UnknownMemory,
            asyncio.CancelledError,
        ]
        assert await pool.read("t0", memories.count) == 0
        tenant = pool._open.get("t0")
        assert tenant is not None
        async with asyncio.timeout(20):  # a caller has its answer a moment before the tenant is given back
            while tenant.users or pool._queued or tenant.lock.locked():
                await asyncio.sleep(0.001)

    with_pool(tmp_path, test, 1)


def test_neither_reads_nor_writes_of_a_busy_tenant_keep_the_other_from_their_turn(tmp_path: Path) -> None:
    """Both come without a break, and both get on."""

    async def test(pool: TenantPool) -> None:
        done = {"read": 0, "write": 0}

        async def client(kind: str) -> None:
            while min(done.values()) < 30:
                if kind == "read":
                    await pool.read("t0", memories.count)
                else:
                    await pool.write("t0", lambda c: memories.create(c, NewMemory("m")))
                done[kind] += 1

        await asyncio.wait_for(asyncio.gather(*(client(k) for k in ("read", "write") * 12)), 60)

    with_pool(tmp_path, test, 1)


def test_a_tenant_without_a_database_fails_alone_and_leaves_no_place_taken(tmp_path: Path) -> None:
    """Opening fails for everybody who waits for it; the place is free again and nothing was created."""

    async def test(pool: TenantPool) -> None:
        for _ in range(3):
            results = await asyncio.gather(
                *(pool.read("ghost", memories.count) for _ in range(5)), return_exceptions=True
            )
            assert all(isinstance(r, TenantDatabaseUnavailable) for r in results)
        assert _open_count(pool) == 0
        assert await pool.read("t0", memories.count) == 0
        with pytest.raises(UnknownMemory):
            await pool.look_up("t0", lambda c: memories.get(c, "x"))

    with_pool(tmp_path, test, 1, tenant_pool_size=1)
    assert not (tmp_path / "tenants" / "ghost").exists()


def test_a_tenant_used_all_the_time_stays_open_through_a_sweep_over_all_others(tmp_path: Path) -> None:
    """Each tenant of the sweep is used once; the hot one's handle is never opened a second time."""

    async def test(pool: TenantPool) -> None:
        for _ in range(2):
            await pool.read("t0", memories.count)
        hot = pool._open.get("t0")
        for n in range(1, 8):
            await pool.read(f"t{n}", memories.count)
        assert hot is not None and pool._open.get("t0") is hot

    with_pool(tmp_path, test, 8, tenant_pool_size=3)


def test_an_eviction_leaves_the_wal_and_a_crash_after_it_loses_nothing(tmp_path: Path) -> None:
    """Only closing got cheaper: what was acknowledged is in the -wal or in the file, and the next open reads both."""

    async def closed(directory: Path) -> None:
        """The thread that closes it may be behind."""
        deadline = time.monotonic() + 20
        while _has_open(directory):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)

    async def test(pool: TenantPool) -> None:
        wal = TenantPaths.of(tmp_path / "tenants", "t0").generation_dir(1) / "engram.db-wal"
        for n in range(16):
            await pool.write("t0", lambda c, n=n: memories.create(c, NewMemory(f"{n} " + "x" * 10_000)))
            await pool.read("t1", memories.count)
            await closed(wal.parent)  # opened again before that, it would not be the last to close
            assert await pool.read("t0", memories.count) == n + 1
            await pool.read("t1", memories.count)
            await closed(wal.parent)
            assert not wal.exists() or wal.stat().st_size <= WAL_KEEP_BYTES
            if n == 0:
                assert wal.stat().st_size > 0
            copied = tmp_path / f"crash-{n}"
            shutil.copytree(wal.parent, copied)  # as a crash would leave it
            with contextlib.closing(sqlite3.connect(copied / "engram.db")) as found:
                assert memories.count(found) == n + 1

    with_pool(tmp_path, test, 2, tenant_pool_size=1)


def _has_open(directory: Path) -> bool:
    """Whether this process has a file in `directory` open."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{directory}/"):
                return True
    return False


def test_the_pool_never_grows_past_the_file_limit(tmp_path: Path) -> None:
    """With too many open SQLite cannot make its files, and requests fail that only had to wait."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def test(pool: TenantPool) -> None:
        assert pool._open.size == 8
        pool.resize(1_000)
        assert pool._open.size == 8

    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES_FOR_THE_REST + 8 * FILES_PER_TENANT, hard))
    try:
        with_pool(tmp_path, test, 1, tenant_pool_size=1_000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
