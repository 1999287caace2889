"""The pool's checkpoints: after the answers, in the writer's turn, and nobody's request."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest

from gateway import handles
from gateway.pool import PER_TENANT_QUEUE, TenantPool
from gateway.problems import Refusal
from shared.engine import memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import Memory, NewMemory
from shared.errors import TenantDatabaseUnavailable
from shared.tenant import TenantPaths
from tests.test_gateway_pool import with_pool


def _contents(connection: sqlite3.Connection) -> list[Memory]:
    return memories.page(connection, limit=10, before_seq=None, tag=None).memories


class Checkpoints:
    """Those of a pool, which follow every write, or those of so many `pages`; none ends before `go_on` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pages: int = 1) -> None:
        self.begun = self.ended = 0
        self.go_on = threading.Event()
        checkpoint = TenantDatabase.checkpoint

        def held(database: TenantDatabase) -> None:
            self.begun += 1
            if self.go_on.wait(20):
                checkpoint(database)
                self.ended += 1

        monkeypatch.setattr(TenantDatabase, "checkpoint", held)
        monkeypatch.setattr(handles, "CHECKPOINT_PAGES", pages)
        monkeypatch.setattr(handles, "CHECKPOINT_PAGES_BUSY", pages)

    async def one_begins(self) -> None:
        while not self.begun:
            await asyncio.sleep(0.001)


def test_who_writes_is_answered_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was committed is safe without it: 2 ms, or a busy disk's 20, are not its writer's to wait. The next write
    comes after it, and is not lost behind it."""
    checkpoints = Checkpoints(monkeypatch)

    async def test(pool: TenantPool) -> None:
        for _ in range(3):
            assert await pool.look_up("t0", _contents) == []
        await asyncio.wait_for(pool.write("t0", lambda c: memories.create(c, NewMemory("one"))), 10)
        following = asyncio.create_task(pool.write("t0", lambda c: memories.create(c, NewMemory("two"))))
        await checkpoints.one_begins()
        assert [m.content for m in await pool.look_up("t0", _contents)] == ["one"], "who reads by id does not wait"
        assert not following.done()
        checkpoints.go_on.set()
        assert (await asyncio.wait_for(following, 10)).content == "two"

    with_pool(tmp_path, test, 1)


def test_as_many_may_wait_behind_a_checkpoint_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is nobody's request: a tenant with all the writes under way that it may have is told of none too many."""
    checkpoints = Checkpoints(monkeypatch)

    async def test(pool: TenantPool) -> None:
        await pool.write("t0", lambda c: memories.create(c, NewMemory("one")))
        await checkpoints.one_begins()
        writes = [pool.write("t0", lambda c: memories.create(c, NewMemory("more"))) for _ in range(PER_TENANT_QUEUE)]
        waiting = asyncio.gather(*writes)
        await asyncio.sleep(0.05)
        checkpoints.go_on.set()
        assert len(await waiting) == PER_TENANT_QUEUE
        assert await pool.read("t0", memories.count) == 1 + PER_TENANT_QUEUE

    with_pool(tmp_path, test, 1)


def test_a_tenant_that_is_given_up_during_a_checkpoint_is_closed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody uses it any more, but a thread does: its handles are not closed under it, and not forgotten."""
    checkpoints = Checkpoints(monkeypatch)

    async def test(pool: TenantPool) -> None:
        await pool.write("t0", lambda c: memories.create(c, NewMemory("one")))
        await checkpoints.one_begins()
        is_closed = pool.restart("t0")
        await asyncio.sleep(0.05)
        assert not is_closed()
        checkpoints.go_on.set()
        while not is_closed():
            await asyncio.sleep(0.001)

    with_pool(tmp_path, test, 1)


def test_a_long_wal_is_in_the_database_soon_and_not_after_every_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thousand pages or so, as SQLite does it; the file stays as long as it became once."""
    checkpoints = Checkpoints(monkeypatch, handles.CHECKPOINT_PAGES)
    checkpoints.go_on.set()
    database = TenantPaths.of(tmp_path / "tenants", "t0").database

    async def test(pool: TenantPool) -> None:
        await pool.write("t0", lambda c: memories.create(c, NewMemory("one")))
        small = database.stat().st_size
        for _ in range(50):
            await pool.write("t0", lambda c: [memories.create(c, NewMemory("word " * 2_000)) for _ in range(20)])
        wal = Path(f"{database.resolve()}-wal").stat().st_size
        assert 2 <= checkpoints.ended <= 10
        assert database.stat().st_size > small + (8 << 20) / 2 and wal < 8 << 20

    with_pool(tmp_path, test, 1)


