"""storage_bytes: what a tenant keeps, not what its files take, kept beside the counts without touching them."""

from __future__ import annotations

import fcntl
import secrets
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from shared import fingerprint, metering, registry, storage
from shared.control_plane import ControlPlane
from shared.engine import memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.errors import TenantDatabaseUnavailable
from shared.tenant import TenantPaths
from tests.core_fixtures import World, add_memories, event
from tests.metering_fixtures import at_once, check_counted, query, segment

pytest_plugins = ("tests.core_fixtures",)


def kept(control_plane: ControlPlane, tenant_id: str) -> list[tuple[object, ...]]:
    """The newest gauge and all calls, by hour and by day (an hour may end while a test runs)."""
    return [
        query(
            control_plane,
            "SELECT (array_agg(storage_bytes ORDER BY bucket DESC) FILTER (WHERE storage_bytes > 0))[1] AS gauge,"
            f" sum(api_calls)::int AS calls FROM {table} WHERE tenant_id = %s",
            tenant_id,
        )[0]
        for table in ("usage_hourly", "usage_daily")
    ]


def emptied(paths: TenantPaths, *, leave: int = 0) -> None:
    with closing(TenantDatabase(paths)) as database, database.read() as connection:
        found = [row[0] for row in connection.execute("SELECT id FROM memories")]
        for memory_id in found[leave:]:
            with database.write() as writing:
                memories.delete(writing, memory_id)


@contextmanager
def swapped(paths: TenantPaths) -> Iterator[None]:
    """As a restore holds it: nobody can be inside."""
    with paths.lock.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_the_last_measurement_stands_in_the_hour_and_the_day_and_counts_stay(world: World) -> None:
    """A gauge: measuring twice does not add up, and calls drained before and after are untouched."""
    segment(world.settings, [event(world.tenant_id)])
    list(metering.drain_all(world.control_plane, world.settings))
    storage.measure(world.control_plane, world.settings)
    small = storage.storage_bytes(world.paths)
    assert kept(world.control_plane, world.tenant_id) == [(small, 1)] * 2
    world.write(*("x" * 5_000 for _ in range(50)))
    storage.measure(world.control_plane, world.settings)
    assert storage.storage_bytes(world.paths) > small + 250_000
    segment(world.settings, [event(world.tenant_id)])
    list(metering.drain_all(world.control_plane, world.settings))
    assert kept(world.control_plane, world.tenant_id) == [(storage.storage_bytes(world.paths), 2)] * 2


def test_what_is_deleted_no_longer_counts(world: World) -> None:
    """Though SQLite never gives a page of the file back, and each delete adds to the index at first."""
    empty = storage.storage_bytes(world.paths)
    world.write(*(f"{secrets.token_hex(4)} " * 500 for _ in range(40)))
    full = storage.storage_bytes(world.paths)
    emptied(world.paths, leave=20)
    assert storage.storage_bytes(world.paths) < empty + 0.7 * (full - empty)
    emptied(world.paths)
    assert storage.storage_bytes(world.paths) < empty + 40_000
    assert storage.volume_bytes(world.paths) >= full > empty + 180_000


def test_the_wal_counts_for_the_pages_it_adds_and_not_for_copies(world: World) -> None:
    with closing(TenantDatabase(world.paths, autocheckpoint_pages=1_000_000)) as database:
        before, file_bytes = storage.storage_bytes(world.paths), world.paths.database.stat().st_size
        for n in range(200):
            with database.write() as connection:
                connection.execute("UPDATE meta SET value = ? WHERE key = 'created_at'", (str(n),))
        assert database.wal_bytes() > 200 * 4_096
        assert storage.storage_bytes(world.paths) == before
        with database.write() as connection:
            memories.create(connection, NewMemory("x" * 100_000))
        assert storage.storage_bytes(world.paths) >= before + 100_000
        assert world.paths.database.stat().st_size == file_bytes, "all of it is in the WAL"
        kept_before = storage.storage_bytes(world.paths)
        database.checkpoint()
        assert storage.storage_bytes(world.paths) == kept_before


