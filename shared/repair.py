"""Finish or undo what a restore left, from its mark alone, and the checks that decide which.

    no mark                       nothing was begun, or all was finished
    mark, current = from          not swapped: undo (drop the mark); when it was being put back, or the tenant was
                                  locked before, only if it verifies
    mark, current = to, verifies  swapped: finish (drop the mark)
    mark, current = to, does not  put back, verify that, drop the mark; if even that fails the tenant stays locked

A run that fails or is cancelled calls it for itself (`shared.restore.Hold`); for a run that was killed, the next
restore of the tenant does. Needs no control plane: the mark says which two generations the swap was between.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Literal

from shared import generation
from shared.durable import unlink_database
from shared.engine import schema
from shared.engine.connection import connect
from shared.errors import CorruptDatabase, EngramError
from shared.fence import Fence, Mark, read_mark
from shared.log import get_logger
from shared.snapshot import Manifest
from shared.tenant import TenantPaths

log = get_logger("repair")
Outcome = Literal["restored", "put_back"]
_DRAIN_TIMEOUT_SECONDS = 10.0


def repair(paths: TenantPaths, fence: Fence | None = None) -> Outcome | None:
    """Finish or undo what a run left, from the mark alone; None when there was nothing to do.

    The caller holds the tenant's `RestoreMutex`, so the mark's owner is either dead or the caller. Raises
    `CorruptDatabase`, tenant still locked, when neither the new nor the old database verifies, and
    `DrainTimeout`, the mark still standing, when a process stays inside the database.
    """
    mark = read_mark(paths)
    if mark is None:
        if fence is not None:
            _lower(fence)
        return None
    own = fence or Fence(paths, mark)
    outcome: Outcome = "put_back"
    try:
        if fence is None:
            own.raise_(_DRAIN_TIMEOUT_SECONDS, keep_mark=True)
        active = generation.active(paths)
        if active == mark.to_generation and not mark.putting_back:
            try:
                check_active(paths, active, None)
                outcome = "restored"
            except CorruptDatabase:
                own.note_put_back()
                _put_back(paths, mark)
        elif mark.putting_back or mark.from_unsettled:
            _put_back(paths, mark)
    except BaseException:
        own.leave_locked()
        log.critical("tenant_left_locked", tenant_id=mark.tenant_id, holder=mark.holder, epoch=mark.epoch)
        raise
    _lower(own)
    log.warning("restore_repaired", tenant_id=mark.tenant_id, holder=mark.holder, outcome=outcome)
    return outcome


def _lower(fence: Fence) -> None:
    """A disk that fails here leaves the mark for the next repair, never the lock with a process that lives on."""
    try:
        fence.lower()
    except BaseException:
        fence.leave_locked()
        raise


def clear(paths: TenantPaths, *, keep_previous: int) -> None:
    """Remove a snapshot on its way in, and what was prepared and never activated. The caller holds the mutex."""
    unlink_database(paths.restore_file)
    if read_mark(paths) is None:
        generation.collect(paths, keep_previous=keep_previous)


def _put_back(paths: TenantPaths, mark: Mark) -> None:
    if mark.from_generation == 0:
        raise CorruptDatabase(f"tenant {mark.tenant_id} had no database before: nothing to put back")
    if generation.active(paths) != mark.from_generation:
        generation.activate(paths, mark.from_generation)
    check_active(paths, mark.from_generation, None)


def check_active(paths: TenantPaths, expected: int, manifest: Manifest | None) -> tuple[str, ...]:
    """The checks of `verify`, by name. Raises `CorruptDatabase`."""
    if generation.active(paths) != expected:
        raise CorruptDatabase(f"generation {generation.active(paths)} is active, not {expected}")
    return check_file(Path(os.path.realpath(paths.database)), paths.tenant_id, manifest)


def check_file(file: Path, tenant_id: str, manifest: Manifest | None) -> tuple[str, ...]:
    """The same of a database file that may not be active yet. Raises `CorruptDatabase`."""
    try:
        connection = connect(file)
        try:
            return _check_open(connection, tenant_id, manifest)
        finally:
            connection.close()
    except (EngramError, sqlite3.DatabaseError) as e:
        raise CorruptDatabase(f"the active database does not verify: {e}") from e


def _check_open(connection: sqlite3.Connection, tenant_id: str, manifest: Manifest | None) -> tuple[str, ...]:
    schema.check_identity(connection, tenant_id)
    if (version := schema.schema_version(connection)) != schema.SCHEMA_VERSION:
        raise CorruptDatabase(f"schema version is {version}")
    if (mode := connection.execute("PRAGMA journal_mode").fetchone()[0]) != "wal":
        raise CorruptDatabase(f"journal mode is {mode}")
    newest = connection.execute("SELECT id FROM memories ORDER BY seq DESC LIMIT 1").fetchone()
    if manifest is not None and (newest[0] if newest else None) != manifest.sentinel_id:
        raise CorruptDatabase("the newest memory is not the snapshot's")
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(
            "INSERT INTO memories (id, content, memory_type, tags, metadata, importance, created_at, updated_at,"
            " version) VALUES ('verify', 'verifysentinel', 'verify', '[]', '{}', 0, '', '', 1)"
        )
        found = connection.execute(
            "SELECT count(*) FROM memories_fts WHERE memories_fts MATCH 'verifysentinel'"
        ).fetchone()[0]
    finally:
        connection.execute("ROLLBACK")
    if found != 1:
        raise CorruptDatabase("a memory written inside a transaction is not found by search")
    return ("identity", "schema", "wal", "sentinel", "write", "search")
