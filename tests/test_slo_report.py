"""The service level report against a real Prometheus with a month of past, and a real control plane."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from shared import drill, metering, slo_report
from shared.control_plane import ControlPlane
from shared.slo_report import Report
from shared.slo_tables import tables
from tests.core_fixtures import World, event, new_world, settings_in
from tests.gateway_stack import eventually
from tests.metering_fixtures import segment
from tests.ports import free_ports
from tests.prometheus_fixtures import prometheus, write_past

pytest_plugins = ("tests.core_fixtures",)
DAY = timedelta(days=1)
REMAINING = "engram:slo:budget_remaining30d"


def past(now: datetime, days: float, **rates: float) -> Mapping[str, list[tuple[datetime, float]]]:
    """What the rules recorded every five minutes: ten requests a second and these bad ones, none in the last day."""
    times = [now - timedelta(minutes=5 * n) for n in range(round(days * 288), -1, -1)]

    def steady(bad: float, usual: float = 0.0) -> list[tuple[datetime, float]]:
        return [(at, usual + (bad if days < 2 or at < now - DAY else 0.0)) for at in times]

    return {
        "engram:requests:rate5m": steady(0.0, rates.get("requests", 10.0)),
        "engram:timed:rate5m": steady(0.0, rates.get("timed", rates.get("requests", 10.0))),
        "engram:fast:rate5m": steady(-rates.get("slow", 0.0), rates.get("timed", rates.get("requests", 10.0))),
        "engram:errors:rate5m": steady(rates.get("errors", 0.0)),
        "engram:auth_failures:rate5m": steady(rates.get("auth", 0.0)),
    }


def counted(now: datetime) -> Mapping[str, list[tuple[datetime, float]]]:
    """A day of what a gateway counts: searches, one in eleven answered 500 and half of them slow; others, all well."""
    times = [now - timedelta(minutes=5 * n) for n in range(288, -1, -1)]

    def growing(by: float) -> list[tuple[datetime, float]]:
        return [(at, by * n) for n, at in enumerate(times)]

    found = {"engram_maintenance_refused_total": growing(1)}
    for route, good, bad, fast in (("/v1/search", 10, 1, 5.5), ("/v1/memories", 20, 0, 20), ("/ready", 5, 5, 0)):
        found[f'engram_requests_total{{route="{route}",status="200"}}'] = growing(good)
        found[f'engram_requests_total{{route="{route}",status="500"}}'] = growing(bad)
        found[f'engram_request_duration_seconds_count{{route="{route}"}}'] = growing(good + bad)
        for edge, below in (("0.1", fast), ("0.25", fast), ("0.5", good + bad), ("+Inf", good + bad)):
            found[f'engram_request_duration_seconds_bucket{{route="{route}",le="{edge}"}}'] = growing(below)
    return found


@pytest.fixture
def alone(tmp_path: Path, control_plane_url: str) -> Iterator[World]:
    """One tenant, alone in its control plane."""
    with ControlPlane(settings_in(tmp_path, control_plane_url)) as control_plane:
        yield new_world(tmp_path, control_plane_url, control_plane)


def made(world: World, url: str) -> Report:
    settings = world.settings.model_copy(update={"prometheus_url": url})
    return slo_report.make(settings, world.control_plane)


def asked(url: str, query: str) -> dict[str, float]:
    """Values by the label `slo`; a rule evaluated before those it stands on is NaN once."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, trust_env=False)
    found = {one["metric"].get("slo", ""): float(one["value"][1]) for one in answer.json()["data"]["result"]}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def evaluated(url: str) -> None:
    """Wait until every rule the report reads was evaluated once; groups begin at different instants."""
    ratios = 'count({__name__=~"engram:(availability|latency|errors|auth_failures):ratio_rate(1h|6h|1d|30d)"}) == 16'
    eventually(lambda: asked(url, ratios), 60)


