"""From an alert to its diagnosis to the action: Alertmanager's webhook, one run, its page, the form, three clicks."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page

from tests.acceptance.conftest import Stack
from tests.acceptance.test_ui import page, picture  # noqa: F401
from tests.core_fixtures import wait_until
from tests.ports import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(480)]
TENANT = "alerted"


@contextmanager
def bridge(stack: Stack, port: int) -> Iterator[Callable[..., list[str]]]:
    """`engram bridge` beside the stack; what is yielded posts alerts to it and returns their events' ids."""
    command = [sys.executable, "-m", "deployments.cli", "bridge"]
    process = subprocess.Popen(command, env=stack.environment | {"ENGRAM_BRIDGE_PORT": str(port)})
    url, answered = f"http://127.0.0.1:{port}", []

    def answers() -> bool:
        try:
            answered.append(httpx.get(f"{url}/health").status_code)
        except httpx.TransportError:
            return False
        return True

    def post(*alerts: dict[str, Any]) -> list[str]:
        token = (stack.data_dir / "bridge" / "token").read_text()
        body = {"version": "4", "status": "firing", "receiver": "bridge", "alerts": list(alerts)}
        answer = httpx.post(f"{url}/alerts", json=body, headers={"Authorization": f"Bearer {token}"}, timeout=30)
        assert answer.status_code == 200, answer.text
        events: list[str] = answer.json()["events"]
        return events

    try:
        wait_until(answers, 30)
        yield post
    finally:
        process.kill()
        process.wait()


def alert(name: str, fingerprint: str, subject: str, status: str = "firing") -> dict[str, Any]:
    return {
        "status": status,
        "labels": {"alertname": name, "diagnosis": subject, "severity": "page", "tenant_id": TENANT},
        "annotations": {"summary": "Tenant databases do not open.", "runbook": "database-open-failures.md"},
        "startsAt": datetime.now(UTC).isoformat(),
        "endsAt": datetime.now(UTC).isoformat() if status == "resolved" else "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus/graph",
        "fingerprint": fingerprint,
    }


def runs(stack: Stack, alertname: str) -> list[dict[str, Any]]:
    found = stack.prefect("POST", "flow_runs/filter", {"flows": {"name": {"any_": ["diagnose"]}}})
    return [run for run in found if run["parameters"]["alert"] == alertname]


def deploy_again(stack: Stack) -> None:
    """What `engram up` does at each start; an automation made anew would have forgotten what it diagnosed."""
    code = "import asyncio; from deployments import automation; asyncio.run(automation.ensure())"
    environment = stack.environment | {"PREFECT_API_URL": stack.status["prefect_api_url"]}
    subprocess.run([*stack.program, "-c", code], env=environment, check=True, timeout=120)


def overwrite(stack: Stack) -> None:
    """The database's first page, once no page of the write-ahead log hides it any more."""
    path = os.path.realpath(stack.data_dir / "tenants" / TENANT / "engram.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(path, "r+b") as file:
        file.write(b"not a database. " * 256)


def test_an_alert_is_diagnosed_once_and_three_clicks_lead_to_the_form_that_mends_it(stack: Stack, page: Page) -> None:  # noqa: F811
    """What is on call sees one run for one alert, however often it was sent, and what to do with the form filled in."""
    client = stack.tenant(TENANT)
    memory = client.post("/v1/memories", json={"content": "must come back"}).json()
    [backup] = stack.json("backup", TENANT)
    overwrite(stack)
    broken = alert("EngramDatabaseOpenFailures", "8ed0e7e0d1b6c3f2", "tenant-db")
    [port] = free_ports(1)

    with bridge(stack, port) as post:
        assert post(broken) == post(broken)
        wait_until(lambda: [r["state_type"] for r in runs(stack, "EngramDatabaseOpenFailures")] == ["COMPLETED"], 150)
    deploy_again(stack)
    with bridge(stack, port) as post:  # another process that knows nothing of the first
        ended = alert("EngramEnded", "8ed0e7e0d1b6c3f3", "tenant-db", "resolved")
        post(broken, ended, alert("EngramLast", "8ed0e7e0d1b6c3f4", "metering"))
        wait_until(lambda: runs(stack, "EngramLast") != [], 60)  # events are taken in their order
    assert len(runs(stack, "EngramDatabaseOpenFailures")) == 1
    assert runs(stack, "EngramEnded") == []

    [run] = runs(stack, "EngramDatabaseOpenFailures")
    assert run["name"] == f"diagnose-tenant-db-{TENANT}"
    [artifact] = stack.prefect("POST", "artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    assert artifact["key"] == f"diagnose-tenant-db-{TENANT}"  # of the rules' alerts, which name no tenant, without it
    assert f"engram restore {TENANT} --backup {backup['backup_id']}" in artifact["data"], artifact["data"]
    follow(page, f"{stack.status['prefect_ui_url']}/artifacts/key/{artifact['key']}", backup["backup_id"])
    wait_until(lambda: restored(stack), 90)
    assert client.get(f"/v1/memories/{memory['id']}").json() == memory


def follow(page: Page, diagnosis_url: str, backup_id: str) -> None:  # noqa: F811
    """As somebody who was called: the alert's link (`diagnosis_url` in the rules), what was seen, the filled form; and
    then what sends it."""
    page.goto(diagnosis_url)
    page.get_by_text("Proposed:").first.wait_for()
    page.locator("a[href*='/artifacts/artifact/']").first.click()
    page.get_by_text(f"the database of {TENANT} is corrupt").first.wait_for()
    page.get_by_text("normal range").wait_for()
    picture(page, "diagnosis")
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Open the form of restore").click()
    form = opened.value
    form.get_by_text("The tenant whose database is replaced.").wait_for()
    boxes = form.locator("textarea")
    assert (boxes.nth(0).input_value(), boxes.nth(1).input_value()) == (TENANT, backup_id)
    picture(form, "proposed-form")
    form.get_by_role("button", name="Submit").click()
    form.get_by_text("Task Runs", exact=False).first.or_(form.get_by_text("restore", exact=False).first).wait_for()


def restored(stack: Stack) -> bool:
    rows = stack.rows("SELECT state FROM restores WHERE tenant_id = %s", TENANT)
    assert [state for (state,) in rows if state not in ("running", "restored")] == []
    return rows == [("restored",)]
