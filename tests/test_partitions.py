"""Days of usage on a real PostgreSQL: made in time, found when late, dropped without loss, stall or double billing."""

from __future__ import annotations

import secrets
import threading
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from shared import partitions
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable, Permanent
from shared.settings import Settings
from shared.usage import UsageEvent
from tests.core_fixtures import event, settings_in, wait_until
from tests.metering_fixtures import at_once, check_counted, drain, event_ids, own_control_plane, query, segment, totals

pytest_plugins = ("tests.metering_fixtures",)
pytestmark = pytest.mark.usefixtures("today")
control_plane = own_control_plane

TODAY = datetime.now(UTC).date()


@pytest.fixture
def settings(tmp_path: Path, control_plane_url: str) -> Settings:
    return settings_in(tmp_path, control_plane_url, usage_retention_days=30)


def noon(days_ago: int) -> datetime:
    return datetime(TODAY.year, TODAY.month, TODAY.day, 12, tzinfo=UTC) - timedelta(days=days_ago)


def of_day(days_ago: int, tenant_id: str = "acme", count: int = 3) -> list[UsageEvent]:
    at = min(noon(days_ago), datetime.now(UTC))  # today before noon too: what is to come is set aside
    return [event(tenant_id, at=at + timedelta(seconds=n), memories_created=n) for n in range(count)]


def drained_long_ago(control_plane: ControlPlane, settings: Settings, *days_ago: int) -> list[UsageEvent]:
    """Events that were billed when the retention was longer."""
    events = [e for n in days_ago for e in of_day(n)]
    segment(settings, events)
    drain(control_plane, settings.model_copy(update={"usage_retention_days": 400}))
    return events


def apply_retention(control_plane: ControlPlane, settings: Settings) -> list[date]:
    """What the flow does; the days it dropped."""
    partitions.take_back(control_plane, settings)
    partitions.ensure_ahead(control_plane, settings)
    found = partitions.expired(control_plane, settings)
    return [partitions.drop(control_plane, settings, day).day for day in found if day.droppable]


# --- created ahead, and when they are missing ---


