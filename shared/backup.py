"""One tenant's backup: snapshot → store → register, each step taking the receipt of the one before.

A crash between `store` and `register` leaves an object without a row: nothing points at it, nothing trusts it.
The reverse, a row without an object, cannot happen.
"""

from __future__ import annotations

from pathlib import Path

from shared import catalogue, snapshot
from shared.catalogue import Stored
from shared.objects import ObjectStore
from shared.settings import Settings
from shared.snapshot import Snapshot
from shared.workdir import workdir

register = catalogue.register
work = workdir


def take(settings: Settings, tenant_id: str, directory: Path) -> Snapshot:
    """Snapshot into `directory`; see `shared.snapshot.take`."""
    return snapshot.take(settings, tenant_id, directory / f"{tenant_id}.sqlite")


def store(objects: ObjectStore, taken: Snapshot) -> Stored:
    """Upload and read back; the local copy is removed. See `ObjectStore.put_file`."""
    key = catalogue.key_of(taken)
    stored_bytes = objects.put_file(key, taken.path, taken.sha256)
    taken.path.unlink()
    return Stored(taken, key, stored_bytes)
