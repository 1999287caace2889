"""What a move's run holds on the source, and how it is given back, however the run ends. Its steps: `shared.move`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shared import lease, move_disk, move_journal, move_settle
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable
from shared.fence import Fence, RestoreMutex
from shared.log import get_logger
from shared.move_plan import MovePlan
from shared.repair import repair
from shared.settings import Settings
from shared.tenant import TenantPaths

log = get_logger("move")


class Departure:
    """What a move's run holds on the source and must give back."""

    def __init__(self, settings: Settings, control_plane: ControlPlane, plan: MovePlan) -> None:
        self.settings = settings
        self.control_plane = control_plane
        self.plan = plan
        self.paths = TenantPaths.of(settings.tenants_dir, plan.tenant_id)
        self.mutex = RestoreMutex(self.paths)
        self.fence: Fence | None = None
        self.holder = ""  # set before the lease is asked for: the reply may be lost, the grant not
        self.began = False
        self.over = False


@contextmanager
def leaving(
    settings: Settings,
    control_plane: ControlPlane,
    chosen: MovePlan,
    *,
    requested_by: str = "",
    reason: str = "",
    flow_run_id: str | None = None,
) -> Iterator[Departure]:
    """The block inside which the source's half of a move happens. However it is left, the tenant is served by exactly
    one machine afterwards, or by none until a control plane that is away answers again. Raises `LeaseHeld`,
    `CorruptDatabase`."""
    departure = Departure(settings, control_plane, chosen)
    try:
        move_disk.refuse(departure.paths)
        repair(departure.paths)  # what a dead restore left; a database that does not verify is not moved
        move_journal.begin(
            control_plane,
            chosen.move_id,
            chosen.tenant_id,
            chosen.source,
            chosen.target,
            requested_by=requested_by,
            reason=reason,
            flow_run_id=flow_run_id,
        )
        departure.began = True
        yield departure
    except BaseException as e:
        _give_up(departure, e)
        raise
    finally:
        try:
            _free_lease(departure)
        finally:
            departure.mutex.release()


def _give_up(departure: Departure, error: BaseException) -> None:
    chosen = departure.plan
    said = f"{type(error).__name__}: {error}"
    log.error("move_failed", tenant_id=chosen.tenant_id, move_id=str(chosen.move_id), cause=said)
    if not departure.began or departure.over:
        return
    fence, departure.fence = departure.fence, None
    with move_settle.else_left_to_the_sweep("move", chosen.tenant_id):
        row = move_settle.settle_source(
            departure.settings, departure.control_plane, departure.paths, chosen.move_id, fence, said
        )
        if row.state in ("routed", "done"):
            log.warning("move_goes_on", tenant_id=chosen.tenant_id, move_id=str(chosen.move_id), state=row.state)


def _free_lease(departure: Departure) -> None:
    if departure.holder:
        try:
            lease.release(departure.control_plane, departure.plan.tenant_id, departure.holder)
        except ControlPlaneUnavailable as e:
            log.error("lease_left_to_the_sweep", tenant_id=departure.plan.tenant_id, cause=str(e))