def test_a_month_with_too_many_errors_is_spent_and_the_rules_say_the_same(alone: World, tmp_path: Path) -> None:
    """Two ways to the same number: the report's arithmetic and the rule the dashboard shows."""
    now = datetime.now(UTC)
    write_past(tmp_path / "prometheus", past(now, 30, errors=0.02, slow=0.1, auth=0.1))
    with prometheus(tmp_path / "prometheus") as url:
        evaluated(url)
        recorded = eventually(lambda: found if len(found := asked(url, REMAINING)) == 4 else None)
        report = made(alone, url)
    assert report.measured is not None and report.measured.coverage == pytest.approx(1.0, abs=0.001)
    found = {budget.objective.name: budget for budget in report.measured.budgets}
    left = {name: budget.left for name, budget in found.items()}
    # A day in 30 was good: 0.2% errors on 29 days of 30 are 1.93 times what 99.9% allows.
    assert left == pytest.approx({"availability": -0.933, "latency": 0.807, "errors": 0.613, "auth": 0.517}, abs=0.01)
    assert left == pytest.approx(recorded, abs=0.005)
    assert (report.state, report.spent) == ("spent", ["availability"])
    assert "availability" in report.sentence
    availability = found["availability"]
    assert availability.burns["1d"] == pytest.approx(0.0, abs=0.02)
    assert availability.burns["30d"] == pytest.approx(1.93, abs=0.01)
    assert set(availability.forecasts_seconds.values()) == {0.0}
    assert found["errors"].forecasts_seconds["1h"] is None
    assert json.loads(json.dumps(report.as_dict()))["spent"] == ["availability"]
    assert report.measured.history["availability"][-1].left == pytest.approx(recorded["availability"], abs=0.005)


def test_a_cold_start_is_measured_by_what_was_seen(alone: World, tmp_path: Path) -> None:
    """Six hours at eight times the allowed rate are two days' worth of a month's budget, not all of it."""
    write_past(tmp_path / "prometheus", past(datetime.now(UTC), 0.25, errors=0.08))
    with prometheus(tmp_path / "prometheus") as url:
        evaluated(url)
        report = made(alone, url)
    assert report.measured is not None and report.measured.coverage == pytest.approx(0.25 / 30, rel=0.05)
    availability = report.measured.budgets[0]
    assert (report.state, availability.state) == ("kept", "kept")
    assert availability.left == pytest.approx(1 - 8 * 0.25 / 30, abs=0.01)
    assert availability.burns["1h"] == pytest.approx(8, rel=0.05)
    assert availability.forecasts_seconds["1h"] == pytest.approx(0.933 * 30 * 86_400 / 8, rel=0.05)


def test_the_worst_route_comes_first_and_maintenance_is_counted_apart(alone: World, tmp_path: Path) -> None:
    """By its share of errors; health checks are no route of a client's, and maintenance is in no budget."""
    now = datetime.now(UTC)
    write_past(tmp_path / "prometheus", dict(past(now, 1)) | dict(counted(now)))
    with prometheus(tmp_path / "prometheus") as url:
        evaluated(url)
        report = made(alone, url)
    assert report.measured is not None
    search, memories = report.measured.routes
    assert (search.route, memories.route) == ("/v1/search", "/v1/memories")
    assert search.requests == pytest.approx(11 * 288, rel=0.02) and search.error_share == pytest.approx(
        1 / 11, rel=0.02
    )
    assert search.slow_share == pytest.approx(0.5, rel=0.02) and search.p95_seconds == pytest.approx(0.475, rel=0.02)
    assert (memories.error_share, memories.slow_share) == (0.0, 0.0) and (memories.p95_seconds or 1) < 0.1
    assert report.measured.maintenance_refused == pytest.approx(288, rel=0.02)
    assert report.measured.requests == pytest.approx(31 * 288, rel=0.02)


def test_silence_is_neither_failure_nor_success(alone: World, tmp_path: Path) -> None:
    """A service nobody asked has no availability, and has lost none of its budget."""
    write_past(tmp_path / "prometheus", past(datetime.now(UTC), 3, requests=0.0))
    with prometheus(tmp_path / "prometheus") as url:
        evaluated(url)
        report = made(alone, url)
    assert report.measured is not None and report.state == "kept"
    for budget in report.measured.budgets:
        assert (budget.state, budget.left, budget.bad_share) == ("no traffic", 1.0, None)
        assert set(budget.burns.values()) == {None}
    assert report.measured.routes == []
    text = str([table.rows for table in tables(report)])
    assert "nan" not in text and "0.0%" not in text.replace("100.0%", "")


