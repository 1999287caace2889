"""Sweep: finish or undo whatever dead runs left on this machine, and say what was done.

Two kinds of traces, looked at apart, so that the first needs no control plane:

    disk      a maintenance mark, or a `restore.lock` that is not empty, whose owner is gone → `shared.repair` decides
              from the generations
    records   a lease, or a `restores` row still running, whose owner is gone → the row is closed with what is
              active now, the lease is freed

"Gone" is not a guess: a restore holds the tenant's `RestoreMutex` from its first step to its last, and the kernel
drops that lock with the process. So a dead run is repaired at once, not when its lease expires, and a run that is
only slow or stopped is never touched. A row without a lease may be just about to take the mutex: it is left alone
until it is older than a lease. A tenant with a marker of a move is left to `shared.move_settle`, unless
it has not left yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from uuid import UUID

from shared import generation, lease, move_disk
from shared.control_plane import ControlPlane
from shared.errors import EngramError, LeaseHeld
from shared.fence import RestoreMutex
from shared.log import get_logger
from shared.receipt import Receipt
from shared.repair import Outcome, clear, repair
from shared.settings import Settings
from shared.tenant import TenantPaths, tenants_on_disk

log = get_logger("sweep")


class Swept(Receipt, frozen=True):
    """One thing that was found and what was done; `ok` is False when it could not be put right."""

    tenant_id: str
    found: str
    done: str
    ok: bool = True


def sweep_disk(settings: Settings) -> list[Swept]:
    """Repair every tenant whose restore is gone. Cheap when there is none: two stats a tenant."""
    found = "traces of a dead restore"

    def say(paths: TenantPaths, traces: bool, outcome: Outcome | None) -> Swept | None:
        if outcome is None and not traces:
            return None
        done = f"{outcome or 'nothing to undo'}, generation {generation.active(paths)} is active"
        return Swept(paths.tenant_id, found, done)

    attended = (
        _attend(settings, paths, found, partial(say, paths)) if not _moves(paths) else _dead_move(settings, paths)
        for paths in _suspects(settings)
    )
    return [swept for swept in attended if swept is not None]


def _moves(paths: TenantPaths) -> bool:
    """Then the journal of moves decides, not the generations: `shared.move_settle`."""
    return paths.moving.exists()


def _dead_move(settings: Settings, paths: TenantPaths) -> Swept | None:
    """A tenant that has not left its source was never routed away: writes need not wait for the control plane there.
    Its lease keeps restores out until the journal is told."""
    found = "traces of a dead move"
    if (mutex := move_disk.locked(paths)) is None:
        return None
    try:
        if not move_disk.stays(paths, settings.machine_id):
            return Swept(paths.tenant_id, found, "left to the journal of moves")
        move_disk.stay(paths)
        log.warning("move_died_before_leaving", tenant_id=paths.tenant_id)
        return Swept(paths.tenant_id, found, "it had not left: writes are let in")
    except (EngramError, OSError) as e:
        return _left(paths, found, e)
    finally:
        with suppress(OSError):
            mutex.release()


def _attend(
    settings: Settings, paths: TenantPaths, found: str, finish: Callable[[bool, Outcome | None], Swept | None]
) -> Swept | None:
    """Repair one tenant unless its restore lives, then `finish(traces of a dead run, outcome)` under its mutex.

    One tenant, or its disk, that cannot be put right now must not keep the sweep from the others.
    """
    try:
        mutex = RestoreMutex(paths)
    except LeaseHeld:
        return None
    except OSError as e:
        return _left(paths, found, e)
    try:
        outcome = repair(paths)
        clear(paths, keep_previous=settings.restore_generations_kept)
        return finish(mutex.left_by_dead_run, outcome)
    except (EngramError, OSError) as e:
        return _left(paths, found, e)
    finally:
        with suppress(OSError):  # the next sweep finds it not empty
            mutex.release()


def _left(paths: TenantPaths, found: str, cause: Exception) -> Swept:
    log.critical("sweep_failed", tenant_id=paths.tenant_id, cause=str(cause))
    return Swept(paths.tenant_id, found, f"stays locked: {cause}", ok=False)


def _suspects(settings: Settings) -> Iterator[TenantPaths]:
    for tenant_id in tenants_on_disk(settings.tenants_dir, missing_ok=True):
        paths = TenantPaths.of(settings.tenants_dir, tenant_id)
        with suppress(OSError):
            if paths.mark.exists() or paths.restore_lock.stat().st_size > 0:
                yield paths


def sweep_records(settings: Settings, control_plane: ControlPlane) -> list[Swept]:
    """Close what dead runs left open in the control plane. Raises `ControlPlaneUnavailable`."""
    swept: list[Swept] = []
    left = control_plane.rows(
        "restores_left_open", machine_id=settings.machine_id, older_than_seconds=settings.lease_seconds
    )
    for row in left:
        paths = TenantPaths.of(settings.tenants_dir, row["tenant_id"])
        if _moves(paths):
            continue
        close = partial(_close, control_plane, paths, row["restore_id"], row["to_generation"])
        if (closed := _attend(settings, paths, "restore of a dead run", close)) is not None:
            swept.append(closed)
    return swept


def _close(
    control_plane: ControlPlane,
    paths: TenantPaths,
    restore_id: UUID | None,
    to_generation: int | None,
    _traces: bool,
    _outcome: Outcome | None,
) -> Swept:
    active = generation.active(paths)
    restored = to_generation is not None and active == to_generation
    done = f"generation {active} is active"
    if restore_id is not None:
        control_plane.execute(
            "restore_finish",
            restore_id=restore_id,
            state="restored" if restored else "failed",
            error=f"the run died; {done}",
            locked_ms=None,
            from_generation=None,
            to_generation=to_generation,
        )
    lease.release_dead(control_plane, paths.tenant_id)
    control_plane.execute("tenant_set_active_generation", tenant_id=paths.tenant_id, generation=active)
    log.warning("restore_closed", tenant_id=paths.tenant_id, restored=restored, generation=active)
    return Swept(paths.tenant_id, "restore of a dead run", f"{'restored' if restored else 'undone'}, {done}")
