"""A budget in bytes for files that several threads stage at once, served in the order of asking.

In order, so that a large tenant is not passed over for ever by small ones. What does not fit at all is refused with
its cause, and so is what the disk has no room for when nothing else is staged that could make room.

`disk_reserve_bytes` of the tenants' volume are not for this: a full disk refuses tenants' writes. Backups, restore
tests, verification and whatever else fetches a backup begin nothing that would take from them; what other threads than
those of one `Staging`, or other processes, have begun and not yet written, they do not see. A restore, into the
tenant's own directory, may use them.
"""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import NoSpace, Permanent
from shared.settings import Settings


class Staging:
    """`hold(size)` blocks until `size` bytes are free of `limit_bytes` and, beside `reserve_bytes`, of the disk of
    `directory`."""

    def __init__(self, directory: Path, limit_bytes: int, reserve_bytes: int = 0) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self.reserve_bytes = reserve_bytes
        self.peak_bytes = 0
        self._used = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        """Raises `Permanent` when `size_bytes` is more than the whole budget, `NoSpace` when the disk is too full."""
        if size_bytes > self.limit_bytes:
            raise Permanent(
                f"needs {size_bytes:,} bytes of temporary disk, ENGRAM_BACKUP_STAGING_BYTES is {self.limit_bytes:,}"
            )
        self._take(size_bytes)
        try:
            yield
        finally:
            with self._changed:
                self._used -= size_bytes
                self._changed.notify_all()

    def _take(self, size_bytes: int) -> None:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and self._fits(size_bytes))
                self._used += size_bytes
                self.peak_bytes = max(self.peak_bytes, self._used)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _fits(self, size_bytes: int) -> bool:
        if self._used + size_bytes > self.limit_bytes:
            return False
        free = shutil.disk_usage(self.directory).free
        # As if nothing of what is granted were written yet: what is, is counted twice, and its end corrects it.
        if free - self.reserve_bytes >= self._used + size_bytes:
            return True
        if self._used == 0:  # nobody will make room
            raise _no_space(self.directory, size_bytes, free, self.reserve_bytes)
        return False


def reserve_bytes(settings: Settings, directory: Path) -> int:
    """What is to stay free of the disk of `directory`: nothing where no tenant is."""
    tenants = settings.tenants_dir if settings.tenants_dir.exists() else settings.data_dir
    if not tenants.exists():
        return 0
    return settings.disk_reserve_bytes if tenants.stat().st_dev == directory.stat().st_dev else 0


def leave_reserve(settings: Settings, destination: Path, size_bytes: int) -> None:
    """Raises `NoSpace` when a file of that size, beside what is written now, would take from the tenants' reserve."""
    if destination.is_relative_to(settings.tenants_dir):
        return
    # A restore test makes a second copy for a moment.
    needed = size_bytes * (2 if destination.is_relative_to(settings.sandbox_dir) else 1)
    reserve, free = reserve_bytes(settings, destination.parent), shutil.disk_usage(destination.parent).free
    if reserve and free - reserve < needed:
        raise _no_space(destination.parent, needed, free, reserve)


def _no_space(directory: Path, size_bytes: int, free: int, reserve: int) -> NoSpace:
    kept = f", of which ENGRAM_DISK_RESERVE_BYTES keeps {reserve:,} for tenants" if reserve else ""
    return NoSpace(f"needs {size_bytes:,} bytes below {directory}, {free:,} are free{kept}")
