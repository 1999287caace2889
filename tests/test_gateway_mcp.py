"""MCP over real HTTP: the official SDK's client against the gateway's two workers, in both protocol revisions."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from gateway.exchange import Exchange
from gateway.mcp import tools
from gateway.mcp.route import Origins
from gateway.mcp.tools import BATCH, RESULT_BYTES, Call, change_place
from gateway.problems import CLIENT_LEFT, Refusal
from gateway.shed import Gate
from shared import limits, registry
from shared.limits import Watch
from shared.settings import Settings
from shared.tenant import TenantPaths
from tests.gateway_stack import Stack, assert_problem, eventually, stack  # noqa: F401

TOOLS = {
    "memory_create": "memories:write",
    "memory_create_batch": "memories:write",
    "memory_get": "memories:read",
    "memory_update": "memories:write",
    "memory_delete": "memories:write",
    "memory_list": "memories:read",
    "memory_search": "search",
    "memory_stats": "memories:read",
}
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}


class Session:
    """A client of one tenant, and every HTTP answer it got by request id: status, method and tool."""

    def __init__(self, client: Client, answers: dict[str, tuple[int, str]]) -> None:
        self.client = client
        self.answers = answers

    async def ok(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The document of a tool that must not fail; its text says the same."""
        result = await self.client.call_tool(tool, arguments)
        assert not result.is_error, result
        document: dict[str, Any] = result.structured_content
        assert json.loads(result.content[0].text) == document
        return document

    async def problem(self, tool: str, status: int, **arguments: Any) -> dict[str, Any]:
        """The problem document of a tool that must fail with this status."""
        result = await self.client.call_tool(tool, arguments)
        assert result.is_error and result.structured_content is None, result
        document: dict[str, Any] = json.loads(result.content[0].text)
        assert {"type", "title", "status", "detail", "request_id"} <= document.keys()
        assert document["status"] == status, document
        assert document["request_id"] in self.answers
        return document


