"""Broken disks under a spool: a failed fdatasync, a read-only disk, files that vanish, what cannot be adopted."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from shared import metrics, spool
from shared.errors import SpoolUnavailable
from shared.settings import Settings
from shared.spool import Spool
from tests.core_fixtures import event, settings_in
from tests.disk_fixtures import file_system
from tests.test_spool import drain, segment, small_disk

assert small_disk  # a fixture


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path, "", usage_flush_seconds=3600)


class FailingSync:
    """`os.fdatasync` fails for the first `times` calls, and remembers the inodes it was called for."""

    def __init__(self, patch: pytest.MonkeyPatch, times: int) -> None:
        self.times, self.failed, self.good = times, set[int](), set[int]()
        self._real = os.fdatasync
        patch.setattr(os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        if self.times > 0:
            self.times -= 1
            if os.fstat(fd).st_ino not in self.failed:
                self.failed.add(os.fstat(os.dup(fd)).st_ino)  # a duplicate, so that no new file gets its inode
            raise OSError(5, "Input/output error")
        self._real(fd)
        self.good.add(os.fstat(fd).st_ino)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_file_whose_fdatasync_failed_is_never_trusted_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Linux drops what it could not write and the next fdatasync says OK: the events go to a new file first."""
    producer, written = Spool(settings), [event() for _ in range(4)]
    failures = metrics.usage_flush_failures_total._value.get()
    disk = FailingSync(monkeypatch, times)
    for one in written[:2]:
        producer.append(one)
    producer.tick()
    for one in written[2:]:
        producer.append(one)
    for _ in range(times):
        producer.tick()
    producer.close()
    assert metrics.usage_flush_failures_total._value.get() == failures + times
    sealed = spool.sealed(producer.dir)
    assert {p.stat().st_ino for p in sealed} <= disk.good - disk.failed
    assert drain(producer.dir) == written


def test_sync_says_when_it_cannot_promise_and_the_spool_is_unavailable_until_it_can(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer must not claim what the disk refused; a later tick that succeeds opens the gateway again."""
    producer, one, refusal = Spool(settings), event(), event()
    FailingSync(monkeypatch, 2)
    segment = producer.append(one)
    assert producer.sync([(segment, refusal)]) == [refusal]
    assert not producer.available
    producer.tick()
    assert producer.available
    assert producer.sync([(segment, refusal)]) == []
    assert drain(producer.dir) == [one, refusal], "the later one is the one that counts"


def test_only_who_is_in_a_segment_that_failed_is_refused_and_its_refusal_needs_no_room(small_disk: Path) -> None:
    """Others are durable and are told so. On a full disk the refusal comes with the segment's rewriting."""
    producer = Spool(settings_in(small_disk, "", usage_flush_events=1, usage_flush_seconds=3600))
    bad, good, refusal = event(), event(), event()
    first = producer.append(bad)
    assert producer._segment is not None
    producer._segment._suspect = True
    second = producer.append(good)
    with suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert producer.sync([(first, refusal), (second, event())]) == [refusal]
    (small_disk / "ballast").unlink()
    producer.close()
    assert drain(producer.dir) == [bad, refusal, good]


def test_a_disk_that_fails_every_fdatasync_closes_the_gateway_before_descriptors_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each segment that cannot be sealed keeps a file open; all of them are sealed when the disk works again."""
    producer, written = Spool(settings_in(tmp_path, "", usage_flush_events=1)), [event() for _ in range(100)]
    disk = FailingSync(monkeypatch, 1_000_000)
    for n, one in enumerate(written):
        if n >= 70:
            assert not producer.available
        producer.append(one)
        producer.tick()
    disk.times = 0
    producer.tick()
    assert producer.available
    producer.close()
    assert {e.request_id for e in drain(producer.dir)} == {e.request_id for e in written}


def test_sync_fsyncs_the_name_as_well_as_the_bytes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """POSIX promises no directory entry by fdatasync of the file."""
    synced: list[Path] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), real(fd)))
    producer = Spool(settings)
    synced.clear()
    producer.append(event())
    producer.sync()
    producer.append(event())
    producer.sync()
    assert synced == [settings.spool_dir], "once a segment"
    producer.close()


def test_a_segment_deleted_under_its_worker_is_written_anew(settings: Settings) -> None:
    """Somebody cleaned up: the kernel still has the bytes while the worker lives."""
    producer, written = Spool(settings), [event(), event()]
    for one in written:
        producer.append(one)
    [path] = settings.spool_dir.glob("*.open")
    path.unlink()
    producer.close()
    assert drain(producer.dir) == written


def test_on_a_read_only_disk_everything_waits_and_nothing_is_lost(tmp_path: Path) -> None:
    """What a kernel does to a file system with errors: live and dead workers' events are there when it is writable."""
    own_disk = tmp_path / "spool"  # without the tally, which a worker keeps open: a remount is refused then
    with file_system(own_disk, "size=1m"):
        settings = settings_in(tmp_path, "", usage_flush_events=3, usage_flush_seconds=3600)
        producer, dead, written = Spool(settings), Spool(settings), [event() for _ in range(9)]
        for one in written[:2]:
            dead.append(one)
        assert dead._segment is not None
        os.close(dead._segment._fd)
        for one in written[2:5]:
            producer.append(one)
        producer.tick()  # sealed: a remount is refused while a file is open for writing
        failures = metrics.usage_flush_failures_total._value.get()
        _remount(own_disk, "ro")
        for one in written[5:]:
            producer.append(one)
        producer.tick()
        assert not producer.available
        assert spool.adopt(settings.spool_dir) == []
        assert metrics.usage_flush_failures_total._value.get() > failures
        with pytest.raises(SpoolUnavailable):
            producer.close()
        _remount(own_disk, "rw")
        producer.tick()
        assert producer.available
        producer.close()
        assert {e.request_id for e in drain(settings.spool_dir)} == {e.request_id for e in written}
        assert drain(settings.spool_dir) == []


def _remount(directory: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(directory)], check=True, capture_output=True)


def test_what_cannot_be_adopted_is_counted_and_does_not_hold_up_the_rest(settings: Settings) -> None:
    """One bad entry in the directory must not stop the billing of all."""
    dead = segment(settings.spool_dir, [event()])
    dead.rename(dead.with_suffix(".open"))
    (settings.spool_dir / "0000000000000000-1-aa.open").mkdir()
    failures = metrics.usage_flush_failures_total._value.get()
    assert spool.adopt(settings.spool_dir) == [dead]
    assert metrics.usage_flush_failures_total._value.get() == failures + 1


def test_an_unfinished_copy_never_takes_the_place_of_its_segment(settings: Settings) -> None:
    """A worker that died while it wrote a segment anew left a shorter file of the same name."""
    written = [event(), event()]
    path = segment(settings.spool_dir, written)
    path.with_suffix(".tmp").write_bytes(path.read_bytes()[:-5])
    path.rename(path.with_suffix(".open"))
    assert spool.adopt(settings.spool_dir) == [path]
    assert spool.read(path).events == written
    assert list(settings.spool_dir.iterdir()) == [path]
