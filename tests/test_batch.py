"""Group commit: one transaction for many jobs, each of which succeeds or fails alone."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.engine import batch, database, memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import Changes, NewMemory
from shared.errors import InMaintenance, TenantDatabaseUnavailable, UnknownMemory
from shared.tenant import TenantPaths


@pytest.fixture
def paths(tmp_path: Path) -> TenantPaths:
    paths = TenantPaths.of(tmp_path, "acme")
    database.create(paths)
    return paths


@pytest.fixture
def handle(paths: TenantPaths) -> Iterator[TenantDatabase]:
    handle = TenantDatabase(paths)
    yield handle
    handle.close()


def _create(text: str) -> batch.Job:
    return lambda connection: memories.create(connection, NewMemory(text, tags=["t"]))


def _contents(handle: TenantDatabase) -> list[str]:
    with handle.read() as connection:
        return [row[0] for row in connection.execute("SELECT content FROM memories ORDER BY seq")]


def _half(connection: sqlite3.Connection) -> None:
    memories.create(connection, NewMemory("half of a job"))
    memories.update(connection, "nobody's", Changes(content="x"))


def test_all_jobs_are_one_transaction_in_their_order(handle: TenantDatabase, paths: TenantPaths) -> None:
    """Another connection sees nothing until all of them are there."""
    other = TenantDatabase(paths)
    seen: list[int] = []

    def look(connection: sqlite3.Connection) -> int:
        seen.append(len(_contents(other)))
        return memories.count(connection)

    outcomes = batch.commit(handle, [_create("a"), look, _create("b"), look])
    assert [o.error for o in outcomes] == [None] * 4
    assert (outcomes[1].value, outcomes[3].value, seen) == (1, 2, [0, 0])
    assert outcomes[0].value.content == "a" and _contents(other) == ["a", "b"]
    other.close()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_failing_job_takes_only_itself_away(handle: TenantDatabase, place: int) -> None:
    """What it did before it failed is undone, its neighbours are stored once, the order is kept."""
    jobs = [_create("a"), _create("b")]
    jobs.insert(place, _half)
    outcomes = batch.commit(handle, jobs)
    assert isinstance(outcomes.pop(place).error, UnknownMemory)
    assert [o.value.content for o in outcomes] == ["a", "b"] == _contents(handle)


@pytest.mark.parametrize(
    "error", [ValueError("x"), sqlite3.IntegrityError("x"), sqlite3.OperationalError("no such column")]
)
def test_a_bug_in_one_job_is_that_jobs_own(handle: TenantDatabase, error: Exception) -> None:
    """Also SQLite's errors about the statement, and also when all of them fail, or the only one."""

    def broken(connection: sqlite3.Connection) -> None:
        raise error

    outcomes = batch.commit(handle, [broken, _create("a"), broken])
    assert [o.error for o in outcomes] == [error, None, error]
    assert [o.error for o in batch.commit(handle, [broken])] == [error]
    assert [o.error for o in batch.commit(handle, [broken] * 3)] == [error] * 3
    assert _contents(handle) == ["a"]


def test_a_full_database_fails_every_job_and_stores_none(handle: TenantDatabase) -> None:
    """Nobody is acknowledged; when there is room again the handle works on."""
    with handle.read() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(TenantDatabaseUnavailable) as failed:
        batch.commit(handle, [_create("small"), _create("x" * 60_000), _create("small")])
    assert isinstance(failed.value.__cause__, sqlite3.OperationalError)
    assert _contents(handle) == []
    with handle.read() as connection:
        connection.execute("PRAGMA max_page_count = 1000000")
    assert batch.commit(handle, [_create("a")])[0].error is None


def test_a_maintenance_mark_refuses_all_before_any_runs(handle: TenantDatabase, paths: TenantPaths) -> None:
    paths.mark.touch()
    ran: list[int] = []
    with pytest.raises(InMaintenance):
        batch.commit(handle, [lambda connection: ran.append(1)])
    assert ran == []


def test_jobs_may_join_while_the_transaction_runs_even_behind_one_that_fails(
    handle: TenantDatabase, paths: TenantPaths
) -> None:
    """They are taken one by one; nobody sees any of them before all are committed, and each has an outcome."""
    other = TenantDatabase(paths)
    seen_outside = []

    def look(connection: sqlite3.Connection) -> None:
        seen_outside.append(len(_contents(other)))

    def fail(connection: sqlite3.Connection) -> None:
        raise UnknownMemory("nobody's")

    outcomes = batch.commit(handle, iter((_create("a"), look, fail, _create("b"), look)))
    assert [o.error is None for o in outcomes] == [True, True, False, True, True]
    assert set(seen_outside) == {0} and _contents(other) == ["a", "b"]
    assert [o.error is None for o in batch.commit(handle, iter((fail, _create("c"))))] == [False, True]
    assert _contents(other) == ["a", "b", "c"]
    other.close()
