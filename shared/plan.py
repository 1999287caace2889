"""The plan of a restore: which backup, how old, what would be lost. Making one changes nothing."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from uuid6 import uuid7

from shared import catalogue, registry
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.engine.database import TenantDatabase
from shared.errors import EngramError, Permanent
from shared.settings import Settings
from shared.tenant import TenantPaths


@dataclass(frozen=True)
class Plan:
    """What a restore would do. `writes_lost` counts live memories created or changed after the backup.

    `live_memories` and `writes_lost` are None when the live database cannot be read.
    """

    restore_id: UUID
    tenant_id: str
    backup: Backup
    age_seconds: float
    live_memories: int | None
    writes_lost: int | None
    live_error: str | None


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
    memories = lost = error = None
    try:
        memories, lost = _live_counts(TenantPaths.of(settings.tenants_dir, tenant_id), backup.ts)
    except (EngramError, sqlite3.DatabaseError) as e:
        error = str(e)
    age = (datetime.now(UTC) - backup.ts).total_seconds()
    return Plan(UUID(int=uuid7().int), tenant_id, backup, age, memories, lost, error)


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
