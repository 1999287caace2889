"""How many bytes a tenant keeps: a gauge, measured, never summed up from what was written.

`storage_bytes` of `usage_hourly` and `usage_daily` is the last measurement in that hour and day (a restore makes it
jump, as it should); NULL when nobody measured. The limit in a plan, `/v1/usage` and the gauge are the same number:
the active database and its write-ahead log.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime

from shared.control_plane import ControlPlane, rows
from shared.log import get_logger
from shared.receipt import Receipt
from shared.settings import Settings
from shared.tenant import TenantPaths

_PORTION = 5_000  # tenants a transaction: their rollup rows are locked, and the drain wants them too
log = get_logger("storage")


class Measured(Receipt, frozen=True):
    """`missing` tenants have no database on this machine although they should; nothing was written for them."""

    tenants: int
    storage_bytes: int
    missing: int


def storage_bytes(paths: TenantPaths) -> int:
    """Size of the active database and its WAL; 0 when there is none. `stat` only: opening and closing a live
    database's file in this process would drop its SQLite locks (FACTS)."""
    file = os.path.realpath(paths.database)
    size = 0
    for name in (file, f"{file}-wal"):
        try:
            size += os.stat(name).st_size
        except FileNotFoundError:
            continue
    return size


def measure(control_plane: ControlPlane, settings: Settings) -> Measured:
    """Measure every active tenant of this machine and keep it in this hour's and this day's rollup.

    Doing it twice changes nothing but the number. Raises `ControlPlaneUnavailable`; what was written stays.
    """
    tenants = [row["tenant_id"] for row in control_plane.rows("tenants_of_machine", machine_id=settings.machine_id)]
    found: dict[str, int] = {}
    for start in range(0, len(tenants), _PORTION):
        measured_at = datetime.now(UTC)
        portion = {t: storage_bytes(TenantPaths.of(settings.tenants_dir, t)) for t in tenants[start : start + _PORTION]}
        portion = {tenant_id: size for tenant_id, size in portion.items() if size}  # SQLite's smallest is a page
        gauges = {"tenant_id": list(portion), "storage_bytes": list(portion.values()), "measured_at": measured_at}
        with control_plane.transaction() as connection:
            rows(connection, "usage_hourly_storage", **gauges)
            rows(connection, "usage_daily_storage", **gauges)
        found |= portion
    if missing := sorted(set(tenants) - found.keys()):
        log.error("storage_not_measured", tenants=missing[:20], count=len(missing))
    return Measured(len(found), sum(found.values()), len(missing))