@asynccontextmanager
async def session(stack: Stack, tenant: str, mode: str = "auto", **claims: Any) -> AsyncIterator[Session]:  # noqa: F811
    """`mode` is "legacy" for 2025-11-25, else the newest revision both know."""
    answers: dict[str, tuple[int, str]] = {}

    async def note(response: httpx2.Response) -> None:
        message = json.loads(response.request.content)
        name = message["params"]["name"] if message["method"] == "tools/call" else message["method"]
        answers[response.headers["x-request-id"]] = (response.status_code, name)

    headers = stack.headers(tenant, **claims)
    async with httpx2.AsyncClient(
        headers=headers, event_hooks={"response": [note]}, timeout=30, trust_env=False
    ) as http:
        transport = streamable_http_client(f"{stack.gateway.url}/v1/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:
            yield Session(client, answers)


def within(
    stack: Stack,  # noqa: F811
    tenant: str,
    work: Callable[[Session], Awaitable[Any]],
    mode: str = "auto",
    **claims: Any,
) -> Any:
    """Run `work` with a session of this tenant."""

    async def run() -> Any:
        async with session(stack, tenant, mode, **claims) as opened:
            return await work(opened)

    return asyncio.run(run())


def events_of(stack: Stack, tenant: str) -> dict[str, tuple[str, int, int, int, int]]:  # noqa: F811
    events = stack.gateway.events(tenant)
    by_id = {
        str(uuid.UUID(bytes=e.request_id)): (e.route, e.status, e.api_calls, e.search_queries, e.memories_created)
        for e in events
    }
    assert len(by_id) == len(events)
    return by_id


@pytest.mark.parametrize(("mode", "revision"), [("legacy", "2025-11-25"), ("auto", "2026-07-28")])
def test_every_tool_does_its_job_in_both_revisions(stack: Stack, mode: str, revision: str) -> None:  # noqa: F811
    """One life of a memory, and what REST says of it: the same database, the same documents."""
    tenant = stack.tenant()
    with stack.client(tenant) as api:

        async def work(mcp: Session) -> None:
            assert mcp.client.protocol_version == revision
            made = await mcp.ok("memory_create", content="Łódź 💾", tags=["a", "b", "a"], metadata={"n": {"x": [1]}})
            path = f"/v1/memories/{made['id']}"
            assert made == api.get(path).json() and made["tags"] == ["a", "b"] and made["importance"] == 0.5
            assert await mcp.ok("memory_get", id=made["id"]) == made
            changed = await mcp.ok("memory_update", id=made["id"], content="apple", importance=1)
            assert changed == api.get(path).json() and changed["version"] == 2 and changed["tags"] == ["a", "b"]

            batch = await mcp.ok("memory_create_batch", memories=[{"content": f"pear {n}"} for n in range(5)])
            assert batch["count"] == 5 and [m["content"] for m in batch["memories"]] == [f"pear {n}" for n in range(5)]

            found = await mcp.ok("memory_search", query="apple")
            assert found == api.post("/v1/search", json={"query": "apple"}).json() and found["count"] == 1
            assert (await mcp.ok("memory_search", query="pear", limit=2))["count"] == 2

            walked, cursor = [], {}
            while True:
                page = await mcp.ok("memory_list", limit=4, **cursor)
                walked += page["memories"]
                if page["next_cursor"] is None:
                    break
                cursor = {"cursor": page["next_cursor"]}
            assert walked == api.get("/v1/memories").json()["memories"] and len(walked) == 6
            assert [m["id"] for m in (await mcp.ok("memory_list", tag="a"))["memories"]] == [made["id"]]

            assert await mcp.ok("memory_delete", id=made["id"]) == {"id": made["id"], "deleted": True}
            assert_problem(api.get(path), 404)
            stats = await mcp.ok("memory_stats")
            assert stats["memories"] == 5 and stats["by_type"] == {"note": 5} and stats["schema_version"] == 1
            assert stats["storage_bytes"] == api.get("/v1/usage").json()["storage_bytes"] > 4_096

        within(stack, tenant, work, mode)


def test_the_tools_of_the_contract_describe_themselves_as_strictly_as_rest_does(stack: Stack) -> None:  # noqa: F811
    """The bounds are the ones of the OpenAPI document, unknown arguments are refused, clients may cache the list."""
    openapi = stack.gateway.client.get("/schema/openapi.json").json()

    async def work(mcp: Session) -> None:
        listed = await mcp.client.list_tools()
        assert listed.ttl_ms > 0 and listed.cache_scope == "public"
        tools = {tool.name: tool for tool in listed.tools}
        assert tools.keys() == TOOLS.keys()
        for tool in tools.values():
            assert tool.input_schema["type"] == "object" and tool.input_schema["additionalProperties"] is False
            assert tool.description and tool.output_schema["type"] == "object"
        rest = openapi["components"]["schemas"]["CreateMemory"]["properties"]
        mine = tools["memory_create"].input_schema["properties"]
        for field in ("content", "memory_type"):
            assert mine[field]["maxLength"] == rest[field]["maxLength"]
        assert mine["importance"]["maximum"] == rest["importance"]["maximum"] == 1
        assert tools["memory_create_batch"].input_schema["properties"]["memories"]["maxItems"] == BATCH
        parameters = {p["name"]: p["schema"] for p in openapi["paths"]["/v1/memories"]["get"]["parameters"]}
        page = tools["memory_list"].input_schema["properties"]
        assert page["limit"]["maximum"] == parameters["limit"]["maximum"]
        assert tools["memory_delete"].annotations.destructive_hint and tools["memory_get"].annotations.read_only_hint

    within(stack, stack.idle_tenant, work)


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_a_tool_fails_with_the_problem_rest_would_answer(stack: Stack, mode: str) -> None:  # noqa: F811
    """Same status, same detail; the same for an id of nobody and one of another tenant."""
    tenant, other = stack.tenant(), stack.tenant()
    with stack.client(tenant) as api, stack.client(other) as stranger:
        foreign = stranger.post("/v1/memories", json={"content": "theirs"}).json()["id"]

        async def work(mcp: Session) -> None:
            missing = api.get(f"/v1/memories/{foreign}").json()["detail"]
            for key in ("nope", "0" * 36, foreign, "../etc/passwd", "x" * 64):
                for tool, more in (("memory_get", {}), ("memory_delete", {}), ("memory_update", {"content": "mine"})):
                    assert (await mcp.problem(tool, 404, id=key, **more))["detail"] == missing
            for query in ('"open', "nocolumn:x", "   "):
                rest = assert_problem(api.post("/v1/search", json={"query": query}), 400)
                assert (await mcp.problem("memory_search", 400, query=query))["detail"] == rest["detail"]
            rest = assert_problem(api.get("/v1/memories", params={"cursor": "x"}), 400)
            assert (await mcp.problem("memory_list", 400, cursor="x"))["detail"] == rest["detail"]
            assert (await mcp.ok("memory_search", query="theirs"))["count"] == 0
            assert (await mcp.ok("memory_stats"))["memories"] == 0
            with pytest.raises(MCPError, match="Unknown tool"):
                await mcp.client.call_tool("memory_drop", {})

        within(stack, tenant, work, mode)
        assert stranger.get(f"/v1/memories/{foreign}").json()["content"] == "theirs"


BAD_ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("memory_create", {}),
    ("memory_create", {"content": ""}),
    ("memory_create", {"content": 1}),
    ("memory_create", {"content": None}),
    ("memory_create", {"content": "x" * 100_001}),
    ("memory_create", {"content": "a\x00b"}),
    ("memory_create", {"content": "x", "id": "mine"}),
    ("memory_create", {"content": "x", "importance": "0.5"}),
    ("memory_create", {"content": "x", "importance": True}),
    ("memory_create", {"content": "x", "importance": 1.01}),
    ("memory_create", {"content": "x", "tags": "a"}),
    ("memory_create", {"content": "x", "tags": ["t"] * 65}),
    ("memory_create", {"content": "x", "metadata": {"a": "x" * 70_000}}),
    ("memory_create_batch", {}),
    ("memory_create_batch", {"memories": []}),
    ("memory_create_batch", {"memories": [{"content": "x"}] * (BATCH + 1)}),
    ("memory_create_batch", {"memories": [{"content": "good"}, {"content": ""}]}),
    ("memory_create_batch", {"memories": [{"content": "good"}, {"content": "x", "tags": ["\x00"]}]}),
    ("memory_get", {}),
    ("memory_get", {"id": 1}),
    ("memory_update", {"id": "x"}),
    ("memory_update", {"content": "x"}),
    ("memory_update", {"id": "x", "tags": None}),
    ("memory_delete", {"id": "x", "content": "y"}),
    ("memory_list", {"limit": 0}),
    ("memory_list", {"limit": 201}),
    ("memory_list", {"limit": "5"}),
    ("memory_search", {}),
    ("memory_search", {"query": "x", "limit": 101}),
    ("memory_stats", {"all": True}),
]


