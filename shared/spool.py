"""The usage spool: where a request's event is safe before the request is answered.

Producer (one `Spool` a gateway worker)
    append   one `os.write` to an O_APPEND file before the answer leaves: a SIGKILL loses nothing acknowledged.
    tick     off the loop, every few hundred ms: fdatasync (bound at power loss: `usage_fsync_seconds`), and seal
             a segment that is `usage_flush_seconds` old or has `usage_flush_events` events.
Drainer (any process of the machine)
    adopt    segments whose owner died are sealed: the owner's flock is gone.
    read     every whole frame; what is not one goes to quarantine, never away.

A segment is born `.tmp`, locked, renamed `.open` (so nobody ever sees an unlocked live one), sealed by fdatasync
→ rename `.seg` → directory fsync. Frame: marker u16 | length u32 | crc32 u32 | msgpack event. After a damaged
frame the reader looks for the next marker whose crc holds: one flipped bit costs one event, which is kept apart.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shared import metrics
from shared.durable import fsync_path, write_file
from shared.errors import SpoolUnavailable
from shared.log import get_logger
from shared.settings import Settings
from shared.usage import UsageEvent

MAGIC = b"ENGSPL1\n"
_MARKER = b"\xe5\x9e"
_HEAD = struct.Struct(">2sII")
_MAX_FRAME_BYTES = 65_536

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(UsageEvent).decode
log = get_logger("spool")


def frame(event: UsageEvent) -> bytes:
    payload = _encode(event)
    return _HEAD.pack(_MARKER, len(payload), zlib.crc32(payload)) + payload


@dataclass(slots=True)
class _Segment:
    """An open segment: its descriptor holds the flock that says "the owner lives"."""

    path: Path
    name: str
    fd: int
    opened_at: float
    size_bytes: int
    events: int = 0
    dirty: bool = True
    torn: bool = False


@dataclass(frozen=True, slots=True)
class SegmentContent:
    """`damage` is every byte that is not part of a whole frame, with its offset."""

    events: list[UsageEvent]
    damage: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def corrupt_bytes(self) -> int:
        return sum(len(piece) for _, piece in self.damage)


class Spool:
    """The producer. `append` is for the event loop; `tick` and `close` are for a thread."""

    def __init__(self, settings: Settings) -> None:
        self.dir = settings.spool_dir
        self._flush_seconds = settings.usage_flush_seconds
        self._flush_events = settings.usage_flush_events
        self._backlog_events = settings.usage_backlog_events
        self._segment: _Segment | None = None
        self._sealing: deque[_Segment] = deque()
        self._backlog: deque[bytes] = deque()
        self._lock = threading.Lock()  # held for a write(2) or for detaching a segment, never across an fsync
        self._tick_lock = threading.Lock()
        self.dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        fsync_path(self.dir.parent)

    @property
    def available(self) -> bool:
        """False while events wait in memory because the disk refused them: refuse billable requests then."""
        return not self._backlog

    def append(self, event: UsageEvent) -> str:
        """Make the event safe against the death of this process; the name of the segment that holds it.

        When the disk refuses it is kept in memory and retried by `tick`; beyond `usage_backlog_events` it is
        dropped, counted in `engram_usage_lost_total` and logged; there is no segment then ("").
        """
        data = frame(event)
        segment = ""
        with self._lock:
            try:
                if self._backlog:
                    raise SpoolUnavailable("events are waiting")
                segment = self._write(data)
            except (OSError, SpoolUnavailable) as e:
                self._keep(data, e)
        metrics.usage_events_total.inc()
        return segment

    def tick(self) -> None:
        """fsync what was written, seal what is due, retry what was refused. Blocking."""
        with self._tick_lock:
            with self._lock:
                self._retry_backlog()
                segment = self._segment
                due = segment is not None and segment.events > 0 and self._is_due(segment)
                if segment is not None and due:
                    self._sealing.append(segment)
                    self._segment = segment = None
            if segment is not None and segment.dirty:
                segment.dirty = False
                try:
                    os.fdatasync(segment.fd)
                except OSError as e:
                    segment.dirty = True
                    _flush_failed("fsync", e)
            self._seal_detached()

    def close(self) -> None:
        """Seal everything. Raises `SpoolUnavailable` when events could not be written."""
        with self._tick_lock:
            with self._lock:
                self._retry_backlog()
                if self._segment is not None:
                    self._sealing.append(self._segment)
                    self._segment = None
            self._seal_detached()
        if self._backlog or self._sealing:
            raise SpoolUnavailable(f"{len(self._backlog)} usage events could not be written to {self.dir}")

    def _is_due(self, segment: _Segment) -> bool:
        return (
            segment.torn
            or segment.events >= self._flush_events
            or time.monotonic() - segment.opened_at >= self._flush_seconds
        )

    def _write(self, data: bytes) -> str:
        segment = self._segment
        if segment is None:
            segment = self._segment = _open_segment(self.dir)
        elif segment.torn or segment.events >= self._flush_events:
            self._sealing.append(segment)
            self._segment = None  # before the open below, which may fail
            segment = self._segment = _open_segment(self.dir)
        try:
            written = os.write(segment.fd, data)
            if written != len(data):
                raise OSError(28, "short write")
        except OSError:
            try:
                os.ftruncate(segment.fd, segment.size_bytes)
            except OSError:
                segment.torn = True  # its tail is damage now; never append behind it
            raise
        segment.size_bytes += written
        segment.events += 1
        segment.dirty = True
        return segment.name

    def _keep(self, data: bytes, cause: Exception) -> None:
        if isinstance(cause, OSError):
            _flush_failed("write", cause)
        if len(self._backlog) >= self._backlog_events:
            metrics.usage_lost_total.inc()
            log.error("usage_event_lost", cause=str(cause), backlog_events=len(self._backlog))
            return
        self._backlog.append(data)

    def _retry_backlog(self) -> None:
        while self._backlog:
            try:
                self._write(self._backlog[0])
            except OSError as e:
                _flush_failed("write", e)
                return
            self._backlog.popleft()

    def _seal_detached(self) -> None:
        while self._sealing:
            segment = self._sealing[0]
            try:
                _seal(segment.path, segment.fd)
            except OSError as e:
                _flush_failed("seal", e)
                return
            os.close(segment.fd)
            self._sealing.popleft()


def _open_segment(directory: Path) -> _Segment:
    name = f"{time.time_ns() // 1000:016d}-{os.getpid()}-{secrets.token_hex(4)}"
    tmp = directory / f"{name}.tmp"
    fd = os.open(tmp, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    path = directory / f"{name}.open"
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.write(fd, MAGIC) != len(MAGIC):
            raise OSError(28, "short write")
        os.rename(tmp, path)
    except OSError:
        os.close(fd)
        tmp.unlink(missing_ok=True)
        raise
    return _Segment(path, name, fd, time.monotonic(), len(MAGIC))


def _seal(path: Path, fd: int) -> Path:
    """fdatasync → `.seg` → directory fsync. Doing it twice is fine."""
    os.fdatasync(fd)
    sealed = path.with_suffix(".seg")
    if path.exists():
        os.rename(path, sealed)
    fsync_path(path.parent)
    return sealed


def _flush_failed(step: str, e: OSError) -> None:
    metrics.usage_flush_failures_total.inc()
    log.error("usage_flush_failed", step=step, errno=e.errno, cause=e.strerror)


def adopt(directory: Path) -> list[Path]:
    """Seal the segments of dead owners; return those sealed. A live owner's flock keeps us off."""
    adopted: list[Path] = []
    for path in sorted([*directory.glob("*.open"), *directory.glob("*.tmp")]):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists():  # sealed or renamed between listing and locking
                continue
            if os.fstat(fd).st_size <= len(MAGIC):
                path.unlink()
                continue
            adopted.append(_seal(path, fd))
            log.info("usage_segment_adopted", segment=path.stem)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
    return adopted


