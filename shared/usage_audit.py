"""What became of each drained segment, written in the transaction that drained it.

`usage_segments` is the record: how many events it held, how many were new (by the UTC day of their ids), there already,
or set aside. The sum of `by_day` over all segments is what `usage_events` must hold of a day (`shared.reconcile`).
`usage_held` says how many of each tenant and day it held, whatever became of them, to be compared with what gateways
counted. `usage_quarantine` keeps the events themselves that cannot be billed, with the cause.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from pathlib import Path
from uuid import UUID

import msgspec
from psycopg.types.json import Jsonb

from shared import partitions
from shared.billable import Refused
from shared.control_plane import Connection, rows
from shared.receipt import Receipt
from shared.spool import SegmentContent, frame
from shared.usage import UsageEvent
from shared.usage_batch import Batch

Held = dict[str, dict[str, int]]  # by UTC day and tenant


class Drained(Receipt, frozen=True):
    """What one segment held and what became of it; `events` = inserted + duplicates + quarantined.

    In a dry run the same numbers say what would have become of it; `by_day` is empty then.
    """

    segment: str
    events: int
    inserted: int
    duplicates: int
    quarantined: int
    corrupt_bytes: int
    age_seconds: float
    dry_run: bool = False
    by_day: dict[str, int] = msgspec.field(default_factory=dict)
    held: Held = msgspec.field(default_factory=dict)


def of(path: Path, content: SegmentContent, batch: Batch, refused: Refused, new: Batch) -> Drained:
    """`batch` and `refused` are all of the segment, `new` its events that were not there before."""
    inserted = len(new.events)
    oldest_us = min((e.ts_us for e in content.events), default=time.time_ns() // 1000)
    return Drained(
        path.stem,
        len(content.events),
        inserted,
        len(content.events) - len(refused) - inserted,
        len(refused),
        content.corrupt_bytes,
        max(0.0, time.time() - oldest_us / 1e6),
        by_day={str(day): n for day, n in by_day(new).items()},
        held=held(batch, refused),
    )


def nothing(path: Path) -> Drained:
    """Of a segment that another drainer has just removed."""
    return Drained(path.stem, 0, 0, 0, 0, 0, 0.0)


def by_day(batch: Batch) -> dict[date, int]:
    """How many events of each UTC day."""
    if not batch.events:
        return {}
    first, last = (partitions.day_of(batch.events[at].request_id) for at in (0, -1))
    if first == last:
        return {first: len(batch.events)}
    return dict(Counter(partitions.day_of(e.request_id) for e in batch.events))


def held(batch: Batch, refused: Refused) -> Held:
    """How many requests, by day and tenant. An id of no calendar is of no gateway, and left out."""
    found: dict[str, Counter[str]] = {}
    days = by_day(batch)
    if len(days) == 1:
        of_day = found[str(next(iter(days)))] = Counter()
        for kind, n in batch.tally.items():
            of_day[kind[0]] += n
    else:
        for event in batch.events:
            found.setdefault(str(partitions.day_of(event.request_id)), Counter())[event.tenant_id] += 1
    for event in {event.request_id: event for event, _ in refused}.values():
        if len(event.request_id) == 16 and "\0" not in event.tenant_id:
            with suppress(ValueError, OverflowError):
                found.setdefault(str(partitions.day_of(event.request_id)), Counter())[event.tenant_id] += 1
    return {day: dict(tenants) for day, tenants in found.items()}


def write(connection: Connection, machine_id: str, drained: Iterable[Drained]) -> None:
    """A replay of a segment leaves the first record: what it adds is written under a name of its own."""
    found = list(drained)
    rows(
        connection,
        "usage_segment_insert",
        machine_id=machine_id,
        segment=[d.segment for d in found],
        by_day=[Jsonb(d.by_day) for d in found],
        held=[Jsonb(d.held) for d in found],
        **{
            name: [getattr(d, name) for d in found]
            for name in ("events", "inserted", "duplicates", "quarantined", "corrupt_bytes")
        },
    )


def set_aside(connection: Connection, path: Path, refused: Refused) -> None:
    """All of them in one statement: a clock that is wrong makes every event of a machine one of these."""
    if refused:
        rows(
            connection,
            "usage_quarantine_insert",
            segment=path.stem,
            request_id=[_quarantine_id(event) for event, _ in refused],
            tenant_id=[event.tenant_id.replace("\0", "\N{REPLACEMENT CHARACTER}") for event, _ in refused],
            reason=[reason for _, reason in refused],
            event=[Jsonb(_plain(event)) for event, _ in refused],
        )


def _quarantine_id(event: UsageEvent) -> UUID:
    """The request id, or for one of the wrong length a digest of the whole event, so that none hides another."""
    if len(event.request_id) == 16:
        return UUID(bytes=event.request_id)
    return UUID(bytes=hashlib.sha256(frame(event)).digest()[:16])


def _plain(event: UsageEvent) -> dict[str, object]:
    return {
        "request_id": event.request_id.hex(),
        "route": event.route.replace("\0", "\N{REPLACEMENT CHARACTER}"),
        "status": event.status,
        "api_calls": event.api_calls,
        "search_queries": event.search_queries,
        "memories_created": event.memories_created,
        "ts_us": event.ts_us,
    }
