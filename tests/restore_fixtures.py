"""A restore as the flow runs it, and what must be true of a tenant when one is over."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager

from shared import plan as planning
from shared import restore
from shared.catalogue import Backup
from shared.engine import full_text
from shared.errors import CorruptDatabase
from shared.plan import Plan
from shared.restore import Hold, Released, Swapped
from tests.core_fixtures import World, contents_of, sha256_of


def begun(world: World, made: Backup | None = None) -> Plan:
    """The plan of a restore."""
    backup_id = str(made.backup_id) if made else None
    return planning.plan(world.settings, world.control_plane, world.tenant_id, backup_id=backup_id)


def running(world: World, chosen: Plan) -> AbstractContextManager[Hold]:
    """The run's block and its `restores` row, found again by `state_of`."""
    return restore.running(
        world.settings,
        world.control_plane,
        chosen,
        requested_by="test",
        reason="test",
        flow_run_id=str(chosen.restore_id),
    )


def run(world: World, chosen: Plan) -> Released:
    """download → lock → swap → verify → release, as `flows.restore` does."""
    with running(world, chosen) as hold:
        swapped = swap(world, hold, chosen)
        try:
            verified = restore.verify(swapped)
        except CorruptDatabase:
            restore.release(chosen, swapped.lease, restore.verify(restore.put_back(swapped)))
            raise
        return restore.release(chosen, swapped.lease, verified)


def perform(world: World, made: Backup | None = None) -> Released:
    return run(world, begun(world, made))


def swap(world: World, hold: Hold, chosen: Plan) -> Swapped:
    staged = restore.download(world.objects, hold, chosen)
    lease = restore.lock(staged, holder=f"restore {chosen.restore_id}", reason="test")
    return restore.swap(staged, lease)


@contextmanager
def swapped(world: World, made: Backup | None = None) -> Iterator[tuple[Plan, Swapped]]:
    """Inside: after the swap, before the verification."""
    chosen = begun(world, made)
    with running(world, chosen) as hold:
        yield chosen, swap(world, hold, chosen)


def identity(world: World) -> tuple[int, str, str]:
    file = world.paths.database.resolve()
    return file.stat().st_ino, sha256_of(file), os.readlink(world.paths.current)


def state_of(world: World, chosen: Plan) -> str:
    row = world.control_plane.row("restore_by_flow_run", flow_run_id=str(chosen.restore_id))
    assert row is not None
    return str(row["state"])


def previous(world: World) -> list[str] | None:
    """The rows of `engram.db.bak`; None when it names nothing."""
    return contents_of(world.paths.backup) if world.paths.backup.exists() else None


def check_unlocked(world: World) -> None:
    """Nothing of a restore is left: no mark, no lock, no lease, no file on its way, no unreachable generation."""
    paths = world.paths
    assert not paths.mark.exists()
    assert not list(paths.root.glob("restore.sqlite*"))
    for lock in (paths.lock, paths.restore_lock):
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
    assert world.lease_holder() is None
    reachable = {p.resolve().parent for p in (paths.database, paths.backup) if p.exists()}
    assert {p.parent for p in paths.generations.glob("*/engram.db")} == reachable


def check_whole(world: World) -> None:
    """The active database is sound and takes a write that search finds."""
    with closing(sqlite3.connect(world.paths.database.resolve())) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        full_text.check(connection)


def expire_lease(world: World, *, free: bool = False) -> None:
    """What time does to a dead holder's lease; `free`: and what the next holder does when it is done."""
    with world.control_plane.transaction() as connection:
        connection.execute(
            "UPDATE maintenance_locks SET expires_at = clock_timestamp() - interval '1 second',"
            " holder = CASE WHEN %s THEN NULL ELSE holder END WHERE tenant_id = %s",
            (free, world.tenant_id),
        )
