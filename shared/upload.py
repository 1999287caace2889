"""What a crash between an object's upload and its catalogue row leaves, and its repair.

Before an upload begins, all that its row will say is written to `backup_uploads`; the row's insert deletes that in
the same statement. So an object without a row is known by name, and is finished by whoever comes first: the next run of
its machine, whatever became of the tenant's database; the tenant's next backup; the plan of a restore; the daily look
for strays. Read back whole, it gets its row; not there, nothing happened; something else, it is left and reported.
A row without an object still cannot happen: this module, too, inserts only after reading.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
from psycopg.types.json import Jsonb

from shared import catalogue
from shared.catalogue import Backup, Stored
from shared.control_plane import ControlPlane
from shared.errors import CorruptBackup, KeyUnavailable, TenantNotActive
from shared.log import get_logger
from shared.objects import ObjectStore
from shared.snapshot import Manifest, Snapshot

_FORGET_SECONDS = 3_600.0  # an upload that began so long ago and is not there will not arrive
log = get_logger("upload")

Opened = Callable[[Stored], str]  # the plain sha256 of what lies under a stored backup's key


def begin(objects: ObjectStore, control_plane: ControlPlane, stored: Stored, kind: str, opened: Opened) -> list[Backup]:
    """Write the upload down; first register what earlier ones of this tenant left. Returns those registered.

    Raises `TenantNotActive` when the tenant is being deleted: nothing of it may be stored any more.
    """
    left = control_plane.rows(
        "backup_upload_begin",
        key=stored.key,
        tenant_id=stored.snapshot.tenant_id,
        stored=Jsonb(_as_json(stored, kind)),
    )
    if not left[0]["begun"]:
        raise TenantNotActive(f"tenant {stored.snapshot.tenant_id} is deleted: nothing of it is stored any more")
    return _finish(objects, control_plane, [row for row in left if row["key"] is not None], opened)


def repair(objects: ObjectStore, control_plane: ControlPlane, tenant_id: str, opened: Opened) -> list[Backup]:
    """Register what uploads of this tenant left. Safe beside a live one: it would get the same row."""
    return _finish(objects, control_plane, control_plane.rows("backup_uploads_left", tenant_id=tenant_id), opened)


def _finish(
    objects: ObjectStore, control_plane: ControlPlane, left: list[dict[str, Any]], opened: Opened
) -> list[Backup]:
    made = []
    for row in left:
        stored, kind = _of_json(row["key"], row["stored"])
        tenant_id, key = stored.snapshot.tenant_id, stored.key
        if not objects.exists(key):
            if (datetime.now(UTC) - row["started_at"]).total_seconds() > _FORGET_SECONDS:
                control_plane.execute("backup_upload_end", key=key)
            continue
        try:
            sha256, size_bytes = objects.sha256(key)
            if sha256 != stored.stored_sha256 and opened(stored) != stored.snapshot.sha256:
                raise CorruptBackup(f"{key} holds something else")
        except KeyUnavailable as e:
            log.warning("upload_not_repaired", tenant_id=tenant_id, key=key, error=str(e))
            continue
        except CorruptBackup as e:
            log.warning("upload_abandoned", tenant_id=tenant_id, key=key, error=str(e))
            control_plane.execute("backup_upload_end", key=key)
            continue
        whole = msgspec.structs.replace(stored, stored_sha256=sha256, stored_bytes=size_bytes)
        made.append(catalogue.register(control_plane, whole, kind=kind))
        log.info("upload_repaired", tenant_id=tenant_id, key=key, backup_id=str(made[-1].backup_id))
    return made


def _as_json(stored: Stored, kind: str) -> dict[str, Any]:
    snapshot = stored.snapshot
    return {
        "kind": kind,
        "tenant_id": snapshot.tenant_id,
        "ts": snapshot.ts.isoformat(),
        "generation": snapshot.generation,
        "size_bytes": snapshot.size_bytes,
        "sha256": snapshot.sha256,
        "manifest": snapshot.manifest.as_dict(),
        "stored_bytes": stored.stored_bytes,
        "stored_sha256": stored.stored_sha256,
        "packing": stored.packing,
        "key_id": str(stored.key_id) if stored.key_id else None,
    }


def _of_json(key: str, row: dict[str, Any]) -> tuple[Stored, str]:
    snapshot = Snapshot(
        row["tenant_id"],
        Path(),  # the local copy died with its run
        datetime.fromisoformat(row["ts"]),
        row["generation"],
        row["size_bytes"],
        row["sha256"],
        msgspec.convert(row["manifest"], Manifest),
    )
    key_id = UUID(row["key_id"]) if row["key_id"] else None
    return Stored(snapshot, key, row["stored_bytes"], row["stored_sha256"], row["packing"], key_id), row["kind"]