def test_arguments_outside_their_bounds_are_refused_and_store_nothing(stack: Stack) -> None:  # noqa: F811
    """One bad memory of a batch refuses the whole batch, before anything is written."""
    tenant = stack.tenant()

    async def work(mcp: Session) -> None:
        for tool, arguments in BAD_ARGUMENTS:
            assert "arguments" in (await mcp.problem(tool, 400, **arguments))["detail"], (tool, arguments)
        assert (await mcp.ok("memory_stats"))["memories"] == 0

    within(stack, tenant, work)
    assert all(e.memories_created == 0 for e in stack.gateway.events(tenant))


def test_each_tool_asks_for_its_own_scope(stack: Stack) -> None:  # noqa: F811
    """The tool error names the scope that is missing; the list of tools is everybody's."""
    tenant = stack.tenant()
    with stack.client(tenant) as api:
        key = api.post("/v1/memories", json={"content": "x"}).json()["id"]
    arguments: dict[str, dict[str, Any]] = {
        "memory_create": {"content": "x"},
        "memory_create_batch": {"memories": [{"content": "x"}]},
        "memory_get": {"id": key},
        "memory_update": {"id": key, "content": "y"},
        "memory_list": {},
        "memory_search": {"query": "x"},
        "memory_stats": {},
        "memory_delete": {"id": key},
    }
    for granted in ("memories:read", "search", "memories:write", "admin"):

        async def work(mcp: Session, granted: str = granted) -> None:
            assert len((await mcp.client.list_tools()).tools) == len(TOOLS)
            for tool, given in arguments.items():
                if TOOLS[tool] == granted:
                    await mcp.ok(tool, **given)
                else:
                    assert TOOLS[tool] in (await mcp.problem(tool, 403, **given))["detail"]

        within(stack, tenant, work, scope=granted)


