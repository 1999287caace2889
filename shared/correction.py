"""What a person may do to usage, each with a reason and a row in `usage_corrections`: nobody edits a bill unseen.

repair   the rollups of named days anew from the events of those days. Not when the events themselves are in doubt:
         a day that was dropped, or that does not hold what the drains say they inserted.
import   events from a file (a backfill, a segment from another machine) into this machine's spool. They are drained
         like any others, so the rules of what can be billed hold and each event counts once, however often its file
         is imported.

A file is a segment, or JSON lines:
    {"tenant_id": …, "route": …, "status": …, "ts": …, "request_id"?: …, "api_calls"?: …, "search_queries"?: …,
     "memories_created"?: …}
`ts` is ISO 8601 with an offset. Counters that are not given are those of the route and status (`shared.usage`).
Without a `request_id` a line gets one made of its time and its content, so the same line is the same event again; of
two equal lines in one file the second is another event.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, date, datetime
from pathlib import Path
from uuid import UUID

import msgspec
from psycopg.types.json import Jsonb

from shared import day_books, partitions, spool, usage
from shared.control_plane import Connection, ControlPlane, rows
from shared.durable import fsync_path, write_file
from shared.errors import Permanent, Refused
from shared.log import get_logger
from shared.receipt import Receipt
from shared.settings import Settings
from shared.usage import UsageEvent

_SEGMENT_EVENTS = 5_000
_LEFTOVER_SECONDS = 3_600.0
log = get_logger("correction")


class Repaired(Receipt, frozen=True):
    """`before` are the day's books from before; `applied` is False when it was only looked at."""

    day: date
    before: day_books.DayBooks
    hourly_rows: int
    daily_rows: int
    applied: bool
    correction_id: int | None


class Imported(Receipt, frozen=True):
    events: int
    tenants: int
    first: datetime
    last: datetime
    segments: list[str]
    correction_id: int | None


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    tenant_id: str
    route: str
    status: int
    ts: datetime
    request_id: UUID | None = None
    api_calls: int | None = None
    search_queries: int | None = None
    memories_created: int | None = None


_decode = msgspec.json.Decoder(_Line).decode


def repair(control_plane: ControlPlane, day: date, *, reason: str, requested_by: str, apply: bool) -> Repaired:
    """Make the rollups of a day what its events say. Raises `Refused` when the events are in doubt."""
    before = day_books.of_day(control_plane, day)
    if before is None:
        raise Permanent(f"{day}: there is no usage of that day")
    if before.dropped:
        raise Refused(f"{day}: its single events were dropped, the rollups are the record")
    if partitions.states(control_plane).get(day) != "attached":
        raise Refused(f"{day}: its partition is not attached (the retention flow is at it)")
    if before.audited not in (None, before.events):
        raise Refused(
            f"{day}: the drains inserted {before.audited} events, {before.events} are there: bring them back first"
        )
    if not apply:
        return Repaired(day, before, 0, 0, False, None)
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    with control_plane.transaction(maintenance=True) as connection:
        # Drains wait here. One that has inserted events but not yet added them adds them after this.
        connection.execute("LOCK TABLE usage_hourly, usage_daily IN SHARE ROW EXCLUSIVE MODE")
        hourly = len(rows(connection, "usage_rollups_repair_hourly", day=midnight))
        daily = len(rows(connection, "usage_rollups_repair_daily", day=midnight))
        details = {"day": str(day), "hourly_rows": hourly, "daily_rows": daily, "before": msgspec.to_builtins(before)}
        correction_id = _record(connection, "repair", reason, requested_by, details)
    log.info("usage_repaired", day=str(day), hourly_rows=hourly, daily_rows=daily, correction_id=correction_id)
    return Repaired(day, before, hourly, daily, True, correction_id)


