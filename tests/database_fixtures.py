"""One tenant's directory, a connection to it and a process that writes into it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from shared.engine import database, memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.tenant import TenantPaths

# Writes into acme of a directory of tenants, a number a memory, and says each one that it was told is done.
ENDLESS_WRITER = """
    import sys
    from pathlib import Path
    from shared.engine import memories
    from shared.engine.database import TenantDatabase
    from shared.tenant import TenantPaths
    tenant, n = TenantDatabase(TenantPaths.of(Path(sys.argv[1]), "acme"), autocheckpoint_pages=4_000), 0
    while True:
        with tenant.write() as connection:
            memories.create(connection, memories.NewMemory(str(n)))
        print(n, flush=True)
        n += 1
        if tenant.checkpoint_due(50):
            tenant.checkpoint()
"""


@pytest.fixture
def paths(tmp_path: Path) -> TenantPaths:
    made = TenantPaths.of(tmp_path / "tenants", "acme")
    database.create(made)
    return made


@contextmanager
def opened(paths: TenantPaths) -> Iterator[TenantDatabase]:
    with closing(TenantDatabase(paths, lock_wait_seconds=0.05)) as made:
        yield made


def frames(paths: TenantPaths) -> tuple[int, int]:
    """How many frames the `-wal` has, and how many of them are in the database: mxFrame and nBackfill of the shared
    index (https://sqlite.org/walformat.html, offsets 16 and 96)."""
    index = Path(f"{paths.database.resolve()}-shm").read_bytes()
    return struct.unpack_from("<I", index, 16)[0], struct.unpack_from("<I", index, 96)[0]


def read_all(tenant: TenantDatabase) -> list[str]:
    with tenant.read() as connection:
        return [m.content for m in memories.page(connection, limit=1000, before_seq=None, tag=None).memories]


def write_one(tenant: TenantDatabase, content: str) -> None:
    with tenant.write() as connection:
        memories.create(connection, NewMemory(content))
