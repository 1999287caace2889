"""Tenants' databases as they lie on this machine's disk. Opened read-only, never through the gateway.

Without a tenant every active one of this machine is opened as the gateway opens it (identity, schema version; 1 ms
each), until `LOOK_SECONDS` have passed. One that is named is read whole: integrity_check, foreign keys.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from shared import catalogue, move_disk, registry
from shared.diagnosis import played
from shared.diagnosis.finding import Finding, Symptom, bad, good, unseen
from shared.diagnosis.sight import Sight
from shared.engine import schema
from shared.engine.connection import connect
from shared.errors import (
    ControlPlaneUnavailable,
    CorruptDatabase,
    EngramError,
    InMaintenance,
    SchemaTooNew,
    UnknownBackup,
)
from shared.fence import in_use, read_mark
from shared.playbook import restore
from shared.settings import Settings
from shared.tenant import TenantPaths, tenants_on_disk

LOOK_SECONDS = 10.0
_NORMAL = "opens, is the tenant's own, has a known schema"
_WHOLE = "integrity_check and foreign_key_check find nothing"
_NAMED = 5


def databases(sight: Sight) -> list[Finding]:
    """The named tenant's database read whole, or a look at each of this machine."""
    if sight.tenant_id is not None:
        tenant = registry.get(sight.control_plane, sight.tenant_id)
        if tenant.machine_id != sight.settings.machine_id:
            return [unseen("database", f"{sight.tenant_id} is on machine {tenant.machine_id}", _WHOLE)]
        if (wrong := _wrong(sight.settings, sight.tenant_id, whole=True)) is None:
            return [good("database", "whole", _WHOLE)]
        return [_finding(sight, {sight.tenant_id: wrong}, f"{sight.tenant_id}: {wrong[1]}", _WHOLE)]
    wrong_ones: dict[str, tuple[Symptom, str]] = {}
    tenants = _tenants(sight)
    deadline, looked = time.monotonic() + LOOK_SECONDS, 0
    for tenant_id in tenants:
        if time.monotonic() > deadline:
            break
        looked += 1
        if (wrong := _wrong(sight.settings, tenant_id, whole=False)) is not None:
            wrong_ones[tenant_id] = wrong
    found = [good("database", f"{looked} of {len(tenants)} opened", _NORMAL)]
    if wrong_ones:
        said = "; ".join(f"{tenant_id}: {cause}" for tenant_id, (_, cause) in list(wrong_ones.items())[:_NAMED])
        found = [_finding(sight, wrong_ones, f"{len(wrong_ones)} of {looked} do not open: {said}", _NORMAL)]
    if looked < len(tenants):
        found.append(unseen("other-databases", f"{len(tenants) - looked} were left after {LOOK_SECONDS:g} s", _NORMAL))
    return found


def maintenance(sight: Sight) -> Finding:
    """Whether a restore holds a tenant, and lives: by its lease, its mark and the lock it keeps on this machine."""
    name, normal = "maintenance", "no tenant is held"
    alive: dict[str, str] = {}
    for tenant_id in [sight.tenant_id] if sight.tenant_id is not None else _tenants(sight):
        paths = TenantPaths.of(sight.settings.tenants_dir, tenant_id)
        said = _held(sight, paths)
        if said is None:
            continue
        if not _locked(paths.restore_lock):
            return bad(
                name, f"{tenant_id} is held by {said}, whose run is gone", normal, "restore_left", tenant_id=tenant_id
            )
        alive[tenant_id] = said
    if alive:
        tenant_id, said = next(iter(alive.items()))
        return bad(name, f"{tenant_id} is held by {said}", normal, "in_maintenance", tenant_id=tenant_id)
    return good(name, "none is held", normal)


def _tenants(sight: Sight) -> list[str]:
    """The active ones of this machine; those on its disk when the control plane does not answer."""
    try:
        rows = sight.control_plane.rows("tenants_of_machine", machine_id=sight.settings.machine_id)
        return [row["tenant_id"] for row in rows]
    except ControlPlaneUnavailable:
        return tenants_on_disk(sight.settings.tenants_dir)


def _wrong(settings: Settings, tenant_id: str, *, whole: bool) -> tuple[Symptom, str] | None:
    """What is wrong with a database, or None."""
    paths = TenantPaths.of(settings.tenants_dir, tenant_id)
    if not paths.database.exists() and paths.moving.exists():
        return None  # between two machines: the check of maintenance has it
    if not paths.database.exists():
        return "database_missing", f"no file behind {paths.database}"
    try:
        with in_use(paths, wait_seconds=settings.tenant_lock_wait_seconds):
            connection = connect(Path(os.path.realpath(paths.database)), readonly=True)
        with closing(connection):
            schema.check_identity(connection, tenant_id)
            if (version := schema.schema_version(connection)) > schema.SCHEMA_VERSION:
                return "schema_too_new", f"schema v{version}"
    except CorruptDatabase as e:
        return "database_corrupt", str(e)
    except SchemaTooNew as e:
        return "schema_too_new", str(e)
    except InMaintenance:
        return None  # the check of maintenance has it
    except (EngramError, sqlite3.Error, OSError) as e:
        if getattr(e, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return "database_corrupt", str(e)
        return "database_unreadable", str(e)
    if whole:
        verdict, problem = restore.examine(paths)
        if verdict != "whole":
            return ("database_corrupt" if verdict == "corrupt" else "database_unreadable"), problem
    return None


def _finding(sight: Sight, wrong: dict[str, tuple[Symptom, str]], seen: str, normal: str) -> Finding:
    tenant_id, (symptom, cause) = next(iter(wrong.items()))
    if symptom == "database_unreadable":
        if f"{restore.CHECK_SECONDS:g} s" in cause:
            return unseen("database", f"{tenant_id}: {cause}", normal)
        if any(f.ok is False for f in played.wrong_permissions(sight, tenant_id)):
            symptom = "permissions_wrong"
    return bad("database", seen, normal, symptom, tenant_id=tenant_id, **_backup(sight, tenant_id))


def _backup(sight: Sight, tenant_id: str) -> dict[str, str]:
    """What a restore would take; nothing when there is none, or nobody can say."""
    try:
        newest = catalogue.newest(sight.control_plane, tenant_id)
    except (UnknownBackup, ControlPlaneUnavailable):
        return {}
    return {"backup_id": str(newest.backup_id), "backup_at": f"{newest.ts:%Y-%m-%d %H:%M:%S} UTC"}


def _held(sight: Sight, paths: TenantPaths) -> str | None:
    """Who holds the tenant, in words; None when nobody does."""
    if (marker := move_disk.read(paths)) is not None and not marker.settled:
        return f"move {marker.move_id} from {marker.source} to {marker.target}"
    if (mark := read_mark(paths)) is not None:
        return mark.holder
    try:
        if paths.restore_lock.stat().st_size > 0:
            return "a restore that is not yet at its swap"
    except FileNotFoundError:
        pass
    if sight.tenant_id is None:
        return None  # a lease without a trace on the disk is swept every lease time; not a query for each tenant
    lease = sight.control_plane.row("lease_get", tenant_id=paths.tenant_id)
    return (
        None if lease is None or lease["holder"] is None else f"{lease['holder']} until {lease['expires_at']:%H:%M:%S}"
    )


def _locked(path: Path) -> bool:
    """Whether a living process has a flock on the file: asked of the kernel's list, for taking the lock oneself, even
    for an instant, could fail a restore that begins just then."""
    try:
        inode = path.stat().st_ino
        lines: Iterable[str] = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    return any(f":{inode} " in line and " FLOCK " in line and "->" not in line for line in lines)
