"""Moving a tenant to another machine, read aloud; each step takes the receipt of the one before.

    source                                                        target (`shared.move_arrive`)
    plan         how much, how long; changes nothing (`shared.move_plan`)
    copy         a backup while writes go on → journal            arrive, stage: fetch it, check all of it
    lock         the lease in the control plane
    final_copy   writes held (503, reads go on); a backup again,  receive: fetch it unless it is the same, check,
                 unless nothing was written since the first       compare the counts, prepare a generation beside
    fence        `current` is renamed away under the exclusive
                 lock: nobody can write here any more, whatever
                 a stale snapshot of the routes says
    route        ONE transaction: lease, journal, machine_id      serve: `current` names the generation
    release      wait until the target serves; free the lease

The order is fence, route, serve: at no instant can two machines acknowledge a write, and a crash leaves the tenant with
the one that `tenants.machine_id` names. Each machine has a run of its own, because each step must run where the file
is, and the two share nothing but the journal's row (`shared.move_journal`): no run waits for another's process, only
for a state, so either may die at any point and its machine's sweep finishes or undoes its half (`shared.move_settle`).
What the source's run holds meanwhile, and gives back however it ends, is in `shared.departure`.
Polling PostgreSQL every 30 ms while writes are held is cheaper than a second way for machines to reach each other.

Writes are held for as long as a snapshot, an upload, a download and SQLite's checks of the whole database take. When
the files have not changed since the first copy (`shared.fingerprint`) none of it is needed; when only the snapshot's
sha256 has not, no upload and no download. What lasts longer than `move_hold_seconds` is given up. Measured with both
machines and the store on one busy host of two cores (`tests.bench.move_window`): 0.2 s for an idle tenant of 1 and of
100 MB, beside a writer 0.3 s at 1 MB and 1.8 to 4.6 s at 100 MB.

The source's files stay for `move_keep_hours` as they were, without `current`; then its sweep removes them. What was in
`engram.db.bak` stays behind: a restore is not undone across a move. Usage spooled at the source is drained there.
"""

from __future__ import annotations

import math
import time
from typing import Any
from uuid import UUID

from shared import backup, fingerprint, generation, lease, move_disk, move_journal, move_settle, registry
from shared.catalogue import Backup
from shared.departure import Departure
from shared.errors import ControlPlaneUnavailable, Permanent
from shared.fence import Fence, Mark
from shared.lease import Lease
from shared.log import get_logger
from shared.move_disk import Moving
from shared.move_journal import Row
from shared.move_plan import MovePlan, check_route
from shared.move_settle import holder_of
from shared.objects import ObjectStore
from shared.receipt import Receipt

log = get_logger("move")


class Copied(Receipt, frozen=True):
    """A backup of what the tenant was while writes went on. `fingerprint`: the files' just before it, if that proves
    anything (`shared.fingerprint`)."""

    backup: Backup
    fingerprint: str | None


class Held(Receipt, frozen=True):
    """Writes are refused since `since` (monotonic seconds); `backup` holds every write that was acknowledged."""

    plan: MovePlan
    lease: Lease
    backup: Backup
    since: float


class Fenced(Receipt, frozen=True):
    """The tenant has left this machine's disk; `row` says what the target prepared."""

    held: Held
    row: Row


class Routed(Receipt, frozen=True):
    """The control plane names the target."""

    fenced: Fenced


class Moved(Receipt, frozen=True):
    """The end of a move. `held_ms`: from the first write refused to the target serving."""

    move_id: UUID
    tenant_id: str
    source: str
    target: str
    held_ms: float
    copy_ms: float
    memories: int
    size_bytes: int
    final_backup_id: UUID
    generation: int
    kept_hours: float


def copy(departure: Departure, objects: ObjectStore, *, flow_run_id: str | None = None) -> Copied:
    """The slow part, while writes go on: a backup that the target fetches and checks before anything is held."""
    chosen = departure.plan
    seen = fingerprint.look(departure.paths)
    made = _back_up(departure, objects, None, flow_run_id)
    _step(departure, "copied", first_backup_id=made.backup_id, size_bytes=made.size_bytes)
    log.info("move_copied", tenant_id=chosen.tenant_id, move_id=str(chosen.move_id), size_bytes=made.size_bytes)
    return Copied(made, seen.fingerprint)


def wait_staged(departure: Departure, copied: Copied) -> Copied:
    """Until the target has the first copy, whole and checked. Nothing is held meanwhile."""
    seconds = departure.settings.move_wait_seconds
    move_journal.wait(departure.control_plane, departure.plan.move_id, seconds, "staged")
    return copied


def lock(departure: Departure, *, reason: str) -> Lease:
    """Take the tenant's lease for as long as writes may be held; they still flow. Raises `LeaseHeld`."""
    chosen, settings = departure.plan, departure.settings
    departure.holder = holder_of(chosen.move_id)
    taken = lease.acquire(
        departure.control_plane,
        chosen.tenant_id,
        holder=departure.holder,
        reason=reason,
        seconds=max(settings.lease_seconds, settings.move_hold_seconds + settings.restore_drain_timeout_seconds),
    )
    check_route(registry.get_active(departure.control_plane, chosen.tenant_id), chosen.target)
    return taken