def test_what_is_asked_for_often_is_opened_only_when_it_may_matter(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is swapped nobody can open it: so what is answered then was told from `stat`s, or is the last one."""
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", -1.0)
    world.write(*("x" * 5_000 for _ in range(50)))
    emptied(world.paths)
    kept, files = storage.storage_bytes(world.paths), storage.volume_bytes(world.paths)
    assert kept < files
    with swapped(world.paths):
        below = storage.measured_again(world.paths, None, below=files + 1)
        assert kept <= below.storage_bytes <= files
        assert storage.measured_again(world.paths, None, below=files).storage_bytes == 0, "never read: nobody is judged"
    last = storage.measured_again(world.paths, below, below=files)
    assert last.storage_bytes == kept, "what was only told from `stat`s is measured once it matters"
    with swapped(world.paths):
        assert storage.measured_again(world.paths, last, below=1) == last
    world.write("y" * 50_000)
    with swapped(world.paths):
        assert storage.measured_again(world.paths, last, below=1) == storage.Measurement(kept)
    grown = storage.measured_again(world.paths, last, below=1)
    assert grown.storage_bytes == storage.storage_bytes(world.paths) > kept
    shutil.rmtree(world.paths.root)
    assert storage.measured_again(world.paths, grown, below=1) == storage.Measurement(0)
    with pytest.raises(TenantDatabaseUnavailable):
        storage.storage_bytes(world.paths)


def test_a_database_that_cannot_be_read_keeps_no_other_from_being_measured(world: World) -> None:
    """Nothing is written for it: what was measured last stands."""
    other = f"{world.tenant_id}-other"
    registry.create(world.control_plane, world.settings, other)
    storage.measure(world.control_plane, world.settings)
    before = kept(world.control_plane, world.tenant_id)
    world.paths.database.resolve().write_bytes(b"no database" * 1_000)
    add_memories(TenantPaths.of(world.settings.tenants_dir, other), "x" * 50_000)
    with swapped(TenantPaths.of(world.settings.tenants_dir, other)):
        assert storage.measure(world.control_plane, world.settings).unread == 2
    measured = storage.measure(world.control_plane, world.settings)
    assert measured.unread == 1
    assert kept(world.control_plane, world.tenant_id) == before
    gauge = storage.storage_bytes(TenantPaths.of(world.settings.tenants_dir, other))
    assert kept(world.control_plane, other) == [(gauge, 0)] * 2


def test_a_database_that_did_not_change_is_opened_once_and_its_number_stands_in_every_hour(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands that nobody uses would be opened every quarter of an hour, and each keeps 32 KiB from being opened."""
    monkeypatch.setattr(fingerprint, "_SETTLED_SECONDS", -1.0)
    opened: list[str] = []
    read = storage.storage_bytes

    def storage_bytes(paths: TenantPaths) -> int:
        opened.append(paths.tenant_id)
        return read(paths)

    monkeypatch.setattr(storage, "storage_bytes", storage_bytes)
    last: dict[str, storage.Measurement] = {}
    storage.measure(world.control_plane, world.settings, last)
    assert opened.count(world.tenant_id) == 1 and world.tenant_id in last
    before = kept(world.control_plane, world.tenant_id)
    with world.control_plane.transaction() as connection:
        for table in ("usage_hourly", "usage_daily"):  # as in an hour and a day that has just begun
            connection.execute(f"DELETE FROM {table} WHERE tenant_id = %s", (world.tenant_id,))
    storage.measure(world.control_plane, world.settings, last)
    assert opened.count(world.tenant_id) == 1
    assert kept(world.control_plane, world.tenant_id) == before != [(None, None)] * 2
    world.write("x" * 50_000)
    storage.measure(world.control_plane, world.settings, last)
    assert opened.count(world.tenant_id) == 2
    assert kept(world.control_plane, world.tenant_id) == [(read(world.paths), 0)] * 2 != before
    registry.suspend(world.control_plane, world.tenant_id)
    storage.measure(world.control_plane, world.settings, last)
    assert world.tenant_id not in last


def test_a_directory_that_cannot_be_looked_into_ends_no_other_measurement(world: World) -> None:
    other = f"{world.tenant_id}-other"
    registry.create(world.control_plane, world.settings, other)
    current = TenantPaths.of(world.settings.tenants_dir, other).current
    current.unlink()
    current.symlink_to(current.name)
    with pytest.raises(OSError, match="symbolic links"):
        storage.volume_bytes(TenantPaths.of(world.settings.tenants_dir, other))
    assert storage.measure(world.control_plane, world.settings).unread == 1
    assert kept(world.control_plane, world.tenant_id) == [(storage.storage_bytes(world.paths), 0)] * 2


def test_only_active_tenants_of_this_machine_are_measured_and_a_missing_database_is_not_zero(world: World) -> None:
    """0 bytes would be billed as "nothing kept"; the truth is "not seen"."""
    names = {name: f"{world.tenant_id}-{name}" for name in ("suspended", "missing")}
    for name in names.values():
        registry.create(world.control_plane, world.settings, name)
    registry.suspend(world.control_plane, names["suspended"])
    shutil.rmtree(world.settings.tenants_dir / names["missing"])
    elsewhere = world.settings.model_copy(update={"machine_id": f"elsewhere-{world.tenant_id}"})
    assert storage.measure(world.control_plane, elsewhere) == storage.Measured(0, 0, 0)
    assert storage.measure(world.control_plane, world.settings).missing >= 1
    assert kept(world.control_plane, world.tenant_id) == [(storage.storage_bytes(world.paths), 0)] * 2
    assert [kept(world.control_plane, name) for name in names.values()] == [[(None, None)] * 2] * 2


def test_measuring_while_draining_never_deadlocks(world: World) -> None:
    """Both write the same rollup rows, in the same order."""
    others = [f"{world.tenant_id}-{n}" for n in range(6)]
    for name in others:
        registry.create(world.control_plane, world.settings, name)
    events = [event(name) for name in others for _ in range(20)]
    for n in range(20):
        segment(world.settings, events[n::20] * 2)

    def measure_often() -> None:
        for _ in range(20):
            with world.control_plane.transaction() as connection:
                connection.execute("UPDATE usage_hourly SET storage_bytes = NULL WHERE tenant_id = %s", (others[3],))
            storage.measure(world.control_plane, world.settings)

    at_once(measure_often, lambda: list(metering.drain_all(world.control_plane, world.settings)), measure_often)
    for name in others:
        check_counted(world.control_plane, name, [e for e in events if e.tenant_id == name])
