"""The tenant schema, as numbered steps; `PRAGMA user_version` is the version a file has.

`application_id` says "this is an Engram tenant database", `meta.tenant_id` says whose: a restore of somebody
else's snapshot is caught inside the file, not by its name. All of a migration is one transaction.

memories  one row a memory; `seq` is the rowid, the order of creation, the FTS rowid and the list cursor
tags      (tag, seq), so that "memories with this tag, newest first" is one index range
versions  every earlier state of a memory, written by the update that replaced it
memories_fts  external-content FTS5 over memories.content, kept by triggers
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime

from shared.errors import CorruptDatabase, SchemaTooNew

APPLICATION_ID = 0x456E6772  # "Engr"

_V1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE memories (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    content TEXT NOT NULL,
    memory_type TEXT NOT NULL,
    tags TEXT NOT NULL,
    metadata TEXT NOT NULL,
    importance REAL NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    version INTEGER NOT NULL
) STRICT;
CREATE TABLE tags (
    tag TEXT NOT NULL,
    seq INTEGER NOT NULL REFERENCES memories(seq) ON DELETE CASCADE,
    PRIMARY KEY (tag, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX tags_by_memory ON tags (seq);
CREATE TABLE versions (
    seq INTEGER NOT NULL REFERENCES memories(seq) ON DELETE CASCADE,
    version INTEGER NOT NULL,
    content TEXT NOT NULL,
    memory_type TEXT NOT NULL,
    tags TEXT NOT NULL,
    metadata TEXT NOT NULL,
    importance REAL NOT NULL,
    updated_at TEXT NOT NULL,
    PRIMARY KEY (seq, version)
) STRICT, WITHOUT ROWID;
CREATE VIRTUAL TABLE memories_fts USING fts5 (
    content, content = 'memories', content_rowid = 'seq', tokenize = 'unicode61 remove_diacritics 2'
);
CREATE TRIGGER memories_ai AFTER INSERT ON memories BEGIN
    INSERT INTO memories_fts (rowid, content) VALUES (new.seq, new.content);
END;
CREATE TRIGGER memories_ad AFTER DELETE ON memories BEGIN
    INSERT INTO memories_fts (memories_fts, rowid, content) VALUES ('delete', old.seq, old.content);
    DELETE FROM tags WHERE seq = old.seq;
    DELETE FROM versions WHERE seq = old.seq;
END;
CREATE TRIGGER memories_au AFTER UPDATE OF content ON memories BEGIN
    INSERT INTO memories_fts (memories_fts, rowid, content) VALUES ('delete', old.seq, old.content);
    INSERT INTO memories_fts (rowid, content) VALUES (new.seq, new.content);
END;
"""

MIGRATIONS: tuple[str, ...] = (_V1,)
SCHEMA_VERSION = len(MIGRATIONS)
TABLES = ("memories", "tags", "versions", "memories_fts", "meta")


def schema_version(connection: sqlite3.Connection) -> int:
    """The version of this file; 0 for an empty one."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def is_older(connection: sqlite3.Connection) -> bool:
    """Whether this is a tenant database that `migrate` would write to."""
    return 0 < schema_version(connection) < SCHEMA_VERSION


def migrate(connection: sqlite3.Connection, tenant_id: str, *, new: bool = False) -> int:
    """Bring the database to `SCHEMA_VERSION` in one transaction and return the version it had.

    An empty file is filled and stamped with `tenant_id` only when it is said to be `new`: a database cut to
    nothing must never turn into a fresh one. Raises `SchemaTooNew`, or `CorruptDatabase` when the file is empty
    or belongs to another tenant. The connection must be in autocommit mode (`isolation_level=None`).
    """
    found = schema_version(connection)
    if found == 0 and not new:
        raise CorruptDatabase("the file holds no tenant database")
    if found > SCHEMA_VERSION:
        raise SchemaTooNew(f"schema version {found} is newer than {SCHEMA_VERSION}, which this build knows")
    if found:
        check_identity(connection, tenant_id)
    if found == SCHEMA_VERSION:
        return found
    connection.execute("BEGIN IMMEDIATE")
    try:
        found = schema_version(connection)
        for number, script in enumerate(MIGRATIONS[found:], start=found + 1):
            for statement in _statements(script):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        if found == 0:
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            now = datetime.now(UTC).isoformat()
            connection.executemany(
                "INSERT INTO meta (key, value) VALUES (?, ?)", [("tenant_id", tenant_id), ("created_at", now)]
            )
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    return found


def check_identity(connection: sqlite3.Connection, tenant_id: str) -> None:
    """Raise `CorruptDatabase` unless this is an Engram database and this tenant's."""
    try:
        application_id = connection.execute("PRAGMA application_id").fetchone()[0]
        row = connection.execute("SELECT value FROM meta WHERE key = 'tenant_id'").fetchone()
    except sqlite3.DatabaseError as e:
        raise CorruptDatabase(f"not an Engram tenant database: {e}") from e
    if application_id != APPLICATION_ID or row is None:
        raise CorruptDatabase("not an Engram tenant database")
    if row[0] != tenant_id:
        raise CorruptDatabase(f"the database belongs to tenant {row[0]!r:.80}, not {tenant_id!r}")


def _statements(script: str) -> list[str]:
    """Split a script at statement ends; `executescript` would commit the open transaction."""
    statements, pending = [], ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            statements.append(pending.strip())
            pending = ""
    if pending.strip():
        raise ValueError(f"incomplete statement at the end of a migration: {pending.strip():.60}")
    return statements
