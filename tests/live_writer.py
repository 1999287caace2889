"""A process that writes through a restore and records what it was told, and what a database file holds afterwards."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from shared import generation
from shared.tenant import TenantPaths
from tests.core_fixtures import World, start_child, wait_until

WRITER = """
    import os, sys, time
    from pathlib import Path
    from shared.engine import memories
    from shared.engine.database import TenantDatabase
    from shared.errors import InMaintenance
    from shared.tenant import TenantPaths
    tenants, tenant_id, acknowledged = sys.argv[1:]
    log = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    tenant, n = TenantDatabase(TenantPaths.of(Path(tenants), tenant_id)), 0
    while True:
        begun = time.time()
        try:
            with tenant.write() as connection:
                memories.create(connection, memories.NewMemory(f"w{n}"))
        except InMaintenance:
            time.sleep(0.001)
            continue
        os.write(log, f"{n} {tenant.generation} {begun} {time.time()}\\n".encode())
        n += 1
        time.sleep(0.01)
"""


class Acknowledged(NamedTuple):
    """A write the writer was told is done: its number, the generation it used, when it began and when it ended."""

    number: int
    generation: int
    begun: float
    ended: float


class Writer:
    """Another process that writes w0, w1, … without end, and records what was acknowledged."""

    def __init__(self, world: World, acknowledged: Path | None = None) -> None:
        self._file = acknowledged or world.settings.data_dir / "acknowledged"
        self._read = 0
        self.process = start_child(WRITER, world.settings.tenants_dir, world.tenant_id, self._file)
        wait_until(lambda: self._file.exists() and self._file.stat().st_size > 0)

    def news(self) -> list[Acknowledged]:
        """What was acknowledged since the last call."""
        with self._file.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._read += len(data)
        lines = (line.split() for line in data.decode().splitlines())
        return [Acknowledged(int(n), int(g), float(b), float(e)) for n, g, b, e in lines]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class Dump(NamedTuple):
    """Everything a database file holds, logically."""

    memories: list[tuple[object, ...]]
    rest: tuple[object, ...]

    def tail(self, begin: Dump) -> list[int]:
        """The writer's numbers that this holds beyond `begin`; it may differ in nothing else."""
        assert self.rest == begin.rest
        assert self.memories[: len(begin.memories)] == begin.memories
        return Dump(self.memories[len(begin.memories) :], ()).written(strict=True)

    def written(self, *, strict: bool = False) -> list[int]:
        """The writer's numbers; `strict`: there must be nothing else."""
        contents = [str(row[2]) for row in self.memories]
        return [int(content[1:]) for content in contents if strict or content.startswith("w")]


def dump(file: Path) -> Dump | None:
    """None when the name names nothing."""
    if not file.exists():
        return None
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=rw", uri=True)) as connection:
        connection.execute("BEGIN")
        tables = ("memories", "tags", "versions", "meta")
        rows = [connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables]
        version = connection.execute("PRAGMA user_version").fetchone()
        return Dump(rows[0], (version, *rows[1:]))


@dataclass
class Seen:
    """The tenant's two databases at one moment."""

    paths: TenantPaths
    generation: int = field(init=False)
    bak: Dump | None = field(init=False)
    active: Dump = field(init=False)

    def __post_init__(self) -> None:
        self.generation = generation.active(self.paths)
        self.bak = dump(self.paths.backup)
        active = dump(self.paths.database)
        assert active is not None
        self.active = active
