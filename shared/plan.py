"""The plan of a restore or an undo: from what, how old, what would be lost. Making one changes nothing."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from typing import Literal
from uuid import UUID

from shared import catalogue, previous, registry
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.engine import schema
from shared.engine.database import TenantDatabase
from shared.errors import EngramError, Permanent
from shared.ids import new_id
from shared.receipt import Receipt
from shared.settings import Settings
from shared.tenant import TenantPaths


class Plan(Receipt, frozen=True):
    """What a restore or an undo would do.

    `backup` is None for an undo, whose source is `engram.db.bak`. `source_at` is the instant the source was the
    truth: what is live and younger (`writes_lost`) would be gone. `live_memories` and `writes_lost` are None when
    the live database cannot be read (`live_error`). `window_ms` is what the last restores held writes for.
    """

    restore_id: UUID
    tenant_id: str
    kind: Literal["restore", "undo"]
    backup: Backup | None
    source_at: datetime
    source_memories: int
    source_schema_version: int
    size_bytes: int
    age_seconds: float
    live_memories: int | None
    writes_lost: int | None
    live_error: str | None
    window_ms: float | None


def schema_change(stored: int) -> str:
    """What a restore does with a database of that schema version, in words."""
    now = schema.SCHEMA_VERSION
    if stored > now:
        return f"v{stored}, newer than v{now}: will be refused"
    return f"v{now}, unchanged" if stored == now else f"v{stored}, migrated to v{now} on the copy"


def plan(
    settings: Settings,
    control_plane: ControlPlane,
    tenant_id: str,
    *,
    backup_id: str | None = None,
    at: datetime | None = None,
) -> Plan:
    """Choose the backup and weigh it against the live database; changes nothing.

    Raises `Permanent` (both given, unknown tenant, no such backup).
    """
    if backup_id is not None and at is not None:
        raise Permanent("give a backup id or a time, not both")
    registry.get_active(control_plane, tenant_id)
    if at is not None and at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    backup = (
        catalogue.get(control_plane, tenant_id, backup_id)
        if backup_id is not None
        else catalogue.newest(control_plane, tenant_id, at=at)
    )
    return _weigh(
        settings,
        control_plane,
        tenant_id,
        backup=backup,
        source_at=backup.ts,
        memories=int(backup.manifest.get("memories", 0)),
        schema_version=backup.schema_version,
        size_bytes=backup.size_bytes,
    )


def plan_undo(settings: Settings, control_plane: ControlPlane, tenant_id: str) -> Plan:
    """Weigh `engram.db.bak` against the live database; changes nothing.

    Raises `Permanent` when there is no readable database from before.
    """
    registry.get_active(control_plane, tenant_id)
    found = previous.look(TenantPaths.of(settings.tenants_dir, tenant_id))
    last = control_plane.row("restore_last", tenant_id=tenant_id)
    return _weigh(
        settings,
        control_plane,
        tenant_id,
        backup=None,
        source_at=last["finished_at"] if last else datetime.fromtimestamp(found.changed_at, UTC),
        memories=found.memories,
        schema_version=found.schema_version,
        size_bytes=found.size_bytes,
    )


def _weigh(
    settings: Settings,
    control_plane: ControlPlane,
    tenant_id: str,
    *,
    backup: Backup | None,
    source_at: datetime,
    memories: int,
    schema_version: int,
    size_bytes: int,
) -> Plan:
    live = lost = error = None
    try:
        live, lost = _live_counts(TenantPaths.of(settings.tenants_dir, tenant_id), source_at)
    except (EngramError, sqlite3.DatabaseError) as e:
        error = str(e)
    window = control_plane.row("restore_window")
    return Plan(
        restore_id=new_id(),
        tenant_id=tenant_id,
        kind="undo" if backup is None else "restore",
        backup=backup,
        source_at=source_at,
        source_memories=memories,
        source_schema_version=schema_version,
        size_bytes=size_bytes,
        age_seconds=(datetime.now(UTC) - source_at).total_seconds(),
        live_memories=live,
        writes_lost=lost,
        live_error=error,
        window_ms=window["locked_ms"] if window else None,
    )


def _live_counts(paths: TenantPaths, since: datetime) -> tuple[int, int]:
    database = TenantDatabase(paths)
    try:
        with database.read() as connection:
            stamp = since.astimezone(UTC).isoformat(timespec="microseconds")
            row = connection.execute(
                "SELECT count(*), count(*) FILTER (WHERE updated_at > ?) FROM memories", (stamp,)
            ).fetchone()
            return row[0], row[1]
    finally:
        database.close()
