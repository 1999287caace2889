"""A budget in bytes for files that several threads stage at once, served in the order of asking.

In order, so that a large tenant is not passed over for ever by small ones. What does not fit at all is refused with
its cause, and so is what the disk has no room for when nothing else is staged that could make room.
"""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import NoSpace, Permanent


class Staging:
    """`hold(size)` blocks until `size` bytes are free of `limit_bytes` and of the disk of `directory`."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
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
        if free >= size_bytes:
            return True
        if self._used == 0:  # nobody will make room
            raise NoSpace(f"needs {size_bytes:,} bytes below {self.directory}, {free:,} are free")
        return False
