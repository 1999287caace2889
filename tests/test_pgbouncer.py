"""Everything the control plane is asked, through PgBouncer in transaction mode; and through a wire that loses COMMITs.

Migrations go to PostgreSQL directly, as with Neon.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from shared import day_books, lease, metering, partitions, registry, spool
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable, LeaseHeld
from tests.core_fixtures import World, event, new_world, settings_in
from tests.metering_fixtures import at_once, check_counted, query, segment
from tests.pgbouncer_fixtures import POOL_SIZE, CommitCutter, PgBouncer

pytest_plugins = ("tests.core_fixtures", "tests.pgbouncer_fixtures")


@pytest.fixture
def pooled(tmp_path: Path, control_plane_url: str, pgbouncer: PgBouncer) -> Iterator[World]:
    """A tenant of a control plane that is reached through the pooler alone."""
    with ControlPlane(settings_in(tmp_path, pgbouncer.url(control_plane_url))) as control_plane:
        yield new_world(tmp_path, pgbouncer.url(control_plane_url), control_plane)


@pytest.fixture
def nothing_left_behind(control_plane_url: str, pgbouncer: PgBouncer) -> Iterator[None]:
    """After the test: no server connection of the pool has a setting, a prepared statement or a lock from it."""
    with psycopg.connect(pgbouncer.url(control_plane_url), prepare_threshold=None) as connection:
        before = _session_state(connection)
    yield
    clients = [psycopg.connect(pgbouncer.url(control_plane_url), prepare_threshold=None) for _ in range(POOL_SIZE)]
    states = [_session_state(client) for client in clients]  # each in a transaction: on a connection of its own
    # Only now: PgBouncer drops one whose client left before it had read that the server is ready, perhaps the only one.
    assert pgbouncer.connections(control_plane_url) == POOL_SIZE
    for client in clients:
        client.close()
    assert states == [before] * POOL_SIZE


def _session_state(connection: psycopg.Connection[tuple[object, ...]]) -> list[tuple[object, ...]]:
    return connection.execute(
        "SELECT name, setting FROM pg_settings WHERE source = 'session' AND name <> 'application_name'"
        " UNION ALL SELECT 'prepared statements', count(*)::text FROM pg_prepared_statements"
        " UNION ALL SELECT 'statement_timeout', current_setting('statement_timeout')"
        " UNION ALL SELECT 'advisory locks', count(*)::text FROM pg_locks WHERE locktype = 'advisory'"
        " UNION ALL SELECT 'temporary tables', count(*)::text FROM pg_class WHERE relpersistence = 't'"
        " ORDER BY 1"
    ).fetchall()


@pytest.mark.usefixtures("nothing_left_behind")
def test_tenants_backups_and_leases_work_through_the_pooler(pooled: World) -> None:
    """The rows a restore stands on: whoever has the lease has it, on whatever connection it asks."""
    pooled.write("one")
    made = pooled.back_up()
    rows = pooled.control_plane.rows("backup_list", tenant_id=pooled.tenant_id, limit=10)
    assert [row["backup_id"] for row in rows] == [made.backup_id]
    held = lease.acquire(pooled.control_plane, pooled.tenant_id, holder="a", reason="test", seconds=30)
    with pytest.raises(LeaseHeld):
        lease.acquire(pooled.control_plane, pooled.tenant_id, holder="b", reason="test", seconds=30)
    assert lease.renew(pooled.control_plane, held, seconds=30).epoch == held.epoch
    assert lease.release(pooled.control_plane, pooled.tenant_id, "a")
    assert registry.suspend(pooled.control_plane, pooled.tenant_id).state == "suspended"
    assert registry.resume(pooled.control_plane, pooled.tenant_id).state == "active"


@pytest.mark.usefixtures("nothing_left_behind")
def test_leases_asked_for_at_once_are_granted_to_one(pooled: World) -> None:
    """Session advisory locks gave the same lock to two clients of a pooler; a row does not."""
    granted: list[str] = []

    def ask(name: str) -> None:
        try:
            lease.acquire(pooled.control_plane, pooled.tenant_id, holder=name, reason="test", seconds=30)
            granted.append(name)
        except LeaseHeld:
            pass

    at_once(*(lambda name=name: ask(name) for name in "abcdefgh"))
    assert len(granted) == 1


@pytest.mark.usefixtures("nothing_left_behind")
def test_drains_retention_and_quotas_at_once_are_exact_through_the_pooler(pooled: World) -> None:
    """More clients than server connections, copies, replays, new days, days that go: each event is counted once."""
    settings, control_plane = pooled.settings.model_copy(update={"usage_retention_days": 30}), pooled.control_plane
    now = datetime.now(UTC)
    segment(settings, [event("long-gone", at=now - timedelta(days=n)) for n in (40, 39)])
    list(metering.drain_all(control_plane, settings.model_copy(update={"usage_retention_days": 400})))
    events = [event(pooled.tenant_id, at=now - timedelta(days=n % 20), memories_created=n) for n in range(400)]
    chance = random.Random(1)
    for _ in range(30):
        segment(settings, chance.sample(events, 40))
    segment(settings, events)

    def drain_alone() -> None:
        with ControlPlane(settings) as own:
            list(metering.drain_all(own, settings))

    def drop_days() -> None:
        for day in partitions.expired(control_plane, settings):
            partitions.drop(control_plane, settings, day)

    def read() -> None:
        window = {"tenant_id": pooled.tenant_id, "from": now - timedelta(days=30), "to": now}
        for _ in range(10):
            control_plane.rows("quota_usage", segments=["none"])
            control_plane.rows("usage_by_bucket", granularity="day", **window)
            day_books.of_day(control_plane, now.date())
            control_plane.rows("fleet_ages")

    at_once(drain_alone, drain_alone, drain_alone, drop_days, read)
    assert spool.sealed(settings.spool_dir) == []
    check_counted(control_plane, pooled.tenant_id, events)
    assert query(control_plane, "SELECT sum(events)::int AS n FROM usage_days_dropped") == [(2,)]


@pytest.mark.usefixtures("nothing_left_behind")
def test_a_statement_that_is_cut_leaves_the_pooled_connection_as_it_was(pooled: World, control_plane_url: str) -> None:
    """A time-out of one client must not become the time-out of the next."""
    hasty = pooled.settings.model_copy(update={"control_plane_statement_timeout_seconds": 1})
    with ControlPlane(hasty) as control_plane:
        with pytest.raises(ControlPlaneUnavailable), control_plane.transaction() as connection:
            connection.execute("SELECT pg_sleep(30)")
        with pytest.raises(ControlPlaneUnavailable):
            sleep = sql.SQL("SELECT pg_sleep({})").format(30)
            control_plane.execute_alone(sleep, timeout_seconds=0.2)
        control_plane.ping()


@pytest.fixture
def cutter(control_plane_url: str) -> Iterator[CommitCutter]:
    with CommitCutter(psycopg.conninfo.conninfo_to_dict(control_plane_url)["port"]).running() as running:  # type: ignore[arg-type]
        yield running


def test_a_drain_that_never_heard_of_its_commit_is_repeated_and_counts_once(
    tmp_path: Path, control_plane_url: str, cutter: CommitCutter
) -> None:
    """The segment stays, its replay finds every event there; the same for one of which half is new."""
    settings = settings_in(tmp_path, cutter.url(control_plane_url))
    events = [event("acme", memories_created=n) for n in range(50)]
    segment(settings, events[:30])
    with ControlPlane(settings) as control_plane:
        control_plane.ping()
        for cuts, count in ((1, 30), (2, 50)):
            segment(settings, events[:count])
            cutter.cuts = cuts
            for _ in range(cuts):
                with pytest.raises(ControlPlaneUnavailable):
                    list(metering.drain_all(control_plane, settings))
                assert spool.sealed(settings.spool_dir)
            list(metering.drain_all(control_plane, settings))
            check_counted(control_plane, "acme", events[:count])
            assert spool.sealed(settings.spool_dir) == []
    assert cutter.cut == 3
