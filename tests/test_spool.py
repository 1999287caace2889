"""The usage spool: nothing acknowledged is lost, nothing wrong is read."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shared import metrics, spool
from shared.errors import SpoolUnavailable
from shared.settings import Settings
from shared.spool import Spool
from shared.usage import UsageEvent
from tests.core_fixtures import event, settings_in, start_child, wait_until
from tests.disk_fixtures import file_system


def segment(directory: Path, written: list[UsageEvent], name: str = "0000000000000001-1-aa") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.seg"
    path.write_bytes(spool.MAGIC + b"".join(map(spool.frame, written)))
    return path


def drain(directory: Path) -> list[UsageEvent]:
    """What a drainer would count: adopt, read, remove."""
    spool.adopt(directory)
    read = []
    for path in spool.sealed(directory):
        read += spool.read(path).events
        path.unlink()
    return read


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path, "", usage_flush_seconds=3600)


def test_damage_is_kept_beside_the_spool(settings: Settings) -> None:
    """Never away: somebody may have to bill by hand."""
    path = segment(settings.spool_dir, [event(), event()])
    raw = path.read_bytes()
    path.write_bytes(raw[:-3])
    kept = spool.quarantine(path, spool.read(path))
    assert kept is not None
    assert raw[len(raw) // 2 + 10 : -3][:20] in kept.read_bytes()
    assert kept.parent == settings.spool_dir / "quarantine"
    clean = segment(settings.spool_dir, [event()], "0000000000000002-1-bb")
    assert spool.quarantine(clean, spool.read(clean)) is None


def test_events_are_on_disk_when_append_returns(settings: Settings) -> None:
    """Before the answer leaves: a reader of the file sees them, sealed or not."""
    producer, written = Spool(settings), [event(), event()]
    for one in written:
        producer.append(one)
    [path] = settings.spool_dir.glob("*.open")
    assert spool.read(path).events == written
    producer.close()


def test_a_segment_is_sealed_when_it_is_full_and_when_it_is_due(tmp_path: Path) -> None:
    """Full by count at the append, due by age at the tick; nothing is sealed empty."""
    producer = Spool(settings_in(tmp_path, "", usage_flush_seconds=3600, usage_flush_events=3))
    written = [event() for _ in range(7)]
    for one in written:
        producer.append(one)
    producer.tick()
    assert [len(spool.read(p).events) for p in spool.sealed(producer.dir)] == [3, 3]
    producer.close()
    quick = Spool(settings_in(tmp_path, "", usage_flush_seconds=1e-6))
    quick.tick()
    quick.append(event())
    quick.tick()
    quick.tick()
    assert len(spool.sealed(producer.dir)) == 4
    assert len(drain(producer.dir)) == 8


def test_closing_seals_everything_and_leaves_no_open_file(settings: Settings) -> None:
    """A worker that stops in order hands all it has to the drain."""
    producer, written = Spool(settings), [event() for _ in range(5)]
    for one in written:
        producer.append(one)
    producer.close()
    assert not list(settings.spool_dir.glob("*.open"))
    assert drain(settings.spool_dir) == written
    producer.close()


@pytest.mark.parametrize("adopter", ["removes it", "holds it"])
def test_an_adopter_between_creation_and_lock_costs_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, adopter: str
) -> None:
    """On a busy machine it takes the new file for a dead owner's; everything was refused until the next tick."""
    producer, held = Spool(settings), list[int]()

    def flock(fd: int, operation: int) -> None:
        monkeypatch.undo()
        [new] = settings.spool_dir.glob("*.tmp")
        if adopter == "removes it":
            spool.adopt(settings.spool_dir)
            assert not new.exists()
        else:
            held.append(os.open(new, os.O_RDONLY))
            fcntl.flock(held[0], fcntl.LOCK_EX)
        fcntl.flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    written = event()
    assert producer.append(written) and producer.available
    for fd in held:
        os.close(fd)
    producer.close()
    assert [e.request_id for e in drain(settings.spool_dir)] == [written.request_id]


def test_a_live_owners_segment_is_never_adopted(settings: Settings) -> None:
    """Sealing a file that is still appended to would lose what comes after."""
    producer = Spool(settings)
    producer.append(event())
    assert spool.adopt(settings.spool_dir) == []
    producer.append(event())
    producer.close()
    assert len(drain(settings.spool_dir)) == 2


def test_a_segment_without_events_is_removed_by_adoption(settings: Settings) -> None:
    """A worker killed at its start leaves a header; it must not count as a segment for ever."""
    settings.spool_dir.mkdir(parents=True)
    for name in ("1-1-a.open", "1-1-b.tmp"):
        (settings.spool_dir / name).write_bytes(spool.MAGIC)
    assert spool.adopt(settings.spool_dir) == []
    assert list(settings.spool_dir.iterdir()) == []