def test_bad_tokens_alone_say_nothing_of_how_fast_tenants_are_served(alone: World, tmp_path: Path) -> None:
    """They are counted and not timed: "all within 250 ms" would be said of nobody's request."""
    write_past(tmp_path / "prometheus", past(datetime.now(UTC), 3, timed=0.0, auth=10.0))
    with prometheus(tmp_path / "prometheus") as url:
        evaluated(url)
        report = made(alone, url)
    assert report.measured is not None
    found = {budget.objective.name: budget for budget in report.measured.budgets}
    assert (found["latency"].state, found["latency"].bad_share) == ("no traffic", None)
    assert found["auth"].bad_share > 0.5 and found["errors"].bad_share == 0.0


@pytest.mark.parametrize("rules", [True, False])
def test_a_prometheus_that_saw_no_gateway_measures_nothing(alone: World, tmp_path: Path, rules: bool) -> None:
    """It answers every query, with nothing in it; a green report would be a lie."""
    with prometheus(tmp_path / "prometheus", rules=rules) as url:
        if rules:
            evaluated(url)
        report = made(alone, url)
    said = "no gateway" if rules else "has no engram:availability:ratio_rate30d"
    assert report.state == "not measured" and said in report.unread["service levels"]


def test_who_does_not_answer_is_named_and_the_rest_is_reported(alone: World) -> None:
    """At 3 a.m. half a report that says so is worth more than none."""
    [port] = free_ports(1)
    report = made(alone, f"http://127.0.0.1:{port}")
    assert report.measured is None and report.books is not None and report.books.recovery.tenants == 1
    assert report.state == "not measured" and str(port) in report.sentence
    assert "ENGRAM_PROMETHEUS_URL" in made(alone, "").sentence
    away = settings_in(
        alone.settings.data_dir, f"postgresql://127.0.0.1:{port}/x", control_plane_connect_timeout_seconds=1
    )
    with ControlPlane(away) as control_plane:
        report = slo_report.make(away, control_plane)
    assert report.books is None and {"service levels", "tenants, backups and drills"} == report.unread.keys()


def test_recovery_is_what_the_control_plane_knows(alone: World) -> None:
    """RPO of tenants with and without a backup, drills by outcome and part, and who uses most."""
    worse = new_world(alone.settings.data_dir, alone.settings.control_plane_url.get_secret_value(), alone.control_plane)
    alone.write("one")
    alone.back_up()
    with drill.sandbox(alone.settings) as sandbox:
        for picked in drill.select(alone.control_plane, alone.settings, tenant_id=alone.tenant_id):
            tested = drill.run(
                alone.control_plane, alone.objects, drill.fetch(alone.objects, picked, sandbox, alone.control_plane)
            )
            drill.record(alone.control_plane, tested)
    segment(alone.settings, [event(alone.tenant_id)] * 1 + [event(worse.tenant_id) for _ in range(3)])
    list(metering.drain_all(alone.control_plane, alone.settings))
    report = made(alone, "")
    assert report.books is not None
    recovery, top = report.books.recovery, report.books.top
    assert (recovery.tenants, recovery.never, recovery.stale) == (2, 1, 0)
    assert sum(recovery.age_buckets) == 2 == recovery.age_buckets[0]
    assert recovery.drills == {"passed": 1, "failed": 0, "inconclusive": 0} and recovery.drill_pass_rate == 1.0
    parts = [recovery.rto_ms[part].longest for part in ("download", "decrypt", "verify", "smoke")]
    assert recovery.rto_ms["total"].longest == pytest.approx(sum(parts), abs=0.01)
    assert [(t.tenant_id, t.api_calls, t.share) for t in top] == [
        (worse.tenant_id, 3, 0.75),
        (alone.tenant_id, 1, 0.25),
    ]


def test_the_command_prints_its_report_and_is_not_green_without_prometheus(alone: World) -> None:
    """stdout carries the JSON alone; the exit code is for the timer that runs it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PREFECT_"))} | {
        "ENGRAM_DATA_DIR": str(alone.settings.data_dir),
        "ENGRAM_CONTROL_PLANE_URL": alone.settings.control_plane_url.get_secret_value(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli", "slo-report", "--json"],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "ENGRAM_PROMETHEUS_URL is not set" in done.stderr
    document = json.loads(done.stdout)
    assert document["state"] == "not measured" and document["measured"] is None
    assert document["books"]["recovery"]["tenants"] == 1
