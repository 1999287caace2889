"""Backups of a tenant alone in its control plane, and what retention made of them.

Taken in with `pytest_plugins = ("tests.core_fixtures", "tests.expiry_fixtures")`. (PYTEST_DONT_REWRITE: it is imported
before pytest could rewrite its assertions.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from psycopg import sql

from shared import expiry
from shared.control_plane import ControlPlane
from shared.errors import ObjectStoreUnavailable
from shared.expiry import Removed
from shared.ids import new_id
from shared.objects import ObjectStore
from shared.tenant import object_key
from tests.core_fixtures import World, new_world, settings_in

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture
def own(tmp_path: Path, control_plane_url: str) -> Iterator[World]:
    """A tenant alone in its control plane: retention is about all of them."""
    with ControlPlane(settings_in(tmp_path, control_plane_url)) as control_plane:
        yield new_world(tmp_path, control_plane_url, control_plane)


def at(world: World, **settings: object) -> World:
    """The same tenant with its objects on S3."""
    url = world.settings.control_plane_url.get_secret_value()
    there = settings_in(world.settings.data_dir, url, object_store_url=f"s3://engram/{world.tenant_id}", **settings)
    return World(there, world.control_plane, ObjectStore(there), world.tenant_id)


def run_sql(world: World, statement: str, *parameters: object) -> list[dict[str, Any]]:
    with world.control_plane.transaction() as connection:
        cursor = connection.execute(sql.SQL(statement), parameters)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


def add(world: World, age: timedelta, *, kind: str = "scheduled", status: str = "available") -> UUID:
    """A small object and its row, as old as that."""
    backup_id, ts = new_id(), NOW - age
    key, data = object_key(world.tenant_id, ts, 1), f"{world.tenant_id} {ts}".encode()
    file = world.settings.data_dir / "object"
    file.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    world.objects.put_file(key, file, sha256)
    file.unlink()  # the local store may have linked it
    run_sql(
        world,
        "INSERT INTO backups (backup_id, tenant_id, ts, schema_version, size_bytes, stored_bytes, sha256, key, kind,"
        " status, verified_at, created_at) VALUES (%s, %s, %s, 1, %s, %s, %s, %s, %s, %s, now(), %s)",
        *(backup_id, world.tenant_id, ts, len(data), len(data), sha256, key, kind, status, ts),
    )
    return backup_id


def few(world: World) -> tuple[UUID, list[UUID]]:
    """A plan that keeps one; the newest, and three that go."""
    run_sql(
        world,
        "UPDATE plans SET backups_last = 1, backups_daily = 0, backups_weekly = 0, backups_monthly = 0,"
        " backups_yearly = 0",
    )
    kept, *gone = (add(world, n * DAY) for n in range(2, 6))
    return kept, gone


def restoring(world: World, backup_id: UUID) -> None:
    run_sql(
        world,
        "INSERT INTO restores (restore_id, tenant_id, backup_id, kind, state)"
        " VALUES (gen_random_uuid(), %s, %s, 'restore', 'running')",
        *(world.tenant_id, backup_id),
    )


def run(world: World, objects: ObjectStore | None = None, control_plane: ControlPlane | None = None) -> list[Removed]:
    """plan → mark → remove, as the flow does."""
    control_plane = control_plane or world.control_plane
    after: str | None = ""
    while after is not None:
        page = expiry.plan(control_plane, world.settings, after=after, limit=2)
        expiry.mark(control_plane, world.settings, page.planned)
        after = page.after
    return expiry.remove(control_plane, objects or world.objects, world.settings)


def statuses(world: World) -> dict[UUID, str]:
    return {r["backup_id"]: r["status"] for r in run_sql(world, "SELECT backup_id, status FROM backups")}


def check_truth(world: World) -> None:
    """What is choosable is there whole; what is called deleted is gone; the tenant has a good one."""
    rows = run_sql(world, "SELECT key, sha256, status FROM backups")
    for row in rows:
        if row["status"] == "available":
            assert world.objects.sha256(row["key"])[0] == row["sha256"]
        if row["status"] == "deleted":
            assert not world.objects.exists(row["key"])
    assert any(row["status"] == "available" for row in rows)


class Away:
    """A store that does not answer."""

    def __init__(self, world: World) -> None:
        self._objects, self.asked = world.objects, 0

    def delete(self, key: str) -> None:
        self.asked += 1
        raise ObjectStoreUnavailable(f"{key}: time-out")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)
