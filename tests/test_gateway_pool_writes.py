"""Writes of one tenant that wait for each other become one transaction, in which each keeps its own outcome."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from pathlib import Path

from gateway.pool import TenantPool
from shared.engine import memories
from shared.engine.memories import Memory, NewMemory
from shared.errors import InMaintenance, UnknownMemory
from shared.tenant import TenantPaths
from tests.test_gateway_pool import blocked, with_pool


def _change_count(connection: sqlite3.Connection) -> int:
    count: int = connection.execute("PRAGMA data_version").fetchone()[0]
    return count


async def _gathered(
    pool: TenantPool, count: int
) -> tuple[asyncio.Task[None], list[asyncio.Task[Memory]], threading.Event]:
    """A write that runs until the event is set, and the creates `m0`, `m1`, … that wait behind it."""
    entered, leave = threading.Event(), threading.Event()
    first = asyncio.create_task(pool.write("t0", blocked(entered, leave)))
    await asyncio.to_thread(entered.wait, 20)
    waiting = [
        asyncio.create_task(pool.write("t0", lambda c, n=n: memories.create(c, NewMemory(f"m{n}"))))
        for n in range(count)
    ]
    await asyncio.sleep(0)
    return first, waiting, leave


def test_writes_that_wait_become_one_transaction(tmp_path: Path) -> None:
    """Another connection sees one change for all that gathered behind a running write."""

    async def test(pool: TenantPool) -> None:
        before = await pool.look_up("t0", _change_count)
        first, waiting, leave = await _gathered(pool, 20)
        leave.set()
        made = await asyncio.gather(first, *waiting)
        assert [m.content for m in made[1:]] == [f"m{n}" for n in range(20)]
        assert await pool.read("t0", memories.count) == 20
        assert await pool.look_up("t0", _change_count) - before <= 2

    with_pool(tmp_path, test, 1)


def test_a_write_that_arrives_during_a_transaction_joins_it(tmp_path: Path) -> None:
    """The first is still running, so nothing of it can be seen outside; nor can it when the later ones run."""
    seen_outside = []

    async def test(pool: TenantPool) -> None:
        entered, leave = threading.Event(), threading.Event()
        file = TenantPaths.of(tmp_path / "tenants", "t0").database

        def first(connection: sqlite3.Connection) -> None:
            memories.create(connection, NewMemory("first"))
            entered.set()
            leave.wait(20)

        def later(connection: sqlite3.Connection) -> None:
            with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as outside:
                seen_outside.append(memories.count(outside))
            memories.create(connection, NewMemory("later"))

        running = [asyncio.create_task(pool.write("t0", first))]
        await asyncio.to_thread(entered.wait, 20)
        running += [asyncio.create_task(pool.write("t0", later)) for _ in range(5)]
        await asyncio.sleep(0)
        leave.set()
        await asyncio.gather(*running)
        assert await pool.read("t0", memories.count) == 6

    with_pool(tmp_path, test, 1)
    assert seen_outside == [0] * 5


def test_one_cancelled_write_cancels_no_other(tmp_path: Path) -> None:
    """Cancelled before its transaction began it leaves no trace; the rest of the group is stored."""

    async def test(pool: TenantPool) -> None:
        first, waiting, leave = await _gathered(pool, 6)
        waiting[2].cancel()
        first.cancel()
        await asyncio.sleep(0)
        leave.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(results.pop(2), asyncio.CancelledError)
        assert [m.content for m in results if not isinstance(m, BaseException)] == ["m0", "m1", "m3", "m4", "m5"]
        assert await pool.read("t0", memories.count) == 5

    with_pool(tmp_path, test, 1)


def test_a_failing_write_fails_alone_and_a_failing_transaction_fails_all(tmp_path: Path) -> None:
    """Each caller has an exception of its own to raise, with the cause that says why."""

    async def test(pool: TenantPool) -> None:
        jobs = [lambda c: memories.create(c, NewMemory("x")), lambda c: memories.delete(c, "nobody's")] * 5
        results = await asyncio.gather(*(pool.write("t0", job) for job in jobs), return_exceptions=True)
        assert [isinstance(r, UnknownMemory) for r in results] == [False, True] * 5
        assert await pool.read("t0", memories.count) == 5
        mark = TenantPaths.of(tmp_path / "tenants", "t0").mark
        mark.touch()
        refused = await asyncio.gather(*(pool.write("t0", jobs[0]) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(r, InMaintenance) for r in refused) and len({id(r) for r in refused}) == 5
        mark.unlink()
        assert (await pool.write("t0", jobs[0])).content == "x"

    with_pool(tmp_path, test, 1)