PRODUCER = """
    import sys
    from pathlib import Path
    from shared.spool import Spool
    from tests.core_fixtures import event, settings_in
    producer = Spool(settings_in(Path(sys.argv[1]), "", usage_flush_events=20, usage_flush_seconds=0.01))
    n = 0
    while True:
        producer.append(event(memories_created=n))
        n += 1
        print(n, flush=True)
        if n % 7 == 0:
            producer.tick()
"""


def test_killed_producers_lose_nothing_they_acknowledged(settings: Settings) -> None:
    """SIGKILL at any moment: what append returned for is billed once, by whoever adopts it."""
    chance = random.Random(7)
    for _ in range(3):
        child = start_child(PRODUCER, settings.data_dir)
        assert child.stdout is not None
        for _ in range(chance.randrange(1, 120)):
            line = child.stdout.readline()
        time.sleep(chance.random() / 100)
        child.send_signal(signal.SIGKILL)
        acknowledged = int([line, *child.stdout.readlines()][-1])
        child.wait()
        numbers = sorted(e.memories_created for e in drain(settings.spool_dir))
        assert numbers == list(range(len(numbers)))
        assert acknowledged <= len(numbers) <= acknowledged + 1
        assert list(settings.spool_dir.glob("*.open")) == list(settings.spool_dir.glob("*.tmp")) == []


def test_adopting_beside_living_producers_loses_nothing(settings: Settings) -> None:
    """The drain runs all the time next to the gateway's workers."""
    children = [start_child(PRODUCER, settings.data_dir) for _ in range(2)]
    seen: list[UsageEvent] = []
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline()
    wait_until(lambda: bool(seen.extend(drain(settings.spool_dir)) or len(seen) > 400), 30)
    acknowledged = 0
    for child in children:
        child.send_signal(signal.SIGKILL)
        assert child.stdout is not None
        acknowledged += int(child.stdout.readlines()[-1])
        child.wait()
    seen += drain(settings.spool_dir)
    assert len({e.request_id for e in seen}) == len(seen)
    assert acknowledged <= len(seen) <= acknowledged + 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    with file_system(tmp_path / "small", "size=256k") as disk:
        yield disk


def test_a_full_disk_is_said_and_every_event_is_counted_once_when_there_is_room(small_disk: Path) -> None:
    """Refuse billable requests rather than serve them unbilled; never lose or repeat one."""
    producer = Spool(settings_in(small_disk, "", usage_flush_events=80))  # more than a page: a write may be short
    written: list[UsageEvent] = []
    ballast = small_disk / "ballast"
    failures = metrics.usage_flush_failures_total._value.get()
    for _ in range(120):
        written.append(event())
        producer.append(written[-1])
    assert producer.available
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    while producer.available:
        written.append(event())
        producer.append(written[-1])
        assert len(written) < 5000
    for _ in range(30):
        written.append(event())
        producer.append(written[-1])
        producer.tick()
    assert not producer.available
    assert metrics.usage_flush_failures_total._value.get() > failures
    with pytest.raises(SpoolUnavailable):
        producer.close()
    ballast.unlink()
    producer.tick()
    assert producer.available
    producer.append(written[-1])
    producer.close()
    assert [e.request_id for e in drain(producer.dir)] == [e.request_id for e in [*written, written[-1]]]


def test_beyond_the_backlog_an_event_is_dropped_counted_and_said(tmp_path: Path) -> None:
    """Memory is bounded; a loss is never silent."""
    producer = Spool(settings_in(tmp_path, "", usage_backlog_events=2))
    lost = metrics.usage_lost_total._value.get()
    os.rmdir(producer.dir)
    for _ in range(5):
        producer.append(event())
    assert metrics.usage_lost_total._value.get() == lost + 3
    producer.dir.mkdir()
    producer.tick()
    assert producer.available
    producer.close()
    assert len(drain(producer.dir)) == 2


def test_the_oldest_age_counts_open_and_sealed_segments_and_is_zero_when_drained(settings: Settings) -> None:
    """The alert on stuck usage reads this."""
    assert spool.survey(settings.spool_dir).oldest_age_seconds == 0
    hour_ago = int((time.time() - 3600) * 1e6)
    segment(settings.spool_dir, [event()], f"{hour_ago:016d}-1-aa")
    producer = Spool(settings)
    producer.append(event())
    assert 3600 <= spool.survey(settings.spool_dir).oldest_age_seconds < 3700
    producer.close()
    drain(settings.spool_dir)
    assert spool.survey(settings.spool_dir).oldest_age_seconds == 0
