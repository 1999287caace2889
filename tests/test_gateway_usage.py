"""What a request leaves behind: exactly one event, one access line, one count."""

from __future__ import annotations

import asyncio
import collections
import fcntl
import socket
import tempfile
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.usage import UsageReport
from shared.errors import ControlPlaneUnavailable
from shared.metrics import ROUTES
from shared.settings import Settings
from shared.tenant import TenantPaths
from tests.gateway_stack import Stack, assert_problem, eventually, stack  # noqa: F401
from tests.test_spool import drain


def test_every_request_that_reached_a_tenant_is_one_event_with_exact_counters(stack: Stack) -> None:  # noqa: F811
    """Ids in the answers and in the spool are the same set, each with what its answer is billed for."""
    tenant = stack.tenant()
    expected: dict[str, tuple[str, int, int, int, int]] = {}
    guard = threading.Lock()

    def note(response: httpx.Response, route: str, counters: tuple[int, int, int]) -> httpx.Response:
        with guard:
            expected[response.headers["x-request-id"]] = (route, response.status_code, *counters)
        return response

    def client() -> None:
        with stack.client(tenant) as api:
            for n in range(10):
                made = note(api.post("/v1/memories", json={"content": f"m {n}"}), "/v1/memories", (1, 0, 1))
                path, route = f"/v1/memories/{made.json()['id']}", "/v1/memories/{id}"
                note(api.get(path), route, (1, 0, 0))
                note(api.patch(path, json={"content": "y"}), route, (1, 0, 0))
                note(api.get("/v1/memories"), "/v1/memories", (1, 0, 0))
                note(api.post("/v1/search", json={"query": "y"}), "/v1/search", (1, 1, 0))
                note(api.post("/v1/search", json={"query": '"'}), "/v1/search", (1, 0, 0))
                note(api.post("/v1/memories", json={}), "/v1/memories", (1, 0, 0))
                note(api.get("/v1/usage"), "/v1/usage", (1, 0, 0))
                note(api.delete(path), route, (1, 0, 0))
                note(api.get(path), route, (1, 0, 0))
                note(api.get("/v1/memories", headers={"X-Engram-Tenant": "x"}), "/v1/memories", (1, 0, 0))
                api.get("/v1/nothing")  # no route, no tenant: no event
                api.get("/v1/memories", headers={"Authorization": "Bearer x"})

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = stack.gateway.events(tenant)
    seen = {
        str(uuid.UUID(bytes=e.request_id)): (e.route, e.status, e.api_calls, e.search_queries, e.memories_created)
        for e in events
    }
    assert seen == expected and len(events) == len(expected) == 4 * 10 * 11
    now_us = datetime.now(UTC).timestamp() * 1e6
    assert all(now_us - 120e6 < e.ts_us <= now_us for e in events)


def _raw(stack: Stack, tenant: str, head: str) -> socket.socket:  # noqa: F811
    where = urlsplit(stack.gateway.url)
    connection = socket.create_connection((where.hostname, where.port))
    token = stack.issuer.token(tenant)
    request = f"{head}\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
    connection.sendall(request.encode())
    return connection


def test_a_client_that_leaves_before_the_answer_is_one_event(stack: Stack) -> None:  # noqa: F811
    """Half a body and gone: recorded once, as 499, and nothing is stored."""
    tenant = stack.tenant()
    with stack.client(tenant) as api:
        assert api.get("/v1/memories").status_code == 200
        with _raw(stack, tenant, "POST /v1/memories HTTP/1.1") as connection:
            connection.sendall(b'Content-Length: 100\r\n\r\n{"content": "x')
        events = eventually(lambda: e if len(e := stack.gateway.events(tenant)) == 2 else None)
        assert sorted(e.status for e in events) == [200, 499]
        assert api.get("/v1/memories").json()["memories"] == []
    assert len(stack.gateway.events(tenant)) == 3


