"""The bridge: who may speak to it, what it makes of an alert, and that nothing is lost or doubled on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from deployments import bridge
from deployments.bridge import Bridge, Event
from shared.errors import Permanent, Transient
from shared.settings import Settings
from tests.ports import free_port

TOKEN = "a-credential-of-forty-characters-or-so"
PORT_WAIT_SECONDS = 20.0


def alert(**changes: Any) -> dict[str, Any]:
    """One alert as Alertmanager 0.25 sends it."""
    made: dict[str, Any] = {
        "status": "firing",
        "labels": {"alertname": "EngramDatabaseOpenFailures", "diagnosis": "tenant-db", "severity": "page"},
        "annotations": {"summary": "Tenant databases do not open.", "runbook": "database-open-failures.md"},
        "startsAt": "2026-11-23T02:00:00.123Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus:9090/graph?g0.expr=x",
        "fingerprint": "8ed0e7e0d1b6c3f2",
    }
    return made | changes


def notification(*alerts: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": "4",
        "groupKey": '{}:{alertname="EngramDatabaseOpenFailures"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "bridge",
        "groupLabels": {"alertname": "EngramDatabaseOpenFailures"},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "http://alertmanager:9093",
        "alerts": list(alerts),
    }


class Prefect:
    """What the bridge passed on, to Prefect and as heartbeats to the switch; `down` refuses."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.heartbeats = 0
        self.down = False

    async def __call__(self, events: Sequence[Event]) -> None:
        if self.down:
            raise Transient("Prefect does not answer: connection refused")
        self.events += events

    async def beat(self) -> None:
        if self.down:
            raise Transient("the dead man's switch does not answer: ConnectError")
        self.heartbeats += 1


@pytest.fixture
def prefect() -> Prefect:
    return Prefect()


def ask(prefect: Prefect, method: str = "POST", path: str = "/alerts", **how: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {TOKEN}"} | how.pop("headers", {})

    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(Bridge(TOKEN, 10_000, prefect, prefect.beat))
        async with httpx.AsyncClient(transport=transport, base_url="http://bridge") as client:
            return await client.request(method, path, headers=headers, **how)

    return asyncio.run(answer())


def test_an_alert_becomes_one_event_with_its_subject(prefect: Prefect) -> None:
    """The automation and the flow read nothing but this event."""
    answer = ask(prefect, json=notification(alert()))
    assert answer.status_code == 200
    [event] = prefect.events
    assert answer.json() == {"events": [event["id"]]}
    assert event["event"] == bridge.FIRING
    assert event["resource"]["prefect.resource.id"] == "engram.alert.8ed0e7e0d1b6c3f2"
    assert event["resource"]["engram.diagnosis"] == "tenant-db"
    assert event["payload"]["subject"] == "tenant-db"
    assert event["payload"]["tenant_id"] is None
    assert event["payload"]["annotations"]["runbook"] == "database-open-failures.md"


def test_the_same_alert_is_the_same_event_whenever_and_however_its_time_is_written(prefect: Prefect) -> None:
    """A repeat, hours later or by another bridge, must be recognised by its id and its time alone."""
    for starts_at in ("2026-11-23T02:00:00.123Z", "2026-11-23T03:00:00.123000+01:00"):
        ask(prefect, json=notification(alert(startsAt=starts_at)))
    first, second = prefect.events
    assert first == second


@pytest.mark.parametrize(
    "changes", [{"fingerprint": "8ed0e7e0d1b6c3f3"}, {"startsAt": "2026-11-23T02:00:01Z"}, {"status": "resolved"}]
)
def test_another_alert_another_time_or_its_end_is_another_event(prefect: Prefect, changes: dict[str, Any]) -> None:
    """An alert that comes back an hour later is diagnosed again."""
    ask(prefect, json=notification(alert(), alert(**changes)))
    assert len({event["id"] for event in prefect.events}) == 2


def test_a_resolved_alert_and_one_without_a_subject_start_nothing(prefect: Prefect) -> None:
    """The automation starts runs for firing events with a subject it knows; these are not such."""
    unknown = alert(labels={"alertname": "EngramGatewayDown", "diagnosis": "../../etc"})
    ask(prefect, json=notification(alert(status="resolved", endsAt="2026-11-23T02:10:00Z"), unknown))
    assert [(e["event"], e["resource"]["engram.diagnosis"]) for e in prefect.events] == [
        (bridge.RESOLVED, "tenant-db"),
        (bridge.FIRING, "none"),
    ]


def test_a_tenant_label_is_passed_on_only_if_it_is_a_tenant_id(prefect: Prefect) -> None:
    """Labels come from outside; the run's parameter is a path's part in the end."""
    labels = alert()["labels"]
    for name in ("acme", "../acme"):
        ask(prefect, json=notification(alert(labels=labels | {"tenant_id": name})))
    assert [event["payload"]["tenant_id"] for event in prefect.events] == ["acme", None]


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN, f"bearer{TOKEN}"]
)
def test_without_the_credential_there_is_one_answer_and_nothing_is_done(prefect: Prefect, header: str) -> None:
    """Why it was refused is nobody's business; a body is not even read."""
    answer = ask(prefect, headers={"Authorization": header}, json=notification(alert()))
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert answer.json() == {"type": "about:blank", "title": "Unauthorized", "status": 401}
    assert prefect.events == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated"),
        (b"[]", "object"),
        (b'{"version": "3", "alerts": []}', "version"),
        (b'{"version": "4", "alerts": [{}]}', "status"),
        (
            b'{"version": "4", "alerts": [{"status": "firing", "labels": {}, "startsAt": "x", "fingerprint": "a"}]}',
            "time",
        ),
        (b'{"version": "4", "alerts": [], "receiver": "\xff}', "truncated"),
    ],
)
def test_what_is_no_notification_is_refused_with_its_cause(prefect: Prefect, content: bytes, says: str) -> None:
    """400 and not 5xx: Alertmanager need not send the same nonsense again."""
    answer = ask(prefect, content=content)
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert says.lower() in answer.json()["detail"].lower()


