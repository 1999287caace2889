"""Many writes in one transaction: one fsync for all of them, and still each succeeds or fails alone.

A commit with synchronous=FULL costs an fsync whatever is in it, and an insert alone costs more CPU than its share
of a batch: 290 µs alone (200 of CPU), 45 as one of 32 (measured here). So whoever has several writes for one database
hands them over together and acknowledges each when `commit` returns.

The first try runs the jobs without savepoints, because nearly always all of them succeed and a savepoint makes
SQLite copy every page it touches (60 µs a job instead of 40). When one fails, everything is rolled back and run
again, now with a savepoint each. So a job must be safe to run twice when the first run was rolled back: it may
touch its connection and nothing else.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from shared.engine.connection import is_failure
from shared.engine.database import TenantDatabase

Job = Callable[[sqlite3.Connection], Any]


class Outcome(NamedTuple):
    """`value` is the job's result, unless `error` says why it has none and nothing of it was stored."""

    value: Any
    error: Exception | None = None


class _JobFailed(Exception):
    """Ends the first try; never leaves this module."""


def commit(database: TenantDatabase, jobs: Iterable[Job]) -> list[Outcome]:
    """Run `jobs` in order in one transaction; when this returns they are committed and fsynced.

    Each job is taken from `jobs` when the one before it has run, the first when the transaction has begun: so others
    may join while it runs. The outcomes are those of the jobs taken, which are all unless this raises.

    Raises what `TenantDatabase.write` raises, and any failure of the database itself (full, corrupt, busy):
    then nothing was stored and the error is every taken job's.
    """
    taken: list[Job] = []
    following = _noted(jobs, taken)
    try:
        with database.write() as connection:
            return [_run(connection, job) for job in following]
    except _JobFailed as e:
        if len(taken) == 1 and isinstance(e.__cause__, Exception) and next(following, None) is None:
            return [Outcome(None, e.__cause__)]
    with database.write() as connection:
        return [_run_apart(connection, job) for job in chain(tuple(taken), following)]


def _noted(jobs: Iterable[Job], taken: list[Job]) -> Iterator[Job]:
    for job in jobs:
        taken.append(job)
        yield job


def _run(connection: sqlite3.Connection, job: Job) -> Outcome:
    try:
        return Outcome(job(connection))
    except Exception as e:
        if _is_everybodys(connection, e):
            raise
        raise _JobFailed from e


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
