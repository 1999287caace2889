"""How often a tenant, and a client without a good token, may ask: exact over all workers of a machine.

The state is one number for each bucket, the theoretical arrival time of GCRA (a token bucket without a clock of
its own), in a table of fixed size that every worker maps: `{data_dir}/run/*.rates`. A decision reads, compares
and writes it under a non-blocking flock, in microseconds. Nobody ever waits for the lock, and only its holder
writes: who cannot have it at once decides by what it reads, remembers what it granted, and adds that with its
next lock, so that the sum stays exact. A killed worker has given the lock back. Beside one that was stopped inside
it the others write without it after `STOPPED_SECONDS`, and may miss each other only within the same microsecond.

A bucket is named by what it limits and by the limit itself: a changed limit begins with a full bucket.

A tenant has one bucket, and one more for reads, writes or searches where a rate is set for them; a request
needs a place in all of its buckets or takes none. What a request is refused for costs no place.

Tokens that fail are limited by the client's address (IPv6: its /64) in two steps, so that a flood costs no
signatures and does not shut out those who share the address (NAT, a proxy):
  - a missing token, or one that is bad whatever its signature says, takes a place of the address; without a place
    the answer is 429 instead of 401. Good tokens never see that bucket.
  - a token that is good but for its signature takes a place of that address and that tenant; without a place the
    tokens of that tenant from that address are answered 429 before their signature is verified. Tokens that this
    worker has verified before, and other tenants behind the same address, go on.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import math
import mmap
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gateway.limits import RateClass
from gateway.problems import Problem
from shared import metrics
from shared.limits import Limits, Rate, Watch
from shared.log import get_logger
from shared.settings import Settings

SLOTS = 1 << 16  # a power of two
PROBES = 16
LOCK_TRIES = 8
STOPPED_SECONDS = 1.0  # a holder that keeps the lock for longer is not running
UNLOCKED_SECONDS = 0.002  # how long the lock is not tried again after it could not be had
SHADOW_LOG_SECONDS = 60.0
TOO_MANY_REQUESTS = "The tenant's rate limit is reached."
_HEAD_BYTES = 64
_MAX_PLANS = 100_000
_MAX_DEBTS = 10_000
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
        policy = b"%d;w=%d" % (size, math.ceil(size / rps))
        return cls(key, 1 / rps, size / rps, ((b"ratelimit-limit", b"%d" % size), (b"ratelimit-policy", policy)))


class Decision(NamedTuple):
    """Of the bucket with the least room. Seconds until one more is allowed, and until the bucket is full again."""

    allowed: bool
    bucket: Bucket
    remaining: int
    retry_seconds: float
    reset_seconds: float

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The IETF draft's fields: `RateLimit-Limit` requests within `w` seconds."""
        return [
            *self.bucket.fields,
            (b"ratelimit-remaining", b"%d" % self.remaining),
            (b"ratelimit-reset", b"%d" % math.ceil(self.reset_seconds)),
        ]

    @property
    def retry_after(self) -> int:
        return max(1, math.ceil(self.retry_seconds))


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

    def take(self, buckets: Iterable[Bucket], *, keep: bool = True) -> Decision:
        """A place in every bucket, or none in any. With `keep` false it only says whether there is one."""
        locked = self._lock()
        try:
            now = time.monotonic()  # under the lock, or a later one could write an earlier time
            if locked:
                self._locked_at = now
            writes = locked or self._fd < 0 or now - self._locked_at > STOPPED_SECONDS
            arrivals = self._arrivals
            tightest: Decision | None = None
            following: list[tuple[Bucket, int, float]] = []
            granted = keep
            for bucket in buckets:
                key, interval, window, _ = bucket
                slot = self._slot(key, now, writes)
                arrival = arrivals[slot] if slot >= 0 else now
                if self._debts:
                    seconds, since = self._debts.get(key, (0.0, 0.0))
                    arrival = max(arrival, since) + seconds
                ahead = max(arrival - now, 0.0)
                room = (window - ahead) / interval + 1e-6
                allowed = room >= 1.0
                remaining = int(room) - 1 if allowed else 0
                after = ahead + interval if allowed else ahead
                granted = granted and allowed
                following.append((bucket, slot, ahead))
                if tightest is None or (allowed, remaining) < (tightest.allowed, tightest.remaining):
                    tightest = Decision(
                        allowed, bucket, remaining, 0.0 if allowed else after + interval - window, after
                    )
            assert tightest is not None
            if granted or (writes and self._debts):
                for bucket, slot, ahead in following:
                    cost = bucket.interval_seconds if granted else 0.0
                    if writes:
                        arrivals[slot] = now + ahead + cost
                        self._debts.pop(bucket.key, None)
                    else:
                        self._owe(bucket.key, cost, now)
            return tightest
        finally:
            if locked:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

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
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


