"""The books of usage on a real PostgreSQL: they agree after all that a drain may meet, and say where when not."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shared import correction, metering, reconcile, spool
from shared.control_plane import ControlPlane
from shared.errors import Permanent, Refused
from shared.settings import Settings
from shared.usage import Counters
from tests.core_fixtures import event
from tests.metering_fixtures import check_counted, drain, own_control_plane, own_settings, query, segment

pytest_plugins = ("tests.metering_fixtures",)
pytestmark = pytest.mark.usefixtures("today")
settings, control_plane = own_settings, own_control_plane
TODAY = datetime.now(UTC).date()


def execute(control_plane: ControlPlane, sql: str, *parameters: object) -> None:
    with control_plane.transaction() as connection:
        connection.execute(sql, parameters)  # type: ignore[arg-type]


def books(control_plane: ControlPlane, settings: Settings, days_back: int = 3) -> reconcile.Books:
    return reconcile.reconcile(control_plane, settings, TODAY - timedelta(days=days_back), TODAY)


def of_today(found: reconcile.Books) -> reconcile.DayBooks:
    return next(day for day in found.days if day.day == TODAY)


def test_late_events_replays_and_what_waits_leave_books_that_agree(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """Nothing that happens in a good week may look like a difference."""
    now = datetime.now(UTC)
    events = [event(f"t{n % 3}", at=now - timedelta(hours=7 * n), memories_created=n) for n in range(8)]
    path = segment(settings, events[:5])
    raw = path.read_bytes()
    drain(control_plane, settings)
    path.write_bytes(raw)  # a drained segment copied back
    segment(settings, [*events[5:], *events[2:4]])  # late ones, and some that are there
    drain(control_plane, settings)
    segment(settings, [events[0], event("t0", at=now), event("t1", at=now)])
    found = books(control_plane, settings)
    assert found.agree and found.where() == []
    assert sum(day.events for day in found.days) == 8
    assert [day.audited for day in found.days] == [day.events for day in found.days]
    assert found.waiting == {("t0", TODAY): 1, ("t1", TODAY): 1} and of_today(found).waiting == 2


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        ("UPDATE usage_hourly SET api_calls = api_calls + 1 WHERE tenant_id = 'b'", "hours and days differ"),
        ("UPDATE usage_daily SET search_queries = 0 WHERE tenant_id = 'b'", "hours and days differ"),
        ("UPDATE usage_hourly SET bucket = bucket - interval '1 hour' WHERE tenant_id = 'b'", "hours and days differ"),
        ("DELETE FROM usage_daily WHERE tenant_id = 'b'", "hours and days differ"),
        ("DELETE FROM usage_events WHERE tenant_id = 'b'", "inserted 4 events, 2 are there"),
        ("UPDATE usage_events SET tenant_id = 'c' WHERE tenant_id = 'b'", "2 tenants' events"),
    ],
)
def test_each_way_of_disagreeing_is_found_and_named(
    control_plane: ControlPlane, settings: Settings, damage: str, where: str
) -> None:
    """A reconcile that cannot fail proves nothing."""
    noon = datetime(TODAY.year, TODAY.month, TODAY.day, 12, tzinfo=UTC) - timedelta(days=1)
    segment(settings, [event(tenant, at=noon) for tenant in "aabb"])
    drain(control_plane, settings)
    assert books(control_plane, settings).agree
    execute(control_plane, damage)
    found = books(control_plane, settings)
    assert not found.agree
    assert any(where in line for line in found.where()), found.where()
    tenants = {d.tenant_id for day in found.days for d in day.differences}
    assert "b" in tenants and "a" not in tenants


def test_a_day_whose_audit_is_older_than_its_columns_is_compared_without_it(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """A record that is not complete is no evidence."""
    segment(settings, [event("a")])
    drain(control_plane, settings)
    execute(control_plane, "UPDATE usage_segments SET by_day = NULL")
    found = books(control_plane, settings)
    assert of_today(found).audited is None and found.agree


def test_what_is_set_aside_is_said_and_ids_of_no_calendar_are_no_obstacle(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """Books that agree about what was billed still say what was not."""
    future = [event("early", at=datetime.now(UTC) + timedelta(minutes=10)) for _ in range(3)]
    no_date = event("odd", request_id=b"\xff" * 6 + b"\x70" + bytes(9))  # of the year 10889
    path = segment(settings, [event("a"), *future, no_date])
    waiting = books(control_plane, settings)
    assert waiting.waiting == {("a", TODAY): 1} and waiting.set_aside == []
    drain(control_plane, settings)
    assert not path.exists()
    found = books(control_plane, settings)
    assert found.agree
    said = {(one.tenant_id, one.reason): one.events for one in found.set_aside}
    assert said == {("early", "from the future"): 3, ("odd", "from the future"): 1}
    assert books(control_plane, settings, days_back=0).set_aside == found.set_aside
    yesterday = TODAY - timedelta(days=1)
    assert reconcile.reconcile(control_plane, settings, yesterday, yesterday).set_aside == []


def test_a_repair_makes_the_rollups_what_the_events_say_and_leaves_a_record(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """Only the named day, only what differs, never the gauge; without `apply` nothing."""
    yesterday = TODAY - timedelta(days=1)
    noon = datetime(TODAY.year, TODAY.month, TODAY.day, 12, tzinfo=UTC) - timedelta(days=1)
    events = [event(tenant, at=noon + timedelta(hours=h), memories_created=h) for tenant in "ab" for h in range(3)]
    segment(settings, events)
    drain(control_plane, settings)
    execute(control_plane, "UPDATE usage_hourly SET api_calls = 77, storage_bytes = 5 WHERE tenant_id = 'a'")
    execute(control_plane, "DELETE FROM usage_daily WHERE tenant_id = 'b'")
    execute(control_plane, "INSERT INTO usage_hourly VALUES ('ghost', %s, 3, 0, 0, 9)", noon)
    words = {"reason": "ticket 12", "requested_by": "me"}
    looked = correction.repair(control_plane, yesterday, apply=False, **words)
    assert not looked.applied and looked.before.tenants_differing == 3
    assert not books(control_plane, settings).agree
    done = correction.repair(control_plane, yesterday, apply=True, **words)
    assert (done.hourly_rows, done.daily_rows) == (4, 1)
    assert books(control_plane, settings).agree
    for tenant in "ab":
        check_counted(control_plane, tenant, [e for e in events if e.tenant_id == tenant])
    assert query(control_plane, "SELECT api_calls, storage_bytes FROM usage_hourly WHERE tenant_id = 'ghost'") == [
        (0, 9)
    ]
    [(kind, reason, by, details)] = query(
        control_plane, "SELECT kind, reason, requested_by, details FROM usage_corrections"
    )
    assert (kind, reason, by) == ("repair", "ticket 12", "me")
    assert details["before"]["tenants_differing"] == 3  # type: ignore[index]


def test_a_repair_refuses_a_day_whose_events_are_in_doubt(control_plane: ControlPlane, settings: Settings) -> None:
    """Rollups must never be made to fit events that went missing."""
    words = {"reason": "r", "requested_by": "me", "apply": True}
    with pytest.raises(Permanent):
        correction.repair(control_plane, TODAY, **words)  # type: ignore[arg-type]
    segment(settings, [event("a"), event("a")])
    drain(control_plane, settings)
    execute(control_plane, "DELETE FROM usage_events WHERE request_id IN (SELECT request_id FROM usage_events LIMIT 1)")
    with pytest.raises(Refused, match="inserted 2 events, 1 are there"):
        correction.repair(control_plane, TODAY, **words)  # type: ignore[arg-type]
    assert query(control_plane, "SELECT api_calls FROM usage_daily") == [(2,)]


def lines(*events: dict[str, object]) -> bytes:
    return b"".join(json.dumps(e).encode() + b"\n" for e in events)


def test_an_import_is_drained_like_any_usage_counts_once_and_leaves_a_record(
    control_plane: ControlPlane, settings: Settings, tmp_path: Path
) -> None:
    """A file of late events; imported twice it adds nothing; two equal lines are two requests."""
    at = (datetime.now(UTC) - timedelta(days=2)).isoformat()
    search = {"tenant_id": "late", "route": "/v1/search", "status": 200, "ts": at}
    create = {"tenant_id": "late", "route": "/v1/memories", "status": 201, "ts": at, "memories_created": 4}
    ancient = search | {"ts": "2001-01-01T00:00:00Z"}
    file = tmp_path / "late.jsonl"
    file.write_bytes(lines(search, search, create, ancient))
    words = {"reason": "gateway log of host 3", "requested_by": "me"}
    looked = correction.bring_in(control_plane, settings, file, apply=False, **words)
    assert looked.events == 4 and metering.pending(settings) == []
    for expected in ((3, 0, 1), (0, 3, 1)):
        correction.bring_in(control_plane, settings, file, apply=True, **words)
        [drained] = drain(control_plane, settings)
        assert (drained.inserted, drained.duplicates, drained.quarantined) == expected
    sums = query(control_plane, "SELECT api_calls, search_queries, memories_created FROM usage_daily")
    assert sums == [tuple(Counters(3, 2, 4))]
    assert books(control_plane, settings).agree
    records = query(control_plane, "SELECT kind, reason, details->>'file' FROM usage_corrections")
    assert records == [("import", "gateway log of host 3", "late.jsonl")] * 2


def test_a_segment_of_another_machine_can_be_imported(
    control_plane: ControlPlane, settings: Settings, tmp_path: Path
) -> None:
    """The disk of a dead machine, read elsewhere: its ids keep an event from counting again."""
    events = [event("moved") for _ in range(4)]
    segment(settings, events[:2])
    drain(control_plane, settings)
    rescued = tmp_path / "rescued.bin"
    rescued.write_bytes(spool.MAGIC + b"".join(map(spool.frame, events)))
    correction.bring_in(control_plane, settings, rescued, reason="r", requested_by="me", apply=True)
    [drained] = drain(control_plane, settings)
    assert (drained.inserted, drained.duplicates) == (2, 2)
    check_counted(control_plane, "moved", events)


@pytest.mark.parametrize(
    "bad",
    [
        b'{"tenant_id": "a"}\n',
        b"not json\n",
        b'{"tenant_id": "a", "route": "/r", "status": 200, "ts": "2026-01-01T00:00:00"}\n',
        b'{"tenant_id": "a", "route": "/r", "status": 200, "ts": "2026-01-01T00:00:00Z", "calls": 3}\n',
        b"",
        spool.MAGIC + b"\xe5\x9e damaged",
    ],
)
def test_a_file_with_anything_unreadable_in_it_is_refused_as_a_whole(
    control_plane: ControlPlane, settings: Settings, tmp_path: Path, bad: bytes
) -> None:
    """Half an import would be a bill nobody can explain."""
    file = tmp_path / "bad.jsonl"
    good = {"tenant_id": "a", "route": "/v1/search", "status": 200, "ts": datetime.now(UTC).isoformat()}
    file.write_bytes((lines(good) if bad and not bad.startswith(spool.MAGIC) else b"") + bad)
    with pytest.raises(Permanent):
        correction.bring_in(control_plane, settings, file, reason="r", requested_by="me", apply=True)
    assert metering.pending(settings) == []
    assert query(control_plane, "SELECT count(*)::int AS n FROM usage_corrections") == [(0,)]
