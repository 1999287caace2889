"""The drain: sealed segments into PostgreSQL, each in one transaction, each event counted once.

read → set aside what cannot be billed → insert by request_id and count exactly the new rows into the hourly and
daily rollups → audit row → COMMIT → unlink. A crash before COMMIT leaves the segment to the next drain; between
COMMIT and unlink it is replayed and inserts nothing. A lost COMMIT reply is the same case.

A segment is first copied into the table as if all its events were new: then it knows its own sums. An event that is
there already fails the copy as a whole, and the segment goes the slow way: INSERT … ON CONFLICT DO NOTHING, and the
sums of what was new. A day without a partition fails it too; the partition is made and the segment tried again.

Set aside (`usage_quarantine`, with the cause): what `shared.billable` refuses, and events of a day whose events were
dropped (`shared.partitions`). Damaged bytes of a file go to `spool/quarantine/`.

Dry run (`ENGRAM_USAGE_DRY_RUN`): everything but insert. A segment is read, judged and counted against what PostgreSQL
holds, the counts are logged and reported, nothing is written there, and the file goes to `spool/dry-run/`. There it
stays, whatever the setting is later, until somebody decides: `bill_dry_runs` gives it back to the spool, and it is
drained like any other, each event once (older than the retention by then: into the quarantine); or it is removed by
hand. Every metering run reports how many segments lie there.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from uuid import UUID

from psycopg.errors import CheckViolation, UniqueViolation
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from shared import billable, partitions, spool
from shared.billable import Refused
from shared.control_plane import Connection, ControlPlane, copy, rows
from shared.durable import fsync_path, unlink
from shared.log import get_logger
from shared.receipt import Receipt
from shared.settings import Settings
from shared.spool import SegmentContent
from shared.usage import UsageEvent
from shared.usage_batch import Batch, columns

BATCH_EVENTS = 5_000
_DRY_RUN = "dry-run"
log = get_logger("metering")


class Drained(Receipt, frozen=True):
    """What one segment held and what became of it; `events` = inserted + duplicates + quarantined.

    In a dry run the same numbers say what would have become of it.
    """

    segment: str
    events: int
    inserted: int
    duplicates: int
    quarantined: int
    corrupt_bytes: int
    age_seconds: float
    dry_run: bool = False


class _Segment(Receipt, frozen=True):
    """A segment read and judged; `content` is None when another drainer has just removed the file."""

    path: Path
    content: SegmentContent | None
    batch: Batch
    refused: Refused
    rows: bytes


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
    return _finish(control_plane, settings, _read(settings, path))


def drain(control_plane: ControlPlane, settings: Settings, paths: Iterable[Path]) -> Iterator[Drained]:
    """Drain segments in this order, one at a time; the next is read and encoded while PostgreSQL has this one."""
    with _quick_handover(), ThreadPoolExecutor(1, thread_name_prefix="segment") as reader:
        following = None
        for path in paths:
            reading = reader.submit(_read, settings, path)
            if following is not None:
                yield _finish(control_plane, settings, following.result())
            following = reading
        if following is not None:
            yield _finish(control_plane, settings, following.result())


def drain_all(control_plane: ControlPlane, settings: Settings) -> Iterator[Drained]:
    """Drain what is there now."""
    return drain(control_plane, settings, pending(settings))


@contextmanager
def _quick_handover() -> Iterator[None]:
    """By default a thread that computes keeps the interpreter for 5 ms, and the one that only passes results on to
    PostgreSQL waits as long after each of them: a drain was a third slower."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _read(settings: Settings, path: Path) -> _Segment:
    try:
        content = spool.read(path)
    except FileNotFoundError:
        return _Segment(path, None, Batch.of([]), [], b"")
    batch, refused = billable.sort(content.events, timedelta(days=settings.usage_retention_days))
    return _Segment(path, content, batch, refused, batch.copy_rows())


def _finish(control_plane: ControlPlane, settings: Settings, segment: _Segment) -> Drained:
    """What could not be undone comes last: damage is kept, then everything is committed, then the file goes."""
    if segment.content is None:
        return Drained(segment.path.stem, 0, 0, 0, 0, 0, 0.0)
    if settings.usage_dry_run:
        return _set_apart(control_plane, segment, segment.content)
    spool.quarantine(segment.path, segment.content)
    by_copy, ensured = True, False
    while True:
        try:
            with control_plane.transaction() as connection:
                inserted = _count_in(connection, segment.batch, segment.rows if by_copy else None)
                _set_aside(connection, segment.path, segment.refused)
                drained = _drained(segment, segment.content, inserted)
                _audit(connection, drained)
            break
        except UniqueViolation:
            if not by_copy:
                raise
            by_copy = False
        except CheckViolation:  # a day without a partition; the only check these tables have
            if ensured:
                raise
            ensured = True
            gone = partitions.ensure(control_plane, segment.batch.days())
            segment = _without(segment, gone)
    unlink(segment.path)
    return drained


