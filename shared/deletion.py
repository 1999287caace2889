"""Deleting a tenant, with proof: begin → files → copies → keys → objects → receipt.

    begin     state `deleting` (gateways answer 403 within `tenant_refresh_seconds`) and the inventory, one transaction
    files     mutex, lease, fence, Litestream lets go; then ONE rename to `tenants/.deleting-…`, fsync, removal, fsync
    copies    in work directories of this machine: dead runs' are cleared, living ones waited for. No upload begins and
              no key is made for a tenant that is `deleting`, so nothing of it comes after
    keys      the tenant's wrapped keys are deleted: copies of its encrypted backups cannot be read by anybody
    objects   every object and every open upload below the tenant's prefix is deleted, and its catalogue row says so
    receipt   all of it is looked for again; only when nothing is found the state is `deleted`

Each step can be done twice: a run that died anywhere is finished by running it again, and until then the state says
`deleting`. With `keep_backups` keys and objects stay, and retention removes them `retention_deleted_tenant_days` later,
the keys with the last object; the receipt then says `erased: false`, and deleting once more erases them at once.

Kept on purpose: usage events and rollups (they are billed), the rows of backups, restores and restore tests without any
content. Not proven here: blocks on a disk, copies an operator made, what a verification or a restore test on another
machine has in hand (gone with its run), earlier versions in a versioned bucket, what PostgreSQL's own history says of a
key, and a file that a gateway still has open, freed when it closes it.

An id can be created again only after everything of it was erased. Tokens of the former tenant are the issuer's matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from shared import generation, keys, lease, litestream, litestream_copies, move_disk, registry, remnants
from shared.control_plane import ControlPlane, rows
from shared.durable import fsync_path, remove_tree
from shared.errors import LeaseHeld, ObjectLocked, Permanent, Refused
from shared.fence import Fence, Mark, RestoreMutex
from shared.ids import new_id
from shared.log import get_logger
from shared.objects import ObjectStore
from shared.receipt import Receipt
from shared.settings import Settings
from shared.tenant import TenantPaths

log = get_logger("deletion")


class Inventory(Receipt, frozen=True):
    """What there is of a tenant: sizes in bytes by file and by object key, and the ids of its keys."""

    files: dict[str, int]
    objects: dict[str, int]
    keys: list[str]


class Deleted(Receipt, frozen=True):
    """The end of a deletion. `receipt` is the JSON text that `receipt_sha256` is of."""

    tenant_id: str
    deletion_id: UUID
    erased: bool
    receipt: str
    receipt_sha256: str


def look(settings: Settings, control_plane: ControlPlane, objects: ObjectStore, tenant_id: str) -> Inventory:
    """Everything of the tenant that there is now; changes nothing. Files are never opened."""
    paths = TenantPaths.of(settings.tenants_dir, tenant_id)
    files = {}
    for root in [paths.root, *_trash(paths)]:
        for file in root.rglob("*") if root.exists() else ():
            if file.is_symlink() or not file.is_dir():
                files[str(file.relative_to(settings.tenants_dir))] = file.lstat().st_size
    prefix = f"tenants/{paths.tenant_id}/"
    found = {listed.key: listed.size_bytes for page in objects.listing(prefix) for listed in page}
    files |= remnants.copies(settings, tenant_id)
    found |= remnants.begun(objects.settings, tenant_id)
    ids = [str(row["key_id"]) for row in control_plane.rows("tenant_keys_list", tenant_id=tenant_id)]
    return Inventory(files, found, ids)


def check(
    settings: Settings,
    control_plane: ControlPlane,
    tenant_id: str,
    *,
    keep_backups: bool,
    machines_gone: Collection[str] = (),
) -> None:
    """Raises `Refused` when the tenant must not be deleted from here or now, `LeaseHeld` while it moves,
    `UnknownTenant`."""
    _check_here(settings, control_plane, tenant_id, keep_backups, machines_gone)
    _check_elsewhere(control_plane, tenant_id, machines_gone)


def _check_here(
    settings: Settings, control_plane: ControlPlane, tenant_id: str, keep_backups: bool, machines_gone: Collection[str]
) -> None:
    tenant = registry.get(control_plane, tenant_id)
    if tenant.machine_id != settings.machine_id:
        raise Refused(f"tenant {tenant_id} lies on machine {tenant.machine_id}, this is {settings.machine_id}")
    move_disk.refuse(TenantPaths.of(settings.tenants_dir, tenant_id))
    if unknown := sorted(set(machines_gone) - _keepers(control_plane, tenant_id)):
        raise Refused(f"machine {', '.join(unknown)} keeps nothing of tenant {tenant_id}; nothing was deleted")
    held = control_plane.row("tenant_holds", tenant_id=tenant_id)
    if held is not None and not keep_backups:
        raise Refused(f"backup {held['backup_id']} of tenant {tenant_id} is held: {held['hold_reason']}")


def _check_elsewhere(control_plane: ControlPlane, tenant_id: str, machines_gone: Collection[str]) -> None:
    if waits := sorted(_keepers(control_plane, tenant_id) - set(machines_gone)):
        raise Refused(
            f"machine {', '.join(waits)} still keeps files of tenant {tenant_id} from before its move; deleting asks"
            f" its sweep to remove them: try again in a minute; if there is no such machine any more: --machine-gone"
        )


def _keepers(control_plane: ControlPlane, tenant_id: str) -> set[str]:
    """Machines with files from before a move."""
    return {row["source"] for row in control_plane.rows("moves_kept", tenant_id=tenant_id)}


def delete(
    settings: Settings,
    control_plane: ControlPlane,
    objects: ObjectStore,
    tenant_id: str,
    *,
    reason: str,
    requested_by: str,
    keep_backups: bool = False,
    machines_gone: Collection[str] = (),
) -> Deleted:
    """Delete the tenant, or finish what a dead run began. Raises `Refused` with nothing deleted, and `Permanent`, the
    tenant still `deleting`, when something of it is left.

    `machines_gone` kept files of the tenant from before a move and are said to exist no more: they are not waited for,
    the receipt names them as not looked at, and should one come back its sweep removes what it kept.
    """
    _check_here(settings, control_plane, tenant_id, keep_backups, machines_gone)
    control_plane.execute("moves_hurry", tenant_id=tenant_id)  # not for one that is refused anyhow: it is a last copy
    _check_elsewhere(control_plane, tenant_id, machines_gone)
    paths = TenantPaths.of(settings.tenants_dir, tenant_id)
    try:
        mutex = RestoreMutex(paths)
    except LeaseHeld as e:
        raise Refused(f"{e}; nothing was deleted") from e
    try:
        holder = f"delete {new_id()}"
        _lease(settings, control_plane, tenant_id, holder, reason)
        try:
            inventory = look(settings, control_plane, objects, tenant_id)
            row = _begin(control_plane, tenant_id, reason, requested_by, keep_backups, inventory)
            _remove_files(settings, paths, holder)
        finally:
            lease.release(control_plane, tenant_id, holder)
    finally:
        mutex.release()
    remnants.wait(settings, tenant_id, settings.restore_drain_timeout_seconds)
    problems = _remove_copies(objects, tenant_id)
    problems += [] if keep_backups else _remove_backups(control_plane, objects, tenant_id)
    return _finish(settings, control_plane, objects, row, problems, sorted(machines_gone))


def _lease(settings: Settings, control_plane: ControlPlane, tenant_id: str, holder: str, reason: str) -> None:
    lease.release_dead(control_plane, tenant_id)  # the mutex proves it
    try:
        lease.acquire(control_plane, tenant_id, holder=holder, reason=reason, seconds=settings.lease_seconds)
    except LeaseHeld as e:
        raise Refused(f"{e}; nothing was deleted") from e


def _begin(
    control_plane: ControlPlane,
    tenant_id: str,
    reason: str,
    requested_by: str,
    keep_backups: bool,
    found: Inventory,
) -> dict[str, Any]:
    """State and row together; a deletion begun before keeps its row, and what it had found is added to."""
    with control_plane.transaction() as connection:
        rows(connection, "tenant_set_deleting", tenant_id=tenant_id)
        rows(connection, "restores_close_deleted", tenant_id=tenant_id)
        begun = rows(connection, "tenant_deletion_open", tenant_id=tenant_id)
        inventory = {"files": found.files, "objects": found.objects, "keys": found.keys}
        if begun:
            before = begun[0]["inventory"]
            inventory["files"] = before["files"] | found.files
            inventory["objects"] = before["objects"] | found.objects
            inventory["keys"] = sorted({*before["keys"], *found.keys})
        return rows(
            connection,
            "tenant_deletion_begin",
            deletion_id=begun[0]["deletion_id"] if begun else new_id(),
            tenant_id=tenant_id,
            reason=reason,
            requested_by=requested_by,
            keep_backups=keep_backups,
            inventory=Jsonb(inventory),
        )[0]


def _remove_files(settings: Settings, paths: TenantPaths, holder: str) -> None:
    """Under the fence, so that nobody is inside. What has the lock file open finds it gone and never writes again."""
    number = generation.active(paths)
    fence = Fence(paths, Mark(paths.tenant_id, holder, 0, number, number, time.time()))
    try:
        fence.raise_(settings.restore_drain_timeout_seconds)
        litestream.let_go(settings, paths, keep=None)
        os.rename(paths.root, paths.root.with_name(f".deleting-{paths.tenant_id}.{new_id().hex}"))
        fsync_path(settings.tenants_dir)
        for directory in _trash(paths):
            remove_tree(directory)
        fsync_path(settings.tenants_dir)
    finally:
        fence.leave_locked()


def _trash(paths: TenantPaths) -> list[Path]:
    """What an earlier rename took away. A dot is in no tenant id, so no other tenant's."""
    return sorted(paths.root.parent.glob(f".deleting-{paths.tenant_id}.*"))


