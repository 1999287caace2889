"""The control plane: PostgreSQL, reached as Neon is reached, through PgBouncer in transaction mode or directly.

So: no prepared statements (`prepare_threshold=None`), no session state, no session advisory locks, no LISTEN;
migrations serialise on `pg_advisory_xact_lock`. SQL lives in `sql/queries.sql`, loaded by name, so that it can
be read and EXPLAINed alone.

A lost or refused connection is `ControlPlaneUnavailable` (transient); a wrong statement stays psycopg's error.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from typing import Any, LiteralString, cast

import psycopg
import psycopg_pool
from psycopg import sql
from psycopg.rows import DictRow, dict_row

from shared.errors import ControlPlaneUnavailable, Permanent
from shared.settings import Settings

Connection = psycopg.Connection[DictRow]
_MIGRATION_LOCK = 0x656E6772616D  # "engram"
# A server whose host vanished sends no reset. By the kernel's defaults whoever waits for its answer waits 15 minutes,
# or two hours when nothing is on its way to it; so, 40 seconds.
_VANISHED = {"keepalives_idle": 20, "keepalives_interval": 5, "keepalives_count": 4, "tcp_user_timeout": 40_000}


@functools.cache
def queries() -> Mapping[str, LiteralString]:
    """Every named query of `sql/queries.sql`."""
    text = (resources.files("shared") / "sql" / "queries.sql").read_text()
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)[1:]
    named: dict[str, LiteralString] = {}
    for name, text_ in zip(parts[::2], parts[1::2], strict=True):
        if name in named:
            raise ValueError(f"two queries are named {name}")
        named[name] = cast(LiteralString, text_.strip().removesuffix(";"))
    return named


class ControlPlane:
    """A small pool of connections. Use as a context manager, or `close()` it."""

    def __init__(self, settings: Settings, *, pool_size: int | None = None) -> None:
        settings.require("control_plane_url")
        self._statement_timeout_seconds = settings.control_plane_statement_timeout_seconds
        self._maintenance_timeout_seconds = settings.control_plane_maintenance_timeout_seconds
        self._pool: psycopg_pool.ConnectionPool[Connection] = psycopg_pool.ConnectionPool(
            settings.control_plane_url.get_secret_value(),
            min_size=0,
            max_size=pool_size or settings.control_plane_pool_size,
            max_idle=240,  # below Neon's five minutes
            timeout=settings.control_plane_connect_timeout_seconds,
            reconnect_timeout=settings.control_plane_connect_timeout_seconds,
            check=psycopg_pool.ConnectionPool.check_connection,
            connection_class=Connection,
            kwargs={
                "row_factory": dict_row,
                "prepare_threshold": None,
                "connect_timeout": max(2, int(settings.control_plane_connect_timeout_seconds)),
                **_VANISHED,
                "application_name": "engram",
            },
            open=True,
        )

    def __enter__(self) -> ControlPlane:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()

    @contextmanager
    def transaction(self, *, maintenance: bool = False) -> Iterator[Connection]:
        """One transaction; commits on leaving, rolls back on an exception. Raises `ControlPlaneUnavailable`.

        A statement of it may take `control_plane_statement_timeout_seconds`; with `maintenance`, where nobody
        waits for the answer, `control_plane_maintenance_timeout_seconds`.
        """
        seconds = self._maintenance_timeout_seconds if maintenance else self._statement_timeout_seconds
        with self._connection() as connection:
            _limit(connection, seconds)
            yield connection

    def together(self, *statements: tuple[str, Mapping[str, Any]]) -> list[list[DictRow]]:
        """Run named queries, each with its parameters, in one transaction; the rows of each.

        One round trip for all of it, with its begin and commit, and one before it that asks whether the connection
        lives: statement by statement it is three more and one a query. Raises as `transaction` does.
        """
        with self._connection() as connection:
            with connection.pipeline():
                _limit(connection, self._statement_timeout_seconds)
                cursors = [connection.execute(queries()[query], parameters) for query, parameters in statements]
                connection.commit()
            return [cursor.fetchall() if cursor.description is not None else [] for cursor in cursors]

    def execute_alone(self, statement: sql.Composed, *, timeout_seconds: float) -> None:
        """Run one statement that PostgreSQL refuses inside a transaction. Raises `ControlPlaneUnavailable`.

        Its time-out is a cancel request from here: a `SET` without `LOCAL` would stay on the pooler's connection.
        """
        with self._connection() as connection:
            connection.autocommit = True
            cut = threading.Timer(timeout_seconds, connection.cancel)
            cut.start()
            try:
                connection.execute(statement)
            finally:
                cut.cancel()
                cut.join()
                if not connection.closed:
                    connection.autocommit = False

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        try:
            with self._pool.connection() as connection:
                yield connection
        except (psycopg_pool.PoolTimeout, psycopg.OperationalError, psycopg.InterfaceError) as e:
            raise ControlPlaneUnavailable(f"control plane: {_one_line(e)}") from e

    def rows(self, query: str, **parameters: Any) -> list[DictRow]:
        """Run one named query in its own transaction and return its rows."""
        return self.together((query, parameters))[0]

    def row(self, query: str, **parameters: Any) -> DictRow | None:
        """The first row of a named query, or None."""
        found = self.rows(query, **parameters)
        return found[0] if found else None

    def execute(self, query: str, **parameters: Any) -> int:
        """Run one named query in its own transaction; the number of rows it touched."""
        with self.transaction() as connection:
            return connection.execute(queries()[query], parameters).rowcount

    def ping(self) -> None:
        """Raise `ControlPlaneUnavailable` unless a round trip works."""
        with self.transaction() as connection:
            connection.execute("SELECT 1")

    def migrate(self) -> list[str]:
        """Apply the numbered files of `sql/schema` that are not yet applied, all in one transaction.

        Runners at the same time queue on an advisory lock and find nothing left to do. Files only add: processes of the
        older build go on, and start, beside what this one makes, until they are replaced. Returns the names of
        those applied. Raises `Permanent` when an applied file was changed afterwards, or is unknown here.
        """
        files = {
            f.name: f.read_text()
            for f in (resources.files("shared") / "sql" / "schema").iterdir()
            if f.name.endswith(".sql")
        }
        applied: list[str] = []
        with self.transaction(maintenance=True) as connection:
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
            connection.execute(
                "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY, sha256 text NOT NULL,"
                " applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
            )
            done = {r["name"]: r["sha256"] for r in connection.execute("SELECT name, sha256 FROM schema_migrations")}
            if unknown := sorted(done.keys() - files.keys()):
                raise Permanent(f"the control plane has migrations this build does not know: {', '.join(unknown)}")
            for name in sorted(files):
                digest = hashlib.sha256(files[name].encode()).hexdigest()
                if name in done:
                    if done[name] != digest:
                        raise Permanent(f"migration {name} was changed after it was applied")
                    continue
                connection.execute(files[name].encode())
                connection.execute("INSERT INTO schema_migrations (name, sha256) VALUES (%s, %s)", (name, digest))
                applied.append(name)
        return applied


def _limit(connection: Connection, seconds: float) -> None:
    """Local to the transaction: a `SET` that lasts would stay on the pooler's connection."""
    connection.execute("SELECT set_config('statement_timeout', %s, true)", (str(int(seconds * 1000)),))


def rows(connection: Connection, query: str, **parameters: Any) -> list[DictRow]:
    """Run a named query inside a caller's transaction and return its rows (none for a plain statement)."""
    cursor = connection.execute(queries()[query], parameters)
    return cursor.fetchall() if cursor.description is not None else []


def copy(connection: Connection, query: str, data: bytes) -> None:
    """Run a named `COPY … FROM STDIN` inside a caller's transaction with the whole of its data."""
    with connection.cursor() as cursor, cursor.copy(queries()[query]) as sink:
        sink.write(data)


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:300]
