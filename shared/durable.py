"""Making a file or a directory entry survive power loss.

A file's bytes need `fsync(file)`; its name needs `fsync(directory)`. Without both, a "done" restore came back
unreadable or old after an ext4 shutdown (FACTS, Restore).
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FLUSH_BYTES, _FLUSH_POLL_SECONDS = 16 << 20, 0.01


def fsync_path(path: Path) -> None:
    """fsync a file or directory by path. Never call it on a live SQLite database inside a process that has it
    open: the close() would drop that process's POSIX locks."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def flushed_along(path: Path) -> Iterator[None]:
    """Bring a growing file to the disk in portions, beside who writes it; the end still needs its fsync.

    All of it at once, by an fsync at the end or by the kernel, makes every other fsync of the disk wait, a tenant's
    commits among them: 60 to 390 ms seen at 1 GB. Raises the `OSError` of a write that was lost: a disk tells once.
    Not for a file SQLite has open that another connection knows: the close() would drop this process's locks.
    """
    done = threading.Event()
    failures: list[OSError] = []

    def flush() -> None:
        flushed = 0
        try:
            while not done.wait(_FLUSH_POLL_SECONDS):
                if (size := os.fstat(fd).st_size) - flushed >= _FLUSH_BYTES:
                    flushed = size
                    os.fdatasync(fd)
        except OSError as e:
            failures.append(e)

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    aside = threading.Thread(target=flush, name="flush")
    aside.start()
    try:
        yield
    finally:
        done.set()
        aside.join()
        os.close(fd)
    if failures:
        raise failures[0]


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write `data` so that `path` holds either the old or the new bytes, durably."""
    tmp = path.with_name(f"{path.name}.tmp")
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(tmp, path)
    fsync_path(path.parent)


def replace_link(link: Path, target: str) -> None:
    """Point the symlink `link` at `target` by one atomic rename, durably."""
    tmp = link.with_name(f"{link.name}.tmp")
    tmp.unlink(missing_ok=True)
    os.symlink(target, tmp)
    os.replace(tmp, link)
    fsync_path(link.parent)


def unlink(path: Path) -> None:
    """Remove a file durably; absent is fine."""
    path.unlink(missing_ok=True)
    fsync_path(path.parent)


def unlink_database(file: Path) -> None:
    """Remove a database that nobody uses, and what SQLite left beside it; absent is fine. Not durable by itself."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)


def remove_tree(directory: Path) -> None:
    """Remove a directory with all it holds, while others may still close databases in it: SQLite removes `-wal` and
    `-shm` at the last close, whoever comes first. Not durable by itself: fsync the parent."""
    if not directory.exists():
        return
    if sys.version_info >= (3, 12):
        shutil.rmtree(directory, onexc=lambda _function, _path, error: _raise_unless_gone(error))
    else:
        shutil.rmtree(directory, onerror=lambda _function, _path, raised: _raise_unless_gone(raised[1]))


def _raise_unless_gone(error: BaseException) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
