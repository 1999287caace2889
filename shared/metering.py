"""The drain: sealed segments into PostgreSQL, none in more than one transaction, each event counted once.

read → set aside what cannot be billed → insert by request_id and count exactly the new rows into the hourly and
daily rollups → audit row → COMMIT → unlink. A crash before COMMIT leaves the segment to the next drain; between
COMMIT and unlink it is replayed and inserts nothing. A lost COMMIT reply is the same case.

A segment is first copied into the table as if all its events were new: then it knows its own sums. An event that is
there already fails the copy as a whole, and the segment goes the slow way: INSERT … ON CONFLICT DO NOTHING, and the
sums of what was new. A day without a partition fails it too; the partition is made and the segment tried again.

Set aside (`usage_quarantine`, with the cause): what `shared.billable` refuses, and events of a day whose events were
dropped (`shared.partitions`). They go to `spool/quarantine/` too, as do damaged bytes of a file: both raise the alert
and wait for a person. A segment that cannot be drained for a reason of its own waits in `spool/stuck/` and is tried
again (`shared.stuck`).

Small neighbours share a transaction, up to one full segment's size: after an outage at low load thousands of them wait,
and a transaction is seven round trips and a flush of the log (measured: 5.8 ms a COMMIT here). Each has its own audit
row, and none is split.

Dry run (`ENGRAM_USAGE_DRY_RUN`): everything but insert, see `shared.dry_run`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from uuid import UUID

from psycopg.errors import CheckViolation, DataError, IntegrityError, UniqueViolation
from psycopg.rows import DictRow

from shared import billable, dry_run, partitions, spool, stuck, usage_audit
from shared.billable import Refused
from shared.control_plane import Connection, ControlPlane, copy, rows
from shared.durable import fsync_path, unlink
from shared.log import get_logger
from shared.receipt import Receipt
from shared.settings import Settings
from shared.spool import SegmentContent
from shared.spool_dir import keep_refused
from shared.usage import UsageEvent
from shared.usage_audit import Drained
from shared.usage_batch import Batch, columns

BATCH_EVENTS = 5_000
_LOAD_BYTES, _LOAD_SEGMENTS = 2_000_000, 1_000  # about 20,000 events: a COMMIT and the rollups cost a third then
_FEW_SEGMENTS = 8
log = get_logger("metering")


class _Segment(Receipt, frozen=True):
    """A segment read and judged; `content` is None when another drainer has just removed the file."""

    path: Path
    content: SegmentContent | None
    batch: Batch
    refused: Refused


class _Load(Receipt, frozen=True):
    """Segments that go into one transaction; `batch` is None when one event is in two of them."""

    segments: list[_Segment]
    batch: Batch | None
    rows: bytes


def pending(settings: Settings) -> list[Path]:
    """Segments ready to drain, oldest first, those of dead workers and those to be tried again included."""
    if not settings.spool_dir.is_dir():
        return []
    spool.adopt(settings.spool_dir)
    stuck.give_back(settings.spool_dir)
    return spool.sealed(settings.spool_dir)


def drain(control_plane: ControlPlane, settings: Settings, paths: Iterable[Path]) -> Iterator[Drained]:
    """Drain segments in this order; what comes next is read and encoded while PostgreSQL has what was before.

    Raises `ControlPlaneUnavailable`. A segment with a fault of its own is set aside (`shared.stuck`), the others go on.
    """
    with _quick_handover(), ThreadPoolExecutor(1, thread_name_prefix="segment") as reader:
        following = None
        for group in _groups(paths, alone=settings.usage_dry_run):
            reading = reader.submit(_load, settings, group)
            if following is not None:
                yield from _unload(control_plane, settings, following.result())
            following = reading
        if following is not None:
            yield from _unload(control_plane, settings, following.result())


def drain_all(control_plane: ControlPlane, settings: Settings) -> Iterator[Drained]:
    """Drain what is there now."""
    return drain(control_plane, settings, pending(settings))


def _groups(paths: Iterable[Path], *, alone: bool) -> Iterator[list[Path]]:
    """Neighbours that together are no larger than a few full segments, by their size on disk."""
    group: list[Path] = []
    size = 0
    for path in paths:
        try:
            this = path.stat().st_size
        except OSError:  # gone, or a fault that reading will tell
            this = 0
        if group and (alone or size + this > _LOAD_BYTES or len(group) == _LOAD_SEGMENTS):
            yield group
            group, size = [], 0
        group.append(path)
        size += this
    if group:
        yield group


def _load(settings: Settings, paths: list[Path]) -> _Load:
    segments = []
    for path in paths:
        try:
            segments.append(_read(settings, path))
        except OSError as e:
            stuck.put(path, e)
    if len(segments) == 1:
        return _Load(segments, segments[0].batch, segments[0].batch.copy_rows())
    batch = Batch.joined(segment.batch for segment in segments)
    if len(batch.events) != sum(len(segment.batch.events) for segment in segments):
        return _Load(segments, None, b"")
    return _Load(segments, batch, batch.copy_rows())


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
        return _Segment(path, None, Batch.of([]), [])
    batch, refused = billable.sort(content.events, timedelta(days=settings.usage_retention_days))
    return _Segment(path, content, batch, refused)


def _unload(control_plane: ControlPlane, settings: Settings, load: _Load) -> Iterator[Drained]:
    """All in one transaction; where that cannot be, each segment by itself, which finds the one at fault."""
    if len(load.segments) > 1 and load.batch is not None:
        try:
            drained = _finish_together(control_plane, settings, load.segments, load.batch, load.rows)
        except (OSError, IntegrityError, DataError):
            pass
        else:
            yield from drained
            return
    for segment in load.segments:
        as_rows = load.rows if len(load.segments) == 1 else segment.batch.copy_rows()
        try:
            drained = [_finish(control_plane, settings, segment, as_rows)]
        except (OSError, IntegrityError, DataError) as e:
            stuck.put(segment.path, e)
        else:
            yield from drained


def _finish_together(
    control_plane: ControlPlane, settings: Settings, segments: list[_Segment], batch: Batch, as_rows: bytes
) -> list[Drained]:
    """Small segments: a COMMIT and seven round trips for all of them. No event of `batch` is in two of them."""
    for segment in segments:
        if segment.content is not None:
            spool.quarantine(segment.path, segment.content)
            keep_refused(segment.path, segment.refused)
    try:
        drained = _commit_together(control_plane, settings, segments, batch, as_rows)
    except UniqueViolation:
        if len(segments) <= _FEW_SEGMENTS:  # the others of them can still be copied, each by itself
            raise
        drained = _commit_together(control_plane, settings, segments, batch, None)
    for segment in segments:
        segment.path.unlink(missing_ok=True)
    fsync_path(settings.spool_dir)
    return drained


def _commit_together(
    control_plane: ControlPlane, settings: Settings, segments: list[_Segment], batch: Batch, as_rows: bytes | None
) -> list[Drained]:
    with control_plane.transaction() as connection:
        new = _count_in(connection, batch, as_rows)
        ids = None if new is batch else {UUID(bytes=e.request_id) for e in new.events}
        drained = []
        for segment in segments:
            if segment.content is not None:
                usage_audit.set_aside(connection, segment.path, segment.refused)
                own = segment.batch if ids is None else segment.batch.only(ids)
                drained.append(usage_audit.of(segment.path, segment.content, segment.batch, segment.refused, own))
        usage_audit.write(connection, settings.machine_id, drained)
    return drained


def _finish(control_plane: ControlPlane, settings: Settings, segment: _Segment, as_rows: bytes) -> Drained:
    """What could not be undone comes last: damage is kept, then everything is committed, then the file goes."""
    if segment.content is None:
        return usage_audit.nothing(segment.path)
    if settings.usage_dry_run:
        return dry_run.examine(control_plane, segment.path, segment.content, segment.batch, segment.refused)
    spool.quarantine(segment.path, segment.content)
    by_copy, ensured = True, False
    while True:
        keep_refused(segment.path, segment.refused)
        try:
            with control_plane.transaction() as connection:
                new = _count_in(connection, segment.batch, as_rows if by_copy else None)
                usage_audit.set_aside(connection, segment.path, segment.refused)
                drained = usage_audit.of(segment.path, segment.content, segment.batch, segment.refused, new)
                usage_audit.write(connection, settings.machine_id, [drained])
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
            as_rows = segment.batch.copy_rows()
    unlink(segment.path)
    return drained


def _count_in(connection: Connection, batch: Batch, as_rows: bytes | None) -> Batch:
    """Insert what is new and add it to the rollups; what that was. `as_rows`: all of it must be new."""
    if not batch.events:
        return batch
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
    return new


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


def _without(segment: _Segment, days: set[date]) -> _Segment:
    """The segment when the events of these days cannot be billed any more."""
    if not days:
        return segment
    late = [e for e in segment.batch.events if partitions.day_of(e.request_id) in days]
    kept = {e.request_id for e in segment.batch.events} - {e.request_id for e in late}
    batch = segment.batch.only({UUID(bytes=i) for i in kept})
    refused = [*segment.refused, *((e, "the events of its day were dropped") for e in late)]
    return _Segment(segment.path, segment.content, batch, refused)
