"""Counting on the hot path: what `adder` and `observer` write is what prometheus-client would have written."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import mmap_dict, multiprocess

from shared import metrics_files
from shared.metrics_files import Counts
from tests.disk_fixtures import file_system

# Counts the same things both ways, beside so many other series that the library has to map a larger file meanwhile,
# and dies without closing anything.
COUNT = """
import os, sys
from shared import metrics
route, twin = "/v1/search", "/v1/memories"
seconds = (0.0, 0.0005, 0.001, 0.0011, 0.25, 0.3, 10.0, 11.0)
count = metrics.adder(metrics.requests_total.labels(route, "GET", "200"))
observe = metrics.observer(metrics.request_duration_seconds.labels(route))
for n in range(1_000):
    count(1.0)
    observe(seconds[n % 8])
    metrics.requests_total.labels(twin, "GET", "200").inc()
    metrics.request_duration_seconds.labels(twin).observe(seconds[n % 8])
    metrics.requests_total.labels(f"/filler/{n}", "GET", "200").inc()
os._exit(9)
"""
# On a full disk, told when to go on by a line on stdin: first where there is no room, then where there is.
FULL = """
import sys
from shared import metrics, metrics_files
from shared.log import configure
configure()
metrics.initialise()
count = metrics.adder(metrics.requests_total.labels("/v1/search", "GET", "200"))
for n in range(1_000):
    count(1.0)
    metrics.requests_total.labels(f"/filler/{n}", "GET", "200").inc()
metrics_files.settle()
print(metrics.render().decode(), flush=True)
print("READY", flush=True)
sys.stdin.readline()
metrics_files.settle()
count(1.0)
metrics.usage_lost_total.inc(3)
print("READY", flush=True)
sys.stdin.readline()
"""
RENDER = "import sys; from shared import metrics; sys.stdout.buffer.write(metrics.render())"


def _run(code: str, directory: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
    if directory is not None:
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )


def _start(code: str, directory: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _until_ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    lines = []
    while (line := process.stdout.readline()).strip() != "READY":
        assert line or process.poll() is None, f"it died with {process.returncode}"
        lines.append(line)
    return "".join(lines)


def _samples(text: str, route: str) -> dict[str, str]:
    lines = [x for x in text.splitlines() if f'route="{route}"' in x and "_created{" not in x]
    return dict(line.replace(route, "").rsplit(" ", 1) for line in lines)


def test_fast_counts_of_dead_workers_add_up_like_the_librarys_own(tmp_path: Path) -> None:
    """Every bucket, the sum and the counter, over two processes that died in the middle of it."""
    assert [_run(COUNT, tmp_path).returncode for _ in range(2)] == [9, 9]
    text = _run(RENDER, tmp_path).stdout
    fast, twin = _samples(text, "/v1/search"), _samples(text, "/v1/memories")
    assert fast == twin
    assert fast['engram_requests_total{method="GET",route="",status="200"}'] == "2000.0"
    assert len([name for name in fast if "_bucket" in name]) == 14


def test_without_shared_files_the_fast_way_counts_in_memory() -> None:
    """A process that counts for itself alone (a test, a tool) has no file to write to."""
    code = COUNT.replace("os._exit(9)", "sys.stdout.write(metrics.render().decode())")
    text = _run(code, None).stdout
    assert _samples(text, "/v1/search") == _samples(text, "/v1/memories") != {}


@pytest.mark.parametrize("room_bytes", [0, 3 * 65_536 + 8_192])
def test_on_a_full_disk_a_process_counts_in_memory_until_there_is_room(tmp_path: Path, room_bytes: int) -> None:
    """Without room for any file, and with room for the first of them but not for more of one. It says so, its own
    exposition has its counts where there is no file, what the others have where there is one, and all have all of them
    once they could be written: none is missing then."""
    with file_system(tmp_path / "disk", "size=1m") as disk:
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as f:
            os.posix_fallocate(f.fileno(), 0, 1_048_576 - room_bytes)
        with _start(FULL, disk) as process:
            own = _samples(_until_ready(process), "/v1/search")
            others = _samples(_run(RENDER, disk).stdout, "/v1/search")
            name = 'engram_requests_total{method="GET",route="",status="200"}'
            assert float(others.get(name, 0)) < 1_000
            assert own[name] == (others[name] if room_bytes else "1000.0")
            filler.unlink()
            assert process.stdin is not None and process.stderr is not None
            process.stdin.write("\n")
            process.stdin.flush()
            _until_ready(process)
            process.kill()
            said = process.stderr.read()
        assert "metrics_in_memory" in said and "metrics_shared" in said, said
        text = _run(RENDER, disk).stdout
        assert _samples(text, "/v1/search")['engram_requests_total{method="GET",route="",status="200"}'] == "1001.0"
        assert _samples(text, "/filler/999") and "engram_usage_lost_total 3.0" in text
        assert not list(disk.glob("*.new"))


def test_a_dead_workers_successor_goes_on_with_its_files_on_a_full_disk(tmp_path: Path) -> None:
    """Their blocks are there; a living one's are not touched, and each death adds no files."""
    with file_system(tmp_path / "disk", "size=2m") as disk:
        assert _run(COUNT, disk).returncode == 9
        files = sorted(disk.glob("*.db"))
        with (disk / "filler").open("wb", buffering=0) as f, suppress(OSError):
            while f.write(b"x" * 4_096):
                pass
        assert [_run(COUNT, disk).returncode for _ in range(2)] == [9, 9]
        assert sorted(disk.glob("*.db")) == files
        samples = _samples(_run(RENDER, disk).stdout, "/v1/search")
        assert samples['engram_requests_total{method="GET",route="",status="200"}'] == "3000.0"


