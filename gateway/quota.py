"""Quotas of a tenant's plan, judged without asking PostgreSQL in a request.

Every `quota_refresh_seconds` a thread reads the limits and this month's counts of the tenants whose plan limits
anything; on top come this worker's own events that those counts do not hold yet. Which these are is exact: each
own count is kept under the spool segment its event is in, and the query tells, in the same snapshot as the
counts, which segments have been drained. What other workers have not drained yet is not seen: a hard limit may
be passed by as much as they serve in that time, it is never applied too early.

How much a tenant keeps (`shared.storage`) is measured in the same turn: two `stat`s for each whose storage is limited,
an open of the database (0.4 ms) for those whose files come to a limit and have changed. One that cannot be read counts
as it did in the turn before, and as nothing in the first one.

`quota_mode` shadow warns of a hard limit as of a soft one and counts what would have been refused; off reads nothing.

Without a snapshot, or with one older than `quota_stale_seconds`, everybody is served and counted
(`engram_quota_unchecked_total`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import psycopg

from gateway.limits import Counter
from gateway.problems import Problem, Refusal
from shared import metrics
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable
from shared.log import get_logger
from shared.settings import Settings
from shared.spool import Spool
from shared.storage import Measurement, measured_again
from shared.tenant import TenantPaths
from shared.usage import UsageEvent

COUNTERS: tuple[Counter, ...] = ("api_calls", "search_queries", "memories_created", "storage_bytes")
WARNING_HEADER = b"x-engram-quota-warning"
MAX_OWN = 10_000
log = get_logger("quota")


class Allowance:
    """One tenant's counters: what PostgreSQL counted, what this worker has on top, and the limits."""

    __slots__ = ("hard", "limited", "own", "soft", "used")

    def __init__(self, row: dict[str, Any], stored: int) -> None:
        self.used: dict[str, int] = {c: stored if c == "storage_bytes" else row[c] for c in COUNTERS}
        self.own: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self.soft: dict[str, int | None] = {c: row[f"{c}_soft"] for c in COUNTERS}
        self.hard: dict[str, int | None] = {c: row[f"{c}_hard"] for c in COUNTERS}
        self.limited = [c for c in COUNTERS if self.soft[c] is not None or self.hard[c] is not None]


class Quotas:
    """`refresh` is for a thread, everything else for the event loop."""

    def __init__(self, control_plane: ControlPlane, settings: Settings) -> None:
        self._control_plane = control_plane
        self._tenants_dir = settings.tenants_dir
        self._stale_seconds = settings.quota_stale_seconds
        self._mode = settings.quota_mode
        self._loop = asyncio.get_running_loop()
        self._read_at = float("-inf")
        self._allowances: dict[str, Allowance] = {}
        self._own: dict[tuple[str, str], list[int]] = {}  # by segment and tenant, in the order of COUNTERS
        self._measured: dict[str, Measurement] = {}
        self._failing = False

    def check(self, tenant_id: str, counters: Iterable[Counter], memories: int = 1) -> bytes | None:
        """The value of the warning header, if a soft limit is reached. Raises a `Refusal` (402) for a request that
        would pass a hard one; `memories` is how many it creates, when it creates any."""
        if self._mode == "off":
            return None
        if time.monotonic() - self._read_at > self._stale_seconds:
            metrics.quota_unchecked_total.inc()
            return None
        allowance = self._allowances.get(tenant_id)
        if allowance is None:
            return None
        warnings = []
        for counter in allowance.limited:
            if counter not in counters:
                continue
            current = allowance.used[counter] + allowance.own[counter]
            hard, soft = allowance.hard[counter], allowance.soft[counter]
            wanted = memories if counter == "memories_created" else 1
            exceeded = hard is not None and current + wanted > hard
            if exceeded and self._mode == "enforce":
                metrics.quota_exceeded_total.labels(counter).inc()
                raise Refusal(_exceeded(counter, current, hard or 0, wanted))
            if exceeded:
                metrics.quota_shadowed_total.labels(counter).inc()
            if exceeded or (soft is not None and current >= soft):
                warnings.append(f"{counter}; current={current}; limit={hard if hard is not None else soft}")
        return ", ".join(warnings).encode() or None

    def count(self, event: UsageEvent, segment: str) -> None:
        """An event of this worker, which is in this segment of the spool."""
        allowance = self._allowances.get(event.tenant_id)
        if allowance is None or not segment:
            return
        key = (segment, event.tenant_id)
        own = self._own.get(key)
        if own is None:
            if len(self._own) >= MAX_OWN:
                del self._own[next(iter(self._own))]
            own = self._own[key] = [0, 0, 0]
        for n, amount in enumerate((event.api_calls, event.search_queries, event.memories_created)):
            own[n] += amount
            allowance.own[COUNTERS[n]] += amount

    def refresh(self) -> None:
        """Read the control plane; the loop takes the result over. A failure leaves the last snapshot to age."""
        if self._mode == "off":
            return
        segments = sorted({segment for segment, _ in list(self._own)})
        try:
            rows = self._control_plane.rows("quota_usage", segments=segments)
        except (ControlPlaneUnavailable, psycopg.Error) as e:
            if not self._failing:
                log.error("quotas_unread", cause=str(e)[:300])
            self._failing = True
            return
        self._failing = False
        read_at = time.monotonic()
        limited = [row for row in rows if row["tenant_id"] is not None]
        self._measured = {row["tenant_id"]: self._measure(row) for row in limited}
        allowances = {t: Allowance(row, self._measured[t].storage_bytes) for row in limited if (t := row["tenant_id"])}
        self._loop.call_soon_threadsafe(self._take_over, read_at, allowances, set(rows[0]["segments"]))

    def _take_over(self, read_at: float, allowances: dict[str, Allowance], drained: set[str]) -> None:
        self._own = {key: own for key, own in self._own.items() if key[0] not in drained and key[1] in allowances}
        for (_, tenant_id), own in self._own.items():
            for n, amount in enumerate(own):
                allowances[tenant_id].own[COUNTERS[n]] += amount
        self._read_at, self._allowances = read_at, allowances

    def _measure(self, row: dict[str, Any]) -> Measurement:
        """Only for those whose storage is limited, and exactly for those who may have reached a limit."""
        limits = [limit for limit in (row["storage_bytes_soft"], row["storage_bytes_hard"]) if limit is not None]
        if not limits:
            return Measurement(0)
        tenant_id: str = row["tenant_id"]
        paths = TenantPaths.of(self._tenants_dir, tenant_id)
        return measured_again(paths, self._measured.get(tenant_id), below=min(limits))


class CountingSpool(Spool):
    """The spool, which also tells the quotas what was appended once there are any."""

    quotas: Quotas | None = None

    def append(self, event: UsageEvent, refusal: UsageEvent | None = None) -> str:
        segment = super().append(event, refusal)
        if self.quotas is not None:
            self.quotas.count(event, segment)
        return segment


def _exceeded(counter: Counter, current: int, limit: int, wanted: int) -> Problem:
    period = "" if counter == "storage_bytes" else " of this month"
    state = "are used up" if current >= limit else f"do not suffice for {wanted} more"
    return Problem(
        402,
        f"The plan's {counter.replace('_', ' ')}{period} {state}.",
        reason="quota exceeded",
        extra={"metric": counter, "current": current, "limit": limit},
    )