def test_every_mcp_request_is_one_event_that_counts_what_its_tool_did(stack: Stack) -> None:  # noqa: F811
    """The client's answers and the spool's events are the same set of ids, whatever the clients did at once."""
    tenant = stack.tenant()
    expected: dict[str, tuple[str, int, int, int, int]] = {}

    async def work(mcp: Session) -> None:
        done: list[tuple[str, int, tuple[int, int, int]]] = []
        for n in range(5):
            key = (await mcp.ok("memory_create", content=f"m {n}"))["id"]
            await mcp.ok("memory_create_batch", memories=[{"content": "b"}] * (n + 2))
            await mcp.ok("memory_search", query="b")
            await mcp.problem("memory_search", 400, query='"')
            await mcp.ok("memory_get", id=key)
            await mcp.ok("memory_delete", id=key)
            await mcp.problem("memory_get", 404, id=key)
            await mcp.problem("memory_create", 400)
            done += [
                ("memory_create", 200, (1, 0, 1)),
                ("memory_create_batch", 200, (1, 0, n + 2)),
                ("memory_search", 200, (1, 1, 0)),
                ("memory_search", 400, (1, 0, 0)),
                ("memory_get", 200, (1, 0, 0)),
                ("memory_delete", 200, (1, 0, 0)),
                ("memory_get", 404, (1, 0, 0)),
                ("memory_create", 400, (1, 0, 0)),
            ]
        for key, (status, name) in mcp.answers.items():
            if name in TOOLS:
                assert status == 200
                planned = done.pop(0)
                assert planned[0] == name
                expected[key] = ("/v1/mcp", planned[1], *planned[2])
            else:
                expected[key] = ("/v1/mcp", status, 1, 0, 0)
        assert not done

    async def clients() -> None:
        async def one(mode: str) -> None:
            async with session(stack, tenant, mode) as opened:
                await work(opened)

        await asyncio.gather(one("legacy"), one("auto"), one("legacy"), one("auto"))

    asyncio.run(clients())
    assert events_of(stack, tenant) == expected
    assert {name for _, name, *_ in expected.values()} >= {200, 400, 404}