def read(path: Path) -> list[UsageEvent]:
    """The events of a file. Raises `Permanent` that names the first line, or the damage, that cannot be read."""
    try:
        with path.open("rb") as file:
            is_segment = file.read(len(spool.MAGIC)) == spool.MAGIC
        if is_segment:
            content = spool.read(path)
            if content.damage:
                raise Permanent(
                    f"{path}: {content.corrupt_bytes} bytes are damaged; the whole frames are not taken alone"
                )
            return content.events
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise Permanent(f"{path}: {e.strerror}") from e
    seen: Counter[bytes] = Counter()
    events = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            events.append(_event(_decode(line), line.strip(), seen[line.strip()]))
        except (msgspec.MsgspecError, ValueError) as e:
            raise Permanent(f"{path}, line {number}: {e}") from e
        seen[line.strip()] += 1
    return events


def bring_in(
    control_plane: ControlPlane, settings: Settings, path: Path, *, reason: str, requested_by: str, apply: bool
) -> Imported:
    """Put a file's events into this machine's spool. The record is written before, so nothing enters without one.

    Raises `Refused` when the spool has no room for them.
    """
    events = read(path)
    if not events:
        raise Permanent(f"{path}: there are no events in it")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    stamp = time.time_ns() // 1000
    portions = [events[n : n + _SEGMENT_EVENTS] for n in range(0, len(events), _SEGMENT_EVENTS)]
    encoded = [spool.MAGIC + b"".join(map(spool.frame, portion)) for portion in portions]
    names = [f"{stamp + n:016d}-0-{digest[:8]}" for n in range(len(portions))]  # 0: written by no worker
    room_bytes = settings.usage_spool_limit_bytes - spool.survey(settings.spool_dir).size_bytes
    if (size_bytes := sum(map(len, encoded))) >= room_bytes:
        raise Refused(
            f"{path}: {size_bytes} bytes, and the spool has room for {max(0, room_bytes)} before writes are refused"
        )
    times = [datetime.fromtimestamp(e.ts_us / 1e6, UTC) for e in events]
    tenants = len({e.tenant_id for e in events})
    if not apply:
        return Imported(len(events), tenants, min(times), max(times), [], None)
    details = {"file": path.name, "sha256": digest, "events": len(events), "segments": names}
    with control_plane.transaction() as connection:
        correction_id = _record(connection, "import", reason, requested_by, details)
    settings.spool_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    staging = settings.spool_dir / "import"  # the spool may be a disk of its own
    staging.mkdir(exist_ok=True, mode=0o700)
    for leftover in staging.glob("*.seg"):  # of an import that was killed, to be done again
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                leftover.unlink()
    for name, data in zip(names, encoded, strict=True):
        staged = staging / f"{name}.seg"
        write_file(staged, data)
        os.rename(staged, settings.spool_dir / staged.name)
    fsync_path(settings.spool_dir)
    log.info("usage_imported", events=len(events), segments=names, correction_id=correction_id)
    return Imported(len(events), tenants, min(times), max(times), names, correction_id)


def _event(line: _Line, raw: bytes, nth: int) -> UsageEvent:
    if line.ts.tzinfo is None:
        raise ValueError("`ts` has no offset")
    ts_us = int(line.ts.timestamp() * 1e6)
    if line.request_id is not None:
        key = line.request_id.bytes
    else:
        tail = bytearray(hashlib.sha256(b"%d\n%s" % (nth, raw)).digest()[:10])
        tail[0], tail[2] = 0x70 | (tail[0] & 0x0F), 0x80 | (tail[2] & 0x3F)
        key = (ts_us // 1000).to_bytes(6, "big") + tail
    counted = usage.count(line.route, line.status, line.memories_created or 0, line.search_queries or 0)
    given = (line.api_calls, line.search_queries, line.memories_created)
    a, s, m = (own if own is not None else of_route for own, of_route in zip(given, counted, strict=True))
    return UsageEvent(key, line.tenant_id, line.route, line.status, a, s, m, ts_us)


def _record(connection: Connection, kind: str, reason: str, requested_by: str, details: dict[str, object]) -> int:
    [row] = rows(
        connection,
        "usage_correction_insert",
        kind=kind,
        reason=reason,
        requested_by=requested_by,
        details=Jsonb(details),
    )
    correction_id: int = row["correction_id"]
    return correction_id