def _count_in(connection: Connection, batch: Batch, as_rows: bytes | None) -> int:
    """Insert what is new and add it to the rollups; how many that were. `as_rows`: all of it must be new."""
    if not batch.events:
        return 0
    if as_rows is not None:
        copy(connection, "usage_copy", as_rows)
        new = batch
    else:
        found = (row["request_id"] for portion in _portions(batch.events) for row in _insert(connection, portion))
        new = batch.only(set(found))
    if new.events:
        sums = columns(new.sums())
        rows(connection, "usage_hourly_add", **sums)
        rows(connection, "usage_daily_add", **sums)
    return len(new.events)


def _portions(events: list[UsageEvent]) -> Iterator[list[UsageEvent]]:
    for start in range(0, len(events), BATCH_EVENTS):
        yield events[start : start + BATCH_EVENTS]


def _insert(connection: Connection, events: list[UsageEvent]) -> list[DictRow]:
    return rows(
        connection,
        "usage_insert",
        request_id=[UUID(bytes=e.request_id) for e in events],
        tenant_id=[e.tenant_id for e in events],
        route=[e.route for e in events],
        status=[e.status for e in events],
        api_calls=[e.api_calls for e in events],
        search_queries=[e.search_queries for e in events],
        memories_created=[e.memories_created for e in events],
        ts=[datetime.fromtimestamp(e.ts_us / 1e6, UTC) for e in events],
    )


def _set_aside(connection: Connection, path: Path, refused: Refused) -> None:
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


def _without(segment: _Segment, days: set[date]) -> _Segment:
    """The segment when the events of these days cannot be billed any more."""
    if not days:
        return segment
    late = [e for e in segment.batch.events if partitions.day_of(e.request_id) in days]
    kept = {e.request_id for e in segment.batch.events} - {e.request_id for e in late}
    batch = segment.batch.only({UUID(bytes=i) for i in kept})
    refused = [*segment.refused, *((e, "the events of its day were dropped") for e in late)]
    return _Segment(segment.path, segment.content, batch, refused, batch.copy_rows())


def _drained(segment: _Segment, content: SegmentContent, inserted: int, *, dry_run: bool = False) -> Drained:
    oldest_us = min((e.ts_us for e in content.events), default=time.time_ns() // 1000)
    return Drained(
        segment.path.stem,
        len(content.events),
        inserted,
        len(content.events) - len(segment.refused) - inserted,
        len(segment.refused),
        content.corrupt_bytes,
        max(0.0, time.time() - oldest_us / 1e6),
        dry_run,
    )


def _audit(connection: Connection, drained: Drained) -> None:
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


def _set_apart(control_plane: ControlPlane, segment: _Segment, content: SegmentContent) -> Drained:
    """Dry run: count what the segment would have added, keep the file beside the spool."""
    known = 0
    if events := segment.batch.events:
        ids = [UUID(bytes=e.request_id) for e in events]
        [row] = control_plane.rows("usage_known", request_id=ids, first=ids[0], last=ids[-1])
        known = row["count"]
    drained = _drained(segment, content, len(events) - known, dry_run=True)
    directory = segment.path.parent / _DRY_RUN
    directory.mkdir(exist_ok=True, mode=0o700)
    try:
        os.replace(segment.path, directory / segment.path.name)
    except FileNotFoundError:  # another drainer was here first
        return Drained(segment.path.stem, 0, 0, 0, 0, 0, 0.0, True)
    fsync_path(directory)
    fsync_path(segment.path.parent)
    reasons = sorted({reason for _, reason in segment.refused})
    log.info("usage_dry_run", **{f: getattr(drained, f) for f in Drained.__struct_fields__}, refused_because=reasons)
    return drained


def dry_run_segments(settings: Settings) -> list[Path]:
    """Segments that dry runs examined: neither billed nor forgotten."""
    return spool.sealed(settings.spool_dir / _DRY_RUN)


def bill_dry_runs(settings: Settings) -> int:
    """Give what dry runs examined back to the spool; how many segments. The next drain bills each event once."""
    found = dry_run_segments(settings)
    for path in found:
        os.replace(path, settings.spool_dir / path.name)
    if found:
        fsync_path(settings.spool_dir)
        fsync_path(settings.spool_dir / _DRY_RUN)
    return len(found)


def _quarantine_id(event: UsageEvent) -> UUID:
    """The request id, or for one of the wrong length a digest of the whole event, so that none hides another."""
    if len(event.request_id) == 16:
        return UUID(bytes=event.request_id)
    return UUID(bytes=hashlib.sha256(spool.frame(event)).digest()[:16])


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
