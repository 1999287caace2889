"""A connection to a tenant's database file as this house opens it, and what its failures are called.

synchronous=FULL, because WAL with NORMAL lost 200 of 200 acknowledged rows at power loss (FACTS); opened
mode=rw or ro, because the default would make an empty database where the active one is missing.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from shared.errors import CorruptDatabase, TenantDatabaseUnavailable

CACHE_KIB = 2_048
AUTOCHECKPOINT_PAGES = 1_000  # SQLite's own


def connect(
    path: Path,
    *,
    busy_timeout_seconds: float = 5.0,
    readonly: bool = False,
    cache_kib: int | None = CACHE_KIB,
    autocheckpoint_pages: int = AUTOCHECKPOINT_PAGES,
) -> sqlite3.Connection:
    """Open an existing database with the pragmas of this house. Never creates a file.

    Raises `TenantDatabaseUnavailable` when it cannot be opened, `CorruptDatabase` when it is no database.
    """
    mode = "ro" if readonly else "rw"
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=busy_timeout_seconds,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
    except sqlite3.OperationalError as e:
        raise TenantDatabaseUnavailable(f"cannot open the tenant database: {e}") from e
    try:
        if cache_kib is not None:
            connection.execute(f"PRAGMA cache_size = -{cache_kib}")  # reads the schema
        if not readonly:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            if autocheckpoint_pages != AUTOCHECKPOINT_PAGES:
                connection.execute(f"PRAGMA wal_autocheckpoint = {autocheckpoint_pages}")
    except sqlite3.DatabaseError as e:
        connection.close()
        raise_as_ours(e)
        raise TenantDatabaseUnavailable(f"cannot open the tenant database: {e}") from e
    return connection


_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_UNAVAILABLE = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
)


def is_failure(e: sqlite3.DatabaseError) -> bool:
    """Whether the database fails, rather than a statement that is wrong or breaks a constraint."""
    return _primary_code(e) in (*_CORRUPT, *_UNAVAILABLE)


def raise_as_ours(e: sqlite3.DatabaseError) -> None:
    """Raise our name for a failing database; return for programming errors and constraint violations."""
    if _primary_code(e) in _CORRUPT:
        raise CorruptDatabase(f"the tenant database is corrupt: {e}") from e
    if _primary_code(e) in _UNAVAILABLE:
        raise TenantDatabaseUnavailable(f"the tenant database is unavailable: {e}") from e


def _primary_code(e: sqlite3.DatabaseError) -> int | None:
    code: int | None = getattr(e, "sqlite_errorcode", None)
    return code & 0xFF if code is not None else None