def _remove_copies(objects: ObjectStore, tenant_id: str) -> list[str]:
    """Litestream's, also when backups are kept: they are none, and retention does not know them."""
    try:
        litestream_copies.erase(objects, tenant_id)
    except ObjectLocked as e:
        return [str(e)]
    return []


def _remove_backups(control_plane: ControlPlane, objects: ObjectStore, tenant_id: str) -> list[str]:
    """Keys, then objects, listed anew: also those without a row. What the store keeps is returned."""
    keys.erase(control_plane, tenant_id)
    control_plane.execute("backup_uploads_erase", tenant_id=tenant_id)
    control_plane.execute("backups_of_deleted", tenant_id=tenant_id)
    remnants.abort(objects.settings, tenant_id)
    problems = []
    prefix = f"tenants/{tenant_id}/"
    known = {row["key"] for row in control_plane.rows("backups_deleting_of", tenant_id=tenant_id)}
    for key in sorted(known | set(objects.keys(prefix))):
        try:
            objects.delete(key)
            control_plane.execute("backup_deleted_by_key", key=key)
        except ObjectLocked as e:
            problems.append(str(e))
    return problems


def _finish(
    settings: Settings,
    control_plane: ControlPlane,
    objects: ObjectStore,
    row: dict[str, Any],
    problems: list[str],
    machines_gone: list[str],
) -> Deleted:
    """Look for all of it again, write the receipt; raises `Permanent` when there is something left."""
    tenant_id, kept = row["tenant_id"], row["keep_backups"]
    left = look(settings, control_plane, objects, tenant_id)
    still = [*left.files] + ([] if kept else [*left.objects, *(f"key {key}" for key in left.keys)])
    root = TenantPaths.of(settings.tenants_dir, tenant_id).root
    if still or os.path.lexists(root):
        said = "; ".join([*problems, *still][:5])
        raise Permanent(f"tenant {tenant_id} is not deleted yet, {len(still)} things are left: {said}; run it again")
    erased = not left.objects and not left.keys
    receipt = {
        "deletion_id": str(row["deletion_id"]),
        "tenant_id": tenant_id,
        "machine_id": settings.machine_id,
        "reason": row["reason"],
        "requested_by": row["requested_by"],
        "started_at": row["started_at"].isoformat(),
        "checked_at": datetime.now(UTC).isoformat(),
        "erased": erased,
        "removed": {
            "files": row["inventory"]["files"],
            "objects": {k: v for k, v in row["inventory"]["objects"].items() if k not in left.objects},
            "keys": [key for key in row["inventory"]["keys"] if key not in left.keys],
        },
        "not_looked_at": [f"machine {name}, said to be gone for good" for name in machines_gone],
        "left": {"files": 0, "objects": len(left.objects), "keys": len(left.keys)},
        "kept": ["usage", "catalogue rows without content"]
        + ([f"backups for {settings.retention_deleted_tenant_days} days"] if not erased else []),
    }
    text = json.dumps(receipt, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    with control_plane.transaction() as connection:
        rows(
            connection,
            "tenant_deletion_finish",
            deletion_id=row["deletion_id"],
            receipt=text,
            receipt_sha256=digest,
            erased=erased,
        )
        rows(connection, "tenant_set_deleted", tenant_id=tenant_id)
    log.warning("tenant_deleted", tenant_id=tenant_id, erased=erased, receipt_sha256=digest)
    return Deleted(tenant_id, row["deletion_id"], erased, text, digest)