def test_days_are_created_ahead_and_the_gauge_says_how_many_in_a_row(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """A hole counts: the day behind it does not help tomorrow's events."""

    def ahead() -> object:
        row = control_plane.row("fleet_ages")
        assert row is not None
        return row["usage_partitions_ahead_days"]

    partitions.ensure_ahead(control_plane, settings.model_copy(update={"usage_partitions_ahead_days": 12}))
    assert ahead() == 12
    for days, expected in ((4, 3), (0, -1)):
        with control_plane.transaction() as connection:
            connection.execute(f"DROP TABLE {partitions.table_of(TODAY + timedelta(days=days))}")  # type: ignore[arg-type]
        assert ahead() == expected
    partitions.ensure_ahead(control_plane, settings)
    assert ahead() == 12


def test_events_of_days_without_a_partition_are_billed_with_the_rest(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """Late events, a backfill, and a week in which the retention flow did not run."""
    with control_plane.transaction() as connection:
        connection.execute(f"DROP TABLE {partitions.table_of(TODAY)}")  # type: ignore[arg-type]
    events = [*of_day(25), *of_day(11), event("acme")]
    segment(settings, events)
    [drained] = drain(control_plane, settings)
    assert (drained.inserted, drained.quarantined) == (7, 0)
    check_counted(control_plane, "acme", events)


def test_many_at_once_make_each_day_once(control_plane: ControlPlane, settings: Settings) -> None:
    """Every drain of the fleet meets the new day in the same second."""
    days = [TODAY - timedelta(days=n) for n in range(20, 28)]
    at_once(*[lambda: partitions.ensure(control_plane, days)] * 6)
    assert {day: state for day, state in partitions.states(control_plane).items() if day in days} == dict.fromkeys(
        days, "attached"
    )


# --- dropped after the retention ---


def test_whole_days_beyond_the_retention_are_dropped_and_their_rollups_stay(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """The day in which the retention begins is kept: part of it is still within."""
    old, kept = drained_long_ago(control_plane, settings, 40, 35, 32), drained_long_ago(control_plane, settings, 30, 1)
    before = totals(control_plane, "usage_daily", "acme")
    assert apply_retention(control_plane, settings) == [TODAY - timedelta(days=n) for n in (40, 35, 32)]
    assert event_ids(control_plane) == {UUID(bytes=e.request_id) for e in kept}
    assert totals(control_plane, "usage_daily", "acme") == totals(control_plane, "usage_hourly", "acme") == before
    counted = query(control_plane, "SELECT sum(events)::int, sum(memories_created)::int AS m FROM usage_days_dropped")
    assert counted == [(len(old), sum(e.memories_created for e in old))]
    assert apply_retention(control_plane, settings) == []


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE usage_daily SET api_calls = api_calls + 1 WHERE bucket = %s",
        "UPDATE usage_daily SET search_queries = 0 WHERE bucket = %s",
        "UPDATE usage_daily SET tenant_id = 'other' WHERE bucket = %s",
        "UPDATE usage_hourly SET api_calls = api_calls + 1 WHERE date_trunc('day', bucket, 'UTC') = %s",
        "UPDATE usage_segments SET by_day = jsonb_set(by_day, ARRAY[(%s AT TIME ZONE 'UTC')::date::text], '4', false)",
    ],
)
def test_a_day_whose_books_differ_is_kept(control_plane: ControlPlane, settings: Settings, damage: str) -> None:
    """The events are the only proof of what the rollups should have said, and the audit of what the events should
    have been; the other days go."""
    drained_long_ago(control_plane, settings, 40)
    drained_long_ago(control_plane, settings, 35)
    with control_plane.transaction() as connection:
        connection.execute(damage, (noon(40).replace(hour=0),))  # type: ignore[arg-type]
    assert apply_retention(control_plane, settings) == [TODAY - timedelta(days=35)]
    [differing] = partitions.expired(control_plane, settings)
    assert differing.difference is not None
    with pytest.raises(Permanent, match=str(TODAY - timedelta(days=40))):
        partitions.drop(control_plane, settings, differing)
    assert len(event_ids(control_plane)) == 3


def test_the_audit_of_a_day_is_kept_for_as_long_as_its_events(control_plane: ControlPlane, settings: Settings) -> None:
    """Else the last look at a day, before it goes, would find events that no drain seems to have inserted."""
    drained_long_ago(control_plane, settings, 40)
    drained_at = noon(40).replace(hour=1)
    assert partitions.audit_from(control_plane, settings) < drained_at
    apply_retention(control_plane, settings)
    assert drained_at < partitions.audit_from(control_plane, settings) < noon(30)


def test_events_of_a_dropped_day_are_set_aside_even_when_the_retention_is_longer_now(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """Their ids are gone, so a replay cannot be told from something new: it must not be billed again."""
    replayed = drained_long_ago(control_plane, settings, 40)
    apply_retention(control_plane, settings)
    before = totals(control_plane, "usage_daily", "acme")
    longer = settings.model_copy(update={"usage_retention_days": 400})
    late = of_day(50)
    segment(settings, [*replayed, *replayed, *late])
    [drained] = drain(control_plane, longer)
    assert (drained.inserted, drained.quarantined, drained.duplicates) == (3, 3, 3)
    reasons = query(control_plane, "SELECT DISTINCT reason FROM usage_quarantine")
    assert reasons == [("the events of its day were dropped",)]
    assert totals(control_plane, "usage_daily", "acme") == tuple(a + b for a, b in zip(before, (3, 3, 3), strict=True))
    check_counted_by_events(control_plane, late)


def check_counted_by_events(control_plane: ControlPlane, events: list[UsageEvent]) -> None:
    assert event_ids(control_plane) == {UUID(bytes=e.request_id) for e in events}


def left_pending(control_plane: ControlPlane, settings: Settings) -> None:
    """A run that was cut while it waited for a query: the first of the two transactions of a detach."""
    with psycopg.connect(settings.control_plane_url.get_secret_value()) as reader:
        reader.execute("SELECT count(*) FROM usage_events").fetchall()
        [found] = partitions.expired(control_plane, settings)
        impatient = settings.model_copy(update={"usage_detach_timeout_seconds": 0.2})
        with pytest.raises(ControlPlaneUnavailable):
            partitions.drop(control_plane, impatient, found)


def left_detached(control_plane: ControlPlane, settings: Settings) -> None:
    """A run that died between detach and drop."""
    table = partitions.table_of(TODAY - timedelta(days=40))
    with psycopg.connect(settings.control_plane_url.get_secret_value(), autocommit=True) as connection:
        connection.execute(f"ALTER TABLE usage_events DETACH PARTITION {table} CONCURRENTLY")  # type: ignore[arg-type]


LEFT = {"pending": left_pending, "detached": left_detached}


@pytest.mark.parametrize("state", LEFT)
def test_a_day_left_halfway_is_dropped_by_the_next_run(
    control_plane: ControlPlane, settings: Settings, state: str
) -> None:
    """FINALIZE, then drop; and it is counted as if nothing had happened."""
    drained_long_ago(control_plane, settings, 40)
    day = TODAY - timedelta(days=40)
    LEFT[state](control_plane, settings)
    assert partitions.states(control_plane)[day] == state
    assert apply_retention(control_plane, settings) == [day]
    assert query(control_plane, "SELECT day, events FROM usage_days_dropped") == [(day, 3)]
    assert day not in partitions.states(control_plane)


@pytest.mark.parametrize("state", LEFT)
@pytest.mark.parametrize("how", ["the next run", "a late event"])
def test_a_day_left_halfway_is_attached_again_when_it_is_kept_now(
    control_plane: ControlPlane, settings: Settings, state: str, how: str
) -> None:
    """Somebody raised the retention after the crash: nothing of it may be lost, and ids still stop replays."""
    events = drained_long_ago(control_plane, settings, 40)
    LEFT[state](control_plane, settings)
    assert event_ids(control_plane) == set()
    longer = settings.model_copy(update={"usage_retention_days": 400})
    if how == "the next run":
        assert apply_retention(control_plane, longer) == []
        check_counted(control_plane, "acme", events)
    events += of_day(40)
    segment(settings, events)
    [drained] = drain(control_plane, longer)
    assert (drained.inserted, drained.duplicates) == (3, 3)
    check_counted(control_plane, "acme", events)


def test_while_a_detach_waits_for_a_long_query_usage_is_drained_even_into_a_new_day(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """The drain must not stall behind the retention, nor the two wait for one another."""
    drained_long_ago(control_plane, settings, 40)
    [found] = partitions.expired(control_plane, settings)
    dropped: list[object] = []
    with psycopg.connect(settings.control_plane_url.get_secret_value()) as reader:
        reader.execute("SELECT count(*) FROM usage_events").fetchall()
        work = threading.Thread(target=lambda: dropped.append(partitions.drop(control_plane, settings, found)))
        work.start()
        wait_until(lambda: partitions.states(control_plane)[found.day] == "pending")
        events = [*of_day(20, "other"), *of_day(0, "other")]
        segment(settings, events)
        drain(control_plane, settings)
        check_counted(control_plane, "other", events)
        assert work.is_alive()
        with pytest.raises(ControlPlaneUnavailable, match="another run"):
            partitions.drop(control_plane, settings, found)
        reader.rollback()
        work.join(20)
    assert [d.day for d in dropped] == [found.day]  # type: ignore[attr-defined]


def test_drains_and_retention_at_once_lose_nothing_and_never_deadlock(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """Days are made and dropped under load; every event of a kept day is there, once."""
    drained_long_ago(control_plane, settings, *range(35, 50))
    tenant_id, events = f"m{secrets.token_hex(4)}", []
    for n in range(40):
        events += (new := [*of_day(n % 25, tenant_id, 5), *of_day(0, tenant_id, 5)])
        segment(settings, new)
        segment(settings, new[3:])
    at_once(
        lambda: drain(control_plane, settings),
        lambda: drain(control_plane, settings),
        lambda: apply_retention(control_plane, settings),
    )
    check_counted(control_plane, tenant_id, events)
    assert query(control_plane, "SELECT sum(events)::int AS n FROM usage_days_dropped") == [(45,)]
