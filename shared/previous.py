"""The database before the last restore: sealing it, and staging it for an undo.

`engram.db.bak` must be whole on its own: an operator copies the one file. What the old writers left in its `-wal`
is therefore checkpointed into it after the release, outside the lock, so that the locked window does not grow.

An undo stages a copy of it (SQLite's online backup, so a `-wal` is included) and goes through the same lock, swap,
verify and release as a restore. A copy, because two names for one live database would share its `-wal`; and so an
undo of an undo is again an undo.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

from shared import snapshot
from shared.engine import memories, schema
from shared.engine.connection import connect
from shared.errors import EngramError, Permanent
from shared.log import get_logger
from shared.receipt import Receipt
from shared.tenant import TenantPaths

log = get_logger("previous")


class Previous(Receipt, frozen=True):
    """The database from before, as it lies there; `changed_at` is its file's mtime in seconds since 1970."""

    memories: int
    schema_version: int
    size_bytes: int
    changed_at: float


def look(paths: TenantPaths) -> Previous:
    """Raises `Permanent` when there is none, or it cannot be read."""
    file = _file(paths)
    try:
        connection = connect(file, readonly=True)
        try:
            schema.check_identity(connection, paths.tenant_id)
            state = file.stat()
            version = schema.schema_version(connection)
            return Previous(memories.count(connection), version, state.st_size, state.st_mtime)
        finally:
            connection.close()
    except (EngramError, sqlite3.DatabaseError) as e:
        raise _unreadable(paths, e) from e


def seal(paths: TenantPaths) -> bool:
    """Fold the previous database's `-wal` into its file; False when it cannot be opened (it may be the damage)."""
    file = Path(os.path.realpath(paths.backup))
    if not file.exists():
        return False
    try:
        connection = connect(file)
        try:
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            connection.close()
    except (EngramError, sqlite3.DatabaseError) as e:
        log.warning("previous_not_sealed", tenant_id=paths.tenant_id, cause=str(e))
        return False
    return not busy


def copy(paths: TenantPaths, destination: Path) -> int:
    """Copy the previous database to `destination`, fsynced; its size in bytes.

    Raises `Permanent` when there is none or it is unreadable, or the disk has no room for a copy.
    """
    file = _file(paths)
    free_bytes, size_bytes = shutil.disk_usage(paths.root).free, file.stat().st_size
    if free_bytes < 2 * size_bytes:
        raise Permanent(f"tenant {paths.tenant_id}: {free_bytes} bytes free, an undo needs {2 * size_bytes}")
    try:
        source = connect(file, readonly=True)
        try:
            snapshot.copy(source, destination)
        finally:
            source.close()
    except (EngramError, sqlite3.DatabaseError) as e:
        destination.unlink(missing_ok=True)
        raise _unreadable(paths, e) from e
    return destination.stat().st_size


def _file(paths: TenantPaths) -> Path:
    file = Path(os.path.realpath(paths.backup))
    if not file.exists():
        raise Permanent(f"tenant {paths.tenant_id} has no database from before a restore")
    return file


def _unreadable(paths: TenantPaths, cause: Exception) -> Permanent:
    return Permanent(f"tenant {paths.tenant_id}: the database from before cannot be read: {cause}")
