"""Answers that wait for their usage to be durable, and a gateway whose spool is at its limit."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.access_log import AccessLog
from gateway.edge import Edge
from gateway.exchange import exchange_of
from shared import metrics
from shared.spool import Spool
from shared.usage_batch import Batch
from tests.core_fixtures import settings_in
from tests.gateway_stack import Gateway, Stack, assert_problem, eventually, gateway, stack
from tests.test_spool import drain

assert stack  # a fixture
BLOCK = 4096


class Disk:
    """`os.fdatasync` waits for `free`, fails when `broken`, and is counted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.free, self.broken, self.calls = threading.Event(), False, 0
        self._real = os.fdatasync
        patch.setattr(os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        self.calls += 1
        assert self.free.wait(30)
        if self.broken:
            raise OSError(5, "Input/output error")
        self._real(fd)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(monkeypatch)
    yield made
    made.free.set()


class Served:
    """An edge in sync mode around an application that answers 201 to a tenant's request and 200 to others."""

    def __init__(self, directory: Path) -> None:
        self.spool = Spool(settings_in(directory, "", usage_flush_seconds=3600))
        self._lines, lines = os.pipe()
        self._access_log = AccessLog(lines)
        self.app = Edge(self._answer, self.spool, self._access_log, durable=True)
        self.answers: list[dict[str, Any]] = []

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        exchange = exchange_of(scope)
        scope["path_template"] = scope["path"]
        if reached := scope["path"] == "/v1/memories":
            exchange.tenant_id, exchange.reached, exchange.created = "acme", True, 1
        exchange.headers.append((b"x-kept", b"1"))
        await send({"type": "http.response.start", "status": 201 if reached else 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def request(self, path: str = "/v1/memories") -> None:
        async def send(message: dict[str, Any]) -> None:
            self.answers.append(message)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "headers": []}
        await self.app(scope, receive, send)

    def recorded(self) -> list[int]:
        """What the access log says."""
        self._access_log.drain()
        return [json.loads(line)["status"] for line in os.read(self._lines, 65_536).splitlines()]

    def statuses(self) -> list[int]:
        return [m["status"] for m in self.answers if m["type"] == "http.response.start"]


def test_no_answer_leaves_before_the_fdatasync_and_many_share_one(tmp_path: Path, disk: Disk) -> None:
    """32 requests cost three fdatasyncs at most: the one that ran, the one for all who came meanwhile, one to seal."""
    served = Served(tmp_path)

    async def run() -> None:
        requests = [asyncio.create_task(served.request()) for _ in range(32)]
        for _ in range(50):
            await asyncio.sleep(0.001)  # the loop is not blocked by the disk
        assert served.answers == []
        await served.request("/health")
        assert served.statuses() == [200], "what is not billed does not wait"
        disk.free.set()
        await asyncio.gather(*requests)

    asyncio.run(run())
    assert served.statuses() == [200] + [201] * 32
    assert disk.calls <= 2
    served.spool.close()
    assert len(drain(served.spool.dir)) == 32


def test_without_the_fdatasync_the_answer_is_a_503_problem_and_the_gateway_refuses_until_it_works(
    tmp_path: Path, disk: Disk
) -> None:
    """Nothing is acknowledged that a power loss could take, and the event, the metric and the access line say what the
    client was told: a 503 that costs nothing."""
    served = Served(tmp_path)
    counted = [requests("503"), requests("201")]
    disk.free.set()
    disk.broken = True

    async def run() -> None:
        await asyncio.gather(*(served.request() for _ in range(3)))
        assert served.statuses() == [503] * 3
        assert not served.spool.available
        disk.broken = False
        await served.request()
        assert served.statuses() == [503] * 3 + [201]
        assert served.spool.available

    asyncio.run(run())
    starts = [m for m in served.answers if m["type"] == "http.response.start"]
    bodies = [m["body"] for m in served.answers if m["type"] == "http.response.body"]
    assert len(bodies) == 4
    for start, body in zip(starts[:3], bodies[:3], strict=True):
        headers, problem = dict(start["headers"]), json.loads(body)
        assert headers[b"content-type"] == b"application/problem+json"
        assert headers[b"x-request-id"].decode() == problem["request_id"]
        assert headers[b"content-length"] == str(len(body)).encode()
        assert (headers[b"retry-after"], headers[b"x-kept"]) == (b"1", b"1")
        assert problem["reason"] == "spool full"
    assert [requests("503"), requests("201")] == [counted[0] + 3, counted[1] + 1]
    assert served.recorded() == [503] * 3 + [201]
    served.spool.close()
    billed = Batch.of(drain(served.spool.dir)).events  # in the order of ids, of which several have one millisecond
    assert Counter((e.status, e.api_calls, e.memories_created) for e in billed) == {(503, 0, 0): 3, (201, 1, 1): 1}


def test_an_event_the_disk_takes_no_byte_of_is_a_503_too(tmp_path: Path) -> None:
    """It waits in memory as what the client was told, and is billed as that when the disk is back."""
    served = Served(tmp_path)
    served.spool.dir.rmdir()
    asyncio.run(served.request())
    assert served.statuses() == served.recorded() == [503]
    served.spool.dir.mkdir()
    served.spool.close()
    assert [(e.status, e.api_calls) for e in drain(served.spool.dir)] == [(503, 0)]


def requests(status: str) -> float:
    found: float = metrics.requests_total.labels("/v1/memories", "POST", status)._value.get()
    return found


def test_a_client_that_leaves_while_it_waits_disturbs_nobody(tmp_path: Path, disk: Disk) -> None:
    """Its event stays, the others of its group get their answers."""
    served = Served(tmp_path)

    async def run() -> None:
        requests = [asyncio.create_task(served.request()) for _ in range(4)]
        await asyncio.sleep(0.01)
        requests[1].cancel()
        requests[3].cancel()
        await asyncio.sleep(0)
        disk.free.set()
        await asyncio.gather(*requests, return_exceptions=True)

    asyncio.run(run())
    assert served.statuses() == [201] * 2
    served.spool.close()
    assert len(drain(served.spool.dir)) == 4


@pytest.fixture
def limited(stack: Stack, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway in sync mode with room for 25 segments, and for a hundred more."""
    stack.lend_tenants(tmp_path)
    with gateway(
        tmp_path,
        stack.control_plane_url,
        stack.issuer,
        gateway_workers=1,
        usage_durability="sync",
        usage_flush_events=1,
        usage_spool_limit_bytes=25 * BLOCK,
        usage_spool_reserve_bytes=100 * BLOCK,
    ) as served:
        yield served


def test_at_the_limit_writes_are_503_reads_go_on_then_nobody_is_served_and_no_event_is_lost(
    stack: Stack,
    limited: Gateway,
) -> None:
    """By REST and by MCP, in sync mode; a spool that was drained lets everybody in again."""
    tenant = stack.tenant()
    api = limited.client
    api.headers.update(stack.headers(tenant))
    with ThreadPoolExecutor(8) as clients:
        made = list(clients.map(lambda n: api.post("/v1/memories", json={"content": f"m {n}"}), range(25)))
    assert [r.status_code for r in made] == [201] * 25
    answers: list[httpx.Response] = [*made]

    def ask(method: str, path: str = "/v1/memories", **body: Any) -> int:
        answers.append(api.request(method, path, **body))
        return answers[-1].status_code

    eventually(lambda: ask("POST", json={"content": "x"}) == 503)
    refused = answers[-1]
    assert assert_problem(refused, 503)["reason"] == "spool full"
    assert ask("GET") == 200
    assert ask("DELETE", f"/v1/memories/{made[0].json()['id']}") == 503
    assert api.get("/ready").status_code == 200
    call = {"name": "memory_create", "arguments": {"content": "x"}}
    accept = {"Accept": "application/json, text/event-stream"}
    rpc = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    tool = api.post("/v1/mcp", json=rpc, headers=accept)
    assert json.loads(tool.json()["result"]["content"][0]["text"])["reason"] == "spool full"
    answers.append(tool)

    with ThreadPoolExecutor(8) as clients:
        answers += clients.map(lambda _: api.get("/v1/memories"), range(120))
    eventually(lambda: ask("GET") == 503)
    assert limited.metric("engram_usage_spool_bytes") >= 125 * BLOCK
    assert limited.metric("engram_usage_spool_limit_bytes") == 25 * BLOCK
    assert assert_problem(api.get("/ready"), 503)["failing"] == ["spool"]
    billed = [r for r in answers if r.status_code != 503]
    ids = {e.request_id.hex() for e in limited.events(tenant)}
    assert ids == {r.headers["x-request-id"].replace("-", "") for r in billed}

    assert len(drain(limited.data_dir / "spool")) == len(billed)
    eventually(lambda: ask("POST", json={"content": "x"}) == 201)
    assert limited.metric("engram_usage_lost_total") == 0
    said = [x["now"] for x in limited.log() if x.get("event") == "usage_spool_level"]
    assert said[-1] == "ample"
    assert {"full", "reserve_gone"} <= set(said)
