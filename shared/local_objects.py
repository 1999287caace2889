"""The local half of the object store: objects are files below one directory, under their keys.

Written under a name obstore does not list (`KEY#digits`), hashed as it is written, fsynced, and given its own name by
`link`, which fails when the name is taken: a name is never seen with half a file behind it. Reading it again would ask
the page cache, not the disk. A file on the store's own filesystem is not copied: the store gets a link to it. So who
stores a file must not write to it afterwards.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from shared.durable import fsync_path
from shared.errors import CorruptBackup, KeyTaken, ObjectStoreRefused, ObjectStoreUnavailable
from shared.streams import disk_errors

_READ_BYTES = 1 << 20
_STALE_SECONDS = 86_400.0  # a half-written file of a process that died
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)


def put(root: Path, key: str, path: Path, sha256: str) -> int:
    """Store `path` under a new key, durably; its size in bytes.

    Raises `KeyTaken` when the key holds other bytes, `CorruptBackup` when the file is not what it was said to be,
    `ObjectStoreRefused` for a key that is none, `NoSpace`, `ObjectStoreUnavailable`.
    """
    target = _path(root, key)
    # A name obstore does not list.
    staged = target.with_name(f"{target.name}#{secrets.randbelow(10**12)}")
    try:
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _clear_stale(target.parent)
            try:
                digest, size = _bring(path, staged, sha256)
                if digest != sha256:
                    raise CorruptBackup(f"{key}: the file sent has another sha256 than it was said to have")
                fsync_path(staged)
                _name(root, key, staged, target, sha256)
            finally:
                staged.unlink(missing_ok=True)
            for directory in target.parents:
                fsync_path(directory)
                if directory == root:
                    break
    except OSError as e:
        raise ObjectStoreUnavailable(f"{key}: {e.strerror}") from e
    return size


def read(root: Path, key: str) -> Iterator[bytes]:
    """The bytes of an object. Three times as fast as obstore's stream of a local file."""
    try:
        with _path(root, key).open("rb", buffering=0) as file:
            while chunk := file.read(_READ_BYTES):
                yield chunk
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        if not root.is_dir():  # the disk is gone, not the backup
            raise ObjectStoreUnavailable(f"the object store {root} is not there") from e
        raise CorruptBackup(f"{key}: no such object") from e
    except OSError as e:
        raise ObjectStoreUnavailable(f"{key}: {e.strerror}") from e


def _path(root: Path, key: str) -> Path:
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise ObjectStoreRefused(f"{key}: not a valid key")
    return root / key


def _bring(source: Path, staged: Path, sha256: str) -> tuple[str, int]:
    """Hex sha256 and size in bytes of what lies at `staged`: a link, or a copy hashed in the same pass."""
    try:
        os.link(source, staged)
        return sha256, source.stat().st_size
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as file, staged.open("xb", buffering=0) as out:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[out.write(view) :]
            size += len(chunk)
    return digest.hexdigest(), size


def _name(root: Path, key: str, staged: Path, target: Path, sha256: str) -> None:
    try:
        os.link(staged, target)
    except FileExistsError:
        found = hashlib.sha256()
        for chunk in read(root, key):
            found.update(chunk)
        if found.hexdigest() != sha256:
            raise KeyTaken(f"{key} already exists with other content") from None
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
        raise ObjectStoreRefused(f"{root}: a filesystem without links cannot hold the object store") from e


def _clear_stale(directory: Path) -> None:
    for entry in directory.glob("*#*"):
        with suppress(FileNotFoundError):
            if time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                entry.unlink()
