"""Do the books of usage agree? Counts what the gateway counted, the spool holds, and PostgreSQL says, and compares.

Per tenant and UTC day:

    events, hourly and daily rollups, audit     `shared.day_books`
    waiting     events of that day in this machine's spool that PostgreSQL does not have yet; no difference, but said
    set aside   events that drains refused to bill on these days, by tenant and cause; no difference, but said

Per machine, tenant and day:

    counted by the gateway, in segments         `shared.gateway_books`
    examined    events of that day that dry runs set apart, billed by nobody yet; no difference, but said

Each machine has a spool and a gateway of its own: the flow asks all of them, the command the one it is given on.
Nothing is changed by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from uuid import UUID

import msgspec

from shared import billable, day_books, dry_run, gateway_books, partitions, spool, stuck, tally, usage_audit
from shared.control_plane import ControlPlane
from shared.day_books import DIFFERENCES, DayBooks, midnight
from shared.gateway_books import GatewayBooks
from shared.receipt import Receipt
from shared.settings import Settings
from shared.usage import UsageEvent
from shared.usage_audit import Held

_KNOWN_BATCH = 5_000


class SetAside(Receipt, frozen=True):
    tenant_id: str
    reason: str
    events: int


class Books(Receipt, frozen=True):
    """`gateway` is None when none was started on this machine. `waiting` and `examined` are by tenant and day.

    `set_aside` may be a person's matter already: `usage_quarantine` keeps it whatever was decided.
    """

    days: list[DayBooks]
    gateway: GatewayBooks | None
    waiting: dict[tuple[str, date], int]
    examined: dict[tuple[str, date], int]
    stuck: int
    set_aside: list[SetAside]

    @property
    def agree(self) -> bool:
        return all(day.agree for day in self.days) and (self.gateway is None or self.gateway.agree)

    def where(self) -> list[str]:
        """Each disagreement in a line."""
        found = [line for day in self.days for line in day.where()]
        return found + (self.gateway.where() if self.gateway is not None else [])


def reconcile(
    control_plane: ControlPlane, settings: Settings, first: date, last: date, *, this_machine_alone: bool = False
) -> Books:
    """Compare these days, both included; `this_machine_alone`: without what PostgreSQL says of all of them.

    Raises `ControlPlaneUnavailable`.
    """
    before = tally.read(settings)
    on_disk: dict[str, Held] = {}
    of_dry_runs: set[str] = set()
    waiting: Counter[tuple[str, date]] = Counter()
    examined: Counter[tuple[str, date]] = Counter()
    for path, events in _spooled(settings):  # one at a time: after an outage they are more than memory holds
        batch, refused = billable.sort(events, timedelta(days=settings.usage_retention_days))
        on_disk[path.stem] = usage_audit.held(batch, refused)
        if path.parent.name == dry_run.DIRECTORY:
            of_dry_runs.add(path.stem)
            examined.update(_waiting(control_plane, batch.events))
        else:
            waiting.update(_waiting(control_plane, batch.events))
    gateway = gateway_books.of_machine(control_plane, settings, (first, last), before, on_disk, of_dry_runs)
    days = [] if this_machine_alone else _days(control_plane, settings, first, last, waiting)
    set_aside = [] if this_machine_alone else _set_aside(control_plane, first, last)
    stuck_now = len(stuck.segments(settings.spool_dir))
    return Books(days, gateway, dict(waiting), dict(examined), stuck_now, set_aside)


def _set_aside(control_plane: ControlPlane, first: date, last: date) -> list[SetAside]:
    window = {"from": midnight(first), "to": midnight(last + timedelta(days=1))}
    return [SetAside(**row) for row in control_plane.rows("usage_set_aside_between", limit=DIFFERENCES, **window)]


def _days(
    control_plane: ControlPlane, settings: Settings, first: date, last: date, waiting: Counter[tuple[str, date]]
) -> list[DayBooks]:
    audited_from = partitions.kept_from(settings)
    days = []
    for n in range((last - first).days + 1):
        day = first + timedelta(days=n)
        found = day_books.of_day(control_plane, day, audit=day >= audited_from)
        if found is not None:
            of_this_day = sum(count for (_, of), count in waiting.items() if of == day)
            days.append(msgspec.structs.replace(found, waiting=of_this_day))
    return days


def _spooled(settings: Settings) -> Iterator[tuple[Path, list[UsageEvent]]]:
    """Every segment on this disk, with its events; one renamed meanwhile is found again."""
    seen: set[str] = set()
    for _ in range(2):
        for path in _segments(settings):
            if path.stem in seen:
                continue
            try:
                events = spool.read(path).events
            except FileNotFoundError:  # sealed, or drained
                continue
            except OSError:  # unreadable: the drain sets it aside and says so
                continue
            seen.add(path.stem)
            yield path, events


def _segments(settings: Settings) -> list[Path]:
    directory = settings.spool_dir
    return [
        *directory.glob("*.open"),
        *directory.glob("*.seg"),
        *stuck.segments(directory),
        *dry_run.segments(settings),
    ]


def _waiting(control_plane: ControlPlane, events: list[UsageEvent]) -> Counter[tuple[str, date]]:
    found: Counter[tuple[str, date]] = Counter()
    for start in range(0, len(events), _KNOWN_BATCH):
        portion = events[start : start + _KNOWN_BATCH]
        known = control_plane.rows("usage_known_ids", request_id=[UUID(bytes=e.request_id) for e in portion])
        there = {row["request_id"].bytes for row in known}
        found.update((e.tenant_id, partitions.day_of(e.request_id)) for e in portion if e.request_id not in there)
    return found
