"""Which gateway workers run on this machine, and which run-time limits each of them obeys.

    {data_dir}/run/workers/PID         locked (flock) by that worker while it lives; holds the version it obeys, and
                                       which of its events are not in the spool yet (`Spooled`)
    {data_dir}/run/workers/PID.json    what it says of itself (`Report`): its keys, what it did, its busiest tenants
    {data_dir}/run/workers/replacing   the wish for new workers that the supervisor gave up last, and why

The lock is the truth about who lives: the kernel drops it with its holder, whatever killed it. A reader removes the
files of the dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from shared.log import get_logger
from shared.settings import Settings

_BYTES = 32  # of the version; behind it, aligned, so that it is written and read at once:
_SPOOLED = struct.Struct("=qq")
_OLDER_SECONDS = 60.0
_REPLACING = "replacing"
POLL_SECONDS = 0.05
log = get_logger("workers")


class Keys(msgspec.Struct, frozen=True):
    """The issuer's keys as a worker holds them. Seconds since 1970: `asked_at` of when the fetch that gave them was
    sent, None before the first; `failed` is why the newest fetch gave none, empty when it did."""

    kids: list[str]
    asked_at: float | None = None
    failed: str = ""


class Busy(msgspec.Struct, frozen=True):
    """A tenant's requests within the last `Report.window_seconds`. `slow_ms` is the upper edge of the 95th percentile's
    bucket, None above the last one."""

    tenant_id: str
    requests: int
    errors: int
    refused: int
    slow_ms: float | None
    busy_seconds: float


class Report(msgspec.Struct, frozen=True):
    """`done` are ids of entries of `shared.limits` that are carried out once, and were: newest last. `unseen` counts
    requests of tenants beyond those that one look counts apart."""

    started_at: float
    keys: Keys
    done: list[str] = []
    window_seconds: float = 0.0
    requests: int = 0
    unseen: int = 0
    tenants: list[Busy] = []


class Spooled(NamedTuple):
    """Microseconds since 1970. `since_us`: of every request that began before, the event is in a segment of the spool.
    `waiting_us`: when the oldest began whose event waits in memory for a disk that refuses it; 0 without one."""

    since_us: int
    waiting_us: int


class Announcement:
    """A worker's own file. A disk that takes none costs the view of this worker, not the worker, and is asked again by
    each `has`: until then usage may be called complete that this worker still has in hand."""

    def __init__(self, settings: Settings) -> None:
        self._fd = -1
        self._failing = False
        self._said: Report | None = None
        self._version = b" " * _BYTES
        self._path = _directory(settings) / str(os.getpid())
        self._announce(Spooled(time.time_ns() // 1000, 0))

    def _announce(self, spooled: Spooled) -> None:
        new = self._path.with_name(f".{self._path.name}")
        fd = -1
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.pwrite(fd, self._version + _SPOOLED.pack(*spooled), 0)  # now its block is there
            os.rename(new, self._path)  # nobody sees it unlocked
        except OSError as e:
            if fd >= 0:
                os.close(fd)
            if not self._failing:
                log.error("worker_not_announced", cause=e.strerror)
            self._failing = True
        else:
            self._fd, self._failing = fd, False

    def obeys(self, version: str) -> None:
        """Say which version of the limits this worker obeys."""
        self._version = version.encode("ascii")[:_BYTES].ljust(_BYTES)
        if self._fd >= 0:
            os.pwrite(self._fd, self._version, 0)

    def has(self, spooled: Spooled) -> None:
        """Say which of this worker's events are not in the spool yet."""
        if self._fd >= 0:
            os.pwrite(self._fd, _SPOOLED.pack(*spooled), _BYTES)
        else:
            self._announce(spooled)

    def says(self, report: Report) -> None:
        """Replace what this worker says of itself. Not fsynced: it is worth nothing after the machine."""
        if self._fd < 0 or report == self._said:
            return
        new = self._path.with_name(f".{self._path.name}.json")
        try:
            new.write_bytes(msgspec.json.encode(report))
            new.rename(_report_of(self._path))
            self._said = report
        except OSError as e:
            log.error("worker_report_unwritten", cause=e.strerror)

    def close(self) -> None:
        if self._fd >= 0:
            _report_of(self._path).unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def announced(settings: Settings) -> dict[int, str]:
    """The version each living worker obeys, by pid; empty until it has read the limits."""
    return {pid: said[:_BYTES].decode("ascii", "replace").strip() for pid, said in _alive(settings).items()}


def spooled(settings: Settings) -> list[Spooled]:
    """What each living worker said last by `Announcement.has`; of one of the build before, which says nothing of the
    kind, what no request of its takes longer than."""
    older = Spooled(time.time_ns() // 1000 - int(_OLDER_SECONDS * 1e6), 0)
    return [
        Spooled(*_SPOOLED.unpack_from(said, _BYTES)) if len(said) >= _BYTES + _SPOOLED.size else older
        for said in _alive(settings).values()
    ]


def _alive(settings: Settings) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for path in _directory(settings).glob("[0-9]*"):
        if not path.name.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _report_of(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                found[int(path.name)] = os.pread(fd, _BYTES + _SPOOLED.size, 0)
            finally:
                os.close(fd)
    return found


def wait_until_obeyed(settings: Settings, version: str, timeout_seconds: float) -> Mapping[int, bool]:
    """Every living worker, by pid, and whether it obeys this version; as soon as all do, or after the time-out."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        found = {pid: obeyed == version for pid, obeyed in announced(settings).items()}
        if all(found.values()) or time.monotonic() >= deadline:
            return found
        time.sleep(POLL_SECONDS)


def reports(settings: Settings) -> dict[int, Report | None]:
    """What each living worker says of itself, by pid; None for one that has not said anything readable yet."""
    found: dict[int, Report | None] = {}
    for pid in announced(settings):
        try:
            found[pid] = msgspec.json.decode(_report_of(_directory(settings) / str(pid)).read_bytes(), type=Report)
        except (OSError, msgspec.MsgspecError):
            found[pid] = None
    return found


def wait_until_said(settings: Settings, check: Callable[[Report], bool], timeout_seconds: float) -> Mapping[int, bool]:
    """Every living worker, by pid, and whether what it says passes; as soon as all do, or after the time-out."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        found = {pid: said is not None and check(said) for pid, said in reports(settings).items()}
        if all(found.values()) or time.monotonic() >= deadline:
            return found
        time.sleep(POLL_SECONDS)


def say_not_replaced(settings: Settings, asked: str, cause: str) -> None:
    """The supervisor's word on the wish of that id. One that cannot be written is waited for in vain, no more."""
    path = _directory(settings) / _REPLACING
    new = path.with_name(f".{path.name}")
    try:
        new.write_text(f"{asked} {cause}")
        new.rename(path)
    except OSError as e:
        log.error("not_replaced_unwritten", cause=e.strerror)


def not_replaced(settings: Settings, asked: str) -> str | None:
    """Why the supervisor gave this wish for new workers up; None as long as it did not."""
    try:
        of, _, cause = (_directory(settings) / _REPLACING).read_text().partition(" ")
    except OSError:
        return None
    return cause if of == asked else None


def _report_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _directory(settings: Settings) -> Path:
    return settings.run_dir / "workers"
