"""The maintenance lease in the control plane: holder, monotone epoch, expiry by PostgreSQL's clock.

Operators see it in `maintenance_locks`. It fences between machines and runs; inside a machine the kernel does
(`shared.fence`). The row stays when the lease is released, so an epoch is never given twice.
"""

from __future__ import annotations

from datetime import datetime

from shared.control_plane import ControlPlane
from shared.errors import LeaseHeld, LeaseLost
from shared.receipt import Receipt


class Lease(Receipt, frozen=True):
    tenant_id: str
    epoch: int
    holder: str
    expires_at: datetime


def acquire(control_plane: ControlPlane, tenant_id: str, *, holder: str, reason: str, seconds: float) -> Lease:
    """Raises `LeaseHeld` naming the holder and the expiry, or `ControlPlaneUnavailable`."""
    granted = control_plane.row(
        "lease_acquire", tenant_id=tenant_id, holder=holder, reason=reason, lease_seconds=seconds
    )
    if granted is None:
        current = control_plane.row("lease_get", tenant_id=tenant_id)
        who = f"{current['holder']} until {current['expires_at'].isoformat()}" if current else "somebody"
        raise LeaseHeld(f"tenant {tenant_id} is held by {who}")
    return Lease(tenant_id, granted["epoch"], holder, granted["expires_at"])


def renew(control_plane: ControlPlane, lease: Lease, *, seconds: float) -> Lease:
    """Prove that the lease is still ours and extend it. Raises `LeaseLost`."""
    row = control_plane.row(
        "lease_renew", tenant_id=lease.tenant_id, epoch=lease.epoch, holder=lease.holder, lease_seconds=seconds
    )
    if row is None:
        raise LeaseLost(f"the lease on tenant {lease.tenant_id} (epoch {lease.epoch}) expired or was taken")
    return Lease(lease.tenant_id, lease.epoch, lease.holder, row["expires_at"])


def release_dead(control_plane: ControlPlane, tenant_id: str) -> bool:
    """Free the lease of a holder that is gone. The caller holds the tenant's `RestoreMutex`, which proves it."""
    return bool(control_plane.rows("lease_release_dead", tenant_id=tenant_id))


def release(control_plane: ControlPlane, tenant_id: str, holder: str) -> bool:
    """Free the tenant's lease if `holder` has it; False when it is free or somebody else's.

    By holder, not by epoch: a grant whose reply was lost has an epoch nobody knows.
    """
    return bool(control_plane.rows("lease_release", tenant_id=tenant_id, holder=holder))
