"""Objects that the catalogue does not know: of a crash between upload and row, or of a control plane that was itself
restored from before. Those older than `retention_orphan_hours` are looked at once a run.

    adopted     it opens as the tenant's database its key names: it gets a row, as a safety backup, because nobody knows
                any more what it was made for. So it is restored by its id or by a time, never as "the newest".
                One whose row says deleted while its tenant has no good backup: it becomes corrupt, which verification
                looks at again, and makes available when it is whole
    removed     its row says deleted, or its tenant was erased, or deleted long ago: it should not be there
    registered  a finished upload that a crash kept from its row: it gets that row, as what it was made for
    listed      anything else: a key that is not ours, an unknown tenant, a file that does not open. Left as it is
    unread      we could not look; the next run does
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal
from uuid import UUID

from shared import backup, catalogue, keys, litestream, litestream_copies, pack, snapshot, verify
from shared.catalogue import Stored
from shared.control_plane import ControlPlane
from shared.errors import CorruptBackup, CorruptDatabase, EngramError, KeyUnavailable, SchemaTooNew
from shared.log import get_logger
from shared.objects import Listed, ObjectStore
from shared.pack import Packing
from shared.receipt import Receipt
from shared.retention import SAFETY
from shared.settings import Settings
from shared.snapshot import Manifest, Snapshot
from shared.staging import leave_reserve
from shared.tenant import KeyParts, parse_object_key

Outcome = Literal["adopted", "removed", "registered", "listed", "unread"]
log = get_logger("strays")


class Stray(Receipt, frozen=True):
    """An object without a row, or whose row says deleted, and what became of it."""

    key: str
    size_bytes: int
    modified_at: datetime
    outcome: Outcome
    cause: str


def find(control_plane: ControlPlane, objects: ObjectStore, settings: Settings, *, dry_run: bool) -> Iterator[Stray]:
    """Compare every stored object with the catalogue, a page at a time. `dry_run` changes nothing."""
    before = datetime.now(UTC) - timedelta(hours=settings.retention_orphan_hours)
    for page in objects.listing("tenants"):
        old = {
            listed.key: listed
            for listed in page
            if listed.modified_at < before and not litestream_copies.is_key(listed.key)  # `_expired_copies`
        }
        parts = {key: parse_object_key(key) for key in old}
        unknown = control_plane.rows(
            "strays_of",
            keys=list(old),
            tenant_ids=[p.tenant_id if p is not None else "" for p in parts.values()],
            deleted_days=settings.retention_deleted_tenant_days,
        )
        for row in unknown:
            listed, of = old[row["key"]], parts[row["key"]]
            try:
                outcome, cause = _attend(control_plane, objects, settings, listed, of, row, dry_run)
            except EngramError as e:  # one object must not keep the others from being looked at
                outcome, cause = "unread", str(e)
            log.warning("stray_object", key=listed.key, outcome=outcome, cause=cause, dry_run=dry_run)
            yield Stray(listed.key, listed.size_bytes, listed.modified_at, outcome, cause)
    if litestream.enabled(settings):
        yield from _expired_copies(control_plane, objects, settings, dry_run)


def _expired_copies(
    control_plane: ControlPlane, objects: ObjectStore, settings: Settings, dry_run: bool
) -> Iterator[Stray]:
    """Litestream keeps its copy of the active generation in its window; those of older ones nobody looks after."""
    window = timedelta(hours=settings.point_in_time_hours)
    for row in control_plane.rows("tenants_restored"):
        try:
            for listed in litestream_copies.expired(objects, row["tenant_id"], active=row["generation"], window=window):
                if not dry_run:
                    objects.delete(listed.key)
                cause = "Litestream's copy of a generation that was replaced long ago"
                yield Stray(listed.key, listed.size_bytes, listed.modified_at, "removed", cause)
        except EngramError as e:
            log.warning("copies_not_looked_at", tenant_id=row["tenant_id"], cause=str(e))


def _attend(
    control_plane: ControlPlane,
    objects: ObjectStore,
    settings: Settings,
    listed: Listed,
    parts: KeyParts | None,
    row: dict[str, object],
    dry_run: bool,
) -> tuple[Outcome, str]:
    if parts is None:
        return "listed", "not a key of ours"
    former = isinstance(row["erased_at"], datetime) and parts.ts < row["erased_at"]  # an erased tenant had that id
    if row["status"] == "deleted" and row["needed"] and not former:
        if not dry_run:
            control_plane.execute("backup_undeleted", key=listed.key)
        return "adopted", "its row says deleted, and the tenant has no good one: left to verification"
    if row["status"] == "deleted" or row["tenant_gone"] or (former and not row["tenant_leaving"]):
        if not dry_run:
            objects.delete(listed.key)
        return "removed", "its row says deleted" if row["status"] == "deleted" else "its tenant was deleted"
    if row["tenant_leaving"]:
        return "listed", "its tenant is being deleted: it gets no row, and goes with the tenant"
    if row["uploading"]:
        return _finished(control_plane, objects, listed.key, parts.tenant_id, dry_run)
    if not row["tenant_known"]:
        return "listed", f"there is no tenant {parts.tenant_id}"
    with verify.sandbox(settings) as directory:
        try:
            stored = _opened(control_plane, objects, listed.key, parts, directory)
        except (CorruptBackup, CorruptDatabase, SchemaTooNew) as e:
            return "listed", f"does not open: {e}"
    if not dry_run:
        adopted = catalogue.register(control_plane, stored, kind=SAFETY)
        control_plane.execute("backup_adopted", backup_id=adopted.backup_id)
    return "adopted", f"{stored.snapshot.manifest.memories} memories of {parts.ts:%F %T}, as a safety backup"


def _finished(
    control_plane: ControlPlane, objects: ObjectStore, key: str, tenant_id: str, dry_run: bool
) -> tuple[Outcome, str]:
    """Nobody else has registered it in all this time, but the repair of another upload of the tenant, just before."""
    if not dry_run:
        backup.repair(objects, control_plane, tenant_id)
    if dry_run or not control_plane.rows("strays_of", keys=[key], tenant_ids=[tenant_id], deleted_days=0):
        return "registered", "a finished upload whose row a crash prevented"
    return "unread", "it is not what its upload was to store, or its key cannot be had; the log says which"


def _opened(control_plane: ControlPlane, objects: ObjectStore, key: str, parts: KeyParts, directory: Path) -> Stored:
    """What its row would have said. Raises `CorruptBackup`, `CorruptDatabase`, `SchemaTooNew`, `KeyUnavailable`."""
    packing = Packing(zstd=".zst" in key.rpartition(".sqlite")[2], age=key.endswith(".age"))
    stored_sha256, stored_bytes = objects.sha256(key)
    file = directory / f"{parts.tenant_id}.sqlite.stray"  # its name says whose it is
    key_id, sha256, size_bytes = _read(control_plane, objects, key, parts.tenant_id, packing, file)
    manifest: Manifest = snapshot.inspect(file, parts.tenant_id)
    if manifest.schema_version != parts.schema_version:
        raise CorruptBackup(f"{key}: it has schema version {manifest.schema_version}")
    taken = Snapshot(parts.tenant_id, file, parts.ts, 0, size_bytes, sha256, manifest)
    return Stored(taken, key, stored_bytes, stored_sha256, packing.name, key_id)


def _read(
    control_plane: ControlPlane, objects: ObjectStore, key: str, tenant_id: str, packing: Packing, file: Path
) -> tuple[UUID | None, str, int]:
    """Unpack into `file` with whichever of the tenant's keys opens it; that key, the plain sha256 and size."""
    candidates: list[UUID | None] = [None]
    if packing.age:
        candidates = [row["key_id"] for row in control_plane.rows("tenant_key_ids", tenant_id=tenant_id)]
        if not candidates:
            raise KeyUnavailable(f"{key}: the tenant has no key")
    failure: CorruptBackup | None = None
    for key_id in candidates:
        identity = keys.identity_of(control_plane, objects.settings, tenant_id, key_id) if key_id else None
        try:
            sha256, size = pack.digest(objects.chunks(key), name=key, packing=packing, identity=identity)
            leave_reserve(objects.settings, file, size)
            pack.receive(objects.chunks(key), file, sha256, name=key, packing=packing, identity=identity)
            return key_id, sha256, size
        except CorruptBackup as e:
            failure = e
    assert failure is not None  # there was a candidate, and it raised
    raise failure
