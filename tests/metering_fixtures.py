"""Segments, drains, and what PostgreSQL must then say."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from shared import metering, spool
from shared.control_plane import ControlPlane
from shared.settings import Settings
from shared.usage import UsageEvent
from tests.core_fixtures import day_of_this_test, settings_in

pytest_plugins = ("tests.core_fixtures",)

COUNTERS = ("api_calls", "search_queries", "memories_created")


@pytest.fixture
def tenant_id() -> str:
    return f"m{secrets.token_hex(6)}"


@pytest.fixture
def settings(tmp_path: Path, core_url: str) -> Settings:
    return settings_in(tmp_path, core_url)


# A module whose counts are of all that a database holds takes these two: `settings, control_plane = own_settings, …`.


@pytest.fixture
def own_settings(tmp_path: Path, control_plane_url: str) -> Settings:
    return settings_in(tmp_path, control_plane_url)


@pytest.fixture
def own_control_plane(settings: Settings) -> Iterator[ControlPlane]:
    with ControlPlane(settings) as opened:
        yield opened


@pytest.fixture
def today(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's `TODAY` is the test's own, also when midnight has passed since the module was imported."""
    monkeypatch.setattr(request.module, "TODAY", day_of_this_test())


def segment(settings: Settings, events: list[UsageEvent]) -> Path:
    settings.spool_dir.mkdir(parents=True, exist_ok=True)
    path = settings.spool_dir / f"{secrets.token_hex(8)}-1-{secrets.token_hex(4)}.seg"
    path.write_bytes(spool.MAGIC + b"".join(map(spool.frame, events)))
    return path


def query(control_plane: ControlPlane, sql: str, *parameters: object) -> list[tuple[object, ...]]:
    with control_plane.transaction() as connection:
        return [tuple(row.values()) for row in connection.execute(sql, parameters).fetchall()]  # type: ignore[arg-type]


def event_ids(control_plane: ControlPlane) -> set[object]:
    return {row[0] for row in query(control_plane, "SELECT request_id FROM usage_events")}


def totals(control_plane: ControlPlane, table: str, tenant_id: str) -> tuple[int, ...]:
    sums = ", ".join(f"coalesce(sum({c}), 0)::int AS {c}" for c in COUNTERS)
    [row] = query(control_plane, f"SELECT {sums} FROM {table} WHERE tenant_id = %s", tenant_id)
    return row  # type: ignore[return-value]


def check_counted(control_plane: ControlPlane, tenant_id: str, events: list[UsageEvent]) -> None:
    """PostgreSQL holds exactly these events, and every rollup says what they say, bucket by bucket."""
    stored = query(control_plane, "SELECT request_id FROM usage_events WHERE tenant_id = %s", tenant_id)
    unique = {UUID(bytes=e.request_id): e for e in events}
    assert {row[0] for row in stored} == unique.keys()
    expected = tuple(sum(getattr(e, c) for e in unique.values()) for c in COUNTERS)
    for table, unit in (("usage_hourly", "hour"), ("usage_daily", "day")):
        assert totals(control_plane, table, tenant_id) == expected
        differing = query(
            control_plane,
            f"SELECT date_trunc('{unit}', ts, 'UTC') AS bucket, sum(api_calls)::int, sum(search_queries)::int AS s,"
            " sum(memories_created)::int AS m FROM usage_events WHERE tenant_id = %s GROUP BY 1 EXCEPT"
            f" SELECT bucket, api_calls::int, search_queries::int, memories_created::int FROM {table}"
            " WHERE tenant_id = %s",
            tenant_id,
            tenant_id,
        )
        assert differing == []


def drain(control_plane: ControlPlane, settings: Settings) -> list[metering.Drained]:
    return list(metering.drain_all(control_plane, settings))


def at_once(*work: Callable[[], object]) -> None:
    """Run each in a thread; raises what the first of them raised."""
    failed: list[BaseException] = []

    def run(one: Callable[[], object]) -> None:
        try:
            one()
        except BaseException as e:  # noqa: BLE001
            failed.append(e)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
