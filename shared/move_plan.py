"""What a move would do, weighed before anything is changed."""

from __future__ import annotations

from uuid import UUID

from shared import generation, registry
from shared.control_plane import ControlPlane
from shared.engine.database import TenantDatabase
from shared.errors import LeaseHeld, Refused
from shared.ids import new_id
from shared.receipt import Receipt
from shared.registry import Tenant
from shared.settings import Settings
from shared.storage import volume_bytes
from shared.tenant import TenantPaths


class MovePlan(Receipt, frozen=True):
    """What a move would do. `window_ms`: the median of what the last moves held writes for, None before the first."""

    move_id: UUID
    tenant_id: str
    source: str
    target: str
    generation: int
    memories: int
    size_bytes: int
    target_tenants: int
    window_ms: float | None


def plan(settings: Settings, control_plane: ControlPlane, tenant_id: str, target: str) -> MovePlan:
    """Weigh the move; changes nothing. Raises `Refused` (not on this machine, already there), `LeaseHeld`."""
    tenant = registry.get_active(control_plane, tenant_id)
    check_route(tenant, target)
    if tenant.machine_id != settings.machine_id:
        raise Refused(f"tenant {tenant_id} is on machine {tenant.machine_id}, this is {settings.machine_id}")
    last = control_plane.row("move_of_tenant", tenant_id=tenant_id)
    if last is not None and last["state"] != "done":
        raise LeaseHeld(f"tenant {tenant_id} is being moved from machine {last['source']} to {last['target']}")
    paths = TenantPaths.of(settings.tenants_dir, tenant_id)
    database = TenantDatabase(paths, readonly=True)
    try:
        with database.read() as connection:
            memories = int(connection.execute("SELECT count(*) FROM memories").fetchone()[0])
    finally:
        database.close()
    window = control_plane.row("move_window")
    machines = {row["machine_id"]: row["tenants"] for row in control_plane.rows("fleet_machines")}
    return MovePlan(
        move_id=new_id(),
        tenant_id=tenant_id,
        source=settings.machine_id,
        target=target,
        generation=generation.active(paths),
        memories=memories,
        size_bytes=volume_bytes(paths),
        target_tenants=machines.get(target, 0),
        window_ms=window["held_ms"] if window else None,
    )


def check_route(tenant: Tenant, target: str) -> None:
    """Raises `Refused` when the tenant is there already."""
    if tenant.machine_id == target:
        raise Refused(f"tenant {tenant.tenant_id} is on machine {target} already")
