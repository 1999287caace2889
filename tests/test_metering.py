"""The drain on a real PostgreSQL: each event counted once, whatever crashes, repeats or is damaged."""

from __future__ import annotations

import random
import secrets
import signal
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from shared import metering, spool, usage_audit
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable
from shared.settings import Settings
from shared.usage import UsageEvent
from tests.core_fixtures import event, settings_in, start_child
from tests.metering_fixtures import at_once, check_counted, drain, query, segment, totals

pytest_plugins = ("tests.metering_fixtures",)


def test_a_segment_becomes_events_and_equal_rollups_and_is_gone(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str
) -> None:
    """The main job, over two days and several hours."""
    now = datetime.now(UTC)
    events = [event(tenant_id, at=now - timedelta(hours=h), memories_created=h % 3) for h in range(0, 30, 3)]
    path = segment(settings, events)
    [drained] = drain(core_control_plane, settings)
    assert (drained.events, drained.inserted, drained.duplicates, drained.quarantined) == (10, 10, 0, 0)
    assert not path.exists()
    check_counted(core_control_plane, tenant_id, events)
    audit = query(core_control_plane, "SELECT events, inserted FROM usage_segments WHERE segment = %s", path.stem)
    assert audit == [(10, 10)]


def test_an_event_just_before_midnight_is_counted_in_its_own_hour_and_day(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str
) -> None:
    """Buckets are UTC, whatever zone a session or machine has."""
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    events = [event(tenant_id, at=midnight - timedelta(milliseconds=1)), event(tenant_id, at=midnight)]
    segment(settings, events)
    drain(core_control_plane, settings)
    for table, unit in (("usage_hourly", timedelta(hours=1)), ("usage_daily", timedelta(days=1))):
        buckets = query(core_control_plane, f"SELECT bucket FROM {table} WHERE tenant_id = %s ORDER BY 1", tenant_id)
        assert buckets == [(midnight - unit,), (midnight,)]


def test_a_replayed_segment_inserts_nothing(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str
) -> None:
    """A crash between COMMIT and unlink leaves the file: its second drain counts only duplicates."""
    events = [event(tenant_id) for _ in range(20)]
    path = segment(settings, events)
    raw = path.read_bytes()
    drain(core_control_plane, settings)
    path.write_bytes(raw)
    [again] = drain(core_control_plane, settings)
    assert (again.inserted, again.duplicates) == (0, 20)
    check_counted(core_control_plane, tenant_id, events)


