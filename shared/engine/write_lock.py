"""One writer at a time in a generation, in all processes, until the checkpoint of its commit is done as well.

For the first half SQLite needs nobody. But up to 3.51.2 (mended in 3.51.3, 3.50.7 and 3.44.6) it can lose committed
rows, silently: when a checkpoint begins just after another one has finished, and a third connection commits meanwhile
and so begins the `-wal` anew, the checkpoint marks frames of the new `-wal` as copied which were not
(https://sqlite.org/wal.html#walresetbug; Tailscale met it several times in production). Every commit checkpoints by
itself when the `-wal` has 1,000 pages (the gateway's at 4,000), in whichever process that happens: a busy tenant and
two workers are all it takes. Debian 12's SQLite is 3.40.1.

Whoever writes holds this from before BEGIN until COMMIT, with its checkpoint in it, has returned, and so does who only
checkpoints (`TenantDatabase.checkpoint`): then no two checkpoints of this product overlap, and none overlaps a commit.
The checkpoint of a last connection's `close` runs under SQLite's own exclusive lock. Litestream knows nothing of this
lock: its checkpoints are those of a mended SQLite (3.53 in 0.5.17), but what it writes itself may still meet one of
ours.

A flock on the generation's directory: no file more, gone with the generation, given back by the kernel when a process
dies. It costs about 1 µs a transaction.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from shared.errors import TenantDatabaseUnavailable

_NOW = fcntl.LOCK_EX | fcntl.LOCK_NB
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.000_5, 0.005


class WriteLock:
    """For one thread at a time, like the connection it belongs to."""

    def __init__(self, generation: Path) -> None:
        self._directory = os.open(generation, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def acquire(self, timeout_seconds: float) -> None:
        """Raises `TenantDatabaseUnavailable` when another writer keeps it for longer than that."""
        try:
            fcntl.flock(self._directory, _NOW)
        except BlockingIOError:
            self._wait(timeout_seconds)

    def release(self) -> None:
        fcntl.flock(self._directory, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def _wait(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        poll_seconds = _FIRST_POLL_SECONDS
        while True:
            if time.monotonic() >= deadline:
                raise TenantDatabaseUnavailable("the tenant database is unavailable: another process writes")
            time.sleep(poll_seconds)
            poll_seconds = min(2 * poll_seconds, _LAST_POLL_SECONDS)
            with suppress(BlockingIOError):
                fcntl.flock(self._directory, _NOW)
                return
