"""The drain: sealed segments into PostgreSQL, each in one transaction, each event counted once.

read → set aside what cannot be billed → insert by request_id and count exactly the new rows into the hourly and
daily rollups → audit row → COMMIT → unlink. A crash before COMMIT leaves the segment to the next drain; between
COMMIT and unlink it is replayed and inserts nothing. A lost COMMIT reply is the same case.

Set aside (`usage_quarantine`, with the cause): request ids whose time is outside [now − retention, now + 5 min],
tenants with an impossible name, numbers no request can have. Damaged bytes of a file go to `spool/quarantine/`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from psycopg.types.json import Jsonb

from shared import spool
from shared.control_plane import Connection, ControlPlane, rows
from shared.durable import unlink
from shared.errors import UnsafeTenantId
from shared.receipt import Receipt
from shared.settings import Settings
from shared.tenant import check_tenant_id
from shared.usage import UsageEvent

BATCH_EVENTS = 5_000
_AHEAD = timedelta(minutes=5)
_MAX_COUNT = 1_000_000  # of one request; far below what the columns hold


class Drained(Receipt, frozen=True):
    """What one segment held and what became of it; `events` = inserted + duplicates + quarantined."""

    segment: str
    events: int
    inserted: int
    duplicates: int
    quarantined: int
    corrupt_bytes: int
    age_seconds: float


def pending(settings: Settings) -> list[Path]:
    """Segments ready to drain, oldest first, those of dead workers included."""
    if not settings.spool_dir.is_dir():
        return []
    spool.adopt(settings.spool_dir)
    return spool.sealed(settings.spool_dir)


def drain_segment(control_plane: ControlPlane, settings: Settings, path: Path) -> Drained:
    """Drain one sealed segment and remove it. Raises `ControlPlaneUnavailable`; the segment stays then.

    A segment that another drainer has just removed counts as nothing.
    """
    try:
        content = spool.read(path)
    except FileNotFoundError:
        return Drained(path.stem, 0, 0, 0, 0, 0, 0.0)
    spool.quarantine(path, content)
    billable, refused = _sort(content.events, timedelta(days=settings.usage_retention_days))
    inserted = 0
    with control_plane.transaction() as connection:
        for batch in _batches(billable):
            inserted += _insert(connection, batch)
        for event, reason in refused:
            rows(
                connection,
                "usage_quarantine_insert",
                segment=path.stem,
                request_id=_quarantine_id(event),
                tenant_id=event.tenant_id.replace("\0", "\N{REPLACEMENT CHARACTER}"),
                reason=reason,
                event=Jsonb(_plain(event)),
            )
        drained = Drained(
            path.stem,
            len(content.events),
            inserted,
            len(billable) - inserted,
            len(refused),
            content.corrupt_bytes,
            max(0.0, time.time() - min((e.ts_us for e in content.events), default=int(time.time() * 1e6)) / 1e6),
        )
        rows(
            connection,
            "usage_segment_insert",
            segment=drained.segment,
            events=drained.events,
            inserted=drained.inserted,
            duplicates=drained.duplicates,
            quarantined=drained.quarantined,
            corrupt_bytes=drained.corrupt_bytes,
        )
    unlink(path)
    return drained


def drain_all(control_plane: ControlPlane, settings: Settings) -> Iterator[Drained]:
    """Drain what is there now, one segment at a time."""
    for path in pending(settings):
        yield drain_segment(control_plane, settings, path)


def _sort(events: list[UsageEvent], retention: timedelta) -> tuple[list[UsageEvent], list[tuple[UsageEvent, str]]]:
    now = datetime.now(UTC)
    earliest, latest = (now - retention).timestamp() * 1000, (now + _AHEAD).timestamp() * 1000
    billable: list[UsageEvent] = []
    refused: list[tuple[UsageEvent, str]] = []
    for event in events:
        if (reason := _unbillable(event, earliest, latest)) is None:
            billable.append(event)
        else:
            refused.append((event, reason))
    return billable, refused


def _unbillable(event: UsageEvent, earliest_ms: float, latest_ms: float) -> str | None:
    if len(event.request_id) != 16 or event.request_id[6] >> 4 != 7:
        return "request id is not a UUIDv7"
    minted_ms = int.from_bytes(event.request_id[:6], "big")
    if minted_ms < earliest_ms:
        return "older than the retention"
    if minted_ms > latest_ms:
        return "from the future"
    if abs(event.ts_us / 1000 - minted_ms) > 86_400_000:
        return "time and request id disagree"
    try:
        check_tenant_id(event.tenant_id)
    except UnsafeTenantId:
        return "impossible tenant id"
    if "\0" in event.route or not 0 <= event.status <= 999:
        return "impossible route or status"
    if not all(0 <= n <= _MAX_COUNT for n in (event.api_calls, event.search_queries, event.memories_created)):
        return "impossible count"
    return None


def _quarantine_id(event: UsageEvent) -> UUID:
    """The request id, or for one of the wrong length a digest of the whole event, so that none hides another."""
    if len(event.request_id) == 16:
        return UUID(bytes=event.request_id)
    return UUID(bytes=hashlib.sha256(spool.frame(event)).digest()[:16])


def _batches(events: list[UsageEvent]) -> Iterator[list[UsageEvent]]:
    ordered = sorted(events, key=lambda e: e.request_id)
    for start in range(0, len(ordered), BATCH_EVENTS):
        yield ordered[start : start + BATCH_EVENTS]


def _insert(connection: Connection, batch: list[UsageEvent]) -> int:
    [row] = rows(
        connection,
        "usage_insert",
        request_id=[UUID(bytes=e.request_id) for e in batch],
        tenant_id=[e.tenant_id for e in batch],
        route=[e.route for e in batch],
        status=[e.status for e in batch],
        api_calls=[e.api_calls for e in batch],
        search_queries=[e.search_queries for e in batch],
        memories_created=[e.memories_created for e in batch],
        ts=[datetime.fromtimestamp(e.ts_us / 1e6, UTC) for e in batch],
    )
    count: int = row["count"]
    return count


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