def sealed(directory: Path) -> list[Path]:
    """Sealed segments, oldest first."""
    return sorted(directory.glob("*.seg"))


def read(path: Path) -> SegmentContent:
    """Every whole frame of a segment, in order, and everything that is not one."""
    data = path.read_bytes()
    events: list[UsageEvent] = []
    damage: list[tuple[int, bytes]] = []
    at = len(MAGIC) if data.startswith(MAGIC) else 0
    while at < len(data):
        found = _frame_at(data, at)
        if found is not None:
            event, at = found
            events.append(event)
            continue
        start, at = at, data.find(_MARKER, at + 1)
        while at >= 0 and _frame_at(data, at) is None:
            at = data.find(_MARKER, at + 1)
        if at < 0:
            at = len(data)
        damage.append((start, data[start:at]))
    return SegmentContent(events, damage)


def _frame_at(data: bytes, at: int) -> tuple[UsageEvent, int] | None:
    if at + _HEAD.size > len(data):
        return None
    marker, length, crc = _HEAD.unpack_from(data, at)
    start = at + _HEAD.size
    end = start + length
    if marker != _MARKER or length > _MAX_FRAME_BYTES or end > len(data):
        return None
    payload = data[start:end]
    if zlib.crc32(payload) != crc:
        return None
    try:
        return _decode(payload), end
    except msgspec.MsgspecError:
        return None


def quarantine(path: Path, content: SegmentContent) -> Path | None:
    """Keep the damaged bytes of a segment beside the spool; None when there is no damage."""
    if not content.damage:
        return None
    directory = path.parent / "quarantine"
    directory.mkdir(exist_ok=True, mode=0o700)
    kept = directory / f"{path.stem}.bad"
    lines = [f"@{offset} {len(piece)}\n".encode() + piece + b"\n" for offset, piece in content.damage]
    write_file(kept, b"".join(lines))
    log.error("usage_segment_damaged", segment=path.stem, corrupt_bytes=content.corrupt_bytes, kept=str(kept))
    return kept


def oldest_age_seconds(directory: Path) -> float:
    """Age of the oldest segment on disk that holds events; 0 when everything is drained."""
    oldest: float | None = None
    for path in (*directory.glob("*.seg"), *directory.glob("*.open")):
        created = int(path.name.partition("-")[0]) / 1e6
        oldest = created if oldest is None else min(oldest, created)
    return max(0.0, time.time() - oldest) if oldest is not None else 0.0
