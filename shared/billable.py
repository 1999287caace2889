"""Which usage events can be billed: ids and times of now, names and numbers a request can have.

Ids outside [now − retention, now + 5 min] have no partition, and one of them would fail the whole segment; the rest
would fail a column or a customer. What is refused is kept with its cause (`usage_quarantine`), never away.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from shared.errors import UnsafeTenantId
from shared.tenant import check_tenant_id
from shared.usage import UsageEvent
from shared.usage_batch import Batch, Kind

_AHEAD = timedelta(minutes=5)
_MAX_COUNT = 1_000_000  # of one request; far below what the columns hold
_DAY_MS = 86_400_000
_VERSION_7 = frozenset(range(0x70, 0x80))  # values of a UUID's seventh byte
Refused = list[tuple[UsageEvent, str]]


def sort(events: list[UsageEvent], retention: timedelta) -> tuple[Batch, Refused]:
    """The events to bill, and the others with the cause."""
    now = datetime.now(UTC)
    earliest_ms, latest_ms = (now - retention).timestamp() * 1000, (now + _AHEAD).timestamp() * 1000
    batch = Batch.of(events)
    if _all_billable(batch, earliest_ms, latest_ms):
        return batch, []
    billable: list[UsageEvent] = []
    refused: Refused = []
    for event in events:
        if (reason := _unbillable(event, earliest_ms, latest_ms)) is None:
            billable.append(event)
        else:
            refused.append((event, reason))
    return Batch.of(billable), refused


def _all_billable(batch: Batch, earliest_ms: float, latest_ms: float) -> bool:
    """The same judgement over a whole batch, which is what nearly every segment needs: extremes, and each kind once."""
    if not batch.events:
        return True
    ids, times_us = batch.ids, batch.times_us
    if set(map(len, ids)) != {16} or not _VERSION_7.issuperset(b"".join(ids)[6::16]):
        return False
    first_ms, last_ms = _minted_ms(ids[0]), _minted_ms(ids[-1])
    return (
        earliest_ms <= first_ms
        and last_ms <= latest_ms
        and max(max(times_us) / 1000 - first_ms, last_ms - min(times_us) / 1000) <= _DAY_MS
        and _impossible(batch.tally) is None
    )


def _unbillable(event: UsageEvent, earliest_ms: float, latest_ms: float) -> str | None:
    if len(event.request_id) != 16 or event.request_id[6] >> 4 != 7:
        return "request id is not a UUIDv7"
    minted_ms = _minted_ms(event.request_id)
    if minted_ms < earliest_ms:
        return "older than the retention"
    if minted_ms > latest_ms:
        return "from the future"
    if abs(event.ts_us / 1000 - minted_ms) > _DAY_MS:
        return "time and request id disagree"
    return _impossible(Batch.of([event]).tally)


def _impossible(kinds: Iterable[Kind]) -> str | None:
    for tenant_id, route, status, *counts in kinds:
        try:
            check_tenant_id(tenant_id)
        except UnsafeTenantId:
            return "impossible tenant id"
        if "\0" in route or not 0 <= status <= 999:
            return "impossible route or status"
        if not all(0 <= n <= _MAX_COUNT for n in counts):
            return "impossible count"
    return None


def _minted_ms(request_id: bytes) -> int:
    return int.from_bytes(request_id[:6], "big")