class RateLimiter:
    """For one event loop."""

    def __init__(self, settings: Settings, limits: Watch) -> None:
        self._settings = settings
        self._watch = limits
        self._limits: Limits | None = None
        self._plans: dict[tuple[str, str], tuple[Bucket, ...]] = {}
        self._tenants = Table(settings.run_dir / "tenants.rates")
        self._addresses = Table(settings.run_dir / "addresses.rates")
        self._logged: dict[str, float] = {}

    def close(self) -> None:
        self._tenants.close()
        self._addresses.close()

    def tenant(self, tenant_id: str, rate_class: RateClass) -> Decision | None:
        """None: no limit. A refusal is counted; in shadow it is let through and says nothing to the client."""
        buckets = self._buckets(tenant_id, rate_class)
        if not buckets:
            return None
        return self._judged(self._tenants.take(buckets), "tenant", tenant_id)

    def within(self, tenant_id: str, rate_class: RateClass) -> Decision | None:
        """As `tenant`, inside a request that has the tenant's own place already: of the class's bucket alone."""
        own = self._buckets(tenant_id, "")
        buckets = [b for b in self._buckets(tenant_id, rate_class) if b not in own]
        return self._judged(self._tenants.take(buckets), "tenant", tenant_id) if buckets else None

    def operators(self) -> Decision:
        """Of the admin API: all operators of this machine together, whatever the mode."""
        settings = self._settings
        return self._addresses.take((Bucket.of("operators", settings.admin_rps, settings.admin_burst),))

    def bad_token(self, address: str, tenant_id: str | None) -> Decision | None:
        """Count a failed token; of `tenant_id` when only its signature was wrong. None when it may be told 401."""
        if not self._settings.unauthenticated_rps or self._mode == "off":
            return None
        decision = self._addresses.take((self._failures(address, tenant_id),))
        judged = self._judged(decision, "unauthenticated", None)
        return None if judged is None or judged.allowed else judged

    def may_verify(self, address: str, tenant_id: str | None) -> Decision | None:
        """Before a signature is verified, of a token for this tenant if its claims are good. None when it may be."""
        if not self._settings.unauthenticated_rps or self._mode != "enforce":
            return None
        decision = self._addresses.take((self._failures(address, tenant_id),), keep=False)
        if decision.allowed:
            return None
        metrics.rate_limited_total.labels("unauthenticated").inc()
        return decision

    @staticmethod
    def address(client: tuple[str, int] | None) -> str:
        """Whose failures these are: the scope's client (behind a trusted proxy the one it names); of IPv6 its /64."""
        text = client[0] if client else ""
        if ":" not in text:
            return text[:64]
        try:
            found = ipaddress.IPv6Address(text.strip("[]").partition("%")[0])
        except ValueError:
            return text[:64]
        return str(found.ipv4_mapped or found.packed[:8].hex())

    def _buckets(self, tenant_id: str, rate_class: RateClass) -> tuple[Bucket, ...]:
        if self._limits is not self._watch.now:
            self._limits = self._watch.now
            self._plans.clear()
        buckets = self._plans.get((tenant_id, rate_class))
        if buckets is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            buckets = self._plans[tenant_id, rate_class] = self._plan(tenant_id, rate_class)
        return buckets

    @property
    def _mode(self) -> str:
        return self._watch.now.rate_limit_mode or self._settings.rate_limit_mode

    def _plan(self, tenant_id: str, rate_class: RateClass) -> tuple[Bucket, ...]:
        if self._mode == "off":
            return ()
        settings, limits = self._settings, self._watch.now
        rate = limits.tenant_rates.get(tenant_id) or limits.rate_limit
        rate = rate or Rate(settings.rate_limit_rps, settings.rate_limit_burst)
        buckets = [Bucket.of(f"tenant/{tenant_id}", rate.rps, rate.burst)] if rate.rps else []
        of_class = getattr(rate, f"{rate_class}_rps") if rate_class else 0.0
        if of_class is None:
            of_class = getattr(settings, f"rate_limit_{rate_class}_rps")
        if of_class:
            burst = math.ceil(rate.burst * min(1.0, of_class / rate.rps)) if rate.rps else 0
            buckets.append(Bucket.of(f"{rate_class}/{tenant_id}", of_class, burst))
        return tuple(buckets)

    def _failures(self, address: str, tenant_id: str | None) -> Bucket:
        name = address if tenant_id is None else f"{address} {tenant_id}"
        return Bucket.of(name, self._settings.unauthenticated_rps, self._settings.unauthenticated_burst)

    def _judged(self, decision: Decision, scope: str, tenant_id: str | None) -> Decision | None:
        if self._mode == "enforce":
            if not decision.allowed:
                metrics.rate_limited_total.labels(scope).inc()
            return decision
        if not decision.allowed:
            metrics.rate_limit_shadowed_total.labels(scope).inc()
            self._log_shadowed(scope, tenant_id)
        return None

    def _log_shadowed(self, scope: str, tenant_id: str | None) -> None:
        who, now = tenant_id or "", time.monotonic()
        if self._logged.get(who, -math.inf) + SHADOW_LOG_SECONDS <= now:
            if len(self._logged) >= 10_000:
                self._logged.clear()
            self._logged[who] = now
            log.warning("rate_limit_shadowed", scope=scope, tenant_id=tenant_id)


def too_many(decision: Decision, detail: str) -> Problem:
    return Problem(429, detail, reason="rate limited", retry_after=decision.retry_after)


def _mapped(path: Path) -> tuple[int, mmap.mmap]:
    """The table of this boot, made if need be; without a disk to make it on, one of this process alone."""
    size = _HEAD_BYTES + 16 * SLOTS
    head = b"ENGRATE1" + _boot_id()
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


def _boot_id() -> bytes:
    """Arrival times are of the monotonic clock, which starts anew with the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b"-"
