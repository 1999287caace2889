"""The plan of a restore or an undo: from what, how old, what would be lost. Making one changes nothing.

To an instant, the source is whichever is nearer: the newest verified backup not after it, or a state of Litestream's
copy (`shared.litestream_copies`) when that layer is on. A backup chosen beside a copy stays in the plan: it is what is
taken when the copy cannot be restored, and `note` then says so.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal
from uuid import UUID

import msgspec

from shared import backup as backup_steps
from shared import catalogue, litestream, litestream_copies, previous, registry
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.engine import schema
from shared.engine.database import TenantDatabase
from shared.errors import CorruptBackup, EngramError, Permanent, UnknownBackup
from shared.ids import new_id
from shared.litestream_copies import Point
from shared.objects import ObjectStore
from shared.receipt import Receipt
from shared.settings import Settings
from shared.tenant import TenantPaths


class Plan(Receipt, frozen=True):
    """What a restore or an undo would do.

    `backup` is None for an undo, whose source is `engram.db.bak`. With a `copy` the source is that, and `backup`, if
    there is one, takes its place when it fails. `source_at` is the instant the source was the truth: what is live and
    younger (`writes_lost`) would be gone. What is in the source is None where only a look into it would tell.
    `live_memories` and `writes_lost` are None when the live database cannot be read (`live_error`). `window_ms` is what
    the last restores held writes for. `note` says why the source is not the one that would be nearest.
    """

    restore_id: UUID
    tenant_id: str
    kind: Literal["restore", "undo"]
    backup: Backup | None
    source_at: datetime
    source_memories: int | None
    source_schema_version: int | None
    size_bytes: int
    age_seconds: float
    live_memories: int | None
    writes_lost: int | None
    live_error: str | None
    window_ms: float | None
    copy: Point | None = None
    note: str | None = None

    @property
    def source(self) -> str:
        """In words."""
        if self.copy is not None:
            return str(self.copy)
        return f"backup {self.backup.backup_id}" if self.backup else "engram.db.bak"


def schema_change(stored: int | None) -> str:
    """What a restore does with a database of that schema version, in words."""
    now = schema.SCHEMA_VERSION
    if stored is None:
        return f"not known yet; older than v{now} is migrated on the copy"
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
    objects: Callable[[], ObjectStore] | None = None,
) -> Plan:
    """Choose the source and weigh it against the live database; changes nothing of the tenant's.

    A finished upload without its row, which may be the newest there is, gets it first. The store is opened (`objects`)
    only for that and to look for Litestream's copies. Raises `Permanent` (both given, unknown tenant, no such backup).
    """
    if backup_id is not None and at is not None:
        raise Permanent("give a backup id or a time, not both")
    registry.get_active(control_plane, tenant_id)
    if at is not None and at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    if backup_id is not None:
        return _of_backup(settings, control_plane, catalogue.get(control_plane, tenant_id, backup_id), None)
    copy, note = None, _register_uploads(settings, control_plane, tenant_id, objects)
    if at is not None and litestream.enabled(settings):
        try:
            copy = litestream_copies.point_at(objects() if objects else ObjectStore(settings), tenant_id, at)
        except EngramError as e:  # the second layer must not keep the first from its work
            note = f"Litestream's copies could not be looked at: {e}"
    try:
        backup = catalogue.newest(control_plane, tenant_id, at=at)
    except UnknownBackup as e:
        if copy is None and note:
            raise UnknownBackup(f"{e}; {note}") from e
        if copy is None:
            raise
        backup = None
    if copy is None or (backup is not None and copy.at <= backup.ts):
        assert backup is not None  # else it was raised
        return _of_backup(settings, control_plane, backup, note)
    return _weigh(
        settings,
        control_plane,
        tenant_id,
        kind="restore",
        backup=backup,
        copy=copy,
        source_at=copy.at,
        memories=None,
        schema_version=None,
        size_bytes=copy.size_bytes,
    )


def _register_uploads(
    settings: Settings, control_plane: ControlPlane, tenant_id: str, objects: Callable[[], ObjectStore] | None
) -> str | None:
    """What an upload without its row leaves unknown, in words."""
    if not control_plane.rows("backup_uploads_left", tenant_id=tenant_id):
        return None
    try:
        store = objects() if objects else ObjectStore(settings)
        backup_steps.repair(store, control_plane, tenant_id)
        left = control_plane.rows("backup_uploads_left", tenant_id=tenant_id)
        unknown = next((row["key"] for row in left if store.exists(row["key"])), None)
    except EngramError as e:  # an older backup is better than none
        return f"an upload that may be newer could not be looked at: {e}"
    return f"an upload that may be newer could not be registered: {unknown}; the log says why" if unknown else None


def fall_back(settings: Settings, control_plane: ControlPlane, chosen: Plan, cause: str) -> Plan:
    """The plan of the same restore from its backup, because its copy failed. Raises `CorruptBackup` without one."""
    if chosen.backup is None:
        raise CorruptBackup(f"{cause}; there is no backup that old")
    note = f"{chosen.copy} could not be restored, so the backup was taken: {cause}"
    made = _of_backup(settings, control_plane, chosen.backup, note)
    return msgspec.structs.replace(made, restore_id=chosen.restore_id)


def _of_backup(settings: Settings, control_plane: ControlPlane, backup: Backup, note: str | None) -> Plan:
    return _weigh(
        settings,
        control_plane,
        backup.tenant_id,
        kind="restore",
        backup=backup,
        note=note,
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
        kind="undo",
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
    kind: Literal["restore", "undo"],
    backup: Backup | None,
    source_at: datetime,
    memories: int | None,
    schema_version: int | None,
    size_bytes: int,
    copy: Point | None = None,
    note: str | None = None,
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
        kind=kind,
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
        copy=copy,
        note=note,
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
