"""A restore, read aloud: plan → download → lock → swap → verify → release, each step taking the receipt before.

    plan      which source, how old, what would be lost; changes nothing
    download  everything that can fail or take time: bytes, sha256, identity, integrity, schema, fsync → `Staged`
    lock      the lease in the control plane                                                        → `Lease`
    swap      stop writes, drain, prove the lease, ONE rename of `current`                          → `Swapped`
    verify    open the new active database through its public name, read and write-and-roll-back    → `Verified`
    release   let everybody in, free the lease, write the result                                    → `Released`

An undo differs in its first step alone: it copies `engram.db.bak` instead of downloading. What a run holds, and how
it is given back, is `shared.hold`.
"""

from __future__ import annotations

import time
from pathlib import Path
from uuid import UUID

from shared import generation, lease, litestream, previous, registry, snapshot
from shared import plan as planning
from shared.backup import fetch
from shared.durable import unlink_database
from shared.engine import schema
from shared.engine.connection import connect
from shared.errors import CorruptBackup, CorruptDatabase, LitestreamUnavailable, Permanent, Refused
from shared.fence import Fence, Mark, read_mark
from shared.hold import Hold, finish, holding, running
from shared.lease import Lease
from shared.log import get_logger
from shared.objects import ObjectStore
from shared.plan import Plan
from shared.receipt import Receipt
from shared.repair import Outcome, check_active
from shared.snapshot import Manifest
from shared.streams import Progress
from shared.tenant import TenantPaths

__all__ = ["Hold", "holding", "running"]
log = get_logger("restore")


class Staged(Receipt, frozen=True):
    """A snapshot that passed every check, in `restore.sqlite`, fsynced. `plan` is what it really is from;
    `migrated_from` is its stored schema."""

    plan: Plan
    file: Path
    manifest: Manifest
    migrated_from: int
    hold: Hold


class Swapped(Receipt, frozen=True):
    """`current` names `to_generation`; the fence is up. `manifest` is what the active file must hold."""

    tenant_id: str
    lease: Lease
    from_generation: int
    to_generation: int
    manifest: Manifest | None
    outcome: Outcome
    hold: Hold


class Verified(Receipt, frozen=True):
    """The active database opened, read and took a write. Only this can be released."""

    swapped: Swapped
    checks: tuple[str, ...]


class Released(Receipt, frozen=True):
    """The end of a restore. `locked_ms`: how long writes answered 503; `previous`: where the old database is."""

    restore_id: UUID
    tenant_id: str
    backup_id: UUID | None
    outcome: Outcome
    locked_ms: float
    generation: int
    previous: Path | None


def download(objects: ObjectStore, hold: Hold, chosen: Plan, *, progress: Progress | None = None) -> Staged:
    """Bring the snapshot to `restore.sqlite` and check everything that can be checked before any lock.

    A state of Litestream's copy goes through the same checks but the sha256, which nobody knows; when it fails, the
    plan's backup is taken, and the plan of what is staged says so. An older schema is migrated here, on the copy.
    Raises `CorruptBackup` for every kind of bad snapshot and `SchemaTooNew` for a newer build's; the live database is
    not touched.
    """
    staged = None
    if chosen.copy is not None:
        try:
            litestream.restore(
                hold.settings, chosen.copy.prefix, chosen.copy.txid, clear_staged(hold.paths.restore_file)
            )
            staged = _stage(hold, chosen, chosen.source)
        except Permanent as e:
            log.error("copy_not_restored", tenant_id=chosen.tenant_id, source=chosen.source, cause=str(e))
            chosen = planning.fall_back(hold.settings, hold.control_plane, chosen, str(e))
    if staged is None:
        if chosen.backup is None:
            raise Permanent("an undo has no backup to download")
        fetch(objects, chosen.backup, clear_staged(hold.paths.restore_file), hold.control_plane, progress=progress)
        staged = _stage(hold, chosen, chosen.source)
    hold.control_plane.execute(
        "restore_source",
        restore_id=chosen.restore_id,
        backup_id=chosen.backup.backup_id if chosen.backup and chosen.copy is None else None,
        source=chosen.source,
        source_at=chosen.source_at,
        note=chosen.note,
    )
    return staged


def copy_previous(hold: Hold, chosen: Plan) -> Staged:
    """The first step of an undo: bring `engram.db.bak` to `restore.sqlite` and check it as a download is checked.

    Raises `CorruptBackup` when it is not whole, `Permanent` when there is none or no room for the copy.
    """
    previous.copy(hold.paths, clear_staged(hold.paths.restore_file))
    return _stage(hold, chosen, "the database from before")


def clear_staged(file: Path) -> Path:
    unlink_database(file)
    return file


def _stage(hold: Hold, chosen: Plan, what: str) -> Staged:
    manifest, stored_schema_version = check_staged(hold.paths, what)
    return Staged(chosen, hold.paths.restore_file, manifest, stored_schema_version, hold)


