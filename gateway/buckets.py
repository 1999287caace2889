"""Token buckets in a file that every worker of a machine maps: `{data_dir}/run/*.rates`.

The state is one number for each bucket, the theoretical arrival time of GCRA (a token bucket without a clock of
its own), in a table of fixed size. A decision reads, compares and writes it under a non-blocking flock, in
microseconds. Nobody ever waits for the lock, and only its holder writes: who cannot have it at once decides by what
it reads, remembers what it granted, and adds that with its next lock, so that the sum stays exact. A killed worker
has given the lock back. Beside one that was stopped inside it the others write without it after `STOPPED_SECONDS`,
and may miss each other only within the same microsecond.

A bucket is named by what it limits and by the limit itself: a changed limit begins with a full bucket.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import mmap
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from shared import boot, metrics
from shared.log import get_logger

SLOTS = 1 << 16  # a power of two
PROBES = 16
LOCK_TRIES = 8
STOPPED_SECONDS = 1.0  # a holder that keeps the lock for longer is not running
UNLOCKED_SECONDS = 0.002  # how long the lock is not tried again after it could not be had
_LOCK_NOW = fcntl.LOCK_EX | fcntl.LOCK_NB
_HEAD_BYTES = 64
_MAX_DEBTS = 10_000
_ROUNDING = 1e-6  # of quotients: 3 places at 0.3 a second are 10 seconds, not a little more
log = get_logger("ratelimit")


class Bucket(NamedTuple):
    """`interval_seconds` between requests in the long run, `window_seconds` of them may come at once."""

    key: int
    interval_seconds: float
    window_seconds: float
    fields: tuple[tuple[bytes, bytes], ...]

    @classmethod
    def of(cls, name: str, rps: float, burst: int) -> Bucket:
        size = burst or max(1, math.ceil(rps))
        key = int.from_bytes(hashlib.blake2b(f"{name} {rps} {size}".encode(), digest_size=8).digest()) or 1
        return cls(
            key, 1 / rps, size / rps, ((b"ratelimit-limit", b"%d" % size), (b"ratelimit-policy", _policy(rps, size)))
        )

    @property
    def size(self) -> int:
        """How many may come at once."""
        return round(self.window_seconds / self.interval_seconds)


class Decision(NamedTuple):
    """Of the bucket with the least room; of those that refuse, of the one that does so for longest. Seconds until the
    same is allowed (for ever: infinite), and until the bucket is full again."""

    allowed: bool
    bucket: Bucket
    remaining: int
    retry_seconds: float
    reset_seconds: float

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The IETF draft's fields. The limit is how many may come at once; the policy says how many become free in
        how many seconds, which is more than the limit where that is less than a second's worth."""
        return [
            *self.bucket.fields,
            (b"ratelimit-remaining", b"%d" % self.remaining),
            (b"ratelimit-reset", b"%d" % math.ceil(self.reset_seconds)),
        ]

    @property
    def never(self) -> bool:
        """Whether it is refused however long one waits."""
        return math.isinf(self.retry_seconds)

    @property
    def retry_after(self) -> int:
        """Not of what is allowed never."""
        return max(1, math.ceil(self.retry_seconds))


def _policy(rps: float, size: int) -> bytes:
    """How many become free in how many seconds, in whole numbers: those seconds in which an empty bucket is full."""
    seconds = max(1, math.ceil(size / rps - _ROUNDING))
    return b"%d;w=%d" % (seconds * rps + _ROUNDING, seconds)


