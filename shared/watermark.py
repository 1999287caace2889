"""Until when a machine's usage is complete: every request that began before that instant is in PostgreSQL.

Three things are not there yet: requests that are still being served, events that a full disk keeps in a worker's
memory, and what lies in the spool. Each worker says several times a second since when it has either of the first two
(`shared.workers`); one that is frozen says nothing new, and one that died took them with it. A segment is named after
the oldest of both when it was opened, so nothing in it began before. The earliest of all of these it is, or now; less a
little, because clocks are set back, and what is said of a move goes by PostgreSQL's.

The drain keeps it in `usage_watermarks` for readers elsewhere, and only writes it when PostgreSQL is in use anyway:
after passes that drained something, and once more when it has passed the last of those. At idle nothing is written, so
that a database that sleeps goes on sleeping; who can see the spool asks the spool.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from shared import workers
from shared.control_plane import ControlPlane
from shared.settings import Settings

CLOCKS_SECONDS = 5.0
_DIRECTORIES = (".", "stuck", "dry-run")  # those of a dry run are not billed, so nothing after them is complete


def of_spool(settings: Settings) -> datetime:
    """Of this machine, from its disk. Ask before PostgreSQL is asked for what it must hold."""
    # In this order: a worker that is not there yet serves only later requests; events go from a worker to a segment.
    now = time.time()
    of_workers = [worker.since_us / 1e6 for worker in workers.spooled(settings)]
    # Twice: a file that is renamed while a directory is listed can be missed, but not in both.
    oldest = min([now, *of_workers, *_named(settings), *_named(settings)])
    return datetime.fromtimestamp(oldest - CLOCKS_SECONDS, UTC)


def of_tenant(control_plane: ControlPlane, settings: Settings, tenant_id: str) -> datetime | None:
    """None when nothing is known. For a tenant of this machine the spool is asked, first. One that was moved here is
    complete when the machine it came from has brought in the last of its events, too."""
    here = of_spool(settings) if settings.spool_dir.is_dir() else None
    row = control_plane.row("usage_watermark_of_tenant", tenant_id=tenant_id)
    if row is None or row["unknown"]:
        return None
    found: datetime | None = row["complete_until"]
    if row["machine_id"] == settings.machine_id and here is not None:
        found = here
    bound: datetime | None = row["bound"]
    return min(found, bound) if found is not None and bound is not None else found


class Watermark:
    """What a drain publishes. One for a process."""

    def __init__(self) -> None:
        self._owed: datetime | None = None  # the last pass's time, until the watermark has passed it

    def after_pass(self, control_plane: ControlPlane, settings: Settings, *, drained: bool) -> None:
        """Raises `ControlPlaneUnavailable`."""
        if not drained and self._owed is None:
            return
        until = of_spool(settings)
        if drained:
            self._owed = datetime.now(UTC)
        elif self._owed is not None and until < self._owed:
            return
        control_plane.execute("usage_watermark_set", machine_id=settings.machine_id, complete_until=until)
        if not drained:
            self._owed = None


def _named(settings: Settings) -> list[float]:
    """Segments are named after the microsecond from which on the requests of their events began."""
    found = []
    for directory in _DIRECTORIES:
        for path in (settings.spool_dir / directory).glob("*-*"):
            digits = path.name.partition("-")[0]
            if path.suffix in (".seg", ".open", ".tmp") and digits.isdecimal():
                found.append(int(digits) / 1e6)
    return found
