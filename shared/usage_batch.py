"""Usage events on their way into PostgreSQL: sorted, each id once, as rows for COPY and as sums for the rollups.

An event belongs to the hour and day, UTC, in which its id was minted: the partitions go by the id, so the rollups do
too, and the two can be compared day by day.

What costs time here is done once per kind of event, not once per event: events that differ only in id and time share
the encoded middle of their row and are counted together (5,000 events of 100 tenants are about 200 kinds).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Collection, Iterable
from datetime import UTC, date, datetime
from itertools import groupby, pairwise
from operator import attrgetter
from typing import NamedTuple
from uuid import UUID

from shared.usage import Counters, UsageEvent

_HOUR_MS = 3_600_000
_KIND = attrgetter("tenant_id", "route", "status", "api_calls", "search_queries", "memories_created")
_ID, _TIME_US = attrgetter("request_id"), attrgetter("ts_us")
Kind = tuple[str, str, int, int, int, int]
Sums = dict[tuple[str, datetime], Counters]  # by tenant and hour

# The binary format of COPY: a header, per row the number of fields and each field with its length, an end mark.
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_ROW = struct.pack(">hi", 8, 16)  # eight fields, the first a uuid
_NUMBERS = struct.Struct(">ihiiiiiii").pack
_TIME = struct.Struct(">q").pack
_END = b"\xff\xff"
_POSTGRES_EPOCH_US = 946_684_800_000_000  # 2000-01-01 UTC


class Batch(NamedTuple):
    """`events` are sorted by id, each id once; `ids`, `times_us` and `kinds` are theirs, in the same order.

    Column by column, because every step below is then a loop of C.
    """

    events: list[UsageEvent]
    ids: list[bytes]
    times_us: list[int]
    kinds: list[Kind]
    tally: Counter[Kind]

    @classmethod
    def of(cls, events: Iterable[UsageEvent]) -> Batch:
        ordered = sorted(events, key=_ID)
        ids = list(map(_ID, ordered))
        if len(set(ids)) != len(ids):
            ordered = list(dict(zip(ids, ordered, strict=True)).values())  # of two with one id the last stays
            ids = list(map(_ID, ordered))
        kinds = list(map(_KIND, ordered))
        return cls(ordered, ids, list(map(_TIME_US, ordered)), kinds, Counter(kinds))

    @classmethod
    def joined(cls, batches: Iterable[Batch]) -> Batch:
        """One batch of all their events; cheap when each begins where the one before ended."""
        ordered = sorted((batch for batch in batches if batch.ids), key=lambda batch: batch.ids[0])
        if any(before.ids[-1] >= after.ids[0] for before, after in pairwise(ordered)):
            return cls.of(event for batch in ordered for event in batch.events)
        joined = cls([], [], [], [], Counter())
        for batch in ordered:
            joined.events.extend(batch.events)
            joined.ids.extend(batch.ids)
            joined.times_us.extend(batch.times_us)
            joined.kinds.extend(batch.kinds)
            joined.tally.update(batch.tally)
        return joined

    def only(self, request_ids: Collection[UUID]) -> Batch:
        wanted = {request_id.bytes for request_id in request_ids}
        return Batch.of(e for e in self.events if e.request_id in wanted)

    def days(self) -> set[date]:
        """The UTC days its ids were minted in."""
        return {_time_of(hour).date() for hour in set(map(_hour_of, self.ids))}

    def copy_rows(self) -> bytes:
        """The events as one message of `COPY … (FORMAT BINARY)`, in the columns of the query `usage_copy`."""
        middle = {kind: _middle(kind) for kind in self.tally}
        pieces = [_ROW] * (4 * len(self.events))
        pieces[1::4] = self.ids
        pieces[2::4] = map(middle.__getitem__, self.kinds)
        pieces[3::4] = map(_TIME, [time_us - _POSTGRES_EPOCH_US for time_us in self.times_us])
        return b"".join((_HEADER, *pieces, _END))

    def sums(self) -> Sums:
        """What these events add to the rollups."""
        if not self.events:
            return {}
        first, last = _hour_of(self.ids[0]), _hour_of(self.ids[-1])
        if first == last:
            return _sums(first, self.tally)
        found: Sums = {}
        for hour, pairs in groupby(zip(self.ids, self.kinds, strict=True), key=lambda pair: _hour_of(pair[0])):
            found |= _sums(hour, Counter(kind for _, kind in pairs))
        return found


def columns(sums: Sums) -> dict[str, list[object]]:
    """The parameters of `usage_hourly_add` and `usage_daily_add`."""
    keys = sorted(sums)
    return {
        "tenant_id": [tenant_id for tenant_id, _ in keys],
        "bucket": [bucket for _, bucket in keys],
        **{name: [getattr(sums[key], name) for key in keys] for name in Counters._fields},
    }


def _hour_of(request_id: bytes) -> int:
    return int.from_bytes(request_id[:6], "big") // _HOUR_MS


def _time_of(hour: int) -> datetime:
    return datetime.fromtimestamp(hour * 3600, UTC)


def _sums(hour: int, tally: Counter[Kind]) -> Sums:
    totals: dict[str, list[int]] = {}
    for (tenant_id, _, _, api_calls, search_queries, memories_created), n in tally.items():
        total = totals.setdefault(tenant_id, [0, 0, 0])
        total[0] += n * api_calls
        total[1] += n * search_queries
        total[2] += n * memories_created
    bucket = _time_of(hour)
    return {(tenant_id, bucket): Counters(*total) for tenant_id, total in totals.items()}


def _middle(kind: Kind) -> bytes:
    """A row between its id and its time; the length of the time included."""
    tenant_id, route, status, api_calls, search_queries, memories_created = kind
    return (
        _text(tenant_id) + _text(route) + _NUMBERS(2, status, 4, api_calls, 4, search_queries, 4, memories_created, 8)
    )


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">i", len(data)) + data
