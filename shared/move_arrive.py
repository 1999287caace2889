"""The target's half of a move: arrive → stage → receive → serve. What happens when, and why, is in `shared.move`.

stage     the first copy, fetched and checked in full while the source still takes writes
receive   the final one, unless it is the same: sha256, identity, integrity, schema, the manifest's counts, a write
          that is rolled back; then a generation beside everything, which nobody uses
serve     once the journal says `routed`: one rename
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from shared import backup, catalogue, generation, move_disk, move_journal, move_settle
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.errors import CorruptBackup, CorruptDatabase, EngramError, Refused
from shared.fence import RestoreMutex
from shared.log import get_logger
from shared.move_disk import Moving
from shared.move_journal import Row
from shared.objects import ObjectStore
from shared.receipt import Receipt
from shared.repair import check_file
from shared.restore import check_staged, clear_staged
from shared.settings import Settings
from shared.snapshot import Manifest
from shared.streams import Progress
from shared.tenant import TenantPaths

log = get_logger("move")


class Arrival:
    """What a move's run holds on the target."""

    def __init__(self, settings: Settings, control_plane: ControlPlane, row: Row) -> None:
        self.settings = settings
        self.control_plane = control_plane
        self.row = row
        self.paths = TenantPaths.of(settings.tenants_dir, row.tenant_id)
        self.mutex = RestoreMutex(self.paths)


class Staged(Receipt, frozen=True):
    """The first copy lies in `restore.sqlite` and passed every check; `manifest` is what it holds."""

    backup: Backup
    manifest: Manifest


class Received(Receipt, frozen=True):
    """All of the tenant lies in generation `generation`, which nobody uses yet."""

    generation: int
    manifest: Manifest


class Arrived(Receipt, frozen=True):
    """This machine serves the tenant."""

    tenant_id: str
    source: str
    target: str
    generation: int
    memories: int


@contextmanager
def arriving(settings: Settings, control_plane: ControlPlane, move_id: str) -> Iterator[Arrival]:
    """The block inside which the target's half happens. However it is left, what was prepared is served or removed, as
    the journal says. Raises `Refused` when the move is not to this machine, or the tenant has a database here."""
    row = move_journal.get(control_plane, move_id)
    if row.target != settings.machine_id:
        raise Refused(f"move {move_id} is to machine {row.target}, this is {settings.machine_id}")
    if row.state != "copied":
        raise Refused(f"move {move_id} is {row.state}: {row.error or 'nothing arrives now'}")
    arrival = Arrival(settings, control_plane, row)
    try:
        _check_place(arrival)
    except EngramError as e:
        arrival.mutex.release()
        move_journal.undo(control_plane, row.move_id, str(e))
        raise
    try:
        move_disk.make_room(arrival.paths)
        move_disk.write(arrival.paths, Moving(str(row.move_id), row.tenant_id, row.source, row.target))
        move_journal.step(control_plane, row.move_id, "arriving")
        yield arrival
    except BaseException as e:
        _give_up(arrival, e)
        raise
    finally:
        arrival.mutex.release()


def _check_place(arrival: Arrival) -> None:
    """What an arrival that is given up removes must be its own, or a move's."""
    row, paths = arrival.row, arrival.paths
    if os.path.lexists(paths.current):
        raise Refused(f"machine {row.target} has an active database of tenant {row.tenant_id} already")
    if paths.generations.exists() and move_disk.read(paths) is None and not os.path.lexists(paths.departed):
        raise Refused(f"machine {row.target} has files of tenant {row.tenant_id} that no move left there: {paths.root}")


def _give_up(arrival: Arrival, error: BaseException) -> None:
    row, said = arrival.row, f"machine {arrival.row.target}: {type(error).__name__}: {error}"
    log.error("arrival_failed", tenant_id=row.tenant_id, move_id=str(row.move_id), cause=said)
    with move_settle.else_left_to_the_sweep("arrival", row.tenant_id):
        move_settle.settle_target(arrival.settings, arrival.control_plane, arrival.paths, row.move_id, said)


def stage(arrival: Arrival, objects: ObjectStore, *, progress: Progress | None = None) -> Staged:
    """Fetch the first copy and check all of it. Raises `CorruptBackup`, `SchemaTooNew`, what a fetch raises."""
    row = arrival.row
    first = catalogue.get(arrival.control_plane, row.tenant_id, str(row.first_backup_id))
    manifest = _fetch(arrival, objects, first, progress)
    move_journal.step(arrival.control_plane, row.move_id, "staged")
    return Staged(first, manifest)


def receive(arrival: Arrival, objects: ObjectStore, staged: Staged) -> Received:
    """Wait for the final copy, check it, and prepare it as a generation. Writes are held at the source meanwhile."""
    settings, control_plane, paths = arrival.settings, arrival.control_plane, arrival.paths
    row = move_journal.wait(control_plane, arrival.row.move_id, settings.move_wait_seconds, "final", fast=True)
    manifest = staged.manifest
    if row.final_backup_id != staged.backup.backup_id:
        final = catalogue.get(control_plane, row.tenant_id, str(row.final_backup_id))
        manifest = _fetch(arrival, objects, final, None)
    number = generation.prepare(paths, paths.restore_file, previous=0, after=row.from_generation or 0)
    move_disk.write(paths, Moving(str(row.move_id), row.tenant_id, row.source, row.target, number))
    move_journal.step(control_plane, row.move_id, "ready", to_generation=number)
    return Received(number, manifest)


def serve(arrival: Arrival, received: Received) -> Arrived:
    """Once the control plane names this machine: let everybody in. Raises `Permanent` when the move was given up."""
    settings, control_plane = arrival.settings, arrival.control_plane
    row = move_journal.wait(control_plane, arrival.row.move_id, settings.move_wait_seconds, "routed", "done", fast=True)
    move_settle.serve(settings, control_plane, arrival.paths, row)
    return Arrived(row.tenant_id, row.source, row.target, received.generation, received.manifest.memories)


def _fetch(arrival: Arrival, objects: ObjectStore, made: Backup, progress: Progress | None) -> Manifest:
    paths = arrival.paths
    backup.fetch(objects, made, clear_staged(paths.restore_file), arrival.control_plane, progress=progress)
    what = f"backup {made.backup_id}"
    manifest, _ = check_staged(paths, what)
    expected = {name: made.manifest.get(name) for name in ("memories", "tags", "versions", "sentinel_id")}
    found = {name: value for name, value in msgspec.structs.asdict(manifest).items() if name in expected}
    if found != expected:
        raise CorruptBackup(f"{what}: holds {found}, its manifest says {expected}")
    try:
        check_file(paths.restore_file, paths.tenant_id, manifest)
    except CorruptDatabase as e:
        raise CorruptBackup(f"{what}: {e}") from e
    generation.fsync_database(paths.restore_file)
    return manifest
