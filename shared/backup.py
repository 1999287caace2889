"""One tenant's backup: snapshot → store → register, each step taking the receipt of the one before; and back: fetch.

A crash between `store` and `register` leaves an object without a row: nothing points at it, nothing trusts it.
The reverse, a row without an object, cannot happen.
"""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from shared import catalogue, keys, pack, snapshot
from shared.catalogue import Backup, Stored
from shared.control_plane import ControlPlane
from shared.errors import CorruptBackup, KeyTaken, KeyUnavailable
from shared.keys import TenantKey
from shared.objects import ObjectStore
from shared.pack import Identity, Packed, Packing, Progress, Received
from shared.settings import Settings
from shared.snapshot import Snapshot
from shared.workdir import workdir

register = catalogue.register
work = workdir


def take(settings: Settings, tenant_id: str, directory: Path) -> Snapshot:
    """Snapshot into `directory`; see `shared.snapshot.take`."""
    return snapshot.take(settings, tenant_id, directory / f"{tenant_id}.sqlite")


def store(objects: ObjectStore, taken: Snapshot, control_plane: ControlPlane | None = None) -> Stored:
    """Pack as the settings say, upload, make sure it is there whole; the local copy is removed.

    With encryption the tenant's key comes from the control plane: without one this raises, it never stores plain
    instead. Raises `KeyUnavailable`, and what `ObjectStore.put_file` raises.
    """
    packing = Packing.of(objects.settings)
    key = catalogue.key_of(taken, packing)
    tenant_key = _tenant_key(objects, taken.tenant_id, packing, control_plane)
    if packing.name == "none":
        stored_bytes, stored_sha256 = objects.put_file(key, taken.path, taken.sha256), taken.sha256
    else:
        path = taken.path.with_name(taken.path.name + packing.suffix)
        try:
            packed = pack.pack(taken.path, path, packing, tenant_key.recipient if tenant_key else "")
            stored_bytes, stored_sha256 = _put_packed(objects, taken, key, packed, packing, tenant_key, control_plane)
        finally:
            path.unlink(missing_ok=True)
    taken.path.unlink()
    return Stored(taken, key, stored_bytes, stored_sha256, packing.name, tenant_key.key_id if tenant_key else None)


def _tenant_key(
    objects: ObjectStore, tenant_id: str, packing: Packing, control_plane: ControlPlane | None
) -> TenantKey | None:
    if not packing.age:
        return None
    if control_plane is None:
        raise KeyUnavailable(f"the key of tenant {tenant_id} is in the control plane, which was not given")
    return keys.current(control_plane, objects.settings, tenant_id)


def _put_packed(
    objects: ObjectStore,
    taken: Snapshot,
    key: str,
    packed: Packed,
    packing: Packing,
    tenant_key: TenantKey | None,
    control_plane: ControlPlane | None,
) -> tuple[int, str]:
    """Size and sha256 of the object. Encryption is random: an earlier try of ours, whose reply was lost, has other
    bytes, so what lies under the key is ours when it unpacks to this snapshot."""
    try:
        return objects.put_file(key, packed.path, packed.sha256), packed.sha256
    except KeyTaken:
        identity = _identity(objects, taken.tenant_id, tenant_key.key_id if tenant_key else None, control_plane)
        try:
            found, _ = pack.digest(objects.chunks(key), name=key, packing=packing, identity=identity)
        except CorruptBackup:
            found = ""
        if found != taken.sha256:
            raise
        stored_sha256, stored_bytes = objects.sha256(key)
        return stored_bytes, stored_sha256


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
    nothing about the object), `ObjectStoreUnavailable`, `ObjectStoreRefused`, `NoSpace`.
    """
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


def _identity(
    objects: ObjectStore, tenant_id: str, key_id: UUID | None, control_plane: ControlPlane | None
) -> Identity | None:
    if key_id is None:
        return None
    if control_plane is None:
        raise KeyUnavailable(f"key {key_id} of tenant {tenant_id} is in the control plane, which was not given")
    return keys.identity_of(control_plane, objects.settings, tenant_id, key_id)
