"""Until when a machine's usage is complete: every request that began before that instant is in PostgreSQL.

Two things are not there yet: what lies in the spool, and requests that are still being served, whose time is that of
their first byte. So: the creation of the oldest segment on disk, or now when there is none, less the longest time a
request can take. (Events that a full disk keeps in a worker's memory are in no segment; the alert on failing flushes
tells of those.)

The drain keeps it in `usage_watermarks` for readers elsewhere, and only writes it when PostgreSQL is in use anyway:
after passes that drained something, and once more when that request time is over. At idle nothing is written, so that
a database that sleeps goes on sleeping; who can see the spool asks the spool.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from shared.control_plane import ControlPlane
from shared.settings import Settings

_DIRECTORIES = (".", "stuck", "dry-run")  # those of a dry run are not billed, so nothing after them is complete


def longest_request_seconds(settings: Settings) -> float:
    """From a request's first byte to its event: the sum of everything it can wait for."""
    return (
        settings.body_timeout_seconds
        + settings.inflight_wait_seconds
        + settings.tenant_lock_wait_seconds
        + settings.sqlite_busy_timeout_seconds
        + settings.query_timeout_seconds
        + settings.worker_silence_seconds  # frozen and going on
    )


def of_spool(settings: Settings) -> datetime:
    """Of this machine, from its disk. Ask before PostgreSQL is asked for what it must hold."""
    now = time.time()
    # Twice: a file that is renamed while a directory is listed can be missed, but not in both.
    oldest = min([now, *_created(settings), *_created(settings)])
    return datetime.fromtimestamp(oldest - longest_request_seconds(settings), UTC)


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


def _created(settings: Settings) -> list[float]:
    """Segments are named after the microsecond they were created in."""
    found = []
    for directory in _DIRECTORIES:
        for path in (settings.spool_dir / directory).glob("*-*"):
            digits = path.name.partition("-")[0]
            if path.suffix in (".seg", ".open", ".tmp") and digits.isdecimal():
                found.append(int(digits) / 1e6)
    return found
