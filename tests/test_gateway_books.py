"""What gateways counted against what their segments hold, by tenant and day, on a real PostgreSQL."""

from __future__ import annotations

import threading
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from shared import dry_run, metering, reconcile, spool, tally
from shared.control_plane import ControlPlane
from shared.errors import SpoolUnavailable
from shared.gateway_books import GatewayBooks
from shared.log import configure
from shared.settings import Settings
from shared.spool import Spool
from tests.core_fixtures import event, start_child
from tests.disk_fixtures import file_system, fill
from tests.metering_fixtures import drain, own_control_plane, own_settings, query, segment

pytest_plugins = ("tests.metering_fixtures",)
pytestmark = pytest.mark.usefixtures("today")
settings, control_plane = own_settings, own_control_plane
TODAY = datetime.now(UTC).date()
WORKER = """
    import sys
    from pathlib import Path
    from tests.core_fixtures import event, settings_in
    from shared.spool import Spool
    spool = Spool(settings_in(Path(sys.argv[1]), ""))
    for n in range(30):
        spool.append(event("t%d" % (n % 3)))
        if n == 9:
            spool.close()
    print("done", flush=True)
    sys.stdin.readline()
"""


def books(control_plane: ControlPlane, settings: Settings) -> reconcile.Books:
    return reconcile.reconcile(control_plane, settings, TODAY - timedelta(days=3), TODAY)


def gateway(control_plane: ControlPlane, settings: Settings) -> GatewayBooks:
    found = books(control_plane, settings).gateway
    assert found is not None
    return found


def lost_by_tenant(found: GatewayBooks) -> dict[tuple[str, date], int]:
    return {(d.tenant_id, d.day): d.counted - d.held for d in found.differences}


