"""What a tenant used: totals and buckets of one window in one snapshot, and until when they are complete."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from shared import watermark
from shared.control_plane import ControlPlane
from shared.receipt import Receipt
from shared.settings import Settings
from shared.usage import Counters

Granularity = Literal["hour", "day"]


class Bucket(Receipt, frozen=True):
    """`bucket` is its UTC start; `storage_bytes` the last measurement in it, None when nobody measured."""

    bucket: datetime
    counters: Counters
    storage_bytes: int | None


class UsageReport(Receipt, frozen=True):
    """`buckets` are those with any usage; `complete_until` is None when no drain has said anything yet."""

    totals: Counters
    buckets: list[Bucket]
    complete_until: datetime | None


def read(
    control_plane: ControlPlane,
    settings: Settings,
    tenant_id: str,
    since: datetime,
    until: datetime,
    granularity: Granularity,
) -> UsageReport:
    """Whole hours that begin in [since, until). Raises `ControlPlaneUnavailable`."""
    complete_until = watermark.of_tenant(control_plane, settings, tenant_id)  # before the rollups are read
    found = control_plane.rows(
        "usage_by_bucket", **{"tenant_id": tenant_id, "from": since, "to": until, "granularity": granularity}
    )
    buckets = [
        Bucket(
            row["bucket"].astimezone(UTC),
            Counters(row["api_calls"], row["search_queries"], row["memories_created"]),
            row["storage_bytes"],
        )
        for row in found
    ]
    totals = Counters(*(sum(b.counters[n] for b in buckets) for n in range(len(Counters._fields))))
    return UsageReport(totals, buckets, complete_until)
