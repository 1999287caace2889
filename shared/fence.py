"""The local half of a maintenance lease: who may touch a tenant's files right now, held by the kernel.

    restore.lock  exclusive for a whole restore: one at a time on this machine (`RestoreMutex`); not empty meanwhile
    maintenance   the mark: gateways answer writes with 503 while it exists, without asking PostgreSQL
    lock          shared by every use of the database, exclusive while a restore swaps (`Fence`)

flocks die with their process, so after a crash only the mark is left, and it says whose it was. A process
stopped inside a transaction keeps its shared lock, and the restore out.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from shared.durable import unlink, write_file
from shared.errors import DrainTimeout, InMaintenance, LeaseHeld, Permanent, TenantDatabaseUnavailable
from shared.tenant import TenantPaths

_POLL_SECONDS = 0.001


class Mark(msgspec.Struct, frozen=True):
    """The content of the `maintenance` file: what the run that set it was about to do."""

    tenant_id: str
    holder: str
    epoch: int
    from_generation: int
    to_generation: int
    set_at: float
    putting_back: bool = False  # the new database did not verify: the old one must, before anybody gets in
    from_unsettled: bool = False  # the tenant was already locked: the old one must verify too


def read_mark(paths: TenantPaths) -> Mark | None:
    """Raises `Permanent` for a mark that no restore wrote (somebody made it by hand): it is theirs to remove."""
    try:
        return msgspec.json.decode(paths.mark.read_bytes(), type=Mark)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as e:
        raise Permanent(f"{paths.mark} was not written by a restore; remove it by hand to let writes in") from e


@contextmanager
def in_use(paths: TenantPaths, *, wait_seconds: float) -> Iterator[None]:
    """Hold the shared lock: the generation cannot change inside. Raises `InMaintenance` after `wait_seconds`."""
    try:
        fd = os.open(paths.lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise TenantDatabaseUnavailable(f"tenant {paths.tenant_id} has no database here: {e.strerror}") from e
    try:
        if not _flock(fd, fcntl.LOCK_SH, wait_seconds):
            raise InMaintenance(f"tenant {paths.tenant_id} is being swapped")
        yield
    finally:
        os.close(fd)


class RestoreMutex:
    """One restore of a tenant at a time on this machine, from download to release.

    While it is held the file is not empty; a file that is not empty and not locked was left by a dead run.
    """

    def __init__(self, paths: TenantPaths) -> None:
        self._fd = _open_lock(paths.restore_lock)
        try:
            if not _flock(self._fd, fcntl.LOCK_EX, 0):
                raise LeaseHeld(f"another restore of tenant {paths.tenant_id} is running on this machine")
            if os.fstat(self._fd).st_nlink == 0:
                raise LeaseHeld(f"tenant {paths.tenant_id} was just removed from this machine")
            self.left_by_dead_run = os.fstat(self._fd).st_size > 0
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
            os.fsync(self._fd)  # after a power loss too, the sweep finds it and clears what the run left
        except BaseException:  # a full disk too: a process that lives on must not go on holding it
            os.close(self._fd)
            raise

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                os.ftruncate(fd, 0)
            finally:
                os.close(fd)


class Fence:
    """Mark and exclusive lock together: from `raise_` until `lower` nothing is written to the tenant."""

    def __init__(self, paths: TenantPaths, mark: Mark) -> None:
        self._paths = paths
        self._mark = mark
        self._fd = _open_lock(paths.lock)
        self._raised_at = 0.0

    def raise_(self, drain_timeout_seconds: float, *, keep_mark: bool = False) -> None:
        """Stop new writes by the mark, then wait until everybody is out. Raises `DrainTimeout`, nothing held.

        With `keep_mark` a mark that stood before (a dead run's, not yet settled) still stands after that.
        """
        self._raised_at = time.monotonic()
        if not keep_mark or read_mark(self._paths) != self._mark:  # a repair needs no space on a full disk
            write_file(self._paths.mark, msgspec.json.encode(self._mark))
        if not _flock(self._fd, fcntl.LOCK_EX, drain_timeout_seconds):
            if keep_mark:
                self.leave_locked()
            else:
                self.lower()
            raise DrainTimeout(
                f"tenant {self._paths.tenant_id}: a process kept the database in use for "
                f"{drain_timeout_seconds:g} s; nothing was changed"
            )

    def note_put_back(self) -> None:
        """Write into the mark that the swap is being reversed, before it is."""
        self._mark = msgspec.structs.replace(self._mark, putting_back=True)
        write_file(self._paths.mark, msgspec.json.encode(self._mark))

    def lower(self) -> float:
        """Let everybody in again; the milliseconds writes were held. Doing it twice is fine."""
        if self._fd < 0:
            return 0.0
        unlink(self._paths.mark)
        os.close(self._fd)
        self._fd = -1
        return (time.monotonic() - self._raised_at) * 1000

    def leave_locked(self) -> None:
        """Give up the lock but keep the mark: reads go on, writes stay refused until somebody decides."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open_lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _flock(fd: int, operation: int, wait_seconds: float) -> bool:
    deadline = time.monotonic() + wait_seconds
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