def test_a_crash_at_either_side_of_the_commit_counts_once(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before COMMIT nothing is there; after it everything is; the next drain makes both the same."""
    events = [event(tenant_id) for _ in range(5)]
    path = segment(settings, events)
    for module, name, counted in ((usage_audit, "rows", 0), (metering, "unlink", 5)):
        with monkeypatch.context() as patch:
            real = getattr(module, name)

            def crash(*args: object, name: str = name, real: Callable[..., object] = real, **kwargs: object) -> object:
                if name == "rows" and args[1] != "usage_segment_insert":
                    return real(*args, **kwargs)
                raise KeyboardInterrupt

            patch.setattr(module, name, crash)
            with pytest.raises(KeyboardInterrupt):
                drain(core_control_plane, settings)
        assert path.exists()
        assert totals(core_control_plane, "usage_hourly", tenant_id)[0] == counted
    drain(core_control_plane, settings)
    assert not path.exists()
    check_counted(core_control_plane, tenant_id, events)


def test_while_the_control_plane_is_down_segments_stay(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str
) -> None:
    """Usage waits on disk for PostgreSQL."""
    events = [event(tenant_id) for _ in range(3)]
    path = segment(settings, events)
    raw = path.read_bytes()
    down = settings_in(settings.data_dir, "postgresql://u:p@127.0.0.1:1/d", control_plane_connect_timeout_seconds=0.2)
    with ControlPlane(down) as dead, pytest.raises(ControlPlaneUnavailable):
        drain(dead, settings)
    assert path.read_bytes() == raw
    drain(core_control_plane, settings)
    check_counted(core_control_plane, tenant_id, events)


def test_two_drainers_at_once_count_once(core_control_plane: ControlPlane, settings: Settings, tenant_id: str) -> None:
    """A deployment run by hand beside the resident drain; overlapping batches in any order."""
    events = [event(tenant_id, memories_created=n) for n in range(600)]
    chance = random.Random(3)
    for _ in range(24):
        segment(settings, chance.sample(events, 50))
    segment(settings, events)

    def work() -> None:
        with ControlPlane(settings) as own:
            drain(own, settings)

    at_once(work, work, work)
    assert spool.sealed(settings.spool_dir) == []
    check_counted(core_control_plane, tenant_id, events)


def test_a_segment_larger_than_a_batch_is_one_transaction(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several statements, one commit, each event once even when both batches hold it."""
    monkeypatch.setattr(metering, "BATCH_EVENTS", 7)
    events = [event(tenant_id) for _ in range(20)]
    segment(settings, [*events, *events[:9]])
    [drained] = drain(core_control_plane, settings)
    assert (drained.events, drained.inserted, drained.duplicates) == (29, 20, 9)
    check_counted(core_control_plane, tenant_id, events)


@hypothesis_settings(max_examples=25)
@given(st.data())
def test_any_split_and_repetition_of_events_over_segments_gives_the_same_totals(
    core_control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory, core_url: str, data: st.DataObject
) -> None:
    """Retries, replays and crashes only ever rearrange and repeat."""
    tenant_id = f"m{secrets.token_hex(6)}"
    settings = settings_in(tmp_path_factory.mktemp("split"), core_url)
    hours = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=12))
    now = datetime.now(UTC)
    events = [
        event(tenant_id, at=now - timedelta(hours=h), memories_created=n, search_queries=n % 2)
        for n, h in enumerate(hours)
    ]
    piles: dict[int, list[UsageEvent]] = {}
    for one in events:
        for pile in data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)):
            piles.setdefault(pile, []).append(one)
    for pile in data.draw(st.permutations(sorted(piles))):
        segment(settings, data.draw(st.permutations(piles[pile])))
        if data.draw(st.booleans()):
            drain(core_control_plane, settings)
    drained = drain(core_control_plane, settings)
    assert all(d.events == d.inserted + d.duplicates + d.quarantined for d in drained)
    check_counted(core_control_plane, tenant_id, events)


DRAINER = """
    import sys
    from pathlib import Path
    from shared import metering
    from shared.control_plane import ControlPlane
    from tests.core_fixtures import settings_in
    metering._LOAD_SEGMENTS = 2  # else one transaction takes all of them
    settings = settings_in(Path(sys.argv[1]), sys.argv[2])
    with ControlPlane(settings) as control_plane:
        control_plane.ping()
        print("ready", flush=True)
        sys.stdin.readline()
        while True:
            for drained in metering.drain_all(control_plane, settings):
                print(drained.inserted, flush=True)
"""


def test_killed_drainers_count_every_event_once(
    core_control_plane: ControlPlane, settings: Settings, tenant_id: str, core_url: str
) -> None:
    """SIGKILL at any point of the drain; what is left is drained by the next."""
    events, chance, ends = [], random.Random(5), Counter[bool]()
    for _ in range(3):
        child = start_child(DRAINER, settings.data_dir, core_url, stdin=-1)
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        for _ in range(30):
            events += (new := [event(tenant_id) for _ in range(40)])
            segment(settings, new)
        child.stdin.write("go\n")
        child.stdin.flush()
        for _ in range(chance.randrange(3, 20)):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        ends[bool(spool.sealed(settings.spool_dir))] += 1
    drain(core_control_plane, settings)
    check_counted(core_control_plane, tenant_id, events)
    assert ends[True]
