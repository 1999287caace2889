"""Many segments at once, and one among them that cannot be drained."""

from __future__ import annotations

import os
import random
import secrets
import time
from pathlib import Path

import pytest

from shared import metering, spool, stuck
from shared.backoff import Backoff
from shared.control_plane import ControlPlane
from shared.settings import Settings
from tests.core_fixtures import event, settings_in
from tests.metering_fixtures import check_counted, drain, query, segment

pytest_plugins = ("tests.metering_fixtures",)


@pytest.fixture
def settings(tmp_path: Path, core_url: str) -> Settings:
    return settings_in(tmp_path, core_url, machine_id=f"machine-{secrets.token_hex(4)}")


def commits(control_plane: ControlPlane) -> int:
    [(count,)] = query(control_plane, "SELECT count(DISTINCT xmin::text)::int FROM usage_segments")
    return int(str(count))


def test_small_segments_share_a_transaction_and_each_keeps_its_own_record(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str
) -> None:
    """Thousands wait after an outage at low load; one COMMIT each made 80 segments a second here, together 1,100."""
    events = [event(tenant_id, memories_created=n) for n in range(300)]
    paths = [segment(settings, events[n : n + 3]) for n in range(0, 300, 3)]
    before = commits(core_control_plane)
    drained = drain(core_control_plane, settings)
    assert commits(core_control_plane) - before == 1
    assert [(d.events, d.inserted, d.duplicates) for d in drained] == [(3, 3, 0)] * 100
    assert {d.segment for d in drained} == {p.stem for p in paths}
    check_counted(core_control_plane, tenant_id, events)


def test_small_segments_with_events_that_are_there_already_say_whose_were_new(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str
) -> None:
    """A lost COMMIT reply of many segments: the replay is one transaction too, and attributes every event."""
    events = [event(tenant_id) for _ in range(60)]
    segment(settings, events[5:25])
    drain(core_control_plane, settings)
    paths = [segment(settings, events[n : n + 10]) for n in range(0, 60, 10)]
    drained = {d.segment: d for d in drain(core_control_plane, settings)}
    found = [(drained[p.stem].inserted, drained[p.stem].duplicates) for p in paths]
    assert found == [(5, 5), (0, 10), (5, 5), (10, 0), (10, 0), (10, 0)]
    check_counted(core_control_plane, tenant_id, events)


def test_an_event_in_two_small_segments_counts_once(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str
) -> None:
    """Then they are drained one after the other."""
    events = [event(tenant_id) for _ in range(20)]
    chance = random.Random(2)
    for _ in range(6):
        segment(settings, chance.sample(events, 8))
    segment(settings, events)
    drained = drain(core_control_plane, settings)
    assert sum(d.inserted for d in drained) == 20
    check_counted(core_control_plane, tenant_id, events)


def test_a_segment_that_cannot_be_read_waits_aside_and_is_tried_again(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An I/O error on one file must not stop everybody's usage, nor lose that file's."""
    events = [event(tenant_id) for _ in range(9)]
    good, bad, last = (segment(settings, events[n : n + 3]) for n in (0, 3, 6))
    content = bad.read_bytes()
    bad.unlink()
    bad.mkdir()  # reading it is EISDIR
    drained = drain(core_control_plane, settings)
    assert {d.segment for d in drained} == {good.stem, last.stem}
    [waiting] = stuck.segments(settings.spool_dir)
    assert waiting.name == bad.name
    assert spool.survey(settings.spool_dir).stuck == 1  # `engram_usage_stuck_segments`
    assert drain(core_control_plane, settings) == []  # not at once again
    waiting.rmdir()
    waiting.write_bytes(content)
    monkeypatch.setattr(stuck, "MIN_SECONDS", 0.0)
    [again] = drain(core_control_plane, settings)
    assert again.inserted == 3 and stuck.segments(settings.spool_dir) == []
    check_counted(core_control_plane, tenant_id, events)


def test_a_segment_that_postgresql_refuses_waits_aside_and_the_others_go_on(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no check foresaw: here a number the column does not hold, in one of three segments drained together."""
    monkeypatch.setattr(metering.billable, "_MAX_COUNT", 1 << 40)
    events = [event(tenant_id) for _ in range(6)]
    segment(settings, events[:3])
    bad = segment(
        settings,
        [event(tenant_id), event(tenant_id, memories_created=1 << 30), event(tenant_id, memories_created=1 << 30)],
    )
    with core_control_plane.transaction() as connection:
        connection.execute(
            "CREATE FUNCTION no_million() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN IF NEW.memories_created > 1000000 THEN RAISE EXCEPTION 'no' USING ERRCODE = '22003';"
            " END IF; RETURN NEW; END$$"
        )
        connection.execute(
            "CREATE TRIGGER no_million BEFORE INSERT ON usage_events FOR EACH ROW EXECUTE FUNCTION no_million()"
        )
    try:
        segment(settings, events[3:])
        assert len(drain(core_control_plane, settings)) == 2
    finally:
        with core_control_plane.transaction() as connection:
            connection.execute("DROP TRIGGER no_million ON usage_events")
            connection.execute("DROP FUNCTION no_million")
    assert [p.name for p in stuck.segments(settings.spool_dir)] == [bad.name]
    check_counted(core_control_plane, tenant_id, events)


def test_a_stuck_segment_is_tried_less_and_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long again as it has waited, whatever restarts: no state but the file's own times."""
    path = tmp_path / "1-1-a.seg"
    path.write_bytes(b"x")
    stuck.put(path, OSError("no"))
    [waiting] = stuck.segments(tmp_path)
    assert stuck.give_back(tmp_path) == []
    os.utime(waiting, (time.time() - 3600,) * 2)  # written an hour ago, put aside now
    assert stuck.give_back(tmp_path) == []
    real = time.time()
    for later, due in ((stuck.MIN_SECONDS + 1, False), (stuck.MAX_SECONDS + 1, True)):
        monkeypatch.setattr(stuck.time, "time", lambda later=later: real + later)
        assert [p.name for p in stuck.give_back(tmp_path)] == [path.name] * due


def test_a_fleet_that_lost_its_postgresql_comes_back_spread_over_time() -> None:
    """Doubling alone keeps machines in step; a random part of it does not, and the last still comes soon."""
    fleet = [Backoff(1.0, 15.0) for _ in range(200)]
    for _ in range(6):
        waits = [one.next_seconds() for one in fleet]
    assert max(waits) <= 15.0 and min(waits) >= 1.5
    assert max(sum(a <= w < a + 1 for w in waits) for a in range(15)) < 40
    fleet[0].reset()
    assert fleet[0].next_seconds() <= 1.0