def test_under_maintenance_writes_fail_as_tool_errors_that_say_when_to_retry(stack: Stack) -> None:  # noqa: F811
    """Reads go on; what was refused is not billed, and its status is seen in the metrics, though MCP sends 200."""
    tenant = stack.tenant()
    paths = TenantPaths.of(stack.settings.tenants_dir, tenant)
    before = stack.gateway.metric("engram_requests_total", route="/v1/mcp", status="503")

    async def work(mcp: Session) -> None:
        key = (await mcp.ok("memory_create", content="before"))["id"]
        paths.mark.write_text("test")
        for tool, arguments in (
            ("memory_create", {"content": "x"}),
            ("memory_create_batch", {"memories": [{"content": "x"}]}),
            ("memory_update", {"id": key, "content": "x"}),
            ("memory_delete", {"id": key}),
        ):
            refused = await mcp.problem(tool, 503, **arguments)
            assert refused["reason"] == "maintenance" and refused["retry_after"] >= 1
        assert (await mcp.ok("memory_get", id=key))["content"] == "before"
        assert (await mcp.ok("memory_search", query="before"))["count"] == 1
        paths.mark.unlink()
        assert (await mcp.ok("memory_update", id=key, content="after"))["content"] == "after"
        lock = os.open(paths.lock, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert (await mcp.problem("memory_get", 503, id=key))["reason"] == "maintenance"
        finally:
            os.close(lock)

    within(stack, tenant, work)
    refused = [e for e in stack.gateway.events(tenant) if e.status == 503]
    assert len(refused) == 5 and not any(e.api_calls or e.memories_created for e in refused)
    assert stack.gateway.metric("engram_requests_total", route="/v1/mcp", status="503") == before + 5


def test_a_broken_database_is_a_tool_error_without_a_path_and_heals(stack: Stack) -> None:  # noqa: F811
    """Never a stack trace, never a JSON-RPC internal error; the cause is in the log under the request's id."""
    tenant = stack.tenant()
    paths = TenantPaths.of(stack.settings.tenants_dir, tenant)
    hidden = paths.current.with_name("hidden")

    async def work(mcp: Session) -> None:
        paths.current.rename(hidden)
        refused = await mcp.problem("memory_list", 503)
        assert refused["reason"] == "tenant database unavailable" and "/" not in refused["detail"]
        logged = eventually(lambda: [x for x in stack.gateway.log() if x.get("request_id") == refused["request_id"]])
        assert any(line["event"] == "request_refused" for line in logged)
        hidden.rename(paths.current)
        await mcp.ok("memory_create", content="back")

    within(stack, tenant, work)


def test_limits_of_a_class_of_routes_hold_for_its_tools_too(stack: Stack) -> None:  # noqa: F811
    """An operator's shedding and a rate for searches: a way around them would be MCP. Other tools go on."""
    tenant = stack.tenant()
    rate = {"rps": 0, "search_rps": 0.001}

    async def work(mcp: Session) -> None:
        await mcp.ok("memory_create", content="x")
        limits.set_limit(stack.settings, f"rate_limit:{tenant}", rate, ttl_seconds=60, reason="test")

        async def refused(status: int, reason: str) -> None:
            for _ in range(200):
                result = await mcp.client.call_tool("memory_search", {"query": "x"})
                if result.is_error:
                    problem = json.loads(result.content[0].text)
                    assert (problem["status"], problem["reason"]) == (status, reason)
                    assert problem["retry_after"] >= 1
                    return
                await asyncio.sleep(0.05)
            raise AssertionError("never refused")

        await refused(429, "rate limited")
        assert (await mcp.ok("memory_list"))["memories"]
        limits.clear(stack.settings, f"rate_limit:{tenant}")
        limits.set_limit(stack.settings, "shed", ["list"], ttl_seconds=60, reason="test")
        try:
            for _ in range(200):
                shed = await mcp.client.call_tool("memory_stats", {})
                if shed.is_error:
                    break
                await asyncio.sleep(0.05)
            assert json.loads(shed.content[0].text)["reason"] == "shed"
            await mcp.ok("memory_create", content="y")
        finally:
            limits.clear(stack.settings, "shed")

    within(stack, tenant, work)
    refusals = [e for e in stack.gateway.events(tenant) if e.status in (429, 503)]
    assert len(refusals) >= 2 and not any(e.api_calls or e.search_queries for e in refusals)


def test_a_used_up_quota_refuses_the_tools_that_draw_on_it(stack: Stack) -> None:  # noqa: F811
    """402 as a tool error, with the counter; what draws on another counter is served. A batch counts as its parts
    before it runs: four where three are allowed are refused, three are not."""
    with stack.control_plane.transaction() as connection:
        connection.execute(
            "INSERT INTO plans (plan_id, search_queries_hard, memories_created_hard)"
            " VALUES ('mcp-nothing', 0, 0), ('mcp-three', NULL, 3)"
        )
    three = f"{stack.tenant()}-three"  # in the first snapshot that holds the poor one too
    registry.create(stack.control_plane, stack.settings, three, plan_id="mcp-three")
    tenant = f"{stack.tenant()}-poor"
    registry.create(stack.control_plane, stack.settings, tenant, plan_id="mcp-nothing")

    async def work(mcp: Session) -> None:
        for tool, arguments, metric in (
            ("memory_search", {"query": "x"}, "search_queries"),
            ("memory_create", {"content": "x"}, "memories_created"),
            ("memory_create_batch", {"memories": [{"content": "x"}]}, "memories_created"),
        ):
            in_a_row = 0
            for _ in range(600):  # each worker reads the plans on its own
                result = await mcp.client.call_tool(tool, arguments)
                in_a_row = in_a_row + 1 if result.is_error else 0
                if in_a_row == 5:
                    break
                await asyncio.sleep(0.05)
            problem = json.loads(result.content[0].text)
            assert problem["status"] == 402 and problem["metric"] == metric and problem["limit"] == 0
        await mcp.ok("memory_list")

    within(stack, tenant, work)

    async def batches(mcp: Session) -> None:
        memories = [{"content": "x"}] * 4
        for _ in range(4):
            problem = await mcp.problem("memory_create_batch", 402, memories=memories)
            assert (problem["metric"], problem["current"], problem["limit"]) == ("memories_created", 0, 3)
            assert "4 more" in problem["detail"]
        assert (await mcp.ok("memory_stats"))["memories"] == 0
        assert (await mcp.ok("memory_create_batch", memories=memories[:3]))["count"] == 3

    within(stack, three, batches)


def test_a_tool_takes_a_place_of_its_own_class() -> None:
    """Where half of the places are taken a search waits and a lookup does not; whose request is over takes none."""

    async def test() -> None:
        settings = Settings(inflight_requests=4, inflight_wait_seconds=0.05)
        gate = Gate(settings, Watch(settings))
        services = SimpleNamespace(gate=gate)
        calls = []
        for _ in range(3):
            exchange = Exchange("POST", None)
            exchange.tenant_id, exchange.leave = "acme", await gate.enter("acme", "get")
            calls.append(Call(services, exchange))  # type: ignore[arg-type]
        first, second, third = calls
        await change_place(tools.TOOLS["memory_get"].cost, first)
        with pytest.raises(Refusal) as refused:
            await change_place(tools.TOOLS["memory_search"].cost, second)
        assert refused.value.problem.reason == "shed" and second.exchange.leave is None, "and has given back its own"
        third.exchange.status = CLIENT_LEFT.status
        with pytest.raises(Refusal):
            await change_place(tools.TOOLS["memory_get"].cost, third)
        with pytest.raises(Refusal):
            await change_place(tools.TOOLS["memory_get"].cost, third)
        assert first.exchange.leave is not None
        first.exchange.leave()
        for leave in [await gate.enter("acme", "get") for _ in range(4)]:  # all four are free again
            leave()

    asyncio.run(test())


def test_the_guard_of_rest_stands_before_mcp(stack: Stack) -> None:  # noqa: F811
    """No token, another audience, a suspended tenant, a tenant header: the same answers, in the same order."""
    tenant, url = stack.tenant(), "/v1/mcp"
    anonymous = assert_problem(stack.gateway.client.post(url, json=PING), 401)
    rest = assert_problem(stack.gateway.client.get("/v1/memories"), 401)
    assert anonymous["detail"] == rest["detail"]
    assert_problem(stack.gateway.client.post(url, content=b"x" * 600_000), 401)
    with stack.client(tenant, aud="other") as api:
        assert_problem(api.post(url, json=PING), 401)
    with stack.client("never-created") as api:
        assert_problem(api.post(url, json=PING), 403)
    with stack.client(tenant) as api:
        assert_problem(api.post(url, json=PING, headers={"X-Engram-Tenant": "other"}), 403)
        assert api.post(url, json=PING, headers={"X-Engram-Tenant": tenant}).json()["result"] == {}
        registry.suspend(stack.control_plane, tenant)
        eventually(lambda: all(api.post(url, json=PING).status_code == 403 for _ in range(5)))


def test_only_known_origins_may_call(stack: Stack) -> None:  # noqa: F811
    """A page elsewhere cannot, nor one whose name was rebound to this address; no Origin is no browser."""
    where = stack.gateway.url.removeprefix("http://")
    with stack.client(stack.idle_tenant) as api:

        def status(**headers: str) -> int:
            response = api.post("/v1/mcp", json=PING, headers=headers)
            if response.status_code != 200:
                assert_problem(response, response.status_code)
            return response.status_code

        assert status() == 200
        assert status(Origin=f"http://{where}") == 200
        for foreign in ("https://evil.example", "null", "", f"http://{where}.evil.example", "file://"):
            assert status(Origin=foreign) == 403, foreign
        assert status(Origin="http://evil.example", Host="evil.example") == 403
        assert status(Origin="http://evil.example:80", Host=where) == 403


def test_origins_are_judged_by_what_was_configured() -> None:
    """Outside dev localhost is nobody special; a public gateway takes the host that was asked for."""
    public = Origins(
        Settings(env="prod", gateway_host="0.0.0.0", cors_allowed_origins="https://app.example.com, https://b.example/")
    )
    assert public.allows("https://app.example.com", "api.example.com")
    assert public.allows("https://b.example", "api.example.com")
    assert public.allows("https://api.example.com", "API.example.com")
    for foreign in ("http://app.example.com", "https://app.example.com.evil", "http://localhost:6274", "null"):
        assert not public.allows(foreign, "api.example.com"), foreign
    local = Origins(Settings(env="dev", gateway_host="127.0.0.1"))
    assert local.allows("http://localhost:6274", "127.0.0.1:8080")
    assert not local.allows("http://localhost:6274", "evil.example:8080")
    assert not local.allows("http://evil.example:8080", "evil.example:8080")


def test_what_is_no_mcp_request_is_a_problem_document(stack: Stack) -> None:  # noqa: F811
    """Without sessions there is no stream to GET and nothing to DELETE; bodies are judged as REST's are."""
    with stack.client(stack.idle_tenant) as api:
        for method in ("GET", "DELETE", "PUT"):
            refused = api.request(method, "/v1/mcp", headers={"Accept": "text/event-stream"})
            assert_problem(refused, 405)
            assert "POST" in refused.headers["allow"]
        assert_problem(api.post("/v1/mcp/x", json=PING), 404)
        json_type = {"Content-Type": "application/json"}
        for bad in (b"", b"{", b"[]", b"[{}]", b"null", b"{}", b'{"jsonrpc":"1.0"}', b'{"a":"\xff"}', b"[" * 200_000):
            assert_problem(api.post("/v1/mcp", content=bad, headers=json_type), 400)
        surrogate = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x","arguments":{"a":"\\ud800"}}}'
        assert_problem(api.post("/v1/mcp", content=surrogate, headers=json_type), 400)
        assert_problem(api.post("/v1/mcp", content=b"{}", headers={"Content-Type": "text/plain"}), 415)
        assert_problem(api.post("/v1/mcp", content=b" " * 600_000, headers=json_type), 413)
        assert_problem(api.post("/v1/mcp", json=PING, headers={"Accept": "text/html"}), 406)
        for accepted in ("*/*", "application/json", "text/event-stream, application/json;q=0.5"):
            assert api.post("/v1/mcp", json=PING, headers={"Accept": accepted}).json()["result"] == {}
        unknown = api.post("/v1/mcp", json={**PING, "method": "memories/drop"})
        assert unknown.json()["error"]["code"] == -32601


def test_an_answer_too_large_for_the_event_loop_asks_for_fewer(stack: Stack) -> None:  # noqa: F811
    """Two hundred memories may be 20 MB; a smaller page of the same list is served."""
    tenant = stack.tenant()

    async def work(mcp: Session) -> None:
        for _ in range(RESULT_BYTES // 400_000 + 1):
            await mcp.ok("memory_create_batch", memories=[{"content": "x" * 99_000}] * 4)
        assert "limit" in (await mcp.problem("memory_list", 413, limit=200))["detail"]
        assert len((await mcp.ok("memory_list", limit=4))["memories"]) == 4

    within(stack, tenant, work)


def test_rest_is_served_while_mcp_answers_are_made(stack: Stack) -> None:  # noqa: F811
    """Both share the tenant's pool: neither waits for the other's turn for ever, and all succeed."""
    tenant = stack.tenant()
    statuses: list[int] = []

    def rest() -> None:
        with stack.client(tenant) as api:
            statuses.extend(api.post("/v1/memories", json={"content": "rest"}).status_code for _ in range(30))

    thread = threading.Thread(target=rest)

    async def work(mcp: Session) -> None:
        thread.start()
        await asyncio.gather(*(mcp.ok("memory_create", content="mcp") for _ in range(30)))
        await asyncio.to_thread(thread.join)
        assert (await mcp.ok("memory_stats"))["memories"] == 60

    within(stack, tenant, work)
    assert statuses == [201] * 30


def test_what_the_sdk_logs_is_json_without_what_a_client_sent(stack: Stack) -> None:  # noqa: F811
    """Its own logging would be plain text with the message's content in it."""
    with stack.client(stack.idle_tenant) as api:
        message = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"secret": "sesame"}}
        assert api.post("/v1/mcp", json=message).status_code == 202
        answered = api.post("/v1/mcp", json=PING)
    stack.gateway.access_line(answered.headers["x-request-id"])
    assert all("event" in line for line in stack.gateway.log())
    assert "sesame" not in stack.gateway.log_path.read_text()