def test_usage_is_not_complete_until_a_slow_request_has_ended(stack: Stack) -> None:  # noqa: F811
    """Who stores its body for seconds is counted from its first byte on, in whatever worker it is."""
    tenant = stack.tenant()

    def complete_until(api: httpx.Client) -> datetime:
        return datetime.fromisoformat(api.get("/v1/usage").json()["complete_until"])

    with stack.client(tenant) as api:
        with _raw(stack, tenant, "POST /v1/memories HTTP/1.1") as connection:
            connection.sendall(b'Content-Length: 16\r\n\r\n{"content"')
            time.sleep(1.0)
            sent = datetime.now(UTC)
            time.sleep(0.5)
            drain(stack.settings.spool_dir)
            assert complete_until(api) < sent
            connection.sendall(b': "x"}')
            assert b" 201 " in connection.recv(4096).splitlines()[0]

        def passed() -> bool:
            drain(stack.settings.spool_dir)
            return complete_until(api) > sent

        eventually(passed)


def test_a_write_that_was_stored_is_billed_though_its_client_left(stack: Stack) -> None:  # noqa: F811
    """A request that reached its handler runs to its end: as many memories are billed as are stored."""
    tenant = stack.tenant()
    with stack.client(tenant) as api:
        for _ in range(20):
            with _raw(stack, tenant, "POST /v1/memories HTTP/1.1") as connection:
                connection.sendall(b'Content-Length: 16\r\n\r\n{"content": "x"}')

        def billed_and_stored() -> list[int]:
            events = stack.gateway.events(tenant)
            ours = [sum(e.memories_created for e in events), len(api.get("/v1/memories").json()["memories"])]
            return ours if ours[0] == ours[1] > 0 else []

        eventually(billed_and_stored)
        ids = [e.request_id for e in stack.gateway.events(tenant)]
        assert len(set(ids)) == len(ids)


def test_usage_answers_the_rollups_of_the_window_and_what_is_kept_now(stack: Stack) -> None:  # noqa: F811
    """Hours that begin in [from, to); the default is this month; another tenant's hours never count."""
    tenant, other = stack.tenant(), stack.tenant()
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    with stack.control_plane.transaction() as connection:
        for who, bucket, calls in ((tenant, hour, 5), (tenant, hour - timedelta(days=400), 7), (other, hour, 100)):
            connection.execute(
                "INSERT INTO usage_hourly (tenant_id, bucket, api_calls, search_queries, memories_created)"
                " VALUES (%s, %s, %s, 2, 1)",
                (who, bucket, calls),
            )
    with stack.client(tenant) as api:
        month = api.get("/v1/usage").json()
        assert month.keys() == {
            "tenant_id", "from", "to", "api_calls", "search_queries", "memories_created", "storage_bytes",
            "granularity", "complete_until", "buckets",
        }  # fmt: skip
        assert (month["api_calls"], month["search_queries"], month["memories_created"]) == (5, 2, 1)
        assert month["tenant_id"] == tenant and month["storage_bytes"] > 4_096
        with TenantPaths.of(stack.settings.tenants_dir, tenant).lock.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # as a restore that swaps: the counters are told all the same
            swapped = api.get("/v1/usage").json()
            assert swapped["api_calls"] == 5 and swapped["storage_bytes"] is None
        ever = api.get("/v1/usage", params={"from": "2020-01-01T00:00:00Z", "to": "2100-01-01"}).json()
        assert ever["api_calls"] == 12
        unescaped = api.get("/v1/usage?from=2020-01-01T00:00:00+00:00&to=2100-01-01T00:00:00+00:00")
        assert unescaped.json()["api_calls"] == 12
        for bad in ({"from": "yesterday"}, {"to": "0"}, {"from": "2100-01-01"}, {"from": "0001-01-01T00:00+14:00"}):
            assert_problem(api.get("/v1/usage", params=bad), 400)


