"""One tenant's backup: snapshot → store → register, each step taking the receipt of the one before; and back: fetch.

A crash between `store` and `register` leaves an object without a row: nothing trusts it, and whoever comes next
registers it (`shared.upload`). The reverse, a row without an object, cannot happen.
"""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import msgspec

from shared import catalogue, keys, pack, snapshot, upload
from shared.catalogue import Backup, Stored
from shared.control_plane import ControlPlane
from shared.errors import CorruptBackup, EngramError, KeyTaken, KeyUnavailable, ObjectStoreUnavailable
from shared.log import get_logger
from shared.objects import ObjectStore
from shared.pack import Identity, Packed, Packing, Received
from shared.settings import Settings
from shared.snapshot import Snapshot
from shared.staging import leave_reserve
from shared.streams import Progress
from shared.workdir import workdir

register = catalogue.register
work = workdir
log = get_logger("backup")


def take(settings: Settings, tenant_id: str, directory: Path) -> Snapshot:
    """Snapshot into `directory`; see `shared.snapshot.take`."""
    return snapshot.take(settings, tenant_id, directory / f"{tenant_id}.sqlite")


def store(
    objects: ObjectStore, taken: Snapshot, control_plane: ControlPlane | None = None, *, kind: str = "manual"
) -> Stored:
    """Pack as the settings say, upload, make sure it is there whole; the local copy is removed.

    With encryption the tenant's key comes from the control plane: without one this raises, it never stores plain
    instead. `kind` is what a repair would register it as. Raises `KeyUnavailable`, and what `ObjectStore.put_file`
    raises; the local copy stays then, and the call can be repeated.
    """
    packing = Packing.of(objects.settings)
    key_id, recipient = None, ""
    if packing.age:
        if control_plane is None:
            raise KeyUnavailable(f"the key of tenant {taken.tenant_id} is in the control plane, which was not given")
        tenant_key = keys.current(control_plane, objects.settings, taken.tenant_id)
        key_id, recipient = tenant_key.key_id, tenant_key.recipient
    key, packed_path = catalogue.key_of(taken, packing), None
    try:
        if packing.name == "none":
            packed = Packed(taken.path, taken.size_bytes, taken.sha256)
        else:
            packed_path = taken.path.with_name(taken.path.name + packing.suffix)
            packed = pack.pack(taken.path, packed_path, packing, recipient)
        stored = Stored(taken, key, packed.size_bytes, packed.sha256, packing.name, key_id)
        if control_plane is not None:
            upload.begin(objects, control_plane, stored, kind, lambda s: _opened(objects, s, control_plane))
        stored = _put(objects, stored, packed, control_plane)
    finally:
        if packed_path is not None:
            packed_path.unlink(missing_ok=True)
    taken.path.unlink()
    return stored


def _put(objects: ObjectStore, stored: Stored, packed: Packed, control_plane: ControlPlane | None) -> Stored:
    """Encryption is random: an earlier try of ours, whose reply was lost, has other bytes. So what lies under the key
    is ours when it unpacks to this snapshot."""
    try:
        objects.put_file(stored.key, packed.path, packed.sha256)
        return stored
    except KeyTaken:
        if stored.key_id is None or _opened(objects, stored, control_plane) != stored.snapshot.sha256:
            raise
        stored_sha256, stored_bytes = objects.sha256(stored.key)
        return msgspec.structs.replace(stored, stored_sha256=stored_sha256, stored_bytes=stored_bytes)


def repair(objects: ObjectStore, control_plane: ControlPlane, tenant_id: str) -> list[Backup]:
    """Register what a crash between a tenant's upload and its row left; see `shared.upload`."""
    return upload.repair(objects, control_plane, tenant_id, lambda s: _opened(objects, s, control_plane))


def repair_machine(objects: ObjectStore, control_plane: ControlPlane, machine_id: str) -> None:
    """The same for every tenant of a machine. What cannot be looked at is logged: the backups to come say why."""
    for row in control_plane.rows("backup_uploads_of_machine", machine_id=machine_id):
        try:
            repair(objects, control_plane, row["tenant_id"])
        except EngramError as e:
            log.warning("upload_not_repaired", tenant_id=row["tenant_id"], error=str(e))
            if isinstance(e, ObjectStoreUnavailable):
                return


def fetch(
    objects: ObjectStore,
    backup: Backup,
    destination: Path,
    control_plane: ControlPlane | None = None,
    *,
    progress: Progress | None = None,
) -> Received:
    """Download, decrypt and decompress a backup into `destination` (replaced), fsynced, with the sha256 of its row.

    Streams: memory does not grow with the size, and no packed copy touches the disk. Raises `CorruptBackup` when the
    object is missing, cut or damaged (the file is removed), `KeyUnavailable` when its key cannot be had (which says
    nothing about the object), `ObjectStoreUnavailable`, `ObjectStoreRefused`, `NoSpace`: when the disk is full, or
    anywhere but in a tenant's directory would take from the tenants' reserve.
    """
    leave_reserve(objects.settings, destination, backup.size_bytes)
    return pack.receive(
        objects.chunks(backup.key),
        destination,
        backup.sha256,
        name=backup.key,
        packing=Packing.named(backup.packing),
        identity=_identity(objects, backup.tenant_id, backup.key_id, control_plane),
        size_bytes=backup.size_bytes,
        stored_bytes=backup.stored_bytes,
        progress=progress,
    )


def _opened(objects: ObjectStore, stored: Stored, control_plane: ControlPlane | None) -> str:
    """The plain sha256 of what lies under the key; empty when it does not unpack."""
    identity = _identity(objects, stored.snapshot.tenant_id, stored.key_id, control_plane)
    packing = Packing.named(stored.packing)
    try:
        return pack.digest(objects.chunks(stored.key), name=stored.key, packing=packing, identity=identity)[0]
    except CorruptBackup:
        return ""


def _identity(
    objects: ObjectStore, tenant_id: str, key_id: UUID | None, control_plane: ControlPlane | None
) -> Identity | None:
    if key_id is None:
        return None
    if control_plane is None:
        raise KeyUnavailable(f"key {key_id} of tenant {tenant_id} is in the control plane, which was not given")
    return keys.identity_of(control_plane, objects.settings, tenant_id, key_id)
