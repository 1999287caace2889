"""Usage as an operator sees it on the whole stack: one run for what comes in a minute, outages, books, corrections."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.acceptance.conftest import Stack
from tests.gateway_stack import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def metering_runs(stack: Stack) -> list[dict[str, Any]]:
    wanted = {"flows": {"name": {"any_": ["metering"]}}, "sort": "START_TIME_DESC", "limit": 20}
    runs: list[dict[str, Any]] = stack.prefect("POST", "flow_runs/filter", wanted)
    return runs


def is_idle(stack: Stack) -> bool:
    return not any(run["state_type"] in ("SCHEDULED", "PENDING", "RUNNING") for run in metering_runs(stack))


def begun_since(stack: Stack, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {run["id"] for run in before}
    return [run for run in metering_runs(stack) if run["id"] not in known]


def report_of(stack: Stack, run: dict[str, Any]) -> str:
    artifacts = stack.prefect("POST", "artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    [found] = [a["data"] for a in artifacts if a["type"] == "markdown"]
    assert isinstance(found, str)
    return found


def test_no_run_begins_at_idle_and_a_trickle_of_requests_is_exactly_one(stack: Stack) -> None:
    """Never a run for each small batch, never one for nothing, never usage that no run shows."""
    with stack.tenant("trickle") as api:
        eventually(lambda: is_idle(stack), 90)
        before = metering_runs(stack)
        time.sleep(15)  # longer than a run lasts
        assert begun_since(stack, before) == []
        for _ in range(6):
            assert api.get("/v1/memories").status_code == 200
            time.sleep(0.5)
        hourly = eventually(
            lambda: u if (u := api.get("/v1/usage?granularity=hour").json())["api_calls"] >= 6 else None
        )
        assert is_idle(stack) is False, "usage is answered while the run lasts"
        assert sum(b["api_calls"] for b in hourly["buckets"]) == hourly["api_calls"]
        until = datetime.fromisoformat(hourly["complete_until"])
        assert timedelta() < datetime.now(UTC) - until < timedelta(minutes=5)
        told = stack.json("usage", "trickle", "--by", "day")
        assert told["api_calls"] >= hourly["api_calls"] and told["complete_until"] is not None
    eventually(lambda: is_idle(stack), 90)
    [run] = begun_since(stack, before)
    [(events,)] = stack.rows("SELECT count(*)::int FROM usage_events WHERE tenant_id = 'trickle'")
    assert run["state_type"] == "COMPLETED" and f"{events} of {events} events" in report_of(stack, run)


def family_of(stack: Stack, part: str) -> list[psutil.Process]:
    [pid] = [p["pid"] for p in stack.json("status")["processes"] if p["name"] == part]
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def age_seconds(stack: Stack) -> float:
    """The age gauge, as Prometheus reads it."""
    text = httpx.get(f"{stack.status['gateway_url']}/metrics", timeout=10).text
    [line] = [line for line in text.splitlines() if line.startswith("engram_usage_oldest_unflushed_seconds ")]
    return float(line.split()[1])


def check_books(stack: Stack) -> None:
    books = stack.json("reconcile")
    assert books["gateway"]["agree"] and books["where"] == [], books


def test_while_prefect_is_frozen_requests_are_served_and_billed_and_one_run_comes_after(stack: Stack) -> None:
    """Usage does not wait for what only shows it, and a server that comes back finds no queue of runs."""
    with stack.tenant("unseen") as api:
        assert api.get("/v1/memories").status_code == 200
        eventually(lambda: not is_idle(stack))
        before = metering_runs(stack)
        frozen = family_of(stack, "prefect")
        for process in frozen:
            process.suspend()
        try:
            for _ in range(18):  # past the end of the run that was under way
                assert api.get("/v1/memories").status_code == 200
                time.sleep(1)
            eventually(lambda: api.get("/v1/usage").json()["api_calls"] >= 19, 30)
            eventually(lambda: age_seconds(stack) < 5, 30)
        finally:
            for process in frozen:
                process.resume()
        eventually(lambda: is_idle(stack), 90)
        # The run that was under way may not know yet that it has ended; until it does, usage is drained beside it.
        eventually(lambda: api.get("/v1/memories").status_code == 200 and begun_since(stack, before), 120)
        eventually(lambda: is_idle(stack), 60)
    assert len(begun_since(stack, before)) <= 3
    check_books(stack)


def test_while_postgresql_is_frozen_requests_are_served_the_age_gauge_tells_and_all_of_it_arrives_after(
    stack: Stack,
) -> None:
    """What the alert on late usage looks at grows for as long as it lasts; nothing is lost or counted twice."""
    with stack.tenant("waiting") as api:
        for _ in range(3):
            assert api.get("/v1/memories").status_code == 200
        eventually(lambda: api.get("/v1/usage").json()["api_calls"] >= 3)
        frozen = family_of(stack, "postgres")
        for process in frozen:
            process.suspend()
        try:
            for _ in range(10):
                assert api.get("/v1/memories").status_code == 200
                time.sleep(1)
            assert 8 < age_seconds(stack) < 60
        finally:
            for process in frozen:
                process.resume()
        eventually(lambda: api.get("/v1/usage").json()["api_calls"] >= 14, 60)
        eventually(lambda: age_seconds(stack) < 5, 30)
    check_books(stack)


def test_a_backfill_is_drained_once_and_the_books_agree_or_the_run_fails(stack: Stack, tmp_path: Path) -> None:
    """What a person did stays visible; what does not agree is a Failed run with a table, and exit code 1."""
    stack.create("backfill")
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
