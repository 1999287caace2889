"""How many bytes a tenant keeps: a gauge, measured, never summed up from what was written.

`storage_bytes` is what the tenant's database holds: its pages in use, in SQLite's own count within one read
transaction. Not the size of its files. A file never shrinks, so what was deleted would count for ever, and the `-wal`
holds pages a second time, up to 16 MB of them for our convenience. What is in the `-wal` and not yet copied counts,
once, and so does the full-text index, which deleting thins out (`shared.engine.full_text`). An empty tenant keeps 45
KB, an emptied one up to 80.

The limit in a plan, `/v1/usage`, the statistics over MCP and the gauge are this number. In `usage_hourly` and
`usage_daily` it is the last measurement in that hour and day (a restore makes it jump, as it should); NULL when nobody
measured. What a disk must have room for is `volume_bytes`.

An exact measurement opens the database: 0.3 to 1.4 s for 1,000 of them, of which 0.3 to 0.55 are CPU (measured on a
busy machine); to `stat` their files takes 0.02. So who measures often opens what has changed since (`measured_again`,
`measure` with `last`). What nobody else has open keeps an `engram.db-shm` of 32 KiB and an empty `-wal` from then on,
for a reader may not remove them: 160 MB for 5,000 tenants that nobody uses, by the first measurement of a process.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from typing import NamedTuple

from shared import fingerprint
from shared.control_plane import ControlPlane, rows
from shared.engine.database import TenantDatabase
from shared.errors import EngramError
from shared.log import get_logger
from shared.receipt import Receipt
from shared.settings import Settings
from shared.tenant import TenantPaths

_PORTION = 5_000  # tenants a transaction: their rollup rows are locked, and the drain wants them too
_WAIT_SECONDS = 0.05  # for a swap, which takes 1 ms
_COUNTS = ("page_count", "freelist_count", "page_size")
UNREAD = (EngramError, sqlite3.Error, OSError)  # whatever is wrong with one tenant's database is not the others'
log = get_logger("storage")


class Measured(Receipt, frozen=True):
    """`missing` tenants have no database on this machine although they should, `unread` ones have one that cannot be
    read just now (swapped, corrupt): nothing was written for them, what was measured last stands."""

    tenants: int
    storage_bytes: int
    missing: int
    unread: int = 0


class Measurement(NamedTuple):
    """`fingerprint` is of the files before they were measured, None when it would prove nothing (`shared.fingerprint`)
    or when they were not."""

    storage_bytes: int
    fingerprint: str | None = None


def kept_bytes(connection: sqlite3.Connection) -> int:
    """Of a fenced connection outside of a transaction: both counts must be of one moment."""
    connection.execute("BEGIN")
    try:
        pages, free, page_bytes = (int(connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in _COUNTS)
    finally:
        if connection.in_transaction:  # SQLite may have ended it, when reading failed
            connection.execute("ROLLBACK")
    return (pages - free) * page_bytes


def storage_bytes(paths: TenantPaths) -> int:
    """What the active database keeps. Raises one of `UNREAD`, also when there is none."""
    database = TenantDatabase(paths, readonly=True, lock_wait_seconds=_WAIT_SECONDS, busy_timeout_seconds=_WAIT_SECONDS)
    with closing(database), database.read() as connection:
        return kept_bytes(connection)


def measured_again(paths: TenantPaths, last: Measurement | None, below: int) -> Measurement:
    """What the tenant keeps, or any number that is less than `below` and no less than that.

    The files' sizes are such a number, for every page in use is in one of them: only when they come to `below` is the
    database opened, and only when they have changed since `last`. What cannot be read just now (swapped, corrupt) is
    what it was last, and 0 when nobody knows; what is not here is 0.
    """
    try:
        seen = fingerprint.look(paths)
    except OSError:
        return Measurement(0)
    if seen.size_bytes < below:
        return Measurement(seen.size_bytes)
    try:
        return _unless_unchanged(paths, seen.fingerprint, last)
    except UNREAD:
        return last._replace(fingerprint=None) if last is not None else Measurement(0)


def _measured(paths: TenantPaths, last: Measurement | None) -> Measurement:
    """What the tenant keeps; opened only when it may have changed since `last`. Raises one of `UNREAD`."""
    try:
        seen = fingerprint.look(paths).fingerprint
    except OSError:  # in the middle of a swap; who opens it waits for the end
        seen = None
    return _unless_unchanged(paths, seen, last)


def _unless_unchanged(paths: TenantPaths, seen: str | None, last: Measurement | None) -> Measurement:
    """`last` when the files' fingerprint proves that it still holds. Raises one of `UNREAD`."""
    if last is not None and last.fingerprint is not None and last.fingerprint == seen:
        return last
    return Measurement(storage_bytes(paths), seen)


def _is_here(paths: TenantPaths) -> bool:
    try:
        return volume_bytes(paths) > 0
    except OSError:  # something is, that cannot be looked at
        return True


def volume_bytes(paths: TenantPaths) -> int:
    """Size of the active database's file and its WAL: what they take on a volume, or on their way to another. 0 when
    there is none. `stat` only: opening and closing a live database's file in this process would drop its SQLite locks
    (FACTS)."""
    file = os.path.realpath(paths.database)
    size = 0
    for name in (f"{file}-wal", file):  # in this order: the one may be copied into the other meanwhile
        try:
            size += os.stat(name).st_size
        except FileNotFoundError:
            continue
    return size


def measure(control_plane: ControlPlane, settings: Settings, last: dict[str, Measurement] | None = None) -> Measured:
    """Measure every active tenant of this machine and keep it in this hour's and this day's rollup.

    `last` is the caller's to keep from one time to the next, empty at first: a database that is certainly unchanged
    since is not opened, its number is written again. Opening leaves 32 KiB beside each database that nobody else
    has open (see above): the first time beside all of them, later beside those that were written to since.

    Doing it twice changes nothing but the number. Raises `ControlPlaneUnavailable`; what was written stays.
    """
    last = {} if last is None else last
    tenants = [row["tenant_id"] for row in control_plane.rows("tenants_of_machine", machine_id=settings.machine_id)]
    found: dict[str, int] = {}
    missing: list[str] = []
    unread: list[str] = []
    cause = ""
    for start in range(0, len(tenants), _PORTION):
        measured_at = datetime.now(UTC)
        portion: dict[str, int] = {}
        for tenant_id in tenants[start : start + _PORTION]:
            paths = TenantPaths.of(settings.tenants_dir, tenant_id)
            try:
                last[tenant_id] = _measured(paths, last.get(tenant_id))
                portion[tenant_id] = last[tenant_id].storage_bytes
            except UNREAD as e:
                last.pop(tenant_id, None)
                (unread if _is_here(paths) else missing).append(tenant_id)
                cause = str(e)
        gauges = {"tenant_id": list(portion), "storage_bytes": list(portion.values()), "measured_at": measured_at}
        with control_plane.transaction() as connection:
            rows(connection, "usage_hourly_storage", **gauges)
            rows(connection, "usage_daily_storage", **gauges)
        found |= portion
    for tenant_id in last.keys() - found.keys():  # suspended, deleted, moved
        del last[tenant_id]
    if missing:
        log.error("storage_not_measured", tenants=sorted(missing)[:20], count=len(missing))
    if unread:
        log.warning("storage_unread", tenants=sorted(unread)[:20], count=len(unread), cause=cause[:300])
    return Measured(len(found), sum(found.values()), len(missing), len(unread))
