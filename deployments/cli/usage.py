"""`engram usage`: a tenant's counters, by hour or day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer

from deployments.cli import beside
from deployments.cli.output import Json, note, print_json, print_table
from deployments.cli.restore import parse_time


class By(StrEnum):
    HOUR = "hour"
    DAY = "day"


def register(app: typer.Typer) -> None:
    app.command()(usage)


def usage(
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT")],
    start: Annotated[str | None, typer.Option("--from", metavar="TIME", help="Default: this month's start.")] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="TIME", help="Default: now.")] = None,
    by: Annotated[By, typer.Option("--by", help="Buckets, in UTC.")] = By.HOUR,
    as_json: Json = False,
) -> None:
    """What a tenant used, from the hourly rollups, and until when that is complete."""
    from shared import registry, usage_report

    now = datetime.now(UTC)
    first = parse_time(start) or now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    last = parse_time(end) or now + timedelta(hours=1)
    if first >= last:
        raise typer.BadParameter("--from must be before --to")
    with beside.control_plane() as (settings, control_plane):
        registry.get(control_plane, tenant_id)
        found = usage_report.read(control_plane, settings, tenant_id, first, last, by.value)
    if as_json:
        buckets = [
            {"bucket": b.bucket, **b.counters._asdict(), "storage_bytes": b.storage_bytes} for b in found.buckets
        ]
        window = {"tenant_id": tenant_id, "from": first, "to": last}
        window |= {"granularity": by.value, "complete_until": found.complete_until}
        print_json({**window, **found.totals._asdict(), "buckets": buckets})
        return
    form = "%F %H:00" if by is By.HOUR else "%F"
    print_table(
        (f"{by.value} (UTC)", *found.totals._fields, "storage_bytes"),
        [
            *(
                (f"{b.bucket:{form}}", *b.counters, "—" if b.storage_bytes is None else b.storage_bytes)
                for b in found.buckets
            ),
            ("total", *found.totals, ""),
        ],
    )
    if found.complete_until is None:
        note("complete until: unknown, no drain has reported yet")
    else:
        note(f"complete until {found.complete_until:%F %H:%M:%S} UTC")
