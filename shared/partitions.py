"""The days of `usage_events`: created ahead, found missing when an event needs one, dropped after the retention.

A partition holds the requests minted in one UTC day and is called `usage_events_YYYYMMDD`; its bounds are the
smallest ids of its midnight and of the next (`usage_id_from` in SQL). What state a day is in:

    none ──create──▶ attached ──DETACH CONCURRENTLY──▶ pending ──▶ detached ──DROP──▶ none
                        ▲                                 │ FINALIZE  ▲ │
                        └──────────── attach ─────────────┴───────────┘─┘

Every arrow is one statement or one transaction, so a crash leaves a day in one of the four states and the next run
goes on from it: forward when the day is beyond the retention, back to attached when it is not (somebody raised the
retention). A table is created apart and attached, which takes SHARE UPDATE EXCLUSIVE on the parent and stops no
insert; `CREATE TABLE … PARTITION OF` would take ACCESS EXCLUSIVE. No CHECK is needed for it: an empty table is scanned
at once, and DETACH CONCURRENTLY leaves one on those that are attached again.

A day is dropped when it ended `_MARGIN` before the retention's edge (no drain still accepts its ids) and its books
agree (`shared.day_books`): the events with the hourly and the daily rollups, tenant by tenant, and with what the drains
inserted. What was dropped is counted in `usage_days_dropped`, and such a day takes no
event again, whatever the retention is later: the ids that would tell a replay from a new event are gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Literal
from uuid import UUID

from psycopg import sql

from shared import day_books
from shared.control_plane import Connection, ControlPlane, rows
from shared.errors import ControlPlaneUnavailable, Permanent
from shared.log import get_logger
from shared.receipt import Receipt
from shared.settings import Settings

State = Literal["attached", "pending", "detached"]
_PARENT = sql.Identifier("usage_events")
_DAY_MS = 86_400_000
_MARGIN = timedelta(hours=1)
_COUNT = sql.SQL(
    "INSERT INTO usage_days_dropped (day, events, api_calls, search_queries, memories_created, size_bytes)"
    " SELECT {day}, count(*), coalesce(sum(api_calls), 0), coalesce(sum(search_queries), 0),"
    " coalesce(sum(memories_created), 0), pg_total_relation_size({name}::regclass) FROM {table}"
    " RETURNING events, size_bytes"
)
log = get_logger("partitions")


class Expired(Receipt, frozen=True):
    """A day beyond the retention; `difference` is where its books do not agree, which keeps it."""

    day: date
    state: State
    events: int  # 0 when it is no longer attached
    size_bytes: int
    difference: str | None

    @property
    def droppable(self) -> bool:
        """A day that is no longer attached was found to agree before it was detached, and takes no more events."""
        return self.difference is None


class Dropped(Receipt, frozen=True):
    day: date
    events: int
    size_bytes: int


def table_of(day: date) -> str:
    return f"usage_events_{day:%Y%m%d}"


def bounds_of(day: date) -> tuple[UUID, UUID]:
    """The first id of the day and the first of the next."""
    start_ms = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1000
    return UUID(int=start_ms << 80), UUID(int=(start_ms + _DAY_MS) << 80)


def day_of(request_id: bytes) -> date:
    """The UTC day in which a UUIDv7 was minted."""
    return datetime.fromtimestamp(int.from_bytes(request_id[:6], "big") // 1000, UTC).date()


def states(control_plane: ControlPlane) -> dict[date, State]:
    with control_plane.transaction() as connection:
        return _states(connection)


def ensure(control_plane: ControlPlane, days: Iterable[date]) -> set[date]:
    """Make these days take events, whatever state they are in. Returns those that cannot: they were dropped."""
    wanted = sorted(set(days))
    with control_plane.transaction() as connection:
        rows(connection, "partitions_lock")
        found = _states(connection)
        gone = {row["day"] for row in rows(connection, "usage_days_dropped", days=wanted)}
        missing = [day for day in wanted if found.get(day) != "attached" and day not in gone]
        for day in missing:
            table, (first, after) = sql.Identifier(table_of(day)), bounds_of(day)
            if day not in found:
                connection.execute(sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(table, _PARENT))
            elif found[day] == "pending":
                connection.execute(_finalize(day))
            attach = sql.SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})")
            connection.execute(attach.format(_PARENT, table, sql.Literal(str(first)), sql.Literal(str(after))))
    if missing:
        log.info("partitions_attached", days=[str(day) for day in missing])
    return gone


def ensure_ahead(control_plane: ControlPlane, settings: Settings) -> None:
    """Today and the `usage_partitions_ahead_days` after it."""
    today = datetime.now(UTC).date()
    ensure(control_plane, [today + timedelta(days=n) for n in range(settings.usage_partitions_ahead_days + 1)])


def take_back(control_plane: ControlPlane, settings: Settings) -> list[date]:
    """Attach again what an earlier run took away and today's retention keeps; those days."""
    first_kept = kept_from(settings)
    found = [day for day, state in states(control_plane).items() if state != "attached" and day >= first_kept]
    if found:
        ensure(control_plane, found)
    return sorted(found)