def test_a_segment_that_vanished_is_missed_by_tenant_and_day_also_after_its_worker_was_killed(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """The one count that is made apart from the spool outlives a SIGKILL and whatever starts after it."""
    assert books(control_plane, settings).gateway is None
    worker = start_child(WORKER, settings.data_dir, stdin=-1)
    assert worker.stdout is not None and worker.stdout.readline() == "done\n"
    first = gateway(control_plane, settings)
    assert first.agree and (first.counted, first.drained, first.spooled) == (30, 0, 30)
    worker.kill()
    worker.wait()
    [one, *_] = metering.pending(settings)
    list(metering.drain(control_plane, settings, [one]))
    second = gateway(control_plane, settings)
    assert second.agree and (second.drained, second.spooled) == (10, 20)
    other = settings.model_copy(update={"data_dir": settings.data_dir / "other", "machine_id": "another-machine"})
    of_same_pid = segment(other, [event("t0") for _ in range(5)])
    of_same_pid.rename(of_same_pid.with_name(f"{time.time_ns() // 1000:016d}-{worker.pid}-00000000.seg"))
    assert [d.inserted for d in drain(control_plane, other)] == [5]
    assert gateway(control_plane, settings) == second, "a pid says nothing about another machine"
    for path in spool.sealed(settings.spool_dir):
        path.unlink()
    Spool(settings).close()  # a gateway that starts after that
    found = books(control_plane, settings)
    assert found.where() == [f"{TODAY}: the gateway counted 30 events of t0, t1, t2, its segments hold 10"]
    assert found.gateway is not None
    assert lost_by_tenant(found.gateway) == {("t0", TODAY): 6, ("t1", TODAY): 7, ("t2", TODAY): 7}


def test_what_a_full_spool_dropped_is_no_difference_and_hides_none(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """Dropped events are said apart: they neither look like missing ones nor make up for those."""
    full = {"usage_spool_limit_bytes": 4096, "usage_spool_reserve_bytes": 4096, "usage_at_limit": "drop"}
    producer = Spool(settings.model_copy(update=full))
    for _ in range(120):
        producer.append(event("t0"))
    producer.measure()
    assert [producer.append(event("t1")) for _ in range(7)] == [""] * 7
    producer.close()
    found = gateway(control_plane, settings)
    assert found.agree and (found.counted, found.spooled, found.lost) == (120, 120, 7)
    [path] = spool.sealed(settings.spool_dir)
    path.write_bytes(spool.MAGIC + b"".join(map(spool.frame, spool.read(path).events[7:])))
    assert lost_by_tenant(gateway(control_plane, settings)) == {("t0", TODAY): 7}


@pytest.mark.parametrize("tally_fits", [True, False])
def test_what_a_stop_gave_up_is_said_to_be_lost_and_whose_it_was(
    control_plane: ControlPlane, settings: Settings, tally_fits: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """The disk refuses until the worker's end. Where it has no room for a tally either, the log says that it has the
    only count."""
    configure()
    with file_system(settings.spool_dir, "size=256k"):
        if not tally_fits:
            tally.directory(settings).symlink_to(settings.spool_dir)
            fill(settings.spool_dir / "ballast")
        producer = Spool(settings)
        if tally_fits:
            producer.append(event("t0"))
            fill(settings.spool_dir / "ballast")
        appended = 0
        while len(producer._backlog) < 5:
            producer.append(event(f"t{appended % 2}"))
            appended += 1
        with pytest.raises(SpoolUnavailable):
            producer.close()
        assert producer.give_up() == 5
        untallied = "usage_events_lost_untallied" in capfd.readouterr().err
        assert untallied is not tally_fits
        (settings.spool_dir / "ballast").unlink()
        if tally_fits:
            found = gateway(control_plane, settings)
            assert found.lost == sum(lost_by_tenant(found).values()) == 5
            assert lost_by_tenant(found).keys() == {("t0", TODAY), ("t1", TODAY)}


def test_late_replayed_and_refused_events_are_where_the_gateway_counted_them(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """Whatever a drain made of an event, it was in a segment; and each day has its own count."""
    now = datetime.now(UTC)
    producer = Spool(settings)
    for at in (now, now, now - timedelta(days=2), now + timedelta(minutes=10)):
        producer.append(event("t0", at=at))
    producer.close()
    [path] = spool.sealed(settings.spool_dir)
    raw = path.read_bytes()
    assert gateway(control_plane, settings).agree
    [drained] = drain(control_plane, settings)
    assert (drained.inserted, drained.quarantined) == (3, 1)
    for copy in (path, path.with_name(f"{time.time_ns() // 1000:016d}-1-00000000.seg")):
        copy.write_bytes(raw)
        assert gateway(control_plane, settings).agree
        drain(control_plane, settings)
        assert gateway(control_plane, settings).agree
    extra = path.with_name(f"{time.time_ns() // 1000:016d}-{path.stem.split('-')[1]}-00000000.seg")
    extra.write_bytes(spool.MAGIC + spool.frame(event("t0")))
    assert lost_by_tenant(gateway(control_plane, settings)) == {("t0", TODAY): -1}, "nobody counted this one"


def test_events_of_dry_runs_are_neither_missing_nor_billed_until_somebody_decides_and_after(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """Staging is reconciled every day, and what a person discarded has a record of who and why."""
    dry = settings.model_copy(update={"usage_dry_run": True})
    for _ in range(2):
        producer = Spool(settings)
        for _ in range(5):
            producer.append(event("t0"))
        producer.close()
        drain(control_plane, dry)
        found = books(control_plane, dry)
        assert found.agree and found.gateway is not None
        assert found.examined == {("t0", TODAY): found.gateway.examined} and found.waiting == {}
        assert found.gateway.drained == found.gateway.spooled == 0
    assert found.gateway.examined == 10
    done = dry_run.discard(control_plane, settings, reason="ticket 9", requested_by="me")
    assert (done.segments, done.events) == (2, 10) and dry_run.segments(settings) == []
    after = books(control_plane, settings)
    assert after.agree and after.examined == {} and after.gateway is not None and after.gateway.drained == 10
    assert query(control_plane, "SELECT count(*)::int AS n FROM usage_events") == [(0,)]
    records = query(control_plane, "SELECT kind, reason, requested_by, details->'events' FROM usage_corrections")
    assert records == [("discard", "ticket 9", "me", 10)]


def test_a_tally_that_died_with_its_machine_is_at_least_and_still_tells_what_is_missing(
    control_plane: ControlPlane, settings: Settings
) -> None:
    """After a power loss a page may be behind the segments, which is no difference; the other way round is."""
    producer = Spool(settings)
    producer.append(event("t0"))
    producer.tick()
    [page] = tally.directory(settings).iterdir()
    behind = page.read_bytes().replace(Path("/proc/sys/kernel/random/boot_id").read_bytes().strip(), b"-" * 36)
    producer.append(event("t0"))
    producer.append(event("t0"))
    producer.close()
    page.unlink()
    page.write_bytes(behind)
    found = gateway(control_plane, settings)
    assert found.agree and found.at_least == [TODAY] and (found.counted, found.spooled) == (1, 3)
    [path] = spool.sealed(settings.spool_dir)
    path.unlink()
    assert lost_by_tenant(gateway(control_plane, settings)) == {("t0", TODAY): 1}


def test_old_pages_go_and_many_tenants_find_room(settings: Settings) -> None:
    """What a worker counts for months, and for every tenant of a machine, takes a bounded place."""
    old = tally.directory(settings) / f"{TODAY - timedelta(days=30)}.{1:016d}-1"
    old.parent.mkdir()
    old.write_bytes(b"")
    counting = tally.Tally(settings, threading.Lock())
    assert not old.exists()
    for n in range(3_000):
        for _ in range(1 + n % 3):
            counting.count(event(f"t{n}"))
    counting.lose(event("t7"))
    yesterday = event("t1", at=datetime.now(UTC) - timedelta(days=1))
    counting.count(yesterday)
    counting.tick()
    counting.count(event("t1"))
    earlier, page = sorted(tally.read(settings), key=lambda page: page.day)[:2]
    assert (earlier.day, earlier.counted) == (TODAY - timedelta(days=1), {"t1": 1})
    assert page.counted == {f"t{n}": 1 + n % 3 + (n == 1) for n in range(3_000)} and not page.ended
    assert {tenant: n for tenant, n in page.lost.items() if n} == {"t7": 1}
    counting.close()
    assert all(page.ended for page in tally.read(settings))


def test_a_disk_without_room_keeps_a_page_in_memory_until_there_is(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count is never what fails a request."""
    counting = tally.Tally(settings, threading.Lock())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tally.os, "posix_fallocate", full)
        for n in range(2_000):
            counting.count(event(f"t{n}"))
        counting.tick()
    counting.tick()
    [page] = [page for page in tally.read(settings) if page.day == TODAY]
    assert len(page.counted) == sum(page.counted.values()) == 2_000