class Table:
    """Arrival times by key, shared by all who map the file; in memory alone when there can be no file."""

    def __init__(self, path: Path) -> None:
        self._fd, memory = _mapped(path)
        whole = memoryview(memory)
        self._keys = whole[_HEAD_BYTES : _HEAD_BYTES + 8 * SLOTS].cast("Q")
        self._arrivals = whole[_HEAD_BYTES + 8 * SLOTS :].cast("d")
        self._locked_at = time.monotonic()
        self._unlocked_until = 0.0
        self._debts: dict[int, tuple[float, float]] = {}  # by key: seconds granted without the lock, and since when

    def take(
        self, buckets: Sequence[Bucket], places: int = 1, *, held: Bucket | None = None, keep: bool = True
    ) -> Decision:
        """So many places in every bucket, or none in any: more than a bucket holds when it is full, which then is empty
        until the last of them has come. Of the bucket `held` the caller has one of them already, and that one never
        gives more than it holds. With `keep` false it only says whether there are."""
        locked = self._lock()
        try:
            now = time.monotonic()  # under the lock, or a later one could write an earlier time
            if locked:
                self._locked_at = now
                if places == 1 and keep and len(buckets) == 1 and not self._debts:
                    decision = self._one_more(buckets[0], now)
                    if decision is not None:
                        return decision
            writes = locked or self._fd < 0 or now - self._locked_at > STOPPED_SECONDS
            arrivals = self._arrivals
            tightest: Decision | None = None
            following: list[tuple[Bucket, int, float, int]] = []
            granted = keep
            for bucket in buckets:
                key, interval, window, _ = bucket
                slot = self._slot(key, now, writes)
                arrival = arrivals[slot] if slot >= 0 else now
                if self._debts:
                    seconds, since = self._debts.get(key, (0.0, 0.0))
                    arrival = max(arrival, since) + seconds
                ahead = max(arrival - now, 0.0)
                room = (window - ahead) / interval + _ROUNDING
                count = places - (bucket is held)
                needed = math.inf if bucket is held and places > bucket.size else min(interval * count, window)
                allowed = not count or room * interval >= needed
                remaining = max(int(room) - count, 0) if allowed else 0
                after = ahead + interval * count if allowed else ahead
                retry_seconds = 0.0 if allowed else after + needed - window
                granted = granted and allowed
                following.append((bucket, slot, ahead, count))
                if tightest is None or (-retry_seconds, remaining) < (-tightest.retry_seconds, tightest.remaining):
                    tightest = Decision(allowed, bucket, remaining, retry_seconds, after)
            assert tightest is not None
            if granted or (writes and self._debts):
                for bucket, slot, ahead, count in following:
                    cost = bucket.interval_seconds * count if granted else 0.0
                    if writes:
                        arrivals[slot] = now + ahead + cost
                        self._debts.pop(bucket.key, None)
                    else:
                        self._owe(bucket.key, cost, now)
            return tightest
        finally:
            if locked:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def give_back(self, bucket: Bucket) -> None:
        """A place that was taken for something that is not done."""
        locked = self._lock()
        try:
            now = time.monotonic()
            slot = self._slot(bucket.key, now, writes=False)
            if slot >= 0 and (locked or self._fd < 0):
                self._arrivals[slot] -= bucket.interval_seconds
            elif slot >= 0:
                self._owe(bucket.key, -bucket.interval_seconds, now)
        finally:
            if locked:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _one_more(self, bucket: Bucket, now: float) -> Decision | None:
        """A place in a known bucket that has room, as nearly every request wants it; what `take` would do, in a third
        of the time. None when anything is not as usual: nothing was done then."""
        key, interval, window, _ = bucket
        slot = key & (SLOTS - 1)
        if self._keys[slot] != key:
            return None
        ahead = max(self._arrivals[slot] - now, 0.0)
        room = (window - ahead) / interval + _ROUNDING
        if room < 1:
            return None
        self._arrivals[slot] = now + ahead + interval
        return Decision(True, bucket, int(room) - 1, 0.0, ahead + interval)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> bool:
        """Whether it could be had at once: nothing here ever waits, a wait would be every request's."""
        if self._fd < 0:
            return False
        if time.monotonic() >= self._unlocked_until:
            for _ in range(LOCK_TRIES):
                try:
                    fcntl.flock(self._fd, _LOCK_NOW)
                    return True
                except BlockingIOError:
                    continue
            self._unlocked_until = time.monotonic() + UNLOCKED_SECONDS
        metrics.rate_limit_unlocked_total.inc()
        return False

    def _owe(self, key: int, cost: float, now: float) -> None:
        if len(self._debts) >= _MAX_DEBTS:
            self._debts.clear()
        seconds, since = self._debts.get(key, (0.0, now))
        self._debts[key] = (seconds + cost, since)

    def _slot(self, key: int, now: float, writes: bool) -> int:
        """The key's slot; a new key takes a free one, else the one idle for longest. -1: new, and not to be written."""
        keys = self._keys
        idlest, idlest_at = 0, math.inf
        for probe in range(PROBES):
            slot = (key + probe) & (SLOTS - 1)
            found = keys[slot]
            if found == key:
                return slot
            if found == 0:
                idlest = slot
                break
            if self._arrivals[slot] < idlest_at:
                idlest, idlest_at = slot, self._arrivals[slot]
        if not writes:
            return -1
        keys[idlest] = key
        self._arrivals[idlest] = now
        return idlest


def _mapped(path: Path) -> tuple[int, mmap.mmap]:
    """The table of this boot, made if need be; without a disk to make it on, one of this process alone."""
    size = _HEAD_BYTES + 16 * SLOTS
    head = b"ENGRATE1" + boot.boot_id().encode()  # the monotonic clock, whose times these are, starts anew with it
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = _open_table(path, head, size)
        return fd, mmap.mmap(fd, size)
    except OSError as e:
        log.error("rate_table_unshared", file=path.name, cause=e.strerror)
        return -1, mmap.mmap(-1, size)


def _open_table(path: Path, head: bytes, size: int) -> int:
    """A table of another boot or shape is replaced by a rename: whoever maps it keeps it."""
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers start at once, and must end up with one table
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.pread(fd, len(head), 0) == head and os.fstat(fd).st_size == size:
                return fd
            os.close(fd)
        new = path.with_name(f"{path.name}.new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)  # a hole in it would be a SIGBUS on a full disk
            os.pwrite(fd, head, 0)
            os.replace(new, path)
        except OSError:
            os.close(fd)
            raise
        return fd
    finally:
        os.close(lock)
