"""Whether a tenant's database may have changed since its last backup, told from `stat` alone.

A fingerprint is read BEFORE the snapshot and kept with the backup (`backup_marks`). Equal later means: no byte was
written to the main file or its `-wal` since, so the snapshot, taken after it, holds what is there now. It errs to
one side: everything that is not certainly the same counts as changed, and costs one snapshot.

What is in it, and why:

    boot id      a power loss may keep a commit (fdatasync) and lose the mtime that told of it (ext4 writes times with
                 the journal, up to 5 s later); after a reboot, or on another machine, nothing is taken for unchanged
    generation   a restore makes another file the active one
    inode, size, mtime, ctime of engram.db and engram.db-wal; ctime because `utimes` cannot set it back. A `-wal` of
                 0 bytes holds nothing and counts as absent: a reader's open may leave one

Younger than two seconds proves nothing: a second write within the clock tick of the first would leave the same time.
The header's change counter is no help, it does not move in WAL mode (FACTS).
"""

from __future__ import annotations

import os
import time

from shared import boot
from shared.receipt import Receipt
from shared.tenant import TenantPaths

_SETTLED_SECONDS = 2.0


class Seen(Receipt, frozen=True):
    """One look at a tenant's files. `fingerprint` is None when it would prove nothing."""

    fingerprint: str | None
    size_bytes: int  # of both files: no snapshot of them is larger


def look(paths: TenantPaths) -> Seen:
    """Three system calls, ~10 µs. Raises `OSError` when the tenant has no database here."""
    now = time.time()
    current = os.readlink(paths.current)
    file = f"{paths.root}/{current}/engram.db"
    try:
        wal = os.stat(f"{file}-wal")  # before the file that it may be copied into meanwhile
    except FileNotFoundError:
        wal = None
    main = os.stat(file)
    parts = [boot.boot_id(), os.path.basename(current), _of(main)]
    newest = max(main.st_mtime, main.st_ctime)
    size = main.st_size
    if wal is not None and wal.st_size:
        parts.append(_of(wal))
        newest = max(newest, wal.st_mtime, wal.st_ctime)
        size += wal.st_size
    settled = now - newest >= _SETTLED_SECONDS and bool(parts[0])  # which boot is not told outside of Linux
    return Seen(" ".join(parts) if settled else None, size)


def _of(stat: os.stat_result) -> str:
    return f"{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
