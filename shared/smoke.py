"""Smoke tests for a database that nobody serves: is it this tenant's, whole, and does this build work on it?

Run on a sandbox copy, never on a tenant's directory: some of them write. Each check is run even when an earlier
one failed, so that a report says everything at once.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from random import randrange
from typing import Any

import sqlite_utils

from shared import pack, snapshot
from shared.engine import full_text, memories, schema, search
from shared.engine.connection import connect
from shared.engine.database import TenantDatabase
from shared.errors import CorruptBackup, CorruptDatabase, EngramError, SchemaTooNew, UnknownMemory
from shared.tenant import TenantPaths

_CLOCK_STEP_SECONDS = 300  # a clock that was set back between a write and the snapshot
FILE_CHECKS = ("sha256", "whole", "manifest")


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what was looked at, what was seen, how long it took."""

    name: str
    passed: bool
    seen: str
    ms: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_check(name: str, body: Callable[[], str]) -> Check:
    """Run one check; what it returns or raises is what was seen."""
    started = time.perf_counter()
    try:
        seen, passed = body(), True
    except SchemaTooNew:
        raise
    except (EngramError, sqlite3.DatabaseError, OSError) as e:
        seen, passed = f"{type(e).__name__}: {e}"[:300], False
    return Check(name, passed, seen, round((time.perf_counter() - started) * 1000, 3))


def check_file(file: Path, tenant_id: str, manifest: dict[str, Any]) -> list[Check]:
    """Checks of the closed file as it came from the store: whole, ours, and what the manifest says.

    A newer build's file fails as `schema`, which is no fault of the file.
    """
    found: dict[str, Any] = {}

    def whole() -> str:
        found.update(snapshot.inspect(file, tenant_id).as_dict())
        return f"tenant {tenant_id}, schema v{found['schema_version']}, integrity ok, foreign keys ok"

    def counts() -> str:
        wrong = [f"{k}: {v}, manifest {manifest.get(k)}" for k, v in found.items() if manifest.get(k) != v]
        if wrong or not found:
            raise CorruptDatabase("; ".join(wrong) or "nothing could be counted")
        return f"{found['memories']} memories, {found['tags']} tags, {found['versions']} versions as promised"

    try:
        return [run_check("whole", whole), run_check("manifest", counts)]
    except SchemaTooNew as e:
        return [Check("schema", False, str(e), 0.0)]


def check_flipped_byte(file: Path, sha256: str) -> Check:
    """One byte of a copy of the file is flipped on its way through the gate that a restore uses: it must be refused.

    Raises what the disk raises.
    """
    started = time.perf_counter()
    size = file.stat().st_size
    at = randrange(size)

    def chunks() -> Iterator[bytes]:
        with file.open("rb") as source:
            position = 0
            while chunk := bytearray(source.read(1 << 20)):
                if 0 <= at - position < len(chunk):
                    chunk[at - position] ^= 1 << randrange(8)
                position += len(chunk)
                yield bytes(chunk)

    flipped = file.with_name(file.name + ".flipped")
    try:
        pack.receive(chunks(), flipped, sha256, name="a copy with one bit flipped")
    except CorruptBackup:
        seen, passed = f"refused: one bit of byte {at} of {size} flipped", True
    else:
        flipped.unlink()
        seen, passed = f"accepted with byte {at} of {size} changed: sha256 is not compared", False
    return Check("flipped_byte", passed, seen, round((time.perf_counter() - started) * 1000, 3))


def check_engine(paths: TenantPaths, manifest: dict[str, Any], taken_at: datetime) -> list[Check]:
    """Checks through this build's own engine, on a tenant directory in the sandbox."""
    database = TenantDatabase(paths)

    def sentinel() -> str:
        if manifest.get("sentinel_id") is None:
            return "the snapshot is empty: no sentinel"
        with database.read() as connection:
            found = memories.get(connection, manifest["sentinel_id"])
        if found.created_at != manifest["sentinel_at"]:
            raise CorruptDatabase(f"the newest memory was created {found.created_at}, not {manifest['sentinel_at']}")
        age = (taken_at - datetime.fromisoformat(found.created_at)).total_seconds()
        if age < -_CLOCK_STEP_SECONDS:
            raise CorruptDatabase(f"the newest memory is {-age:.0f} s younger than the snapshot")
        return f"newest memory is there, created {found.created_at}, {age:.0f} s before the snapshot"

    def fts() -> str:
        with database.write() as connection:
            full_text.check(connection)
        return "the full-text index agrees with the memories"

    def create_search_get() -> str:
        with database.write() as connection:
            made = memories.create(connection, memories.NewMemory("drillsentinel written in the sandbox"))
        with database.read() as connection:
            hits = search.search(connection, "drillsentinel", limit=1)
            if [hit.memory.id for hit in hits] != [made.id]:
                raise CorruptDatabase("a memory just created is not found by search")
            memories.get(connection, made.id)
        with database.write() as connection:
            memories.delete(connection, made.id)
        with database.read() as connection:
            try:
                memories.get(connection, made.id)
            except UnknownMemory:
                return "create, search, get and delete work"
        raise CorruptDatabase("a deleted memory is still there")

    try:
        return [
            run_check("sentinel", sentinel),
            run_check("full_text", fts),
            run_check("create_search_get", create_search_get),
        ]
    finally:
        database.close()


def check_schema(file: Path, tenant_id: str) -> Check:
    """Brought up to date, the tables and their columns are this build's: compared with a database made in memory."""

    def body() -> str:
        fresh = sqlite3.connect(":memory:", isolation_level=None)
        schema.migrate(fresh, "drill", new=True)
        stored = connect(file)
        try:
            found = schema.migrate(stored, tenant_id)
            want, have = _columns(fresh), _columns(stored)
        finally:
            stored.close()
            fresh.close()
        if want != have:
            differing = sorted(t for t in want.keys() | have.keys() if want.get(t) != have.get(t))
            raise CorruptDatabase(f"tables differ from this build's: {', '.join(differing)}")
        return f"{len(have)} tables as this build makes them, stored as v{found}"

    return run_check("schema", body)


def _columns(connection: sqlite3.Connection) -> dict[str, list[str]]:
    database = sqlite_utils.Database(connection)
    return {
        name: [column.name for column in database[name].columns]
        for name in database.table_names()
        if not name.startswith(("memories_fts_", "sqlite_", "_litestream_"))
    }
