"""Dry run (`ENGRAM_USAGEDIRECTORY`): everything a drain does but insert.

A segment is read, judged and counted against what PostgreSQL holds, the counts are logged and reported, nothing is
written there, and the file goes to `spool/dry-run/`. There it stays, whatever the setting is later, until somebody
decides: `bill` gives it back to the spool, and it is drained like any other, each event once (older than the retention
by then: into the quarantine); `discard` removes it, with a record of who and why, so that the books know where its
events are. Every metering run and every reconcile says how much lies there.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import msgspec
from psycopg.types.json import Jsonb

from shared import billable, spool, usage_audit
from shared.billable import Refused
from shared.control_plane import ControlPlane, rows
from shared.durable import fsync_path
from shared.log import get_logger
from shared.receipt import Receipt
from shared.settings import Settings
from shared.spool import SegmentContent
from shared.usage_audit import Drained
from shared.usage_batch import Batch

DIRECTORY = "dry-run"
_AT_A_TIME = 200  # segments discarded in one transaction
log = get_logger("metering")


class Discarded(Receipt, frozen=True):
    segments: int
    events: int


def examine(
    control_plane: ControlPlane, path: Path, content: SegmentContent, batch: Batch, refused: Refused
) -> Drained:
    """Count what the segment would have added, keep the file beside the spool."""
    known = 0
    if events := batch.events:
        ids = [UUID(bytes=e.request_id) for e in events]
        [row] = control_plane.rows("usage_known", request_id=ids, first=ids[0], last=ids[-1])
        known = row["count"]
    drained = usage_audit.of(path, content, batch, refused, Batch.of([]))
    drained = msgspec.structs.replace(
        drained, inserted=len(events) - known, duplicates=drained.duplicates - len(events) + known, dry_run=True
    )
    directory = path.parent / DIRECTORY
    directory.mkdir(exist_ok=True, mode=0o700)
    try:
        os.replace(path, directory / path.name)
    except FileNotFoundError:  # another drainer was here first
        return msgspec.structs.replace(usage_audit.nothing(path), dry_run=True)
    fsync_path(directory)
    fsync_path(path.parent)
    reasons = sorted({reason for _, reason in refused})
    said = {f: getattr(drained, f) for f in Drained.__struct_fields__ if f != "held"}
    log.info("usage_dry_run", **said, refused_because=reasons)
    return drained


def segments(settings: Settings) -> list[Path]:
    """Segments that dry runs examined: neither billed nor forgotten."""
    return spool.sealed(settings.spool_dir / DIRECTORY)


def bill(settings: Settings) -> int:
    """Give what dry runs examined back to the spool; how many segments. The next drain bills each event once."""
    found = segments(settings)
    for path in found:
        os.replace(path, settings.spool_dir / path.name)
    if found:
        fsync_path(settings.spool_dir)
        fsync_path(settings.spool_dir / DIRECTORY)
    return len(found)


def discard(control_plane: ControlPlane, settings: Settings, *, reason: str, requested_by: str) -> Discarded:
    """Remove what dry runs examined without billing it, with a record. Raises `ControlPlaneUnavailable`.

    The record is committed before the files go; done again after a death between the two it leaves one more record.
    """
    found = segments(settings)
    events = 0
    for start in range(0, len(found), _AT_A_TIME):
        portion = found[start : start + _AT_A_TIME]
        contents = [spool.read(path).events for path in portion]
        held = [usage_audit.held(*billable.sort(e, timedelta(days=settings.usage_retention_days))) for e in contents]
        count = sum(map(len, contents))
        details = {"segments": [path.stem for path in portion], "events": count, "machine_id": settings.machine_id}
        with control_plane.transaction() as connection:
            rows(
                connection,
                "usage_held_discard",
                machine_id=settings.machine_id,
                segment=[path.stem for path in portion],
                held=[Jsonb(one) for one in held],
            )
            rows(
                connection,
                "usage_correction_insert",
                kind="discard",
                reason=reason,
                requested_by=requested_by,
                details=Jsonb(details),
            )
        for path in portion:
            path.unlink(missing_ok=True)
        fsync_path(settings.spool_dir / DIRECTORY)
        events += count
    if found:
        log.info("usage_dry_runs_discarded", segments=len(found), events=events)
    return Discarded(len(found), events)
