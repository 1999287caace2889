"""One segment of the usage spool: its frames, and the file's life in the hands of the worker that writes it.

    .tmp    created and locked (flock): nobody ever sees an unlocked segment that is still written to
    .open   one `os.write` an event, O_APPEND; the lock says "the owner lives"
    .seg    sealed: fdatasync, renamed, directory fsync; nobody writes to it any more

Name: the microsecond from which on the requests of its events began, the worker's pid, chance.
File: magic, then frames. Frame: marker u16 | length u32 | crc32 u32 | msgpack event. After a damaged frame the
reader looks for the next marker whose crc holds: one flipped bit costs one event, which is kept apart.

A fdatasync that failed is never tried again on that file: Linux then has marked the pages clean, and the next one
says OK about bytes that are not on the disk. The segment is written anew under its name before it is sealed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import struct
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shared.durable import fsync_path
from shared.usage import UsageEvent

MAGIC = b"ENGSPL1\n"
_MARKER = b"\xe5\x9e"
_HEAD = struct.Struct(">2sII")
_MAX_FRAME_BYTES = 65_536
_TRIES = 5

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(UsageEvent).decode


def frame(event: UsageEvent) -> bytes:
    payload = _encode(event)
    return _HEAD.pack(_MARKER, len(payload), zlib.crc32(payload)) + payload


def framed(data: bytes) -> UsageEvent:
    """The event of a `frame`."""
    return _decode(data[_HEAD.size :])


@dataclass(frozen=True, slots=True)
class SegmentContent:
    """`damage` is every byte that is not part of a whole frame, with its offset."""

    events: list[UsageEvent]
    damage: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def corrupt_bytes(self) -> int:
        return sum(len(piece) for _, piece in self.damage)


def read(path: Path) -> SegmentContent:
    """Every whole frame of a segment, in order, and everything that is not one."""
    data = path.read_bytes()
    events: list[UsageEvent] = []
    damage: list[tuple[int, bytes]] = []
    at = len(MAGIC) if data.startswith(MAGIC) else 0
    while at < len(data):
        at = _whole_frames(data, at, events)
        if at == len(data):
            break
        start, at = at, data.find(_MARKER, at + 1)
        while at >= 0 and _frame_at(data, at) is None:
            at = data.find(_MARKER, at + 1)
        if at < 0:
            at = len(data)
        damage.append((start, data[start:at]))
    return SegmentContent(events, damage)


def _whole_frames(data: bytes, at: int, events: list[UsageEvent]) -> int:
    """Take whole frames from `at` on; where the first thing is that is not one. `_frame_at` in one loop, without a
    call an event: this is the dearest step of a drain."""
    unpack, crc32, decode, take = _HEAD.unpack_from, zlib.crc32, _decode, events.append
    last = len(data) - _HEAD.size
    while at <= last:
        marker, length, crc = unpack(data, at)
        start = at + _HEAD.size
        end = start + length
        payload = data[start:end]
        if marker != _MARKER or length > _MAX_FRAME_BYTES or end > len(data) or crc32(payload) != crc:
            return at
        try:
            take(decode(payload))
        except msgspec.MsgspecError:
            return at
        at = end
    return at


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


class Segment:
    """A segment that is being written. Not thread-safe: `shared.spool` says who may call what. Raises OSError."""

    __slots__ = (
        "_fd",
        "_named",
        "_owed",
        "_path",
        "_suspect",
        "dirty",
        "events",
        "name",
        "opened_at",
        "sealed",
        "size_bytes",
        "torn",
    )

    def __init__(self, directory: Path, since_us: int | None = None) -> None:
        """`since_us`: no request whose event will be in it began before; now when it is None."""
        self._create(directory, since_us)
        self.opened_at = time.monotonic()
        self.size_bytes = len(MAGIC)
        self.events = 0
        self.dirty = True  # something is not yet fsynced
        self.torn = False  # the tail is damage: never append behind it
        self._named = False  # the directory entry is on the disk
        self.sealed = False  # the drainer may have it
        self._suspect = False  # a fdatasync failed: see above
        self._owed = b""  # frames for when it is written anew

    def _create(self, directory: Path, since_us: int | None) -> None:
        """An adopter that comes between creation and lock takes the file for a dead owner's and removes it. Seen on a
        machine with too much to do; what was to be appended would wait, and everything be refused, until a retry."""
        for tries_left in reversed(range(_TRIES)):
            created_us = time.time_ns() // 1000
            named_us = created_us if since_us is None else min(created_us, since_us)
            self.name = f"{named_us:016d}-{os.getpid()}-{secrets.token_hex(4)}"
            self._path = directory / f"{self.name}.open"
            try:
                self._fd = _locked(self._path.with_suffix(".tmp"))
                try:
                    _write_all(self._fd, MAGIC)
                    os.rename(self._path.with_suffix(".tmp"), self._path)
                except OSError:
                    self._abandon(self._fd)
                    raise
            except (BlockingIOError, FileNotFoundError):
                if not tries_left:
                    raise
            else:
                return

    def append(self, data: bytes) -> None:
        """One frame, or nothing of it."""
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, "short write")
        except OSError:
            try:
                os.ftruncate(self._fd, self.size_bytes)
            except OSError:
                self.torn = True
            raise
        self.size_bytes += written
        self.events += 1
        self.dirty = True

    def amend(self, data: bytes) -> None:
        """One frame more, also on a disk that takes none: then with the rest, when that is written anew."""
        try:
            if self.torn:
                raise OSError(errno.EIO, "the tail is torn")
            self.append(data)
        except OSError:
            self._owed += data
            self._suspect = True

    def sync(self) -> None:
        """What was appended before this call survives power loss when it returns."""
        if not self.dirty:
            return
        self.dirty = False  # first: an append meanwhile sets it again
        try:
            self._force()
            if not self._named:
                fsync_path(self._path.parent)
                self._named = True
        except OSError:
            self.dirty = True
            raise

    def _force(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError:
            self._suspect = True
            raise

    def seal(self) -> None:
        """Durable, and the drainer's from now on. After an error it can be tried again."""
        if not self.sealed:
            if self._suspect or not self._path.exists():
                self._write_anew()
            self._force()
            os.rename(self._path, self._path.with_suffix(".seg"))
            self.sealed = True
        fsync_path(self._path.parent)
        os.close(self._fd)

    def _write_anew(self) -> None:
        """The same frames in a new file of the same name; the old one's bytes come from the page cache."""
        tmp = self._path.with_suffix(".tmp")
        tmp.unlink(missing_ok=True)  # of an earlier try
        data = os.pread(self._fd, self.size_bytes, 0) + self._owed
        fd = _locked(tmp)
        try:
            _write_all(fd, data)
            os.fdatasync(fd)
            os.rename(tmp, self._path)
        except OSError:
            self._abandon(fd)
            raise
        os.close(self._fd)
        self._fd, self._suspect = fd, False
        self.size_bytes, self._owed = len(data), b""

    def _abandon(self, fd: int) -> None:
        os.close(fd)
        self._path.with_suffix(".tmp").unlink(missing_ok=True)


def _locked(tmp: Path) -> int:
    fd = os.open(tmp, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        tmp.unlink(missing_ok=True)
        raise
    return fd


def _write_all(fd: int, data: bytes) -> None:
    if os.write(fd, data) != len(data):
        raise OSError(errno.ENOSPC, "short write")
