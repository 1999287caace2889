"""A UTC day's usage from all sides PostgreSQL has: single events, hourly and daily rollups, and what drains inserted.

    events      rows of usage_events whose id was minted that day
    hourly      must be the same sums, hour by hour
    daily       must be the same sums
    audit       what all drains together say they inserted for that day (`usage_segments.by_day`)

All in one snapshot. A day whose single events were dropped is compared with what was written down then. The audit of a
day is kept until its events are dropped (`shared.partitions.audit_from`).
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

from shared.control_plane import ControlPlane, rows
from shared.receipt import Receipt
from shared.usage import Counters

DIFFERENCES = 1_000  # of a day that are listed
AUDIT_MARGIN = timedelta(hours=1)  # a drain's clock and PostgreSQL's


class Difference(Receipt, frozen=True):
    """One tenant's sums of a day, where they are not all the same."""

    tenant_id: str
    events: Counters
    hourly: Counters
    daily: Counters
    hours_differing: int


class DayBooks(Receipt, frozen=True):
    """`audited` is None when it cannot be known: the day, or a part of its audit, is older than that record."""

    day: date
    dropped: bool
    tenants: int
    events: int
    audited: int | None
    waiting: int
    tenants_differing: int
    differences: list[Difference]

    @property
    def agree(self) -> bool:
        return not self.where()

    def where(self) -> list[str]:
        """Each disagreement in a line."""
        found = []
        if self.tenants_differing:
            found.append(f"{self.day}: {self.tenants_differing} tenants' events, hours and days differ")
        if self.audited not in (None, self.events):
            found.append(f"{self.day}: the drains inserted {self.audited} events, {self.events} are there")
        return found


def of_day(control_plane: ControlPlane, day: date, *, audit: bool = True) -> DayBooks | None:
    """One day of PostgreSQL, without the spool; None when it holds nothing of that day."""
    start = midnight(day)
    with control_plane.transaction(maintenance=True) as connection:
        [row] = rows(
            connection,
            "usage_books_of_day",
            day=start,
            day_text=str(day),
            audited_from=start - AUDIT_MARGIN,
            limit=DIFFERENCES,
        )
    dropped = row["dropped_events"] is not None
    if not row["tenants"] and not dropped and not row["audited"]:
        return None
    if dropped:
        differing = int(row["dropped_sums"] != row["daily_sums"])
        return DayBooks(day, True, row["tenants"], row["dropped_events"], None, 0, differing, [])
    audited = row["audited"] if audit and not row["unaudited"] else None
    differences = [
        Difference(
            tenant_id=one["tenant_id"],
            events=Counters(*one["events"]),
            hourly=Counters(*one["hourly"]),
            daily=Counters(*one["daily"]),
            hours_differing=one["hours_differing"],
        )
        for one in row["differences"] or []
    ]
    return DayBooks(day, False, row["tenants"], row["events"], audited, 0, row["tenants_differing"], differences)


def midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