KEY = mmap_dict.mmap_key("engram_things", "engram_things_total", [], [], "Things.")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the counters of this process would be, were it a worker."""
    monkeypatch.setattr(metrics_files, "_in_memory", {})
    monkeypatch.setattr(multiprocess, "MmapedDict", Counts)
    return str(tmp_path / "counter_p0.db")


@contextmanager
def _no_more_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def _full_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", _raising(errno.ENOSPC))
        yield


def _raising(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _count(counts: Counts, value: float) -> None:
    counts.write_value(KEY, value, 0.0)  # type: ignore[no-untyped-call]


def _fill(counts: Counts) -> None:
    for n in range(1_000):
        counts.read_value(KEY.replace("{}", f'{{"filler": "{n}"}}'))  # type: ignore[no-untyped-call]


def _own(file: str) -> float:
    """What this process would expose."""
    shared: Any = metrics_files.Shared
    return float(sum(x.value for metric in shared(None, os.path.dirname(file)).collect() for x in metric.samples))


def _others(file: str) -> float:
    """What any other would, that has nothing in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_files, "_in_memory", {})
        return _own(file)


def test_who_could_not_open_a_dead_workers_file_replaces_none_of_its_counts(file: str) -> None:
    """It counts in memory from 0, and then beside them; nobody saw the sum fall."""
    dead = Counts(file)
    _count(dead, 1_000.0)
    dead.close()  # type: ignore[no-untyped-call]
    with _no_more_descriptors():
        successor = Counts(file)
        _count(successor, 1.0)
        assert not successor.settle()
    assert _own(file) == _others(file) == 1_000.0
    assert successor.settle()
    assert _own(file) == _others(file) == 1_001.0
    _count(successor, 2.0)
    _fill(successor)
    assert _own(file) == _others(file) == 1_002.0
    with _no_more_descriptors():
        again = Counts(file)
        _count(again, 4.0)
    assert again.settle()
    assert _own(file) == _others(file) == 1_006.0
    assert not [name for name in os.listdir(os.path.dirname(file)) if not name.endswith(".db")]


@pytest.mark.parametrize("dead_counted", [0.0, 1_000.0])
def test_who_could_not_map_its_file_counts_on_beyond_its_size(file: str, dead_counted: float) -> None:
    if dead_counted:
        _count(Counts(file), dead_counted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmap_dict, "mmap", SimpleNamespace(mmap=_raising(errno.ENOMEM), ACCESS_WRITE=mmap.ACCESS_WRITE))
        counts = Counts(file)
    _count(counts, 5.0)
    _fill(counts)
    assert counts.settle()
    assert _own(file) == _others(file) == dead_counted + 5.0


def test_without_locks_a_worker_takes_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def flock(fd: int, _how: int) -> None:
        asked.append(fd)
        assert len(asked) == 1, "it would look for ever"
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert metrics_files._take_place(str(tmp_path)) == str(os.getpid())


def test_all_workers_expose_the_same_of_a_file_that_cannot_grow(file: str) -> None:
    """Or a scrape of its worker and then of another would look like a reset."""
    counts = Counts(file)
    _count(counts, 1_000_000.0)
    with _full_disk():
        _fill(counts)
        _count(counts, 1_000_500.0)
        assert not counts.settle()
        assert _own(file) == _others(file) == 1_000_000.0
    assert counts.settle()
    assert _own(file) == _others(file) == 1_000_500.0


def test_settling_twice_is_settling_once(file: str) -> None:
    """The periodic work may still be at it when a shutdown does it too."""
    with _full_disk():
        counts = Counts(file)
        _count(counts, 7.0)
        assert _own(file) == 7.0
    assert counts.settle()
    _count(counts, 8.0)
    assert counts.settle()
    assert _own(file) == _others(file) == 8.0


def test_the_head_of_a_file_never_tells_of_records_that_are_not_there(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrape or a death may come between any two writes."""
    counts = Counts(file)
    _count(counts, 1.0)
    with _full_disk():
        _fill(counts)
    heads: list[bytes] = []

    class Mapped(mmap.mmap):
        def __setitem__(self, where: Any, value: Any) -> None:
            if (where.start or 0) < 4:
                heads.append(value[:4])
                written = Path(file).read_bytes()
                assert written[8 : counts._used] == counts._m[8 : counts._used]
            super().__setitem__(where, value)

    monkeypatch.setattr(metrics_files, "mmap", SimpleNamespace(mmap=Mapped))
    assert counts.settle()
    assert heads == [counts._m[:4]]