def test_a_body_beyond_the_limit_is_refused(prefect: Prefect) -> None:
    """Whoever has the credential must not be able to fill the memory either."""
    assert ask(prefect, content=b" " * 10_001).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("GET", "/alerts", 405), ("GET", "/heartbeat", 405), ("POST", "/health", 405)),
        *(("GET", "/", 404), ("POST", "/alerts/", 404)),
    ],
)
def test_only_its_routes_are_answered(prefect: Prefect, method: str, path: str, status: int) -> None:
    """No listing, no documentation, nothing to look around in."""
    assert ask(prefect, method, path).status_code == status


def test_without_prefect_alertmanager_is_told_to_try_again_and_then_nothing_is_missing(prefect: Prefect) -> None:
    """An answer 200 means that Prefect has all of them; anything else would lose an alert."""
    prefect.down = True
    answer = ask(prefect, json=notification(alert()))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    prefect.down = False
    assert ask(prefect, json=notification(alert())).status_code == 200
    assert len(prefect.events) == 1


def test_a_heartbeat_reaches_the_switch_and_is_never_an_event(prefect: Prefect) -> None:
    """What always fires must start no diagnosis; one that did not arrive must be sent again."""
    watchdog = notification(alert(labels={"alertname": "EngramWatchdog", "severity": "none"}))
    assert ask(prefect, path="/heartbeat", json=watchdog).status_code == 200
    assert ask(prefect, path="/heartbeat", headers={"Authorization": "Bearer wrong"}).status_code == 401
    prefect.down = True
    answer = ask(prefect, path="/heartbeat", json=watchdog)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert (prefect.events, prefect.heartbeats) == ([], 1)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", ""),
        ("https://switch.test/ok-hunter2", ""),
        ("https://switch.test/gone-hunter2", "answers 404"),
        ("https://nowhere.test/hunter2", "ConnectError"),
        ("hunter2", "UnsupportedProtocol"),
        ("https://switch.test:hunter2/", "InvalidURL"),
    ],
)
def test_the_switch_is_asked_where_there_is_one_and_its_address_is_never_told(url: str, says: str) -> None:
    """Whoever has the address can keep it quiet; errors are logged and answered."""
    asked = []

    def switch(request: httpx.Request) -> httpx.Response:
        if request.url.host == "nowhere.test":
            raise httpx.ConnectError(f"no {request.url}")
        asked.append(str(request.url))
        return httpx.Response(404 if "gone" in request.url.path else 200)

    async def beat() -> None:
        async with httpx.AsyncClient(mounts={"https://": httpx.MockTransport(switch)}) as client:
            await bridge.to_switch(Settings(heartbeat_url=SecretStr(url)), client)()

    if says:
        with pytest.raises(Transient, match=says) as refused:
            asyncio.run(beat())
        assert "hunter2" not in str(refused.value) and refused.value.__cause__ is None
    else:
        asyncio.run(beat())
    assert asked == [url] * url.startswith("https://switch.test/")


def test_a_long_annotation_is_cut_before_prefect_drops_the_event(prefect: Prefect) -> None:
    """Prefect answers 204 to an event that is too large for it and forgets it."""
    ask(prefect, json=notification(alert(annotations={"summary": "x" * 5_000})))
    assert len(prefect.events[0]["payload"]["annotations"]["summary"]) == 1_000


def test_the_credential_of_dev_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    """Alertmanager reads the file; a new one at each start would lock it out."""
    settings = Settings(data_dir=tmp_path)
    token = bridge.ensure_token(settings)
    assert len(token) >= 32
    assert bridge.ensure_token(settings) == token == bridge.token_file(settings).read_text()
    assert stat.S_IMODE(bridge.token_file(settings).stat().st_mode) == 0o600
    chosen = settings.model_copy(update={"bridge_token": SecretStr("chosen")})
    assert bridge.ensure_token(chosen) == "chosen" == bridge.token_file(settings).read_text()


def test_outside_dev_a_credential_has_to_be_given(tmp_path: Path) -> None:
    """One that nobody gave to Alertmanager would only look like protection."""
    with pytest.raises(Permanent, match="ENGRAM_BRIDGE_TOKEN"):
        bridge.ensure_token(Settings(data_dir=tmp_path, env="prod"))


def test_the_process_answers_refuses_and_leaves_on_sigterm(tmp_path: Path) -> None:
    """The real server, with no Prefect behind it: what production starts."""
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PREFECT_"))}
    environment |= {
        "ENGRAM_DATA_DIR": str(tmp_path),
        "ENGRAM_BRIDGE_PORT": str(port),
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
    }
    process = subprocess.Popen([sys.executable, "-m", "deployments.cli", "bridge"], env=environment)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PORT_WAIT_SECONDS
        while True:
            try:
                assert httpx.get(f"{url}/health").json() == {"status": "ok"}
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline, "the bridge does not answer"
                time.sleep(0.05)
        token = bridge.token_file(Settings(data_dir=tmp_path)).read_text()
        body = notification(alert())
        assert httpx.post(f"{url}/alerts", json=body).status_code == 401
        answer = httpx.post(f"{url}/alerts", json=body, headers={"Authorization": f"Bearer {token}"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PORT_WAIT_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
