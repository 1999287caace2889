"""Do the books of usage agree? Counts what the gateway counted, the spool holds, and PostgreSQL says, and compares.

Per tenant and UTC day:

    events, hourly and daily rollups, audit     `shared.day_books`
    waiting     events of that day in this machine's spool that PostgreSQL does not have yet; no difference, but said
    set aside   events that drains refused to bill on these days, by tenant and cause; no difference, but said

Per machine, since its gateway was started:

    counted     `engram_usage_events_total` of each worker, read from the shared files its metrics live in
    drained     events in the audited segments of these workers
    spooled     events in those of their segments that are still on disk

counted = drained + spooled; what a full spool dropped was never counted there, and is said apart. The counters are read
before and after, so a gateway may serve meanwhile; a worker that was killed between its write and its count makes it
one event more.

Nothing is changed by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import date, timedelta
from pathlib import Path
from uuid import UUID

import msgspec

from shared import billable, counters, day_books, partitions, spool, stuck
from shared.control_plane import ControlPlane, rows
from shared.day_books import DIFFERENCES, DayBooks, midnight
from shared.receipt import Receipt
from shared.settings import Settings
from shared.usage import UsageEvent

_KNOWN_BATCH = 5_000


class GatewayBooks(Receipt, frozen=True):
    """`counted_before` and `counted_after`: the events its workers wrote; `lost` they dropped instead, and said so."""

    workers: int
    counted_before: int
    counted_after: int
    lost: int
    drained: int
    spooled: int
    killed: int

    @property
    def agree(self) -> bool:
        return self.counted_before <= self.drained + self.spooled <= self.counted_after + self.killed


class SetAside(Receipt, frozen=True):
    tenant_id: str
    reason: str
    events: int


class Books(Receipt, frozen=True):
    """`gateway` is None when none was started on this machine. `waiting` is by tenant and day.

    `set_aside` may be a person's matter already: `usage_quarantine` keeps it whatever was decided.
    """

    days: list[DayBooks]
    gateway: GatewayBooks | None
    waiting: dict[tuple[str, date], int]
    stuck: int
    set_aside: list[SetAside]

    @property
    def agree(self) -> bool:
        return all(day.agree for day in self.days) and (self.gateway is None or self.gateway.agree)

    def where(self) -> list[str]:
        """Each disagreement in a line."""
        found = [line for day in self.days for line in day.where()]
        if self.gateway is not None and not self.gateway.agree:
            seen = self.gateway.drained + self.gateway.spooled
            found.append(f"the gateway counted {self.gateway.counted_after} events, its segments hold {seen}")
        return found


def reconcile(control_plane: ControlPlane, settings: Settings, first: date, last: date) -> Books:
    """Compare these days, both included. Raises `ControlPlaneUnavailable`."""
    metrics_dir = counters.directory(settings)
    before = counters.by_process(metrics_dir)
    spooled: dict[str, int] = {}
    waiting: Counter[tuple[str, date]] = Counter()
    for name, events in _spooled(settings):  # one at a time: after an outage they are more than memory holds
        spooled[name] = len(events)
        batch, _ = billable.sort(events, timedelta(days=settings.usage_retention_days))
        waiting.update(_waiting(control_plane, batch.events))
    gateway = _gateway(control_plane, settings, metrics_dir, before, spooled)
    audited_from = partitions.kept_from(settings)
    days = []
    for n in range((last - first).days + 1):
        day = first + timedelta(days=n)
        found = day_books.of_day(control_plane, day, audit=day >= audited_from)
        if found is not None:
            of_this_day = sum(count for (_, of), count in waiting.items() if of == day)
            days.append(msgspec.structs.replace(found, waiting=of_this_day))
    refused = control_plane.rows(
        "usage_set_aside_between",
        **{"from": midnight(first), "to": midnight(last + timedelta(days=1)), "limit": DIFFERENCES},
    )
    return Books(
        days, gateway, dict(waiting), len(stuck.segments(settings.spool_dir)), [SetAside(**row) for row in refused]
    )


def _spooled(settings: Settings) -> Iterator[tuple[str, list[UsageEvent]]]:
    """Every segment on this disk that will be drained, with its events; one renamed meanwhile is found again."""
    seen: set[str] = set()
    for _ in range(2):
        for path in _segments(settings.spool_dir):
            if path.stem in seen:
                continue
            try:
                events = spool.read(path).events
            except FileNotFoundError:  # sealed, or drained
                continue
            except OSError:  # unreadable: the drain sets it aside and says so
                continue
            seen.add(path.stem)
            yield path.stem, events


def _segments(directory: Path) -> list[Path]:
    return [*directory.glob("*.open"), *directory.glob("*.seg"), *stuck.segments(directory)]


def _waiting(control_plane: ControlPlane, events: list[UsageEvent]) -> Counter[tuple[str, date]]:
    found: Counter[tuple[str, date]] = Counter()
    for start in range(0, len(events), _KNOWN_BATCH):
        portion = events[start : start + _KNOWN_BATCH]
        known = control_plane.rows("usage_known_ids", request_id=[UUID(bytes=e.request_id) for e in portion])
        there = {row["request_id"].bytes for row in known}
        found.update((e.tenant_id, partitions.day_of(e.request_id)) for e in portion if e.request_id not in there)
    return found


def _gateway(
    control_plane: ControlPlane,
    settings: Settings,
    metrics_dir: Path,
    before: dict[int, dict[str, float]],
    spooled: dict[str, int],
) -> GatewayBooks | None:
    since = counters.started_at_us(metrics_dir)
    if since is None or not before:
        return None
    pids = {str(pid) for pid in before}
    spooled = {name: n for name, n in spooled.items() if _is_of(name, since, pids)}
    with control_plane.transaction(maintenance=True) as connection:
        [row] = rows(
            connection,
            "usage_segments_of_workers",
            since=f"{since:016d}",
            machine_id=settings.machine_id,
            pids=sorted(pids),
            beside=sorted(spooled),
        )
    after = counters.by_process(metrics_dir)
    return GatewayBooks(
        workers=len(before),
        counted_before=_sum(before.values(), "engram_usage_events_total"),
        counted_after=_sum(after.values(), "engram_usage_events_total"),
        lost=_sum(after.values(), "engram_usage_lost_total"),
        drained=row["events"],
        spooled=sum(spooled.values()),
        killed=_sum(after.values(), "engram_worker_restarts_total"),
    )


def _is_of(segment: str, since_us: int, pids: set[str]) -> bool:
    created, _, rest = segment.partition("-")
    return created >= f"{since_us:016d}" and rest.partition("-")[0] in pids


def _sum(processes: Iterable[dict[str, float]], name: str) -> int:
    return int(sum(counted.get(name, 0.0) for counted in processes))
