"""MCP over real HTTP: the official SDK's client against the gateway's two workers, in both protocol revisions."""

from __future__ import annotations

import asyncio
import fcntl
import os
from types import SimpleNamespace
from typing import Any

import pytest
from mcp import MCPError

from gateway.mcp import route
from gateway.mcp.arguments import BATCH
from shared.settings import Settings
from shared.tenant import TenantPaths
from tests.gateway_stack import Stack, assert_problem, eventually, stack  # noqa: F401
from tests.mcp_session import Session, events_of, session, within

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
            assert (await mcp.ok("memory_search", query="pear", limit=2.0))["count"] == 2

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
    ("memory_list", {"limit": 5.5}),
    ("memory_list", {"limit": 201.0}),
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


@pytest.mark.parametrize("at_start", [True, False])
def test_the_sdk_is_loaded_with_the_worker_or_for_the_first_that_asks(at_start: bool) -> None:
    """A third of what a worker takes to start; `tests/test_gateway_routing.py` asks one that has not loaded it."""
    services = SimpleNamespace(settings=Settings(mcp_at_start=at_start))

    async def started() -> bool:
        app: Any = SimpleNamespace(state=SimpleNamespace(services=services))
        async with route.lifespan(app):
            began = app.state.mcp._starting is not None
            assert await app.state.mcp.handle() is not None
            return began

    assert asyncio.run(started()) == at_start