def final_copy(
    departure: Departure, objects: ObjectStore, copied: Copied, taken: Lease, *, flow_run_id: str | None = None
) -> Held:
    """Hold writes and back up what is there then: all that was ever acknowledged here. Reads go on.

    Raises `DrainTimeout`, and what a backup raises.
    """
    chosen, paths = departure.plan, departure.paths
    number = generation.active(paths)
    move_disk.write(paths, Moving(str(chosen.move_id), chosen.tenant_id, chosen.source, chosen.target, number))
    since = time.monotonic()
    fence = departure.fence = Fence(paths, _mark(departure, taken, number))
    fence.raise_(departure.settings.restore_drain_timeout_seconds)
    departure.fence = None
    fence.leave_locked()  # the mark goes on refusing writes; a snapshot and reads need the lock
    _step(departure, "held", epoch=taken.epoch, from_generation=number)
    made = copied.backup
    if copied.fingerprint is None or fingerprint.look(paths).fingerprint != copied.fingerprint:
        made = _back_up(
            departure, objects, copied.backup, flow_run_id, until=since + departure.settings.move_hold_seconds
        )
    manifest = made.manifest
    _step(
        departure,
        "final",
        final_backup_id=made.backup_id,
        memories=int(manifest["memories"]),
        size_bytes=made.size_bytes,
    )
    return Held(chosen, taken, made, since)


def fence(departure: Departure, held: Held) -> Fenced:
    """Once the target has all of it: leave this machine's disk, under the exclusive lock.

    Raises `Permanent` when the target does not have it `move_hold_seconds` after the first refused write.
    """
    settings, chosen = departure.settings, held.plan
    left_seconds = held.since + settings.move_hold_seconds - time.monotonic()
    row = move_journal.wait(departure.control_plane, chosen.move_id, max(0.0, left_seconds), "ready", fast=True)
    mark = _mark(departure, held.lease, row.from_generation or 0)
    own = Fence(departure.paths, mark)
    try:
        own.raise_(settings.restore_drain_timeout_seconds, keep_mark=True)
    except BaseException:
        own.leave_locked()  # the mark stands: what gives the move up lowers it
        raise
    departure.fence = own
    move_disk.leave(departure.paths)
    return Fenced(held, row)


def route(departure: Departure, fenced: Fenced) -> Routed:
    """The decision. When its reply is lost it is asked for: until it is known the tenant stays away from this disk."""
    try:
        move_journal.route(departure.control_plane, fenced.row, fenced.held.lease)
    except ControlPlaneUnavailable as e:
        log.error("route_reply_lost", tenant_id=fenced.row.tenant_id, cause=str(e))
        if move_journal.get(departure.control_plane, fenced.row.move_id).state not in ("routed", "done"):
            raise
    return Routed(fenced)


def release(departure: Departure, routed: Routed, copy_ms: float = 0.0) -> Moved:
    """Close this machine's part, wait until the target serves, write how long that was. May be repeated."""
    row, held, settings = routed.fenced.row, routed.fenced.held, departure.settings
    fence_, departure.fence = departure.fence, None
    move_settle.left_for_good(settings, departure.paths, fence_)
    departure.over = True
    try:
        move_journal.wait(departure.control_plane, row.move_id, settings.move_wait_seconds, "done", fast=True)
    except Permanent as e:
        raise Permanent(
            f"tenant {row.tenant_id} is routed to machine {row.target}, which does not serve it yet ({e});"
            f" its sweep will"
        ) from e
    held_ms = (time.monotonic() - held.since) * 1000
    departure.control_plane.execute("move_held", move_id=row.move_id, held_ms=held_ms)
    return Moved(
        move_id=row.move_id,
        tenant_id=row.tenant_id,
        source=row.source,
        target=row.target,
        held_ms=round(held_ms, 1),
        copy_ms=round(copy_ms, 1),
        memories=row.memories or 0,
        size_bytes=row.size_bytes or 0,
        final_backup_id=held.backup.backup_id,
        generation=row.to_generation or 0,
        kept_hours=settings.move_keep_hours,
    )


def _mark(departure: Departure, taken: Lease, number: int) -> Mark:
    return Mark(taken.tenant_id, taken.holder, taken.epoch, number, number, time.time())


def _step(departure: Departure, state: move_journal.State, **facts: Any) -> None:
    move_journal.step(departure.control_plane, departure.plan.move_id, state, **facts)


def _back_up(
    departure: Departure,
    objects: ObjectStore,
    before: Backup | None,
    flow_run_id: str | None,
    *,
    until: float = math.inf,
) -> Backup:
    """A backup like any other, entered in the catalogue; `before` when the tenant is still what that holds.

    Raises `Permanent` when the snapshot is not there at `until` (monotonic seconds): no upload is begun then.
    """
    settings, tenant_id = departure.settings, departure.plan.tenant_id
    with backup.work(settings.data_dir / "tmp", "move") as directory:
        taken = backup.take(settings, tenant_id, directory)
        if before is not None and taken.sha256 == before.sha256:
            return before
        if time.monotonic() > until:
            raise Permanent(f"writes were held for {departure.settings.move_hold_seconds:g} s before the upload began")
        stored = backup.store(objects, taken, departure.control_plane)
    return backup.register(departure.control_plane, stored, flow_run_id=flow_run_id)