def kept_from(settings: Settings) -> date:
    """The first day that is kept: the one in which the retention began an hour ago."""
    return (datetime.now(UTC) - timedelta(days=settings.usage_retention_days) - _MARGIN).date()


def audit_from(control_plane: ControlPlane, settings: Settings) -> datetime:
    """What drains wrote down before this is no longer needed: it is of no day whose events are there."""
    attached = [day for day, state in states(control_plane).items() if state == "attached"]
    return day_books.midnight(min([kept_from(settings), *attached])) - day_books.AUDIT_MARGIN


def expired(control_plane: ControlPlane, settings: Settings) -> list[Expired]:
    """Days beyond the retention, oldest first, with what they hold. Reads each of them once."""
    first_kept = kept_from(settings)
    return [
        _examine(control_plane, day, state) for day, state in sorted(states(control_plane).items()) if day < first_kept
    ]


def drop(control_plane: ControlPlane, settings: Settings, found: Expired) -> Dropped:
    """Detach a day without stopping inserts, count it into `usage_days_dropped`, drop it.

    Raises `Permanent` when its books differ, `ControlPlaneUnavailable` when another run is dropping days, or when a
    query on it did not end within `usage_detach_timeout_seconds`: the day is pending then, the next run goes on.
    """
    if not found.droppable:
        raise Permanent(f"{found.difference}; kept")
    table, name = sql.Identifier(table_of(found.day)), sql.Literal(table_of(found.day))
    with control_plane.transaction(maintenance=True) as connection:
        # This transaction must not have touched usage_events before the day is detached: that would wait for it.
        if not rows(connection, "retention_lock")[0]["locked"]:
            raise ControlPlaneUnavailable("another run is dropping days of usage")
        state = states(control_plane).get(found.day)
        if state is None and (gone := rows(connection, "usage_days_dropped", days=[found.day])):
            return Dropped(**gone[0])  # a run before this one got so far
        if state != "detached":
            statement = _finalize(found.day) if state == "pending" else _detach(found.day)
            control_plane.execute_alone(statement, timeout_seconds=settings.usage_detach_timeout_seconds)
        rows(connection, "partitions_lock")
        if _states(connection).get(found.day) != "detached":
            raise ControlPlaneUnavailable(f"{table_of(found.day)} was attached again meanwhile")
        connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(table))
        held = connection.execute(_COUNT.format(day=sql.Literal(found.day), name=name, table=table)).fetchone()
        connection.execute(sql.SQL("DROP TABLE {}").format(table))
    assert held is not None  # an aggregate always has a row
    log.info("usage_day_dropped", day=str(found.day), events=held["events"], size_bytes=held["size_bytes"])
    return Dropped(found.day, held["events"], held["size_bytes"])


def _states(connection: Connection) -> dict[date, State]:
    return {row["day"]: row["state"] for row in rows(connection, "partitions_list")}


def _examine(control_plane: ControlPlane, day: date, state: State) -> Expired:
    [size] = control_plane.rows("partition_size", table=table_of(day))
    size_bytes = size["size_bytes"] or 0
    if state != "attached" or (books := day_books.of_day(control_plane, day)) is None:
        return Expired(day, state, 0, size_bytes, None)
    return Expired(day, state, books.events, size_bytes, "; ".join(books.where()) or None)


def _detach(day: date) -> sql.Composed:
    statement = sql.SQL("ALTER TABLE {} DETACH PARTITION {} CONCURRENTLY")
    return statement.format(_PARENT, sql.Identifier(table_of(day)))


def _finalize(day: date) -> sql.Composed:
    return sql.SQL("ALTER TABLE {} DETACH PARTITION {} FINALIZE").format(_PARENT, sql.Identifier(table_of(day)))
