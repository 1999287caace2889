"""Which tenants keep this worker busy: a small bounded sketch, cheap enough for every request.

The event loop counts into one dictionary, a row of integers a tenant: one look-up and two or three increments, 0.5 µs.
A thread takes that dictionary away every `LOOK_SECONDS`, puts a fresh one in its place and keeps the last
`WINDOW_SECONDS` of them.

Bounded: one look counts at most `TENANTS` tenants apart and all others together. Who asks often is among the first
`TENANTS` of nearly every look, so it is the seldom ones that are lumped. Exact for the rest, but for a request that is
counted in the instant a dictionary is taken away.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque

from shared.metrics import DURATION_BUCKETS_SECONDS
from shared.workers import Busy

LOOK_SECONDS = 5.0
WINDOW_SECONDS = 60.0
TENANTS = 256
KEPT = 20  # of each order: most requests, slowest, most errors, most time
_EDGES = DURATION_BUCKETS_SECONDS
_BUCKETS = len(_EDGES) + 1
_ERRORS, _REFUSED, _MICROSECONDS = _BUCKETS, _BUCKETS + 1, _BUCKETS + 2
_EMPTY = [0] * (_BUCKETS + 3)
Rows = dict[str, list[int]]


class Busiest:
    """`count` is for the event loop, `look` for one thread."""

    def __init__(self) -> None:
        self._rows: Rows = {}
        self._looks: deque[Rows] = deque(maxlen=int(WINDOW_SECONDS / LOOK_SECONDS))
        self.requests = 0
        self.unseen = 0
        self.tenants: list[Busy] = []

    def count(self, tenant_id: str, seconds: float, status: int) -> None:
        """One request and how long its answer took to begin."""
        rows = self._rows
        row = rows.get(tenant_id)
        if row is None:
            row = _added(rows, tenant_id)
        row[bisect_left(_EDGES, seconds)] += 1
        row[_MICROSECONDS] += int(seconds * 1_000_000)
        if status >= 429:
            row[_ERRORS if status >= 500 else _REFUSED] += 1

    def look(self) -> None:
        """Take what was counted since the last look, and sum up the window."""
        taken, self._rows = self._rows, {}
        self._looks.append(taken)
        sums: Rows = {}
        for rows in self._looks:
            for tenant_id, row in list(rows.items()):
                kept = sums.get(tenant_id)
                sums[tenant_id] = list(row) if kept is None else [a + b for a, b in zip(kept, row, strict=True)]
            time.sleep(0)  # the event loop wants Python's lock
        others = sums.pop("", _EMPTY)
        self.unseen = sum(others[:_BUCKETS])
        self.requests = self.unseen + sum(sum(row[:_BUCKETS]) for row in sums.values())
        found: list[Busy] = []
        for tenant_id, row in sums.items():
            found.append(_busy(tenant_id, row))
            if len(found) % TENANTS == 0:
                time.sleep(0)
        self.tenants = _busiest(found)


def _added(rows: Rows, tenant_id: str) -> list[int]:
    """A row for a tenant that has none yet; the common one when there are too many."""
    if len(rows) >= TENANTS:
        tenant_id = ""
    row = rows.get(tenant_id)
    if row is None:
        row = rows[tenant_id] = [0] * (_BUCKETS + 3)
    return row


def _busy(tenant_id: str, row: list[int]) -> Busy:
    requests = sum(row[:_BUCKETS])
    return Busy(
        tenant_id, requests, row[_ERRORS], row[_REFUSED], slow_ms(row[:_BUCKETS]), round(row[_MICROSECONDS] / 1e6, 6)
    )


def slow_ms(buckets: list[int]) -> float | None:
    """The upper edge of the bucket of the 95th percentile in ms; None above the last edge."""
    wanted = 0.95 * sum(buckets)
    seen = 0
    for edge, count in zip(_EDGES, buckets, strict=False):
        seen += count
        if seen >= wanted:
            return edge * 1_000
    return None


def _busiest(found: list[Busy]) -> list[Busy]:
    """Those that are first in any of the orders, most requests first."""
    orders = (
        lambda b: b.requests,
        lambda b: float("inf") if b.slow_ms is None else b.slow_ms,
        lambda b: b.errors,
        lambda b: b.refused,
        lambda b: b.busy_seconds,
    )
    kept = {b.tenant_id: b for order in orders for b in sorted(found, key=order, reverse=True)[:KEPT]}
    return sorted(kept.values(), key=lambda b: (-b.requests, b.tenant_id))
