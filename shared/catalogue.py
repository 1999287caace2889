"""The catalogue: which backups exist and can be trusted.

A row appears only after its object is there whole (`shared.objects` says how that is known), so a row is a promise.
`newest` never returns one that is corrupt, deleted or unverified.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from shared.control_plane import ControlPlane
from shared.errors import UnknownBackup
from shared.ids import new_id
from shared.pack import PLAIN, Packing, PackingName
from shared.receipt import Receipt
from shared.snapshot import Snapshot
from shared.tenant import check_tenant_id, object_key


class Stored(Receipt, frozen=True):
    """A snapshot that lies whole in the object store."""

    snapshot: Snapshot
    key: str
    stored_bytes: int
    stored_sha256: str
    packing: PackingName = "none"
    key_id: UUID | None = None


class Backup(Receipt, frozen=True):
    """One row of `backups`. `sha256` and `size_bytes` are the plain file's, `stored_*` the object's."""

    backup_id: UUID
    tenant_id: str
    ts: datetime
    schema_version: int
    size_bytes: int
    stored_bytes: int
    sha256: str
    stored_sha256: str
    packing: str
    key_id: UUID | None
    key: str
    kind: str
    status: str
    manifest: dict[str, Any]
    verified_at: datetime | None
    created_at: datetime


def key_of(snapshot: Snapshot, packing: Packing = PLAIN) -> str:
    return object_key(snapshot.tenant_id, snapshot.ts, snapshot.manifest.schema_version, packing.suffix)


def register(
    control_plane: ControlPlane, stored: Stored, *, kind: str = "manual", flow_run_id: str | None = None
) -> Backup:
    """Write the row of a stored snapshot. The last step of a backup. Registering twice keeps the first row.

    All but its run, if it has none: `upload.repair` knows of none.
    """
    snapshot = stored.snapshot
    row = {
        "backup_id": new_id(),
        "tenant_id": snapshot.tenant_id,
        "ts": snapshot.ts,
        "schema_version": snapshot.manifest.schema_version,
        "size_bytes": snapshot.size_bytes,
        "stored_bytes": stored.stored_bytes,
        "sha256": snapshot.sha256,
        "stored_sha256": stored.stored_sha256,
        "packing": stored.packing,
        "key_id": stored.key_id,
        "key": stored.key,
        "kind": kind,
        "manifest": Jsonb({**snapshot.manifest.as_dict(), "generation": snapshot.generation}),
        "flow_run_id": flow_run_id,
    }
    newest = {"tenant_id": snapshot.tenant_id, "at": snapshot.ts}
    _, found = control_plane.together(("backup_insert", row), ("backup_newest", newest))
    if not found:
        raise UnknownBackup(f"tenant {snapshot.tenant_id} has no verified backup at {snapshot.ts.isoformat()}")
    if found[0]["key"] != stored.key:
        raise UnknownBackup(f"the row of {stored.key} is not there after its insert")
    return Backup(**found[0])


def get(control_plane: ControlPlane, tenant_id: str, backup_id: str | UUID) -> Backup:
    """A usable backup of this tenant. Raises `UnknownBackup` (unknown, corrupt, deleted, another tenant's)."""
    try:
        wanted = UUID(str(backup_id))
    except ValueError as e:
        raise UnknownBackup(f"{str(backup_id)!r:.80} is not a backup id") from e
    row = control_plane.row("backup_get", backup_id=wanted)
    if row is None or row["tenant_id"] != check_tenant_id(tenant_id):
        raise UnknownBackup(f"tenant {tenant_id} has no backup {wanted}")
    backup = Backup(**row)
    if backup.status != "available":
        raise UnknownBackup(f"backup {wanted} of tenant {tenant_id} is {backup.status}")
    return backup


def newest(control_plane: ControlPlane, tenant_id: str, *, at: datetime | None = None) -> Backup:
    """The newest verified backup not after `at`; without a time, the newest that is not a safety backup.

    Raises `UnknownBackup`.
    """
    row = control_plane.row("backup_newest", tenant_id=check_tenant_id(tenant_id), at=at)
    if row is None:
        when = f" at or before {at.isoformat()}" if at else ""
        raise UnknownBackup(f"tenant {tenant_id} has no verified backup{when}")
    return Backup(**row)


def list_of(control_plane: ControlPlane, tenant_id: str, *, limit: int = 100) -> list[Backup]:
    """Newest first, whatever their status."""
    found = control_plane.rows("backup_list", tenant_id=check_tenant_id(tenant_id), limit=limit)
    return [Backup(**row) for row in found]


def stale(
    control_plane: ControlPlane, older_than_seconds: float, *, tenant_id: str | None = None, limit: int = 100
) -> list[dict[str, Any]]:
    """Tenants, suspended ones too, or that one, whose last good backup is older than that, the worst first: {tenant_id,
    machine_id, backup_id, good_at, age_seconds}. One that was never backed up has neither of the two; its age is its
    own."""
    return control_plane.rows("backups_stale", older_than_seconds=older_than_seconds, tenant_id=tenant_id, limit=limit)
