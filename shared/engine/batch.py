"""Many writes in one transaction: one fsync for all of them, and still each succeeds or fails alone.

A commit with synchronous=FULL costs an fsync whatever is in it, and an insert alone costs more CPU than its share
of a batch: 200 µs alone, 80 as one of four, 35 as one of 32 (measured here). So whoever has several writes for one
database hands them over together and acknowledges each when `commit` returns.

Neighbours of one kind (`Alike`) are done by one call. For creates that is one statement for several rows: FTS5 then
writes one segment of its index for all of them instead of one each, and a thread gives the interpreter away once
instead of twice a memory (CPU of a create in a transaction of four, eight and 32: 12, 23 and 30% less).

The first try runs the jobs without savepoints, because nearly always all of them succeed and a savepoint makes
SQLite copy every page it touches. When one fails, everything is rolled back and run again, now one by one with a
savepoint each. So a job must be safe to run twice when the first run was rolled back: it may touch its connection and
nothing else.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self, cast

from shared.engine.connection import is_failure
from shared.engine.database import TenantDatabase

Job = Callable[[sqlite3.Connection], Any]


class Alike(Protocol):
    """A job which can be done with others of its kind: `together` does what calling one after the other would do, and
    returns what they would. Which kind it is, is its class."""

    def __call__(self, connection: sqlite3.Connection) -> Any: ...

    @classmethod
    def together(cls, connection: sqlite3.Connection, jobs: Sequence[Self]) -> list[Any]: ...


class Outcome(NamedTuple):
    """`value` is the job's result, unless `error` says why it has none and nothing of it was stored."""

    value: Any
    error: Exception | None = None


class _JobFailed(Exception):
    """Ends the first try; never leaves this module."""


def commit(database: TenantDatabase, take: Callable[[], Job | None]) -> list[Outcome]:
    """Run jobs in order in one transaction; when this returns they are committed and fsynced.

    `take` gives the next job, or None when none waits, the first time when the transaction has begun. It is asked again
    when that has run, so others may join meanwhile; before, for a job that could be done with its neighbours. The
    outcomes are those of the jobs taken, which are all that it gave unless this raises.

    Raises what `TenantDatabase.write` raises, and any failure of the database itself (full, corrupt, busy):
    then nothing was stored and the error is every taken job's.
    """
    taken: list[Job] = []

    def following() -> Job | None:
        if (job := take()) is not None:
            taken.append(job)
        return job

    try:
        with database.write() as connection:
            return _run_all(connection, following)
    except _JobFailed as e:
        if len(taken) == 1 and isinstance(e.__cause__, Exception) and following() is None:
            return [Outcome(None, e.__cause__)]
    with database.write() as connection:
        outcomes = [_run_apart(connection, job) for job in taken]
        while (job := following()) is not None:
            outcomes.append(_run_apart(connection, job))
        return outcomes


def _run_all(connection: sqlite3.Connection, following: Callable[[], Job | None]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    job = following()
    while job is not None:
        alike: list[Any] = [job]
        kind = cast(type[Alike], type(job)) if hasattr(job, "together") else None
        behind = None
        if kind is not None:
            while type(behind := following()) is kind:
                alike.append(behind)
        try:
            values = [job(connection)] if kind is None else kind.together(connection, alike)
            outcomes += [Outcome(value) for _, value in zip(alike, values, strict=True)]
        except Exception as e:
            if _is_everybodys(connection, e):
                raise
            raise _JobFailed from e
        job = behind if behind is not None else following()
    return outcomes


def _run_apart(connection: sqlite3.Connection, job: Job) -> Outcome:
    connection.execute("SAVEPOINT job")
    try:
        outcome = Outcome(job(connection))
    except Exception as e:
        if _is_everybodys(connection, e):
            raise
        connection.execute("ROLLBACK TO job")
        outcome = Outcome(None, e)
    connection.execute("RELEASE job")
    return outcome


def _is_everybodys(connection: sqlite3.Connection, e: Exception) -> bool:
    """SQLite gave the transaction up (a full disk may), or it is the database that fails and not the statement."""
    return not connection.in_transaction or (isinstance(e, sqlite3.DatabaseError) and is_failure(e))
