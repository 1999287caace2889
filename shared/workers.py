"""Which gateway workers run on this machine, and which run-time limits each of them obeys.

    {data_dir}/run/workers/PID     locked (flock) by that worker while it lives; holds the version it obeys

The lock is the truth about who lives: the kernel drops it with its holder, whatever killed it. A reader removes the
files of the dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path

from shared.log import get_logger
from shared.settings import Settings

_BYTES = 32
POLL_SECONDS = 0.05
log = get_logger("workers")


class Announcement:
    """A worker's own file. A disk that takes none costs the operator's view of this worker, not the worker."""

    def __init__(self, settings: Settings) -> None:
        self._fd = -1
        self._path = _directory(settings) / str(os.getpid())
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            new = self._path.with_name(f".{self._path.name}")
            self._fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            os.pwrite(self._fd, b" " * _BYTES, 0)  # from now on its one block is there
            os.rename(new, self._path)  # nobody sees it unlocked
        except OSError as e:
            log.error("worker_not_announced", cause=e.strerror)

    def obeys(self, version: str) -> None:
        """Say which version of the limits this worker obeys."""
        if self._fd >= 0:
            os.pwrite(self._fd, version.encode("ascii")[:_BYTES].ljust(_BYTES), 0)

    def close(self) -> None:
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def announced(settings: Settings) -> dict[int, str]:
    """The version each living worker obeys, by pid; empty until it has read the limits."""
    found: dict[int, str] = {}
    for path in _directory(settings).glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                found[int(path.name)] = os.pread(fd, _BYTES, 0).decode("ascii", "replace").strip()
            finally:
                os.close(fd)
    return found


def wait_until_obeyed(settings: Settings, version: str, timeout_seconds: float) -> Mapping[int, bool]:
    """Every living worker, by pid, and whether it obeys this version; as soon as all do, or after the time-out."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        found = {pid: obeyed == version for pid, obeyed in announced(settings).items()}
        if all(found.values()) or time.monotonic() >= deadline:
            return found
        time.sleep(POLL_SECONDS)


def _directory(settings: Settings) -> Path:
    return settings.run_dir / "workers"
