"""The table of single events on a real PostgreSQL: converted from the one before it, asked for days and ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from shared import control_plane as module
from shared import partitions
from shared.control_plane import ControlPlane, queries
from tests.core_fixtures import event, settings_in
from tests.metering_fixtures import event_ids, own_control_plane, own_settings, query

pytest_plugins = ("tests.metering_fixtures",)
pytestmark = pytest.mark.usefixtures("today")
settings, control_plane = own_settings, own_control_plane
TODAY = datetime.now(UTC).date()


def midnight(days_ago: int) -> datetime:
    return datetime(TODAY.year, TODAY.month, TODAY.day, tzinfo=UTC) - timedelta(days=days_ago)


# --- the migration ---


@pytest.fixture
def unpartitioned(
    new_database: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ControlPlane, set[object]]]:
    """A control plane of the first two schemas with events of several days, one of them long ago; their ids."""
    directory = tmp_path / "sql" / "schema"
    directory.mkdir(parents=True)
    for file in (resources.files("shared") / "sql" / "schema").iterdir():
        if file.name < "0003":
            (directory / file.name).write_text(file.read_text())
    days_ago, seconds = (0, 1, 5, 390), range(3)
    events = [
        event("acme", at=midnight(day) + timedelta(seconds=n), memories_created=n) for day in days_ago for n in seconds
    ]
    with ControlPlane(settings_in(tmp_path, new_database())) as opened:
        with monkeypatch.context() as patch:
            patch.setattr(module.resources, "files", lambda _: tmp_path)
            opened.migrate()
        with opened.transaction() as connection:
            for e in events:
                connection.execute(
                    "INSERT INTO usage_events VALUES (%s, %s, %s, %s, 1, 1, %s, NULL, now())",
                    (UUID(bytes=e.request_id), e.tenant_id, e.route, e.status, e.memories_created),
                )
        yield opened, {UUID(bytes=e.request_id) for e in events}


def test_existing_events_are_kept_row_by_row_and_lie_in_the_partition_of_their_day(
    unpartitioned: tuple[ControlPlane, set[object]],
) -> None:
    """A control plane that has billed already is converted, not emptied."""
    control_plane, before = unpartitioned
    rows_before = query(control_plane, "SELECT * FROM usage_events ORDER BY 1")
    control_plane.migrate()
    assert query(control_plane, "SELECT * FROM usage_events ORDER BY 1") == rows_before
    assert len(before) == len(rows_before) == 12
    places = query(control_plane, "SELECT tableoid::regclass::text, request_id FROM usage_events")
    assert all(
        table == partitions.table_of(partitions.day_of(request_id.bytes))  # type: ignore[attr-defined]
        for table, request_id in places
    )
    with pytest.raises(psycopg.errors.UniqueViolation), control_plane.transaction() as connection:
        connection.execute("INSERT INTO usage_events SELECT * FROM usage_events LIMIT 1")


def test_a_conversion_that_fails_leaves_the_old_table_with_its_rows(
    unpartitioned: tuple[ControlPlane, set[object]],
) -> None:
    """All of it is one transaction: what comes last in the file fails, what came first is undone."""
    control_plane, before = unpartitioned
    with control_plane.transaction() as connection:
        connection.execute("CREATE TABLE usage_days_dropped (in_the_way int)")
    with pytest.raises(psycopg.errors.DuplicateTable):
        control_plane.migrate()
    assert event_ids(control_plane) == before
    assert query(control_plane, "SELECT relkind::text FROM pg_class WHERE relname = 'usage_events'") == [("r",)]
    with control_plane.transaction() as connection:
        connection.execute("DROP TABLE usage_days_dropped")
    control_plane.migrate()
    assert event_ids(control_plane) == before


# --- ids, days, ranges ---


@pytest.mark.parametrize("days_ago", [0, 1, 31, 366, 20_000])
def test_sql_and_python_agree_where_a_day_begins(control_plane: ControlPlane, days_ago: int) -> None:
    """Bounds are made in Python, ranges are asked for in SQL."""
    day = TODAY - timedelta(days=days_ago)
    found = query(
        control_plane,
        "SELECT usage_id_from(%s) AS a, usage_id_from(%s) AS b",
        midnight(days_ago),
        midnight(days_ago - 1),
    )
    first, after = partitions.bounds_of(day)
    assert found == [(first, after)]
    assert partitions.day_of(first.bytes) == day
    assert partitions.day_of(UUID(int=after.int - 1).bytes) == day


def test_a_time_range_is_an_id_range_to_the_millisecond(control_plane: ControlPlane) -> None:
    """Within a millisecond an id has no time: a bound inside of one takes the next, at both ends alike."""
    [(at, inside, far)] = query(
        control_plane,
        "SELECT usage_id_from('1970-01-01 00:00:01.002+00') AS a, usage_id_from('1970-01-01 00:00:01.0011+00') AS b,"
        " usage_id_from('infinity') AS c",
    )
    assert at == inside == UUID(int=1002 << 80)
    assert far == UUID(int=((1 << 48) - 1) << 80)


def pruned() -> dict[str, tuple[dict[str, object], tuple[int, ...]]]:
    """Queries over a range of time, with parameters, and how many days ago are the days they may read."""
    return {
        "usage_books_of_day": (
            {"day": midnight(4), "day_text": "2026-01-01", "audited_from": midnight(30), "limit": 10},
            (4,),
        ),
        "usage_rollups_repair_hourly": ({"day": midnight(5)}, (5,)),
        "usage_known_ids": ({"request_id": [partitions.bounds_of(TODAY)[0]]}, (0,)),
        "usage_known": (
            {
                "request_id": [partitions.bounds_of(TODAY)[0]],
                "first": partitions.bounds_of(TODAY)[0],
                "last": partitions.bounds_of(TODAY)[0],
            },
            (0,),
        ),
    }


@pytest.mark.parametrize("name", pruned())
def test_a_query_over_a_time_range_reads_the_partitions_of_those_days_only(
    control_plane: ControlPlane, name: str
) -> None:
    """Reconciling a day must not read a year."""
    partitions.ensure(control_plane, [TODAY - timedelta(days=n) for n in range(40)])
    parameters, days_ago = pruned()[name]
    with control_plane.transaction() as connection:
        plan = connection.execute(f"EXPLAIN (FORMAT JSON) {queries()[name]}", parameters).fetchall()  # type: ignore[arg-type]
    assert set(_tables(plan[0]["QUERY PLAN"])) == {partitions.table_of(TODAY - timedelta(days=n)) for n in days_ago}


def _tables(plan: Any) -> Iterator[str]:
    """The partitions a plan names."""
    if isinstance(plan, list):
        for part in plan:
            yield from _tables(part)
    elif isinstance(plan, dict):
        if str(plan.get("Relation Name", "")).startswith("usage_events"):
            yield plan["Relation Name"]
        for part in plan.values():
            yield from _tables(part)


def test_every_query_over_single_events_was_asked_whether_it_prunes() -> None:
    """A new query must join the list above."""
    reading = {name for name, text in queries().items() if "FROM usage_events" in text}
    assert reading <= pruned().keys()
