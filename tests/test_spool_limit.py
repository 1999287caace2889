"""How full the spool is: what is measured, said, refused and dropped."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared import metrics, spool
from shared.settings import Settings
from shared.spool import Spool
from shared.workers import Announcement, Spooled
from tests.core_fixtures import event, settings_in
from tests.test_spool import drain, segment

BLOCK = 4096


def producer_in(directory: Path, **more: object) -> Spool:
    """A segment every 40 events, each less than a block."""
    return Spool(settings_in(directory, "", usage_flush_seconds=3600, usage_flush_events=40, **more))


def fill(producer: Spool, blocks: int) -> None:
    """Bring the directory to this many sealed segments, a block each."""
    while len(spool.sealed(producer.dir)) < blocks:
        producer.append(event())
        producer.tick()
    producer.measure()


def value(metric: object) -> float:
    found: float = metric._value.get()  # type: ignore[attr-defined]
    return found


def test_at_the_limit_writes_are_refused_and_beyond_the_reserve_everything_until_it_is_drained(tmp_path: Path) -> None:
    """Reads go on for as long as the reserve has room for their events; nothing is lost at any level."""
    producer = producer_in(tmp_path, usage_spool_limit_bytes=6 * BLOCK, usage_spool_reserve_bytes=3 * BLOCK)
    lost = value(metrics.usage_lost_total)
    seen = []
    for blocks in range(1, 10):
        fill(producer, blocks)
        seen.append((producer.takes_writes, producer.available))
    assert seen == [(True, True)] * 5 + [(False, True)] * 3 + [(False, False)]
    assert producer.append(event()), "a request that was let in before still is an event"
    producer.close()
    assert len(drain(producer.dir)) == 9 * 40 + 1
    producer.measure()
    assert (producer.takes_writes, producer.available) == (True, True)
    assert value(metrics.usage_lost_total) == lost


def test_with_drop_nothing_is_refused_and_each_dropped_event_is_counted_and_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An operator who chose to serve on can bill what was lost by hand only if its number is right."""
    limits = {"usage_spool_limit_bytes": 2 * BLOCK, "usage_spool_reserve_bytes": BLOCK}
    producer = producer_in(tmp_path, usage_at_limit="drop", **limits)
    lost, counted = value(metrics.usage_lost_total), value(metrics.usage_events_total)
    fill(producer, 3)
    assert (producer.takes_writes, producer.available) == (True, True)
    assert [producer.append(event()) for _ in range(7)] == [""] * 7
    producer.tick()
    assert value(metrics.usage_lost_total) == lost + 7
    assert value(metrics.usage_events_total) == counted + 120, "what was dropped is not counted as spooled"
    out = "".join(capfd.readouterr())
    assert re.search(r'usage_events_lost.*\bevents"?[=:] ?7\b|\bevents"?: 7\b.*usage_events_lost', out)
    assert len(drain(producer.dir)) == 120
    producer.measure()
    assert producer.append(event())
    producer.close()
    assert len(drain(producer.dir)) == 1


def test_promising_to_lose_nothing_and_to_drop_is_refused() -> None:
    """The two settings contradict each other; better no gateway than one that breaks one of them."""
    with pytest.raises(ValidationError, match="choose one"):
        Settings(usage_durability="sync", usage_at_limit="drop")


