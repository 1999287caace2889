"""What the tests of the core share: databases, a tenant with rows, an object store, a child process.

A test module takes it in with `pytest_plugins = ("tests.core_fixtures",)`. (PYTEST_DONT_REWRITE: it is imported
before pytest could rewrite its assertions, and has none that need it.)
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from deployments.postgres import EmbeddedPostgres
from shared import backup, keys, registry, snapshot
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.engine import memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.ids import mint
from shared.objects import ObjectStore
from shared.settings import Settings
from shared.tenant import TenantPaths
from shared.usage import UsageEvent
from tests.forked import ForkedChild

ROOT = Path(__file__).resolve().parent.parent


def sampled(points: Iterable[str], *in_ci: str) -> list[str]:
    """The points of a sweep: `in_ci` by default, so that a run stays short; all with ENGRAM_CRASH_POINTS=all."""
    every = list(points)
    assert set(in_ci) <= set(every)
    return every if os.environ.get("ENGRAM_CRASH_POINTS") == "all" else list(in_ci)


@pytest.fixture(scope="session")
def new_database(postgres: EmbeddedPostgres) -> Callable[[], str]:
    """Makes an empty database and returns its URL."""

    def make() -> str:
        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return postgres.url(name)

    return make


@pytest.fixture(scope="session")
def core_url(new_database: Callable[[], str]) -> str:
    """A migrated database the whole session shares; tests keep apart by tenant id."""
    url = new_database()
    with ControlPlane(Settings(control_plane_url=url)) as control_plane:
        control_plane.migrate()
    return url


@pytest.fixture(scope="session")
def core_control_plane(core_url: str) -> Iterator[ControlPlane]:
    with ControlPlane(Settings(control_plane_url=core_url)) as control_plane:
        yield control_plane


def settings_in(directory: Path, url: str, **more: object) -> Settings:
    """Settings of one data directory, with time-outs short enough for a test."""
    quick = {
        "tenant_lock_wait_seconds": 0.1,
        "object_store_retries": 1,
        "object_store_retry_timeout_seconds": 2,
        "object_store_timeout_seconds": 5,
        "control_plane_connect_timeout_seconds": 5,
    }
    return Settings(data_dir=directory, control_plane_url=url, **(quick | more))  # type: ignore[arg-type]


def encrypted(compression: str = "none") -> dict[str, str]:
    """Settings of encrypted backups, with a master key of their own."""
    master, _ = keys.new_master()
    return {"backup_compression": compression, "backup_encryption": "age", "backup_master_key": master}


@dataclass
class World:
    """One data directory with one tenant, its object store and the session's control plane."""

    settings: Settings
    control_plane: ControlPlane
    objects: ObjectStore
    tenant_id: str

    @property
    def paths(self) -> TenantPaths:
        return TenantPaths.of(self.settings.tenants_dir, self.tenant_id)

    def change(self, **values: object) -> World:
        """Other settings from now on, and the object store that they name."""
        self.settings = Settings(**(self.settings.model_dump() | values))
        self.objects = ObjectStore(self.settings)
        return self

    def write(self, *contents: str) -> None:
        add_memories(self.paths, *contents)

    def rows(self) -> list[str]:
        return contents_of(self.paths.database)

    def back_up(self, kind: str = "manual") -> Backup:
        taken = backup.take(self.settings, self.tenant_id, self.settings.data_dir)
        stored = backup.store(self.objects, taken, self.control_plane)
        return backup.register(self.control_plane, stored, kind=kind)

    def object_path(self, made: Backup) -> Path:
        """The stored object of the local store."""
        return self.settings.data_dir / "objects" / made.key

    def lease_holder(self) -> str | None:
        row = self.control_plane.row("lease_get", tenant_id=self.tenant_id)
        return str(row["holder"]) if row and row["holder"] is not None else None


@pytest.fixture
def world(tmp_path: Path, core_url: str, core_control_plane: ControlPlane) -> World:
    """A new active tenant with an empty database."""
    return new_world(tmp_path, core_url, core_control_plane)


OLD, LIVE = ["old 1", "old 2"], ["old 1", "old 2", "live 3"]


@pytest.fixture
def backed(world: World) -> World:
    """A tenant with a backup of `OLD`, and one more row written after it: `LIVE`."""
    world.write(*OLD)
    world.back_up()
    world.write("live 3")
    return world


def new_world(directory: Path, url: str, control_plane: ControlPlane) -> World:
    settings = settings_in(directory, url)
    made = World(settings, control_plane, ObjectStore(settings), f"t{secrets.token_hex(6)}")
    registry.create(control_plane, settings, made.tenant_id)
    return made


def add_memories(paths: TenantPaths, *contents: str) -> None:
    database = TenantDatabase(paths)
    try:
        with database.write() as connection:
            for content in contents:
                memories.create(connection, NewMemory(content, tags=["all"]))
    finally:
        database.close()


def contents_of(file: Path) -> list[str]:
    """The memories of a database file in the order of their creation, read by plain SQLite."""
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as connection:
        return [row[0] for row in connection.execute("SELECT content FROM memories ORDER BY seq")]


def start_child(code: str, *arguments: object, **files: Any) -> subprocess.Popen[str]:
    """A Python child of this checkout running `code`, its stdout a pipe; it has imported what most children do."""
    return ForkedChild(
        [textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **files,
    )


def day_of_this_test() -> date:
    """Today in UTC. Its last seconds are waited out, so that no test ends on another day than it began."""
    now = datetime.now(UTC)
    if now.replace(hour=23, minute=59, second=45) <= now:
        time.sleep(61 - now.second)
    return datetime.now(UTC).date()


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll until the condition holds; fails the test when it never does. The limit only ends a broken test."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() > began + seconds:
            raise AssertionError(f"{condition} did not become true within {seconds:g} s")
        time.sleep(poll_seconds(began))


def poll_seconds(began: float) -> float:
    """Until the next look at what has been waited for since `began`: looking takes the time of what is looked at."""
    return min(0.1, max(0.01, (time.monotonic() - began) / 20))


def event(tenant_id: str = "acme", *, at: datetime | None = None, **fields: object) -> UsageEvent:
    """One usage event as the edge mints it."""
    at = at or datetime.now(UTC)
    values = {
        "request_id": mint(int(at.timestamp() * 1000)),
        "tenant_id": tenant_id,
        "route": "/v1/search",
        "status": 200,
        "api_calls": 1,
        "search_queries": 1,
        "memories_created": 0,
        "ts_us": int(at.timestamp() * 1e6),
    }
    return UsageEvent(**(values | fields))  # type: ignore[arg-type]


def sha256_of(path: Path) -> str:
    return snapshot.sha256_file(path)[0]
