"""`engram usage`: a tenant's counters, by hour."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from deployments.cli import beside
from deployments.cli.output import Json, print_json, print_table
from deployments.cli.restore import parse_time


def register(app: typer.Typer) -> None:
    app.command()(usage)


def usage(
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT")],
    start: Annotated[str | None, typer.Option("--from", metavar="TIME", help="Default: this month's start.")] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="TIME", help="Default: now.")] = None,
    as_json: Json = False,
) -> None:
    """What a tenant used, from the hourly rollups."""
    from shared import registry

    now = datetime.now(UTC)
    first = parse_time(start) or now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    last = parse_time(end) or now + timedelta(hours=1)
    if first >= last:
        raise typer.BadParameter("--from must be before --to")
    with beside.control_plane() as (_, control_plane):
        registry.get(control_plane, tenant_id)
        window = {"tenant_id": tenant_id, "from": first, "to": last}
        totals = control_plane.row("usage_totals", **window) or {}
        buckets = control_plane.rows("usage_buckets", **window)
    if as_json:
        print_json({**window, **totals, "hours": buckets})
        return
    print_table(
        ("hour (UTC)", "api_calls", "search_queries", "memories_created"),
        [
            *((f"{b['bucket']:%F %H:00}", b["api_calls"], b["search_queries"], b["memories_created"]) for b in buckets),
            ("total", totals["api_calls"], totals["search_queries"], totals["memories_created"]),
        ],
    )