def check_staged(paths: TenantPaths, what: str) -> tuple[Manifest, int]:
    """Check `restore.sqlite` in full and bring it to this build's schema: what it holds, and the schema it came with.

    Raises `CorruptBackup`, which says `what` it was, or `SchemaTooNew`; the file is gone then.
    """
    file = paths.restore_file
    try:
        found = snapshot.inspect(file, paths.tenant_id)
        return _bring_up_to_date(file, paths.tenant_id, found), found.schema_version
    except CorruptDatabase as e:
        file.unlink(missing_ok=True)
        raise CorruptBackup(f"{what}: {e}") from e
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _bring_up_to_date(file: Path, tenant_id: str, found: Manifest) -> Manifest:
    """Migrate the copy, make sure it is in WAL mode, and leave one file with nothing beside it."""
    connection = connect(file)
    try:
        schema.migrate(connection, tenant_id)
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise CorruptDatabase(f"the snapshot stays in journal mode {mode}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.close()
    generation.fsync_database(file)
    if found.schema_version == schema.SCHEMA_VERSION:
        return found
    return snapshot.inspect(file, tenant_id)


def lock(staged: Staged, *, holder: str, reason: str) -> Lease:
    """Take the tenant's lease; writes still flow. Raises `LeaseHeld`."""
    hold = staged.hold
    hold.holder = holder
    taken = lease.acquire(
        hold.control_plane,
        staged.plan.tenant_id,
        holder=holder,
        reason=reason,
        seconds=hold.settings.lease_seconds,
    )
    tenant = registry.get_active(hold.control_plane, staged.plan.tenant_id)  # it may have been deleted since the plan
    if tenant.machine_id != hold.settings.machine_id:
        raise Refused(f"tenant {tenant.tenant_id} was moved to machine {tenant.machine_id}; restore it there")
    hold.control_plane.execute("restore_fenced", restore_id=staged.plan.restore_id, epoch=taken.epoch)
    return taken


def swap(staged: Staged, taken: Lease) -> Swapped:
    """Stop writes, drain, prove that the lease is still ours, move `current` by one rename.

    Raises `DrainTimeout` or `LeaseLost` with the old database active and writes flowing again.
    """
    hold, paths = staged.hold, staged.hold.paths
    before = generation.active(paths)
    after = generation.prepare(paths, staged.file, previous=before)
    unsettled = read_mark(paths) is not None
    mark = Mark(taken.tenant_id, taken.holder, taken.epoch, before, after, time.time(), from_unsettled=unsettled)
    fence = Fence(paths, mark)
    hold.fence = fence  # before raising it: a failure or a cancellation in there must be settled too
    fence.raise_(hold.settings.restore_drain_timeout_seconds, keep_mark=unsettled)
    taken = lease.renew(hold.control_plane, taken, seconds=hold.settings.lease_seconds)
    hold.control_plane.execute(
        "restore_swapping", restore_id=staged.plan.restore_id, from_generation=before, to_generation=after
    )
    generation.activate(paths, after)
    return Swapped(taken.tenant_id, taken, before, after, staged.manifest, "restored", hold)


def verify(swapped: Swapped) -> Verified:
    """Check the active database as a client would use it. Constant time. Raises `CorruptDatabase`."""
    checks = check_active(swapped.hold.paths, swapped.to_generation, swapped.manifest)
    return Verified(swapped, checks)


def put_back(swapped: Swapped) -> Swapped:
    """Make the database from before the swap active again; nothing was written in between."""
    if swapped.from_generation == 0:
        raise Permanent(f"tenant {swapped.tenant_id} had no database before: nothing to put back")
    if swapped.hold.fence is not None:
        swapped.hold.fence.note_put_back()
    generation.activate(swapped.hold.paths, swapped.from_generation)
    return Swapped(
        swapped.tenant_id,
        swapped.lease,
        swapped.to_generation,
        swapped.from_generation,
        None,
        "put_back",
        swapped.hold,
    )


def release(chosen: Plan, taken: Lease, verified: Verified) -> Released:
    """Let everybody in, then write the result and free the lease. May be retried when the control plane fails."""
    swapped, hold = verified.swapped, verified.swapped.hold
    if taken.epoch != swapped.lease.epoch:
        raise Permanent("the lease and the verified swap are not of the same run")
    if hold.fence is not None:
        hold.outcome = swapped.outcome  # before: what is verified is served, even if a disk fails in the next line
        hold.locked_ms = hold.fence.lower()
        hold.fence = None
    control_plane = hold.control_plane
    control_plane.execute(
        "tenant_set_generation",
        tenant_id=swapped.tenant_id,
        generation=swapped.to_generation,
        schema_version=schema.SCHEMA_VERSION,
    )
    finish(
        control_plane,
        chosen.restore_id,
        state=swapped.outcome,
        locked_ms=hold.locked_ms,
        from_generation=swapped.from_generation,
        to_generation=swapped.to_generation,
    )
    lease.release(control_plane, swapped.tenant_id, taken.holder)
    hold.holder = ""
    try:
        litestream.let_go(hold.settings, hold.paths, keep=swapped.to_generation)
    except LitestreamUnavailable as e:  # who follows it tries again, and seals; the next restore collects
        log.error("previous_still_copied", tenant_id=swapped.tenant_id, cause=str(e))
    else:
        generation.collect(hold.paths, keep_previous=hold.settings.restore_generations_kept)
        previous.seal(hold.paths)
    return Released(
        chosen.restore_id,
        swapped.tenant_id,
        chosen.backup.backup_id if chosen.backup and chosen.copy is None else None,
        swapped.outcome,
        round(hold.locked_ms, 3),
        swapped.to_generation,
        hold.paths.backup if hold.paths.backup.exists() else None,
    )
