"""The entries of a tenant's directory, each reached without leaving it.

From descriptor to descriptor, so that a link is an entry and is never followed. No file is opened: an `O_PATH`
descriptor is none of the file's data, so closing it does not drop the locks that SQLite holds on a live database in
this process (FACTS; `close(2)` of any other would).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Literal

import msgspec

from shared.errors import Refused, UnknownTenant
from shared.tenant import TenantPaths

MAX_ENTRIES = 10_000
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Entry(msgspec.Struct, frozen=True):
    """`path` is relative to the tenant's directory, `.` itself. `mode` is the twelve permission bits."""

    path: str
    type: Literal["directory", "file", "link", "other"]
    uid: int
    gid: int
    mode: int
    links: int
    device: int
    inode: int


def walk(paths: TenantPaths) -> Iterator[Entry]:
    """The directory and all below it. Raises `UnknownTenant`, or `Refused` when the directory itself is a link or holds
    absurdly much."""
    root = _root(paths)
    try:
        for found, entry in enumerate(_below(root, ".")):
            if found >= MAX_ENTRIES:
                raise Refused(f"{paths.root} holds more than {MAX_ENTRIES} entries; look at it by hand")
            yield entry
    finally:
        os.close(root)


def _root(paths: TenantPaths) -> int:
    name, parent = paths.root.name, os.open(paths.root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        root = os.open(name, _PATH, dir_fd=parent)
    except FileNotFoundError:
        raise UnknownTenant(f"tenant {name} has no directory on this machine") from None
    finally:
        os.close(parent)
    if not stat.S_ISDIR(os.fstat(root).st_mode):
        os.close(root)
        raise Refused(f"the directory of tenant {name} is no directory but a link or a file; it is not followed")
    return root


def _below(fd: int, path: str) -> Iterator[Entry]:
    """The entry of an `O_PATH` descriptor and, of a directory, those below it. A directory that may not be read is
    only itself: once it is fixed a second look sees further."""
    entry = _entry(fd, path)
    yield entry
    if entry.type != "directory":
        return
    try:
        opened = os.open(".", _DIRECTORY, dir_fd=fd)
    except PermissionError:
        return
    try:
        for name in sorted(os.listdir(opened)):
            try:
                below = os.open(name, _PATH, dir_fd=opened)
            except FileNotFoundError:  # a -wal that was removed meanwhile
                continue
            try:
                yield from _below(below, name if path == "." else f"{path}/{name}")
            finally:
                os.close(below)
    finally:
        os.close(opened)


def _entry(fd: int, path: str) -> Entry:
    found = os.fstat(fd)
    kind: Literal["directory", "file", "link", "other"] = "other"
    if stat.S_ISDIR(found.st_mode):
        kind = "directory"
    elif stat.S_ISREG(found.st_mode):
        kind = "file"
    elif stat.S_ISLNK(found.st_mode):
        kind = "link"
    mode = stat.S_IMODE(found.st_mode)
    return Entry(path, kind, found.st_uid, found.st_gid, mode, found.st_nlink, device=found.st_dev, inode=found.st_ino)


def reach(paths: TenantPaths, entry: Entry) -> int | None:
    """An `O_PATH` descriptor of the entry; None when it left, or is another one by now."""
    steps = [] if entry.path == "." else entry.path.split("/")
    fd = _root(paths)
    for step in steps:
        try:
            below = os.open(step, _PATH, dir_fd=fd)
        except (FileNotFoundError, NotADirectoryError):
            return None
        finally:
            os.close(fd)
        fd = below
    now = _entry(fd, entry.path)
    if (now.device, now.inode, now.type, now.links > 1) != (entry.device, entry.inode, entry.type, entry.links > 1):
        os.close(fd)
        return None
    return fd
