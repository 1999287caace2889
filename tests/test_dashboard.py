"""The dashboard that people look at is the one the code builds, and each of its queries means something."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deployments.grafana import dashboard
from shared import metrics
from tests.gateway_stack import Stack, eventually, stack  # noqa: F401
from tests.prometheus_fixtures import RULES, prometheus, write_past

BY_OTHERS = {"up", "ALERTS", "probe_success"}  # Prometheus itself, and its prober


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(dashboard.FILE.read_text())["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """By panel and letter, as Prometheus gets them from Grafana."""
    document = json.loads(dashboard.FILE.read_text())
    found = {f"{panel['title']} {target['refId']}": target["expr"] for panel in panels() for target in panel["targets"]}
    found |= {one["name"]: one["expr"] for one in document["annotations"]["list"]}
    return {name: query.replace("$__rate_interval", "1m") for name, query in found.items()}


def known() -> set[str]:
    """Every metric of the product, with the series of its histograms, and every recording rule."""
    own = set()
    for name, kind in re.findall(r"^# TYPE (engram_\w+) (\w+)$", metrics.render().decode(), re.MULTILINE):
        own |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    own = {name for name in own if not name.endswith("_created")}
    groups = [group for path in RULES for group in yaml.load(path.read_text(), yaml.CSafeLoader)["groups"]]
    return own | {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def names(query: str) -> set[str]:
    """The metrics a query names: identifiers that are neither functions, label names nor keywords."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', " ", query)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    words = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\s*\()\b", bare)
    return {word for word in words if not re.search(rf"\b{word}\s*\(", bare)} - {
        "and",
        "or",
        "unless",
        "bool",
        "offset",
    }


@pytest.fixture
def scraped(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A Prometheus that knows a day of the rules' own series and then scraped the session's gateway, which had served a
    little of everything."""
    running: Stack = request.getfixturevalue("stack")
    now = datetime.now(UTC)
    day = [now - timedelta(minutes=5 * n) for n in range(26 * 12, -1, -1)]
    past = {name: [(at, 1.0) for at in day] for name in ("requests", "timed", "fast", "auth_failures", "rate_limited")}
    series = {f"engram:{name}:rate5m": samples for name, samples in past.items()}
    series['probe_success{job="engram-probe",probe="health",instance="outside"}'] = [(now, 1.0)]
    write_past(tmp_path, series)
    with prometheus(tmp_path, scrape=[running.gateway.url.removeprefix("http://")]) as url:
        eventually(lambda: ask(url, "query", "engram_auth_failures_total"))
        with running.client(running.idle_tenant) as client:
            client.post("/v1/search", json={"query": "anything"}).raise_for_status()
        assert httpx.get(f"{running.gateway.url}/v1/memories", trust_env=False).status_code == 401
        eventually(lambda: ask(url, "query", "sum(rate(engram_auth_failures_total[1m])) > 0"))
        # What comes last: the fleet's ages, which a gateway asks PostgreSQL for.
        eventually(lambda: ask(url, "query", "engram_maintenance_held_seconds and on () engram:slo:burn_rate3d"), 60)
        yield url


def ask(url: str, what: str, query: str, **parameters: Any) -> list[dict[str, Any]]:
    answer = httpx.get(f"{url}/api/v1/{what}", params={"query": query, **parameters}, trust_env=False)
    assert answer.status_code == 200, f"{query}: {answer.text}"
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def test_the_json_in_the_tree_is_what_the_code_builds() -> None:
    """Change the code, run `python -m deployments.grafana.dashboard`, commit both."""
    assert dashboard.FILE.read_text() == dashboard.build()


def test_every_query_names_only_what_exists() -> None:
    """A renamed metric leaves an empty panel, and nobody misses what they do not see."""
    for name, query in queries().items():
        assert names(query), name
        assert names(query) <= known() | BY_OTHERS, name


def test_every_metric_that_means_trouble_is_on_the_dashboard() -> None:
    """A metric somebody adds for an alert is looked for here at 3 a.m."""
    shown = set().union(*(names(query) for query in queries().values()))
    recorded = {
        name
        for path in RULES
        for group in yaml.load(path.read_text(), yaml.CSafeLoader)["groups"]
        for rule in group["rules"]
        if rule.get("record") in shown
        for name in names(rule["expr"])
    }
    own = {name for name in known() if name.startswith("engram_") and not re.search(r"_(bucket|sum|count)$", name)}
    assert own <= shown | recorded | {"engram_usage_spool_limit_bytes"}


def test_panels_have_places_of_their_own_and_runbooks_that_exist() -> None:
    """Two panels on one place hide each other; a runbook's name is there to be opened."""
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["description"]
        for runbook in re.findall(r"[\w*-]+\.md", panel["description"]):
            assert list((dashboard.FILE.parent.parent / "runbooks").glob(runbook)), runbook


def test_every_query_runs_and_shows_something_of_a_gateway_that_serves(scraped: str) -> None:
    """Against a Prometheus that scraped a real gateway: no query is refused, and every metric it reads is there."""
    now = time.time()
    every = httpx.get(f"{scraped}/api/v1/label/__name__/values", trust_env=False).json()["data"]
    assert {name for query in queries().values() for name in names(query)} - set(every) <= {"ALERTS"}  # none fires
    empty = {
        name
        for name, query in queries().items()
        if not ask(scraped, "query_range", query, start=now - 60, end=now, step=5)
    }
    # These show only what happened: nothing fired, no quota was exceeded, nothing was shed.
    assert empty <= {"Alerts", "Quotas and shedding A", "Quotas and shedding B"}
