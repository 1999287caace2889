"""Until when usage is complete: never later than what is still on its way."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shared import spool, workers
from shared.control_plane import ControlPlane
from shared.settings import Settings
from shared.spool import Spool
from shared.watermark import Watermark, of_spool
from shared.workers import Announcement, Spooled
from tests.core_fixtures import event, settings_in
from tests.metering_fixtures import query

pytest_plugins = ("tests.metering_fixtures",)
_ROUNDING = 1e-5  # a float's and a file name's


@pytest.fixture
def settings(tmp_path: Path, core_url: str) -> Settings:
    made = settings_in(tmp_path, core_url, machine_id=f"machine-{secrets.token_hex(4)}", usage_flush_seconds=3600)
    made.spool_dir.mkdir(parents=True)
    return made


@pytest.fixture
def worker(settings: Settings) -> Iterator[Announcement]:
    made = Announcement(settings)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def equal_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.watermark.CLOCKS_SECONDS", 0.0)


def is_now(settings: Settings, less_seconds: float = 0) -> bool:
    """Whether it is the instant it is asked at, less that."""
    before = time.time()
    at = of_spool(settings).timestamp() + less_seconds
    return before - _ROUNDING <= at <= time.time() + _ROUNDING


def is_at(settings: Settings, instant: float) -> bool:
    return abs(of_spool(settings).timestamp() - instant) <= _ROUNDING


def test_it_is_now_or_the_oldest_segment_wherever_it_waits(settings: Settings) -> None:
    """Set aside to be tried again, or by a dry run: not billed yet."""
    assert is_now(settings)
    for directory, age in (("", 100), ("stuck", 200), ("dry-run", 300)):
        (settings.spool_dir / directory).mkdir(exist_ok=True)
        began = time.time() - age
        old = settings.spool_dir / directory / f"{int(began * 1e6):016d}-1-a.seg"
        old.write_bytes(spool.MAGIC)
        assert is_at(settings, began)


def test_a_request_that_is_served_holds_it_from_its_first_byte_to_postgresql(
    settings: Settings, worker: Announcement
) -> None:
    """However long it takes: between its first byte and its event's segment being drained it is never passed."""
    producer = Spool(settings)
    ticket = producer.unfinished.begin()
    one = event()
    began = datetime.fromtimestamp(one.ts_us / 1e6, UTC)
    time.sleep(0.02)
    other = producer.unfinished.begin()  # a quicker one opens the segment that the slow one ends in
    segment = producer.append(event())
    producer.unfinished.end(other)
    worker.has(producer.spooled)
    assert of_spool(settings) <= began
    producer.append(one)
    producer.unfinished.end(ticket)
    worker.has(producer.spooled)
    assert of_spool(settings) <= began, "in a segment that was opened after it began"
    producer.close()
    assert [path.stem for path in spool.sealed(settings.spool_dir)] == [segment]
    assert of_spool(settings) <= began
    spool.sealed(settings.spool_dir)[0].unlink()
    assert of_spool(settings) > began


def test_events_in_a_worker_s_memory_hold_it_until_their_segment_is_drained(
    settings: Settings, worker: Announcement
) -> None:
    """A full disk keeps them there for minutes; the segment they get then is younger than they are."""
    producer = Spool(settings)
    settings.spool_dir.rmdir()
    began = datetime.now(UTC) - timedelta(seconds=90)
    producer.append(event())
    producer.append(event(at=began))
    worker.has(producer.spooled)
    settings.spool_dir.mkdir()
    assert of_spool(settings) <= began
    producer.tick()
    worker.has(producer.spooled)
    assert of_spool(settings) <= began
    producer.close()
    for path in spool.sealed(settings.spool_dir):
        path.unlink()
    assert of_spool(settings) > began


def test_a_worker_that_says_nothing_new_holds_it_until_it_is_dead(settings: Settings, worker: Announcement) -> None:
    """A frozen one may go on and serve what it had begun; a dead one cannot."""
    began = time.time() - 50
    worker.has(Spooled(int(began * 1e6), 0))
    assert is_at(settings, began)
    os.close(worker._fd)  # what the kernel does
    worker._fd = -1
    assert is_now(settings)


def test_a_worker_that_could_not_announce_itself_does_so_when_the_disk_takes_it(settings: Settings) -> None:
    """A full disk is when events wait in memory; a worker nobody knows of would be passed over."""
    settings.run_dir.mkdir(parents=True)
    in_the_way = settings.run_dir / "workers"
    in_the_way.write_text("not a directory")
    worker = Announcement(settings)
    began = time.time() - 100
    since_us = int(began * 1e6)
    worker.obeys("7")
    worker.has(Spooled(since_us, since_us))
    in_the_way.unlink()
    worker.has(Spooled(since_us, since_us))
    assert is_at(settings, began) and workers.announced(settings) == {os.getpid(): "7"}
    worker.close()


def test_a_worker_of_the_build_before_holds_it_for_as_long_as_its_requests_may_take(
    settings: Settings, worker: Announcement
) -> None:
    """While workers are replaced, those of both builds serve."""
    os.truncate(settings.run_dir / "workers" / str(os.getpid()), 32)
    assert is_now(settings, less_seconds=60)


def test_it_is_published_when_something_was_drained_and_once_more_not_at_idle(
    core_control_plane: ControlPlane, settings: Settings, worker: Announcement
) -> None:
    """A database that sleeps goes on sleeping."""

    def published() -> list[tuple[object, ...]]:
        sql = "SELECT complete_until, updated_at FROM usage_watermarks WHERE machine_id = %s"
        return query(core_control_plane, sql, settings.machine_id)

    watermark = Watermark()
    watermark.after_pass(core_control_plane, settings, drained=False)
    assert published() == []
    watermark.after_pass(core_control_plane, settings, drained=True)
    [first] = published()
    watermark.after_pass(core_control_plane, settings, drained=False)
    assert published() == [first], "its last requests could still be under way"
    worker.has(Spooled(time.time_ns() // 1000, 0))
    watermark.after_pass(core_control_plane, settings, drained=False)
    [second] = published()
    assert second > first
    worker.has(Spooled(time.time_ns() // 1000, 0))
    watermark.after_pass(core_control_plane, settings, drained=False)
    assert published() == [second]
