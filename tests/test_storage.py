"""storage_bytes: what is measured is what lies on disk, and it is kept beside the counts without touching them."""

from __future__ import annotations

import shutil

from gateway import quota
from shared import metering, registry, storage
from shared.control_plane import ControlPlane
from tests.core_fixtures import World, event
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


def on_disk(world: World) -> int:
    directory = world.paths.root / "generations" / f"{world.paths.generation():06d}"
    return sum(file.stat().st_size for file in directory.iterdir() if file.name in ("engram.db", "engram.db-wal"))


def test_the_last_measurement_stands_in_the_hour_and_the_day_and_counts_stay(world: World) -> None:
    """A gauge: measuring twice does not add up, and calls drained before and after are untouched."""
    segment(world.settings, [event(world.tenant_id)])
    list(metering.drain_all(world.control_plane, world.settings))
    storage.measure(world.control_plane, world.settings)
    small = on_disk(world)
    assert kept(world.control_plane, world.tenant_id) == [(small, 1)] * 2
    world.write(*("x" * 5_000 for _ in range(50)))
    storage.measure(world.control_plane, world.settings)
    assert on_disk(world) > small
    segment(world.settings, [event(world.tenant_id)])
    list(metering.drain_all(world.control_plane, world.settings))
    assert kept(world.control_plane, world.tenant_id) == [(on_disk(world), 2)] * 2


def test_a_quota_judges_the_number_that_is_measured(world: World) -> None:
    """What a customer is refused for and what they are shown must not be two things."""
    world.write("one")
    assert quota.storage_bytes is storage.storage_bytes
    assert storage.storage_bytes(world.paths) == on_disk(world)


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
    assert kept(world.control_plane, world.tenant_id) == [(on_disk(world), 0)] * 2
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
