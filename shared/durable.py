"""Making a file or a directory entry survive power loss.

A file's bytes need `fsync(file)`; its name needs `fsync(directory)`. Without both, a "done" restore came back
unreadable or old after an ext4 shutdown (FACTS, Restore).
"""

from __future__ import annotations

import os
from pathlib import Path


def fsync_path(path: Path) -> None:
    """fsync a file or directory by path. Never call it on a live SQLite database inside a process that has it
    open: the close() would drop that process's POSIX locks."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
