"""A tenant's data as a file to take away: JSON lines or SQLite, from the live database or from a backup.

    sqlite   a consistent snapshot, byte for byte what a plain backup of that instant is
    jsonl    one memory a line in the order of creation: {id, content, tags, metadata, memory_type, importance,
             created_at, updated_at, version, versions}; `versions` are its earlier states, oldest first. What
             `engram demo --memories` reads, and any JSON tool

The file appears whole or not at all, readable by its owner only, and never in the place of another.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import msgspec

from shared import backup, catalogue, registry, snapshot
from shared.control_plane import ControlPlane
from shared.durable import fsync_path
from shared.engine.memories import COLUMNS
from shared.errors import CorruptBackup, CorruptDatabase, NoSpace, Permanent, Refused
from shared.objects import ObjectStore
from shared.receipt import Receipt
from shared.settings import Settings
from shared.snapshot import Manifest
from shared.workdir import workdir

Format = Literal["jsonl", "sqlite"]
_VERSION_COLUMNS = "version, content, memory_type, tags, metadata, importance, updated_at"


class Exported(Receipt, frozen=True):
    """What was written. `ts` is the instant the content is of; `sha256` and `size_bytes` are the file's."""

    tenant_id: str
    backup_id: UUID | None
    ts: datetime
    format: Format
    path: Path
    size_bytes: int
    sha256: str
    memories: int
    tags: int
    versions: int


def export(
    settings: Settings,
    control_plane: ControlPlane,
    objects: ObjectStore,
    tenant_id: str,
    path: Path,
    *,
    format: Format,
    backup_id: str | None = None,
) -> Exported:
    """Write the tenant's data to `path`. Raises `Refused` when it is there already, what a snapshot or a fetch raises,
    `CorruptBackup` and `CorruptDatabase`, `NoSpace`."""
    registry.get_active(control_plane, tenant_id)
    path = path.absolute()
    if os.path.lexists(path):
        raise Refused(f"{path} exists already; nothing was written")
    if not path.parent.is_dir():
        raise Permanent(f"{path.parent} is not a directory")
    # Beside the destination: a link into place needs the same file system, and that one must have the room anyway.
    with workdir(path.parent, ".engram-export") as directory:
        try:
            file, ts, found, taken_from = _snapshot(settings, control_plane, objects, tenant_id, directory, backup_id)
            if format == "jsonl":
                file = _write_lines(file, directory / "export.jsonl", found)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"{path.parent}: {e.strerror}") from e
            raise
        digest, size = snapshot.sha256_file(file)
        file.chmod(0o600)
        fsync_path(file)
        try:
            os.link(file, path)  # unlike a rename it never replaces anything
        except FileExistsError as e:
            raise Refused(f"{path} exists already; nothing was written") from e
        fsync_path(path.parent)
    return Exported(tenant_id, taken_from, ts, format, path, size, digest, found.memories, found.tags, found.versions)


def _snapshot(
    settings: Settings,
    control_plane: ControlPlane,
    objects: ObjectStore,
    tenant_id: str,
    directory: Path,
    backup_id: str | None,
) -> tuple[Path, datetime, Manifest, UUID | None]:
    if backup_id is None:
        taken = backup.take(settings, tenant_id, directory)
        return taken.path, taken.ts, taken.manifest, None
    chosen = catalogue.get(control_plane, tenant_id, backup_id)
    file = directory / "backup.sqlite"
    backup.fetch(objects, chosen, file, control_plane)
    try:
        return file, chosen.ts, snapshot.inspect(file, tenant_id), chosen.backup_id
    except CorruptDatabase as e:
        raise CorruptBackup(f"backup {chosen.backup_id}: {e}") from e


def _write_lines(file: Path, destination: Path, expected: Manifest) -> Path:
    encode, written = msgspec.json.Encoder().encode, 0
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        with destination.open("xb") as out:
            for memory in _memories(connection):
                out.write(encode(memory) + b"\n")
                written += 1
    if written != expected.memories:
        raise CorruptDatabase(f"{written} of {expected.memories} memories were read")
    with suppress(FileNotFoundError):
        file.unlink()
    return destination


def _memories(connection: sqlite3.Connection) -> Iterator[dict[str, Any]]:
    """Two passes side by side in the order of `seq`: memory does not grow with the size."""
    states = connection.execute(f"SELECT seq, {_VERSION_COLUMNS} FROM versions ORDER BY seq, version")
    groups = groupby(states, key=itemgetter("seq"))
    current = next(groups, None)
    for row in connection.execute(f"SELECT seq, {COLUMNS} FROM memories ORDER BY seq"):
        earlier: list[dict[str, Any]] = []
        if current is not None and current[0] == row["seq"]:
            earlier = [_plain(state) for state in current[1]]
            current = next(groups, None)
        yield _plain(row) | {"versions": earlier}


def _plain(row: sqlite3.Row) -> dict[str, Any]:
    values = {name: row[name] for name in row.keys() if name != "seq"}  # noqa: SIM118 a Row iterates over values
    return values | {name: msgspec.Raw(values[name].encode()) for name in ("tags", "metadata")}
