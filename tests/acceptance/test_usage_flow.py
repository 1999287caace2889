"""Usage as an operator sees it on the whole stack: one run for what comes in a minute, books, corrections."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import Stack
from tests.gateway_stack import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def metering_runs(stack: Stack) -> list[dict[str, Any]]:
    wanted = {"flows": {"name": {"any_": ["metering"]}}, "sort": "START_TIME_DESC", "limit": 20}
    runs: list[dict[str, Any]] = stack.prefect("POST", "flow_runs/filter", wanted)
    return runs


def test_a_trickle_of_requests_is_one_run_and_its_usage_is_answered_while_it_lasts(stack: Stack) -> None:
    """Never a run for each small batch: nine batches a second apart, and at most one run begins meanwhile."""
    with stack.tenant("trickle") as api:
        for _ in range(2):
            assert api.get("/v1/memories").status_code == 200
        eventually(lambda: api.get("/v1/usage").json()["api_calls"] >= 2)
        before = {run["id"] for run in metering_runs(stack)}
        for _ in range(9):
            api.get("/v1/memories")
            time.sleep(1)
        assert len({run["id"] for run in metering_runs(stack)} - before) <= 1
        hourly = eventually(
            lambda: u if (u := api.get("/v1/usage?granularity=hour").json())["api_calls"] >= 11 else None
        )
        assert sum(b["api_calls"] for b in hourly["buckets"]) == hourly["api_calls"]
        until = datetime.fromisoformat(hourly["complete_until"])
        assert timedelta() < datetime.now(UTC) - until < timedelta(minutes=5)
        told = stack.json("usage", "trickle", "--by", "day")
        assert told["api_calls"] >= hourly["api_calls"] and told["complete_until"] is not None


def test_a_backfill_is_drained_once_and_the_books_agree_or_the_run_fails(stack: Stack, tmp_path: Path) -> None:
    """What a person did stays visible; what does not agree is a Failed run with a table, and exit code 1."""
    stack.engram("tenant", "create", "backfill")
    late = {"tenant_id": "backfill", "route": "/v1/search", "status": 200}
    at = datetime.now(UTC) - timedelta(days=1)
    file = tmp_path / "late.jsonl"
    file.write_text(
        "".join(json.dumps(late | {"ts": (at + timedelta(seconds=n)).isoformat()}) + "\n" for n in range(5))
    )
    for inserted in (5, 0):
        done = stack.json("usage-import", str(file), "--reason", "the log of a dead host")
        assert (done["drained"]["inserted"], done["drained"]["duplicates"]) == (inserted, 5 - inserted)
    books = stack.json("reconcile")
    assert books["agree"] and books["gateway"]["agree"] and books["where"] == []

    update = "UPDATE usage_daily SET api_calls = api_calls + %s WHERE tenant_id = 'backfill' RETURNING 1"
    stack.rows(update, 1)
    refused = stack.engram("reconcile", check=False)
    assert refused.returncode == 1 and "backfill" in refused.stdout and "differ" in refused.stderr
    deployment = stack.prefect("GET", "deployments/name/reconcile/reconcile")
    run = stack.prefect("POST", f"deployments/{deployment['id']}/create_flow_run", {"parameters": {"days": 2}})

    def failed() -> bool:
        return bool(stack.prefect("GET", f"flow_runs/{run['id']}")["state_type"] == "FAILED")

    eventually(failed, 90)
    artifacts = stack.prefect("POST", "artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    [table] = [a["data"] for a in artifacts if a["type"] == "markdown"]
    assert "| backfill | 5 / 5 / 0 | 5 / 5 / 0 | 6 / 5 / 0 |" in table
    day = str(at.date())
    words = ("--from", day, "--to", day, "--reason", "ticket 7")
    assert stack.engram("reconcile", "--repair", *words, check=False).returncode == 1  # looked at only
    assert stack.json("reconcile", "--repair", "--apply", *words)["agree"]
    kinds = stack.rows("SELECT kind FROM usage_corrections ORDER BY correction_id")
    assert kinds == [("import",), ("import",), ("repair",)]
