"""What a restore holds while it runs, and how it ends: mutex, fence, lease, and its row in `restores`.

`running` is the block inside which a restore or an undo happens. However it is left, by success, failure or
cancellation, everything is given back: a fence still up is settled by `shared.repair` (finish or undo, never
neither), the lease is freed, and the row says what is active now. What a control plane that is away cannot be told,
the sweep tells it later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

from shared import generation, lease, move_disk
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable, CorruptBackup, CorruptDatabase, LeaseHeld, SchemaTooNew
from shared.fence import Fence, RestoreMutex
from shared.log import get_logger
from shared.plan import Plan
from shared.repair import Outcome, clear, repair
from shared.settings import Settings
from shared.tenant import TenantPaths

log = get_logger("hold")


class Hold:
    """What one run holds of a tenant and must give back."""

    def __init__(self, settings: Settings, control_plane: ControlPlane, tenant_id: str) -> None:
        self.settings = settings
        self.control_plane = control_plane
        self.paths = TenantPaths.of(settings.tenants_dir, tenant_id)
        self.mutex = RestoreMutex(self.paths)
        self.fence: Fence | None = None
        self.holder = ""  # set before the lease is asked for: the reply may be lost, the grant not
        self.outcome: Outcome | None = None  # what is active now, once that was verified
        self.locked_ms = 0.0

    def settle(self) -> None:
        """Give everything back; when the fence is up, first finish or undo. Doing it twice is fine.

        A control plane that is away is left to the sweep, which frees the lease of a holder that is gone.
        """
        try:
            if self.fence is not None:
                self.outcome = repair(self.paths, self.fence) or self.outcome
                self.fence = None
            clear(self.paths, keep_previous=self.settings.restore_generations_kept)
        finally:
            try:
                self._free_lease()
            finally:
                self.mutex.release()

    def _free_lease(self) -> None:
        """Also of a tenant that stays locked: its mark locks it, and the restore that is its way out must not wait."""
        try:
            if self.outcome is not None:
                active = generation.active(self.paths)
                self.control_plane.execute(
                    "tenant_set_active_generation", tenant_id=self.paths.tenant_id, generation=active
                )
            if self.holder:
                lease.release(self.control_plane, self.paths.tenant_id, self.holder)
                self.holder = ""
        except ControlPlaneUnavailable as e:
            log.error("lease_left_to_the_sweep", tenant_id=self.paths.tenant_id, cause=str(e))


@contextmanager
def holding(settings: Settings, control_plane: ControlPlane, tenant_id: str) -> Iterator[Hold]:
    """The block inside which a restore runs. Raises `LeaseHeld` when another one runs on this machine, or the tenant is
    on its way to or from another one.

    On entry, what a dead run left on disk is finished or undone.
    """
    hold = Hold(settings, control_plane, tenant_id)
    try:
        move_disk.refuse(hold.paths)
        try:
            repair(hold.paths)
        except CorruptDatabase as e:  # locked, and this restore may be the way out: the mark goes on standing
            log.critical("restoring_a_locked_tenant", tenant_id=tenant_id, cause=str(e))
        # Before there is a higher number: below the active one, what was never active looks like what was.
        clear(hold.paths, keep_previous=settings.restore_generations_kept)
        yield hold
    finally:
        hold.settle()


@contextmanager
def running(
    settings: Settings,
    control_plane: ControlPlane,
    chosen: Plan,
    *,
    requested_by: str = "",
    reason: str = "",
    flow_run_id: str | None = None,
) -> Iterator[Hold]:
    """`holding`, with the run's row in `restores` from its start to its end, however it ends.

    A run that fails after its database was verified and let in is `restored` (or `put_back`) with the error beside
    it, for that is what is being served. Raises what the block raises.
    """
    hold: Hold | None = None

    def open_row() -> None:
        control_plane.execute(
            "restore_insert",
            restore_id=chosen.restore_id,
            tenant_id=chosen.tenant_id,
            backup_id=chosen.backup.backup_id if chosen.backup else None,
            kind=chosen.kind,
            requested_by=requested_by,
            reason=reason,
            flow_run_id=flow_run_id,
        )

    try:
        with holding(settings, control_plane, chosen.tenant_id) as hold:
            open_row()  # under the mutex: a sweep takes a running row without it for a dead run's
            yield hold
    except BaseException as e:
        _record_failure(settings, control_plane, chosen, hold, e, open_row)
        raise


def _record_failure(
    settings: Settings,
    control_plane: ControlPlane,
    chosen: Plan,
    hold: Hold | None,
    error: BaseException,
    open_row: Callable[[], None],
) -> None:
    """A control plane that is away is left to the sweep, and must not hide the cause."""
    active = generation.active(TenantPaths.of(settings.tenants_dir, chosen.tenant_id))
    refused = isinstance(error, (CorruptBackup, SchemaTooNew, LeaseHeld))
    state = "refused" if refused else (hold.outcome if hold is not None and hold.outcome else "failed")
    said = f"{type(error).__name__}: {error}"[:400] + f"; generation {active} is active"
    log.error("restore_failed", tenant_id=chosen.tenant_id, restore_id=str(chosen.restore_id), state=state, cause=said)
    try:
        open_row()  # refused before it had one, or its insert was lost; else nothing
        finish(control_plane, chosen.restore_id, state=state, error=said)
    except ControlPlaneUnavailable as e:
        log.error("restore_row_left_to_the_sweep", tenant_id=chosen.tenant_id, cause=str(e))


def finish(
    control_plane: ControlPlane,
    restore_id: UUID,
    *,
    state: str,
    error: str | None = None,
    locked_ms: float | None = None,
    from_generation: int | None = None,
    to_generation: int | None = None,
) -> None:
    """Close the run's row; a row already closed stays as it is."""
    control_plane.execute(
        "restore_finish",
        restore_id=restore_id,
        state=state,
        error=error,
        locked_ms=locked_ms,
        from_generation=from_generation,
        to_generation=to_generation,
    )