def test_usage_that_does_not_come_is_given_up_and_never_begun_later() -> None:
    """What waits behind it is not read for nobody; while no thread is free nobody waits; and when the control plane
    answers again the next one is read."""
    answers, begun, asked = threading.Event(), threading.Semaphore(0), []

    def row(*_: object, tenant_id: str) -> None:
        asked.append(tenant_id)
        begun.release()
        answers.wait(60)

    async def test() -> None:
        with tempfile.TemporaryDirectory() as directory:
            settings = Settings(data_dir=directory, usage_report_wait_seconds=0.2)
            usage = UsageReport(SimpleNamespace(row=row, rows=lambda *_, **__: []), settings)  # type: ignore[arg-type]
            now = datetime.now(UTC)
            waiting = [asyncio.create_task(usage.of(f"t{n}", now, now, "day")) for n in range(4)]
            await asyncio.sleep(0)
            # The loop stands still meanwhile: no time is up before both threads have begun.
            assert begun.acquire(timeout=20) and begun.acquire(timeout=20)
            refused = [type(each) for each in await asyncio.gather(*waiting, return_exceptions=True)]
            assert refused == [ControlPlaneUnavailable] * 4 and sorted(asked) == ["t0", "t1"]
            under_way = len(usage._asked_at)
            with pytest.raises(ControlPlaneUnavailable, match="earlier reports"):
                await usage.of("t4", now, now, "day")
            assert under_way == len(usage._asked_at) == 2
            answers.set()
            while usage._asked_at:
                await asyncio.sleep(0.01)
            usage._wait_seconds = 20
            assert (await usage.of("t5", now, now, "day")).tenant_id == "t5"
            assert sorted(asked) == ["t0", "t1", "t5"]
            usage.close()

    asyncio.run(test())


def test_an_access_line_says_who_what_and_how_long_and_nothing_secret(stack: Stack) -> None:  # noqa: F811
    """Exact fields; neither token, content, query text nor tag is anywhere in the log."""
    tenant = stack.tenant()
    secrets = ["sesame-content", "sesame-query", "sesame-tag", "sesame-meta"]
    with stack.client(tenant) as api:
        token = api.headers["authorization"].partition(" ")[2]
        made = api.post(
            "/v1/memories",
            json={"content": secrets[0], "tags": [secrets[2]], "metadata": {"k": secrets[3]}},
            headers={"X-Request-Id": "client-7"},
        )
        api.post("/v1/search", json={"query": f'"{secrets[1]}'})
        api.get("/v1/memories", params={"tag": secrets[2], "limit": 0})
        last = api.get("/v1/memories", params={"tag": secrets[2]})
    line = stack.gateway.access_line(made.headers["x-request-id"])
    stack.gateway.access_line(last.headers["x-request-id"])
    assert line.keys() == {
        "component", "event", "level", "ts", "request_id", "tenant_id", "route", "method", "status", "latency_ms",
        "client_request_id", "client",
    }  # fmt: skip
    assert (line["tenant_id"], line["route"], line["method"], line["status"]) == (tenant, "/v1/memories", "POST", 201)
    assert line["client_request_id"] == "client-7" and line["latency_ms"] > 0
    text = stack.gateway.log_path.read_text()
    for secret in (*secrets, token, token.rpartition(".")[2]):
        assert secret not in text


def test_metrics_are_the_sum_of_all_workers_with_every_counter_from_the_start(stack: Stack) -> None:  # noqa: F811
    """New connections spread over the workers; any of them answers for all."""
    gateway = stack.gateway
    before = gateway.metric("engram_requests_total", route="/health", method="GET", status="200")
    for _ in range(40):
        httpx.get(f"{gateway.url}/health", trust_env=False)
    after = gateway.metric("engram_requests_total", route="/health", method="GET", status="200")
    assert after == before + 40
    text = gateway.client.get("/metrics").text
    for counter in ("usage_lost_total", "usage_flush_failures_total", "db_open_failures_total"):
        assert f"\nengram_{counter} " in text
    assert gateway.metric("engram_requests_total", route="/v1/memories", status="500") == 0
    for edge in ("0.25", "0.5"):
        assert f'engram_request_duration_seconds_bucket{{le="{edge}",route="/v1/search"}}' in text
    routes = collections.Counter(
        line.partition('route="')[2].partition('"')[0]
        for line in text.splitlines()
        if line.startswith("engram_requests_total{")
    )
    assert set(routes) <= set(ROUTES)
    assert gateway.metric("engram_jwks_fetch_total", outcome="ok") >= 1
    assert "tenant" not in {p.partition("=")[0] for p in text.replace("{", ",").split(",")}


def test_the_log_is_json_lines_from_the_first_to_the_last(stack: Stack) -> None:  # noqa: F811
    """Granian's own lines included: one parser reads the whole stream."""
    stack.gateway.access_line(stack.gateway.client.get("/health").headers["x-request-id"])
    events = stack.gateway.log()
    assert all("event" in e and "ts" in e and "level" in e for e in events)
    assert all("component" in e for e in events), [e for e in events if "component" not in e]
    assert any(e["component"] == "granian" for e in events) and any(e["component"] == "access" for e in events)