def test_half_is_said_once_and_again_only_after_it_was_well_below(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A drain that takes segment after segment at the line must not fill the log."""
    producer = producer_in(tmp_path, usage_spool_limit_bytes=8 * BLOCK, usage_spool_reserve_bytes=0)

    def said() -> int:
        return "".join(capfd.readouterr()).count("half")

    fill(producer, 3)
    assert said() == 0
    for _ in range(3):
        fill(producer, 4)
        drain_one(producer)
    assert said() == 1
    drain_one(producer)
    drain_one(producer)
    fill(producer, 4)
    assert said() == 1
    producer.close()


def drain_one(producer: Spool) -> None:
    spool.sealed(producer.dir)[0].unlink()
    producer.measure()


def test_the_size_is_of_everything_below_the_directory_whoever_wrote_it(tmp_path: Path) -> None:
    """All workers, dead ones, the quarantine and dry runs share one disk, so they share the limit."""
    producer, other = producer_in(tmp_path), producer_in(tmp_path)
    for one in (producer, other):
        one.append(event())
    path = segment(producer.dir, [event()] * 100)
    path.write_bytes(path.read_bytes()[:-1])
    spool.quarantine(path, spool.read(path))
    (producer.dir / "dry-run").mkdir()
    segment(producer.dir / "dry-run", [event()])
    producer.measure()
    sizes = [p.stat().st_size for p in producer.dir.rglob("*") if p.is_file()]
    assert len(sizes) == 5
    assert value(metrics.usage_spool_bytes) == sum(-(-size // BLOCK) * BLOCK for size in sizes) >= 6 * BLOCK
    assert value(metrics.usage_spool_limit_bytes) == 1_073_741_824
    assert value(metrics.usage_quarantined_segments) == 1
    producer.close()
    other.close()


def test_the_oldest_age_is_that_of_whatever_is_not_drained_whoever_has_it(tmp_path: Path) -> None:
    """The alert on stuck usage: another worker's, a dead worker's, a sealed one nobody drains, one set aside to be
    tried again. Not: empty segments, and what waits for a person."""
    directory = settings_in(tmp_path, "").spool_dir

    def age() -> float:
        return spool.survey(directory).oldest_age_seconds

    def name(hours: int) -> str:
        return f"{int((time.time() - 3600 * hours) * 1e6):016d}-1-aa"

    assert age() == 0
    worker = producer_in(tmp_path)
    assert age() == 0
    worker.append(event())
    assert 0 < age() < 3600
    (directory / f"{name(9)}.open").write_bytes(spool.MAGIC)
    (directory / "dry-run").mkdir()
    segment(directory / "dry-run", [event()], name(8))
    assert 0 < age() < 3600
    for hours, where in ((2, directory), (3, directory / "stuck")):
        segment(where, [event()], name(hours))
        assert 3600 * hours <= age() < 3600 * hours + 600
    segment(directory, [event()], name(4)).rename(directory / f"{name(4)}.open")
    assert 3600 * 4 <= age() < 3600 * 4 + 600
    (directory / "stuck" / f"{name(3)}.seg").unlink(missing_ok=True)
    for path in (directory / "stuck").iterdir():
        path.unlink()
    worker.close()
    drain(directory)
    assert age() == 0


def test_events_that_wait_in_memory_have_an_age_too(tmp_path: Path) -> None:
    """With the directory gone there is nothing on the disk that could look old."""
    producer = producer_in(tmp_path)
    producer.dir.rmdir()
    producer.append(event())
    time.sleep(0.01)
    producer.measure()
    assert value(metrics.usage_oldest_unflushed_seconds) >= 0.01
    producer.dir.mkdir()
    producer.close()
    drain(producer.dir)
    producer.measure()
    assert value(metrics.usage_oldest_unflushed_seconds) == 0


def test_the_age_is_that_of_all_workers_whoever_looks_last(tmp_path: Path) -> None:
    """A sibling whose disk works must not set back what the alert waits for."""
    producer = producer_in(tmp_path)
    sibling = Announcement(producer._settings)
    sibling.has(Spooled(time.time_ns() // 1000, int((time.time() - 100) * 1e6)))
    producer.measure()
    assert 100 <= value(metrics.usage_oldest_unflushed_seconds) < 110
    sibling.has(Spooled(time.time_ns() // 1000, 0))
    producer.measure()
    assert value(metrics.usage_oldest_unflushed_seconds) == 0
    sibling.close()
    producer.close()


def test_a_sealed_segment_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After hours without PostgreSQL there are thousands, and every worker looks each second."""
    producer = producer_in(tmp_path)
    fill(producer, 3)
    stats: list[str] = []
    monkeypatch.setattr("shared.spool_dir._used", lambda entry: stats.append(entry.name) or 0)
    producer.measure()
    assert stats == []
    assert value(metrics.usage_spool_bytes) == 3 * BLOCK
    producer.close()