def test_a_look_at_the_wal_that_fails_fails_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after the commit: who was told of an error would write the same again."""

    def fails(_database: TenantDatabase, _pages: int) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(TenantDatabase, "checkpoint_due", fails)

    async def test(pool: TenantPool) -> None:
        assert (await pool.write("t0", lambda c: memories.create(c, NewMemory("one")))).content == "one"

    with_pool(tmp_path, test, 1)


def test_writes_that_a_checkpoint_makes_overdue_give_their_places_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No transaction follows that would count them: the tenant could never be closed again, and in the end the worker
    would have no place for anybody."""
    checkpoints = Checkpoints(monkeypatch)

    async def test(pool: TenantPool) -> None:
        await pool.write("t0", lambda c: memories.create(c, NewMemory("one")))
        await checkpoints.one_begins()
        pool._wait_seconds = 0.3  # for those who wait behind it; the first one may have had to wait for the disk
        writes = [pool.write("t0", lambda c: memories.create(c, NewMemory("more"))) for _ in range(5)]
        shed = await asyncio.gather(*writes, return_exceptions=True)
        assert all(isinstance(each, Refusal) for each in shed)
        checkpoints.go_on.set()
        while pool._writing:
            await asyncio.sleep(0.001)
        assert pool._queued == 0
        is_closed = pool.restart("t0")
        while not is_closed():
            await asyncio.sleep(0.001)

    with_pool(tmp_path, test, 1, database_wait_seconds=60)


def test_a_checkpoint_that_fails_hurts_no_write_and_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rows are in the `-wal`; the next transaction tries again."""

    def fails(_database: TenantDatabase) -> None:
        raise TenantDatabaseUnavailable("the tenant database is unavailable: disk I/O error")

    Checkpoints(monkeypatch)
    monkeypatch.setattr(TenantDatabase, "checkpoint", fails)

    async def test(pool: TenantPool) -> None:
        for n in range(3):
            await pool.write("t0", lambda c, n=n: memories.create(c, NewMemory(str(n))))
        assert await pool.read("t0", memories.count) == 3

    with_pool(tmp_path, test, 1)
    assert sum(text.count("checkpoint_failed") for text in capfd.readouterr()) >= 2


@pytest.mark.parametrize("given_up", [False, True])
def test_a_pool_that_closes_waits_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    """Nobody's request runs any more, and a thread is still at work on the file, be it of a tenant that is open or of
    one that was given up: it is closed after that, and closed it is."""
    checkpoints = Checkpoints(monkeypatch)
    closed: list[int] = []
    close = TenantDatabase.close

    def noted(database: TenantDatabase) -> None:
        closed.append(checkpoints.ended)
        close(database)

    monkeypatch.setattr(TenantDatabase, "close", noted)

    async def test(pool: TenantPool) -> None:
        await pool.write("t0", lambda c: memories.create(c, NewMemory("one")))
        await checkpoints.one_begins()
        if given_up:
            pool.restart("t0")
        asyncio.get_running_loop().call_later(0.05, checkpoints.go_on.set)

    with_pool(tmp_path, test, 1)
    assert closed == [1, 1], "its reader and its writer"
