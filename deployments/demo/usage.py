"""The last step of a demo: what PostgreSQL would bill must be what the clients counted."""

from __future__ import annotations

import time
from typing import Any

from deployments.demo.client import Counted
from deployments.demo.stage import Stage

_USAGE_WAIT_SECONDS = 60.0


def compare(stage: Stage) -> None:
    """Wait until what the clients counted is in PostgreSQL; then events and both rollups must equal it."""
    expected = {a.tenant_id: (a.counted.requests, *_billed(a.counted)) for a in stage.actors}
    deadline = time.monotonic() + _USAGE_WAIT_SECONDS
    while (seen := _events(stage)) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    metering = stage.prefect.newest_run_url("metering")
    for position, name in enumerate(("requests", "api_calls", "search_queries", "memories_created")):
        want = sum(row[position] for row in expected.values())
        have = sum(row[position] for row in seen.values())
        what = "requests the clients sent = usage events" if name == "requests" else f"{name}: clients = events"
        stage.checks.equal(what, want, have, metering)
    stage.checks.equal(
        "tenants whose usage is exact", len(expected), sum(seen.get(t) == row for t, row in expected.items())
    )
    billed = {tenant: row[1:] for tenant, row in expected.items()}
    for table in ("usage_hourly", "usage_daily"):
        rollup = _rollup(stage, table)
        exact = sum(rollup.get(tenant) == row for tenant, row in billed.items())
        stage.checks.equal(f"tenants whose {table} is exact", len(billed), exact, metering)


def _billed(counted: Counted) -> tuple[int, int, int]:
    return counted.api_calls, counted.search_queries, counted.memories_created


def _events(stage: Stage) -> dict[str, tuple[int, ...]]:
    return _sums(
        stage,
        "SELECT tenant_id, count(*), sum(api_calls), sum(search_queries), sum(memories_created)"
        " FROM usage_events WHERE tenant_id = ANY (%s) GROUP BY tenant_id",
    )


def _rollup(stage: Stage, table: str) -> dict[str, tuple[int, ...]]:
    select = "SELECT tenant_id, sum(api_calls), sum(search_queries), sum(memories_created) FROM "
    where = " WHERE tenant_id = ANY (%s) GROUP BY tenant_id"
    return _sums(stage, select + ("usage_hourly" if table == "usage_hourly" else "usage_daily") + where)


def _sums(stage: Stage, statement: Any) -> dict[str, tuple[int, ...]]:
    from psycopg.rows import tuple_row

    with stage.control_plane.transaction() as connection, connection.cursor(row_factory=tuple_row) as cursor:
        rows = cursor.execute(statement, ([a.tenant_id for a in stage.actors],)).fetchall()
    return {tenant: tuple(int(value) for value in values) for tenant, *values in rows}
